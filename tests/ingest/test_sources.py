import os
import pickle
import random
import socket
import struct
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3
from botocore.response import StreamingBody

from tests.dataset.pictures import branch, deep_folders, source_files, write_files, write_zip
from tests.faults.buckets import moto_server, new_bucket, use_endpoint
from xrai.errors import ImageError, SourceError, UserError
from xrai.ingest import sources
from xrai.ingest.sources import StoreSource, open_source
from xrai.store import StoredObject, open_store

FILES = {
    "train/NORMAL/b.png": b"bb",
    "train/NORMAL/a.png": b"a",
    "train/PNEUMONIA/c.png": b"",
    ".DS_Store": b"x",
}


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def medmnist(
    path: Path, *, num: int = 6, shape: tuple[int, ...] = (28, 28), dtype: str = "uint8"
) -> str:
    images = np.arange(num * np.prod(shape)).reshape(num, *shape).astype(dtype)
    labels = (np.arange(num) % 2).reshape(num, 1).astype("uint8")
    return npz(
        path, train_images=images, train_labels=labels, val_images=images[:2], val_labels=labels[:2]
    )


# ------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("kind", ["folder", "zip", "file://"])
def test_a_folder_and_a_zip_list_and_read_the_same_files(tmp_path: Path, kind: str) -> None:
    if kind == "zip":
        source = open_source(str(write_zip(tmp_path / "x.zip", FILES)))
    else:
        folder = write_files(tmp_path / "a folder", FILES)
        source = open_source(f"file://{folder}" if kind == "file://" else str(folder))
    files = source.files()
    assert [file.path for file in files] == sorted(FILES)
    assert {file.path: file.size_bytes for file in files} == {
        path: len(data) for path, data in FILES.items()
    }
    assert {file.path: source.read(file.path) for file in files} == FILES


@pytest.mark.parametrize("kind", ["folder", "zip", "npz"])
def test_a_source_that_travels_to_another_process_reads_the_same(tmp_path: Path, kind: str) -> None:
    uri = {
        "folder": lambda: str(write_files(tmp_path / "f", FILES)),
        "zip": lambda: str(write_zip(tmp_path / "x.zip", FILES)),
        "npz": lambda: medmnist(tmp_path / "m.npz"),
    }[kind]()
    source = open_source(uri)
    paths = [file.path for file in source.files()]
    before = [bytes(source.read(path)) for path in paths]
    travelled = pickle.loads(pickle.dumps(source))
    assert [bytes(travelled.read(path)) for path in paths] == before


def test_the_pickle_of_a_source_does_not_carry_its_images(tmp_path: Path) -> None:
    source = open_source(medmnist(tmp_path / "m.npz", num=600))
    source.files()
    assert len(pickle.dumps(source)) < 1000


def test_a_link_to_a_folder_that_is_listed_anyway_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_files(tmp_path / "f", FILES)
    (folder / "train" / "again").symlink_to(folder)
    (folder / "a").symlink_to(folder / "train" / "NORMAL")  # before it in any order
    source = open_source(str(folder))
    assert [file.path for file in source.files()] == sorted(FILES)
    assert "f: 2 links to folders that are listed already are skipped, such as" in caplog.text


def test_links_that_branch_lead_to_each_folder_once(tmp_path: Path) -> None:
    branch(tmp_path)
    assert [file.path for file in open_source(str(tmp_path)).files()] == ["f27/last.png"]


def test_nested_folders_are_listed_to_any_depth(tmp_path: Path) -> None:
    with deep_folders(tmp_path) as deepest:
        (deepest / "a.png").write_bytes(b"a")
        source = open_source(str(tmp_path))
        [file] = source.files()
        assert source.read(file.path) == b"a"
        assert [entry.key for entry in open_store(str(tmp_path)).list()] == [file.path]


def test_links_to_files_and_folders_elsewhere_are_followed(tmp_path: Path) -> None:
    elsewhere = write_files(tmp_path / "elsewhere", FILES)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "train").symlink_to(elsewhere / "train")
    source = open_source(str(tmp_path / "f"))
    assert [file.path for file in source.files()] == sorted(
        path for path in FILES if path.startswith("train")
    )
    assert source.read("train/NORMAL/a.png") == b"a"


