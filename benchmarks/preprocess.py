"""How fast a folder of JPEG files becomes a data set, beside the peers' writers and the limit of
decoding alone.

    python -m benchmarks.preprocess                                             # 5 rounds
    python -m benchmarks.preprocess --rounds 1 --copies 1 --num-small 500       # a look

Every contender is a whole job in a process of its own, start-up and imports included, from the same
folder on a warm local disk to a finished data set on that disk:

    xrai         `python -m xrai.preprocess`, the command as it is. Beside the images it makes
                 what peers have not: SHA-256 of each source file, splits by patient, perceptual
                 hashes and the search for near-duplicates over splits, shards that are hashed, read
                 back and compared, manifest, data card with sheets.
    peers        their writers (`benchmarks.peers`), which get each image as their users write it:
                 PIL opens it, decodes all of it, makes it grey, cuts the middle square, scales it
                 with the filter that xrai takes.
    xrai decode  the same writers, but the image comes from `xrai.ingest.images.decode`, which
                 lets libjpeg decode a large image at reduced size. It separates the cost
                 of the format from that of decoding.
    the limit    each file read and decoded at the size that xrai asks for, by processes that do
                 nothing else.

Two sources: real full-size images, repeated (each copy has another hash and the same patient, so it
lands in the same split) until there are about as many as in the public training set, to 64 px (the
default size) and, fewer of them, to 224 px; and the public set at 224 px, to 224 px.
Without real images, phantoms of the same kinds. A last table shows what a job of a few images
takes, which is start-up.
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.data import FULL_SIZE, PUBLIC, find_public, spread
from benchmarks.harness import Contender, Figure, Report, Run, best_of, ratio, run_in_turn, say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SIZE, LARGE = 64, 224  # of the stored images, pixels
NUM_FEW = 24  # images of a job that is mostly start-up
PEERS = ("streaming", "litdata", "webdataset", "h5py")
WITH_OUR_DECODE = ("webdataset", "h5py")  # the two fastest
FIGURES = [
    Figure("images_per_s", "images/s"),
    Figure("cpu_ms_per_image", "CPU ms an image", better="lower", digits=2),
    Figure("peak_memory_mib", "peak memory, MiB", better="lower"),
    Figure("wall_s", "s", better="lower", digits=2),
]
START_FIGURES = [
    Figure("wall_s", "s", better="lower", digits=2),
    Figure("cpu_s", "CPU s", better="lower", digits=2),
    Figure("peak_memory_mib", "peak memory, MiB", better="lower"),
]


def main() -> None:
    """Prepare the sources, run the contenders in turn, and save the report."""
    parser = argparse.ArgumentParser(
        description="Preprocessing beside the peers' writers and the limit."
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--originals", default=find_public(FULL_SIZE), help="folder of full-size JPEG files"
    )
    parser.add_argument("--source", default=find_public(PUBLIC), help="folder of small JPEG files")
    parser.add_argument(
        "--copies", type=int, default=17, help="of each full-size picture; a third of it for 224 px"
    )
    parser.add_argument("--num-small", type=int, default=0, help="pictures of 224 px; 0: all")
    parser.add_argument(
        "--phantoms",
        type=int,
        default=300,
        help="how many are drawn where there is no real picture",
    )
    parser.add_argument(
        "--only", nargs="+", choices=("full", "small", "few"), default=("full", "small", "few")
    )
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        kinds = {"full": flags.originals, "small": flags.source}
        pictures = {
            kind: list_pictures(
                Path(path) if path else draw(folder / f"{kind}-drawn", kind, flags.phantoms)
            )
            for kind, path in kinds.items()
        }
        report = Report(
            "preprocess",
            settings={
                "workers": flags.workers,
                "copies": flags.copies,
                "rounds": flags.rounds,
                "full": "real films" if flags.originals else "phantoms",
                "small": "the public set at 224 px" if flags.source else "phantoms",
            },
        )

        def compare(name: str, source: Path, size: int, kind: str, *, variants: bool) -> list[Run]:
            runs = measure(
                source,
                size,
                rounds=flags.rounds,
                num_workers=flags.workers,
                scratch=folder,
                variants=variants,
            )
            title = f"{len(list_pictures(source)):,} {kind} to {size} px, {flags.workers} workers"
            add(report, name, title, runs, FIGURES, num_workers=flags.workers)
            return runs

        for size, copies in ((SIZE, flags.copies), (LARGE, max(flags.copies // 3, 1))):
            if "full" not in flags.only:
                break
            source = repeat(pictures["full"], folder / f"full-{size}", copies=copies)
            runs = compare(
                f"full-{size}", source, size, "full-size JPEG files", variants=size == SIZE
            )
            figure, ours = FIGURES[0], f"xrai, {flags.workers} workers"
            best = best_of(runs, PEERS, figure)
            times, share = (
                ratio(runs, ours, best, figure.key),
                ratio(runs, ours, "the limit", figure.key),
            )
            report.demand(
                f"full-size to {size} px: times the best peer ({best})", times["median"], at_least=2
            )
            report.demand(
                f"full-size to {size} px: share of the limit, {flags.workers} workers",
                share["median"],
                at_least=0.8,
            )
        if "small" in flags.only:
            source = repeat(spread(pictures["small"], flags.num_small), folder / "small", copies=1)
            compare("small", source, LARGE, "JPEG files of 224 px", variants=True)
        if "few" in flags.only:
            source = repeat(spread(pictures["small"], NUM_FEW), folder / "few", copies=1)
            runs = measure(
                source,
                SIZE,
                rounds=flags.rounds,
                num_workers=flags.workers,
                scratch=folder,
                variants=False,
            )
            title = f"Start-up: whole jobs of {NUM_FEW} images, {flags.workers} workers"
            add(report, "start", title, runs, START_FIGURES, num_workers=flags.workers)
        report.save()


def measure(
    source: Path, size: int, *, rounds: int, num_workers: int, scratch: Path, variants: bool = True
) -> list[Run]:
    """Run all contenders on one source; without `variants` those alone that the demands speak
    of.
    """
    place = "benchmarks.preprocess"
    ours = f"the command, `--images.size={size}` and defaults otherwise"
    common = {"source": str(source), "num_workers": num_workers, "size": size}
    contenders = [
        Contender(f"xrai, {num_workers} workers", f"{place}:measure_xrai", common, ours),
        *[
            Contender(
                peer,
                f"{place}:measure_peer",
                {**common, "peer": peer, "read": "read_as_users_do"},
                "its writer as `benchmarks.peers` sets it up; PIL, decoded in full",
            )
            for peer in PEERS
        ],
        Contender(
            "the limit",
            f"{place}:measure_limit",
            common,
            "read and decode at the size that xrai picks; nothing scaled, kept or written",
        ),
    ]
    if variants:
        contenders += [
            Contender(
                "xrai, 1 worker", f"{place}:measure_xrai", {**common, "num_workers": 1}, ours
            ),
            *[
                Contender(
                    f"{peer}, xrai decode",
                    f"{place}:measure_peer",
                    {**common, "peer": peer, "read": "read_as_xrai_does"},
                    "its writer; `xrai.ingest.images.decode`",
                )
                for peer in WITH_OUR_DECODE
            ],
        ]
    runs = run_in_turn(contenders, rounds=rounds, scratch=scratch)
    num_images = len(list_pictures(source))
    for run in runs:
        if run.figures:
            run.figures["images_per_s"] = num_images / run.figures["wall_s"]
            run.figures["cpu_ms_per_image"] = 1000 * run.figures["cpu_s"] / num_images
    return runs


def add(
    report: Report,
    name: str,
    title: str,
    runs: Sequence[Run],
    figures: list[Figure],
    *,
    num_workers: int,
) -> None:
    """Add a table in the order xrai, peers, limit."""
    others = [*PEERS, *(f"{peer}, xrai decode" for peer in WITH_OUR_DECODE), "the limit"]
    order = ["xrai, 1 worker", f"xrai, {num_workers} workers", *others]
    ordered = sorted(runs, key=lambda run: order.index(run.contender))
    report.add_table(name, title, ordered, figures=figures, ours=f"xrai, {num_workers} workers")


# ------------------------------------------------------------------------------------------ sources


def list_pictures(folder: Path) -> list[Path]:
    """The JPEG files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))


