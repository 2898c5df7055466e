"""What the labels of a data set are, as columns of outputs."""

import numpy as np

from xrai.labels import LabelSpec


def test_labels_become_one_column_for_each_output() -> None:
    two = LabelSpec("binary", ("NORMAL", "PNEUMONIA"))
    three = LabelSpec("multiclass", ("NORMAL", "BACTERIAL", "VIRAL"))
    findings = LabelSpec("multilabel", ("effusion", "nodule"))
    assert (two.num_outputs, three.num_outputs, findings.num_outputs) == (1, 3, 2)
    labels = np.array([1, 0], np.uint8)
    assert two.matrix(labels).tolist() == [[1], [0]]
    assert three.matrix(labels).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert findings.matrix(np.array([[1, -1]], np.int8)).tolist() == [[1, -1]]
