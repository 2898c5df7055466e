"""Draw a folder of phantoms: `python -m xrai.phantom --num-images 600 --out data/phantoms`."""

import argparse
from functools import partial

from xrai.command import Parser, run_command
from xrai.log import setup_logging
from xrai.phantom.folder import LEAST, SUFFIXES, TASKS, make_phantoms
from xrai.store import disk_path


def main() -> None:
    """Read the command line and draw."""
    parser = Parser(
        prog="xrai phantom",
        description="Draw made-up chest X-rays (phantoms) to try xrai with, and for tests. They "
        "show no patient.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    path = partial(disk_path, flag="--out")
    add("--out", type=path, required=True, metavar="DIR", help="folder: new, empty or of phantoms")
    least = f"at least {LEAST['binary']}, of three classes {LEAST['multiclass']}"
    add("--num-images", type=int, default=600, metavar="N", help=f"how many images, {least}")
    add(
        "--task",
        choices=TASKS,
        default="binary",
        help="what to tell apart: NORMAL and PNEUMONIA; NORMAL, BACTERIAL and VIRAL; or six "
        "findings, with labels.csv",
    )
    add("--seed", type=int, default=0, metavar="S", help="the same seed draws the same images")
    add("--format", choices=tuple(SUFFIXES), default="png", dest="image_format", help="file format")
    add("--full-size", action="store_true", help="1,000 to 2,500 pixels wide, not 160 to 320")
    add("--workers", type=int, default=0, metavar="W", help="processes; 0: one for each core")
    arguments = parser.parse_args()
    setup_logging()
    make_phantoms(**vars(arguments))


if __name__ == "__main__":
    run_command(main)
