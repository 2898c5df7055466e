"""The Chromium that tests drive."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-component-update",
    "--disable-background-networking",
]


def find_chromium() -> str:
    """The path of Chromium; without one, the test is skipped."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium: none of chromium, chromium-browser and google-chrome is in PATH")
    return found


@contextmanager
def open_chromium() -> Iterator[Browser]:
    """Chromium under Playwright, whose event loop runs in this thread until the block ends."""
    with sync_playwright() as playwright:
        options = {"executable_path": find_chromium(), "args": CHROMIUM_OPTIONS}
        browser = playwright.chromium.launch(**options)  # type: ignore[arg-type]
        yield browser
        browser.close()
