"""A run in a folder, a bucket in a folder."""

from pathlib import Path

import pytest

from tests.results.runs import Bucket
from xrai.results import folder as folder_module
from xrai.results import publisher
from xrai.results.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path / "submit"), "r1")
    folder.open()
    return folder


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    found = Bucket(tmp_path / "bucket")
    monkeypatch.setattr(folder_module, "open_store", lambda uri: found)
    monkeypatch.setattr(publisher, "_FIRST_PAUSE_S", 0.01)
    return found
