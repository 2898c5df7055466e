"""What the benchmarks' figures are made of: turns, failures, ratios inside a round, and the page
that shows them.
"""

import json
import re
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import (
    RESULTS,
    Contender,
    Figure,
    Report,
    Run,
    best_of,
    ratio,
    run_in_turn,
    values_of,
)
from benchmarks.readme import PAGE, fill

pytestmark = pytest.mark.ci

RATE = Figure("rate", "images/s")


def runs_of(**rates: list[float]) -> list[Run]:
    return [
        Run(name, k, {"rate": rate})
        for name, found in rates.items()
        for k, rate in enumerate(found)
    ]


def count_up(*, scratch: Path, value: float) -> dict[str, float]:
    """A contender."""
    assert list(scratch.iterdir()) == []
    block = bytearray(60_000_000)
    for place in range(0, len(block), 4096):  # touched, so that it is resident
        block[place] = 1
    import time

    time.sleep(0.5)
    return {"rate": value}


def fail(*, scratch: Path) -> dict[str, float]:
    """A contender that ends badly."""
    raise OSError(28, "no room")


def hang(*, scratch: Path) -> dict[str, float]:
    """A contender that does not end."""
    import time

    time.sleep(60)
    return {}


def test_each_round_begins_with_another_contender_and_each_run_is_measured_from_outside(
    tmp_path: Path,
) -> None:
    contenders = [
        Contender(name, f"{__name__}:count_up", {"value": k}, env={"PYTHONPATH": str(harness.ROOT)})
        for k, name in enumerate(("one", "two"))
    ]
    runs = run_in_turn(contenders, rounds=2, scratch=tmp_path)
    assert [run.contender for run in runs] == ["one", "two", "two", "one"]
    assert values_of(runs, "two", "rate") == {0: 1.0, 1: 1.0}
    assert all(run.figures["wall_s"] > 0.5 and run.figures["cpu_s"] > 0 for run in runs)
    assert all(57 < run.figures["peak_memory_mib"] < 600 for run in runs)
    assert list(tmp_path.iterdir()) == []


def test_a_contender_that_fails_or_hangs_is_kept_as_a_failure_with_its_last_words(
    tmp_path: Path,
) -> None:
    failed, late = run_in_turn(
        [Contender("bad", f"{__name__}:fail"), Contender("slow", f"{__name__}:hang")],
        rounds=1,
        timeout_s=4,
        scratch=tmp_path,
    )
    assert (
        failed.failure.startswith("exit status 1: OSError: [Errno 28] no room")
        and failed.figures == {}
    )
    assert late.failure == "no end within 4 s"


def test_ratios_are_formed_inside_a_round() -> None:
    runs = runs_of(ours=[10, 20, 40], peer=[5, 10, 10])
    assert ratio(runs, "ours", "peer", "rate") == {"median": 2, "min": 2, "max": 4, "n": 3}
    with pytest.raises(ValueError, match="no round"):
        ratio(runs, "ours", "nobody", "rate")


def test_the_best_is_by_the_median_and_in_the_direction_that_the_figure_says() -> None:
    runs = runs_of(one=[1, 9, 1], two=[2, 2, 2])
    assert best_of(runs, ["one", "two"], RATE) == "two"
    assert best_of(runs, ["one", "two"], Figure("rate", "s", better="lower")) == "one"


def test_a_demand_that_is_not_reached_says_so(tmp_path: Path) -> None:
    report = Report("try", settings={})
    report.add_table(
        "speed", "Speed", runs_of(ours=[10, 20], peer=[5, 10]), figures=[RATE], ours="ours"
    )
    report.demand("at least", 1.9, at_least=2)
    report.demand("at most", 1.9, at_most=2)
    report.save(tmp_path)
    content = json.loads((tmp_path / "try.json").read_text())
    assert [demand["reached"] for demand in content["demands"]] == [False, True]
    assert content["tables"][0]["rows"][1]["ours_over_it"]["median"] == 2
    assert (tmp_path / "try.png").read_bytes().startswith(b"\x89PNG")
    page = fill("# x\n<!-- results: try -->\nold\n<!-- end -->\nafter", tmp_path)
    assert "**not reached**" in page and "| peer | 8 (5 to 10) | 2.00 (2.00 to 2.00) |" in page
    assert "old" not in page and page.endswith("after")


def test_the_page_shows_what_the_results_say() -> None:
    page = PAGE.read_text()
    named = set(re.findall(r"<!-- results: (\w+) -->", page))
    assert named >= {path.stem for path in RESULTS.glob("*.json")}
    assert fill(page, RESULTS) == page, "run: python -m benchmarks.readme"


def test_a_place_without_results_says_that_they_are_not_measured_yet(tmp_path: Path) -> None:
    page = "# x\n<!-- results: later -->\nold\n<!-- end -->\nafter"
    expected = "# x\n<!-- results: later -->\nNot measured yet.\n<!-- end -->\nafter"
    assert fill(page, tmp_path) == expected
