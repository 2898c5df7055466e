"""Writes the tables of benchmarks/README.md from benchmarks/results/*.json, so that the page says
what was measured.

python -m benchmarks.readme
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, format_demands, format_table

PAGE = RESULTS.parent / "README.md"
NOT_MEASURED = "Not measured yet."
_PLACE = re.compile(r"<!-- results: (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def main() -> None:
    """Rewrite the page."""
    PAGE.write_text(fill(PAGE.read_text(), RESULTS))


def fill(page: str, results: Path) -> str:
    """The page with each place `<!-- results: NAME -->` … `<!-- end -->` filled from NAME.json, or
    with a line that says that there are no such results yet.
    """

    def section(match: re.Match[str]) -> str:
        path = results / f"{match[1]}.json"
        lines = describe(json.loads(path.read_text())) if path.exists() else [NOT_MEASURED]
        return "\n".join([f"<!-- results: {match[1]} -->", *lines, "<!-- end -->"])

    return _PLACE.sub(section, page)


def describe(content: Mapping[str, Any]) -> list[str]:
    """The demands, the tables and what they were measured on, in Markdown."""
    lines = [*format_demands(content["demands"])] if content["demands"] else []
    for table in content["tables"]:
        notes = [f"{row['contender']}: {row['note']}" for row in table["rows"] if row["note"]]
        lines += ["", f"**{table['title']}**", "", *format_table(table)]
        lines += ["", "; ".join(notes) + "."] if notes else []
    machine = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    settings = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in content["settings"].items()
    )
    load = f"load {machine['load_before']:.1f} before and {machine['load_after']:.1f} after"
    name = content["benchmark"]
    on = f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gib']:g} GiB"
    return [
        *lines,
        "",
        f"![{name}](results/{name}.png)",
        "",
        f"{on}, {load}; {versions}. {settings}.",
    ]


if __name__ == "__main__":
    main()
