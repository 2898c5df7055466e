"""How the thread that scores uses the machine."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xrai.serving import scoring


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (lambda num: 1.0, 1),  # threads that wait for each other
        (lambda num: 1.0 / num, 8),
        (lambda num: 1.0 / min(num, 2), 2),
        (lambda num: 0.2 + 0.8 / num, 2),  # 1, 0.6, 0.4
        (lambda num: 1.0 if num == 1 else 0.9 / num, 8),
        (lambda num: 1.0 * num, 1),
    ],
)
def test_scoring_takes_threads_only_where_they_save_time(
    monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float], expected: int
) -> None:
    clock = [0.0]

    def score(images: Any) -> None:
        clock[0] += seconds(torch.get_num_threads())

    monkeypatch.setattr(scoring, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(scoring, "num_cores", lambda: 8)
    before = torch.get_num_threads()
    try:
        pipeline: Any = SimpleNamespace(squares=[(8, "crop")], score=score)
        assert scoring.fewest_threads(pipeline) == expected
    finally:
        torch.set_num_threads(before)