def test_a_link_that_leads_nowhere_is_listed_and_is_that_files_fault(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "f", FILES)
    (folder / "train" / "NORMAL" / "z.png").symlink_to(tmp_path / "gone")
    source = open_source(str(folder))
    assert "train/NORMAL/z.png" in [file.path for file in source.files()]
    with pytest.raises(ImageError, match="No such file"):
        source.read("train/NORMAL/z.png")


def test_a_file_that_may_not_be_read_is_that_files_fault(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "f", FILES)
    path = folder / "train" / "NORMAL" / "a.png"
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(ImageError, match="Permission denied"):
        open_source(str(folder)).read("train/NORMAL/a.png")


def test_what_is_no_regular_file_is_that_files_fault_and_is_not_waited_for(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "f", FILES)
    os.mkfifo(folder / "pipe")
    (folder / "link to pipe").symlink_to(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "itself").symlink_to(folder / "itself")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / "socket"))
    source = open_source(str(folder))
    listed = {file.path for file in source.files()}
    for name in ("pipe", "link to pipe", "zero", "socket", "itself"):
        assert name in listed
        with pytest.raises(ImageError, match=r"is not a regular file|cannot be read"):
            source.read(name)


@pytest.mark.parametrize("name", ["pipe", "pipe.zip", "pipe.npz"])
def test_a_pipe_as_the_source_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(SourceError, match="is a pipe, a socket or a device; --source takes"):
        open_source(str(tmp_path / name))


def test_the_name_of_a_folder_that_a_link_leads_to_can_be_written(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff"))
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    assert open_source(str(tmp_path / "link")).name == "bad\ufffd"


def test_a_member_of_a_zip_whose_name_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("zz\u00e9.png", b"x")
    path.write_bytes(path.read_bytes().replace("\u00e9".encode(), b"\xed\xb3"))
    with pytest.raises(SourceError, match="cannot be read as a zip archive"):
        open_source(str(path)).files()


def test_a_key_of_a_bucket_that_is_not_utf_8_has_a_name_that_can_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with moto_server() as url, new_bucket(url) as bucket:
        use_endpoint(monkeypatch, url)
        urllib3.request("PUT", f"{url}/{bucket}/x/bad%ED%B3%BF.png", body=b"x")
        source = open_source(f"s3://{bucket}/x")
        (file,) = source.files()
        assert file.path.encode() and source.read(file.path) == b"x"  # as this server has it


def test_a_name_that_is_not_utf_8_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "f", FILES)
    Path(os.fsdecode(os.fsencode(folder) + b"/bad\xff.png")).write_bytes(b"x")
    with pytest.raises(SourceError, match="not UTF-8"):
        open_source(str(folder)).files()


def test_a_file_larger_than_any_x_ray_is_excluded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 10)
    source = open_source(str(write_files(tmp_path / "f", {"a.png": bytes(11), "b.png": bytes(10)})))
    assert source.read("b.png") == bytes(10)
    with pytest.raises(ImageError, match="has 11 bytes, more than any X-ray"):
        source.read("a.png")


def test_a_file_that_states_no_size_is_empty_whatever_it_would_give(tmp_path: Path) -> None:
    (tmp_path / "version").symlink_to("/proc/version")
    assert Path("/proc/version").read_bytes()
    assert open_source(str(tmp_path)).read("version") == b""


def test_a_file_that_comes_in_pieces_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(range(250)) * 1000
    source = open_source(str(write_files(tmp_path / "f", {"a.png": data})))
    read = os.read
    monkeypatch.setattr(os, "read", lambda descriptor, number: read(descriptor, min(number, 7001)))
    assert source.read("a.png") == data


def test_reading_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(write_files(tmp_path / "f", {"a.png": bytes(10), "b/c.png": b""})))
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    assert source.read("a.png") == bytes(10)
    with pytest.raises(ImageError, match="not a regular file"):
        source.read("b")
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 5)
    with pytest.raises(ImageError):
        source.read("a.png")
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


