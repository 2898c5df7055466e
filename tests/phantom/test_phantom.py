"""The phantoms: named and laid out as promised, the same whoever draws them, and told apart by
the lungs alone.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from xrai.errors import StoreError, UserError
from xrai.labels import Task
from xrai.phantom import Phantom, anatomy, draw_phantom, encode, folder, make_phantoms, plan
from xrai.phantom import draw as phantom
from xrai.phantom.folder import LEAST

Film = npt.NDArray[np.floating]
SEED = 11


def first(num_images: int, *, seed: int = SEED) -> list[Phantom]:
    return list(islice(plan(seed), num_images))


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "train").rglob("*"))
        if path.is_file()
    }


def auroc(labels: npt.NDArray[np.bool_], scores: npt.NDArray[np.floating]) -> float:
    """The share of (pneumonia, normal) pairs that the score puts in order; ties count half."""
    positive, negative = scores[labels][:, None], scores[~labels][None, :]
    return float(((positive > negative) + 0.5 * (positive == negative)).mean())


@pytest.fixture(scope="module")
def films() -> tuple[npt.NDArray[np.bool_], list[Film]]:
    phantoms = first(300)
    return np.array([p.kind != "normal" for p in phantoms]), [
        draw_phantom(SEED, p) for p in phantoms
    ]


# ------------------------------------------------------------------------------------ what is drawn


def test_more_images_or_other_workers_leave_the_first_ones_byte_for_byte_the_same(
    tmp_path: Path,
) -> None:
    make_phantoms(tmp_path / "few", num_images=12, seed=SEED, workers=1)
    make_phantoms(tmp_path / "many", num_images=30, seed=SEED, workers=2)
    few, many = hashes(tmp_path / "few"), hashes(tmp_path / "many")
    assert len(few) == 12 and len(many) == 30
    assert few == {path: many[path] for path in few}


def test_another_seed_draws_other_images() -> None:
    mine, other = first(1)[0], first(1, seed=SEED + 1)[0]
    assert encode(SEED, mine, draw_phantom(SEED, mine), image_format="png") != encode(
        SEED + 1, other, draw_phantom(SEED + 1, other), image_format="png"
    )


def test_the_strips_an_image_is_computed_in_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    phantoms = first(24)
    in_strips = [draw_phantom(SEED, p) for p in phantoms]
    monkeypatch.setattr(phantom, "_PIXELS_A_STRIP", 10**9)
    for p, film in zip(phantoms, in_strips, strict=True):
        np.testing.assert_allclose(film, draw_phantom(SEED, p), atol=2e-3, err_msg=str(p))


def test_forty_of_a_hundred_are_normal_and_patients_have_one_to_four_images() -> None:
    phantoms = first(600)
    kinds = Counter(p.kind for p in phantoms)
    assert 0.35 < kinds["normal"] / 600 < 0.45
    assert kinds["bacteria"] > kinds["virus"] > 60
    assert set(Counter(p.patient for p in phantoms).values()) == {1, 2, 3, 4}
    assert len({p.stem for p in phantoms}) == 600


@pytest.mark.parametrize("seed", range(5))
def test_two_images_already_hold_both_classes_and_ten_all_kinds(seed: int) -> None:
    assert {p.label for p in first(2, seed=seed)} == {"NORMAL", "PNEUMONIA"}
    assert {p.kind for p in first(10, seed=seed)} == {"normal", "bacteria", "virus"}


def test_a_patient_keeps_the_body_and_changes_the_pose() -> None:
    images = [
        p for p in first(60) if p.patient == next(q.patient for q in first(60) if q.image == 1)
    ]
    assert len({p.kind for p in images}) == 1
    shapes = {draw_phantom(SEED, p).shape for p in images}
    assert len(shapes) == len(images) > 1


def test_images_are_160_to_320_wide_not_square_and_use_the_grey_scale(
    films: tuple[npt.NDArray[np.bool_], list[Film]],
) -> None:
    for film in films[1]:
        height, width = film.shape
        assert film.dtype == np.float32
        assert 160 <= width <= 320 and 0.84 < width / height < 1.46
        assert film.min() >= 0 and film.max() <= 1 and np.ptp(film) > 0.4
    assert np.mean([film.shape[0] != film.shape[1] for film in films[1]]) > 0.9


def test_full_size_images_are_1000_to_2500_wide() -> None:
    widths = [draw_phantom(SEED, p, full_size=True).shape[1] for p in first(5)]
    assert all(1000 <= width <= 2500 for width in widths)
    assert max(widths) > 1400


# ---------------------------------------------------------------------- nothing but the lungs tells


def border(film: Film) -> Film:
    edge = max(2, round(0.06 * min(film.shape)))
    inner = np.zeros(film.shape, dtype=bool)
    inner[edge:-edge, edge:-edge] = True
    return film[~inner]


def test_the_measure_of_a_shortcut_can_find_one(
    films: tuple[npt.NDArray[np.bool_], list[Film]],
) -> None:
    labels, pictures = films
    leaking = [film + 0.1 * label for label, film in zip(labels, pictures, strict=True)]
    assert auroc(labels, labels.astype(float)) == 1
    assert auroc(labels, np.array([border(film).mean() for film in leaking])) > 0.7


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("width", 0.1),
        ("height", 0.1),
        ("aspect", 0.1),
        ("brightest", 0.1),
        ("spread", 0.1),
        ("border mean", 0.1),
        ("border spread", 0.1),
        ("mean", 0.15),
    ],
)
def test_no_simple_measure_tells_the_classes(
    films: tuple[npt.NDArray[np.bool_], list[Film]], name: str, tolerance: float
) -> None:
    measures: dict[str, Callable[[Film], float]] = {
        "width": lambda film: film.shape[1],
        "height": lambda film: film.shape[0],
        "aspect": lambda film: film.shape[1] / film.shape[0],
        "brightest": np.max,
        "spread": np.std,
        "border mean": lambda film: border(film).mean(),
        "border spread": lambda film: border(film).std(),
        "mean": np.mean,
    }
    scores = np.array([measures[name](film) for film in films[1]], dtype=float)
    assert abs(auroc(films[0], scores) - 0.5) < tolerance


def test_the_same_body_in_the_same_pose_is_brighter_in_its_lungs_when_ill_and_equal_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    healthy_disease = anatomy.Disease()
    draw_disease = anatomy.draw_disease
    for p in [p for p in first(30) if p.kind != "normal"]:
        ill = draw_phantom(SEED, p)
        monkeypatch.setattr(phantom, "draw_disease", lambda rng, kind: healthy_disease)
        well = draw_phantom(SEED, p)
        monkeypatch.setattr(phantom, "draw_disease", draw_disease)
        difference = ill - well
        assert difference.mean() > 0.001, p
        assert difference.max() > 0.05, p
        assert np.median(np.abs(border(difference))) < 1e-6, p


# --------------------------------------------------------------------------------------- the folder


def test_names_and_layout_follow_the_public_data_set_behind_a_prefix(tmp_path: Path) -> None:
    make_phantoms(tmp_path, num_images=25, seed=SEED, image_format="jpeg", workers=1)
    assert {path.name for path in tmp_path.iterdir()} == {"README.txt", "train"}
    assert {path.name for path in (tmp_path / "train").iterdir()} == {"NORMAL", "PNEUMONIA"}
    names = {
        label: sorted(p.name for p in (tmp_path / "train" / label).iterdir())
        for label in ("NORMAL", "PNEUMONIA")
    }
    assert sum(map(len, names.values())) == 25
    assert all(re.fullmatch(r"phantom-IM-\d{4}-\d{4}\.jpeg", name) for name in names["NORMAL"])
    assert all(
        re.fullmatch(r"phantom-person\d+_(bacteria|virus)_\d+\.jpeg", name)
        for name in names["PNEUMONIA"]
    )
    with Image.open(tmp_path / "train" / "NORMAL" / names["NORMAL"][0]) as picture:
        assert picture.format == "JPEG" and picture.mode == "L"
    readme = (tmp_path / "README.txt").read_text()
    assert "phantoms" in readme.splitlines()[0]
    assert "images: 25\n" in readme and f"seed: {SEED}\n" in readme


def test_a_folder_of_phantoms_is_drawn_anew_and_holds_no_old_ones(tmp_path: Path) -> None:
    make_phantoms(tmp_path, num_images=12, seed=1, image_format="jpeg", workers=1)
    make_phantoms(tmp_path, num_images=6, seed=2, workers=1)
    assert len(hashes(tmp_path)) == 6
    assert all(path.endswith(".png") for path in hashes(tmp_path))


def test_images_are_not_synced_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    make_phantoms(tmp_path / "out", num_images=12, seed=0, workers=1)
    assert len(synced) == 1  # README.txt


@pytest.mark.parametrize(
    "foreign",
    [
        "notes.txt",
        "train/NORMAL/IM-0001-0001.jpeg",
        "train/OTHER/phantom-1.png",
        "README.txt",
        "labels.csv",
    ],
)
def test_a_folder_that_holds_anything_else_is_refused_and_kept(
    tmp_path: Path, foreign: str
) -> None:
    make_phantoms(tmp_path, num_images=4, workers=1)
    before = hashes(tmp_path)
    (tmp_path / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / foreign).write_text("mine\n")
    with pytest.raises(UserError, match=re.escape(f"holds {foreign}, which is no phantom")):
        make_phantoms(tmp_path, num_images=2, seed=5, workers=1)
    assert (tmp_path / foreign).read_text() == "mine\n"
    assert before.items() <= hashes(tmp_path).items()


def test_no_more_phantoms_are_planned_than_are_drawn_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_planned = 0

    def count(seed: int) -> Iterator[Phantom]:
        nonlocal num_planned
        for each in plan(seed):
            num_planned += 1
            yield each

    monkeypatch.setattr(folder, "plan", count)
    monkeypatch.setattr(folder, "_draw_files", Mock(side_effect=OSError(28, "No space left")))
    monkeypatch.setattr(folder, "start_pool", lambda workers, _: ThreadPoolExecutor(workers))
    with pytest.raises(StoreError, match="No space left"):
        make_phantoms(tmp_path, num_images=5000, workers=2)
    assert num_planned <= 100


def test_a_link_inside_the_folder_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "NORMAL").mkdir(parents=True)
    (elsewhere / "NORMAL" / "phantom-IM-0001-0001.png").write_text("keep")
    out = tmp_path / "out"
    out.mkdir()
    (out / "train").symlink_to(elsewhere)
    with pytest.raises(UserError, match="holds train, which is no phantom"):
        make_phantoms(out, num_images=2, workers=1)
    assert (elsewhere / "NORMAL" / "phantom-IM-0001-0001.png").read_text() == "keep"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 1}, "--num-images 1: at least 2 are needed, so that each class has one"),
        ({"num_images": 3, "task": "multiclass"}, "--num-images 3: at least 4 are needed, so that"),
        ({"num_images": 1, "task": "multilabel"}, "--num-images 1: at least 2 are needed (default"),
        ({"seed": -3}, "--seed -3: must be 0 or more"),
        ({"workers": -1}, "--workers -1"),
        ({"image_format": "gif"}, "--format gif: must be one of png, jpeg, dicom"),
    ],
)
def test_a_value_out_of_range_is_refused_before_anything_is_made(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    arguments: dict[str, object] = {"num_images": 4, **changes}
    with pytest.raises(UserError, match=re.escape(message)):
        make_phantoms(tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_the_fewest_images_show_every_class(tmp_path: Path, task: Task) -> None:
    make_phantoms(tmp_path, num_images=LEAST[task], task=task, workers=1)
    folders = [*(tmp_path / "train").iterdir()]
    assert len(folders) == (2 if task == "binary" else 3)
    assert all(any(folder.iterdir()) for folder in folders)


def test_a_destination_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        make_phantoms(tmp_path / "file", num_images=2)
    with pytest.raises(UserError, match="cannot be written"):
        make_phantoms(tmp_path / "file" / "below", num_images=2)


def test_a_run_killed_midway_leaves_no_readme_no_half_image_and_no_process_and_can_be_repeated(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "xrai.phantom", "--num-images", "100000", "--workers", "2"]
    process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.DEVNULL)
    children: list[int] = []
    try:
        deadline = time.monotonic() + 30
        while len(list(out.glob("train/*/phantom-*.png"))) < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        listing = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        children = [int(pid) for pid in listing.read_text().split()] if listing.exists() else []
        assert len(children) >= 2 or not listing.exists()
    finally:
        process.kill()
        process.wait()
    assert not (out / "README.txt").exists()
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in children if _runs(pid)]
    pictures = list(out.glob("train/*/phantom-*.png"))
    assert len(pictures) >= 5
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()
    make_phantoms(out, num_images=2, workers=1)
    assert len(hashes(out)) == 2 and (out / "README.txt").exists()


def _runs(pid: int) -> bool:
    """Whether a process still runs; one that nobody has buried yet does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


