"""The command `xrai.predict`: a table and overlays that hold every file, in places near and far,
safe to open.
"""

import csv
import io
import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.faults.buckets import moto_server, new_bucket, use_endpoint
from tests.models import FINGERPRINT, phantoms, save_run
from tests.training import Finished, call_main, run_module
from tests.zygote import start
from xrai import predict
from xrai.config import Images
from xrai.errors import CorruptError, RunError, StoreError, UserError
from xrai.ingest.find import find_files
from xrai.phantom import draw_phantom, encode, plan
from xrai.pipeline import Explained, Prediction, load_pipeline
from xrai.predict import Drawing, draw_overlay, fit_to_run, format_table, overlay_name
from xrai.results.folder import own_place
from xrai.store import LEASE_KEY, FolderStore, open_store

MAX_PIXELS = 200_000
COLUMNS = ["path", "probability", "threshold", "decision", "reason", "model"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model.pt alone is there."""
    return save_run(tmp_path_factory.mktemp("runs"), max_pixels=MAX_PIXELS)


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Three good files, one of them deeper and one of noise, and five that are none."""
    folder = tmp_path / "films"
    (folder / "more").mkdir(parents=True)
    first, second = phantoms(2)[0]
    Image.fromarray(first).save(folder / "a, film.png")
    Image.fromarray(second).save(folder / "more" / "b.jpeg", quality=95)
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (90, 120), np.uint8)).save(
        folder / "noise.png"
    )
    (folder / "cut.png").write_bytes((folder / "a, film.png").read_bytes()[:700])
    (folder / "empty.jpg").touch()
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "more" / "notes.txt").write_text("seen by Dr. Who")
    vast = np.random.default_rng(6).integers(0, 256, (101, 2000), np.uint8)
    Image.fromarray(vast).save(folder / "vast.png")
    return folder


