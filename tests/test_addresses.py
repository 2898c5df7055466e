"""The addresses of files and folders that flags take: what is a path, and what a bucket."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from xrai import runs
from xrai.command import run_command
from xrai.errors import UserError
from xrai.ingest.find import find_files
from xrai.ingest.patients import PatientKey
from xrai.ingest.records import read_text
from xrai.ingest.sources import open_source
from xrai.learning.weights import read_weights
from xrai.phantom.__main__ import main as phantom_main
from xrai.store import disk_path, open_parent, open_store


@pytest.mark.parametrize("address", ["s3:/b/x.csv", "S3:b/x.csv", "s3:x.csv"])
def test_an_s3_address_without_its_slashes_is_refused_wherever_one_is_taken(address: str) -> None:
    for take in (
        open_store,
        open_source,
        read_weights,
        partial(read_text, wanted="a table"),
        lambda address: find_files([address]),
        partial(disk_path, flag="--out"),
    ):
        with pytest.raises(UserError, match="an S3 address begins with s3://") as raised:
            take(address)
        assert len(str(raised.value).splitlines()) == 1 and address in str(raised.value)


def test_a_file_whose_name_looks_like_an_address_is_taken_from_a_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s3:1.png").touch()
    (file,) = find_files(["s3:1.png"])
    assert (file.path, file.read()) == ("s3:1.png", b"")
    (tmp_path / "a.png").touch()
    assert len(find_files([f"FILE://{tmp_path}/a.png"])) == 1
    assert disk_path(f"file://{tmp_path}", flag="--out") == tmp_path


def test_the_folder_of_a_file_is_found_from_its_address() -> None:
    found = {
        uri: open_parent(uri) for uri in ("/x.csv", "s3://bucket/x.csv", "s3://bucket/a/x.csv")
    }
    assert [store.uri for store, _ in found.values()] == ["/", "s3://bucket", "s3://bucket/a"]
    assert {name for _, name in found.values()} == {"x.csv"}
    with pytest.raises(UserError, match="names no file"):
        open_parent("s3://x.csv")


@pytest.mark.parametrize(
    ("uri", "folder"),
    [
        *(("file:///x.csv", "/"), ("FILE://localhost/x.csv", "/")),
        *(("file:///a/x.csv", "/a"), ("file:///a%20b/x.csv", "/a b")),
    ],
)
def test_a_file_address_has_a_folder_also_in_the_root(uri: str, folder: str) -> None:
    store, name = open_parent(uri)
    assert (store.uri, name) == (folder, "x.csv")


@pytest.mark.parametrize("main", [runs.main, phantom_main])
def test_a_folder_of_this_machine_is_no_bucket(
    main: Callable[[], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run_id = ["x"] if main is runs.main else []
    monkeypatch.setattr(sys, "argv", ["xrai", *run_id, "--out=s3://b/x"])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    (line,) = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2 and "--out = 's3://b/x' is not allowed" in line
    assert [*tmp_path.iterdir()] == []


def test_the_key_of_patients_is_no_object_of_a_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'s3://b/key' is not allowed: it takes a local path"):
        PatientKey("s3://b/key").hash("1", group="p")
    assert [*tmp_path.iterdir()] == []
