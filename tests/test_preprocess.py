import hashlib
import io
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from tests.dataset.pictures import (
    PATIENT_ID,
    PATIENT_NAME,
    dicom_file,
    encoded,
    gradient,
    huge_png,
    picture_file,
    source_files,
    write_files,
    write_zip,
)
from tests.dataset.small import rows_of
from xrai import preprocess, verify
from xrai.command import run_command
from xrai.dataset.shards import DatasetIndex, open_shard, read_index
from xrai.dataset.verify import find_faults
from xrai.files import scratch_folder
from xrai.ingest import sources
from xrai.phantom import make_phantoms
from xrai.store import open_store

SMALL = (
    "--images.size=16",
    "--shards.rows=10",
    "--splits.val_fraction=0.3",
    "--splits.test_fraction=0.2",
)


class Done:
    """How a command ended."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("xrai: error:")]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Done]:
    """Run the command as `python -m xrai.preprocess` does, in this process, in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments: str | Path, workers: int = 1) -> Done:
        words = ["preprocess", f"--workers={workers}", *(str(word) for word in arguments)]
        monkeypatch.setattr(sys, "argv", words)
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_command(preprocess.main)
        captured = capfd.readouterr()
        return Done(int(exit_.value.code or 0), captured.out, captured.err)

    return run


def make(
    run: Callable[..., Done], source: Path, dataset: Path, *more: str, workers: int = 1
) -> DatasetIndex:
    done = run(f"--source={source}", f"--dataset={dataset}", *SMALL, *more, workers=workers)
    assert done.status == 0, done.err
    return read_index(open_store(str(dataset)))


def all_files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(done: Done, message: str, *, status: int = 2) -> None:
    """The user's mistake, or a fault: its status, one clear line, no traceback."""
    assert done.status == status, done.err
    assert len(done.error_lines) == 1, done.err
    assert message in done.error_lines[0]
    assert "Traceback" not in done.err


# ----------------------------------------------------------------------------------- what comes out


