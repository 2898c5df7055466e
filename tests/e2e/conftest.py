"""Image and S3 server of the container tests: built and started once a session, removed at its
end.
"""

import ssl
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.containers import DATASET, RUN, TAG, Stack, build_image


@pytest.fixture(scope="session")
def secret_marker() -> str:
    """A word that stands in the build's secret, and nowhere else."""
    return f"marker-{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def image(secret_marker: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tag of the image, built from this working tree, with this machine's CA bundle as the
    build's secret.
    """
    bundle = Path(ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt")
    secret = tmp_path_factory.mktemp("secret") / "ca.pem"
    secret.write_text(f"{secret_marker}\n{bundle.read_text()}" if bundle.is_file() else "")
    build_image(TAG, f"--secret=id=ca,src={secret}", "--build-arg=REVISION=0123456")
    return TAG


@pytest.fixture(scope="session")
def s3(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The compose project with a running S3 server and two buckets."""
    folder = tmp_path_factory.mktemp("compose")
    folder.chmod(0o755)
    stack = Stack(folder)
    stack.remove()  # what an earlier session may have left
    try:
        stack.start()
        yield stack
    finally:
        stack.remove()


@pytest.fixture(scope="session")
def trained(s3: Stack) -> str:
    """What `up preprocess train` on phantoms prints; it leaves the data set and the run in the
    buckets.
    """
    return s3.up("preprocess", "train", XRAI_NAME=RUN, XRAI_DATASET=DATASET)
