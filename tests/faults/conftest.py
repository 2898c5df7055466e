"""A server, a bucket there and a proxy before it, for tests of faults."""

import os
import uuid
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from tests.faults.buckets import moto_server, new_bucket, use_endpoint
from tests.faults.proxy import Proxy


@pytest.fixture(scope="module", params=["moto", pytest.param("real", marks=pytest.mark.s3)])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """The address of a server and the name of a bucket there."""
    running = (
        moto_server()
        if request.param == "moto"
        else nullcontext(os.environ["XRAI_TEST_S3_ENDPOINT"])
    )
    with running as url, new_bucket(url) as name:
        yield url, name


@pytest.fixture
def proxy(server: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that lies on the way of all stores from now on."""
    with Proxy(server[0]) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        yield proxy


@pytest.fixture
def uri(server: tuple[str, str]) -> str:
    """An address that no other test has."""
    return f"s3://{server[1]}/{uuid.uuid4().hex[:8]}"
