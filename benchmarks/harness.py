"""Runs contenders in turn, each run in a process of its own, and keeps what they measured. All
benchmarks use it.

A contender is a function that measures once and returns its figures. A round runs each contender
once; the next round begins with another one, so that a machine whose speed drifts favours nobody.
Ratios are formed inside a round and then summarised, like everything here, by the median with the
smallest and the largest. The harness adds what it sees from outside: seconds by the clock and of
processor time, and the memory of all processes of the run together.

    xrai = Contender("xrai", "benchmarks.load:measure_xrai", {"workers": 2})
    runs = run_in_turn([xrai, ...], rounds=5)
    report = Report("load", settings={"batch_size": 64})
    rate = Figure("images_per_s", "images/s")
    report.add_table("warm", "From a warm cache", runs, ours="xrai", figures=[rate])
    report.demand("warm: times the best peer", best_ratio, at_least=5)
    report.save()   # prints the tables; writes benchmarks/results/load.json and load.png, and every
                    # run to benchmarks/results/raw/load.json, which git ignores
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA_VERSION = 1

_SAMPLE_S = 0.1  # between two looks at the memory of a run
_PACKAGES = (
    *("torch", "torchvision", "numpy", "h5py", "pillow", "scipy"),
    *("mosaicml-streaming", "litdata", "webdataset", "onnxruntime"),
    *("timm", "lightning", "monai"),
)


@dataclass(frozen=True)
class Contender:
    """One thing to measure: `call` is "module:function", called with `arguments` and `scratch`, a
    new empty folder.

    It returns a mapping of figures (numbers). `note` says how it is configured, and who advises it.
    """

    name: str
    call: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What one run of a contender gave: its figures, or why there are none."""

    contender: str
    round: int
    figures: dict[str, float]
    failure: str = ""
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A column of a table."""

    key: str
    label: str
    better: Literal["higher", "lower"] = "higher"
    digits: int = 0


# ------------------------------------------------------------------------------------------ running


def run_in_turn(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    timeout_s: float = 600.0,
    scratch: Path | None = None,
    sample_s: float = _SAMPLE_S,
) -> list[Run]:
    """Run all contenders once a round, beginning each round with another one. `scratch` holds the
    runs' folders. Memory is looked at every `sample_s`, which takes a few ms for each GiB.

    A run that fails or takes longer than `timeout_s` is kept as a failure, with its last words.
    """
    runs = []
    for number in range(rounds):
        start = number % len(contenders)
        for contender in [*contenders[start:], *contenders[:start]]:
            run = _run(contender, number, timeout_s=timeout_s, scratch=scratch, sample_s=sample_s)
            shown = run.failure or "  ".join(
                f"{key} {value:,.4g}" for key, value in run.figures.items()
            )
            say(f"round {number + 1}/{rounds}  {contender.name:28}  {shown}")
            runs.append(run)
    return runs


def say(line: str) -> None:
    """One line of progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def _run(
    contender: Contender, number: int, *, timeout_s: float, scratch: Path | None, sample_s: float
) -> Run:
    with tempfile.TemporaryDirectory(
        prefix="bench-", dir=scratch, ignore_cleanup_errors=True
    ) as folder:
        told, words = Path(folder) / "figures.json", Path(folder) / "output"
        work = Path(folder) / "scratch"
        work.mkdir()
        command = [
            sys.executable,
            "-m",
            "benchmarks.harness",
            contender.call,
            json.dumps(dict(contender.arguments)),
        ]
        with words.open("wb") as output:
            began = time.perf_counter()
            process = subprocess.Popen(
                [*command, str(work), str(told)],
                cwd=ROOT,
                env={**os.environ, **contender.env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            with watch_memory(process.pid, sample_s=sample_s) as memory:
                status, usage = _wait(process, timeout_s)
            wall_s = time.perf_counter() - began
        if status is None:
            return Run(contender.name, number, {}, f"no end within {timeout_s:g} s", contender.note)
        if status != 0 or not told.exists():
            last = words.read_text(errors="replace").strip().splitlines()[-1:] or ["no word"]
            said = last[0].replace(f"{ROOT}/", "")[:300]  # a report names no folder of its machine
            return Run(contender.name, number, {}, f"exit status {status}: {said}", contender.note)
        figures = json.loads(told.read_text())
        outside = {"wall_s": wall_s, "cpu_s": usage, "peak_memory_mib": memory.peak_mib}
        return Run(contender.name, number, {**outside, **figures}, note=contender.note)


def _wait(process: "subprocess.Popen[bytes]", timeout_s: float) -> tuple[int | None, float]:
    """Exit status (None: it had to be killed) and processor seconds of the process and its ended
    children.
    """
    late = threading.Timer(timeout_s, lambda: os.killpg(process.pid, signal.SIGKILL))
    late.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
    finally:
        was_late = not late.is_alive()
        late.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it left behind must not disturb the next one
    return None if was_late else process.returncode, usage.ru_utime + usage.ru_stime


ALL_PAGES = ("Pss:",)  # pages of mapped files count while they are resident
OWN_PAGES = ("Pss_Anon:", "Pss_Shmem:")  # what no file holds


class Memory:
    """The largest sum over a process and its descendants that was seen, MiB; shared pages count
    once.
    """

    peak_mib = 0.0


@contextlib.contextmanager
def watch_memory(
    pid: int, *, pages: tuple[str, ...] = ALL_PAGES, sample_s: float = _SAMPLE_S
) -> Iterator[Memory]:
    """Watch the memory of a process tree inside the block; `pages` are the lines of smaps_rollup
    that count.
    """
    found, stop = Memory(), threading.Event()

    def look() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            while not stop.wait(sample_s):
                total = 0
                for process in [root, *root.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error, OSError):
                        total += (
                            count_kib(Path(f"/proc/{process.pid}/smaps_rollup").read_text(), pages)
                            * 1024
                        )
                found.peak_mib = max(found.peak_mib, total / 2**20)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def count_kib(rollup: str, pages: tuple[str, ...]) -> int:
    """The sum of some lines of a process's smaps_rollup, KiB."""
    return sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith(pages))


# ------------------------------------------------------------------------------------------ results


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest and number of some values."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def values_of(runs: Sequence[Run], contender: str, key: str) -> dict[int, float]:
    """A figure of a contender by round; rounds in which it failed are missing."""
    return {
        run.round: run.figures[key]
        for run in runs
        if run.contender == contender and key in run.figures
    }


def ratio(runs: Sequence[Run], one: str, other: str, key: str) -> dict[str, float]:
    """`one` over `other`, formed inside each round and summarised. Raises `ValueError` where
    they share no round.
    """
    ones, others = values_of(runs, one, key), values_of(runs, other, key)
    shared = [ones[number] / others[number] for number in ones if number in others]
    if not shared:
        raise ValueError(f"{one} and {other} have no round in which both gave {key}")
    return summarise(shared)


def best_of(runs: Sequence[Run], names: Sequence[str], figure: Figure) -> str:
    """The name among `names` whose median of a figure is best; those that never succeeded do not
    count.
    """
    medians = {
        name: statistics.median(found)
        for name in names
        if (found := values_of(runs, name, figure.key).values())
    }
    return (max if figure.better == "higher" else min)(medians, key=lambda name: medians[name])


class Report:
    """What a benchmark found: tables, and the demands made on them. Written as JSON and as a
    plot.
    """

    def __init__(self, name: str, *, settings: Mapping[str, Any]) -> None:
        self.name = name
        self.tables: list[dict[str, Any]] = []
        self.demands: list[dict[str, Any]] = []
        self._settings = dict(settings)
        self._runs: dict[str, list[dict[str, Any]]] = {}
        self._load_before = os.getloadavg()[0]

    def add_table(
        self,
        name: str,
        title: str,
        runs: Sequence[Run],
        *,
        figures: Sequence[Figure],
        ours: str | None = None,
    ) -> None:
        """A row a contender: each figure's median and range; with `ours` its first figure over
        each other's.
        """
        rows = []
        for contender in dict.fromkeys(run.contender for run in runs):
            own = [run for run in runs if run.contender == contender]
            row: dict[str, Any] = {"contender": contender, "note": own[0].note, "figures": {}}
            for figure in figures:
                if found := values_of(runs, contender, figure.key):
                    row["figures"][figure.key] = summarise(list(found.values()))
            row["failures"] = [run.failure for run in own if run.failure]
            if (
                ours is not None
                and row["figures"].get(figures[0].key)
                and values_of(runs, ours, figures[0].key)
            ):
                row["ours_over_it"] = ratio(runs, ours, contender, figures[0].key)
            rows.append(row)
        columns = [asdict(figure) for figure in figures]
        self.tables.append(
            {"name": name, "title": title, "ours": ours, "figures": columns, "rows": rows}
        )
        self._runs[name] = [asdict(run) for run in runs]
        print(f"\n{title}\n\n" + "\n".join(format_table(self.tables[-1])), flush=True)

    def demand(
        self,
        text: str,
        value: float,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        digits: int = 2,
    ) -> None:
        """Note what was demanded of a figure and whether it was reached."""
        reached = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        self.demands.append(
            {
                "text": text,
                "value": value,
                "at_least": at_least,
                "at_most": at_most,
                "reached": reached,
                "digits": digits,
            }
        )
        print("\n".join(format_demands(self.demands[-1:])[2:]), flush=True)

    def save(self, folder: Path = RESULTS) -> None:
        """Write NAME.json (medians and spread), NAME.png, and each single run to raw/NAME.json."""
        raw = folder / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        load = {"load_before": self._load_before, "load_after": os.getloadavg()[0]}
        content = {
            "schema_version": SCHEMA_VERSION,
            "benchmark": self.name,
            "settings": self._settings,
            "machine": {**describe_machine(), **load},
            "versions": describe_versions(),
            "demands": self.demands,
            "tables": self.tables,
        }
        path = folder / f"{self.name}.json"
        path.write_text(to_json(content))
        (raw / path.name).write_text(to_json({**content, "runs": self._runs}))
        if self.tables:
            draw(content, folder / f"{self.name}.png")
        print(f"\nwritten: {path} and {path.with_suffix('.png').name}", flush=True)


def to_json(content: Mapping[str, Any]) -> str:
    """JSON with the innermost objects on a line each, numbers of nine digits."""
    rounded = json.loads(json.dumps(content, allow_nan=False), parse_float=_round)
    text = json.dumps(rounded, indent=1)
    return re.sub(r"\{[^{}]*\}", lambda found: " ".join(found[0].split()), text) + "\n"


def _round(digits: str) -> float:
    return float(f"{float(digits):.9g}")


def format_table(table: Mapping[str, Any]) -> list[str]:
    """A table in Markdown: medians, and (smallest to largest)."""
    figures = table["figures"]
    has_ratio = table["ours"] is not None
    head = [
        "",
        *[figure["label"] for figure in figures],
        *([f"{table['ours']} over it"] if has_ratio else []),
    ]
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in table["rows"]:
        cells = [row["contender"]]
        for figure in figures:
            cells.append(_format(row["figures"].get(figure["key"]), figure["digits"]))
        if has_ratio:
            cells.append(_format(row.get("ours_over_it"), 2))
        if row["failures"]:
            cells[0] += f" (runs that failed: {len(row['failures'])})"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def format_demands(demands: Sequence[Mapping[str, Any]]) -> list[str]:
    """The demands in Markdown."""
    lines = ["| demanded | limit | measured | |", "|---|---:|---:|---|"]
    for demand in demands:
        digits = demand["digits"]
        limit = (
            f"≥ {demand['at_least']:g}"
            if demand["at_least"] is not None
            else f"≤ {demand['at_most']:g}"
        )
        state = "reached" if demand["reached"] else "**not reached**"
        lines.append(f"| {demand['text']} | {limit} | {demand['value']:,.{digits}f} | {state} |")
    return lines


def _format(found: Mapping[str, float] | None, digits: int) -> str:
    if found is None:
        return "–"
    middle, low, high = (f"{found[key]:,.{digits}f}" for key in ("median", "min", "max"))
    return f"{middle} ({low} to {high})" if found["n"] > 1 else middle


def describe_machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(terse=True),
    }


