"""The container image: what it holds, what it does not, and whether it says that a job hangs."""

import json
import re
import subprocess
from functools import partial

import pytest

from tests.e2e.containers import build_image, docker, inspect, wait_until

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1500)]

MAX_OWN_SIZE = 1.15e9  # bytes above the base image, with the CPU build of torch
COMPILERS = "gcc g++ cc c++ clang tcc rustc go nvcc make cmake ninja ld as"


def inside(image: str, script: str, *options: str) -> str:
    """What a bash script prints in a container that may read all files."""
    return docker(
        "run", "--rm", "--user=0", "--network=none", *options, image, "bash", "-c", script
    ).stdout


def test_the_image_says_what_it_is_and_runs_as_a_numbered_user(image: str) -> None:
    (described,) = json.loads(docker("image", "inspect", image).stdout)
    config = described["Config"]
    assert config["User"] == "10001:10001"
    assert (
        config["Entrypoint"] == ["/usr/bin/tini", "--", "xrai"] and config["WorkingDir"] == "/work"
    )
    assert config["Healthcheck"]["Test"] == ["CMD", "xrai", "healthy"]
    labels = {
        name.removeprefix("org.opencontainers.image."): value
        for name, value in config["Labels"].items()
    }
    assert (
        labels["title"] == "xrai"
        and labels["licenses"] == "Apache-2.0"
        and labels["revision"] == "0123456"
    )
    assert labels["base.name"] == "python:3.11-slim-bookworm"


def test_there_is_no_compiler_in_it(image: str) -> None:
    assert inside(image, f"for name in {COMPILERS}; do command -v $name; done; true") == ""
    assert (
        inside(image, "command -v bash").strip() == "/usr/bin/bash"
    )  # the search finds what is there


def test_there_is_no_test_data_no_history_and_nothing_else_of_the_working_tree(image: str) -> None:
    found = inside(image, "cd /opt/xrai && find . -type f -not -name '*.pyc'").split()
    allowed = re.compile(
        r"\./(xrai/.*\.(py|typed|html|jinja|css|yaml|js|svg)|bin/xrai|LICENSE"
        r"|(wait_for_dataset|serve_tensorboard)\.py)"
    )
    assert found and not [name for name in found if not allowed.fullmatch(name)]
    packages = "/opt/venv/lib/python3.*/site-packages"
    left = inside(
        image,
        f"find {packages} -path '*/tests/*' -type f -not -path '*/torch/*' -not -path '*/numpy/*'",
    )
    assert left == ""
    pictures = " -o ".join(
        f"-iname '*.{suffix}'" for suffix in ("dcm", "jpg", "jpeg", "h5", "hdf5")
    )
    left = inside(
        image, f"find / -xdev \\( {pictures} \\) -type f -not -path '*/pydicom/data/palettes/*'"
    )
    assert left == ""


