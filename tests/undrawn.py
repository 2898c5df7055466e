"""`xrai.train` whose figures are empty: drawing is more than half of a small training's time.

As a program it takes the options of `xrai.train`: ("tests/undrawn.py", "--dataset=…"). Sheets of
images are drawn as ever.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from xrai import train
from xrai.command import run_command
from xrai.learning.distributed import own_place, record_failures
from xrai.results import plots
from xrai.results.types import Scores, SplitResults


def leave_figures_empty(set_attribute: Callable[[object, str, object], None] = setattr) -> None:
    """From now on, a figure is a grey square under its name."""

    def draw_curves(history: object, folder: Path, **_: object) -> list[str]:
        return _write(folder, ["loss", "accuracy"])

    def draw_plots(scores: Scores, results: SplitResults, folder: Path) -> None:
        assert results.task == "binary"
        _write(folder, list(plots._PLOTS))

    set_attribute(plots, "draw_curves", draw_curves)
    set_attribute(plots, "draw_plots", draw_plots)


def _write(folder: Path, names: list[str]) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("L", (8, 8), 128).save(folder / f"{name}.png")
    return [f"{name}.png" for name in names]


if __name__ == "__main__":
    leave_figures_empty()
    place = own_place()
    run_command(record_failures(train.main), rank=place.rank, world_size=place.world_size)
