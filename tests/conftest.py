"""What all tests share: which tests need what is not always there, where that is found, and a clean
environment.

A test that needs the real images, an S3 server, a Docker Engine or a CUDA device is marked so and
skips, with the reason, where there is none. Naming one by its variable asks for it: then its
absence is a failure, not a skip.
"""

import functools
import gc
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.training import Finished
    from xrai.store import Store

REPOSITORY = Path(__file__).resolve().parent.parent

# On a machine with a GPU, too, tests run on the CPU, except those that are asked for on a GPU.
# torch and cuBLAS read these when they are loaded
if os.environ.get("XRAI_TEST_GPU"):
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same sums each time
    # To ask for devices then does not begin CUDA, which a process that is forked could not use
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Tests run beside others, and threads that wait for work spin; torch reads this when it is loaded
os.environ.setdefault("OMP_NUM_THREADS", "1")

LONGEST = (
    "test_training_faults.py",
    "test_preprocess_s3.py",
    "test_world_size.py",
    "test_loop.py",
    "test_train.py",
    "test_artifact_store.py",
    "test_several_outputs.py",
    "test_plots.py",
    "test_export.py",
    "test_preprocess_faults.py",
    "test_s3_faults.py",
    "test_lease.py",
    "test_preprocess.py",
    "test_typicality.py",
)
FIXTURE_MARKS = {
    "real_images": "data",
    "real_originals": "data",
    "s3_server": "s3",
}  # a user of one has the mark

# How many examples an invariant is tried with, where a test does not say; the machine may be busy
hypothesis.settings.register_profile("dev", max_examples=20, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=100, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


class NotHereError(Exception):
    """What a mark needs is not on this machine."""


def _find_real_data() -> Path:
    if not (folder := Path(os.environ.get("XRAI_TEST_DATA", ""))).name:
        raise NotHereError(
            "no real images: XRAI_TEST_DATA names the folder that holds chest_xray/ and "
            "chest_xray_originals/"
        )
    for name in ("chest_xray", "chest_xray_originals"):
        if not (folder / name).is_dir():
            raise NotHereError(
                f"XRAI_TEST_DATA is {folder}, which holds no {name}/; it names the folder of the "
                "real images"
            )
    return folder.resolve()


def _find_s3() -> str:
    if endpoint := os.environ.get("XRAI_TEST_S3_ENDPOINT"):
        return endpoint
    raise NotHereError(
        "no S3 server: XRAI_TEST_S3_ENDPOINT names one (and XRAI_TEST_S3_KEY, XRAI_TEST_S3_SECRET)"
    )


def _find_docker() -> None:
    if not os.environ.get("XRAI_TEST_CONTAINERS"):
        raise NotHereError(
            "container tests build images and take minutes: XRAI_TEST_CONTAINERS=1 asks for them"
        )
    try:
        done = subprocess.run(
            ["docker", "info"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotHereError(f"no Docker Engine: {error}") from error
    if done.returncode != 0:
        raise NotHereError(f"no Docker Engine: {done.stderr.strip() or done.returncode}")


def _find_gpu() -> None:
    if not os.environ.get("XRAI_TEST_GPU"):
        raise NotHereError("XRAI_TEST_GPU=1 asks for tests on a CUDA device")
    import torch

    if not torch.cuda.is_available():
        raise NotHereError("no CUDA device")


FINDERS = {"data": _find_real_data, "s3": _find_s3, "containers": _find_docker, "gpu": _find_gpu}
ASKED_BY = {
    "data": "XRAI_TEST_DATA",
    "s3": "XRAI_TEST_S3_ENDPOINT",
    "containers": "XRAI_TEST_CONTAINERS",
    "gpu": "XRAI_TEST_GPU",
}


@functools.cache
def _why_not(mark: str) -> str | None:
    try:
        FINDERS[mark]()
    except NotHereError as error:
        return str(error)
    return None


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in FIXTURE_MARKS:
                item.add_marker(FIXTURE_MARKS[fixture])
        if item.get_closest_marker("browser"):
            item.add_marker("ci")  # minutes on two cores
    # each file is one worker's: the longest first, so that none is left for the end
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Loads all tests without collecting garbage. What is loaded then stays, and later collections
    pass over it: figures ask for full ones.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in FINDERS:
        if item.get_closest_marker(mark) and (reason := _why_not(mark)):
            if os.environ.get(ASKED_BY.get(mark, "")):
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def _clean_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No test sees the addresses, credentials, cache or keys of the person who runs it."""
    for name in list(os.environ):
        if name.startswith("AWS_") or (
            name.startswith("XRAI_") and not name.startswith("XRAI_TEST_")
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "config"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_images() -> Path:
    """The public training images at 224 x 224 pixels: a folder with train/{NORMAL,PNEUMONIA}.
    Read only.
    """
    return _find_real_data() / "chest_xray"


@pytest.fixture(scope="session")
def real_originals() -> Path:
    """300 of the same images as published, up to 2,900 pixels wide: train/{NORMAL,PNEUMONIA}.
    Read only.
    """
    return _find_real_data() / "chest_xray_originals"


@pytest.fixture
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a real S3 server, for which the AWS environment is set in this test."""
    endpoint = _find_s3()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", os.environ.get("XRAI_TEST_S3_KEY", "xrai"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", os.environ.get("XRAI_TEST_S3_SECRET", "xraixrai"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield endpoint


@pytest.fixture
def s3_bucket(s3_server: str) -> Iterator[str]:
    """The name of a fresh bucket on that server; it is removed with all it holds."""
    from tests.faults.buckets import new_bucket

    with new_bucket(s3_server) as name:
        yield name


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> "Finished":
    """A run of two epochs on phantoms, trained once for the whole session. Read only."""
    from tests.training import finished_run

    return finished_run(tmp_path_factory, num_ranks=1)


@pytest.fixture(scope="session")
def finished_by_two(tmp_path_factory: pytest.TempPathFactory) -> "Finished":
    """The same, trained by two processes."""
    from tests.training import finished_run

    return finished_run(tmp_path_factory, num_ranks=2)


@pytest.fixture(scope="module")
def moto() -> Iterator[tuple[str, str]]:
    """The address of an S3 in this process, and a bucket there."""
    from tests.faults.buckets import moto_server, new_bucket

    with moto_server() as url, new_bucket(url) as name:
        yield url, name


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[str, str]]:
    """The address of a real S3, and a bucket there."""
    from tests.faults.buckets import new_bucket

    url = os.environ["XRAI_TEST_S3_ENDPOINT"]
    with new_bucket(url) as name:
        yield url, name


@pytest.fixture(params=["folder", "moto", pytest.param("real", marks=pytest.mark.s3)])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> "Store":
    """An empty store of each kind."""
    from tests.faults.buckets import use_endpoint
    from xrai.store import open_store

    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    url, bucket = request.getfixturevalue(request.param)
    use_endpoint(monkeypatch, url)
    return open_store(f"s3://{bucket}/some/{uuid.uuid4().hex[:8]}", retry_s=5)
