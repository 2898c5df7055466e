"""A trace scores as the network does, or is not used."""

import copy
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import xrai
from tests.learning.fakes import fit_discs
from tests.models import phantoms, save_random_run, save_run
from xrai import pipeline
from xrai.labels import LabelSpec
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


@pytest.mark.parametrize("kind", ["one run", "findings", "several runs"])
def test_a_pipeline_traces_itself_and_gives_the_same_rows(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "findings":
        runs = [save_random_run(tmp_path, LabelSpec("multilabel", ("Mass", "Edema", "Nodule")))]
    else:
        runs = [save_run(tmp_path, num_steps=5)]
    if kind == "several runs":
        runs.append(save_run(tmp_path, run_id="small", size=32, num_steps=5))
    monkeypatch.setattr(pipeline, "_TRACED_AFTER", 4)
    found = xrai.load(*map(str, runs))
    films: list[Any] = list(phantoms(32)[0])
    for number in (3, 20):  # excluded from the batch, not from the rows
        films[number] = np.zeros((50, 40), np.uint8)
    before = found.predict(films), found.predict(films[0]), found.predict(films[5])
    assert not any(_is_traced(member) for member in found._members)
    after = found.predict(films), found.predict(films[0]), found.predict(films[5])
    assert all(_is_traced(member) for member in found._members)
    for old, new in zip(chain(*before), chain(*after), strict=True):
        assert new == replace(old, probability=new.probability, probabilities=new.probabilities)
        values = np.array(list(new.probabilities.values())) - list(old.probabilities.values())
        assert np.abs(values).max(initial=0) <= 1e-6
    assert [row.is_readable for row in after[0]] == [k not in (3, 20) for k in range(32)]


def test_a_pipeline_is_traced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(pipeline, "_TRACED_AFTER", 2)
    monkeypatch.setattr(pipeline, "trace", lambda *_: calls.append(1))  # None: cannot be traced
    found, film = xrai.load(str(save_run(tmp_path, num_steps=1))), phantoms(1)[0][0]
    rows = [found.predict(film) for _ in range(5)]
    assert len(calls) == 1 and rows == [rows[0]] * 5
    found.trace()
    found.predict(film)
    assert len(calls) == 2
    found = xrai.load(str(tmp_path / "tiny"))
    found.trace()  # as a server does
    rows = [found.predict(film) for _ in range(5)]
    assert len(calls) == 3


def _is_traced(member: object) -> bool:
    return isinstance(member._look, torch.jit.ScriptModule)  # type: ignore[attr-defined]
