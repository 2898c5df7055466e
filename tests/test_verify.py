"""The check of a stored data set, and its repair: each damage is found, named, and repaired bit
for bit.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.dataset.pictures import encoded, gradient, picture_file, source_files, write_files
from tests.dataset.small import rows_of
from xrai import preprocess, verify
from xrai.command import run_command
from xrai.dataset.manifest import Row, manifest_lines
from xrai.dataset.shards import DatasetIndex, ObjectInfo, compute_fingerprint, read_index
from xrai.dataset.verify import find_faults
from xrai.store import open_store, take_lease

Command = Callable[..., tuple[int, str, str]]


def run(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["xrai", *arguments])
    try:
        run_command(main)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and the data set made of it, for reading alone; one file is set aside, and one
    pair looks alike.
    """
    folder = tmp_path_factory.mktemp("verify")
    files = source_files(40, 40)
    files["train/NORMAL/broken.png"] = b"no picture"
    files["train/NORMAL/dim.png"] = encoded(gradient(40, 40, seed=99) // 16)
    source = write_files(folder / "chest", files)
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert (
            run(
                monkeypatch,
                preprocess.main,
                f"--source={source}",
                f"--dataset={folder / 'dataset'}",
                "--workers=1",
                "--images.size=16",
                "--shards.rows=20",
            )
            == 0
        )
    return source, folder / "dataset"


@pytest.fixture
def dataset(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the data set, to damage."""
    return Path(shutil.copytree(made[1], tmp_path / "dataset"))


@pytest.fixture
def check(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], dataset: Path
) -> Command:
    """`python -m xrai.verify` on the copy: status, stdout, stderr."""

    def check(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        status = run(monkeypatch, verify.main, f"--dataset={dataset}", *arguments)
        return status, *capfd.readouterr()

    return check


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def all_keys(made: tuple[Path, Path]) -> list[str]:
    return sorted(key for key in contents(made[1]) if key != "dataset.json")


def test_a_whole_data_set_passes(check: Command) -> None:
    status, out, err = check()
    assert status == 0, err
    assert "is whole: 81 images" in out


def test_a_data_set_of_version_1_is_whole_and_is_repaired_to_the_same_bytes(
    made: tuple[Path, Path], dataset: Path, check: Command
) -> None:
    index = read_index(open_store(str(dataset)))
    (dataset / "dataset.json").write_text(replace(index, schema_version=1).to_json())
    assert '"task"' not in (dataset / "dataset.json").read_text()
    whole = contents(dataset)
    status, out, err = check()
    assert status == 0 and f"data set {index.fingerprint[:16]}" in out, err
    flip(dataset / index.splits["train"][0].name, 9000)
    (dataset / "manifest.jsonl").unlink()
    status, _, err = check("--repair", f"--source={made[0]}")
    assert status == 0, err
    assert contents(dataset) == whole


def test_one_flipped_byte_in_any_object_is_found_and_named(
    made: tuple[Path, Path], dataset: Path, tmp_path: Path
) -> None:
    store = open_store(str(dataset))
    index = read_index(store)
    keys = all_keys(made)
    assert {"manifest.jsonl", "report/card.md"} < set(keys) and any(
        key.endswith(".h5") for key in keys
    )
    for key in keys:
        size_bytes = (dataset / key).stat().st_size
        for position in (0, size_bytes // 2, size_bytes - 1):
            flip(dataset / key, position)
            faults = find_faults(store, index)
            assert {fault.key for fault in faults} == {key}, (key, position, faults)
            flip(dataset / key, position)
    assert find_faults(store, index) == []


def test_one_flipped_byte_anywhere_in_dataset_json_is_found(check: Command, dataset: Path) -> None:
    path = dataset / "dataset.json"
    for position in range(0, path.stat().st_size, 97):
        flip(path, position)
        status, _, err = check()
        assert status in (1, 2) and "dataset.json" in err and "Traceback" not in err, position
        flip(path, position)
    assert check()[0] == 0


def test_a_truncated_a_missing_and_a_stray_shard_are_named(check: Command, dataset: Path) -> None:
    shards = sorted(dataset.glob("train-*.h5"))
    shards[0].write_bytes(shards[0].read_bytes()[:-100])
    shutil.copy(shards[1], dataset / "val-00007-of-00009.h5")
    shards[1].unlink()
    status, out, err = check()
    assert status == 1
    assert f"{shards[0].name} is damaged: it has" in out
    assert f"{shards[1].name} is missing" in out
    assert "val-00007-of-00009.h5 is a shard that dataset.json does not list: delete it" in out
    assert len(out.splitlines()) == 3 and "3 faults" in err


def test_what_making_it_left_over_is_named_and_no_fault(check: Command, dataset: Path) -> None:
    (dataset / "unfinished-claim").write_text("left")
    status, out, _ = check()
    assert status == 0
    assert "unfinished-claim is left over" in out


def test_an_address_without_a_data_set_is_the_users_mistake(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run(monkeypatch, verify.main, f"--dataset={tmp_path}") == 2


# --------------------------------------------------- lies that are consistent with their own hashes


def rewrite(dataset: Path, change_rows: Callable[[list[Row]], list[Row]]) -> None:
    """Change the manifest and make dataset.json agree with its new hash."""
    index = read_index(open_store(str(dataset)))
    data = b"".join(manifest_lines(change_rows(rows_of(dataset))))
    (dataset / "manifest.jsonl").write_bytes(data)
    info = ObjectInfo("manifest.jsonl", len(data), hashlib.sha256(data).hexdigest())
    objects = tuple(info if entry.name == info.name else entry for entry in index.objects)
    store_index(dataset, replace(index, objects=objects))


def store_index(dataset: Path, index: DatasetIndex) -> None:
    (dataset / "dataset.json").write_text(index.to_json())


def first(rows: list[Row], split: str) -> Row:
    return next(row for row in rows if row.split == split and row.shard)


def in_val(rows: list[Row], **changes: Any) -> list[Row]:
    """The rows with the first one of val changed."""
    old = first(rows, "val")
    return [replace(row, **changes) if row == old else row for row in rows]


LIES: dict[str, tuple[Callable[[list[Row]], list[Row]], str]] = {
    "a patient in two carved splits": (
        lambda rows: in_val(rows, patient=first(rows, "train").patient),
        "is in two splits",
    ),
    "the same image in two splits": (
        lambda rows: in_val(rows, sha256=first(rows, "train").sha256),
        "are the same image",
    ),
    "a patient where its hash does not put it": (
        lambda rows: in_val(rows, split="test"),
        "its patient's hash says val",
    ),
    "a row that is nowhere": (
        lambda rows: in_val(rows, shard=None, row=None),
        "neither a shard nor a reason",
    ),
    "a file that is not listed": (lambda rows: rows[1:], "dataset.json says"),
    "another label": (
        lambda rows: in_val(rows, label=int(first(rows, "val").label == 0)),
        "does not hold the rows",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_manifest_that_breaks_a_rule_is_found_although_its_hash_fits(
    check: Command, dataset: Path, name: str
) -> None:
    change, words = LIES[name]
    rewrite(dataset, change)
    status, out, _ = check()
    assert status == 1
    assert words in out


def test_counts_mean_and_fingerprint_are_recomputed(dataset: Path, tmp_path: Path) -> None:
    store = open_store(str(dataset))
    index = read_index(store)
    shard = index.splits["train"][0]
    normal, pneumonia = shard.num_rows_per_class
    shifted = replace(shard, num_rows_per_class=(normal + 1, pneumonia - 1))
    splits = {**index.splits, "train": (shifted, *index.splits["train"][1:])}
    for wrong, words in (
        (replace(index, counts=replace(index.counts, num_written=7)), "says"),
        (replace(index, pixel_mean=index.pixel_mean + 0.01), "pixel mean"),
        (replace(index, fingerprint="0" * 64), "fingerprint"),
        (replace(index, splits=splits), "of each class"),
    ):
        faults = find_faults(store, wrong)
        assert any(words in fault.words for fault in faults), (words, faults)
    assert index.fingerprint == compute_fingerprint(index)


# ------------------------------------------------------------------------------------------- repair


def test_repair_makes_every_damaged_object_anew_bit_for_bit(
    made: tuple[Path, Path], check: Command, dataset: Path
) -> None:
    source, original = made
    for key in all_keys(made):
        if key.endswith("00000-of-00001.h5"):
            (dataset / key).unlink()
        elif "train-00001" not in key:  # one shard is whole
            flip(dataset / key, (dataset / key).stat().st_size // 2)
    untouched = (
        (dataset / next(key for key in all_keys(made) if "train-00001" in key)).stat().st_mtime_ns
    )
    status, out, err = check("--repair", f"--source={source}")
    assert status == 0, out + err
    assert contents(dataset) == contents(original)
    assert next(dataset.glob("train-00001*")).stat().st_mtime_ns == untouched


def test_repair_writes_the_damaged_shard_alone(
    made: tuple[Path, Path], check: Command, dataset: Path
) -> None:
    source, original = made
    shard = next(dataset.glob("train-00000*"))
    flip(shard, 5000)
    before = {
        path: path.stat().st_mtime_ns
        for path in dataset.rglob("*")
        if path.is_file() and path != shard
    }
    assert check("--repair", f"--source={source}")[0] == 0
    assert contents(dataset) == contents(original)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_repair_is_refused_while_another_job_writes_the_data_set(
    made: tuple[Path, Path], check: Command, dataset: Path
) -> None:
    flip(next(dataset.glob("train-00000*")), 5000)
    before = contents(dataset)
    with take_lease(open_store(str(dataset))):
        status, _, err = check("--repair", f"--source={made[0]}")
    assert status == 2 and "is being written by process" in err
    assert contents(dataset) == before


def test_repair_from_another_source_is_refused_and_changes_nothing(
    made: tuple[Path, Path], check: Command, dataset: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(made[0], tmp_path / "other"))
    (other / "train" / "NORMAL" / "new.png").write_bytes(picture_file(999))
    flip(next(dataset.glob("train-00000*")), 5000)
    before = contents(dataset)
    status, _, err = check("--repair", f"--source={other}")
    assert status == 2
    assert "was not made from source" in err and err.count("xrai: error:") == 1
    assert contents(dataset) == before


def test_repair_that_cannot_give_the_same_bytes_stores_nothing(
    made: tuple[Path, Path], check: Command, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xrai.ingest import decode, images

    flip(next(dataset.glob("train-00000*")), 5000)
    before = contents(dataset)
    decode_sized = images.decode_sized

    def other_decode(*args: Any, **kwargs: Any) -> Any:  # another Pillow, say
        pixels, sides = decode_sized(*args, **kwargs)
        return pixels // 2, sides

    monkeypatch.setattr(decode, "decode_sized", other_decode)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    status, _, err = check("--repair", f"--source={made[0]}")
    assert status == 1
    assert "made again is not the one" in err
    assert contents(dataset) == before


def test_faults_that_no_source_can_repair_do_not_read_it(
    made: tuple[Path, Path], check: Command, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "open_source", Mock(side_effect=AssertionError("it is read")))
    shutil.copy(next(dataset.glob("train-00000*")), dataset / "val-00007-of-00009.h5")
    before = contents(dataset)
    status, out, err = check("--repair", f"--source={made[0]}")
    assert status == 1 and "dataset.json does not list: delete it" in out
    assert "one fault, as listed; none is a damaged object" in err
    assert contents(dataset) == before


@pytest.mark.parametrize("flag", ["source", "labels", "patient_key"])
def test_a_flag_of_repair_without_repair_is_refused(
    check: Command, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    status, out, err = check(f"--{flag}=data/chest_xray")
    assert status == 2 and out == ""
    assert f"--{flag} is for --repair" in err
    monkeypatch.setenv(f"XRAI_{flag.upper()}", "elsewhere")  # in a container it is always set
    assert check()[0] == 0


def test_a_damaged_index_cannot_be_repaired_and_the_message_says_what_to_do(
    made: tuple[Path, Path], check: Command, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps(index | {"source": "elsewhere"}))
    status, _, err = check("--repair", f"--source={made[0]}")
    assert status == 1
    assert "dataset.json is damaged" in err and "--overwrite" in err
    arguments = (
        f"--source={made[0]}",
        f"--dataset={dataset}",
        "--images.size=16",
        "--shards.rows=20",
        "--workers=1",
    )
    assert run(monkeypatch, preprocess.main, *arguments, "--overwrite") == 0
    assert contents(dataset) == contents(made[1])
