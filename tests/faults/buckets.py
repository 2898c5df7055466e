"""Servers and buckets for tests, and the environment that leads to them."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import boto3.session
import pytest


def _environment(url: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL_S3": url,
        "AWS_ACCESS_KEY_ID": os.environ.get("XRAI_TEST_S3_KEY", "xrai"),
        "AWS_SECRET_ACCESS_KEY": os.environ.get("XRAI_TEST_S3_SECRET", "xraixrai"),
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Let s3:// addresses of this test lead to the server at `url`."""
    for name, value in _environment(url).items():
        monkeypatch.setenv(name, value)


@contextmanager
def moto_server() -> Iterator[str]:
    """The address of an S3 server in this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@contextmanager
def new_bucket(url: str) -> Iterator[str]:
    """The name of an empty bucket of the server at `url`; it is removed with all it holds."""
    environment = _environment(url)
    client = boto3.session.Session(
        environment["AWS_ACCESS_KEY_ID"],
        environment["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    ).client("s3", endpoint_url=url)
    name = f"xrai-test-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    try:
        yield name
    finally:
        for upload in client.list_multipart_uploads(Bucket=name).get("Uploads", []):
            client.abort_multipart_upload(
                Bucket=name, Key=upload["Key"], UploadId=upload["UploadId"]
            )
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
            for entry in page.get("Contents", []):
                client.delete_object(Bucket=name, Key=entry["Key"])
        client.delete_bucket(Bucket=name)
        client.close()
