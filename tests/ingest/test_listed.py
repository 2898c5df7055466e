"""Files and the layout of folders are columns: few bytes a file, whatever a source holds."""

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.rows import MAX_BYTES_AN_IMAGE
from xrai.dataset import rows
from xrai.dataset.rows import Texts
from xrai.ingest import label_rows, listed
from xrai.ingest.labels import lay_out_by_labels, parse_labels
from xrai.ingest.layout import lay_out
from xrai.ingest.listed import Files, SourceFile, TextIndex
from xrai.ingest.patients import PatientKey
from xrai.ingest.plan import list_source
from xrai.ingest.sources import FolderSource

SIZES = (200, 1200)
Growth = Callable[[Callable[[int], object]], float]
FOUND = st.dictionaries(st.text(min_size=1), st.integers(0, 1 << 40), max_size=40)


@given(found=FOUND, run=st.integers(1, 9))
def test_files_are_sorted_by_path_however_they_are_found(found: dict[str, int], run: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listed, "_A_RUN", run)
        patch.setattr(listed, "_AT_A_TIME", 3)
        files = Files.of(found.items())
        expected = sorted(SourceFile(*pair) for pair in found.items())
        assert [*files] == expected
        assert [*files.pairs()] == sorted(found.items())
        assert files[1:4] == expected[1:4] and len(files) == len(found)
        assert [files[k] for k in range(-len(found), 0)] == expected


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> Growth:
    """Bytes of memory at the peak that each further file takes in some work on so many files, but
    for the room for hashes, which takes none until it is written.
    """
    monkeypatch.setattr(listed, "_A_RUN", 128)  # what is bounded is so small that it does not count
    monkeypatch.setattr(listed, "_AT_A_TIME", 4)
    monkeypatch.setattr(rows, "_AT_A_TIME", 16)
    monkeypatch.setattr(rows, "_MAX_RECENT", 16)
    monkeypatch.setattr(label_rows, "_AT_A_TIME", 16)

    def measured(work: Callable[[int], object]) -> float:
        peaks = []
        for size in SIZES:
            gc.collect()
            tracemalloc.start()
            try:
                work(size)
                peaks.append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
        return (peaks[1] - peaks[0]) / (SIZES[1] - SIZES[0]) - rows.HASH_BYTES

    return measured


def name(number: int) -> str:
    if number % 2:
        return f"NORMAL/phantom-IM-{number // 4:08d}-{number:04d}.jpeg"
    return f"PNEUMONIA/phantom-person{number // 4:08d}_bacteria_{number:04d}.jpeg"


def test_a_folder_takes_few_bytes_a_file(tmp_path: Path, growth: Growth) -> None:
    for size in SIZES:
        for kind in ("NORMAL", "PNEUMONIA"):
            (tmp_path / str(size) / kind).mkdir(parents=True)
        for number in range(size):
            (tmp_path / str(size) / name(number)).touch()

    def work(size: int) -> None:
        assert len(list_source(FolderSource(tmp_path / str(size))).layout.rows) == size

    assert growth(work) < MAX_BYTES_AN_IMAGE


@pytest.mark.parametrize(
    "named",
    [
        pytest.param(lambda n: f"{name(n)[:-5]}-{n}.png", id="a patient each"),
        pytest.param(lambda n: f"{name(n // 2)}{'_mask' * (n % 2)}.png", id="masks"),
        pytest.param(lambda n: f"{'' if n % 2 else 'data/'}{name(n // 2)}", id="copies"),
        pytest.param(lambda n: f"{'.' * (n % 2)}{name(n)}", id="hidden"),
        pytest.param(lambda n: name(n) if n % 5 else f"{n}.png", id="outside"),
        pytest.param(lambda n: f"{name(n).partition('/')[0]}/{n}.png", id="unknown patients"),
    ],
)
def test_a_layout_takes_few_bytes_a_file(named: Callable[[int], str], growth: Growth) -> None:
    def work(size: int) -> None:
        files = Files.of((named(number), 1) for number in range(size))
        assert lay_out(files.paths, source="S").rows

    assert growth(work) < MAX_BYTES_AN_IMAGE


def label(number: int) -> str:
    return ("NORMAL", "PNEUMONIA")[number % 2]


@pytest.mark.parametrize(
    ("header", "line"),
    [
        pytest.param("path,label", lambda n: f"{name(n)},{label(n)}", id="labels"),
        pytest.param(
            "path,label",
            lambda n: f"/x/{name(n)},{label(n)}",
            id="another machine's",
            marks=pytest.mark.ci,
        ),
        pytest.param(
            "path,label,patient,split,subtype,group",
            lambda n: f"{name(n)},{label(n)},{n // 4},{('train', 'val')[n // 4 % 2]},,north",
            id="all columns",
            marks=pytest.mark.ci,
        ),
        pytest.param(
            "path,Edema,Mass", lambda n: f"{name(n)},{n % 2},{n // 2 % 2 or ''}", id="findings"
        ),
        pytest.param(
            "path,findings", lambda n: f"{name(n)},{('Edema', 'Edema|Mass?')[n % 2]}", id="names"
        ),
    ],
)
def test_a_table_takes_few_bytes_a_row(
    header: str, line: Callable[[int], str], growth: Growth
) -> None:
    def work(size: int) -> None:
        lines = "".join(f"{line(number)}\n" for number in range(size))
        table = parse_labels(f"{header}\n{lines}", name="t.csv")
        del lines
        files = Files.of((name(number), 1) for number in range(size))
        layout = lay_out_by_labels(files.paths, table, source="S", key=PatientKey())
        assert len(layout.rows) == size

    assert growth(work) < MAX_BYTES_AN_IMAGE


@given(
    texts=st.lists(st.text("ab./é", max_size=4), max_size=30), wanted=st.text("ab./é", max_size=4)
)
def test_an_index_finds_all_places_of_a_text(texts: list[str], wanted: str) -> None:
    index = TextIndex(Texts.of(texts), str.upper)
    places = [place for place, text in enumerate(texts) if text.upper() == wanted.upper()]
    assert [*index.places(wanted.upper())] == places
    assert (wanted.upper() in index) == bool(places)
