"""A network and its review rule as one call into torch: for `xrai.pipeline` once it has scored
much, and for `xrai serve` where there is no graph of them (`xrai.learning.engine`).

In Python, each of some 200 operations releases the interpreter lock and then waits for it, behind
the threads that decode or answer requests. A trace runs without the lock. `torch.jit` is
deprecated, but so far nothing else in torch does this without a compiler: a program of
`torch.export` runs in Python.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from xrai.learning.network import Network
from xrai.learning.typicality import Typicality
from xrai.log import ignore_warnings

Look = Callable[[Tensor], tuple[Tensor, Tensor]]  # as `Typicality.atypicality` with its network

_NUMS_TRIED: Final = (1, 2, 7)  # sizes of the batches that a trace is tried with
# Of logits and atypicality; of a probability this is a quarter. Torch's own logits near 0 differ by
# up to 1e-7 between sizes of a batch, ONNX Runtime's by up to 4e-6 from them on images of noise
_ATOL, _RTOL = 1e-5, 1e-5


class Whole(nn.Module):
    """A network and its review rule: grey values (B, 1, H, W) in [0, 1] to logits (B, C) and
    atypicality (B,).
    """

    def __init__(self, network: Network, typicality: Typicality) -> None:
        super().__init__()
        self.network, self.typicality = network, typicality

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See `Typicality.atypicality`."""
        return self.typicality.atypicality(self.network, images)


def trace(network: Network, typicality: Typicality, images: Tensor) -> Look | None:
    """`typicality.atypicality` of the network as a trace, for batches of any size. None where it
    gives other results for parts of these images (B, 1, H, W), B >= 7, in [0, 1].
    """
    whole = Whole(network, typicality).eval()
    # Warnings of deprecation, and of shapes, which are tried below
    with torch.inference_mode(), ignore_warnings():
        try:
            traced: Look = torch.jit.trace(whole, images[:3], check_trace=False)
            return traced if agrees(whole, traced, images) else None
        except (RuntimeError, TypeError, ValueError):  # a network that cannot be traced
            return None


def agrees(whole: Look, look: Look, images: Tensor) -> bool:
    """Whether both give the same for parts of these images (B, 1, H, W), B >= 7, but for
    rounding.
    """
    with torch.inference_mode():
        return all(
            torch.allclose(own, other, rtol=_RTOL, atol=_ATOL)
            for num in _NUMS_TRIED
            for own, other in zip(whole(images[:num]), look(images[:num]), strict=True)
        )
