"""What `xrai.export` writes says what the program itself says, for pictures of any size; else it
is not kept.
"""

import importlib.util
import json
import shutil
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.faults.buckets import moto_server, new_bucket, use_endpoint
from tests.models import FINGERPRINT, MAX_PIXELS, phantoms, save_run
from tests.training import call_main, run_module
from tests.zygote import start
from xrai import export
from xrai.errors import RunError, UserError, XraiError
from xrai.ingest.images import decode
from xrai.learning import export as writing
from xrai.learning.export import TOLERANCE, TOLERANCE_ATYPICALITY, Fitting, Serving
from xrai.pipeline import Pipeline, load_pipeline
from xrai.store import LEASE_KEY, open_store

needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="the extra `export` is missing"
)


def call(*arguments: str | Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export", *map(str, arguments)])
        export.main()


@dataclass(frozen=True)
class Exported:
    run: Path
    out: Path
    pipeline: Pipeline
    program: torch.export.ExportedProgram
    printed: list[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs"), threshold=0.375)


@pytest.fixture(scope="module")
def exported(run: Path) -> Exported:
    """One run written in both formats by the command."""
    programs, really_trace = [], writing.trace

    def trace(serving: Serving) -> torch.export.ExportedProgram:
        programs.append(really_trace(serving))
        return programs[0]

    with redirect_stdout(StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "trace", trace)  # which takes seconds: other tests use it too
        call("--run", run)
    return Exported(
        run, run / "export", load_pipeline(str(run)), programs[0], printed.getvalue().splitlines()
    )


def own_scores(pipeline: Pipeline, pictures: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    model = pipeline.model
    fitted = [
        decode(picture, size=model.image_size, fit=model.fit, max_pixels=MAX_PIXELS)
        for picture in pictures
    ]
    return pipeline.score(np.stack(fitted))


# ------------------------------------------------------------------------------------------ fitting


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size", [64, 97])
def test_the_graph_fits_images_as_pillow_does(fit: str, size: int) -> None:
    fitting = Fitting(size=size, fit=fit)
    generator = np.random.default_rng(0)
    for height, width in [
        (size, size),
        (50, 70),
        (64, 200),
        (110, 130),
        (2, 2),
        (2, 5),
        (333, 512),
        (801, 1000),
        (128, 128),
    ]:
        noise = generator.integers(0, 256, (height, width), np.uint8)
        found = fitting(torch.from_numpy(noise)[None])[0].numpy()
        assert np.array_equal(found, decode(noise, size=size, fit=fit, max_pixels=MAX_PIXELS)), (
            height,
            width,
        )


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_images_higher_than_wide_differ_by_one_grey_level_at_most(fit: str) -> None:
    # Pillow 13 scales the columns of some of them first, and rounds between
    fitting = Fitting(size=64, fit=fit)
    for height, width in [(130, 110), (700, 300), (300, 3), (5, 1)]:
        noise = np.random.default_rng(1).integers(0, 256, (height, width), np.uint8)
        found = fitting(torch.from_numpy(noise)[None])[0].numpy()
        assert np.abs(found - decode(noise, size=64, fit=fit, max_pixels=MAX_PIXELS)).max() <= 1, (
            height,
            width,
        )


def test_images_of_a_batch_are_fitted_each_by_itself() -> None:
    films = np.random.default_rng(2).integers(0, 256, (3, 90, 120), np.uint8)
    fitting = Fitting(size=64, fit="crop")
    together = fitting(torch.from_numpy(films))
    assert all(
        torch.equal(together[k], fitting(torch.from_numpy(films[k : k + 1]))[0]) for k in range(3)
    )


# -------------------------------------------------------------------------------------------- files


@needs_onnx
@pytest.mark.ci
@pytest.mark.slow
def test_onnx_says_of_any_image_what_the_program_says(exported: Exported) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        exported.out / "model.onnx", providers=["CPUExecutionProvider"]
    )
    assert [value.name for value in session.get_outputs()] == ["probability", "atypicality"]
    [images] = session.get_inputs()
    assert (images.name, images.type, images.shape) == (
        "images",
        "tensor(uint8)",
        ["batch", "height", "width"],
    )
    films = phantoms(10)[0]
    noise = np.random.default_rng(3).integers(0, 256, (7, 80, 111), np.uint8)
    for batch in (noise, *(film[None] for film in films)):
        probability, atypicality = session.run(None, {"images": batch})
        expected = own_scores(exported.pipeline, list(batch))
        np.testing.assert_allclose(probability, expected[0], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(
            atypicality, expected[1], atol=TOLERANCE_ATYPICALITY, rtol=TOLERANCE_ATYPICALITY
        )
        assert probability.shape == (len(batch),)


@pytest.mark.slow
def test_torch_loads_its_file_without_xrais_classes_and_says_the_same(
    run: Path, tmp_path: Path
) -> None:
    with redirect_stdout(StringIO()):
        call("--run", run, "--formats=torch", "--out", tmp_path / "out")
    extra, pipeline = {"metadata.json": ""}, load_pipeline(str(run))
    network = torch.export.load(tmp_path / "out/model.pt2", extra_files=extra).module()
    films = phantoms(4)[0]
    for film in films:
        probability, atypicality = network(torch.from_numpy(film)[None])
        expected = own_scores(pipeline, [film])
        assert float(probability) == pytest.approx(expected[0][0], abs=TOLERANCE)
        assert float(atypicality) == pytest.approx(
            expected[1][0], rel=TOLERANCE_ATYPICALITY, abs=TOLERANCE_ATYPICALITY
        )
    assert json.loads(extra["metadata.json"])["threshold"] == 0.375


@needs_onnx
@pytest.mark.ci
@pytest.mark.slow
def test_the_files_say_what_they_are_and_nothing_of_the_machine(
    exported: Exported, repository: Path
) -> None:
    import onnx

    proto = onnx.load(exported.out / "model.onnx")
    stated = {entry.key: entry.value for entry in proto.metadata_props}
    assert stated["run_id"] == "tiny" and stated["dataset_fingerprint"] == FINGERPRINT
    assert float(stated["threshold"]) == 0.375 and json.loads(stated["classes"]) == [
        "NORMAL",
        "PNEUMONIA",
    ]
    assert "No medical device" in stated["note"]
    for name in ("model.onnx", "model.pt2"):
        content = (exported.out / name).read_bytes()
        for place in (repository, Path(sys.prefix), Path.home()):
            assert str(place).encode() not in content, (name, place)


@needs_onnx
@pytest.mark.ci
@pytest.mark.slow
def test_the_command_says_how_well_the_files_agree_and_keeps_it(exported: Exported) -> None:
    assert sorted(path.name for path in exported.out.iterdir()) == [
        "export.json",
        "model.onnx",
        "model.pt2",
    ]
    content = json.loads((exported.out / "export.json").read_text())
    for name in ("model.onnx", "model.pt2"):
        agreement = content["agreement"][name]
        assert (
            agreement["probability"] <= TOLERANCE
            and agreement["atypicality"] <= TOLERANCE_ATYPICALITY
        )
        assert agreement["num_images"] >= 15 and agreement["num_shapes"] >= 8
        assert any(line.startswith(f"{exported.out}/{name}") for line in exported.printed)
    files = content["beside_own_path"]
    assert (
        files["num_other_pixels"] == 0
        and files["png_probability"] < TOLERANCE < files["jpeg_probability"] < 0.2
    )
    assert any("beside xrai predict" in line for line in exported.printed)
    assert "No medical device" in exported.printed[-1]


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Exports write this, in place of a graph that takes seconds."""

    def write(program: object, serving: Serving, path: Path, **_: object) -> writing.Agreement:
        path.write_bytes(b"graph")
        return writing.Agreement(1, 1, 0.0, 0.0)

    monkeypatch.setattr(writing, "write", write)
    monkeypatch.setattr(writing, "trace", lambda serving: None)
    monkeypatch.setattr(export, "draw_phantoms", lambda: list(phantoms(2)[0]))
    return b"graph"


def test_a_run_in_a_bucket_is_written_back_to_it(
    run: Path, graph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moto_server() as url, new_bucket(url) as bucket:
        use_endpoint(monkeypatch, url)
        store = open_store(f"s3://{bucket}/submit/tiny")
        store.upload("model.pt", run / "model.pt")
        call("--run", store.uri, "--formats=torch")
        call("--run", store.uri, "--formats=torch", "--out", f"s3://{bucket}/other")
        files = ["export.json", "model.pt2"]
        assert [entry.key for entry in store.list("export/")] == [
            f"export/{name}" for name in files
        ]
        assert [entry.key for entry in open_store(f"s3://{bucket}/other").list()] == files
        assert store.read("export/model.pt2") == graph


# ----------------------------------------------------------------------------------------- refusals


@needs_onnx
@pytest.mark.ci
@pytest.mark.slow
def test_a_file_that_does_not_agree_with_torch_is_not_kept(
    exported: Exported, tmp_path: Path
) -> None:
    other = Serving(exported.pipeline.model)
    other.temperatures *= 1.01
    with pytest.raises(XraiError, match=r"model\.pt2 is not kept: it differs from torch by \d"):
        writing.write(
            exported.program,
            other,
            tmp_path / "model.pt2",
            metadata={},
            batches=[np.stack([phantoms(1)[0][0]])],
        )
    assert not list(tmp_path.iterdir())


def test_scores_that_are_not_numbers_do_not_pass_for_agreement(run: Path) -> None:
    serving = Serving(load_pipeline(str(run)).model)
    nan = np.full(2, np.nan, np.float32)
    agreement = writing._compare(serving, lambda _: (nan, nan), [np.zeros((2, 70, 70), np.uint8)])
    assert agreement.probability == agreement.atypicality == np.inf


def test_what_cannot_be_exported_is_refused_before_any_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="--run is missing: give the address of a finished run"):
        call()
    with pytest.raises(
        UserError, match="--formats = 'onyx' is not allowed: it takes onnx, torch or onnx,torch"
    ):
        call("--run", run, "--formats=onyx")
    with pytest.raises(RunError, match=r"holds no model\.pt"):
        call("--run", tmp_path / "none", "--formats=torch")
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match="it is not a folder; name another folder or bucket with --out"
    ):
        call("--run", run, "--formats=torch", "--out", tmp_path / "file")
    found = importlib.util.find_spec

    def find(name: str, *rest: Any) -> Any:
        return None if name.startswith("onnx") else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    status, lines = call_main(export, f"--run={run}", capsys=capsys)
    assert status == 2
    assert lines == [
        "xrai: error: ONNX needs onnx and onnxscript and onnxruntime, not installed here: pip "
        "install 'xrai[export]', "
        "or leave it out with --formats=torch"
    ]


def test_the_files_of_another_run_do_not_stay_beside_those_of_this_one(
    run: Path, graph: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    call("--run", run, "--out", out, "--formats=torch")
    (out / "model.onnx").write_bytes(b"of another run")
    (out / "config.yaml").touch()  # of an earlier version
    call("--run", run, "--out", out, "--formats=torch")
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "model.pt2"]
    assert (out / "model.pt2").read_bytes() == graph
    (line,) = [text for text in caplog.messages if "removing" in text]
    assert line.startswith(f"removing {out}/model.onnx of an earlier export")
    assert line.endswith("--formats=onnx,torch writes both")


@pytest.mark.parametrize("is_named", [pytest.param(False, marks=pytest.mark.ci), True])
def test_of_two_exports_into_one_folder_the_second_is_refused(
    run: Path, tmp_path: Path, is_named: bool
) -> None:
    shutil.copytree(run, tmp_path / "tiny", ignore=shutil.ignore_patterns("export"))
    out = tmp_path / ("elsewhere" if is_named else "tiny/export")
    options = [f"--run={tmp_path}/tiny", "--formats=torch", *([f"--out={out}"] * is_named)]
    hold = (
        "import time\n"
        "from xrai import command, export\n"
        "export.draw_phantoms = lambda: time.sleep(100)\n"
        "command.run_command(export.main)\n"
    )
    first = start(["-c", hold, *options])
    try:
        deadline = time.monotonic() + 60
        while not (out / LEASE_KEY).exists():
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.01)
        second = run_module("xrai.export", *options)
        assert second.returncode == 2 and second.stdout == ""
        [line] = [line for line in second.stderr.splitlines() if line.startswith("xrai:")]
        assert f"{out} is being written by process {first.pid} on" in line
    finally:
        first.kill()
        first.communicate()
    assert [path.name for path in out.iterdir()] == [LEASE_KEY]


@pytest.mark.parametrize("name", ["notes.txt", "model.onnx", "export.json"])
def test_a_folder_with_files_of_something_else_is_refused_and_unchanged(
    run: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"files of something else \\({name}\\): .* by --out"):
        call("--run", run, "--out", tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_phantoms_to_check_with_are_images_of_several_sizes() -> None:
    films = export.draw_phantoms()
    assert len({film.shape for film in films}) >= 4 and all(film.std() > 20 for film in films)
    assert Image.fromarray(films[0]).mode == "L"
