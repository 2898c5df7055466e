"""Imports go one way, and each heavy package has one home.

The contracts of import-linter in pyproject.toml hold the layers. It sees external packages as
wholes, so the home of torch.distributed is held here, by reading the source; what is imported only
when needed is seen by importing it all.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOMS = ("dataset", "ingest", "learning", "phantom", "results")


def lint_imports(folder: Path, config: Path) -> subprocess.CompletedProcess[str]:
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", command, "--config", str(config), "--no-cache", "--no-logo"],
        cwd=folder,  # where the linter looks for the package first
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def write_package(folder: Path, changes: dict[str, str]) -> None:
    modules = [
        "preprocess",
        "train",
        "store.s3",
        "command",
        "config",
        "errors",
        "files",
        "log",
        "labels",
        "tables",
        "workers",
    ]
    modules += [
        "ingest.images",
        "dataset.shards",
        "learning.loop",
        "results.metrics",
        "results.plots",
        "results.report",
    ]
    for module in modules:
        path = folder / "xrai" / f"{module.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(changes.get(module, ""))
    for package in ("", "store", *ROOMS):
        (folder / "xrai" / package).mkdir(exist_ok=True)
        (folder / "xrai" / package / "__init__.py").write_text("")


def test_the_layers_of_the_package_hold(repository: Path) -> None:
    done = lint_imports(repository, repository / "pyproject.toml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_package_that_keeps_the_rules_passes(repository: Path, tmp_path: Path) -> None:
    rules_kept = {
        "train": "from xrai import learning, results, store\nimport xrai.learning.loop",
        "preprocess": "from xrai.dataset import shards",
        "dataset.shards": "import h5py\nfrom xrai.store import *",
        "learning.loop": "import torch\nfrom xrai import config",
        "results.plots": "import matplotlib.pyplot",
        "store.s3": "def connect():\n    import boto3.session\n"
        "    from botocore.config import Config",
    }
    write_package(tmp_path, rules_kept)
    done = lint_imports(tmp_path, repository / "pyproject.toml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("learning.loop", "from xrai import train", "Imports go one way"),
        ("learning.loop", "from xrai.ingest import images", "Imports go one way"),
        ("ingest.images", "import xrai.results.plots", "Imports go one way"),
        ("store.s3", "from xrai.dataset import shards", "Imports go one way"),
        ("errors", "import xrai.store", "Imports go one way"),
        ("train", "import xrai.preprocess", "Imports go one way"),
        ("ingest.images", "def fetch():\n    import boto3", "boto3 is at home"),
        ("preprocess", "from botocore.exceptions import ClientError", "boto3 is at home"),
        ("ingest.images", "import h5py", "h5py is at home"),
        ("train", "from matplotlib import pyplot", "matplotlib is at home"),
        ("ingest.images", "import torch.nn.functional as F", "need no torch"),
        ("preprocess", "from xrai.learning import loop", "need no torch"),
    ],
)
def test_a_broken_layer_is_found(
    repository: Path, tmp_path: Path, module: str, source: str, broken: str
) -> None:
    write_package(tmp_path, {"learning.loop": "import torch", module: source})
    done = lint_imports(tmp_path, repository / "pyproject.toml")
    assert done.returncode == 1, done.stdout + done.stderr
    assert any(
        broken in line and line.rstrip().endswith("BROKEN") for line in done.stdout.splitlines()
    ), done.stdout


def uses_of_torch_distributed(source: str) -> list[int]:
    """Lines that import or reach torch.distributed, or the wrappers of torch.nn.parallel that
    work through it.
    """
    homes = ("torch.distributed", "torch.nn.parallel")

    def is_one(name: str) -> bool:
        return any(name == home or name.startswith(f"{home}.") for home in homes)

    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = any(is_one(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found = any(
                is_one(name)
                for name in (node.module or "", *(f"{node.module}.{a.name}" for a in node.names))
            )
        elif isinstance(node, ast.Attribute):
            name, value = (
                f"torch.{text}" if (text := ast.unparse(n)).startswith("nn.") else text
                for n in (node, node.value)
            )
            found = is_one(name) and not is_one(value)
        else:
            found = False
        if found:
            lines.append(node.lineno)  # type: ignore[attr-defined]
    return lines


def test_torch_distributed_is_at_home_in_one_module(repository: Path) -> None:
    found = {
        path.relative_to(repository).as_posix(): lines
        for path in sorted((repository / "xrai").rglob("*.py"))
        if (lines := uses_of_torch_distributed(path.read_text(encoding="utf-8")))
    }
    assert found.keys() <= {"xrai/learning/distributed.py"}, found


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "import torch.distributed.elastic.multiprocessing.errors",
        "from torch import distributed",
        "from torch.distributed import all_reduce",
        "from torch.nn.parallel import DistributedDataParallel",
        "import torch\ntorch.distributed.barrier()",
        "def f():\n    import torch\n    return torch.nn.parallel.DistributedDataParallel",
        "from torch import nn\nnn.parallel.DistributedDataParallel(nn.Linear(1, 1))",
    ],
)
def test_a_use_of_torch_distributed_is_found(source: str) -> None:
    assert len(uses_of_torch_distributed(source)) == 1


def test_a_module_of_ours_with_that_name_is_not_taken_for_it() -> None:
    assert not uses_of_torch_distributed(
        "from xrai.learning import distributed\nimport torch\ntorch.nn.Linear(1, 1)"
    )


def loaded_after(imports: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after these statements."""
    script = (
        f"{imports}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["xrai.preprocess", "xrai.ingest.build"])  # and its workers
def test_preprocessing_loads_no_package_that_it_does_not_use(module: str) -> None:
    loaded = loaded_after(f"import {module}")
    assert "numpy" in loaded
    heavy = {"torch", "boto3", "botocore", "sklearn", "scipy", "matplotlib", "tensorboard"}
    assert not loaded & {*heavy, "pydicom", "gdcm"}


def test_training_loads_what_draws_when_it_draws_which_is_on_rank_0_alone() -> None:
    loaded = loaded_after("import xrai.train")
    assert "torch" in loaded
    assert not loaded & {"sklearn", "scipy", "matplotlib", "jinja2", "tensorboard", "boto3"}


def test_every_module_can_be_loaded_where_boto3_cannot(repository: Path) -> None:
    files = sorted((repository / "xrai").rglob("*.py"))
    modules = [".".join(path.relative_to(repository).with_suffix("").parts) for path in files]
    # None makes an import fail; TensorBoard tries boto3 by itself, and goes on without it
    refused = "import sys\nsys.modules['boto3'] = sys.modules['botocore'] = None"
    imports = [f"import {name.removesuffix('.__init__')}" for name in modules]
    assert "xrai" in loaded_after("\n".join([refused, *imports]))
