"""What the image's build keeps and brings, as far as it shows without a Docker Engine."""

import os
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
DOCKERFILE = (REPOSITORY / "docker/Dockerfile").read_text()
COMPILED = {"torch/include/torch/extension.h", "triton/backends/nvidia/driver.c"}


@pytest.mark.parametrize("timm", ["", "1"])
def test_what_a_compiler_reads_is_kept_where_there_is_one(timm: str, tmp_path: Path) -> None:
    packages = tmp_path / "lib/python3.11/site-packages"
    gone = {"numpy/random/bit.h", "torch/share/ATen.cmake", "h5py/tests/test_file.py", "yaml/a.pyi"}
    for name in {*COMPILED, *gone, "torch/__init__.py"}:
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).touch()
    (packages / "botocore/data/s3").mkdir(parents=True)
    environment = {**os.environ, "COMPILES": timm}
    subprocess.run([REPOSITORY / "docker/slim", tmp_path], env=environment, check=True)
    found = {str(path.relative_to(packages)) for path in packages.rglob("*") if path.is_file()}
    kept = {name for name in found if "__pycache__" not in name}
    assert kept == {"torch/__init__.py", *(COMPILED if timm else ())}


@pytest.mark.parametrize("timm", ["", "1"])
def test_a_compiler_is_installed_with_timm_alone(timm: str, tmp_path: Path) -> None:
    *_, last = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    (run,) = re.findall(r"^RUN (.*)", last.replace("\\\n", ""), flags=re.MULTILINE)
    said = tmp_path / "said"
    for name in ("apt-get", "rm"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{said}\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": str(tmp_path), "TIMM": timm}
    subprocess.run(["/bin/sh", "-c", run], env=environment, check=True)
    lines = said.read_text().splitlines() if said.exists() else []
    assert any(line.endswith(" g++") for line in lines) == bool(timm) == bool(lines)
    assert re.search(r"^ARG TIMM=$", last, flags=re.MULTILINE)
    assert "COMPILES=$TIMM /build/slim /opt/venv" in DOCKERFILE
