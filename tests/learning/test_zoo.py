"""Networks of timm: weights of files, batch statistics, dropped paths, learning rates by layer."""

import copy
import dataclasses
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip(
    "timm",
    reason="timm is not installed: scripts/install --timm makes .venv-timm, .ci/run tests there",
)

from safetensors.torch import save_file

from tests.distributed.ranks import run_ranks
from tests.learning.fakes import train_discs
from xrai.config import Config, Images, Model, Optim, Train
from xrai.errors import ConfigError, CorruptError, UserError
from xrai.files import sha256_of
from xrai.learning import optim
from xrai.learning.distributed import join
from xrai.learning.predictor import build_model
from xrai.learning.weights import initial_weights
from xrai.learning.zoo import DropPath, SyncedNorm
from xrai.train import refuse_idle_rank

EFFICIENTNET = Model("timm/tf_efficientnet_lite0")
DENSENET = Model("timm/densenet121", input="xrv")
VIT = Model("timm/vit_tiny_patch16_224")


def state_of(model: Model, num_outputs: int, *, size: int = 32) -> dict[str, Tensor]:
    """Weights by timm's names, of a network with another head."""
    torch.manual_seed(5)
    state = build_model(model, num_outputs, image_size=size).state_dict()
    return {name.removeprefix("model."): tensor.clone() for name, tensor in state.items()}


def load(model: Model, path: Path, *, size: int = 32, num_outputs: int = 1) -> Any:
    torch.manual_seed(1)
    network = build_model(model, num_outputs, image_size=size)
    config = dataclasses.replace(model, weights=str(path))
    state, loaded = initial_weights(config, network, image_size=size)
    network.load_state_dict(state)
    assert loaded.sha256 == sha256_of(path) and loaded.source == str(path)
    return network, loaded


def test_safetensors_with_another_head_load_all_but_the_head(tmp_path: Path) -> None:
    state = state_of(EFFICIENTNET, 1000)
    save_file(state, tmp_path / "weights.safetensors")
    network, loaded = load(EFFICIENTNET, tmp_path / "weights.safetensors", num_outputs=3)
    assert loaded.left_out == ("model.classifier.weight", "model.classifier.bias")
    network.eval()  # else statistics move
    assert loaded.unused == () and network(torch.rand(2, 1, 32, 32)).shape == (2, 3)
    own = network.state_dict()
    assert all(
        torch.equal(own[f"model.{name}"], tensor)
        for name, tensor in state.items()
        if not name.startswith("classifier")
    )


def test_a_densenet_as_torchxrayvision_saves_it_sees_grey_values_as_it_does(tmp_path: Path) -> None:
    state = state_of(DENSENET, 18)
    assert state["features.conv0.weight"].shape == (64, 1, 7, 7)
    other = {"op_threshs": torch.zeros(18)}
    torch.save(
        {"state_dict": {f"module.{name}": of for name, of in {**state, **other}.items()}},
        tmp_path / "nih.pth",
    )
    network, loaded = load(DENSENET, tmp_path / "nih.pth")
    assert loaded.left_out == ("model.classifier.weight", "model.classifier.bias")
    assert loaded.unused == ("model.op_threshs",)
    seen: list[Tensor] = []
    first = network.model.features.conv0
    first.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    network(torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 1, 32, 32))
    assert seen[0][:, 0, 0, 0].tolist() == [-1024.0, 0.0, 1024.0]


