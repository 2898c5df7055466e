"""What this machine and its software are, for environment.json."""

import importlib.metadata
import os
import platform
from contextlib import suppress
from pathlib import Path

import xrai
from xrai.files import num_cores

_PACKAGES = "torch numpy h5py pillow scikit-learn matplotlib tensorboard boto3 pydicom"


def describe_environment() -> dict[str, object]:
    """Software, processor and memory; no names of people or hosts, no keys."""
    versions = {"xrai": xrai.__version__}
    for package in _PACKAGES.split():
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    lines: list[str] = []
    with suppress(OSError):  # only Linux has it, and a sandbox may hide it
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "schema_version": 1,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": models[0] if models else platform.processor(),
        "num_cores": num_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "packages": versions,
    }
