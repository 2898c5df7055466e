"""What the tests of image, compose and Kubernetes share: docker on the command line, a built image,
one S3 server.

All containers of a test session are in one compose project, which is removed at its end.
"""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
TAG = "xrai:test"
PROJECT = "xrai-test"
BUCKETS = ("xrai-data", "xrai-runs")
DATASET = "s3://xrai-data/phantoms"  # of 120 phantoms, 32 pixels wide
RUN = "phantoms"
_CEPH = os.environ.get("XRAI_TEST_CEPH", "")  # a script that builds the image ceph-s3


def run(
    *command: str,
    timeout_s: float = 300,
    check: bool = True,
    cwd: Path = REPOSITORY,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; stdout and stderr come together. A failure shows its last lines."""
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("XRAI_", "AWS_"))
    }
    done = subprocess.run(
        command,
        env={**clean, "PWD": str(cwd), **environment},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert not check or done.returncode == 0, (
        f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}"
    )
    return done


def docker(
    *arguments: str, timeout_s: float = 300, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """`docker ARGUMENTS…` to its end."""
    return run("docker", *arguments, timeout_s=timeout_s, check=check)


def wait_until(
    found: Callable[[], Any], *, what: str | Callable[[], str], timeout_s: float = 180
) -> Any:
    """Ask until the answer is true, and return it; fail after the time, saying what was waited
    for.
    """
    deadline = time.monotonic() + timeout_s
    while not (answer := found()):
        assert time.monotonic() < deadline, (
            f"waited {timeout_s:.0f} s for {what() if callable(what) else what}"
        )
        time.sleep(0.5)
    return answer


def inspect(container: str) -> dict[str, Any]:
    """What the engine says of a container."""
    described: dict[str, Any] = json.loads(docker("inspect", container).stdout)[0]
    return described


def wait_for_exit(container: str, *, timeout_s: float = 240) -> int:
    """The exit status of a container, when it has ended."""
    state = wait_until(
        lambda: (state := inspect(container)["State"])["Status"] == "exited" and state,
        what=f"{container} to end",
        timeout_s=timeout_s,
    )
    status: int = state["ExitCode"]
    return status


def wait_for_line(container: str, pattern: str, *, timeout_s: float = 180) -> re.Match[str]:
    """The first match of a pattern in a container's log. Fails early where the container ends
    without it.
    """

    def search() -> re.Match[str] | None:
        ended = inspect(container)["State"]["Status"] == "exited"
        log = docker("logs", container).stdout
        found = re.search(pattern, log)
        assert found or not ended, f"{container} ended without /{pattern}/:\n{log[-4000:]}"
        return found

    match: re.Match[str] = wait_until(
        search, what=f"/{pattern}/ in the log of {container}", timeout_s=timeout_s
    )
    return match


@dataclass
class Stack:
    """The compose project of compose.yaml, with Ceph's S3 server in the place of SeaweedFS."""

    folder: Path  # for configs
    settings: dict[str, str] = field(default_factory=dict)
    network: str = f"{PROJECT}_default"
    inside: str = "http://s3:7480"  # the S3 server, as containers on the network see it
    key: str = "xrai"
    secret: str = "xraixrai"
    endpoint: str = ""  # the S3 server, as this machine sees it

    def compose(
        self,
        *arguments: str,
        timeout_s: float = 300,
        check: bool = True,
        cwd: Path = REPOSITORY,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """`docker compose ARGUMENTS…` with the settings and these variables."""
        files = (
            f"--file={REPOSITORY}/compose.yaml",
            f"--file={REPOSITORY}/tests/e2e/compose.ceph.yaml",
        )
        defaults: dict[str, Any] = {
            "XRAI_IMAGE": TAG,
            "XRAI_S3_ENDPOINT": self.inside,
            "XRAI_S3_KEY": self.key,
            "XRAI_S3_SECRET": self.secret,
            "XRAI_NUM_PHANTOMS": "120",
            "XRAI_TENSORBOARD_PORT": "0",
            "XRAI_DATASET": DATASET,
            "XRAI_NAME": RUN,
            "XRAI_CONFIG": str(self.config("small.yaml")),
        }
        return run(
            "docker",
            "compose",
            f"--project-name={PROJECT}",
            "--ansi=never",
            "--progress=plain",
            *files,
            *arguments,
            timeout_s=timeout_s,
            check=check,
            cwd=cwd,
            **{**defaults, **environment},
        )

    def up(self, *services: str, timeout_s: float = 400, **environment: str) -> str:
        """`docker compose up SERVICES…` to the end of all of them; what they printed."""
        variables: dict[str, Any] = dict(environment)
        return self.compose("up", "--no-build", *services, timeout_s=timeout_s, **variables).stdout

    def once(
        self,
        service: str,
        *arguments: str,
        options: Sequence[str] = (),
        check: bool = True,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """`docker compose run --rm SERVICE ARGUMENTS…` to its end, without the services that it
        depends on.
        """
        command = ["run", "--rm", "-T", "--no-deps", *options, service, *arguments]
        variables: dict[str, Any] = dict(environment)
        return self.compose(*command, check=check, **variables)

    def config(
        self, name: str, *, epochs: int = 2, batch: int = 16, width: int = 8, every: int = 0
    ) -> Path:
        """A config file for a small training. Written in place, so that a container that has it
        mounted sees it.
        """
        path = self.folder / name
        path.write_text(
            f"images: {{size: 32}}\nsplits: {{val_fraction: 0.2}}\nmodel: {{width: {width}}}\n"
            f"train: {{epochs: {epochs}, global_batch_size: {batch}, "
            'precision: "off", threads: 1}\n'
            f"checkpoint: {{every: {every}}}\nevaluate: {{num_bootstrap: 50}}\n"
        )
        path.chmod(0o644)
        return path

    def client(self) -> Any:
        """A boto3 client of the S3 server."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
        )

    def keys(self, prefix: str, *, bucket: str = "xrai-runs") -> set[str]:
        """The keys below a prefix, without it."""
        pages = (
            self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        )
        return {
            entry["Key"].removeprefix(prefix)
            for page in pages
            for entry in page.get("Contents", [])
        }

    def read(self, key: str, *, bucket: str = "xrai-runs") -> bytes:
        """The bytes of an object."""
        content: bytes = self.client().get_object(Bucket=bucket, Key=key)["Body"].read()
        return content

    def new_bucket(self, name: str) -> str:
        """Make a bucket; its name."""
        self.client().create_bucket(Bucket=name)
        return name

    def start(self) -> None:
        """Start the S3 server and make the buckets. Its cluster now and then fails to begin:
        tried again.
        """
        if _CEPH:
            run(_CEPH, timeout_s=900)
        for attempt in range(6):
            began = self.compose("up", "--detach", "--wait", "--no-build", "s3", check=False)
            if began.returncode == 0:
                break
            assert attempt < 5, began.stdout + self.compose("logs", "s3").stdout
            self.compose("rm", "--force", "--stop", "s3")
        self.endpoint = f"http://{self.compose('port', 's3', '7480').stdout.strip()}"
        for bucket in BUCKETS:
            self.new_bucket(bucket)

    def remove(self) -> None:
        """Remove the project's containers, network and volumes."""
        self.compose(
            "--profile=*", "down", "--volumes", "--remove-orphans", "--timeout=2", check=False
        )


def build_image(tag: str, *options: str) -> None:
    """Build docker/Dockerfile."""
    run(
        "docker",
        "build",
        "--file=docker/Dockerfile",
        f"--tag={tag}",
        "--progress=plain",
        *options,
        ".",
        timeout_s=1200,
        DOCKER_BUILDKIT="1",
    )
