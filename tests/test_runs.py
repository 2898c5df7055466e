"""`xrai runs`: runs are listed, shown and fetched, from a folder and from a bucket."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training import Finished
from xrai import runs
from xrai.command import run_command
from xrai.store import LEASE_KEY, open_store

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`xrai runs ARGUMENTS…`: exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["xrai runs", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_command(runs.main)
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def artifacts(finished: Finished, tmp_path: Path) -> Path:
    """A finished run `whole`, and `half`, which is not finished and has a lease."""
    shutil.copytree(finished.folder, tmp_path / "submit/whole")
    shutil.copytree(finished.folder, tmp_path / "submit/half")
    (tmp_path / "submit/half/summary.json").unlink()
    (tmp_path / "submit/half" / LEASE_KEY).write_text("{}")
    (tmp_path / "submit/unrelated").mkdir()
    (tmp_path / "submit/unrelated/config.yaml").touch()
    return tmp_path / "submit"


def test_all_runs_are_listed_with_their_state(artifacts: Path, call: Call) -> None:
    status, said, _ = call(f"--artifacts={artifacts}")
    half, whole = said.splitlines()
    assert status == 0 and half == "half  not finished, 2 epochs done"
    assert re.fullmatch(r"whole  finished after 2 epochs: AUROC [\d.–]+ on (test|val)", whole)


def test_a_run_that_cannot_be_read_does_not_hide_the_others(artifacts: Path, call: Call) -> None:
    for name in ("damaged", "earlier", "linked"):
        shutil.copytree(artifacts / "half", artifacts / name)
    (artifacts / "damaged/history.csv").write_text("epoch\nmany\n")
    (artifacts / "earlier/summary.json").write_text('{"schema_version": 0}')
    (artifacts / "linked/history.csv").unlink()
    (artifacts / "linked/history.csv").symlink_to("/dev/null")
    status, said, _ = call(f"--artifacts={artifacts}")
    states = dict(line.split("  ", 1) for line in said.splitlines())
    assert status == 0 and [*states] == ["damaged", "earlier", "half", "linked", "whole"]
    assert "history.csv" in states["damaged"] and "history.csv" in states["linked"]
    assert "schema version 0, this xrai reads version 1" in states["earlier"]
    assert states["half"] == "not finished, 2 epochs done"


def test_the_results_of_a_run_are_shown_as_its_training_showed_them(
    finished: Finished, artifacts: Path, call: Call
) -> None:
    status, said, _ = call("whole", "half", f"--artifacts={artifacts}")
    assert status == 0 and finished.stdout.splitlines()[:4] == said.splitlines()[:4]
    assert said.splitlines()[-1].endswith("half: not finished, 2 epochs done")


@pytest.mark.parametrize("run_id", ["whole", "half"])
def test_a_run_is_fetched_without_its_checkpoints_or_with_them(
    run_id: str, artifacts: Path, tmp_path: Path, call: Call
) -> None:
    common = [run_id, f"--artifacts={artifacts}", f"--out={tmp_path / 'out'}"]
    assert call(*common)[0] == 0
    stored = {entry.key for entry in open_store(str(artifacts / run_id)).list()} - {LEASE_KEY}
    fetched = {entry.key for entry in open_store(str(tmp_path / "out" / run_id)).list()}
    assert "report.html" in fetched and "config.yaml" in fetched and LEASE_KEY not in fetched
    assert not any(key.startswith("checkpoints/") for key in fetched)
    assert call(*common, "--checkpoints")[0] == 0
    everything = {entry.key for entry in open_store(str(tmp_path / "out" / run_id)).list()}
    assert everything == stored and any(key.startswith("checkpoints/") for key in everything)
    for key in everything:
        assert (tmp_path / "out" / run_id / key).read_bytes() == (
            artifacts / run_id / key
        ).read_bytes()


def test_a_file_that_is_not_what_the_summary_lists_is_refused(
    artifacts: Path, tmp_path: Path, call: Call
) -> None:
    common = ["whole", f"--artifacts={artifacts}", f"--out={tmp_path / 'out'}"]
    assert call(*common)[0] == 0
    fetched = tmp_path / "out/whole"
    before = (fetched / "report.html").read_bytes()
    (fetched / "model.pt").write_bytes(b"cut off")
    with (artifacts / "whole/report.html").open("a") as file:
        file.write("<!-- another -->")
    (fetched / "report.html").write_bytes(before[:100])
    status, _, said = call(*common)
    assert status == 1 and "report.html is not what summary.json lists" in said
    assert (fetched / "report.html").read_bytes() == before[:100]
    assert (fetched / "model.pt").read_bytes() == (artifacts / "whole/model.pt").read_bytes()
    assert not (fetched / "summary.json").exists() and not [*fetched.rglob(".*")]
    (artifacts / "whole/report.html").write_bytes(before)
    assert call(*common)[0] == 0 and (fetched / "summary.json").exists()


def test_a_model_that_arrives_damaged_is_not_kept(
    artifacts: Path, tmp_path: Path, call: Call
) -> None:
    (artifacts / "whole/model.pt").write_bytes(b"another")
    status, _, said = call("whole", f"--artifacts={artifacts}", f"--out={tmp_path / 'out'}")
    assert status == 1 and "model.pt is not what summary.json lists" in said
    assert not (tmp_path / "out/whole/model.pt").exists()


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", "{}", '{"files": 3}', '{"files": {"model.pt": 3}}']
)
def test_a_run_whose_summary_is_damaged_is_not_fetched(
    text: str, artifacts: Path, tmp_path: Path, call: Call
) -> None:
    (artifacts / "whole/summary.json").write_text(text)
    status, _, said = call("whole", f"--artifacts={artifacts}", f"--out={tmp_path / 'out'}")
    assert status == 2 and "does not state the hashes of the run's files: it is damaged" in said
    assert len(said.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_run_is_not_fetched_into_its_own_folder(artifacts: Path, call: Call) -> None:
    status, _, said = call("whole", f"--artifacts={artifacts}", f"--out={artifacts}/../submit")
    assert status == 2 and "is the run itself: name another folder by --out" in said
    assert (artifacts / "whole/summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none"], "there is no run at"),
        (["unrelated"], "there is no run at"),
        (["none", "--out=o"], "there is no run at"),
        (["unrelated", "--out=o"], "there is no run at"),
        (["../x"], "is not allowed"),
        (["--out=o"], "--out needs the ID of a run"),
        (["--artifacts=nowhere"], "there is no run at"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(
    arguments: list[str], words: str, artifacts: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(artifacts)
    monkeypatch.setenv("XRAI_ARTIFACTS", str(artifacts))
    status, _, said = call(*arguments)
    (line,) = said.splitlines()
    assert status == 2 and words in line and not Path("o").exists()
