"""The workflows parse, name scripts that exist, and a release needs tag, version and changelog to
agree.
"""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import xrai

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))


def read(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)  # `on` stays a word


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_triggers_least_rights_and_limits(path: Path) -> None:
    workflow = read(path)
    assert workflow["on"] and workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        for needed in [job.get("needs", [])]:
            assert set([needed] if isinstance(needed, str) else needed) <= set(workflow["jobs"])
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file()
            continue
        assert job["runs-on"] == "ubuntu-latest" and int(job["timeout-minutes"]) <= 60, name
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"]), step
            for script in re.findall(r"scripts/[\w-]+", step.get("run", "")):
                assert (ROOT / script).is_file(), script


def test_checks_run_on_every_python_that_the_package_supports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    job = read(GITHUB / "workflows/checks.yml")["jobs"]["test"]
    pythons = job["strategy"]["matrix"]["python"]
    assert pythons == ["3.11", "3.12", "3.13", "3.14"]
    assert project["requires-python"] == f">={pythons[0]}"
    for python in pythons:
        assert f"Programming Language :: Python :: {python}" in project["classifiers"]
    commands = [step.get("run", "") for step in job["steps"]]
    assert {"scripts/check --static", "scripts/test"} <= set(commands)


@pytest.mark.parametrize(
    "path",
    sorted([*GITHUB.glob("*.yml"), *GITHUB.glob("ISSUE_TEMPLATE/*.yml"), ROOT / "CITATION.cff"]),
    ids=lambda path: path.name,
)
def test_a_template_parses(path: Path) -> None:
    content = read(path)
    assert content
    for field in content.get("body", []):
        assert field["type"] in ("markdown", "textarea") and field["attributes"]


def test_the_versions_of_package_citation_and_changelog_agree() -> None:
    notes = release_notes(ROOT, f"v{xrai.__version__}")
    assert notes.returncode == 0, notes.stderr
    assert "### Added" in notes.stdout and "\n## " not in notes.stdout


def test_a_release_is_refused_if_tag_citation_or_changelog_differ(tmp_path: Path) -> None:
    for name in ("CHANGELOG.md", "CITATION.cff", "xrai/__init__.py", "scripts/release-notes"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    tag = f"v{xrai.__version__}"
    assert release_notes(tmp_path, tag).returncode == 0
    assert "the tag is v9.9.9" in refusal(tmp_path, "v9.9.9")

    citation = tmp_path / "CITATION.cff"
    kept = citation.read_text()
    citation.write_text(kept.replace(f"version: {xrai.__version__}", "version: 0.0.1"))
    assert "CITATION.cff states another version" in refusal(tmp_path, tag)
    citation.write_text(kept)

    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace(f"## [{xrai.__version__}] -", "## soon"))
    assert "CHANGELOG.md has no section" in refusal(tmp_path, tag)


def release_notes(root: Path, tag: str) -> subprocess.CompletedProcess[str]:
    script = root / "scripts/release-notes"
    return subprocess.run([script, tag], capture_output=True, text=True, check=False)


def refusal(root: Path, tag: str) -> str:
    done = release_notes(root, tag)
    assert done.returncode == 2 and not done.stdout
    return done.stderr
