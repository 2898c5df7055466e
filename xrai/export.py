"""Write a finished run for other programs: `python -m xrai.export --run URI/ID [--out DIR]`.

model.onnx (any ONNX runtime) and model.pt2 (torch.export) contain preprocessing and network: grey
images of 8 bits and any size go in, the probability at the run's share (one for each of more than
two classes, or of findings) and the atypicality come out; see `xrai.learning.export`. Each file is
compared with torch on random images and phantoms of several sizes before it is kept. export.json,
written last, states how well they agree with torch, and with `xrai predict` on files.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xrai import __version__
from xrai.command import RUN, Flag, parse, run_command
from xrai.errors import UserError
from xrai.files import temporary_folder
from xrai.ingest.images import decode
from xrai.learning import export
from xrai.log import get_logger, setup_logging
from xrai.phantom import draw_phantom, plan
from xrai.pipeline import Pipeline, load_pipeline
from xrai.results.folder import SUMMARY, Place, own_place
from xrai.results.summary import read_summary
from xrai.store import Store, open_store
from xrai.tables import to_json

FLAGS = (
    RUN,
    Flag("out", "", "folder or s3://bucket/prefix for the files; empty: export/ of the run"),
    Flag("formats", "onnx,torch", "what to write: onnx, torch, or both, separated by a comma"),
)
FILES = {"onnx": export.ONNX_FILE, "torch": export.TORCH_FILE}
# Of the random images to check with, (n, H, W)
SHAPES = ((1, 64, 64), (3, 130, 97), (2, 60, 200), (5, 256, 256), (1, 1000, 801))
_REPORT = "export.json"  # written last
_EARLIER = "config.yaml"  # earlier versions wrote it
_NUM_PHANTOMS = 6
_SEED = 20_261_123
_logger = get_logger("xrai.export")


def main() -> None:
    """Read the command line, write, check and store the files, and say how well they agree."""
    parsed = parse("export", description="Write a run for other programs.", flags=FLAGS)
    flags = parsed.flags
    setup_logging()
    run = parsed.run
    formats = parse_formats(flags["formats"])
    pipeline = load_pipeline(run)
    is_runs = not flags["out"]  # export/ of the run is the run's
    with own_place(
        flags["out"] or f"{run}/export",
        is_own=lambda key: is_runs or key in (*FILES.values(), _EARLIER, _REPORT),
        is_mark=lambda out, key: is_runs or (key == _REPORT and b'"agreement"' in out.read(key)),
    ) as out:
        facts = describe_review(open_store(run))
        lines = write_files(pipeline, out, formats, facts=facts)
    print("\n".join([*lines, export.NOTE]), flush=True)


def describe_review(run: Store) -> dict[str, Any]:
    """What the metadata of an exported run state of the images that `review.unlike` named, as its
    summary has it: nothing where there were none, or the run has no summary.
    """
    if run.size(SUMMARY) is None:
        return {}
    given = read_summary(run.read(SUMMARY), where=f"{run.uri}/{SUMMARY}").training.unlike
    return {} if given is None else {"unlike": asdict(given)}


def write_files(
    pipeline: Pipeline, out: Place, formats: Sequence[str], *, facts: Mapping[str, Any]
) -> list[str]:
    """Write and check the files, whose metadata also state `facts`; lines that say how well they
    agree.
    """
    serving = export.Serving(pipeline.model)
    phantoms = draw_phantoms()
    batches = [*random_images(), *(phantom[None] for phantom in phantoms)]
    metadata = {**export.describe_model(pipeline.model, version=__version__), **facts}
    program = export.trace(serving)
    _logger.info("traced; writing and checking %s", " and ".join(formats))
    beside = compare_with_files(pipeline, serving, phantoms)
    lines, agreements = [], {}
    with temporary_folder() as folder:
        for kind in formats:
            name = FILES[kind]
            path = Path(folder) / name
            agreement = export.write(program, serving, path, metadata=metadata, batches=batches)
            agreements[name] = asdict(agreement)
            lines.append(
                f"{out.store.uri}/{name}  {path.stat().st_size / 2**20:.1f} MiB, within "
                f"{agreement.probability:.0e} of torch on {agreement.num_images} images of "
                f"{agreement.num_shapes} shapes ({export.TOLERANCE:.0e} is allowed)"
            )
        out.lease.confirm()
        for name in FILES.values():
            if name not in agreements and out.store.size(name) is not None:
                where = f"{out.store.uri}/{name} of an earlier export, perhaps of another model"
                _logger.warning("removing %s; --formats=onnx,torch writes both", where)
        for name in (_REPORT, _EARLIER, *FILES.values()):
            out.store.delete(name)
        for name in agreements:
            out.lease.confirm()
            out.store.upload(name, Path(folder) / name)
    content = {**metadata, "agreement": agreements, "beside_own_path": beside}
    out.write(_REPORT, to_json(content).encode())
    lines.append(
        f"beside xrai predict, on {len(phantoms)} phantoms: PNG within "
        f"{beside['png_probability']:.0e} in probability ({beside['num_other_pixels']} of "
        f"{beside['num_pixels']} pixels differ), JPEG, which xrai predict decodes at reduced size, "
        f"within {beside['jpeg_probability']:.0e}"
    )
    return lines


def parse_formats(text: str) -> tuple[str, ...]:
    """The formats of a comma-separated list. Raises `UserError` if one is unknown, or lacks its
    packages.
    """
    formats = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not FILES.keys() >= set(formats):
        raise UserError(f"--formats = {text!r} is not allowed: it takes onnx, torch or onnx,torch")
    if "onnx" in formats:
        export.require_onnx()
    return formats


def random_images() -> list[NDArray[np.uint8]]:
    """Noise in batches of `SHAPES`, the same each time."""
    generator = np.random.default_rng(_SEED)
    return [generator.integers(0, 256, shape, np.uint8) for shape in SHAPES]


def draw_phantoms() -> list[NDArray[np.uint8]]:
    """Phantoms (H, W), each of its own size, the same each time."""
    images = (
        draw_phantom(_SEED, phantom, full_size=True)
        for phantom in islice(plan(_SEED), _NUM_PHANTOMS)
    )
    return [np.rint(image * 255).astype(np.uint8) for image in images]


def compare_with_files(
    pipeline: Pipeline, serving: export.Serving, images: Sequence[NDArray[np.uint8]]
) -> dict[str, Any]:
    """How the graph differs from the program's own path on images (H, W) saved as PNG and JPEG."""
    model = pipeline.model
    found: dict[str, Any] = {"num_images": len(images), "num_pixels": 0, "num_other_pixels": 0}
    for kind, options in (("PNG", {"compress_level": 1}), ("JPEG", {"quality": 90})):
        worst = 0.0
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, kind, **options)
            with Image.open(buffer) as whole:
                pixels = np.array(whole)[None]  # (1, H, W)
            data = buffer.getvalue()
            own = decode(data, size=model.image_size, fit=model.fit, max_pixels=image.size)[None]
            ours, graph = pipeline.score(own.copy())[0], export.serve(serving, pixels)[0]
            worst = max(worst, float(np.abs(ours - graph).max()))
            if kind == "PNG":
                found["num_pixels"] += own.size
                found["num_other_pixels"] += int((serving.fit(pixels) != own).sum())
        found[f"{kind.lower()}_probability"] = worst
    return found


if __name__ == "__main__":
    run_command(main)
