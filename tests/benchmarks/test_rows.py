"""The benchmark of rows runs the stages of preprocess, whose manifest keeps its bytes."""

from pathlib import Path

import pytest

from benchmarks.harness import Run
from benchmarks.rows import IMAGES_A_PATIENT, STAGES, Named, bytes_an_image, measure
from xrai.ingest.layout import parse_name

STORED = 236447042714264  # the first 12 hex digits of its SHA-256, as xrai f08362a wrote it


def test_bytes_an_image_are_those_between_the_sizes() -> None:
    runs = [
        Run(f"{size:,} rows", number, {"plan_peak_mib": 60 + noise + size / 2**10})
        for size in (1_000, 50_000)
        for number, noise in enumerate((0.0, 0.5, 1.0))
    ]
    assert bytes_an_image(runs, [1_000, 50_000], "plan_peak_mib") == pytest.approx(1024)


def test_each_file_is_another_one_and_four_are_of_one_patient() -> None:
    source = Named(100)
    paths = [file.path for file in source.files()]
    assert len({source.read(path) for path in paths}) == 100
    assert {path.partition("/")[0] for path in paths} == {"NORMAL", "PNEUMONIA"}
    patients = {parse_name(path.rpartition("/")[2])[0] for path in paths}
    assert "" not in patients and len(patients) == 100 / IMAGES_A_PATIENT


def test_the_manifest_of_many_rows_never_changes(tmp_path: Path) -> None:
    figures = measure(scratch=tmp_path, num=2000)
    assert int(figures["manifest_sha256_head"]) == STORED
    for stage in STAGES:
        assert figures[f"{stage}_peak_mib"] >= figures[f"{stage}_held_mib"] > 0
