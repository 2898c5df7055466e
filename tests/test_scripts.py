"""The two commands of a fresh clone refuse what cannot work, in one line, before they change
anything.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


@pytest.fixture
def clone(repository: Path, tmp_path: Path) -> Path:
    """What scripts/ need of a clone, without its .venv."""
    folder = tmp_path / "clone of xrai"
    shutil.copytree(repository / "scripts", folder / "scripts")
    for file in [*repository.glob("requirements*"), repository / "pyproject.toml"]:
        shutil.copy(file, folder)
    return folder


def fake_python(folder: Path, *, version: str, has_venv: bool = True) -> Path:
    """A `python3` of another version; it knows only what scripts/install asks."""
    path = folder / "bin" / "python3"
    path.parent.mkdir()
    too_old = tuple(map(int, version.split("."))) < (3, 11)
    path.write_text(
        '#!/bin/sh\ncase "$2" in\n'
        f"*print*) echo {version} ;;\n"
        f"*version_info*) exit {int(too_old)} ;;\n"
        f"*ensurepip*) exit {int(not has_venv)} ;;\n"
        '*) echo "unexpected: $*" >&2; exit 99 ;;\nesac\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def run(
    command: list[str | Path], *, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), **environment}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("script", ["scripts/quickstart", "scripts/test", "scripts/check"])
def test_an_older_python_is_refused(clone: Path, tmp_path: Path, script: str) -> None:
    python = fake_python(tmp_path, version="3.10")
    done = run([clone / script], cwd=tmp_path, PYTHON=str(python))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"install: PYTHON={python} is Python 3.10; xrai needs 3.11 or newer"
    ]
    assert not (clone / ".venv").exists()


def test_the_environment_that_a_link_leads_to_is_not_emptied(clone: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "bin").mkdir(parents=True)
    (clone / ".venv").symlink_to(other)
    done = run([clone / "scripts/install", "--dev"], cwd=tmp_path, PYTHON=sys.executable)
    assert done.returncode == 2 and "is a link" in done.stderr
    assert (other / "bin").is_dir()


def test_a_python_without_venv_is_refused_with_the_package_to_install(
    clone: Path, tmp_path: Path
) -> None:
    python = fake_python(tmp_path, version="3.12", has_venv=False)
    done = run([clone / "scripts/test"], cwd=tmp_path, PYTHON=str(python))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.rstrip().endswith("sudo apt-get install python3.12-venv")
    assert not (clone / ".venv").exists()


def test_a_machine_without_any_new_enough_python_is_told_what_to_install(
    clone: Path, tmp_path: Path
) -> None:
    old = fake_python(tmp_path, version="3.9")
    for tool in ("bash", "dirname", "env", "sed", "grep"):
        (old.parent / tool).symlink_to(shutil.which(tool, path="/usr/bin:/bin") or tool)
    done = run([clone / "scripts/install"], cwd=tmp_path, PATH=str(old.parent))
    assert done.returncode == 2
    assert done.stderr.startswith("install: found Python 3.9, xrai needs Python 3.11 or newer;")
    assert len(done.stderr.splitlines()) == 1


def test_a_source_that_does_not_exist_is_refused_before_anything_is_installed(
    clone: Path, tmp_path: Path
) -> None:
    done = run([clone / "scripts/quickstart", "no/such.zip"], cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"quickstart: SOURCE {tmp_path}/no/such.zip does not exist;")
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("arguments", [["--fast"], ["one", "two"]])
def test_quickstart_refuses_what_is_not_a_source(
    clone: Path, tmp_path: Path, arguments: list[str]
) -> None:
    done = run([clone / "scripts/quickstart", *arguments], cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_quickstart_explains_itself(clone: Path, tmp_path: Path) -> None:
    done = run([clone / "scripts/quickstart", "--help"], cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("scripts/quickstart [SOURCE]:")
    assert "XRAI_RUN_ID" in done.stdout


def locked_names(path: Path) -> dict[str, list[str]]:
    """Package -> its locked versions."""
    names: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line[:1].isalpha():
            name, _, version = line.partition("==")
            names.setdefault(name, []).append(version.split()[0])
    return names


def test_all_locked_packages_have_hashes_and_the_two_locks_agree(repository: Path) -> None:
    runtime, dev = (
        locked_names(repository / name) for name in ("requirements.lock", "requirements-dev.lock")
    )
    assert runtime.items() <= dev.items()
    for name in ("requirements.lock", "requirements-dev.lock"):
        entries = (repository / name).read_text().split("\n\n")[-1].replace("\\\n", "").splitlines()
        unhashed = [
            entry for entry in entries if entry[:1].isalpha() and "--hash=sha256:" not in entry
        ]
        assert not unhashed


def test_the_lock_holds_every_dependency_but_torch(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dicom"]]
    names = {requirement.partition(">=")[0].partition("[")[0].lower() for requirement in wanted}
    assert names - locked_names(repository / "requirements.lock").keys() == {"torch"}
    names = {
        item.partition(">=")[0].partition("[")[0].lower()
        for item in project["optional-dependencies"]["dev"]
    }
    assert names <= locked_names(repository / "requirements-dev.lock").keys()


def test_scripts_are_executable_and_parse(repository: Path) -> None:
    for script in [*(repository / "scripts").iterdir(), repository / ".ci" / "run"]:
        assert os.access(script, os.X_OK), f"{script} is not executable"
        assert script.read_text().startswith("#!/usr/bin/env bash\n")
        subprocess.run(["bash", "-n", script], check=True, timeout=60)


def test_check_names_tests_that_are_there(repository: Path) -> None:
    script = (repository / "scripts/check").read_text()
    names = re.findall(r"tests/\S+\.py", script.partition("TESTS=(")[2].partition(")")[0])
    assert len(names) > 5
    assert [name for name in names if not (repository / name).exists()] == []


def test_quickstart_needs_no_host_name_that_resolves(repository: Path) -> None:
    """As `xrai train --nproc_per_node=2`, which tests/test_main.py starts without one."""
    script = (repository / "scripts/quickstart").read_text().replace("\\\n", " ")
    (launch,) = (line for line in script.splitlines() if "torchrun " in line and "exec" in line)
    assert "--local_addr=localhost" in launch.split()


def test_nothing_that_a_checkout_runs_needs_its_links(repository: Path) -> None:
    # git writes them as plain files on Windows
    links = [path.name for path in repository.iterdir() if path.is_symlink()]
    assert links == ["configs"]
    for name in ("compose.yaml", "scripts/quickstart"):
        text = (repository / name).read_text().replace("xrai/configs/", "")
        assert "configs/" not in text, name
