"""What README.md and the decisions name is there: files, links, commands, flags and keys."""

import importlib
import re
from pathlib import Path

import pytest

from xrai.config import all_keys

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "docs/running.md",
    ROOT / "docs/scale.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs/decisions").glob("*.md")),
]
COMMANDS = ("preprocess", "train", "evaluate", "predict", "export", "verify")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).strip().replace(" ", "-")
        for line in re.findall("(?m)^#+(.*)", text)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def test_every_flag_and_key_exists() -> None:
    keys = {spec.name for spec in all_keys()}
    flags = {
        flag.name
        for command in COMMANDS
        for flag in importlib.import_module(f"xrai.{command}").FLAGS
    }
    others = {
        "config",
        "help",
        "print_config",
        "nproc_per_node",
        "logdir",
        "num-images",
        "section.key",
        "rm",
    }
    named = set(re.findall(r"--([A-Za-z_][\w.-]*)", README))
    assert {"images.size", "run_id", "source"} <= named
    assert named <= keys | flags | others, named - keys - flags - others


def test_every_command_and_module_exists() -> None:
    for module in set(re.findall(r"-m (xrai[\w.]*)", README)):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module
    for script in set(re.findall(r"scripts/[\w-]+", README)):
        assert (ROOT / script).exists(), script
    for module in set(re.findall(r"`((?:xrai|dataset|learning|results)/[\w/]+\.py)`", README)):
        assert (ROOT / "xrai" / module.removeprefix("xrai/")).exists(), module
    for config in set(re.findall(r"configs/[\w-]+\.yaml", README)):
        assert (ROOT / config).exists(), config


def test_each_row_of_the_table_of_results_is_a_file_that_some_module_writes() -> None:
    table = README[
        README.index("| file | what it holds |") : README.index("The threshold is chosen")
    ]
    names = re.findall(
        r"`([\w./]+)`[,|\s]",
        "\n".join(line.split("|")[1] + "|" for line in table.splitlines()[2:] if line),
    )
    assert len(names) >= 12
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "xrai").rglob("*.py"))
    for name in names:
        assert name.strip("/").rpartition("/")[2] in source, name
