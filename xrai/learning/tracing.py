"""A network and its review rule as one call into torch: for `xrai serve`, and for `xrai.pipeline`
once it has scored much.

In Python, each of some 200 operations releases the interpreter lock and then waits for it, behind
the threads that decode or answer requests. A trace runs without the lock. `torch.jit` is
deprecated, but so far nothing else does this without a compiler: a program of `torch.export` runs
in Python.
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


def trace(network: Network, typicality: Typicality, images: Tensor) -> Look | None:
    """`typicality.atypicality` of the network as a trace, for batches of any size. None where it
    gives other results for parts of these images (B, 1, H, W), B >= 7, in [0, 1].
    """
    whole = _Whole(network, typicality).eval()
    # Warnings of deprecation, and of shapes, which are tried below
    with torch.inference_mode(), ignore_warnings():
        try:
            traced: Look = torch.jit.trace(whole, images[:3], check_trace=False)
            is_same = all(
                torch.allclose(own, other, rtol=1e-5, atol=1e-6)
                for num in _NUMS_TRIED
                for own, other in zip(whole(images[:num]), traced(images[:num]), strict=True)
            )
        except (RuntimeError, TypeError, ValueError):  # a network that cannot be traced
            return None
    return traced if is_same else None


class _Whole(nn.Module):
    def __init__(self, network: Network, typicality: Typicality) -> None:
        super().__init__()
        self.network, self.typicality = network, typicality

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.typicality.atypicality(self.network, images)