def repeat(paths: Sequence[Path], folder: Path, *, copies: int) -> Path:
    """Write `copies` of each file to class folders below `folder`: other bytes after the
    image, the same patient.
    """
    for path in paths:
        data = path.read_bytes()
        place = folder / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        for copy in range(copies):
            (place / name_copy(path.name, copy)).write_bytes(
                data + copy.to_bytes(2, "big") * (copy > 0)
            )
    return folder


def name_copy(name: str, copy: int) -> str:
    """A file name that says another image of the same patient, in the public data set's way."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}{'-' if '-' in stem else '_'}9{copy:03d}.{suffix}" if copy else name


def draw(folder: Path, kind: str, number: int) -> Path:
    """Phantoms, for a machine without real images."""
    from xrai.phantom import make_phantoms

    say(f"XRAI_TEST_DATA is not set: drawing {number} phantoms")
    make_phantoms(folder, num_images=number, image_format="jpeg", full_size=kind == "full")
    return folder


# --------------------------------------------------------------------------------------- contenders


def measure_xrai(*, scratch: Path, source: str, num_workers: int, size: int) -> dict[str, float]:
    """The command, as `python -m` runs it."""
    import multiprocessing.forkserver
    import runpy

    sys.argv[1:] = [
        "--source",
        source,
        "--dataset",
        str(scratch / "dataset"),
        f"--images.size={size}",
    ]
    sys.argv += ["--workers", str(num_workers)]
    try:
        runpy.run_module("xrai.preprocess", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"xrai.preprocess ended with {end.code}") from end
    # The server of worker processes would outlive this one, and its processor time be missing: wait
    # for it
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
    return {}


def measure_peer(
    *, scratch: Path, source: str, num_workers: int, size: int, peer: str, read: str
) -> dict[str, float]:
    """A peer's writer; `read` names the function of this module that gives it images."""
    from benchmarks.peers import WRITERS

    readers = {"read_as_users_do": read_as_users_do, "read_as_xrai_does": read_as_xrai_does}
    paths = [str(path) for path in list_pictures(Path(source))]
    WRITERS[peer](
        partial(readers[read], size=size), paths, scratch / "dataset", num_workers=num_workers
    )
    return {}


