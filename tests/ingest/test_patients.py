import hashlib
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from xrai import files
from xrai.errors import UserError
from xrai.ingest.patients import PatientKey

IDENTIFIER = "0012345"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without any key."""
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_key_is_made_when_it_is_first_needed_beside_the_users_configuration(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = PatientKey()
    assert key.id == key.existing_id() == "" and not (home / ".config").exists()
    with caplog.at_level("INFO"):
        key.hash(IDENTIFIER, group="dicom")
    path = home / ".config" / "xrai" / "patient.key"
    assert f"{path}; keep it" in caplog.text and "--patient_key" in caplog.text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert re.fullmatch(r"[0-9a-f]{64}\n", path.read_text())
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "elsewhere"))
    PatientKey().hash(IDENTIFIER, group="dicom")
    assert (home / "elsewhere" / "xrai" / "patient.key").read_text() != path.read_text()


def test_a_patient_has_one_key_for_each_secret_and_plain_hashes_do_not_find_him(
    tmp_path: Path,
) -> None:
    one, other = PatientKey(f"{tmp_path}/one"), PatientKey(f"{tmp_path}/other")
    found = one.hash(IDENTIFIER, group="dicom")
    assert found == PatientKey(f"{tmp_path}/one").hash(IDENTIFIER, group="dicom")
    assert found != other.hash(IDENTIFIER, group="dicom")
    assert found != one.hash("0012346", group="dicom")
    assert re.fullmatch(r"dicom:[0-9a-f]{16}", found)
    plain = hashlib.sha256(IDENTIFIER.encode()).hexdigest()
    assert plain[:16] not in (found.removeprefix("dicom:"), one.id * 2)
    assert one.id != other.id and one.id not in (tmp_path / "one").read_text()


def test_jobs_that_need_a_key_at_the_same_time_make_one(tmp_path: Path) -> None:
    keys = [PatientKey(f"{tmp_path}/new/key") for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        found = set(pool.map(lambda key: key.hash(IDENTIFIER, group="p"), keys))
    assert len(found) == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["key"]


def test_an_identifier_has_one_hash_however_its_accents_and_spaces_are_written() -> None:
    key = PatientKey()
    found = {
        key.hash(f"M{u}ller{space}7", group="p") for u in ("ü", "u\u0308") for space in " \t\xa0"
    }
    assert len({*found, key.hash(" Müller  7", group="p")}) == 1
    assert len({key.hash(each, group="p") for each in ("müller 7", "Müller7", "Müller 7")}) == 3


def test_a_key_may_be_of_ones_own_making(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"\x00\xff sixteen bytes\r\n")
    (tmp_path / "same").write_bytes(b"\x00\xff sixteen bytes")
    one, same = PatientKey(f"{tmp_path}/key"), PatientKey(f"{tmp_path}/same")
    assert one.hash("\udc80", group="p") == same.hash("\udc80", group="p")


def test_a_key_that_cannot_be_used_is_one_line_that_names_the_option(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short").write_text("secret\n")
    (tmp_path / "long").write_bytes(b"x" * 5000)
    (tmp_path / "file").write_text("")
    (tmp_path / "null").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(files, "_SILENCE_S", 0.05)
    for name, may_make, words in (
        ("short", True, "is no key .* 16 to 4096 bytes"),
        ("long", True, "is no key"),
        ("file", True, "is no key"),
        ("null", True, "is no key .* bytes; name a file by --patient_key"),
        ("pipe", True, "nothing was written into it for 0.05 s"),
        ("", True, "Is a directory.*--patient_key FILE or XRAI_PATIENT_KEY"),
        ("file/below", True, "it is a file.*--patient_key"),
        ("none", False, "No such file or directory.*--patient_key"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            PatientKey(f"{tmp_path}/{name}", may_make=may_make).hash(IDENTIFIER, group="p")
        assert "\n" not in str(caught.value) and IDENTIFIER not in str(caught.value)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("none")))
    with pytest.raises(UserError, match=r"no home folder for the key.*--patient_key"):
        PatientKey().hash(IDENTIFIER, group="p")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_cannot_be_written_is_one_line_that_names_the_option(home: Path) -> None:
    home.chmod(0o500)
    with pytest.raises(UserError, match=r"Permission denied.*--patient_key"):
        PatientKey().hash(IDENTIFIER, group="p")
