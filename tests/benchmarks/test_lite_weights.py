"""Weights of other names are paired by their order, and only where each one fits."""

import pytest
import torch

from benchmarks.lite_weights import rename


def test_tensors_get_the_names_of_the_same_place() -> None:
    found = {"_conv.weight": torch.ones(2, 3), "_bn0.running_var": torch.full((2,), 5.0)}
    own = {"conv_stem.weight": torch.zeros(2, 3), "bn1.running_var": torch.zeros(2)}
    renamed = rename(found, own)
    assert list(renamed) == ["conv_stem.weight", "bn1.running_var"]
    assert renamed["conv_stem.weight"] is found["_conv.weight"]
    assert renamed["bn1.running_var"] is found["_bn0.running_var"]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"a.weight": torch.zeros(2)}, "has 2 tensors, the network 1"),
        ({"a.weight": torch.zeros(2), "a.bias": torch.zeros(3)}, r"x.bias \(2,\) does not fit a"),
        ({"a.bias": torch.zeros(2), "a.weight": torch.zeros(2)}, r"x.weight \(2,\) does not fit a"),
    ],
)
def test_what_does_not_fit_is_refused(own: dict[str, torch.Tensor], message: str) -> None:
    found = {"x.weight": torch.zeros(2), "x.bias": torch.zeros(2)}
    with pytest.raises(ValueError, match=message):
        rename(found, own)
