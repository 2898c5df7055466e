"""Tests that need what is not there skip and say so, and fail where it was asked for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ci  # each starts a pytest of its own

NEEDY_TESTS = """
import os
import pytest

def test_of_images(real_images):
    assert (real_images / "train").is_dir()

@pytest.mark.containers
def test_of_images_of_the_other_kind():
    pass

@pytest.mark.gpu
def test_of_gpus():
    pass

def test_of_buckets(s3_server):
    assert os.environ["AWS_ENDPOINT_URL_S3"] == s3_server

def test_of_nothing():
    assert "AWS_PROFILE" not in os.environ and "XRAI_DATASET" not in os.environ
"""


def run_pytest(repository: Path, folder: Path, *options: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("XRAI_")}
    clean |= {"AWS_PROFILE": "someone", "XRAI_DATASET": "s3://someones/data", **environment}
    (folder / "tests").mkdir()
    shutil.copy(repository / "pyproject.toml", folder)
    shutil.copy(repository / "tests" / "conftest.py", folder / "tests")
    (folder / "tests" / "test_needs.py").write_text(NEEDY_TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    return subprocess.run(
        command, cwd=folder, env=clean, capture_output=True, text=True, timeout=60, check=False
    ).stdout


def test_what_is_missing_is_skipped_with_its_reason(repository: Path, tmp_path: Path) -> None:
    output = run_pytest(repository, tmp_path)
    assert "1 passed, 4 skipped" in output
    assert "XRAI_TEST_DATA names the folder that holds chest_xray/" in output
    assert "XRAI_TEST_S3_ENDPOINT names one" in output
    assert "XRAI_TEST_CONTAINERS=1 asks for them" in output
    assert "XRAI_TEST_GPU=1 asks for tests on a CUDA device" in output


def test_images_that_were_asked_for_must_be_there(repository: Path, tmp_path: Path) -> None:
    output = run_pytest(repository, tmp_path, XRAI_TEST_DATA=str(tmp_path))
    assert "1 passed, 3 skipped, 1 error" in output or "1 failed, 1 passed, 3 skipped" in output
    assert f"XRAI_TEST_DATA is {tmp_path}, which holds no chest_xray/" in output


def test_real_images_are_found_where_the_variable_says(repository: Path, tmp_path: Path) -> None:
    for name in ("chest_xray", "chest_xray_originals"):
        (tmp_path / "images" / name / "train").mkdir(parents=True)
    output = run_pytest(
        repository, tmp_path, "-k", "of_images", XRAI_TEST_DATA=str(tmp_path / "images")
    )
    assert "1 passed, 1 skipped" in output


def test_an_s3_server_that_was_named_is_used_with_its_credentials(
    repository: Path, tmp_path: Path
) -> None:
    output = run_pytest(
        repository, tmp_path, "-k", "buckets", XRAI_TEST_S3_ENDPOINT="http://127.0.0.1:7480"
    )
    assert "1 passed" in output


@pytest.mark.parametrize(
    ("mark", "num_chosen"), [("data", 1), ("s3", 1), ("not data and not s3 and not containers", 2)]
)
def test_a_test_has_the_mark_of_the_fixture_it_uses(
    repository: Path, tmp_path: Path, mark: str, num_chosen: int
) -> None:
    output = run_pytest(repository, tmp_path, "--collect-only", "-q", "-m", mark)
    assert f"{num_chosen}/5 tests collected" in output