# --------------------------------------------------------------------------------- the command line


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xrai.phantom", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_command_draws_and_leaves_0(tmp_path: Path) -> None:
    done = run(
        "--num-images", "4", "--out", str(tmp_path / "out"), "--seed", "3", "--format", "jpeg"
    )
    assert done.returncode == 0, done.stderr
    assert "4 phantoms" in done.stderr
    assert len(hashes(tmp_path / "out")) == 4


def test_a_mistake_on_the_command_line_is_one_line_and_status_2(tmp_path: Path) -> None:
    for arguments in (["--num-images", "many"], ["--num-images", "0"], ["--speed"]):
        done = run("--out", str(tmp_path / "out"), *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("xrai: error: ") and done.stderr.count("\n") == 1
        assert arguments[-1] in done.stderr
    assert not (tmp_path / "out").exists()


def test_drawing_imports_neither_torch_nor_pydicom() -> None:
    code = "import sys, xrai.phantom; print([m for m in ('torch', 'pydicom') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "[]\n"
    )


# -------------------------------------------------------------------------------------------- DICOM


def test_dicom_without_pydicom_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'xrai\[dicom\]'"):
        make_phantoms(tmp_path / "out", num_images=2, image_format="dicom")
    assert not (tmp_path / "out").exists()


def test_dicom_files_hold_the_same_image_in_12_to_16_bits_and_name_it_a_phantom(
    tmp_path: Path,
) -> None:
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed (the extra `dicom`)")
    make_phantoms(tmp_path, num_images=20, seed=SEED, image_format="dicom", workers=1)
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    assert lines[0] == "path,label,patient,split,subtype" and len(lines) == 21
    interpretations, widths = Counter[str](), Counter[int]()
    for p, line in zip(first(20), lines[1:], strict=True):
        path, label, patient, split, subtype = line.split(",")
        assert (path, label, split) == (f"train/{p.label}/{p.stem}.dcm", p.label, "")
        assert subtype == ("" if p.kind == "normal" else p.kind)
        file = pydicom.dcmread(tmp_path / path)
        assert (file.PatientID, str(file.PatientName)) == (patient, f"PHANTOM^{p.patient:06d}")
        assert patient == f"PHANTOM-{p.patient:06d}"
        assert (file.Modality, file.BodyPartExamined) == ("DX", "CHEST")
        assert (file.PatientOrientation, file.PresentationIntentType) == (
            ["L", "F"],
            "FOR PRESENTATION",
        )
        assert (file.BitsAllocated, file.HighBit, file.SamplesPerPixel) == (
            16,
            file.BitsStored - 1,
            1,
        )
        stored = file.pixel_array
        assert (
            stored.dtype == np.uint16
            and stored.max() < 2**file.BitsStored
            and len(np.unique(stored)) > 256
        )
        interpretations[file.PhotometricInterpretation] += 1
        widths[file.BitsStored] += 1
        # The linear window of the standard (PS3.3 C.11.2.1.2.1) must give back the film.
        shown = (stored - (file.WindowCenter - 0.5)) / (file.WindowWidth - 1) + 0.5
        if file.PhotometricInterpretation == "MONOCHROME1":
            shown = 1 - shown
        np.testing.assert_allclose(shown, draw_phantom(SEED, p), atol=1 / 2000)
    assert interpretations["MONOCHROME2"] > interpretations["MONOCHROME1"] > 0
    assert set(widths) == {12, 14, 16}
