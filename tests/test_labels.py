"""What the labels of a data set are, as columns of outputs."""

import numpy as np
import pytest

from xrai.labels import LabelSpec, Task


def test_labels_become_one_column_for_each_output() -> None:
    two = LabelSpec("binary", ("NORMAL", "PNEUMONIA"))
    three = LabelSpec("multiclass", ("NORMAL", "BACTERIAL", "VIRAL"))
    findings = LabelSpec("multilabel", ("effusion", "nodule"))
    assert (two.num_outputs, three.num_outputs, findings.num_outputs) == (1, 3, 2)
    labels = np.array([1, 0], np.uint8)
    assert two.matrix(labels).tolist() == [[1], [0]]
    assert three.matrix(labels).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert findings.matrix(np.array([[1, -1]], np.int8)).tolist() == [[1, -1]]


FINDINGS = LabelSpec("multilabel", ("Effusion", "Nodule", "Hernia"))


def test_findings_are_stored_as_int8_and_classes_as_uint8() -> None:
    rows = [(1, 0, -1), (0, 0, -1)]
    found = FINDINGS.array(rows)
    assert found.dtype == np.int8 and found.tolist() == [list(row) for row in rows]
    assert FINDINGS.array([]).shape == (0, 3)
    three = LabelSpec("multiclass", ("A", "B", "C"))
    assert three.array([2, 0]).dtype == np.uint8 and three.array([]).shape == (0,)


def test_images_are_counted_by_class_or_by_finding_and_unknown_ones_apart() -> None:
    assert FINDINGS.count(FINDINGS.array([(1, 0, -1), (1, 1, -1)])) == ((2, 1, 0), (0, 0, 2))
    three = LabelSpec("multiclass", ("A", "B", "C"))
    assert three.count(three.array([0, 0, 1])) == ((2, 1, 0), ())


def test_a_label_that_a_data_set_cannot_have_is_known_as_such() -> None:
    assert FINDINGS.allows((1, 0, -1))
    for label in (1, (), (1, 0), (1, 0, 2), (1, 0, -2), (1, 0, -1, 0)):
        assert not FINDINGS.allows(label)
    two = LabelSpec("binary", ("A", "B"))
    assert [two.allows(label) for label in (0, 1, 2, -1, (1,))] == [True, True, False, False, False]


RESERVED = "predictions use as a word of their own; give it another name"
NO_NAME = "is no name: it takes 1 to 60 printable characters without |"


@pytest.mark.parametrize(
    ("task", "classes", "words"),
    [
        ("binary", ("NORMAL", "PNEUMONIA"), ""),
        ("multiclass", ("A", "B", "C"), ""),
        ("multilabel", ("Nodule",), ""),
        ("binary", ("COVID",), "are one class alone, 'COVID'; there must be two at least"),
        ("multiclass", ("A", "b", "B"), "name one class twice: 'b' and 'B'"),
        ("multilabel", ("Mass", "mass"), "name one class twice: 'Mass' and 'mass'"),
        ("binary", ("A", "B", "C"), "are 3; a binary data set has 2"),
        ("multiclass", ("A", "B"), "are 2; a multiclass data set has 3 to 256"),
        ("multilabel", (), "are 0; a multilabel data set has 1 to 256"),
        ("binary", ("No finding", "TB"), ""),
        ("multiclass", ("A", "No finding", "B"), ""),
        ("multilabel", ("Mass", "no_finding"), f"have the name 'no_finding', which {RESERVED}"),
        ("binary", ("Review", "TB"), f"have the name 'Review', which {RESERVED}"),
        ("multilabel", ("Mass?",), "have the name 'Mass?', which ends in ?, which marks a finding"),
        ("binary", ("é", "e\u0301"), "name one class twice: 'é' and 'e\u0301'"),
        ("binary", ("A|B", "C"), f"have the name 'A|B', which {NO_NAME}"),
        ("binary", ("A", "B\nC"), f"have the name 'B\\nC', which {NO_NAME}"),
        ("binary", ("A", " "), f"have the name ' ', which {NO_NAME}"),
        ("trinary", ("A", "B"), "are of task 'trinary'; it is one of binary, multiclass, multi"),
    ],
)
def test_names_that_make_no_data_set_are_explained(
    task: Task, classes: tuple[str, ...], words: str
) -> None:
    found = LabelSpec(task, classes).fault()
    assert found.startswith(words) and bool(found) == bool(words)


@pytest.mark.parametrize(
    ("task", "classes", "spoken"),
    [
        ("binary", ("NORMAL", "PNEUMONIA"), ("normal", "pneumonia")),
        ("binary", ("PNEUMONIA", "NORMAL"), ("pneumonia", "normal")),
        ("binary", ("NORMAL", "mTB"), ("NORMAL", "mTB")),
        ("multiclass", ("NORMAL", "BACTERIAL", "VIRAL"), ("NORMAL", "BACTERIAL", "VIRAL")),
    ],
)
def test_only_the_public_names_are_spoken_in_lower_case(
    task: Task, classes: tuple[str, ...], spoken: tuple[str, ...]
) -> None:
    assert LabelSpec(task, classes).spoken == spoken