def test_a_folder_becomes_a_data_set_whose_parts_agree(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    files = source_files()
    source, dataset = write_files(tmp_path / "chest", files), tmp_path / "dataset"
    index = make(run, source, dataset)
    rows = rows_of(dataset)
    assert [row.path for row in rows] == sorted(files)
    assert index.counts.num_found == index.counts.num_written == len(files)
    assert sum(index.num_images(split) for split in index.splits) == len(files)
    assert set(index.splits) == {"train", "val", "test"}
    for split, shards in index.splits.items():
        for info in shards:
            shard = open_shard(dataset / info.name)
            data = (dataset / info.name).read_bytes()
            assert (info.size_bytes, info.sha256) == (len(data), hashlib.sha256(data).hexdigest())
            assert len(shard.labels) == info.num_rows <= 10
            assert [int((shard.labels == k).sum()) for k in (0, 1)] == list(info.num_rows_per_class)
            assert list(shard.sha256) == sorted(shard.sha256)
            here = {row.row: row for row in rows if row.shard == info.name}
            for place in range(info.num_rows):
                row = here[place]
                assert (row.path, row.patient, row.subtype, row.sha256, row.label, row.split) == (
                    shard.source[place],
                    shard.patient[place],
                    shard.subtype[place],
                    shard.sha256[place],
                    shard.labels[place],
                    split,
                )
                assert row.sha256 == hashlib.sha256(files[row.path]).hexdigest()


def test_the_stored_pixels_are_those_of_decode(run: Callable[..., Done], tmp_path: Path) -> None:
    from xrai.ingest.images import decode

    files = source_files()
    source, dataset = write_files(tmp_path / "chest", files), tmp_path / "dataset"
    index = make(run, source, dataset, "--images.fit=pad")
    pixels = []
    for split, shards in index.splits.items():
        for info in shards:
            shard = open_shard(dataset / info.name)
            for path, image in zip(shard.source, shard.images, strict=True):
                np.testing.assert_array_equal(
                    image, decode(files[path], size=16, fit="pad", max_pixels=10**6)
                )
            if split == "train":
                pixels.append(shard.images)
    train = np.concatenate(pixels).astype(np.float64)
    assert index.pixel_mean == pytest.approx(train.mean(), rel=1e-12)
    assert index.pixel_std == pytest.approx(train.std(), rel=1e-9)


def test_the_name_of_a_source_that_is_not_utf_8_is_written_as_text(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    source = write_files(tmp_path / "chest\udcff", source_files())
    assert make(run, source, tmp_path / "dataset").source == "chest\ufffd"


def test_the_shards_say_how_large_each_source_image_was(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    files = source_files()
    source, dataset = write_files(tmp_path / "chest", files), tmp_path / "dataset"
    index = make(run, source, dataset)
    for shards in index.splits.values():
        for info in shards:
            shard = open_shard(dataset / info.name)
            for path, width, height in zip(shard.source, shard.width, shard.height, strict=True):
                with Image.open(io.BytesIO(files[path])) as picture:
                    assert (width, height) == picture.size


def test_plain_h5py_reads_what_was_written(run: Callable[..., Done], tmp_path: Path) -> None:
    index = make(run, write_files(tmp_path / "chest", source_files()), tmp_path / "dataset")
    info = index.splits["train"][0]
    with h5py.File(tmp_path / "dataset" / info.name, "r") as file:
        assert file["images"].shape == (info.num_rows, 16, 16)
        assert file["labels"][:].sum() == info.num_rows_per_class[1]
        assert file["source"].asstr()[0].startswith("train/")


def test_what_is_left_at_the_address_is_listed_in_dataset_json_and_nothing_else(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    dataset = tmp_path / "dataset"
    index = make(run, write_files(tmp_path / "chest", source_files()), dataset)
    listed = {info.name for shards in index.splits.values() for info in shards} | {
        info.name for info in index.objects
    }
    assert set(all_files(dataset)) == listed | {"dataset.json"}
    assert {path.name for path in dataset.iterdir() if path.is_dir()} == {"report"}
    hashes = all_files(dataset)
    for info in index.objects:
        assert hashes[info.name] == info.sha256
        assert (dataset / info.name).stat().st_size == info.size_bytes


def test_the_last_lines_say_where_and_how_many(run: Callable[..., Done], tmp_path: Path) -> None:
    files = {**source_files(), "train/NORMAL/empty.png": b""}
    source = write_files(tmp_path / "chest", files)
    done = run(f"--source={source}", f"--dataset={tmp_path / 'dataset'}", *SMALL)
    assert done.status == 0
    assert "45 files found = 44 written + 1 excluded" in done.out
    assert str(tmp_path / "dataset") in done.out.splitlines()[-1]


def test_the_card_shows_samples_counts_and_what_was_excluded(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    files = {**source_files(), "train/NORMAL/empty|.png": b""}
    make(run, write_files(tmp_path / "chest", files), tmp_path / "dataset")
    report = tmp_path / "dataset" / "report"
    card = (report / "card.md").read_text()
    assert "45 files found = 44 written + 1 excluded" in card
    assert r"train/NORMAL/empty\|.png" in card and "is empty" in card
    for name in ("samples-normal.png", "samples-pneumonia.png", "class-counts.png"):
        assert f"({name})" in card
        with Image.open(report / name) as picture:
            assert picture.width > 100


def test_images_with_few_grey_levels_are_counted_in_the_card_and_named_in_the_log(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    dim = {f"train/NORMAL/{k}.png": encoded(gradient(40, 40, seed=k) // 16) for k in range(70, 72)}
    flat = {"train/NORMAL/white.png": encoded(np.full((40, 40), 255, np.uint8))}
    source = write_files(tmp_path / "chest", {**source_files(), **dim, **flat})
    done = run(f"--source={source}", f"--dataset={tmp_path / 'dataset'}", *SMALL)
    assert done.status == 0
    message = "2 images use fewer than 48 of 256 grey levels, such as train/NORMAL/7"
    assert message in done.err
    card = (tmp_path / "dataset/report/card.md").read_text()
    assert f"Note: {message}" in card
    assert "| train/NORMAL/white.png | shows one grey level throughout |" in card
    plain = run(
        f"--source={write_files(tmp_path / 'plain', source_files())}",
        f"--dataset={tmp_path / 'other'}",
        *SMALL,
    )
    assert "grey levels" not in plain.err


# --------------------------------------------------------------- the same bytes, however it is made


def test_the_objects_are_the_same_for_any_number_of_workers(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    files = {**source_files(), "train/NORMAL/bad.png": b"no picture"}
    source = write_files(tmp_path / "chest", files)
    for workers in (1, 2, 3):
        make(run, source, tmp_path / f"by{workers}", workers=workers)
    assert all_files(tmp_path / "by1") == all_files(tmp_path / "by2") == all_files(tmp_path / "by3")


def test_the_objects_are_the_same_for_any_order_of_listing(
    run: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_files(tmp_path / "chest", source_files())
    make(run, source, tmp_path / "one")
    scan = os.scandir

    def backwards(path: str) -> AbstractContextManager[list[os.DirEntry[str]]]:
        return nullcontext(sorted(scan(path), key=lambda entry: entry.name, reverse=True))

    monkeypatch.setattr(sources, "os", SimpleNamespace(**{**vars(os), "scandir": backwards}))
    make(run, source, tmp_path / "two")
    monkeypatch.undo()
    assert all_files(tmp_path / "one") == all_files(tmp_path / "two")


def test_a_folder_a_nested_folder_and_zips_of_them_hold_the_same_images(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    files = source_files()
    nested = {f"chest_xray/{path}": data for path, data in files.items()}
    public = {**nested, **{f"chest_xray/{path}": data for path, data in nested.items()}}
    public["chest_xray/__MACOSX/train/NORMAL/._IM-1000-0000.png"] = b"junk"
    sources = [
        write_files(tmp_path / "plain", files),
        write_files(tmp_path / "nested", nested),
        write_zip(tmp_path / "plain.zip", dict(reversed(files.items()))),
        write_zip(tmp_path / "public.zip", public),
    ]
    indexes = [
        make(run, source, tmp_path / f"of-{source.name}", workers=1 + k % 2)
        for k, source in enumerate(sources)
    ]
    first = indexes[0].splits["train"][0].name
    shards = [open_shard(tmp_path / f"of-{source.name}" / first) for source in sources]
    for index, shard in zip(indexes, shards, strict=True):
        assert index.counts.num_found == 44
        np.testing.assert_array_equal(shard.images, shards[0].images)
        assert list(shard.patient) == list(shards[0].patient)
    assert indexes[3].counts.num_not_data == 45
    assert indexes[0].fingerprint == indexes[2].fingerprint


def test_a_medmnist_file_becomes_a_data_set(run: Callable[..., Done], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, num in (("train", 60), ("val", 40), ("test", 20)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (num, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(num) % 2).reshape(-1, 1).astype(np.uint8)
    np.savez(tmp_path / "mnist.npz", **arrays)
    index = make(run, tmp_path / "mnist.npz", tmp_path / "dataset", "--images.size=28", workers=2)
    assert {split: index.num_images(split) for split in index.splits} == {
        "train": 60,
        "val": 40,
        "test": 20,
    }
    assert index.carved == ()
    shard = open_shard(tmp_path / "dataset" / index.splits["val"][0].name)
    for path, image, label in zip(shard.source, shard.images, shard.labels, strict=True):
        number = int(path.rpartition("/")[2])
        np.testing.assert_array_equal(image, arrays["val_images"][number])
        assert label == arrays["val_labels"][number, 0]


def test_test_images_of_one_class_alone_become_a_data_set_to_evaluate_on(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    files = {f"test/PNEUMONIA/{k}.png": picture_file(k) for k in range(12)}
    source, dataset = write_files(tmp_path / "chest", files), tmp_path / "dataset"
    index = make(run, source, dataset)
    assert {name: index.num_images_per_class(name) for name in index.splits} == {
        "test": {"NORMAL": 0, "PNEUMONIA": 12}
    }
    pixels = np.concatenate(
        [open_shard(dataset / info.name).images for info in index.splits["test"]]
    )
    assert index.pixel_mean == pytest.approx(pixels.mean(), rel=1e-12)
    assert find_faults(open_store(str(dataset)), index) == []
    card = (dataset / "report" / "card.md").read_text()
    assert "samples-pneumonia.png" in card and "samples-normal.png" not in card
    assert "to evaluate on alone" in card
    refused(
        run(f"--source={write_files(tmp_path / 'one', {'PNEUMONIA/a.png': b'x'})}", "--dataset=d"),
        "no usable NORMAL images; training needs images of both classes, and images to evaluate on "
        "alone belong in a folder test/",
    )


def test_16_bit_colour_and_turned_files_go_in_beside_plain_ones(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    upright = gradient(40, 40, seed=77)
    exif = Image.Exif()
    exif[0x0112] = 3
    kinds = {
        "train/NORMAL/a-l.png": encoded(upright),
        "train/NORMAL/b-16.png": encoded(Image.fromarray(upright.astype(np.uint16) * 257)),
        "train/NORMAL/c-rgb.png": encoded(Image.fromarray(upright).convert("RGB")),
        "train/NORMAL/d-rgba.png": encoded(Image.fromarray(upright).convert("RGBA")),
        "train/NORMAL/e-turned.png": encoded(np.ascontiguousarray(upright[::-1, ::-1]), exif=exif),
        "train/NORMAL/f.jpeg": encoded(Image.fromarray(upright).convert("RGB"), "JPEG", quality=98),
    }
    source = write_files(tmp_path / "chest", {**source_files(), **kinds})
    index = make(run, source, tmp_path / "dataset")
    images: dict[str, Any] = {}
    for shards in index.splits.values():
        for info in shards:
            shard = open_shard(tmp_path / "dataset" / info.name)
            images.update(zip(shard.source, shard.images, strict=True))
    plain = images["train/NORMAL/a-l.png"].astype(int)
    for path in kinds:
        assert np.abs(images[path].astype(int) - plain).max() <= (
            4 if path.endswith("jpeg") else 1
        ), path


# -------------------------------------------------------------------------------------------- DICOM


# With a drawn key, now and then no patient is in the test split
FIXED_KEY = b"the splits follow from it, so it is the same each time"


def dicom_source(num_patients: int = 24) -> dict[str, bytes]:
    """DICOM files under every kind of name, two of each patient, who is known by the header
    alone.
    """
    files = {}
    for patient, image in itertools.product(range(num_patients), range(2)):
        samples = gradient(40 + patient, 36, seed=2 * patient + image).astype("<u2") * 16
        name = f"{image}/{patient}{('', '.dcm', '.dicom')[patient % 3]}"
        files[f"{'PNEUMONIA' if patient % 2 else 'NORMAL'}/{name}"] = dicom_file(
            samples, BitsStored=12, PatientID=f"{PATIENT_ID} {patient}"
        )
    return files


def test_a_folder_of_dicom_files_becomes_a_data_set_that_names_no_patient(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    source, dataset = write_files(tmp_path / "films", dicom_source()), tmp_path / "dataset"
    key = tmp_path / "patient.key"
    key.write_bytes(FIXED_KEY)
    options = [f"--dataset={dataset}", f"--patient_key={key}", *SMALL]
    done = run(f"--source={source}", *options, workers=2)
    assert done.status == 0, done.err
    index = read_index(open_store(str(dataset)))
    assert index.counts.num_written == 48
    splits: dict[str, set[str]] = {}
    for row in rows_of(dataset):
        patient = row.path.rpartition("/")[2].partition(".")[0]
        splits.setdefault(patient, set()).add(row.split)
        assert row.patient.startswith("dicom:")
    assert {len(found) for found in splits.values()} == {
        1
    }  # both images of a patient are in one split
    assert set.union(*splits.values()) == {"train", "val", "test"}
    for info in index.splits["train"]:
        shard = open_shard(dataset / info.name)
        for path, width, height in zip(shard.source, shard.width, shard.height, strict=True):
            assert (width, height) == (40 + int(path.rpartition("/")[2].partition(".")[0]), 36)
    secrets = [word.encode() for word in (*PATIENT_NAME.split("^"), PATIENT_ID)]
    written = [path.read_bytes() for path in dataset.rglob("*") if path.is_file()]
    for secret in secrets:
        assert not any(secret in data for data in [*written, done.out.encode(), done.err.encode()])


def test_dicom_and_png_of_the_same_phantoms_become_the_same_data_set(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    pytest.importorskip("pydicom", reason="pydicom is not installed (the extra `dicom`)")
    images: dict[str, Any] = {}
    for image_format in ("dicom", "png"):
        make_phantoms(
            tmp_path / image_format, num_images=40, seed=5, image_format=image_format, workers=1
        )
        make(run, tmp_path / image_format, tmp_path / f"{image_format}-set")
        for row in rows_of(tmp_path / f"{image_format}-set"):
            assert row.shard is not None
            name = row.path.rpartition(".")[0]
            pixels = open_shard(tmp_path / f"{image_format}-set" / row.shard).images[row.row]
            images.setdefault(name, []).append(
                (row.split, row.patient, row.subtype, pixels.astype(int))
            )
    assert len(images) == 40
    for one, other in images.values():
        assert one[:3] == other[:3]
        assert np.abs(one[3] - other[3]).max() <= 1


def test_damaged_dicom_files_are_excluded_with_their_reasons(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    files = {f"train/{path}": data for path, data in dicom_source().items()}
    whole = dicom_file(gradient(40, 40))
    bad = {
        "train/NORMAL/cut": whole[:-200],
        "train/NORMAL/frames.dcm": dicom_file(gradient(40, 40), NumberOfFrames=3),
        "train/NORMAL/side.dcm": dicom_file(gradient(40, 40), PatientOrientation=["A", "F"]),
        "train/NORMAL/header.dcm": whole[:150],
    }
    index = make(
        run,
        write_files(tmp_path / "films", {**files, **bad}),
        tmp_path / "dataset",
        "--images.max_set_aside=0.2",
    )
    assert index.counts.num_set_aside == len(bad)
    reasons = {row.path: row.reason for row in rows_of(tmp_path / "dataset") if row.reason}
    assert set(reasons) == set(bad)
    assert all(reason.startswith("is DICOM") for reason in reasons.values())


def test_without_pydicom_a_dicom_source_is_refused_with_what_to_install_and_nothing_is_written(
    run: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_files(tmp_path / "films", dicom_source(4))
    monkeypatch.setitem(sys.modules, "pydicom.errors", None)
    done = run(f"--source={source}", f"--dataset={tmp_path / 'dataset'}", *SMALL)
    refused(done, "pip install 'xrai[dicom]'")
    assert not (tmp_path / "dataset").exists()


# ---------------------------------------------------------------------- the key of patients' hashes


def patients_table(path: Path) -> str:
    """A table of the files of `dicom_source` that names their patients."""
    return table(
        path,
        [
            f"{name},{name.partition('/')[0]},Ann {name.rpartition('/')[2].partition('.')[0]},"
            for name in dicom_source()
        ],
    )


@pytest.mark.parametrize("kind", ["headers", "headers that nobody has read", "table"])
def test_jobs_with_one_key_agree_and_one_with_another_is_refused_in_one_line(
    run: Callable[..., Done], tmp_path: Path, kind: str
) -> None:
    source = write_files(tmp_path / "films", dicom_source())
    labels = [patients_table(tmp_path / "t.csv")] if kind == "table" else []
    arguments = [f"--source={source}", *SMALL, *labels]
    own, other = (f"--patient_key={tmp_path / name}" for name in ("own.key", "other.key"))
    (tmp_path / "own.key").write_bytes(FIXED_KEY)
    assert run(*arguments, f"--dataset={tmp_path / 'whole'}", own).status == 0
    parts = [*arguments, f"--dataset={tmp_path / 'parts'}"]
    assert run(*parts, own, "--partition=0/3").status == 0
    if kind == "headers":  # the other job hashes nothing, and is told all the same
        (tmp_path / "other.key").write_text("0123456789abcdef")
    elif kind != "table":
        (tmp_path / "parts" / "unfinished-hashes-00000").unlink()
    before = all_files(tmp_path / "parts")
    refused(run(*parts, other, "--partition=1/3"), "--patient_key or XRAI_PATIENT_KEY")
    assert all_files(tmp_path / "parts") == before
    for number in (1, 2):
        assert run(*parts, own, f"--partition={number}/3").status == 0
    assert all_files(tmp_path / "parts") == all_files(tmp_path / "whole")
    done = run(*arguments, f"--dataset={tmp_path / 'whole'}", other)
    refused(done, f"or patients hashed with another key than that in {tmp_path / 'other.key'}")
    secret = (tmp_path / "own.key").read_text().strip()
    assert not any(
        secret.encode() in path.read_bytes() for path in (tmp_path / "whole").rglob("*.*")
    )


def test_where_no_patient_is_named_no_key_is_needed_nor_made(
    run: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XRAI_PATIENT_KEY", "/nowhere/at/all")
    make(run, write_files(tmp_path / "chest", source_files()), tmp_path / "dataset")
    monkeypatch.delenv("XRAI_PATIENT_KEY")
    make(run, tmp_path / "chest", tmp_path / "again")
    assert not (tmp_path / "config").exists()


def test_a_key_is_never_in_the_data_set(run: Callable[..., Done], tmp_path: Path) -> None:
    source = write_files(tmp_path / "films", dicom_source(4))
    dataset = tmp_path / "dataset"
    done = run(f"--source={source}", f"--dataset={dataset}", f"--patient_key={dataset}/a/key")
    refused(done, "is inside --dataset")
    assert not dataset.exists()


def test_a_data_set_of_keyed_patients_is_repaired_with_the_key(
    run: Callable[..., Done],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source, dataset = write_files(tmp_path / "films", dicom_source()), tmp_path / "dataset"
    (tmp_path / "key").write_bytes(FIXED_KEY)
    make(run, source, dataset, f"--patient_key={tmp_path / 'key'}")
    before = all_files(dataset)
    (dataset / "manifest.jsonl").unlink()
    arguments = ["verify", f"--dataset={dataset}", "--repair", f"--source={source}"]
    for name, status in (("none", 2), ("key", 0)):
        monkeypatch.setattr(sys, "argv", [*arguments, f"--patient_key={tmp_path / name}"])
        with pytest.raises(SystemExit) as exit_:
            run_command(verify.main)
        assert exit_.value.code == status, capfd.readouterr().err
        assert not (tmp_path / "none").exists()
    assert all_files(dataset) == before


# ------------------------------------------------------------------------------------------- labels


def labelled(folder: Path) -> tuple[Path, list[str]]:
    """A source without any order, and the rows of its table: val is given, patients have two
    images.
    """
    files = {f"films/{k:02d}.png": picture_file(k) for k in range(40)} | {
        "films/readme.txt": b"no film"
    }
    splits = {0: "val", 1: "val", 2: "test", 3: "test"}
    rows = [
        f"films/{k:02d}.png,{('normal', 'PNEUMONIA')[k // 2 % 2]},Ann "
        f"{k // 2},{splits.get(k // 2, 'train')}"
        for k in range(40)
    ]
    return write_files(folder, files), rows


def table(path: Path, rows: Sequence[str]) -> str:
    path.write_text("\n".join(["path,label,patient,split", *rows]) + "\n")
    return f"--labels={path}"


NO_VAL_LIMIT = "--splits.min_val_images=1"


def test_a_table_of_labels_stands_in_for_class_folders(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    source, rows = labelled(tmp_path / "chest")
    index = make(run, source, tmp_path / "dataset", table(tmp_path / "t.csv", rows), NO_VAL_LIMIT)
    assert index.carved == ()
    assert {split: index.num_images(split) for split in index.splits} == {
        "train": 32,
        "val": 4,
        "test": 4,
    }
    assert index.counts.num_not_data == 1
    found = {row.path: row for row in rows_of(tmp_path / "dataset")}
    for line in rows:
        path, label, _, split = line.split(",")
        assert (found[path].label, found[path].split) == (
            ("NORMAL", "PNEUMONIA").index(label.upper()),
            split,
        )
    assert len({row.patient for row in found.values()}) == 20
    assert not any(
        b"Ann" in path.read_bytes() for path in (tmp_path / "dataset").rglob("*") if path.is_file()
    )


def test_the_objects_are_the_same_for_any_order_of_the_table_and_any_partition(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    source, rows = labelled(tmp_path / "chest")
    make(run, source, tmp_path / "one", table(tmp_path / "t.csv", rows), NO_VAL_LIMIT)
    labels = table(tmp_path / "u.csv", rows[::-1])
    for number in (1, 0):
        flags = [
            f"--source={source}",
            f"--dataset={tmp_path / 'two'}",
            labels,
            f"--partition={number}/2",
            NO_VAL_LIMIT,
        ]
        done = run(*flags, *SMALL)
        assert done.status == 0, done.err
    one, two = all_files(tmp_path / "one"), all_files(tmp_path / "two")
    assert one == two


@pytest.mark.parametrize("moment", ["begun", "finished"])
def test_another_table_is_another_data_set(
    run: Callable[..., Done], tmp_path: Path, moment: str
) -> None:
    source, rows = labelled(tmp_path / "chest")
    labels = table(tmp_path / "t.csv", rows)
    flags = [f"--source={source}", f"--dataset={tmp_path / 'dataset'}", NO_VAL_LIMIT, *SMALL]
    done = run(*flags, labels, "--partition=0/2") if moment == "begun" else run(*flags, labels)
    assert done.status == 0, done.err
    before = all_files(tmp_path / "dataset")
    assert ("dataset.json" in before) == (moment == "finished")
    table(
        tmp_path / "t.csv", [*rows[:-2], *(row.replace("PNEUMONIA", "NORMAL") for row in rows[-2:])]
    )
    refused(
        run(*flags, labels), "another source" if moment == "begun" else "other images or labels"
    )
    refused(run(*flags), "holds no images laid out as")
    assert all_files(tmp_path / "dataset") == before
    table(tmp_path / "t.csv", rows)
    assert run(*flags, labels).status == 0
    assert run(*flags, labels, "--partition=1/2").status == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda rows: [*rows, "films/99.png,NORMAL,Bob,train"],
            "line 42: there is no file 'films/99.png' in chest",
        ),
        (
            lambda rows: [rows[0].replace("normal", "healthy"), *rows[1:]],
            "line 2: 'healthy' would be a class of 1 image beside one of ",
        ),
        (
            lambda rows: [rows[0].replace("val", "train"), *rows[1:]],
            "a patient in val who is in train in line 2",
        ),
        (lambda rows: [*rows, rows[3]], "line 42: path 'films/03.png' is in line 5, too"),
        (lambda rows: rows[::4], "has no usable PNEUMONIA images"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_by_its_lines_and_nothing_is_written(
    run: Callable[..., Done], tmp_path: Path, change: Callable[[list[str]], list[str]], words: str
) -> None:
    source, rows = labelled(tmp_path / "chest")
    labels = table(tmp_path / "t.csv", change(rows))
    done = run(f"--source={source}", f"--dataset={tmp_path / 'dataset'}", labels, *SMALL)
    refused(done, words)
    assert "Ann" not in done.err
    assert not (tmp_path / "dataset").exists()


# Of the 40 films of `labelled`: the other columns of the table, and the cells of film k
UNLEARNABLE: dict[str, tuple[str, Callable[[int], str], str]] = {
    "a finding that is never present": (
        "Edema,Nodule",
        lambda k: f"{k % 2},{('0', '')[k % 2]}",
        "chest has no usable images with Nodule; training needs images with and without each",
    ),
    "a finding that is never absent": (
        "Edema,Nodule",
        lambda k: f"{k % 2},1",
        "chest has no usable images known to be without Nodule",
    ),
    "a finding that is unknown of all": (
        "Edema,Nodule",
        lambda k: f"{k % 2},-1",
        "chest has no usable images with Nodule",
    ),
    "a finding of one patient": (
        "Edema,Nodule,patient",
        lambda k: f"{k % 2},{int(k < 3)},p{k // 3}",
        "no image with Nodule falls into val: too few patients have one to be in both train and",
    ),
    "a finding that is absent from val": (
        "Edema,Nodule,split",
        lambda k: f"{k % 2},{int(k > 30)},{'val' if k < 20 else 'train'}",
        "val has no usable images with Nodule",
    ),
    "a label that is none": (
        "Edema,Nodule",
        lambda k: f"{k % 2},{2 if k == 7 else k % 3 % 2}",
        "line 9: Nodule is '2', allowed are 1, yes or true (present), 0, no or false",
    ),
    "a finding twice": (
        "Edema,edema",
        lambda k: f"{k % 2},{k % 2}",
        "has the name 'edema' twice (first as 'Edema'; case does not matter); leave one",
    ),
    "a patient on both sides": (
        "Edema,patient,split",
        lambda k: f"{k % 2},p{k % 20},{'val' if k < 20 else 'train'}",
        "line 22: a patient in train who is in val in line 2",
    ),
    "one class": ("label", lambda k: "TB", "has one class alone, 'TB'"),
    "a class that is absent from train": (
        "label,split",
        lambda k: f"{('normal', 'TB', 'COVID')[k % 3]},{'val' if k % 3 == 2 else 'train'}",
        "train has no usable COVID images; training needs images of every class",
    ),
    "a class that is absent from val": (
        "label,split",
        lambda k: f"{('normal', 'TB', 'COVID')[k % 3]},{'val' if k % 6 < 2 else 'train'}",
        "val has no usable COVID images; training needs images of every class",
    ),
    "a class of one patient": (
        "label,patient",
        lambda k: f"{('normal', 'TB', 'COVID')[k % 3]},{'one' if k % 3 == 2 else k}",
        "no COVID image falls into val: too few patients have one to be in both train and val",
    ),
}


@pytest.mark.parametrize("name", UNLEARNABLE)
def test_labels_that_cannot_be_learned_are_refused_in_one_line_and_nothing_is_written(
    run: Callable[..., Done], tmp_path: Path, name: str
) -> None:
    columns, cells, words = UNLEARNABLE[name]
    source, _ = labelled(tmp_path / "chest")
    rows = [f"films/{k:02d}.png,{cells(k)}" for k in range(40)]
    (tmp_path / "t.csv").write_text("\n".join([f"path,{columns}", *rows]))
    labels = f"--labels={tmp_path}/t.csv"
    done = run(f"--source={source}", f"--dataset={tmp_path}/dataset", labels, NO_VAL_LIMIT, *SMALL)
    refused(done, words)
    assert not (tmp_path / "dataset").exists()


def test_the_same_image_with_contradicting_findings_is_excluded_and_said(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    source, _ = labelled(tmp_path / "chest")
    for one, other in ((1, 2), (5, 6)):  # the second pair knows one thing each
        copy = (source / f"films/{one:02d}.png").read_bytes()
        (source / f"films/{other:02d}.png").write_bytes(copy)
    cells = {1: "1,0", 2: "0,0", 5: "1,", 6: ",0"}
    rows = [f"films/{k:02d}.png,{cells.get(k, f'{k % 2},{k % 3 % 2}')}" for k in range(40)]
    (tmp_path / "t.csv").write_text("\n".join(["path,Edema,Nodule", *rows]))
    make(run, source, tmp_path / "dataset", f"--labels={tmp_path}/t.csv", NO_VAL_LIMIT)
    excluded = {row.path: row.reason for row in rows_of(tmp_path / "dataset") if row.reason}
    reason = "is under another label, too, as the same image"
    assert excluded == dict.fromkeys(("films/01.png", "films/02.png"), reason)


def test_a_data_set_of_a_table_is_verified_and_repaired_with_it(
    run: Callable[..., Done],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source, rows = labelled(tmp_path / "chest")
    labels = table(tmp_path / "t.csv", rows)
    make(run, source, tmp_path / "dataset", labels, NO_VAL_LIMIT)
    whole = all_files(tmp_path / "dataset")
    damaged = next((tmp_path / "dataset").glob("val-*.h5"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")

    def check(*arguments: str) -> int:
        monkeypatch.setattr(
            sys, "argv", ["verify", f"--dataset={tmp_path / 'dataset'}", *arguments]
        )
        with pytest.raises(SystemExit) as exit_:
            run_command(verify.main)
        return int(exit_.value.code or 0)

    assert check() == 1
    assert check("--repair", f"--source={source}", labels) == 0
    assert check() == 0
    assert all_files(tmp_path / "dataset") == whole


# ---------------------------------------------------------------------------------------- once more


def test_once_more_is_nothing_to_do(run: Callable[..., Done], tmp_path: Path) -> None:
    source, dataset = write_files(tmp_path / "chest", source_files()), tmp_path / "dataset"
    make(run, source, dataset)
    before = {path: path.stat().st_mtime_ns for path in sorted(dataset.rglob("*"))}
    done = run(f"--source={source}", f"--dataset={dataset}", *SMALL, workers=2)
    assert done.status == 0
    assert "nothing to do" in done.err
    assert {path: path.stat().st_mtime_ns for path in sorted(dataset.rglob("*"))} == before


@pytest.mark.parametrize("name", ["train-00000-of-00003.h5", "manifest.jsonl"])
def test_once_more_on_a_damaged_data_set_says_that_it_is_damaged(
    run: Callable[..., Done], tmp_path: Path, name: str
) -> None:
    source, dataset = write_files(tmp_path / "chest", source_files()), tmp_path / "dataset"
    make(run, source, dataset)
    damaged = next(dataset.glob(name[:8] + "*"))
    damaged.unlink()
    done = run(f"--source={source}", f"--dataset={dataset}", *SMALL)
    refused(done, f"is damaged: {damaged.name} is missing; `xrai verify --repair`")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "config",
            "labels.names = empty, not NORMAL|PNEUMONIA: give another --dataset, or --overwr",
        ),
        ("images", "--overwrite"),
    ],
)
def test_another_data_set_is_refused_and_unchanged(
    run: Callable[..., Done], tmp_path: Path, change: str, words: str
) -> None:
    source, dataset = write_files(tmp_path / "chest", source_files()), tmp_path / "dataset"
    make(run, source, dataset)
    before = all_files(dataset)
    more = ["--labels.names=NORMAL|PNEUMONIA"] if change == "config" else []
    if change == "images":
        (source / "train" / "NORMAL" / "new.png").write_bytes(picture_file(999))
    done = run(f"--source={source}", f"--dataset={dataset}", *SMALL, *more)
    refused(done, words)
    assert all_files(dataset) == before


def test_overwrite_replaces_it_as_if_nothing_had_been_there(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    source = write_files(tmp_path / "chest", source_files())
    make(run, source, tmp_path / "one", "--shards.rows=3")
    make(run, source, tmp_path / "one", "--overwrite")
    make(run, source, tmp_path / "two")
    assert all_files(tmp_path / "one") == all_files(tmp_path / "two")


def test_what_an_older_data_set_left_at_the_address_is_gone_when_the_new_one_is_whole(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    source, dataset = write_files(tmp_path / "chest", source_files()), tmp_path / "dataset"
    left = {
        "report/near-duplicates.csv": b"old",
        "train-00000-of-00099.h5": b"old",
        "unfinished-part-train-00000-of-00099.h5": b"old",
    }
    write_files(dataset, left)
    index = make(run, source, dataset)
    listed = {info.name for shards in index.splits.values() for info in shards} | {
        info.name for info in index.objects
    }
    assert set(all_files(dataset)) == listed | {"dataset.json"}


def test_a_source_of_damaged_images_does_not_cost_the_data_set_that_it_was_to_replace(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    source, dataset = write_files(tmp_path / "chest", source_files()), tmp_path / "dataset"
    make(run, source, dataset)
    before = all_files(dataset)
    bad = {name: data[: len(data) // 2] for name, data in source_files().items()}
    bad |= {name: source_files()[name] for name in list(bad)[:9]}
    write_files(tmp_path / "bad", bad)
    done = run(f"--source={tmp_path / 'bad'}", f"--dataset={dataset}", *SMALL, "--overwrite")
    refused(done, "more than images.max_set_aside")
    assert all_files(dataset) == before


def test_a_damaged_data_set_is_replaced_too(run: Callable[..., Done], tmp_path: Path) -> None:
    source, dataset = write_files(tmp_path / "chest", source_files()), tmp_path / "dataset"
    make(run, source, dataset)
    before = all_files(dataset)
    index = (dataset / "dataset.json").read_bytes()
    (dataset / "dataset.json").write_bytes(index[: len(index) // 2])
    refused(run(f"--source={source}", f"--dataset={dataset}", *SMALL), "--overwrite", status=1)
    make(run, source, dataset, "--overwrite")
    assert all_files(dataset) == before


def test_a_source_that_is_refused_does_not_cost_the_data_set_that_it_was_to_replace(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    source, dataset = write_files(tmp_path / "chest", source_files()), tmp_path / "dataset"
    make(run, source, dataset)
    before = all_files(dataset)
    for name, (bad, message) in bad_sources(tmp_path / "bad").items():
        done = run(f"--source={bad}", f"--dataset={dataset}", *SMALL, "--overwrite")
        refused(done, message)
        assert all_files(dataset) == before, name


OTHERS = {
    "notes.txt": b"mine",
    "unfinished-thesis.docx": b"mine",
    "manifest.jsonl": b'{"path": "mine"}\n',
    "report/card.md": b"# Mine",
    "report/mine.txt": b"mine",
    "dataset.json": b'{"images": []}',
    "replacement/notes.txt": b"mine",
    "train-1.h5": b"mine",
    "train-00000-of-00003.h5": b"mine",
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_with_a_file_of_somebody_else_is_refused_and_unchanged(
    run: Callable[..., Done], tmp_path: Path, name: str
) -> None:
    source, dataset = write_files(tmp_path / "chest", source_files()), tmp_path / "dataset"
    write_files(dataset, {name: OTHERS[name]})
    before = all_files(dataset)
    for more in ("--overwrite",) if name == "dataset.json" else ("--overwrite", "--partition=0/2"):
        done = run(f"--source={source}", f"--dataset={dataset}", *SMALL, more)
        refused(done, f"holds files of something else ({name})")
        assert all_files(dataset) == before


def test_what_systems_leave_in_folders_is_not_in_the_way(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    source, dataset = write_files(tmp_path / "chest", source_files()), tmp_path / "dataset"
    left = {".DS_Store": b"x", ".git/HEAD": b"x", "Thumbs.db": b"x", "lost+found/1": b"x"}
    write_files(dataset, left)
    make(run, source, dataset)
    make(run, source, dataset, "--overwrite", "--shards.rows=3")
    assert {name for name in left if (dataset / name).read_bytes() == b"x"} == set(left)


def test_a_file_put_beside_a_finished_data_set_is_unchanged(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    source, dataset = write_files(tmp_path / "chest", source_files()), tmp_path / "dataset"
    make(run, source, dataset)
    write_files(dataset, {"unfinished-thesis.docx": b"mine", "test-00007-of-00009.h5": b"mine"})
    before = all_files(dataset)
    done = run(f"--source={source}", f"--dataset={dataset}", *SMALL)
    assert done.status == 0 and "nothing to do" in done.err
    done = run(f"--source={source}", f"--dataset={dataset}", *SMALL, "--overwrite")
    refused(done, "unfinished-thesis.docx")
    assert all_files(dataset) == before


# ---------------------------------------------------------------------------------------- bad files


BAD = {
    "damaged.png": (
        picture_file(1)[:60] + b"XXXXXXXX" + picture_file(1)[68:],
        "is cut short or damaged",
    ),
    "truncated.jpeg": (picture_file(2, image_format="JPEG")[:400], "is cut short or damaged"),
    "zero.png": (b"", "is empty (0 bytes)"),
    "huge.png": (
        huge_png(100_000, 100_000),
        "declares 100000 x 100000 pixels, more than images.max_pixels",
    ),
    "notes.txt": (b"not an image", "is not a JPEG, PNG or DICOM file"),
    "page.jpeg": (b"<html>404</html>", "is not a JPEG, PNG or DICOM file"),
}


def test_each_bad_file_is_excluded_with_its_reason_and_the_rest_goes_on(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    files = {**source_files(), **{f"train/NORMAL/{name}": data for name, (data, _) in BAD.items()}}
    source, dataset = write_files(tmp_path / "chest", files), tmp_path / "dataset"
    (source / "train" / "PNEUMONIA" / "dangling.png").symlink_to(tmp_path / "gone")
    index = make(run, source, dataset, "--images.max_set_aside=0.2")
    assert (index.counts.num_found, index.counts.num_written, index.counts.num_set_aside) == (
        51,
        44,
        7,
    )
    aside = {row.path.rpartition("/")[2]: row for row in rows_of(dataset) if row.reason}
    assert set(aside) == {*BAD, "dangling.png"}
    for name, (_, reason) in BAD.items():
        assert aside[name].reason.startswith(reason), aside[name]
        assert aside[name].shard is None and aside[name].row is None
    assert "No such file" in aside["dangling.png"].reason
    card = (dataset / "report" / "card.md").read_text()
    assert all(name.replace("_", r"\_") in card for name in aside)


def test_a_shard_of_bad_files_alone_is_left_out(run: Callable[..., Done], tmp_path: Path) -> None:
    files = {**source_files(), **{f"train/NORMAL/{k}.txt": f"text {k}".encode() for k in range(4)}}
    index = make(
        run,
        write_files(tmp_path / "chest", files),
        tmp_path / "d",
        "--images.max_set_aside=0.2",
        "--shards.rows=1",
    )
    assert index.counts.num_written == 44
    assert sum(len(shards) for shards in index.splits.values()) == 44
    assert all(info.num_rows == 1 for shards in index.splits.values() for info in shards)


@pytest.mark.parametrize("workers", [1, 2])
def test_too_many_bad_files_are_refused_and_nothing_is_left(
    run: Callable[..., Done], tmp_path: Path, workers: int
) -> None:
    files = {
        **source_files(),
        **{f"train/NORMAL/{k}.png": b"damaged" + bytes([k]) for k in range(5)},
    }
    source, dataset = write_files(tmp_path / "chest", files), tmp_path / "dataset"
    done = run(f"--source={source}", f"--dataset={dataset}", *SMALL, workers=workers)
    refused(done, "more than images.max_set_aside = 0.05")
    assert all_files(tmp_path / "dataset") == {}


# ---------------------------------------------------------------------------------------- bad input


def bad_sources(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    (tmp_path / "empty").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("no image")
    good = source_files()
    normal = {path: data for path, data in good.items() if "NORMAL" in path}
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 no more")
    both = {
        **good,
        "test/NORMAL/copy.png": good["train/NORMAL/IM-1000-0000.png"],
        "test/PNEUMONIA/x.png": picture_file(88),
    }
    return {
        "missing": (tmp_path / "nowhere", "there is no source"),
        "empty": (tmp_path / "empty", "it is empty"),
        "text": (tmp_path / "notes.txt", "of no known kind"),
        "no tree": (
            write_files(tmp_path / "flat", {"a.png": picture_file(1)}),
            "holds no images laid out as",
        ),
        "one class": (write_files(tmp_path / "normal", normal), "PNEUMONIA"),
        "one class unusable": (
            write_files(tmp_path / "unusable", {**normal, "train/PNEUMONIA/x.png": b""}),
            "PNEUMONIA",
        ),
        "unknown class": (
            write_files(tmp_path / "covid", {**good, "train/COVID/a.png": picture_file(1)}),
            "'COVID'",
        ),
        "broken zip": (tmp_path / "broken.zip", "cannot be read as a zip"),
        "unsafe zip": (
            write_zip(tmp_path / "unsafe.zip", {**good, "../x.png": b""}),
            "unsafe name",
        ),
        "same image in two splits": (
            write_files(tmp_path / "both", both),
            "--splits.duplicates=drop",
        ),
    }


@pytest.mark.parametrize(
    "name",
    [
        "missing",
        "empty",
        "text",
        "no tree",
        "one class",
        "one class unusable",
        "unknown class",
        "broken zip",
        "unsafe zip",
        "same image in two splits",
    ],
)
def test_a_bad_source_is_refused_in_one_line_and_nothing_is_written(
    run: Callable[..., Done], tmp_path: Path, name: str
) -> None:
    source, message = bad_sources(tmp_path)[name]
    done = run(f"--source={source}", f"--dataset={tmp_path / 'dataset'}", *SMALL)
    refused(done, message)
    assert not (tmp_path / "dataset").exists()


def test_names_of_folders_and_files_cannot_control_the_terminal(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    names = ("NORMAL/\x1b]0;a\x07.png", "NORMAL/masks\x1b[2J/b.png", "COVID\x1b[31m/\x9b2Jc.png")
    bad = {f"train/{name}": b"x" for name in names}
    source = write_files(tmp_path / "chest", {**source_files(), **bad})
    for status, word in ((2, "COVID"), (0, "b.png")):
        done = run(f"--source={source}", f"--dataset={tmp_path / 'dataset'}", *SMALL)
        assert done.status == status and word in done.err
        assert not {"\x1b", "\x07", "\x9b"} & {*done.err, *done.out}
        (source / "train" / names[2]).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--images.sice=64", "did you mean --images.size?"),
        ("--image.size=64", "did you mean --images.size?"),
        (
            "--images.size=9",
            "images.size = 9 is not allowed: it takes a whole number at least 16 and at most 1024",
        ),
        ("--images.size=big", "images.size = 'big'"),
        ("--images.fit=stretch", "one of crop, squash, pad"),
        ("--splits.val_fraction=1.5", "splits.val_fraction = 1.5"),
        ("--workers=-1", "--workers = -1"),
        ("--workers=many", "workers"),
        ("--config=nowhere.yaml", "there is no config file nowhere.yaml"),
        ("--dataset=", "--dataset"),
        ("--dataset=ftp://x/y", "ftp://x/y"),
        ("--dataset=s3://", "names no bucket"),
    ],
)
def test_a_bad_flag_is_refused_in_one_line_and_nothing_is_written(
    run: Callable[..., Done], tmp_path: Path, flag: str, message: str
) -> None:
    source = write_files(tmp_path / "chest", source_files())
    done = run(f"--source={source}", f"--dataset={tmp_path / 'dataset'}", flag)
    refused(done, message)
    assert not (tmp_path / "dataset").exists()
    assert not list(Path.cwd().iterdir())


def test_a_destination_below_a_file_is_refused(run: Callable[..., Done], tmp_path: Path) -> None:
    source = write_files(tmp_path / "chest", source_files())
    (tmp_path / "file").write_text("in the way")
    done = run(f"--source={source}", f"--dataset={tmp_path / 'file' / 'dataset'}", *SMALL)
    refused(done, str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_destination_that_may_not_be_written_is_refused(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    source = write_files(tmp_path / "chest", source_files())
    (tmp_path / "locked").mkdir(mode=0o555)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write everywhere")
    done = run(f"--source={source}", f"--dataset={tmp_path / 'locked' / 'dataset'}", *SMALL)
    refused(done, "Permission denied")


def test_a_machine_without_a_folder_for_temporary_files_is_told_so_at_once(
    run: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_files(tmp_path / "chest", source_files())
    with monkeypatch.context() as patch:
        scratch_folder.cache_clear()
        patch.setattr(tempfile, "tempdir", None)
        patch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
        done = run(f"--source={source}", f"--dataset={tmp_path / 'dataset'}", *SMALL)
    refused(done, "name one by TMPDIR")
    assert not (tmp_path / "dataset").exists()


def test_a_folder_in_place_of_dataset_json_is_refused_before_any_image_is_read(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    source = write_files(tmp_path / "chest", source_files())
    (tmp_path / "dataset" / "dataset.json").mkdir(parents=True)
    done = run(f"--source={source}", f"--dataset={tmp_path}/dataset", *SMALL)
    refused(done, "dataset.json cannot be read: it is not a regular file")
    assert "hash:" not in done.err
    assert [path.name for path in (tmp_path / "dataset").iterdir()] == ["dataset.json"]


def test_a_data_set_inside_its_own_source_is_refused(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    source = write_files(tmp_path / "chest", source_files())
    before = all_files(source)
    done = run(f"--source={source}", f"--dataset={source / 'dataset'}", *SMALL)
    refused(done, "inside")
    assert all_files(source) == before


# ------------------------------------------------------------------------------- as people start it


def test_the_command_works_from_a_shell_with_its_default_addresses(tmp_path: Path) -> None:
    write_files(tmp_path / "data" / "chest_xray", source_files(40, 40))
    command = [sys.executable, "-m", "xrai.preprocess", "--images.size=16"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "dataset" / "dataset.json").is_file()
    again = subprocess.run(
        [*command, "--images.fit=pad"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert again.returncode == 2
    assert (
        again.stderr.splitlines()[-1].startswith("xrai: error:") and "Traceback" not in again.stderr
    )


def test_preprocessing_never_imports_torch() -> None:
    code = "import sys, xrai.preprocess; sys.exit('torch' in sys.modules or 'boto3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
