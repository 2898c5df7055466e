"""A run is measured on data sets that name the same classes or findings, in whatever order."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xrai.config import Config
from xrai.errors import DatasetError
from xrai.evaluate import refuse_other_pixels
from xrai.labels import LabelSpec, Task


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_labels_are_read_in_the_order_of_the_network_whatever_the_case(task: Task) -> None:
    own = LabelSpec(task, ("Normal", "Bacterial", "Viral"))
    found = LabelSpec(task, ("VIRAL", "normal", "BACTERIAL"))
    assert own.reads(found)
    if task == "multiclass":
        columns = found.matrix_for(own, np.array([0, 1, 2], np.uint8))
        assert columns.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
        return
    columns = found.matrix_for(own, np.array([[1, 0, -1], [0, 1, 1]], np.int8))
    assert columns.tolist() == [[0, -1, 1], [1, 1, 0]]


def test_two_classes_are_read_in_whatever_case_and_in_their_order() -> None:
    own = LabelSpec("binary", ("NORMAL", "TB"))
    assert own.reads(LabelSpec("binary", ("Normal", "tb")))
    assert not own.reads(LabelSpec("binary", ("TB", "NORMAL")))
    assert own.matrix_for(own, np.array([0, 1])).tolist() == [[0], [1]]


def loader_of(labels: LabelSpec) -> Any:
    index = SimpleNamespace(labels=labels, config=Config().to_mapping())
    return SimpleNamespace(index=index)


@pytest.mark.parametrize(
    ("names", "end"),
    [
        (("A", "B"), "the findings A, B: it lacks C"),
        (("C", "b", "A", "D"), "preprocess its source with --labels.names='A|B|C'"),
    ],
)
def test_other_names_are_refused_with_what_to_do(names: tuple[str, ...], end: str) -> None:
    own = LabelSpec("multilabel", ("A", "B", "C"))
    model: Any = SimpleNamespace(labels=own, images=Config().images, run_id="r1")
    refuse_other_pixels(model, loader_of(LabelSpec("multilabel", ("c", "A", "B"))))
    with pytest.raises(
        DatasetError, match=r"^run r1 was trained on the findings A, B, C, "
    ) as caught:
        refuse_other_pixels(model, loader_of(LabelSpec("multilabel", names)))
    assert str(caught.value).endswith(end)


def test_a_config_takes_the_sections_of_the_data_set_and_keeps_its_own() -> None:
    stored = {"labels": {"layout": "nih"}, "images": {"size": 32}, "splits": {"val_fraction": 0.3}}
    shaped = Config().shaped_by(stored)
    assert (shaped.labels.layout, shaped.images.size, shaped.splits.val_fraction) == (
        "nih",
        32,
        0.3,
    )
    assert shaped.train == Config().train
    assert Config().shaped_by({}) == Config()
