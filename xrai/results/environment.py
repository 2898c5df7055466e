"""What a machine and its software are, for environment.json."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import xrai
from xrai import files

SCHEMA_VERSION = 1
_PACKAGES = (
    "torch",
    "numpy",
    "h5py",
    "pillow",
    "scikit-learn",
    "matplotlib",
    "tensorboard",
    "boto3",
    "pydicom",
)


def describe_environment() -> dict[str, Any]:
    """What this machine and its software are, for environment.json; no names of people, hosts or
    keys.
    """
    versions = {"xrai": xrai.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "schema_version": SCHEMA_VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "num_cores": files.num_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "packages": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()