def call(*arguments: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    predict.main()


def read_table(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def row(
    path: str, probability: float | None = 0.25, decision: str = "normal", reason: str = ""
) -> Prediction:
    found = {} if probability is None else {"pneumonia": probability}
    return Prediction(path, probability, 0.5, decision, reason, "tiny", found, {"pneumonia": 0.5})


# ------------------------------------------------------------------------------------------- scores


@pytest.mark.slow
def test_files_score_as_they_did_in_the_evaluation_at_the_end_of_training(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = {row["source"]: row for row in read_table(finished.folder)}
    paths = [finished.phantoms / source for source in evaluated]
    call(
        "--run",
        finished.folder,
        *paths,
        "--out",
        tmp_path,
        "--no_overlays",
        monkeypatch=monkeypatch,
    )
    predicted = {row["path"]: row for row in read_table(tmp_path)}
    assert len(predicted) == len(evaluated) >= 5
    for path, source in zip(paths, evaluated, strict=True):
        found = predicted[str(path)]
        assert float(found["probability"]) == pytest.approx(
            float(evaluated[source]["score"]), abs=1e-5
        )
        assert found["decision"] == evaluated[source]["decision"]
    threshold = json.loads((finished.folder / "summary.json").read_text())["threshold"]
    assert {float(row["threshold"]) for row in predicted.values()} == {threshold}


# --------------------------------------------------------------------------------------------- rows


def test_every_file_is_a_row_and_one_for_review_has_its_reason(
    run: Path,
    films: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (films / ".hidden.png").touch()
    call("--run", run, films, "--out", tmp_path / "new" / "out", monkeypatch=monkeypatch)
    rows = read_table(tmp_path / "new" / "out")
    assert list(rows[0]) == COLUMNS
    reasons = {row["path"].removeprefix(f"{films}/"): row["reason"] for row in rows}
    assert reasons.pop("a, film.png") == "" and reasons.pop("more/b.jpeg") == ""
    assert reasons.pop("cut.png").startswith("is cut short or damaged")
    assert reasons.pop("noise.png").startswith(
        "does not look like the training images: atypicality "
    )
    assert reasons == {
        "empty.jpg": "is empty (0 bytes)",
        "gone.png": "cannot be read (No such file or directory)",
        "more/notes.txt": "is not a JPEG, PNG or DICOM file",
        "vast.png": f"declares 2000 x 101 pixels, more than images.max_pixels = {MAX_PIXELS}",
    }
    for found in rows:
        assert bool(found["reason"]) == (found["decision"] == "review")
        is_readable = Path(found["path"]).name in ("a, film.png", "b.jpeg", "noise.png")
        assert bool(found["probability"]) == is_readable
        assert (found["threshold"], found["model"]) == ("0.5", "tiny")
    printed = capsys.readouterr()
    assert "1 hidden files" in printed.err
    lines = printed.out.splitlines()
    assert len([line for line in lines if line.startswith(f"{films}/")]) == 8
    assert f"{films}/empty.jpg" in printed.out and "review: is empty (0 bytes)" in printed.out
    assert "files: 8 = 1 normal + 1 pneumonia + 6 review, 5 of which could not be read" in lines
    assert (
        f"table: {tmp_path}/new/out/predictions.csv  {tmp_path}/new/out/predictions.json" in lines
    )
    assert f"overlays: 3 in {tmp_path}/new/out/overlays/, numbered like the table's rows" in lines
    assert "No medical device" in lines[-1]


def test_json_holds_the_same_rows_with_their_overlays_and_what_classified(
    run: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    call("--run", run, films, "--out", out, monkeypatch=monkeypatch)
    content = json.loads((out / "predictions.json").read_text())
    rows = content.pop("predictions")
    overlays = [row.pop("overlay") for row in rows]
    as_text = [
        {key: "" if value is None else str(value) for key, value in row.items()} for row in rows
    ]
    assert as_text == read_table(out)
    assert overlays == [
        "overlays/00001-a_film.png",
        None,
        None,
        None,
        "overlays/00005-b.png",
        None,
        "overlays/00007-noise.png",
        None,
    ]
    assert content == {
        "schema_version": 2,
        "tool_version": content["tool_version"],
        "note": content["note"],
        "run_id": "tiny",
        "dataset_fingerprint": FINGERPRINT,
        "classes": ["NORMAL", "PNEUMONIA"],
        "threshold": 0.5,
        "temperature": 1.5,
        "image_size": 64,
        "fit": "crop",
        "num_files": 8,
        "num_review": 6,
        "num_unreadable": 5,
    }
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert written == [*filter(None, overlays), "predictions.csv", "predictions.json"]


def test_without_out_all_rows_are_printed_and_nothing_is_written(
    run: Path,
    films: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    call("--run", run, "films", monkeypatch=monkeypatch)
    assert sorted(tmp_path.rglob("*")) == before
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("films/")]) == 8
    assert not any("predictions.csv" in line or "overlays" in line for line in lines)


def test_a_long_table_is_printed_in_part_where_files_hold_all_of_it(run: Path) -> None:
    model = load_pipeline(str(run)).model
    rows = [row(f"{number}.png") for number in range(60)]
    lines = format_table(rows, model, out=open_store("/nowhere"))
    assert len([line for line in lines if line.endswith("normal")]) == 50
    assert "... and 10 more in predictions.csv" in lines
    assert "files: 60 = 60 normal + 0 pneumonia + 0 review, 0 of which could not be read" in lines
    assert (
        len([line for line in format_table(rows, model, out=None) if line.endswith("normal")]) == 60
    )


def test_names_cannot_steer_the_terminal_or_a_spreadsheet(
    run: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_pipeline(str(run)).model
    lines = format_table([row("\x1b[2Jfilm\n.png", None, "review", "is \x07 odd")], model, out=None)
    assert lines[1].startswith("\ufffd[2Jfilm\ufffd.png") and lines[1].endswith(
        "review: is \ufffd odd"
    )
    monkeypatch.chdir(films)
    (films / "=cmd|' calc'!A0.png").write_bytes((films / "a, film.png").read_bytes())
    call("--run", run, "=cmd|' calc'!A0.png", "--out", tmp_path / "out", monkeypatch=monkeypatch)
    [found] = read_table(tmp_path / "out")
    assert found["path"] == "./=cmd|' calc'!A0.png"


def test_the_limit_of_pixels_is_the_runs_unless_another_is_given(
    run: Path, films: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_pipeline(str(run)).model
    assert fit_to_run(Images(), model, given=set()).max_pixels == MAX_PIXELS
    given = fit_to_run(Images(), model, given={"images.max_pixels"})
    assert given.max_pixels == Images().max_pixels
    call(
        "--run",
        run,
        films / "vast.png",
        f"--images.max_pixels={MAX_PIXELS + 2000}",
        monkeypatch=monkeypatch,
    )
    assert "1 review, 0 of which could not be read" in capsys.readouterr().out  # noise, but read


def test_nothing_of_a_dicom_header_is_shown_or_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pydicom")
    phantom = next(plan(4))
    whole = encode(4, phantom, draw_phantom(4, phantom), image_format="dicom").replace(
        b"PHANTOM^000001", b"Jones^Indiana "
    )
    assert b"Jones" in whole
    (tmp_path / "in").mkdir()
    for name, data in (
        ("good", whole),
        ("cut", whole[: len(whole) // 2]),
        ("odd", whole.replace(b"MONOCHR", b"POLYCHR")),
    ):
        (tmp_path / "in" / f"{name}.dcm").write_bytes(data)
    call("--run", run, tmp_path / "in", "--out", tmp_path / "out", monkeypatch=monkeypatch)
    printed = capsys.readouterr()
    assert {
        Path(row["path"]).stem: bool(row["probability"]) for row in read_table(tmp_path / "out")
    } == {"cut": False, "good": True, "odd": False}
    texts = [
        printed.out,
        printed.err,
        *(p.read_bytes().decode("latin-1") for p in (tmp_path / "out").rglob("*.*")),
    ]
    assert not any(word in text for text in texts for word in ("Jones", "Indiana", "PHANTOM-0"))


# ----------------------------------------------------------------------------------------- overlays


def test_an_overlay_shows_the_image_beside_itself_under_heat_and_holds_no_text_chunks(
    run: Path, films: Path
) -> None:
    pipeline = load_pipeline(str(run))
    [explained] = pipeline.classify(find_files([str(films / "more" / "b.jpeg")]), explain_side=512)
    data = draw_overlay(explained)
    assert explained.image is not None
    with Image.open(io.BytesIO(data)) as panel:
        assert panel.format == "PNG" and panel.mode == "RGB" and not panel.info
        pixels = np.asarray(panel).astype(int)
    left, right = pixels[40:552, 12:524], pixels[40:552, 536:1048]
    assert np.array_equal(left, np.repeat(explained.image[..., None], 3, axis=2))
    changed = np.abs(right - left).max(axis=2)
    small = Image.fromarray(explained.heats["pneumonia"])
    heat = np.asarray(small.resize((512, 512), Image.Resampling.BILINEAR))
    assert changed[heat > 0.6].min() > changed[heat < 0.02].max() - 1
    assert not changed[heat == 0].any()
    assert pixels[:40].max() > 200 and pixels[552:].max() > 200, "there are words above and below"


def test_the_heat_of_an_image_called_normal_fades_with_its_probability() -> None:
    picture, heat = np.full((512, 512), 100, np.uint8), np.ones((64, 64), np.float32)

    def strength(probability: float) -> float:
        with Image.open(
            io.BytesIO(draw_overlay(Explained(row("x", probability), picture, {"pneumonia": heat})))
        ) as panel:
            return float(np.abs(np.asarray(panel).astype(int)[40:552, 536:1048] - 100).mean())

    assert strength(0.9) == strength(0.5) > strength(0.25) > strength(0.01) > 0 == strength(0.0)


def test_overlays_have_safe_names_of_their_own(
    run: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (films / "a, film.png").read_bytes()
    odd = tmp_path / "odd"
    (odd / "x").mkdir(parents=True)
    for name in (
        "x/film.png",
        "film.png",
        "..png",
        "日本.png",
        "-rf; `id` $HOME.png",
        "a\nb\x1b[2J.png",
        "<img src=q>.png",
    ):
        (odd / name).write_bytes(data)
    (odd / ("long" * 60 + ".png")).write_bytes(data)
    call("--run", run, odd, "--out", tmp_path / "out", monkeypatch=monkeypatch)
    names = sorted(path.name for path in (tmp_path / "out" / "overlays").iterdir())
    assert len(names) == 7 and len({name[:5] for name in names}) == 7  # "..png" is hidden
    assert all(
        name.isascii() and set(name) <= set(safe_letters()) and len(name) < 80 for name in names
    )
    assert overlay_name(7, "C:\\films\\Ärger.dcm") == "overlays/00007-rger.png"
    assert overlay_name(123456, "日本.png") == "overlays/123456.png"
    assert overlay_name(8, "s3://b/../../etc/passwd") == "overlays/00008-passwd.png"


def safe_letters() -> str:
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"


def test_overlays_of_an_earlier_table_are_removed(
    run: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    call("--run", run, films, "--out", out, monkeypatch=monkeypatch)
    call("--run", run, films / "noise.png", "--out", out, monkeypatch=monkeypatch)
    assert [path.name for path in (out / "overlays").iterdir()] == ["00001-noise.png"]
    call("--run", run, films / "noise.png", "--out", out, "--no_overlays", monkeypatch=monkeypatch)
    assert list((out / "overlays").iterdir()) == []
    assert json.loads((out / "predictions.json").read_text())["predictions"][0]["overlay"] is None


def test_a_place_inside_what_is_classified_is_refused(
    run: Path, films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"out is inside .*, which is classified"):
        call("--run", run, films, "--out", films / "out", monkeypatch=monkeypatch)
    assert not (films / "out").exists()


def test_of_two_predictions_into_one_folder_the_second_is_refused_and_nothing_mixes(
    run: Path, films: Path, tmp_path: Path
) -> None:
    out, expected, begun = tmp_path / "out", tmp_path / "expected", tmp_path / "begun"
    hold = (
        "import os, pathlib, signal, sys\n"
        "from xrai import command, predict\n"
        "begun = pathlib.Path(sys.argv.pop())\n"
        "draw = predict.Drawing.draw\n"
        "def hold(*given, **named):\n"
        "    if not begun.exists():\n"
        "        begun.touch()\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    return draw(*given, **named)\n"
        "predict.Drawing.draw = hold\n"
        "command.run_command(predict.main)\n"
    )
    first = start(["-c", hold, f"--run={run}", f"--out={out}", str(films), str(begun)])
    try:
        deadline = time.monotonic() + 60
        while not begun.exists():
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.01)
        second = run_module("xrai.predict", f"--run={run}", f"--out={out}", f"{films}/noise.png")
        assert second.returncode == 2 and second.stdout == ""
        [line] = [line for line in second.stderr.splitlines() if line.startswith("xrai:")]
        assert f"{out} is being written by process {first.pid} on" in line
        first.send_signal(signal.SIGCONT)
        assert first.wait(60) == 0
    finally:
        first.kill()
        first.communicate()
    run_module("xrai.predict", f"--run={run}", f"--out={expected}", str(films))
    files = {path.name: path.read_bytes() for path in expected.rglob("*") if path.is_file()}
    assert {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    assert len(files) == 5


@pytest.mark.parametrize(
    "name", ["notes.txt", "config.yaml", "predictions.csv", "overlays/mine.png", "model.pt"]
)
def test_a_folder_with_files_of_something_else_is_refused_and_unchanged(
    run: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("source,label\n")
    with pytest.raises(UserError, match=f"files of something else \\({name}\\): .* by --out"):
        call("--run", run, films, "--out", tmp_path / "out", monkeypatch=monkeypatch)
    assert path.read_text() == "source,label\n"
    assert [file for file in (tmp_path / "out").rglob("*") if file.is_file()] == [path]


def test_an_overlay_that_cannot_be_stored_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write = FolderStore.write

    def refuse(store: FolderStore, key: str, data: bytes, **options: bool) -> None:
        if key != LEASE_KEY:
            raise StoreError("the disk is full")
        write(store, key, data, **options)

    monkeypatch.setattr(FolderStore, "write", refuse)
    heats = {"pneumonia": np.zeros((4, 4), np.float32)}
    explained = Explained(row("x"), np.zeros((8, 8), np.uint8), heats)
    with (
        pytest.raises(StoreError, match="the disk is full"),
        own_place(str(tmp_path), is_own=predict.is_own, is_mark=predict.is_mark) as out,
        Drawing(out) as drawing,
    ):
        assert drawing.draw(explained, number=1) == "overlays/00001-x.png"


def test_a_bucket_takes_table_and_overlays_and_gives_the_images(
    run: Path, films: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with moto_server() as url, new_bucket(url) as bucket:
        use_endpoint(monkeypatch, url)
        open_store(f"s3://{bucket}/runs/tiny").upload("model.pt", run / "model.pt")
        open_store(f"s3://{bucket}/films").upload("a.png", films / "a, film.png")
        call(
            "--run",
            f"s3://{bucket}/runs/tiny",
            f"s3://{bucket}/films/*.png",
            films / "empty.jpg",
            "--out",
            f"s3://{bucket}/out",
            monkeypatch=monkeypatch,
        )
        out = open_store(f"s3://{bucket}/out")
        keys = [entry.key for entry in out.list()]
        content = json.loads(out.read("predictions.json"))
    assert keys == ["overlays/00001-a.png", "predictions.csv", "predictions.json"]
    assert [row["path"] for row in content["predictions"]] == [
        f"s3://{bucket}/films/a.png",
        f"{films}/empty.jpg",
    ]
    assert f"overlays: 1 in s3://{bucket}/out/overlays/" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- refusals


def test_no_run_and_no_path_are_refused(
    run: Path, films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--run is missing: give the address of a finished run"):
        call(films, monkeypatch=monkeypatch)
    with pytest.raises(
        UserError, match="no PATH given: name JPEG, PNG or DICOM files or folders of them"
    ):
        call("--run", run, monkeypatch=monkeypatch)


def test_a_folder_without_a_model_and_a_damaged_one_are_refused(
    run: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        RunError, match=r"holds no model\.pt: no such run, or its training has not ended"
    ):
        call("--run", tmp_path / "runs" / "other", films, monkeypatch=monkeypatch)
    (tmp_path / "model.pt").write_bytes((run / "model.pt").read_bytes()[:1000])
    with pytest.raises(CorruptError, match=r"model\.pt"):
        call("--run", tmp_path, films, monkeypatch=monkeypatch)


def test_another_size_or_fit_than_the_runs_is_refused(
    run: Path, films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for option, message in (
        (
            "--images.size=128",
            "images.size = 128, but run tiny was trained with 64: leave the key out",
        ),
        (
            "--images.fit=pad",
            "images.fit = 'pad', but run tiny was trained with 'crop': leave the key out",
        ),
    ):
        with pytest.raises(RunError, match=message):
            call("--run", run, films, option, monkeypatch=monkeypatch)


def test_another_size_is_refused_even_where_it_is_the_default(run: Path) -> None:
    model = load_pipeline(str(run)).model
    model = replace(model, images=replace(model.images, size=32))
    assert fit_to_run(Images(), model, given={"images.fit"}).size == 32
    with pytest.raises(RunError, match=r"images\.size = 64, but run tiny was trained with 32"):
        fit_to_run(Images(), model, given={"images.size"})


def test_an_unwritable_place_is_refused_before_any_work(
    run: Path,
    films: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match="it is not a folder; name another folder or bucket with --out"
    ):
        call("--run", run, films, "--out", tmp_path / "file", monkeypatch=monkeypatch)
    assert capsys.readouterr().out == ""


def test_when_no_file_can_be_read_the_table_says_why_and_the_status_is_2(
    run: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        f"--run={run}",
        str(films / "empty.jpg"),
        str(films / "cut.png"),
        f"--out={tmp_path}/out",
    )
    status, lines = call_main(predict, *arguments, capsys=capsys)
    assert status == 2
    assert lines == [
        f"xrai: error: none of the 2 files could be read as an image: {films}/empty.jpg is empty "
        f"(0 bytes)"
    ]
    assert [row["decision"] for row in read_table(tmp_path / "out")] == ["review", "review"]
    # a picture that is read but not like the others is an answer
    status, _ = call_main(predict, f"--run={run}", str(films / "noise.png"), capsys=capsys)
    assert status == 0
