"""The sources and the limit that preprocessing is measured on."""

import io
from pathlib import Path

import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from benchmarks.preprocess import label_of, list_pictures, name_copy, reduction, repeat
from xrai.ingest.images import _reduce_on_load, decode
from xrai.ingest.layout import parse_name
from xrai.ingest.sources import hash_of


def jpeg(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name", ["IM-0115-0001.jpeg", "NORMAL2-IM-0416-0001-0002.jpeg", "person7_virus_9.jpeg"]
)
def test_copies_are_other_files_of_the_same_patient(name: str) -> None:
    names = [name_copy(name, copy) for copy in range(12)]
    assert names[0] == name
    assert len(set(names)) == 12
    assert {parse_name(copy) for copy in names} == {parse_name(name)}


def test_copies_have_other_hashes_and_the_same_pixels(tmp_path: Path) -> None:
    original = tmp_path / "given" / "PNEUMONIA" / "person1_bacteria_2.jpeg"
    original.parent.mkdir(parents=True)
    original.write_bytes(jpeg(300, 200))
    found = list_pictures(repeat([original], tmp_path / "made", copies=3))
    contents = [path.read_bytes() for path in found]
    assert len({hash_of(data) for data in contents}) == 3
    assert (
        len({decode(data, size=64, fit="crop", max_pixels=10**6).tobytes() for data in contents})
        == 1
    )
    assert [label_of(str(path)) for path in found] == [1, 1, 1]


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("side", [100, 447, 448, 895, 896, 897, 1791, 1792, 2000])
def test_the_limit_decodes_at_the_size_that_xrai_picks(side: int, size: int) -> None:
    picture = JpegImageFile(io.BytesIO(jpeg(side + 300, side)))
    assert reduction(picture.size, size) == _reduce_on_load(picture, size=size, fit="crop")