# ----------------------------------------------------------------------------------------- archives


def test_a_zip_under_another_name_is_known_by_its_contents(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "archive", FILES)
    assert [file.path for file in open_source(str(path)).files()] == sorted(FILES)


def test_a_member_whose_bytes_were_changed_is_that_files_fault(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"train/a.png": b"AAAABBBB" * 4, "train/b.png": b"good"})
    damaged = path.read_bytes().replace(b"AAAABBBB", b"AAAABBBA", 1)
    path.write_bytes(damaged)
    source = open_source(str(path))
    assert source.read("train/b.png") == b"good"
    with pytest.raises(ImageError, match="cannot be unpacked"):
        source.read("train/a.png")


def test_a_member_that_declares_more_than_any_x_ray_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"x")
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = struct.pack("<I", sources.MAX_FILE_BYTES + 1)
    path.write_bytes(data)
    with pytest.raises(ImageError, match=f"has {sources.MAX_FILE_BYTES + 1} bytes"):
        open_source(str(path)).read("a.png")


def test_a_member_that_unpacks_to_more_than_it_declares_is_cut_and_excluded(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(1_000_000))
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = struct.pack("<I", 100)
    path.write_bytes(data)
    with pytest.raises(ImageError, match="cannot be unpacked"):
        open_source(str(path)).read("a.png")


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_a_zip_damaged_anywhere_is_refused_or_gives_a_reason_and_nothing_else(
    tmp_path: Path, method: int
) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data * 200)
    whole, rng = path.read_bytes(), random.Random(method)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            source = open_source(str(path))
            for file in source.files():
                with suppress(ImageError):
                    source.read(file.path)
        except SourceError as error:
            assert str(error)


def test_names_as_programs_of_windows_and_of_unix_write_them_are_taken(tmp_path: Path) -> None:
    names = {
        "train\\": "",
        "train\\NORMAL\\": "",
        "./": "",
        "train\\NORMAL\\a.png": "train/NORMAL/a.png",
        "./train/NORMAL/b.png": "train/NORMAL/b.png",
        "train/./NORMAL//c.png": "train/NORMAL/c.png",
        ".\\train\\NORMAL\\d.png": "train/NORMAL/d.png",
        "train/NORMAL/scan 12:30.png": "train/NORMAL/scan 12:30.png",
    }
    path = write_zip(tmp_path / "x.zip", {name: kept.encode() for name, kept in names.items()})
    source = open_source(str(path))
    assert [file.path for file in source.files()] == sorted(kept for kept in names.values() if kept)
    assert all(source.read(file.path) == file.path.encode() for file in source.files())


class Unflagged(zipfile.ZipInfo):
    """A member whose name is in an encoding that no flag states."""

    encoding = "utf-8"

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802, of zipfile
        return self.filename.encode(self.encoding), 0


class Russian(Unflagged):
    encoding = "cp866"


@pytest.mark.parametrize("kind", [zipfile.ZipInfo, Unflagged])
def test_names_in_utf_8_are_read_with_and_without_the_flag(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: type[zipfile.ZipInfo]
) -> None:
    names = ("Lungenentzündung/ö.png", "Норма/1.png", "plain/1.png", "肺炎/1.png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(kind(name), bytes([number]))
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path / "x.zip"))))
    assert {file.path: source.read(file.path) for file in source.files()} == {
        name: bytes([number]) for number, name in enumerate(names)
    }
    assert not caplog.records


def test_names_of_an_unknown_encoding_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("Норма/1.png", "Норма/2.png", "plain/1.png"):
            archive.writestr(Russian(name), b"x")
    source = open_source(str(tmp_path / "x.zip"))
    assert len(source.files()) == 3
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "x.zip: 2 files have a name in an unknown encoding" in record.getMessage()


def test_one_file_under_two_spellings_of_its_name_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"train/a.png": b"x", ".\\train\\a.png": b"y"})
    with pytest.raises(SourceError, match=r"2 files under the one name 'train/a\.png'"):
        open_source(str(path)).files()


