"""Compose the picture at the top of README.md from a finished run, and print its caption.

`python docs/results.py submit/<run_id>`. Repeat it when the recipe, the plots or the metrics
change.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

TARGET = Path(__file__).with_name("results.png")
PLOTS = ("curves/accuracy.png", "plots/roc.png", "plots/confusion.png")
HEIGHT = 520  # pixels


def main(run: Path) -> None:
    """Write the picture and print its caption."""
    compose(run)
    summary = json.loads((run / "summary.json").read_text())
    environment = json.loads((run / "environment.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    print(caption(summary, environment, config))


def compose(run: Path) -> None:
    """Draw the run's plots side by side, at one height."""
    plots = [Image.open(run / name).convert("RGB") for name in PLOTS]
    plots = [
        plot.resize((round(plot.width * HEIGHT / plot.height), HEIGHT), Image.Resampling.LANCZOS)
        for plot in plots
    ]
    sheet = Image.new("RGB", (sum(plot.width for plot in plots), HEIGHT), "white")
    left = 0
    for plot in plots:
        sheet.paste(plot, (left, 0))
        left += plot.width
    sheet.save(TARGET, optimize=True)


def caption(summary: dict[str, Any], environment: dict[str, Any], config: dict[str, Any]) -> str:
    """What was run, on what, and what came out, in sentences."""
    low, high = summary["intervals"]["auroc"]
    counts = summary["counts"]
    num_sick, num_normal = counts["tp"] + counts["fn"], counts["tn"] + counts["fp"]
    accuracy, sensitivity, specificity = (
        f"{100 * summary[name]:.1f} %" for name in ("accuracy", "sensitivity", "specificity")
    )
    return (
        f"{summary['epochs']} epochs, {environment['world_size']} processes on "
        f"{environment['num_cores']} cores ({environment['processor']}), "
        f"seed {config['train']['seed']}, {summary['duration_s']:.0f} s. On "
        f"{summary['num_images']} images of {summary['num_patients']} held-out patients: accuracy "
        f"{accuracy}, sensitivity {sensitivity} ({counts['tp']} of {num_sick} pneumonia images "
        f"found), specificity {specificity} ({counts['tn']} of {num_normal} normal images "
        f"correctly classified), AUROC {summary['auroc']:.3f} (95 % interval {low:.3f} to "
        f"{high:.3f})."
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/results.py submit/<run_id>")
    main(Path(sys.argv[1]))
