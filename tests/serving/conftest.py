"""A server in this process, with a model that was trained in memory for seconds."""

import functools
import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.models import save_run
from xrai.learning.predictor import MODEL_FILE
from xrai.results.folder import SUMMARY
from xrai.serving.films import Worklist
from xrai.serving.http import Limits, make_app
from xrai.serving.models import Models, load_models
from xrai.serving.service import Service

_SUMMARY = Path(__file__).parents[1] / "results/stored/summary.json"
LIMITS = Limits(
    max_body_bytes=1 << 24, max_bytes_under_way=1 << 25, max_requests=8, max_requests_per_client=4
)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that tells phantoms with pneumonia from others."""
    return save_run(tmp_path_factory.mktemp("served"))


def add_summary(run: Path) -> dict[str, Any]:
    """Have a run state the results of a stored summary.json; returns that."""
    summary: dict[str, Any] = json.loads(_SUMMARY.read_bytes())
    model = (run / MODEL_FILE).read_bytes()
    summary["files"] = {MODEL_FILE: hashlib.sha256(model).hexdigest()}
    (run / SUMMARY).write_text(json.dumps(summary))
    return summary


def make_service(
    run: Path, *, max_films: int = 100, max_bytes: int = 1 << 26, lifetime_s: float = 3600
) -> Service:
    """What the routes of a server share."""
    worklist = Worklist(max_films=max_films, max_bytes=max_bytes, lifetime_s=lifetime_s)
    models = _models_of(run, *_state_of(run))
    return Service(models, (str(run),), load_models, worklist, num_threads=1)


def _state_of(run: Path) -> tuple[int, ...]:
    files = (run / MODEL_FILE, run / SUMMARY)
    return tuple(file.stat().st_mtime_ns for file in files if file.exists())


@functools.lru_cache(maxsize=4)
def _models_of(run: Path, *state: int) -> Models:
    """Models that services share: to load and trace them takes 0.2 s."""
    return load_models([str(run)])


def make_client(service: Service, *, token: str = "", limits: Limits = LIMITS) -> TestClient:
    """A client of a server with this service, which ends with the client's block."""
    app = make_app(service, token=token, limits=limits)
    return TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)


@pytest.fixture
def service(run: Path) -> Service:
    """A service without films."""
    return make_service(run)


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    """A client of a server that has no film yet and asks for no token."""
    with make_client(service) as client:
        yield client


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private certificate authority, ca.pem, and what it signed: server.pem for localhost alone,
    and client.pem, each with NAME.key.
    """
    folder = tmp_path_factory.mktemp("authority")
    new = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]

    def make(name: str, *options: str) -> None:
        files = ["-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.pem"]
        command = [*new, "-x509", "-days", "2", "-subj", f"/CN={name}", *files, *options]
        subprocess.run(command, check=True, capture_output=True)

    make("ca")
    signed = ["-CA", f"{folder}/ca.pem", "-CAkey", f"{folder}/ca.key"]
    signed += ["-addext", "basicConstraints=critical,CA:FALSE"]
    make("server", *signed, "-addext", "subjectAltName=DNS:localhost")
    make("client", *signed)
    return folder
