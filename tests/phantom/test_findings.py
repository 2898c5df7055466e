"""Phantoms with findings: drawn where they belong, seen, together as they occur, and not all known;
and the folders of the tasks.
"""

import csv
from collections import Counter
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.phantom.test_phantom import hashes, run
from xrai.errors import UserError
from xrai.phantom import FINDINGS, Phantom, draw_phantom, make_phantoms, plan_findings
from xrai.phantom.anatomy import Finding, draw_anatomy, generator
from xrai.phantom.draw import _heart_scale
from xrai.phantom.findings import draw_findings, draw_labels

Image = npt.NDArray[np.floating]
SEED = 11


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@cache
def healthy(patient: int) -> Image:
    return draw_phantom(SEED, Phantom(patient, 0, "findings"))


def change(patient: int, *findings: Finding) -> Image:
    """What findings change in a patient's image."""
    found = draw_phantom(SEED, Phantom(patient, 0, "findings", frozenset(findings)))
    return found - healthy(patient)


# ------------------------------------------------------------------------------------------ who has


def test_findings_are_as_frequent_as_planned_and_occur_together() -> None:
    first = {p.patient: p.findings for p in islice(plan_findings(SEED), 6000) if p.image == 0}
    patients = list(first.values())
    share = {name: np.mean([name in had for had in patients]) for name in FINDINGS}
    assert all(0.16 < share[name] < 0.30 for name in FINDINGS), share
    assert 0.13 < np.mean([not had for had in patients]) < 0.21

    def lift(one: Finding, other: Finding) -> float:
        both = np.mean([one in had and other in had for had in patients])
        return float(both / (share[one] * share[other]))

    assert lift("Cardiomegaly", "Effusion") > 1.5 and lift("Cardiomegaly", "Infiltration") > 1.5
    assert lift("Cardiomegaly", "Pneumothorax") < 0.5
    pairs = Counter((one, other) for had in patients for one in had for other in had if one < other)
    assert len(pairs) == 15  # each at least once


def test_twenty_four_images_hold_each_finding_present_and_absent() -> None:
    for seed in range(20):
        labels = np.array([draw_labels(seed, p) for p in islice(plan_findings(seed), 24)])
        assert (labels == 1).any(axis=0).all() and (labels == 0).any(axis=0).all()


def test_a_fifth_of_labels_is_unknown_whatever_was_drawn() -> None:
    phantoms = list(islice(plan_findings(SEED), 3000))
    labels = np.array([draw_labels(SEED, p) for p in phantoms])
    drawn = np.array([[name in p.findings for name in FINDINGS] for p in phantoms])
    for has in (False, True):
        assert abs((labels[drawn == has] == -1).mean() - 0.2) < 0.02
    assert (labels[labels >= 0] == drawn[labels >= 0]).all()


# --------------------------------------------------------------------------------------- what shows


@pytest.mark.parametrize("finding", FINDINGS)
def test_each_finding_can_be_seen_in_each_of_thirty_patients(finding: Finding) -> None:
    for patient in range(1, 31):
        difference = np.abs(change(patient, finding))
        assert difference.max() > 0.05, patient
        assert 0.001 < (difference > 0.03).mean() < 0.4, patient


def test_a_heart_is_enlarged_when_it_is_wider_than_half_the_chest() -> None:
    for patient in range(1, 200):
        rng = generator(SEED, 1, patient)
        body = draw_anatomy(rng)
        ratio = draw_findings(rng, frozenset({"Cardiomegaly"})).heart_ratio
        assert 0.55 <= ratio <= 0.68
        assert 1.02 < _heart_scale(body, ratio) < 2.2
        assert _heart_scale(body, 0.52) > 1  # all others are smaller than this
        assert _heart_scale(body, 0.0) == 1


def test_fluid_is_bright_and_low_and_a_pneumothorax_has_dark_air_and_a_bright_line() -> None:
    rows = []
    for patient in range(1, 31):
        fluid, air = change(patient, "Effusion"), change(patient, "Pneumothorax")
        assert fluid.max() > 0.05 and fluid.sum() > 0, patient
        rows.append(np.average(np.arange(fluid.shape[0]), weights=fluid.sum(axis=1).clip(0)))
        rows[-1] /= fluid.shape[0]
        assert air.min() < -0.1 and air.max() > 0.03, patient
    assert np.mean(rows) > 0.55


def test_a_nodule_is_round_and_small() -> None:
    for patient in range(1, 31):
        spot = change(patient, "Nodule") > 0.01
        height, width = np.ptp(np.argwhere(spot), axis=0) + 1
        assert 2 < height < 0.2 * spot.shape[0] and 2 < width < 0.2 * spot.shape[1], patient
        assert 0.5 < height / width < 2, patient


