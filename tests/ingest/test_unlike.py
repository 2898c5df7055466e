"""What `review.unlike` reads: each image once, patients apart, and one line where it cannot."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.faults.buckets import moto_server, new_bucket, use_endpoint
from xrai.config import Images
from xrai.errors import UserError
from xrai.ingest import unlike
from xrai.ingest.images import decode
from xrai.ingest.unlike import read_unlike
from xrai.store import open_store

IMAGES = Images(size=32)


def write_images(folder: Path, *, num_patients: int = 6, num_each: int = 2) -> Path:
    """Images named as in NIH ChestX-ray14, `num_each` of each patient."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for patient in range(num_patients):
        for visit in range(num_each):
            pixels = generator.integers(0, 256, (40, 50), np.uint8)
            Image.fromarray(pixels).save(folder / f"{patient:08d}_{visit:03d}.png")
    return folder


def test_a_patients_images_are_all_fitted_or_all_held_out(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "own")
    found = read_unlike(str(folder), IMAGES)
    assert found.images.shape == (12, 1, 32, 32) and found.num_patients == 6
    assert found.is_fitted.sum() == 8  # two thirds of the patients
    fitted = {image.tobytes() for image in found.images[found.is_fitted]}
    for patient in range(6):
        own = write_images(tmp_path / f"{patient}")
        for path in own.iterdir():
            if not path.name.startswith(f"{patient:08d}"):
                path.unlink()
        shown = [
            decode(path.read_bytes(), size=32, fit="crop", max_pixels=10**8).tobytes()
            for path in own.iterdir()
        ]
        assert len(shown) == 2 and len({pixels in fitted for pixels in shown}) == 1


def test_files_whose_names_state_no_patient_are_counted(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "own")
    for path in [*folder.iterdir()][:3]:
        path.rename(folder / f"film-{path.name}")
    assert read_unlike(str(folder), IMAGES).num_without_patient == 3


def test_the_same_files_are_the_same_images_wherever_they_are(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "own")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        for path in sorted(folder.iterdir(), reverse=True):
            archive.write(path, f"deep/down/{path.name}")
            archive.write(path, f"again/{path.name}")  # copies count once
    one, other = (read_unlike(str(tmp_path / name), IMAGES) for name in ("own", "packed.zip"))
    assert one.sha256 == other.sha256 and np.array_equal(one.images, other.images)
    assert np.array_equal(one.is_fitted, other.is_fitted)
    (folder / "00000000_000.png").unlink()
    assert read_unlike(str(folder), IMAGES).sha256 != one.sha256


def test_images_of_a_bucket_are_those_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_images(tmp_path / "own")
    with moto_server() as url, new_bucket(url) as bucket:
        use_endpoint(monkeypatch, url)
        store = open_store(f"s3://{bucket}/adults")
        for path in folder.iterdir():
            store.write(f"deep/{path.name}", path.read_bytes())
        found = read_unlike(store.uri, IMAGES)
        with pytest.raises(UserError, match=rf"review\.unlike: .*s3://{bucket}/none"):
            read_unlike(f"s3://{bucket}/none", IMAGES)
    local = read_unlike(str(folder), IMAGES)
    assert (found.source, found.hashes) == (store.uri, local.hashes)
    assert np.array_equal(found.images, local.images)
    assert np.array_equal(found.is_fitted, local.is_fitted)


def test_of_many_files_a_sample_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unlike, "_MAX_FILES", 20)
    folder = write_images(tmp_path / "own", num_patients=30, num_each=1)
    assert read_unlike(str(folder), IMAGES).num_patients == 15


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "there is no file or folder {folder}"),
        (lambda folder: folder.mkdir(), "{folder} holds no files"),
        (
            lambda folder: write_images(folder, num_patients=2, num_each=5),
            "review.unlike = {folder} holds 10 images of 2 patients that can be read: at least 10 "
            "of 3 are needed",
        ),
        (
            lambda folder: (write_images(folder, num_patients=4) / "a.png").write_text("no image"),
            "review.unlike = {folder} holds 8 images of 4 patients that can be read: at least 10 "
            "of 3 are needed; {folder}/a.png is not a JPEG, PNG or DICOM file",
        ),
    ],
    ids=["missing", "empty", "two patients", "unreadable"],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, make: object, message: str
) -> None:
    folder = tmp_path / "own"
    assert callable(make)
    make(folder)
    with pytest.raises(UserError) as caught:
        read_unlike(str(folder), IMAGES)
    said = str(caught.value)
    assert message.format(folder=folder) in said and "\n" not in said