def read_as_users_do(path: str, *, size: int) -> "tuple[NDArray[np.uint8], int]":
    """Pixels (H, W) and label: all of the image is decoded, then cut to the middle square and
    scaled.
    """
    import numpy as np
    from PIL import Image

    grey = Image.open(path).convert("L")
    side = min(grey.size)
    left, top = (grey.width - side) // 2, (grey.height - side) // 2
    square = grey.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR)), label_of(path)


def read_as_xrai_does(path: str, *, size: int) -> "tuple[NDArray[np.uint8], int]":
    """Pixels (H, W) and label, by the function that preprocessing and prediction share."""
    from xrai.config import Images
    from xrai.ingest.images import decode

    data = Path(path).read_bytes()
    return decode(data, size=size, fit="crop", max_pixels=Images().max_pixels), label_of(path)


def label_of(path: str) -> int:
    """0 or 1, by the folder's name."""
    return int(Path(path).parent.name == "PNEUMONIA")


def measure_limit(*, scratch: Path, source: str, num_workers: int, size: int) -> dict[str, float]:
    """Nothing but reading and decoding."""
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(num_workers) as pool:
        for _ in pool.imap_unordered(
            partial(decode_only, size=size), map(str, list_pictures(Path(source))), chunksize=16
        ):
            pass
    return {}


def decode_only(path: str, *, size: int) -> None:
    """Read a file and decode it at the reduced size that xrai picks for a square of `size`."""
    from PIL.JpegImagePlugin import JpegImageFile

    picture = JpegImageFile(io.BytesIO(Path(path).read_bytes()))
    factor = reduction(picture.size, size)
    picture.draft("L", (picture.width // factor, picture.height // factor))
    picture.load()


def reduction(sides: tuple[int, int], size: int) -> int:
    """By how much libjpeg may reduce an image while its short side stays twice what is needed."""
    return max((factor for factor in (2, 4, 8) if min(sides) >= 2 * size * factor), default=1)


if __name__ == "__main__":
    main()
