"""Compose the picture at the top of README.md from a finished run, and print the sentences for the
text below it.

`python docs/results.py submit/<run_id>`. To be repeated when the recipe, the plots or the measures
change.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

TARGET = Path(__file__).with_name("results.png")
ROWS = (("curves/loss.png", "curves/accuracy.png"), ("plots/roc.png", "plots/confusion.png"))
WIDTH = 1400  # pixels


def main(run: Path) -> None:
    """Write the picture and print what to say of it."""
    compose(run)
    summary = json.loads((run / "summary.json").read_text())
    environment = json.loads((run / "environment.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    print(caption(summary, environment, config))


def compose(run: Path) -> None:
    """Draw the run's four plots at one scale, two in a row."""
    rows = [[Image.open(run / name).convert("RGB") for name in names] for names in ROWS]
    cell = max(plot.width for row in rows for plot in row)
    heights = [max(plot.height for plot in row) for row in rows]
    sheet = Image.new("RGB", (2 * cell, sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, plot in enumerate(row):
            sheet.paste(plot, (column * cell, sum(heights[:number])))
    sheet = sheet.resize(
        (WIDTH, round(sheet.height * WIDTH / sheet.width)), Image.Resampling.LANCZOS
    )
    sheet.save(TARGET, optimize=True)


def caption(summary: dict[str, Any], environment: dict[str, Any], config: dict[str, Any]) -> str:
    """What was run, on what, and what came out, in sentences."""
    low, high = summary["intervals"]["auroc"]
    counts = summary["counts"]
    num_sick, num_normal = counts["tp"] + counts["fn"], counts["tn"] + counts["fp"]
    return (
        f"{summary['epochs']} epochs with {environment['world_size']} processes on {environment['num_cores']} cores "
        f"({environment['processor']}), {summary['duration_s']:.0f} s, seed {config['train']['seed']}. Measured on "
        f"{summary['num_images']} images of {summary['num_patients']} patients who were held out: accuracy "
        f"{100 * summary['accuracy']:.1f} %, sensitivity {100 * summary['sensitivity']:.1f} % ({counts['tp']} of "
        f"{num_sick} pneumonia images found), specificity {100 * summary['specificity']:.1f} % ({counts['tn']} of "
        f"{num_normal} normal images left alone), AUROC {summary['auroc']:.3f} (95 % interval {low:.3f} to {high:.3f})."
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/results.py submit/<run_id>")
    main(Path(sys.argv[1]))