@pytest.mark.parametrize(
    "name", ["../a.png", "/etc/a.png", "a/../b.png", "C:/a.png", "c:\\a.png", "..\\a.png"]
)
def test_names_in_a_zip_that_leave_their_folder_are_refused(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path / "x.zip", {name: b"x"})
    with pytest.raises(SourceError, match="unsafe name"):
        open_source(str(path)).files()


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("train/a.png", b"x")
        archive.writestr("train/a.png", b"y")
    with pytest.raises(SourceError, match=r"2 files under the one name 'train/a\.png'"):
        open_source(str(path)).files()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 cut short", b"no zip at all"])
def test_a_zip_that_is_none_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"x\.zip cannot be read as a zip"):
        open_source(str(path)).files()


# ----------------------------------------------------------------------------------- MedMNIST files


def test_a_medmnist_file_lists_its_images_by_split_and_class(tmp_path: Path) -> None:
    source = open_source(medmnist(tmp_path / "m.npz"))
    paths = [file.path for file in source.files()]
    assert paths[:2] == ["train/NORMAL/000000", "train/NORMAL/000002"]
    assert paths[-2:] == ["val/NORMAL/000000", "val/PNEUMONIA/000001"]
    picture = source.read("train/PNEUMONIA/000003")
    assert isinstance(picture, np.ndarray)
    np.testing.assert_array_equal(
        picture, np.arange(3 * 784, 4 * 784).astype(np.uint8).reshape(28, 28)
    )


def test_names_say_what_the_labels_of_a_medmnist_file_mean(tmp_path: Path) -> None:
    path = medmnist(tmp_path / "m.npz")

    def first(names: str) -> list[str]:
        return sorted(
            {file.path.split("/")[1] for file in open_source(path, names.split()).files()}
        )

    assert first("healthy TB COVID") == ["TB", "healthy"]
    assert first("pneumonia Normal") == first("") == ["NORMAL", "PNEUMONIA"]

    def of_numbers(*names: str) -> list[str]:
        """What the labels 0 and 1 of the first two images mean."""
        by_number = {file.path[-6:]: file.path for file in open_source(path, names).files()}
        return [by_number[f"{number:06d}"].split("/")[1] for number in (0, 1)]

    assert of_numbers("pneumonia", "Normal") == ["PNEUMONIA", "NORMAL"]
    for names in ((), ("normal",), ("Pneumonia",), ("Normal", "pneumonia")):
        assert of_numbers(*names) == ["NORMAL", "PNEUMONIA"]
    with pytest.raises(SourceError, match=r"'A/B': classes of a \.npz have no slash"):
        open_source(path, ["A/B", "C"])


@pytest.mark.parametrize("labels", [np.array([[0], [5]]), np.zeros((2, 14)), None])
def test_a_medmnist_file_of_any_labels_lists_its_images_where_none_are_needed(
    tmp_path: Path, labels: np.ndarray | None
) -> None:
    images = np.arange(32, dtype=np.uint8).reshape(2, 4, 4)
    arrays = {"test_images": images} | ({} if labels is None else {"test_labels": labels})
    source = open_source(npz(tmp_path / "m.npz", **arrays), needs_labels=False)
    assert [file.path for file in source.files()] == ["test/000000", "test/000001"]
    np.testing.assert_array_equal(source.read("test/000001"), images[1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": np.zeros(3)}, "holds no images"),
        (
            {"train_images": np.zeros((2, 4, 4, 3), "u1"), "train_labels": np.zeros(2, "u1")},
            r"\(2, 4, 4, 3\)",
        ),
        ({"train_images": np.zeros((2, 4, 4), "f4"), "train_labels": np.zeros(2, "u1")}, "float32"),
        ({"train_images": np.zeros((2, 4, 4), "u1")}, "train_labels"),
        (
            {"train_images": np.zeros((2, 4, 4), "u1"), "train_labels": np.zeros(3, "u1")},
            "each of 2 images",
        ),
        (
            {"train_images": np.zeros((2, 4, 4), "u1"), "train_labels": np.array([0, 2])},
            "0 .NORMAL. or 1",
        ),
        (
            {"train_images": np.zeros((2, 4, 4), "u1"), "train_labels": np.array([0.5, 1.0])},
            "0 .NORMAL. or 1",
        ),
    ],
)
def test_an_npz_that_is_not_like_medmnist_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(npz(tmp_path / "m.npz", **arrays)).files()