def test_no_secret_of_the_build_is_in_its_files_settings_or_history(
    image: str, secret_marker: str
) -> None:
    history = docker("history", "--no-trunc", "--format={{.CreatedBy}}", image).stdout
    settings = docker("image", "inspect", image).stdout
    assert "COPY" in history and secret_marker not in history + settings
    assert not re.search(r"(?i)(secret|password|token)[\w]*=\S", history + settings)
    with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as save:
        found = subprocess.run(
            ["grep", "--count", "--text", secret_marker],
            stdin=save.stdout,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
    assert save.returncode == 0 and found.stdout.strip() == "0"


def test_it_is_small(image: str) -> None:
    (own,) = json.loads(docker("image", "inspect", image).stdout)
    (base,) = json.loads(docker("image", "inspect", "python:3.11-slim-bookworm").stdout)
    if "+cpu" not in inside(image, "ls -d /opt/venv/lib/python3.*/site-packages/torch-*"):
        pytest.skip("this torch brings CUDA")
    assert own["Size"] - base["Size"] < MAX_OWN_SIZE


def test_the_same_tree_gives_the_same_layers(image: str) -> None:
    tag = "xrai:test-again"
    build_image(tag, "--no-cache-filter=code,tini", "--build-arg=REVISION=0123456")
    try:
        layers = [
            json.loads(docker("image", "inspect", name).stdout)[0]["RootFS"]["Layers"]
            for name in (image, tag)
        ]
        assert layers[0] == layers[1]
    finally:
        docker("image", "rm", tag)


def test_commands_answer_on_a_read_only_root(image: str) -> None:
    for word in ("preprocess", "train", "predict", "phantom"):
        done = docker("run", "--rm", "--read-only", "--tmpfs=/tmp", image, word, "--help")
        assert f"usage: xrai {word}" in done.stdout
        assert "Traceback" not in done.stdout and "Warning" not in done.stdout, done.stdout


def test_one_process_ends_with_its_own_status(image: str) -> None:
    done = docker("run", "--rm", "--tmpfs=/tmp", image, "train", "--train.epochs=none", check=False)
    assert done.returncode == 2 and "train.epochs" in done.stdout
    done = docker("run", "--rm", "--tmpfs=/tmp", image, "--help")
    assert "What a container runs" in done.stdout and "tensorboard" in done.stdout


def test_an_image_folder_becomes_a_trained_network_without_any_network(image: str) -> None:
    script = (
        "xrai phantom --num-images=60 --out=films && "
        "xrai preprocess --source=films --images.size=32 "
        "--splits.val_fraction=0.2 && "
        "xrai train --standalone --nproc_per_node=1 --train.epochs=1 --model.width=8 "
        "--train.global_batch_size=8 --run_id=own && ls submit/own && xrai verify"
    )
    said = docker(
        "run",
        "--rm",
        "--network=none",
        "--read-only",
        "--tmpfs=/tmp",
        "--tmpfs=/work:uid=10001,gid=10001",
        image,
        "bash",
        "-ec",
        script,
    ).stdout
    assert (
        "60 files found = 60 written" in said
        and "summary.json" in said
        and "is whole: 60 images" in said
    )


def has_health(container: str, status: str) -> bool:
    return bool(inspect(container)["State"]["Health"]["Status"] == status)


def test_a_job_that_no_longer_beats_is_unhealthy(image: str) -> None:
    container = docker(
        "run",
        "--detach",
        "--tmpfs=/tmp:mode=1777",
        "--env=XRAI_HEARTBEAT_MAX_AGE_S=8",
        "--health-interval=1s",
        "--health-retries=1",
        "--health-start-period=1s",
        image,
        "bash",
        "-c",
        "for _ in $(seq 5); do touch /tmp/heartbeat; sleep 1; done; sleep 600",
    ).stdout.strip()
    try:
        for status in ("healthy", "unhealthy"):
            wait_until(partial(has_health, container, status), what=f"it to be {status}")
    finally:
        docker("rm", "--force", container)


def test_waiting_for_a_data_set_ends_when_it_is_there_or_when_time_is_up(image: str) -> None:
    waiting = (
        "run",
        "--rm",
        "--tmpfs=/tmp",
        "--tmpfs=/work:uid=10001,gid=10001",
        "--env=XRAI_DATASET=d",
        "--env=XRAI_WAIT_S=3",
    )
    done = docker(*waiting, image, "wait", check=False)
    assert done.returncode == 1 and "waited 3 s (XRAI_WAIT_S)" in done.stdout
    script = "mkdir d; (sleep 2; touch d/dataset.json) & xrai wait && ls d"
    assert docker(*waiting, "--env=XRAI_WAIT_S=100", image, "bash", "-c", script).stdout.endswith(
        "dataset.json\n"
    )
    done = docker("run", "--rm", "--tmpfs=/tmp", image, "wait", check=False)
    assert done.returncode == 2 and "XRAI_DATASET is not set" in done.stdout
