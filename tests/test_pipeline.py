"""`xrai.load(run).predict(…)`: any picture that can be named is a row, DICOM as JPEG, and odd
ones go to review.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import xrai
from tests.dataset.pictures import branch
from tests.faults.buckets import moto_server, new_bucket, use_endpoint
from tests.models import MAX_PIXELS, phantoms, save_run
from xrai.errors import CorruptError, ForbiddenError, RunError, SourceError, UserError
from xrai.files import sha256_of
from xrai.ingest.find import File, find_files
from xrai.ingest.images import decode
from xrai.phantom import draw_phantom, encode, plan
from xrai.pipeline import BATCH_SIZE, Pipeline, Prediction
from xrai.store import open_store


@dataclass(frozen=True)
class Run:
    folder: Path
    pipeline: Pipeline


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = save_run(tmp_path_factory.mktemp("runs"))
    return Run(folder, xrai.load(str(folder)))


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """A folder with good pictures of several kinds, two files that are none, and a hidden one."""
    folder = tmp_path / "films"
    (folder / "more" / "deep").mkdir(parents=True)
    first, second = phantoms(2)[0]
    Image.fromarray(first).save(folder / "a [1].png")
    Image.fromarray(second).save(folder / "b.jpeg", quality=95)
    Image.fromarray(first).save(folder / "more" / "日本 ü.png")
    Image.fromarray(second).save(folder / "more" / "deep" / "c.png")
    (folder / "more" / "notes.txt").write_text("seen by Dr. Who")
    (folder / "empty.jpg").touch()
    (folder / ".hidden.png").touch()
    return folder


def names(paths: list[str], *, below: Path | str) -> list[str]:
    return [file.path.removeprefix(f"{below}/") for file in find_files(paths)]


# --------------------------------------------------------------------------------------------- rows


def test_importing_xrai_loads_neither_torch_nor_numpy() -> None:
    script = "import xrai, sys; assert xrai.load and not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_one_line_of_python_gives_a_row_for_each_image(run: Run, films: Path) -> None:
    first = phantoms(1)[0][0]
    rows = xrai.load(str(run.folder)).predict(
        [films / "a [1].png", first, str(films / "empty.jpg")]
    )
    assert [row.path for row in rows] == [f"{films}/a [1].png", "array 2", f"{films}/empty.jpg"]
    assert rows[0].probability == rows[1].probability is not None
    assert rows[0].decision == rows[1].decision == "normal"
    assert rows[2] == Prediction(
        f"{films}/empty.jpg", None, 0.5, "review", "is empty (0 bytes)", "tiny"
    )
    assert run.pipeline.predict(first)[0].probability == pytest.approx(
        rows[0].probability, abs=1e-6
    )
    assert run.pipeline.predict(str(films / "b.jpeg"))[0].decision == "pneumonia"
    assert run.pipeline.predict([]) == []


def test_probabilities_are_calibrated_and_the_threshold_stands_on_their_scale(run: Run) -> None:
    model = run.pipeline.model
    film = phantoms(1)[0][0]
    fitted = decode(film, size=64, fit="crop", max_pixels=MAX_PIXELS)
    with torch.no_grad():
        logit = float(model.network(torch.from_numpy(fitted.copy())[None, None] / 255))
    [row] = run.pipeline.predict(film)
    assert row.probability is not None
    assert row.probability == pytest.approx(1 / (1 + np.exp(-logit / 1.5)), abs=1e-5)
    for threshold, decision in (
        (row.probability, "pneumonia"),
        (np.nextafter(row.probability, 1), "normal"),
    ):
        changed = Pipeline(replace(model, thresholds=(float(threshold),)))
        [row] = changed.predict(film)
        assert (row.decision, row.threshold) == (decision, threshold)


def test_images_unlike_those_of_training_go_to_review_with_their_score(run: Run) -> None:
    films, labels = phantoms(48)
    rows = run.pipeline.predict(films)
    seen = [row for row in rows if row.decision != "review"]
    assert len(seen) >= 40
    assert (
        np.mean(
            [
                (row.decision == "pneumonia") == label
                for row, label in zip(rows, labels, strict=True)
            ]
        )
        > 0.8
    )
    noise = np.random.default_rng(0).integers(0, 256, (300, 300), np.uint8)
    stripes = np.tile(np.array([0, 255], np.uint8), (300, 150))
    for odd in run.pipeline.predict([noise, stripes, np.triu(np.full((90, 90), 255, np.uint8))]):
        assert odd.decision == "review" and odd.probability is not None
        prefix, _, rest = odd.reason.partition("atypicality ")
        assert prefix == "does not look like the training images: "
        assert float(rest.removesuffix(", above the limit of 1")) > 1


def test_a_score_that_is_no_number_asks_for_review(run: Run) -> None:
    scores = np.array([0.1]), np.array([False])
    assert run.pipeline._row(*scores, float("nan")).decision == "review"
    row = run.pipeline._row(*scores, 1.0)
    assert (row.decision, row.reason, row.calls) == ("normal", "", ("normal",))


def test_rows_keep_their_files_across_batches_and_memory_does_not_grow_with_them(run: Run) -> None:
    num_files, most = 3 * BATCH_SIZE + 5, 0
    films = phantoms(7)[0]
    expected = [row.probability for row in run.pipeline.predict(films)]
    begun, yielded = 0, 0

    def give(data: Any) -> Any:
        return data

    def files() -> Iterator[File]:
        nonlocal begun
        for number in range(num_files):
            begun += 1
            data = b"no picture" if number % 5 == 2 else films[number % 7]
            yield File(f"{number}", partial(give, data))

    for number, explained in enumerate(run.pipeline.classify(files())):
        row = explained.prediction
        assert row.path == f"{number}"
        if number % 5 == 2:
            assert (row.probability, row.decision, row.reason) == (
                None,
                "review",
                "is not a JPEG, PNG or DICOM file",
            )
        else:
            assert row.probability == pytest.approx(expected[number % 7], abs=1e-6)
        yielded += 1
        most = max(most, begun - yielded)
    assert yielded == num_files and most <= 2 * BATCH_SIZE


@pytest.mark.parametrize(
    ("smallest", "asked", "expected"), [(12_000_000, None, 1), (12_000_000, 2, 2), (1000, None, 2)]
)
def test_files_are_scored_by_one_thread_where_the_network_is_small(
    run: Run, monkeypatch: pytest.MonkeyPatch, smallest: int, asked: int | None, expected: int
) -> None:
    monkeypatch.setattr(xrai.pipeline, "_SMALL_NETWORK", smallest)
    pipeline, films, seen = xrai.load(str(run.folder)), phantoms(3)[0], []
    if asked is not None:
        pipeline.num_threads = asked
    look = pipeline._members[0]._look

    def watched(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(torch.get_num_threads())
        if len(images) == 2:
            raise KeyError
        return look(images)

    monkeypatch.setattr(pipeline._members[0], "_look", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert len(pipeline.predict(films)) == 3
        pipeline.predict(films[0])
        with pytest.raises(KeyError):
            pipeline.predict(films[:2])
        assert seen == [expected] * 3
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_after_an_error_of_the_store_what_waits_is_not_read(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # as many readers on every machine
    num_read, film = 0, phantoms(1)[0][0]

    def read() -> np.ndarray:
        nonlocal num_read
        num_read += 1
        time.sleep(0.05)
        return film

    def refuse() -> bytes:
        raise ForbiddenError("the keys are wrong")

    files = [File("a", refuse), *(File(str(number), read) for number in range(100))]
    with pytest.raises(ForbiddenError, match="the keys are wrong"):
        list(run.pipeline.classify(files))
    assert num_read < 50


def test_explained_rows_have_an_image_and_its_heat_map_and_others_none(run: Run) -> None:
    film = phantoms(1)[0][0]
    files = [File("a", lambda: film), File("b", lambda: b"none"), File("c", lambda: film[:, ::-1])]
    first, second, third = run.pipeline.classify(files, explain_side=100)
    assert second.image is None and not second.heats
    assert first.image is not None and third.image is not None
    assert np.array_equal(first.image, decode(film, size=100, fit="crop", max_pixels=MAX_PIXELS))
    assert list(first.heats) == list(third.heats) == ["pneumonia"]
    heat = first.heats["pneumonia"]
    assert heat.shape == (64, 64) and not np.allclose(heat, third.heats["pneumonia"])
    [plain] = run.pipeline.classify(files[:1])
    assert plain.prediction.probability == pytest.approx(first.prediction.probability, abs=1e-6)
    assert not plain.heats


# -------------------------------------------------------------------------------------------- DICOM


def test_an_image_as_dicom_and_as_jpeg_gets_the_same_answer_and_no_header_text(
    run: Run, tmp_path: Path
) -> None:
    pytest.importorskip("pydicom")
    for phantom in islice(plan(11), 10):
        film = draw_phantom(11, phantom)
        for kind, suffix in (("dicom", "dcm"), ("jpeg", "jpeg"), ("png", "png")):
            (tmp_path / f"{phantom.stem}.{suffix}").write_bytes(
                encode(11, phantom, film, image_format=kind)
            )
    by_kind = {
        kind: run.pipeline.predict(f"{tmp_path}/*.{kind}") for kind in ("dcm", "jpeg", "png")
    }
    assert len(by_kind["dcm"]) == 10
    for dicom, jpeg, png in zip(*by_kind.values(), strict=True):
        assert Path(dicom.path).stem == Path(jpeg.path).stem == Path(png.path).stem
        assert dicom.probability == pytest.approx(png.probability, abs=0.02)
        assert jpeg.probability == pytest.approx(png.probability, abs=0.05)
        assert "PHANTOM" not in repr(dicom).replace(dicom.path, "")
    assert len({row.decision for row in by_kind["dcm"]}) >= 2


def test_a_damaged_dicom_file_is_a_row_that_does_not_name_the_patient(
    run: Run, tmp_path: Path
) -> None:
    pytest.importorskip("pydicom")
    phantom = next(plan(11))
    whole = encode(11, phantom, draw_phantom(11, phantom), image_format="dicom")
    for number, data in enumerate(
        (whole[: len(whole) // 2], whole[:500], whole[:200], whole.replace(b"MONOCHROME", b"ULTRA"))
    ):
        (tmp_path / f"{number}.dcm").write_bytes(data.replace(b"PHANTOM^000001", b"Jones^Indiana "))
    rows = run.pipeline.predict(tmp_path)
    assert [row.decision for row in rows] == ["review"] * 4
    for row in rows:
        assert (
            row.probability is None
            and row.reason
            and "Jones" not in row.reason
            and "PHANTOM" not in row.reason
        )


# -------------------------------------------------------------------------------------------- files


def test_files_folders_and_zips_keep_their_order_and_a_file_named_twice_is_one_row(
    films: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.write(films / "b.jpeg", "train/x.png")
    paths = [str(films / "more" / "deep" / "c.png"), str(tmp_path / "packed.zip"), f"{films}/"]
    found = names(paths, below=tmp_path)
    assert found[:3] == ["films/more/deep/c.png", "packed.zip/train/x.png", "films/a [1].png"]
    assert len(found) == 7


def test_patterns_find_what_the_shell_would(films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names([f"{films}/*.png"], below=films) == ["a [1].png"]
    assert names([f"{films}/**/*.png"], below=films) == [
        "a [1].png",
        "more/deep/c.png",
        "more/日本 ü.png",
    ]
    assert names([f"{films}/[!a-c]*"], below=films) == [
        "empty.jpg",
        "more/deep/c.png",
        "more/notes.txt",
        "more/日本 ü.png",
    ]
    assert sorted(names([f"{films}/**"], below=films)) == sorted(names([str(films)], below=films))
    assert names([f"{films}/?.jpeg"], below=films) == ["b.jpeg"]
    monkeypatch.chdir(films)
    assert names(["*/*.txt"], below="") == ["more/notes.txt"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(films: Path) -> None:
    assert names([f"{films}/a [1].png"], below=films) == ["a [1].png"]
    shutil.copy(films / "b.jpeg", films / "*.png")
    assert names([f"{films}/*.png"], below=films) == ["*.png"]


def test_hidden_files_are_left_out_of_folders_but_not_when_they_are_named(films: Path) -> None:
    assert not [name for name in names([str(films)], below=films) if name.startswith(".")]
    assert names([f"{films}/.hidden.png"], below=films) == [".hidden.png"]
    assert names([f"file://{films}/.hidden.png"], below=films) == [".hidden.png"]


def test_a_link_that_leads_nowhere_is_a_row_that_says_so(run: Run, films: Path) -> None:
    (films / "gone.png").symlink_to("nowhere")
    for path in (films, films / "g*.png"):
        [row] = [row for row in run.pipeline.predict(path) if row.path.endswith("gone.png")]
        assert (row.decision, row.reason) == (
            "review",
            "cannot be read (No such file or directory)",
        )


def test_decoding_for_the_network_and_for_people_is_under_the_budget(
    run: Run, films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    hold = run.pipeline._budget.hold

    def watched(num_bytes: int) -> AbstractContextManager[None]:
        held.append(num_bytes)
        return hold(num_bytes)

    monkeypatch.setattr(run.pipeline._budget, "hold", watched)
    list(run.pipeline.classify(find_files([f"{films}/b.jpeg"]), explain_side=64))
    assert len(held) == 2
    assert min(held) > (films / "b.jpeg").stat().st_size


def test_pipes_and_devices_are_rows_that_say_so_and_are_not_waited_for(
    run: Run, films: Path
) -> None:
    names = ("p1.png", "p2.png", "p3.png", "p4.png")
    os.mkfifo(films / "p1.png")
    (films / "p2.png").symlink_to(films / "p1.png")
    (films / "p3.png").symlink_to("/dev/zero")
    (films / "p4.png").symlink_to("p4.png")
    for path in (films, films / "p*.png"):
        rows = [row for row in run.pipeline.predict(path) if Path(row.path).name in names]
        assert {row.decision for row in rows} == {"review"}
        assert [row.reason.split(" but")[0] for row in rows] == [
            *["is not a regular file"] * 3,
            "cannot be read (Too many levels of symbolic links)",
        ]


def test_a_pattern_follows_links_to_each_folder_once(tmp_path: Path) -> None:
    branch(tmp_path / "films")
    assert names([f"{tmp_path}/films/**/*.png"], below=tmp_path) == ["films/f27/last.png"]


def test_objects_prefixes_and_patterns_of_a_bucket_are_read(
    run: Run, films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moto_server() as url, new_bucket(url) as bucket:
        use_endpoint(monkeypatch, url)
        store = open_store(f"s3://{bucket}/x/films")
        for path in sorted(path for path in films.rglob("*") if path.is_file()):
            store.upload(path.relative_to(films).as_posix(), path)
        below = store.uri
        everything = [
            "a [1].png",
            "b.jpeg",
            "empty.jpg",
            "more/deep/c.png",
            "more/notes.txt",
            "more/日本 ü.png",
        ]
        assert names([below], below=below) == names([f"{below}/"], below=below) == everything
        assert names([f"{below}/b.jpeg"], below=below) == ["b.jpeg"]
        assert names([f"{below}/a [1].png"], below=below) == ["a [1].png"]
        assert names([f"{below}/**/*.png"], below=below) == [
            "a [1].png",
            "more/deep/c.png",
            "more/日本 ü.png",
        ]
        assert names([f"{below}/*.png"], below=below) == ["a [1].png"]
        assert names([f"{below}/m*"], below=below) == everything[3:]
        assert names([f"s3://{bucket}/x/*/more/d??p"], below=below) == ["more/deep/c.png"]
        with pytest.raises(
            UserError, match=r"no object matches s3://.*\.dcm; name JPEG, PNG or DICOM files"
        ):
            find_files([f"{below}/*.dcm"])
        with pytest.raises(UserError, match="holds no files to classify"):
            find_files([f"{below}/none"])
        store.upload("model.pt", run.folder / "model.pt")
        pipeline = xrai.load(below)
        here = run.pipeline.predict(films / "b.jpeg")[0]
        assert pipeline.predict(f"{below}/b.jpeg")[0].probability == pytest.approx(
            here.probability, abs=1e-6
        )


# ----------------------------------------------------------------------------------------- refusals


def test_a_path_that_is_missing_or_no_file_is_refused_before_any_work(
    films: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bare").mkdir()
    for path, message in (
        (tmp_path / "typo.png", "there is no file or folder"),
        (
            tmp_path / "*.tiff",
            "no file matches .*; name JPEG, PNG or DICOM files or folders of them",
        ),
        (tmp_path / "pipe", "is neither a file nor a folder"),
        (tmp_path / "bare", "holds no files to classify"),
        ("s3://[x", r"'s3://\[x' names no bucket"),
        ("s3://[x/*.png", r"'s3://\[x' names no bucket"),
        (tmp_path / "\udcff.png", "is not UTF-8; rename it"),
    ):
        with pytest.raises(UserError, match=message):
            find_files([str(films), str(path)])
    with pytest.raises(UserError, match="no PATH given: name JPEG, PNG or DICOM files"):
        find_files([])
    (tmp_path / "no.zip").write_text("no archive")
    with pytest.raises(SourceError, match=r"no\.zip cannot be read as a zip archive"):
        find_files([str(tmp_path / "no.zip")])


def test_a_place_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"holds no model\.pt: no such run, or its training has not ended"
    ):
        xrai.load(str(tmp_path))


def test_an_array_that_is_no_grey_image_is_a_row_that_says_so(run: Run) -> None:
    rows = run.pipeline.predict([np.zeros((5, 5, 3), np.uint8), np.zeros((9, 9), np.float32)])
    assert [row.decision for row in rows] == ["review", "review"]
    assert rows[0].reason == "is an array of shape (5, 5, 3) and type uint8, not a grey image"


def test_a_model_that_is_not_the_one_of_the_summary_is_refused(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    model = tmp_path / "run" / "model.pt"
    summary = {"files": {"model.pt": sha256_of(model)}}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert xrai.load(str(tmp_path / "run")).model.run_id == run.pipeline.model.run_id
    content = torch.load(model, weights_only=True)
    torch.save({**content, "threshold": 0.9}, model)  # a sound file, but another
    with pytest.raises(CorruptError, match="does not have the hash"):
        xrai.load(str(tmp_path / "run"))


@pytest.mark.parametrize(
    "summary",
    ["", "[]", '{"files": {"model.pt": {}}}', '{"files": []}', '{"files": {}}', "{", "null"],
)
def test_a_summary_that_states_no_hash_of_the_model_is_refused(
    run: Run, summary: str, tmp_path: Path
) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(summary)
    with pytest.raises(RunError, match=r"summary.json does not state the hash(es)? of"):
        xrai.load(str(tmp_path / "run"))