def describe_versions() -> dict[str, str]:
    """Versions of all that is compared, and the commit."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if shutil.which("git"):

        def git(*command: str) -> str:
            done = subprocess.run(
                ["git", *command], cwd=ROOT, capture_output=True, text=True, check=False
            )
            return done.stdout.strip()

        changed = (
            " and changes"
            if git("status", "--porcelain", "--", "xrai", "benchmarks/*.py", "configs")
            else ""
        )
        found["xrai"] = (git("rev-parse", "--short", "HEAD") or "unknown") + changed
    return found


def draw(content: Mapping[str, Any], path: Path) -> None:
    """A panel a table: the first figure of each contender, median as a bar, smallest and largest
    as a line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    tables = content["tables"]
    heights = [0.9 + 0.32 * len(table["rows"]) for table in tables]
    figure, panels = pyplot.subplots(
        len(tables),
        1,
        figsize=(8, sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for panel, table in zip(panels[:, 0], tables, strict=True):
        column = table["figures"][0]
        rows = [row for row in table["rows"] if column["key"] in row["figures"]][::-1]
        found = [row["figures"][column["key"]] for row in rows]
        medians = [item["median"] for item in found]
        spread = [
            [item["median"] - item["min"] for item in found],
            [item["max"] - item["median"] for item in found],
        ]
        colours = ["#b5402a" if row["contender"] == table["ours"] else "#7d8a99" for row in rows]
        panel.barh(
            [row["contender"] for row in rows],
            medians,
            xerr=spread,
            color=colours,
            ecolor="#222222",
            height=0.7,
        )
        wide = medians and min(medians) > 0 and max(medians) > 30 * min(medians)
        if wide:
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.xaxis.set_minor_locator(NullLocator())
        panel.set_title(table["title"], loc="left", fontsize=10)
        panel.set_xlabel(
            f"{column['label']}{', logarithmic' if wide else ''} ({column['better']} is better)",
            fontsize=8,
        )
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------- inside of a run


def main(call: str, arguments: str, scratch: str, told: str) -> None:
    """Call a contender's function and write its figures."""
    module, _, name = call.partition(":")
    function = getattr(importlib.import_module(module), name)
    figures = {
        key: float(value)
        for key, value in function(scratch=Path(scratch), **json.loads(arguments)).items()
    }
    Path(told).write_text(json.dumps(figures, allow_nan=False))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}")
        sys.exit(1)
