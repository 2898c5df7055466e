"""Hooks of mkdocs: the pages that are made from the code or from files outside of docs/.

The configuration reference is generated from `xrai.config`, so it cannot differ from the program.
CHANGELOG.md, CONTRIBUTING.md and benchmarks/README.md become pages, and the list of decisions
follows from the files in docs/decisions/.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import TYPE_CHECKING, Any

import yaml

from xrai.config import Config, all_keys

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {  # file of the repository -> page of the site
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}
_TARGETS = {**PAGES, "xrai/config.py": "configuration.md"}  # of links
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#:]+)(#[^)\s]*)?\)")

_CONFIGURATION = """# Configuration

Every key, generated from the code. A key is set as `--section.key=value` or in a YAML file that
`--config` names; the command line wins over the file, and the file over the default. `--help` lists
the keys that a command uses, and `--print_config` prints the values that it would use.
"""


def on_config(config: "MkDocsConfig") -> "MkDocsConfig":
    """Fill in the list of decisions."""
    entries = [{title: f"decisions/{name}"} for name, title in decisions()]
    for section in config.nav or []:
        for pages in section.values():
            for entry in pages if isinstance(pages, list) else []:
                if entry.get("Decisions"):
                    entry["Decisions"] = [entry["Decisions"], *entries]
    return config


def on_files(files: "Files", *, config: "MkDocsConfig") -> "Files":
    """Add the pages that have no file in docs/."""
    from mkdocs.structure.files import File

    pages = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in PAGES.items()}
    pages["configuration.md"] = configuration()
    pages["decisions/index.md"] = (
        "# Decisions\n\nEach page states a choice, the evidence for it, and what failed.\n\n"
        + "".join(f"- [{title}]({name})\n" for name, title in decisions())
    )
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    for plot in sorted((ROOT / "benchmarks/results").glob("*.png")):
        path = f"results/{plot.name}"
        files.append(File.generated(config, path, abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, *, page: "Page", **_: Any) -> str:
    """Turn links to files of the repository into links to their pages, or into plain text."""
    uri = page.file.src_uri
    source = {target: name for name, target in PAGES.items()}.get(uri, f"docs/{uri}")

    def rewrite(match: re.Match[str]) -> str:
        text, target, anchor = match.group(1), match.group(2), match.group(3) or ""
        path = normpath(join(dirname(source), target))
        place = _TARGETS.get(path) or (path.startswith("docs/") and path.removeprefix("docs/"))
        if not place:  # only in the repository
            return text if text.startswith("`") else f"`{text}`"
        return f"[{text}]({relpath(place, dirname(uri) or '.')}{anchor})"

    return _LINK.sub(rewrite, markdown)


def decisions() -> list[tuple[str, str]]:
    """File name and title of each decision, in order."""
    found = []
    for path in sorted((ROOT / "docs/decisions").glob("[0-9]*.md")):
        heading = path.read_text(encoding="utf-8").partition("\n")[0]
        title = re.sub(r"^# *(\d{4}[:.]? *)?", "", heading)
        found.append((path.name, f"{path.name[:4]} {title[:1].upper()}{title[1:]}"))
    return found


def configuration() -> str:
    """The reference of all config keys, as Markdown."""
    return _CONFIGURATION + "".join(_sections()) + "".join(_files())


def _sections() -> Iterator[str]:
    meanings = {
        section.name: inspect.getdoc(section.default_factory)
        for section in dataclasses.fields(Config)
    }
    specs = list(all_keys())
    for name, meaning in meanings.items():
        yield f"\n## {name}\n\n{meaning}\n\n"
        yield "| key | default | allowed | meaning |\n|---|---|---|---|\n"
        for spec in specs:
            section, _, key = spec.name.partition(".")
            if section == name:
                default = yaml.safe_dump(spec.default).splitlines()[0]
                names = f"<code>{section}.<wbr>{key}</code>", f"<code>{default}</code>"
                cells = (*names, spec.allowed(), spec.meaning)
                yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _files() -> Iterator[str]:
    yield "\n## The files in configs/\n"
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        yield f"\n### {path.name}\n\n```yaml\n{text}```\n"
