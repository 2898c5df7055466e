"""A run in a folder, a bucket in a folder."""

import subprocess
from pathlib import Path
from typing import Protocol

import pytest

from tests.browsers import CHROMIUM_OPTIONS, find_chromium
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


class Browse(Protocol):
    """Opens a page in a headless Chromium with a window of "WIDTH,HEIGHT"."""

    def __call__(
        self, page: Path, fragment: str, *, size: str = "800,600"
    ) -> tuple[str, list[str]]: ...


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Opens a page in a headless Chromium; gives the document after its script, and what the
    console said.
    """
    chromium = find_chromium()

    def open_page(page: Path, fragment: str, *, size: str = "800,600") -> tuple[str, list[str]]:
        done = subprocess.run(
            [
                chromium,
                "--headless",
                *CHROMIUM_OPTIONS,
                "--enable-logging=stderr",
                "--v=0",
                f"--window-size={size}",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--dump-dom",
                f"{page.as_uri()}{fragment}",
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return open_page