def test_an_npz_with_pickled_objects_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (ran,)

    uri = npz(tmp_path / "m.npz", train_images=np.array([Trap()], dtype=object))
    with pytest.raises(SourceError, match=r"cannot be read as a MedMNIST"):
        open_source(uri).files()
    assert not ran.exists()


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (10**15, 28, 28), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000000, 28, 28), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 28, 28), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999999999, 28), }",
        "{'descr': [('a', 'b', 'c', 'd')], 'fortran_order': False, 'shape': (2, 4, 4), }",
        "{'descr': '|u1', 'fortran_order': 7, 'shape': None, }",
        "{'descr': (((((",
        "[" * 5000,
        "'",
        "(" * 300 + ")" * 300,
        "\\",
        "",
        "\0",
        "{[]: 1}",
        "{1: 2, 'a': 3}",
        "-" * 9000 + "1",
    ],
)
@pytest.mark.parametrize("version", [b"\1\0", b"\2\0", b"\3\0", b"\x09\0"])
def test_any_header_of_an_array_is_refused_in_one_line(
    tmp_path: Path, header: str, version: bytes
) -> None:
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(header))
    array = b"\x93NUMPY" + version + size + header.encode() + bytes(32)
    path = write_zip(tmp_path / "m.npz", {"train_images.npy": array, "train_labels.npy": array})
    with pytest.raises(SourceError):
        open_source(str(path)).files()


def test_an_npz_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = Path(medmnist(tmp_path / "m.npz"))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(SourceError, match=r"m\.npz cannot be read"):
        open_source(str(path)).files()


# ---------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "{}/nowhere",
            "there is no source .*/nowhere; --source takes a folder, a .zip, a MedMNIST .npz or s3://",
        ),
        ("", "--source is empty"),
        ("{}/notes.txt", "of no known kind"),
        ("http://example.org/x.zip", "of no known kind"),
        ("s3://bucket/x.zip", "download it first"),
        ("s3://[x", r"'s3://\[x' names no bucket"),
        ("s3://[x/a.zip", "download it first"),
        ("file://[x/a", "is not a folder of this machine"),
        ("[x://y", "of no known kind"),
    ],
)
def test_an_address_that_is_no_source_is_refused_with_what_is_allowed(
    tmp_path: Path, uri: str, message: str
) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=message):
        open_source(uri.format(tmp_path))


def test_a_bucket_is_read_as_a_folder_is(tmp_path: Path) -> None:
    files = source_files(2, 2)
    source = StoreSource(open_store(str(write_files(tmp_path, files))))
    assert {file.path: source.read(file.path) for file in source.files()} == files
    with pytest.raises(ImageError, match="no longer there"):
        source.read("train/NORMAL/gone.png")


def test_an_object_larger_than_any_x_ray_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 1000)
    with moto_server() as url, new_bucket(url) as bucket:
        use_endpoint(monkeypatch, url)
        store = open_store(f"s3://{bucket}/x")
        store.write("a.png", bytes(1001))
        store.write("b.png", bytes(1000))
        arrived: list[bytes] = []
        read = StreamingBody.read

        def watched(body: StreamingBody, size: int | None = None) -> bytes:
            arrived.append(read(body, size))
            return arrived[-1]

        monkeypatch.setattr(StreamingBody, "read", watched)
        source = open_source(store.uri)
        with pytest.raises(ImageError, match="larger than any X-ray"):
            source.read("a.png")
        assert arrived == []
        assert source.read("b.png") == bytes(1000)


@pytest.mark.parametrize("key", ["../a.png", "train//a.png", "train/./a.png", "/a.png"])
def test_keys_in_a_bucket_that_leave_their_folder_are_refused(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    monkeypatch.setattr(type(store), "list", lambda self: iter([StoredObject(key, 1)]))
    with pytest.raises(SourceError, match=r"unsafe name .*; rename it"):
        StoreSource(store).files()
