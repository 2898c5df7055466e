"""The Python of docs/dataset.md, run as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.dataset.small import write_dataset


def test_the_examples_run_one_after_the_other(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = re.findall(
        r"```python\n(.*?)```", (repository / "docs" / "dataset.md").read_text(), flags=re.DOTALL
    )
    assert len(examples) == 4
    write_dataset(
        tmp_path / "data" / "dataset", {"train": [120, 100], "val": [20, 9], "test": [10]}
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in examples:
        exec(example, names)
    assert names["images"].shape == (16, 16, 16)
    assert names["sources"][3] == "train/3.png"
    assert len(names["rest"]) == 2
