"""The benchmark of rows runs the stages of preprocess, whose manifest keeps its bytes."""

import hashlib
import tracemalloc
from pathlib import Path

import pytest

from benchmarks.harness import Run
from benchmarks.rows import (
    IMAGES_A_PATIENT,
    JPEG_START,
    STAGES,
    Named,
    _parts_of,
    bytes_an_image,
    measure,
)
from tests.ingest.test_plan import Held
from xrai.config import Config, Images, Shards, Splits
from xrai.ingest.build import Contents, assemble
from xrai.ingest.card import write_card
from xrai.ingest.hashing import hash_source
from xrai.ingest.labels import parse_labels
from xrai.ingest.layout import parse_name
from xrai.ingest.patients import PatientKey
from xrai.ingest.plan import list_source, make_plan
from xrai.store import Store, open_store

STORED = 3850723639218  # the first 12 hex digits of its SHA-256, as xrai f08362a wrote it


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


def test_hashing_and_planning_take_the_memory_of_columns() -> None:
    peak_memory(400)  # what the first call imports is no memory of rows
    hashed, planned = peak_memory(8000)
    assert hashed < 180 and planned < 130  # objects took 245 and 306


def peak_memory(num: int) -> tuple[float, float]:
    """Bytes a row at the peaks of hashing and of planning, without those of the listing."""
    source = Named(num)
    listing = list_source(source)
    assert len(listing.layout.rows) == num
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        rows = hash_source(source, listing, None)
        hashed = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.reset_peak()
        make_plan(listing, rows, Config())
        planned = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    return hashed / num, planned / num


def folder_of_three_classes() -> dict[str, bytes]:
    """With duplicates, contradictions, patients who share images, a small val and bad files."""
    files = {}
    for k in range(900):
        split = "test" if k % 9 == 0 else "val" if k % 97 == 0 else "train"
        label = ("NORMAL", "COVID", "PNEUMONIA")[(k // 5) % 3]
        name = f"person{k // 7}_virus_{k}" if label == "PNEUMONIA" else f"{k:03d}"
        bad = "-unreadable" if k % 41 == 0 else ""
        content = k % 840 if k % 5 else k % 850
        files[f"chest/{split}/{label}/{name}{bad}.png"] = JPEG_START + f"{content}".encode()
    return files


def folder_of_two_classes() -> dict[str, bytes]:
    """The public classes, carved by hash, where patients share images."""
    files = {}
    for k in range(600):
        name = f"NORMAL/IM-{k // 3:04d}-{k:04d}" if k % 4 else f"PNEUMONIA/person{k}_bacteria_{k}"
        files[f"{name}.jpeg"] = JPEG_START + f"{k % 590}".encode()
    return {**files, "NORMAL/of_nobody.png": JPEG_START + b"7", "NORMAL/._hidden.png": b""}


def table_of_findings() -> tuple[dict[str, bytes], str]:
    """With unknown ones, images that are there twice, patients and kinds."""
    files, lines = {}, ["path,Effusion,Nodule,patient,subtype"]
    for k in range(500):
        path = f"films/{k * 7 % 500:03d}.png"
        content = k % 480
        cells = ("0", "1") if content % 3 else ("1", "0")
        cells = ("-1", cells[1]) if k % 11 == 0 else cells
        if k % 61 == 5:
            cells = ("1", "1")
        files[path] = JPEG_START + f"{content}".encode()
        lines.append(f"{path},{cells[0]},{cells[1]},P{k // 3},{'viral' if k % 2 else ''}")
    return files, "\n".join(lines)


def card_alone(_: Store, contents: Contents) -> dict[str, bytes]:
    return {"report/card.md": write_card(contents, sheets=[]).encode()}


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        ("three classes", "9a72a06cd56a8570"),
        ("two classes", "145f691ca90caf6b"),
        ("findings", "5de199f474e34c3c"),
    ],
)
def test_plan_notes_and_manifest_never_change(kind: str, stored: str, tmp_path: Path) -> None:
    """The stored hashes are those of the program whose rows were objects, but for contents that now
    begin as images do, a word of the card ("Subtypes", where it said "Kinds of pneumonia" of any
    classes), and a note of patients that are unknown.
    """
    files, table = folder_of_three_classes(), None
    config = Config(
        images=Images(max_set_aside=0.3),
        shards=Shards(rows=40),
        splits=Splits(duplicates="drop", val_fraction=0.15),
    )
    if kind == "two classes":
        files = folder_of_two_classes()
    (tmp_path / "key").write_bytes(b"a secret of many bytes")
    if kind == "findings":
        files, text = table_of_findings()
        table = parse_labels(text, name="table.csv", config=config.labels)
    source, key = Held(files), PatientKey(str(tmp_path / "key"))
    listing = list_source(source, table, key)
    plan = make_plan(listing, hash_source(source, listing, None), config)
    digest = hashlib.sha256(f"{listing.sha256} {plan.sha256} {plan.notes} {plan.facts}".encode())
    digest.update(repr([(row.path, row.reason) for row in plan.unusable]).encode())
    parts = _parts_of(plan)
    first = plan.shards[0].rows[3].path
    parts[0].reasons[first] = "is cut short"
    del parts[0].perceptual_hashes[-32:]
    store = open_store(str(tmp_path / "dataset"))
    index, objects = assemble(plan, parts, store, card_alone, tmp_path)
    for path in objects.values():
        digest.update(path.read_bytes())
    digest.update(repr((index.counts, index.splits, index.carved)).encode())
    assert plan.carved and len({row.split for row in plan.rows}) == 3
    assert digest.hexdigest()[:16] == stored
