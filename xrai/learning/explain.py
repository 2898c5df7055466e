"""Heat maps: where in an image the network found evidence for one of its outputs.

They explain the network, not the lungs. They are LayerCAM (Jiang et al. 2021,
https://doi.org/10.1109/TIP.2021.3089943) on the last feature maps of at least `MIN_CELLS` x
`MIN_CELLS`: the weight of each position is the logit's own gradient there. Grad-CAM (Selvaraju et
al. 2017, https://arxiv.org/abs/1610.02391) weighs the last maps by the mean gradient. At 64 pixels
those are 2 x 2, too coarse to show a lobe, and on finer maps one weight a map says little.

Chosen on 160 real images with pneumonia (one run, 64 pixels): the hottest 10 % of each image were
replaced by its mean grey, by the same area of a normal image, or by a strong blur, and the logit
fell by
    LayerCAM at 16 x 16: 3.8, 4.5, 2.2    at 8 x 8: 6.0, 4.0, 1.0    at 4 x 4: 6.9, 4.5, 0.8
    Grad-CAM at 16 x 16: 0.2, 1.6, 0.0    at 8 x 8: 3.4, 2.0, 0.4    at 4 x 4: 6.2, 3.4, 0.9
    random positions:    3.5, 3.3, 0.5
At 16 x 16 the maps are speckled; at 4 x 4 nearly all show one blob in the middle. A heat map does
not localize disease: it has not been compared with what radiologists mark.
"""

import torch
from torch import Tensor
from torch.nn import functional

from xrai.learning.network import Network

MIN_CELLS = 8  # a side of the feature maps that are shown


def layer_cam(network: Network, images: Tensor, output: int | Tensor = 0) -> Tensor:
    """Heat maps (B, H, W) in [0, 1] of grey values (B, 1, H, W) in [0, 1].

    They show the evidence for one output: one for all images, or each image's own, (B,) int64. 1 is
    each image's hottest position. An image without evidence has a map of zeros. Works inside
    `torch.inference_mode` too.
    """
    network.eval()
    with torch.inference_mode(False), torch.enable_grad():
        seen = images.clone().requires_grad_()
        logits, stages = network.look(seen)  # (B, C)
        outputs = torch.as_tensor(output, device=logits.device).expand(len(logits))[:, None]
        maps = _shown(stages)
        evidence = logits.gather(1, outputs).sum()
        (gradients,) = torch.autograd.grad(evidence, maps, retain_graph=True, allow_unused=True)
        if gradients is None:  # the logits do not depend on these maps: use the image
            (gradients,) = torch.autograd.grad(evidence, seen)
            maps, gradients = (
                functional.adaptive_avg_pool2d(each, MIN_CELLS) for each in (seen, gradients)
            )
        heat = (gradients.relu() * maps.detach()).sum(dim=1).relu()  # (B, h, w)
        fine = functional.interpolate(
            heat[:, None], size=images.shape[2:], mode="bilinear", align_corners=False
        )
    hottest = fine.amax(dim=(1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    return (fine / hottest.clamp_min(torch.finfo(fine.dtype).tiny)).squeeze(1)


def laid_over(maps: Tensor, boxes: Tensor, *, onto: Tensor, size: int) -> Tensor:
    """Resample heat maps (B, H, W), whose squares show `boxes` of their images, to (B, size, size),
    whose squares show the boxes `onto`; zero outside of `boxes`.

    Boxes are (B, 4): left, top, right, bottom, all in one unit of length.
    """
    middles = (torch.arange(size, dtype=boxes.dtype) + 0.5) / size
    places = onto[:, None, :2] + middles[:, None] * (onto[:, 2:] - onto[:, :2])[:, None]
    shares = (places - boxes[:, None, :2]) / (boxes[:, 2:] - boxes[:, :2])[:, None]  # (B, size, 2)
    across, down = shares[:, None, :, 0], shares[:, :, None, 1]
    shape = (len(maps), size, size)
    grid = torch.stack([across.expand(shape), down.expand(shape)], dim=-1) * 2 - 1
    found = functional.grid_sample(
        maps[:, None], grid.to(maps.dtype), padding_mode="border", align_corners=False
    )
    return found[:, 0] * (grid.abs().amax(dim=-1) <= 1)


def _shown(stages: list[Tensor]) -> Tensor:
    """The last maps of at least `MIN_CELLS` a side, else the first ones; not those of the stem."""
    maps = stages[1:] or stages
    fine_enough = [each for each in maps if min(each.shape[2:]) >= MIN_CELLS]
    return fine_enough[-1] if fine_enough else maps[0]