def test_no_fluid_or_nodule_lies_on_the_side_of_a_pneumothorax() -> None:
    every = frozenset(FINDINGS)
    for patient in range(1, 100):
        disease = draw_findings(generator(SEED, 1, patient), every)
        assert disease.pneumothorax is not None
        side = disease.pneumothorax.side
        assert disease.fluid[0 if side < 0 else 1] == 0 < max(disease.fluid)
        assert [nodule.side for nodule in disease.nodules] == [-side]


# --------------------------------------------------------------------------------------- the folder


def test_multilabel_writes_images_and_a_table_that_are_the_same_whatever_number_and_workers(
    tmp_path: Path,
) -> None:
    make_phantoms(tmp_path / "few", num_images=10, task="multilabel", seed=SEED, workers=1)
    make_phantoms(tmp_path / "many", num_images=30, task="multilabel", seed=SEED, workers=2)
    few, many = (rows_of(tmp_path / name) for name in ("few", "many"))
    assert {path.name for path in (tmp_path / "few").iterdir()} == {
        "images",
        "labels.csv",
        "README.txt",
    }
    assert tuple(few[0]) == ("path", "patient", *FINDINGS)
    assert len(many) == 30 and many[:10] == few
    for row, p in zip(few, islice(plan_findings(SEED), 10), strict=True):
        assert row["path"] == f"images/phantom-{p.patient:06d}-{p.image + 1}.png"
        assert row["patient"] == f"PHANTOM-{p.patient:06d}"
        labels = draw_labels(SEED, p)
        assert [row[name] for name in FINDINGS] == [{1: "1", 0: "0", -1: ""}[x] for x in labels]
        one, other = (tmp_path / name / row["path"] for name in ("few", "many"))
        assert one.read_bytes() == other.read_bytes()


def test_multiclass_draws_the_images_of_binary_into_three_folders(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "two", num_images=20, seed=SEED, workers=1)
    make_phantoms(tmp_path / "three", num_images=20, task="multiclass", seed=SEED, workers=1)
    two = {Path(path).name: digest for path, digest in hashes(tmp_path / "two").items()}
    three = hashes(tmp_path / "three")
    assert {Path(path).name: digest for path, digest in three.items()} == two
    folder_of = {"IM": "NORMAL", "bacteria": "BACTERIAL", "virus": "VIRAL"}
    for path in map(Path, three):
        kind = path.stem.split("-")[1] if "IM" in path.stem else path.stem.split("_")[1]
        assert path.parent.as_posix() == f"train/{folder_of[kind]}"
    assert len({Path(path).parent for path in three}) == 3


def test_phantoms_of_another_task_are_replaced_and_leave_no_empty_folder(tmp_path: Path) -> None:
    for task, names in (
        ("multilabel", {"images", "labels.csv"}),
        ("multiclass", {"train"}),
        ("binary", {"train"}),
        ("multilabel", {"images", "labels.csv"}),
    ):
        make_phantoms(tmp_path, num_images=4, task=task, workers=1)  # type: ignore[arg-type]
        assert {path.name for path in tmp_path.iterdir()} == {*names, "README.txt"}
    make_phantoms(tmp_path, num_images=4, workers=1)
    assert {path.name for path in (tmp_path / "train").iterdir()} == {"NORMAL", "PNEUMONIA"}
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.png").write_text("mine")
    with pytest.raises(UserError, match=r"holds images/mine.png, which is no phantom"):
        make_phantoms(tmp_path, num_images=4, task="multilabel", workers=1)


def test_the_readme_says_what_the_folder_holds(tmp_path: Path) -> None:
    make_phantoms(tmp_path, num_images=4, task="multiclass", workers=1)
    assert "train/{NORMAL,BACTERIAL,VIRAL}/" in (tmp_path / "README.txt").read_text()
    make_phantoms(tmp_path, num_images=4, task="multilabel", workers=1)
    readme = (tmp_path / "README.txt").read_text()
    assert "images/ and labels.csv" in readme and "empty in a fifth of cells" in readme
    assert max(map(len, readme.splitlines())) <= 100


def test_dicom_files_with_findings_carry_their_patient(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed (the extra `dicom`)")
    make_phantoms(
        tmp_path, num_images=3, task="multilabel", image_format="dicom", seed=SEED, workers=1
    )
    for row in rows_of(tmp_path):
        assert pydicom.dcmread(tmp_path / row["path"]).PatientID == row["patient"]


def test_the_command_takes_a_task_and_refuses_another(tmp_path: Path) -> None:
    done = run("--task", "multilabel", "--num-images", "3", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "out")) == 3
    done = run("--task", "many", "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    with pytest.raises(UserError, match="--task many: must be one of binary, multiclass, multi"):
        make_phantoms(tmp_path / "new", num_images=4, task="many")  # type: ignore[arg-type]
