"""environment.json."""

import json
import os
from pathlib import Path

import pytest

from xrai.results.environment import describe_environment
from xrai.tables import to_json


def test_the_environment_names_no_host_user_or_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret-value")
    text = to_json(describe_environment())
    assert "s3cret-value" not in text
    assert os.uname().nodename not in text
    assert "torch" in json.loads(text)["packages"]


def test_a_sandbox_that_hides_the_processor_is_no_reason_to_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert isinstance(describe_environment()["processor"], str)
