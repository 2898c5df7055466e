import pytest
import torch

from xrai.learning.network import ResNet, StandardizedConv2d, num_products


@pytest.mark.parametrize("size", [16, 33, 64, 100])
@pytest.mark.parametrize("name", ["resnet10", "resnet18"])
def test_any_image_size_gives_a_logit_for_each_output(name: str, size: int) -> None:
    network = ResNet(name=name, width=8, num_outputs=5)
    assert network(torch.rand(3, 1, size, size)).shape == (3, 5)
    assert network.features(torch.rand(2, 1, size, size)).shape == (
        2,
        64,
        -(-size // 32),
        -(-size // 32),
    )


def test_the_reference_network_has_the_size_that_the_docs_name() -> None:
    assert sum(parameter.numel() for parameter in ResNet().parameters()) == 307_637


def test_an_image_has_the_same_logit_whatever_stands_beside_it() -> None:
    network = ResNet().double()
    images = torch.rand(5, 1, 32, 32, dtype=torch.float64)
    together = network(images)
    alone = torch.cat([network(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-12, rtol=0)


def test_exposure_does_not_change_the_logit() -> None:
    network = ResNet().double()
    images = 0.3 + 0.4 * torch.rand(4, 1, 32, 32, dtype=torch.float64)
    assert torch.allclose(network(images), network(images * 0.5 + 0.2), atol=0.05)


def test_a_batch_of_no_images_has_a_gradient_of_zero() -> None:
    network = ResNet()
    network(torch.empty(0, 1, 32, 32)).sum().backward()
    assert all(
        parameter.grad is not None and not parameter.grad.any()
        for parameter in network.parameters()
    )


def test_gradients_in_bfloat16_are_those_in_float32_at_the_smallest_size() -> None:
    torch.manual_seed(3)
    network, images = ResNet(width=8), torch.rand(32, 1, 16, 16)
    found = []
    for is_lower in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_lower):
            logits = network(images)
        logits.float().sum().backward()
        grads = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        found.append(torch.cat(grads))
    full, lower = found
    assert torch.isfinite(lower).all()
    assert (lower - full).norm() < 0.15 * full.norm()


def test_filters_are_standardized_whatever_the_weights() -> None:
    convolution = StandardizedConv2d(3, 5, 3)
    images = torch.rand(2, 3, 9, 9)
    before = convolution(images)
    with torch.no_grad():
        convolution.weight.mul_(7).add_(3)
    assert torch.allclose(before, convolution(images), atol=1e-4)


def test_variance_is_kept_through_a_relu_and_a_convolution() -> None:
    torch.manual_seed(0)
    convolution = StandardizedConv2d(32, 64, 3)
    features = torch.relu(torch.randn(8, 32, 20, 20))
    out = convolution(features)[:, :, 2:-2, 2:-2].detach()
    assert float(out.var()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("name", ["resnet10", "resnet18"])
@pytest.mark.parametrize("size", [64, 97])
def test_a_network_with_folded_filters_gives_the_same_logits_bit_for_bit(
    name: str, size: int
) -> None:
    network = ResNet(name=name).eval()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folded = network.for_inference()
    images = torch.rand(3, 1, size, size).contiguous(memory_format=torch.channels_last)
    assert not any(isinstance(module, StandardizedConv2d) for module in folded.modules())
    with torch.inference_mode():
        assert torch.equal(folded(images), network(images))
        assert torch.equal(folded(images[:1]), network(images[:1]))
    assert any(isinstance(module, StandardizedConv2d) for module in network.modules()), (
        "the original stays as it was"
    )


@pytest.mark.parametrize(
    ("width", "size", "expected"),
    # half of what torch.utils.flop_counter counts, torch 2.13.0
    [(16, 64, 4_341_888), (16, 32, 1_085_568), (8, 64, 1_187_904)],
)
def test_multiplications_are_counted_for_each_image(width: int, size: int, expected: int) -> None:
    network = ResNet(width=width).eval()
    assert num_products(network, torch.rand(1, 1, size, size)) == expected
    assert num_products(network.for_inference(), torch.rand(3, 1, size, size)) == 3 * expected
    assert not any(module._forward_hooks for module in network.modules())