def transformers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A vision transformer's weights by the names of transformers' Dinov2Model."""
    found = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": torch.zeros(1, state["cls_token"].shape[2]),
        "embeddings.position_embeddings": state["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    for name, tensor in state.items():
        if not name.startswith("blocks."):
            continue
        _, number, rest = name.split(".", 2)
        layer = f"encoder.layer.{number}"
        if rest.startswith("attn.qkv"):
            kind = rest.rpartition(".")[2]
            for part, own in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[f"{layer}.attention.attention.{part}.{kind}"] = own
        else:
            rest = rest.replace("attn.proj", "attention.output.dense")
            for number in ("1", "2"):
                rest = rest.replace(f"ls{number}.gamma", f"layer_scale{number}.lambda1")
            found[f"{layer}.{rest}"] = tensor
    return found


def test_a_dinov2_of_transformers_loads_with_its_positions_resampled(tmp_path: Path) -> None:
    model = Model("timm/vit_small_patch14_dinov2")
    state = state_of(model, 1, size=70)
    contents = {name: of.contiguous() for name, of in transformers_names(state).items()}
    save_file(contents, tmp_path / "rad-dino.safetensors")
    network, loaded = load(model, tmp_path / "rad-dino.safetensors", size=70)
    assert loaded.left_out == ("model.head.weight", "model.head.bias")
    assert loaded.unused == ("model.embeddings.mask_token",)
    own = network.state_dict()
    assert all(
        torch.equal(own[f"model.{name}"], tensor)
        for name, tensor in state.items()
        if not name.startswith("head")
    )
    larger, _ = load(model, tmp_path / "rad-dino.safetensors", size=98)
    assert larger.model.pos_embed.shape == (1, 1 + 7 * 7, 384)
    assert torch.equal(larger.model.pos_embed[:, 0], state["pos_embed"][:, 0])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Model("timm/resnet18"), r"does not fit this network: model\.conv1\.weight \(missing\), "),
        (
            dataclasses.replace(EFFICIENTNET, input="standardized"),
            r"model\.conv_stem\.weight \(32 x 3 x 3 x 3, not 32 x 1 x 3 x 3\); of .* model\.input",
        ),
    ],
)
def test_what_does_not_fit_is_named(model: Model, words: str, tmp_path: Path) -> None:
    torch.save(state_of(EFFICIENTNET, 1), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=words):
        load(model, tmp_path / "weights.pt")


def test_nothing_but_tensors_is_unpickled(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "whole.pth")
    with pytest.raises(CorruptError, match="tensors alone, and nothing else is read"):
        load(EFFICIENTNET, tmp_path / "whole.pth")
    with pytest.raises(UserError, match="there is no such file"):
        load(EFFICIENTNET, tmp_path / "gone.pth")
    with pytest.raises(UserError, match=r"a \.safetensors, \.pth"):
        load(EFFICIENTNET, tmp_path / "weights.onnx")


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("timm/resnet_18", 32, "timm has no resnet_18; it has"),
        (
            "timm/vit_tiny_patch16_224",
            40,
            "images of 40 x 40 pixels: its patches of 16 pixels do not",
        ),
    ],
)
def test_a_network_that_cannot_be_made_is_one_clear_line(name: str, size: int, words: str) -> None:
    with pytest.raises((ConfigError, UserError), match=words) as found:
        build_model(Model(name), 1, image_size=size)
    assert "\n" not in str(found.value)


def test_frozen_statistics_stay_and_make_no_image_depend_on_another() -> None:
    frozen = build_model(Model("timm/resnet18", batch_norm="frozen"), 1, image_size=32).train()
    images = torch.rand(4, 1, 32, 32)
    before = {name: of.clone() for name, of in frozen.named_buffers()}
    together = frozen(images)
    together.sum().backward()
    assert torch.allclose(together[:1], frozen(images[:1]), atol=1e-5)
    assert all(torch.equal(of, before[name]) for name, of in frozen.named_buffers())
    local = build_model(Model("timm/resnet18", batch_norm="local"), 1, image_size=32).train()
    assert not torch.allclose(local(images)[:1], local(images[:2])[:1], atol=1e-3)


def test_synchronized_statistics_on_one_rank_are_those_of_torch() -> None:
    local, synced = (
        build_model(dataclasses.replace(EFFICIENTNET, batch_norm=kind), 1, image_size=32).double()
        for kind in ("local", "sync")
    )
    synced.load_state_dict(local.state_dict())
    assert any(isinstance(module, SyncedNorm) for module in synced.modules())
    images = torch.rand(4, 1, 32, 32).double()
    for _ in range(2):
        ours, theirs = synced.train()(images), local.train()(images)
        torch.testing.assert_close(ours, theirs)
        (ours.square().sum() + theirs.square().sum()).backward()
    for own, other in zip(synced.parameters(), local.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)
    torch.testing.assert_close(synced.eval()(images), local.eval()(images))


@pytest.mark.parametrize(
    ("kind", "shape"), [("1d", (6, 5)), ("1d", (6, 5, 3)), ("2d", (6, 5, 3, 4))]
)
def test_synchronized_statistics_take_values_of_any_number_of_dimensions(
    kind: str, shape: tuple[int, ...]
) -> None:
    norm = getattr(nn, f"BatchNorm{kind}")(shape[1]).double()
    values, wanted = torch.rand(shape).double(), torch.rand(shape).double()
    gradients = []
    for module in (norm, SyncedNorm(norm)):
        own = values.clone().requires_grad_()
        (module(own) - wanted).square().sum().backward()
        gradients.append(own.grad)
    torch.testing.assert_close(*gradients)


def test_dropped_paths_depend_on_the_image_alone() -> None:
    network = build_model(Model("timm/convnextv2_atto", drop_path=0.5), 1, image_size=32).train()
    assert network.num_draws == sum(isinstance(each, DropPath) for each in network.modules()) > 3
    images, draws = torch.rand(3, 1, 32, 32), torch.rand(3, network.num_draws) * 2 - 1
    network.draw(draws)
    together = network(images)
    network.draw(draws[:1])
    torch.testing.assert_close(together[:1], network(images[:1]))
    network.draw(-draws[:1])
    assert not torch.allclose(together[:1], network(images[:1]))
    network.eval()
    torch.testing.assert_close(network(images[:1]), network(images)[:1])


@pytest.mark.parametrize("model", [Model(width=8), Model("timm/convnextv2_atto"), VIT])
def test_each_layer_before_the_head_learns_more_slowly(model: Model) -> None:
    network = build_model(model, 1, image_size=32)
    optimizer = optim.make_optimizer(network, Optim(layer_decay=0.5))
    scales = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(network.named_parameters())
    assert scales.keys() == {id(parameter) for parameter in named.values()}
    heads = [scales[id(p)] for name, p in named.items() if name.startswith(network.head_prefixes())]
    first = scales[id(next(iter(named.values())))]
    assert set(heads) == {1.0} and first == min(scales.values()) <= 0.5**5
    whole = optim.make_optimizer(network, Optim()).param_groups
    assert len(whole) == 2 and all(group["scale"] == 1 for group in whole)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "convnextv2_atto"])
def test_a_new_head_gives_logits_near_0(name: str) -> None:
    torch.manual_seed(0)
    network = build_model(Model(f"timm/{name}"), 1, image_size=32)
    head = network.get_parameter([name for name, _ in network.named_parameters()][-2]).detach()
    assert head.shape[0] == 1 and 0.005 < float(head.std()) < 0.02


def test_only_the_head_learns_in_frozen_epochs() -> None:
    train = Train(epochs=1, global_batch_size=32, precision="off", threads=1, freeze_epochs=1)
    torch.manual_seed(0)
    before = build_model(Model(width=8), 1).state_dict()
    with join(timeout_s=10) as ranks:
        config = Config(model=Model(width=8), train=train)
        after = train_discs(config, ranks=ranks, num_images=64, num_val=9).weights
    moved = {name for name, of in before.items() if after[name] != of.double().flatten().tolist()}
    assert moved == {"head.weight", "head.bias"}


def test_a_last_batch_of_fewer_images_than_parts_leaves_statistics_finite() -> None:
    config = Config(
        model=Model("timm/resnet18", batch_norm="sync"),
        train=Train(epochs=1, global_batch_size=16, accumulation_steps=4, precision="off"),
    )
    with join(timeout_s=10) as ranks:
        found = train_discs(config, ranks=ranks, num_images=34, num_val=9)
    assert len(found.losses) == 3
    assert all(math.isfinite(result.val_loss) for result in found.results)


@pytest.mark.parametrize(
    ("name", "fails"),
    [("swin_tiny_patch4_window7_224", True), ("mobilevit_xxs", True), ("resnet18", False)],
)
def test_a_rank_without_images_is_refused_for_networks_that_need_some(
    name: str, fails: bool
) -> None:
    config = Config(
        model=Model(f"timm/{name}"), images=Images(size=64), train=Train(global_batch_size=16)
    )
    for num_images, num_ranks in ((33, 1), (34, 2), (32, 4)):
        refuse_idle_rank(config, num_images=num_images, num_ranks=num_ranks)
    words = f"has 1 image for 2 processes, and model.name = timm/{name} cannot"
    with pytest.raises(UserError, match=words) if fails else nullcontext():
        refuse_idle_rank(config, num_images=33, num_ranks=2)


@pytest.mark.parametrize("name", ["ghostnet_100", "resnet18"])
def test_networks_draw_no_dropout_of_their_own(name: str) -> None:
    network = build_model(Model(f"timm/{name}"), 1, image_size=32).train()
    images, before = torch.rand(2, 1, 32, 32), torch.get_rng_state()
    network(images)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [64, 96])
def test_patches_that_overlap_need_not_divide_an_image(size: int) -> None:
    network = build_model(Model("timm/pvt_v2_b0"), 1, image_size=size).eval()
    assert network(torch.rand(2, 1, size, size)).shape == (2, 1)


def test_depthwise_convolutions_run_in_fp32_under_bf16_on_a_cpu() -> None:
    network = build_model(EFFICIENTNET, 1, image_size=32).eval()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    images = torch.rand(2, 1, 32, 32)
    kinds: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            is_depthwise = module.groups > 1
            module.register_forward_hook(
                lambda _, __, maps, of=kinds[is_depthwise]: of.add(maps.dtype)
            )
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(images)
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}
    assert logits.any() and not twin(images).any()  # a copy has weights of its own
    assert network.double()(images.double()).dtype == torch.float64


@pytest.mark.distributed
@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize(
    "options",
    [
        ["timm/resnet18", "--model.batch_norm=sync"],
        ["timm/convnextv2_atto", "--model.drop_path=0.3", "--optim.layer_decay=0.7"],
        ["timm/tf_efficientnet_lite0", "--model.batch_norm=frozen"],
        ["timm/densenet121", "--model.batch_norm=frozen"],
        ["timm/vit_tiny_patch16_224", "--train.freeze_epochs=1", "--train.epochs=2"],
        ["resnet18", "--model.width=8"],  # ours; of resnet10 tests/distributed has it
    ],
    ids=lambda options: options[0],
)
def test_losses_are_the_same_on_1_and_2_ranks(options: list[str]) -> None:
    name, *others = options
    command = ["tests/distributed/discs_rank.py", f"--model.name={name}", "--train.precision=fp64"]
    command += ["--train.global_batch_size=16", "--train.epochs=1", *others]
    command += ["--num_images=35", "--num_val=5", "--optim.lr=1e-4"]
    one, two = (run_ranks(command, world_size=world_size)[0] for world_size in (1, 2))
    assert len(one["losses"]) == 3 * len(one["epochs"])
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-9)
    ours, theirs = one["epochs"][0]["val_logits"], two["epochs"][0]["val_logits"]
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), atol=1e-6, rtol=0)
