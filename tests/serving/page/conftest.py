"""A server with a tiny model, and a headless Chromium that opens its page."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import uvicorn
from playwright.sync_api import Browser, FilePayload, Page, expect

from tests.browsers import open_chromium
from tests.models import save_run
from tests.serving.conftest import LIMITS, add_summary, make_service
from xrai.serving.http import make_app
from xrai.serving.page import page_routes
from xrai.serving.service import Service

TIMEOUT_MS = 30_000  # only a hang reaches it: the machine may be busy
expect.set_options(timeout=TIMEOUT_MS)


Film = dict[str, object]  # as the server says it


def like(**options: object) -> pytest.MarkDecorator:
    """The options of Playwright's `Browser.new_context` for the `ward` of a test."""
    return pytest.mark.parametrize("ward", [options], indirect=True, ids=[""])


@dataclass(frozen=True)
class Ward:
    """A page that is open, and what its console must not say."""

    page: Page
    url: str

    def send(self, name: str, data: bytes) -> None:
        """Send a film to the server, as another program would."""
        file: FilePayload = {"name": name, "mimeType": "application/octet-stream", "buffer": data}
        answer = self.page.request.post(f"{self.url}/v1/films", multipart={"file": file})
        assert answer.ok, answer.text()

    def films(self) -> list[Film]:
        """The list as the server has it."""
        found: list[Film] = self.page.request.get(f"{self.url}/v1/films").json()["films"]
        return found

    def open(self, address: str = "/") -> None:
        """Open the page, until its list is there."""
        self.page.goto(self.url + address)
        self.page.wait_for_selector("#empty:visible, #rows:visible, #none:visible")

    def names(self) -> list[str]:
        """The films of the list as the page shows them."""
        return self.page.locator(".row .name").all_inner_texts()


# Of a module, not the session: until it stops, Playwright's event loop runs in the tests' thread
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server whose model has a summary, in a thread."""
    run = save_run(tmp_path_factory.mktemp("page"))
    add_summary(run)
    with serve(make_service(run)) as address:
        yield address


@contextmanager
def serve(service: Service, *, token: str = "") -> Iterator[str]:
    """The address of a server with this service, for the block."""
    app = make_app(service, token=token, limits=LIMITS, pages=page_routes())
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=[[listening]])
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def ward(browser: Browser, server: str, request: pytest.FixtureRequest) -> Iterator[Ward]:
    """The page of a server without films; `like` says what the browser is like.

    A message of the console fails the test: a script's error, or what the page's policy refused.
    """
    usual = {"viewport": {"width": 1280, "height": 800}, "locale": "en-GB"}
    context = browser.new_context(**(usual | getattr(request, "param", {})))
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    said: list[str] = []
    page.on(
        "console",
        lambda message: said.append(message.text) if message.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: said.append(str(error)))
    for film in json.loads(page.request.get(f"{server}/v1/films").text())["films"]:
        page.request.delete(f"{server}/v1/films/{film['id']}")
    yield Ward(page, server)
    context.close()
    # statuses are what some tests are about; the tests read the canvas, the page does not
    usual_words = ("status of", "willReadFrequently")
    assert [text for text in said if not any(words in text for words in usual_words)] == []
