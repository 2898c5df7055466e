"""A trace scores as the network does, or is not used."""

import copy
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import xrai
from tests.learning.fakes import fit_discs
from tests.models import save_run
from xrai.learning.distributed import Ranks
from xrai.learning.network import Network
from xrai.learning.tracing import trace
from xrai.learning.typicality import Typicality

ONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


class Stem(nn.Module):
    """A stem that looks at more than the image."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem = stem

    def forward(self, images: Tensor) -> Tensor:
        return cast("Tensor", self.stem(images)) * len(images)


class RefusingStem(Stem):
    """A stem that cannot be traced."""

    def forward(self, images: Tensor) -> Tensor:
        if len(images) == 3:  # only the trace has so many
            raise RuntimeError("no trace of this")
        return super().forward(images)


@pytest.fixture(scope="module")
def fitted() -> tuple[Network, Typicality]:
    return fit_discs()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(20, 1, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("num", [1, 4, 20])
def test_a_trace_scores_as_the_network_does(
    fitted: tuple[Network, Typicality], images: Tensor, num: int
) -> None:
    network, typicality = fitted
    traced = trace(network, typicality, images)
    assert isinstance(traced, torch.jit.ScriptModule)
    with torch.inference_mode():
        expected = typicality.atypicality(network, images[:num])
        for own, other in zip(traced(images[:num]), expected, strict=True):
            assert torch.equal(own, other)


@pytest.mark.parametrize("stem", [Stem, RefusingStem])
def test_a_network_that_a_trace_does_not_hold_stays_as_it_is(
    fitted: tuple[Network, Typicality], images: Tensor, stem: type[Stem]
) -> None:
    network = copy.deepcopy(fitted[0])
    network.stem = stem(cast("nn.Module", network.stem))
    assert trace(network, fitted[1], images) is None


def test_a_pipeline_gives_the_same_rows_traced(tmp_path_factory: pytest.TempPathFactory) -> None:
    pipeline = xrai.load(str(save_run(tmp_path_factory.mktemp("traced"))))
    films = np.random.default_rng(0).integers(0, 256, (5, 64, 64), np.uint8)
    before = pipeline.predict(list(films))
    pipeline.trace()
    assert isinstance(pipeline._members[0]._look, torch.jit.ScriptModule)
    assert pipeline.predict(list(films)) == before
