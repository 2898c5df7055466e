"""The tutorial does what it says, and the site is made of pages that exist."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from xrai.config import all_keys

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """docs/hooks.py, which makes pages from the code; it needs no mkdocs to be imported."""
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block of commands or Python, in order."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"(?ms)^```(bash|python)\n(.*?)^```$", text)


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.timeout(900)  # one to two minutes of an idle machine
def test_the_tutorial_runs_from_top_to_bottom(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    steps, python = ["set -euo pipefail"], []
    for number, (language, text) in enumerate(code_blocks(DOCS / "tutorial.md")):
        if language == "bash":
            steps.append(text)
        else:  # each block sees the names of those before it
            python.append(text)
            script = tmp_path / f"block{number}.py"
            script.write_text("\n".join(python), encoding="utf-8")
            steps.append(f"python {script}")
    assert len(python) >= 4 and len(steps) - len(python) >= 5
    script = tmp_path / "tutorial.sh"
    script.write_text("\n".join(steps), encoding="utf-8")
    done = subprocess.run(
        ["bash", script],
        cwd=work,
        env={**os.environ, "PATH": path, "OMP_WAIT_POLICY": "passive"},  # others compute, too
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in ("report.html", "evaluate", "summary.json"):
        assert (work / "runs/first" / name).exists(), name
    assert (work / "predictions/predictions.csv").exists()
    assert any((work / "predictions/overlays").iterdir())


def test_the_configuration_page_has_every_key_with_its_default(hooks: ModuleType) -> None:
    page = hooks.configuration()
    for spec in all_keys():
        section, _, key = spec.name.partition(".")
        (row,) = re.findall(rf"(?m)^\| <code>{section}\.<wbr>{key}</code> \|.*", page)
        assert spec.meaning.replace("|", "\\|") in row
        assert f"<code>{yaml.safe_dump(spec.default).splitlines()[0]}</code>" in row


def test_every_page_is_in_the_navigation_once(hooks: ModuleType) -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = [page for entry in nav for page in _pages(entry)]
    made = {*hooks.PAGES.values(), "configuration.md", "decisions/index.md"}
    assert sorted(pages) == sorted({path.name for path in DOCS.glob("*.md")} | made)


def _pages(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in _pages(part)]


def test_every_decision_has_a_number_and_a_title(hooks: ModuleType) -> None:
    names = [name for name, _ in hooks.decisions()]
    assert names == sorted(path.name for path in (DOCS / "decisions").glob("*.md"))
    for name, title in hooks.decisions():
        assert re.fullmatch(rf"{name[:4]} [A-Z].+", title), (name, title)


def test_links_to_the_repository_become_links_to_pages_or_plain_text(hooks: ModuleType) -> None:
    class Page:
        class file:  # noqa: N801
            src_uri = "decisions/0010-speed.md"

    def on(text: str) -> str:
        return str(hooks.on_page_markdown(text, page=Page))

    assert on("[b](../../benchmarks/README.md#x)") == "[b](../benchmarks.md#x)"
    assert on("[scale](../scale.md)") == "[scale](../scale.md)"
    assert on("[keys](../../xrai/config.py)") == "[keys](../configuration.md)"
    assert on("[code](../../xrai/train.py)") == "`code`"
    assert on("[web](https://example.org/a.md)") == "[web](https://example.org/a.md)"
    assert on("![picture](../../docs/x.png)") == "![picture](../../docs/x.png)"
