"""What README.md, the pages of docs/ and the decisions name exists: files, links, commands, flags,
keys.
"""

import importlib
import re
from pathlib import Path

import pytest

from xrai.config import all_keys

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]  # for users: every flag has to exist
PAGES = [
    *GUIDE,
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    ROOT / "CODE_OF_CONDUCT.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs/decisions").glob("*.md")),
]
COMMANDS = ("preprocess", "train", "evaluate", "predict", "serve", "export", "verify", "runs")
WORDS = {*COMMANDS, "phantom"}
GENERATED = {"configuration.md", "changelog.md", "contributing.md", "benchmarks.md"}
OTHER_FLAGS = {  # of torchrun, docker, kubectl, git, the scripts and the phantoms
    *(
        "all",
        "bench",
        "build",
        "check",
        "config",
        "dev",
        "docs",
        "env-file",
        "every",
        "file",
        "timm",
    ),
    *(
        "format",
        "help",
        "local_addr",
        "logdir",
        "max_restarts",
        "num-images",
        "nproc_per_node",
        "out",
        "parts",
    ),
    *("print_config", "profile", "rm", "secret", "section.key", "seed", "serve", "standalone"),
    *("from-env-file", "from-file", "task", "volumes", "cascade", "delete-emptydir-data"),
    *("for", "timeout", "max-log-requests"),
    *("nnodes", "rdzv_id", "ntasks-per-node", "full-size", "no-deps"),
}


def anchors_of(text: str) -> set[str]:
    return {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).strip().replace(" ", "-")
        for line in re.findall("(?m)^#+(.*)", text)
    }


def test_the_readme_is_short_and_begins_with_what_matters() -> None:
    lines = README.splitlines()
    assert len(lines) <= 120
    first = "\n".join(lines[:40])
    for needed in ("not a medical device", "0.31 M parameters", "64 x 64", "n = 624", "```python"):
        assert needed in first, needed
    assert "scripts/quickstart" in first and "scripts/test" in first and ".png" in first


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.parent.name != "benchmarks"],  # which write half of theirs
    ids=lambda page: page.name,
)
def test_lines_of_prose_are_at_most_100_characters(page: Path) -> None:
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fenced ^= line.startswith("```")
        prose = not fenced and not line.lstrip().startswith(("|", "![")) and line[:4] != "    "
        assert not prose or len(line) <= 100, f"{page.name}:{number}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if target.startswith(("https://", "mailto:")):
            continue
        place = page.parent / path if path else page
        if page.parent == ROOT / "docs" and (path in GENERATED or path == "decisions/index.md"):
            continue  # docs/hooks.py makes these
        assert place.exists(), target
        assert not anchor or anchor in anchors_of(place.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.name)
def test_every_flag_and_key_exists(page: Path) -> None:
    keys = {spec.name for spec in all_keys()}
    flags = {
        flag.name
        for command in COMMANDS
        for flag in importlib.import_module(f"xrai.{command}").FLAGS
    }
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w-])--([A-Za-z_][\w.-]*\w)", text))
    assert named <= keys | flags | OTHER_FLAGS, named - keys - flags - OTHER_FLAGS
    sections = "|".join({key.partition(".")[0] for key in keys})
    in_code = set(re.findall(rf"`((?:{sections})\.[a-z_]+)`", text))
    others = {"model.pt", "model.onnx", "train.py", "evaluate.py", "loader.index", "loader.labels"}
    others |= {"labels.csv", "labels.py", "train.csv"}
    assert in_code <= keys | others, in_code - keys - others


def test_flags_are_really_looked_for() -> None:
    named = set(re.findall(r"(?<![\w-])--([A-Za-z_][\w.-]*\w)", README))
    assert {"nproc_per_node", "run_id", "source"} <= named


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.name)
def test_every_command_module_script_and_file_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for module in set(re.findall(r"-m ((?:xrai|benchmarks)[\w.]*\w)", text)):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module
    code = re.findall(r"(?ms)^```.*?^```|^    [^\n]*|`[^`\n]+`", text)
    for word in set(re.findall(r"(?:^|[`\s])xrai ([a-z]+)", "\n".join(code))) - {"as"}:
        assert word in WORDS, word
    for script in set(re.findall(r"scripts/[\w-]+", text)):
        assert (ROOT / script).exists(), script
    paths = re.findall(r"(?<![\w/.-])((?:xrai|tests|configs|docker|k8s)/[\w./-]*\w)", text)
    for path in set(paths):
        if "/mine" not in path:
            assert (ROOT / path).exists(), path


def test_each_row_of_the_table_of_results_is_a_file_that_some_module_writes() -> None:
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    table = text[text.index("| file | contents |") : text.index("`xrai evaluate` writes")]
    cells = [line.split("|")[1] for line in table.splitlines()[2:] if line]
    names = re.findall(r"`([\w./]+)`", "\n".join(cells))
    assert len(names) >= 12
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "xrai").rglob("*.py"))
    for name in names:
        assert name.strip("/").rpartition("/")[2] in source, name


def test_the_tops_of_the_compose_files_name_every_variable_that_they_use() -> None:
    files = [ROOT / "compose.yaml", *sorted((ROOT / "docker").glob("compose.*.yaml"))]
    texts = [path.read_text(encoding="utf-8") for path in files]
    tops = "".join(re.split(r"(?m)^(?!#)", text, maxsplit=1)[0] for text in texts)
    used = {name for text in texts for name in re.findall(r"\$\{(XRAI_\w+)", text)}
    assert len(used) >= 20
    missing = used - set(re.findall(r"XRAI_\w+", tops))
    assert not missing


def test_every_test_file_that_a_decision_names_exists() -> None:
    pages = sorted((ROOT / "docs/decisions").glob("*.md"))
    named = {
        path
        for page in pages
        for path in re.findall(r"tests/[\w/]+\.py", page.read_text(encoding="utf-8"))
    }
    assert len(named) >= 10
    missing = [path for path in sorted(named) if not (ROOT / path).exists()]
    assert not missing
