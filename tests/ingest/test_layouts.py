"""The tables of public data sets, in the shape in which they are downloaded, with drawn images."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.dataset.pictures import picture_file
from xrai.config import Labels
from xrai.errors import SourceError
from xrai.ingest.labels import lay_out_by_labels
from xrai.ingest.layout import Layout
from xrai.ingest.layouts import read_table
from xrai.ingest.layouts.vindr import combine
from xrai.ingest.patients import PatientKey
from xrai.ingest.sources import open_source
from xrai.labels import Label, LabelSpec

NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
)
NIH = {
    "00000001_000.png": "Cardiomegaly,0,1,058Y,M,PA",
    "00000001_001.png": "Cardiomegaly|Emphysema,1,1,058Y,M,AP",
    "00000002_000.png": "No Finding,0,2,081Y,M,PA",
    "00000003_000.png": "Emphysema|Pleural_Thickening,0,3,070Y,F,PA",
}
CHEXPERT_HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Edema,"
    "Support Devices\n"
)
CHEXPERT = {
    "train/patient00001/study1/view1_frontal.jpg": "Female,68,Frontal,AP,1.0,,,,1.0",
    "train/patient00002/study2/view1_frontal.jpg": "Female,87,Frontal,PA,,-1.0,1.0,-1.0,",
    "train/patient00002/study2/view2_lateral.jpg": "Female,87,Lateral,,,-1.0,1.0,-1.0,",
    "train/patient00003/study1/view1_frontal.jpg": "Male,41,Frontal,AP,,1.0,0.0,1.0,",
    "valid/patient64541/study1/view1_frontal.jpg": "Male,73,Frontal,AP,0.0,1.0,1.0,0.0,0.0",
}
VINDR_FINDINGS = "Aortic enlargement,Cardiomegaly,Other diseases,No finding"
VINDR_TRAIN = (
    f"image_id,rad_id,{VINDR_FINDINGS}\n"
    "a1,R1,1,0,0,0\na1,R2,1,0,1,0\na1,R3,0,0,0,1\n"
    "b2,R1,0,1,0,0\nb2,R4,0,1,1,0\nb2,R9,0,1,1,0\n"
    "c3,R1,0,0,0,1\nc3,R2,0,0,0,1\nc3,R3,0,0,0,1\n"
)
VINDR_TEST = f"image_id,{VINDR_FINDINGS}\nd4,1,1,1,0\ne5,0,0,0,1\n".replace("diseases", "disease")
RSNA = (
    "patientId,x,y,width,height,Target\n"
    "0004cfab-14fd,,,,,0\n00313ee0-9eaa,,,,,0\n"
    "00436515-870c,264.0,152.0,213.0,379.0,1\n00436515-870c,562.0,152.0,256.0,453.0,1\n"
)
RSNA_DETAILS = (
    "patientId,class\n0004cfab-14fd,No Lung Opacity / Not Normal\n00313ee0-9eaa,Normal\n"
    "00436515-870c,Lung Opacity\n00436515-870c,Lung Opacity\n"
)
COVIDX_TRAIN = (
    "379 1-s2.0-S0929664620300449-gr2_lrg-a.jpg positive cohen\n"
    "ANON8 COVID (3).jpeg positive actmed\n"
    "01ae2cd3 01ae2cd3.png negative rsna\n"
    "01ae2cd3 01ae2cd3.png negative rsna\n"
)
COVIDX_TEST = (
    "419639-003251 MIDRC-RICORD-1C-419639-003251-46647-0.png positive ricord\n"
    "379 c1.png negative rsna\n"
)


def nih(rows: Mapping[str, str]) -> str:
    return NIH_HEADER + "".join(
        f"{name},{cells},2682,2749,0.143,0.143,\n" for name, cells in rows.items()
    )


def chexpert(split: str) -> str:
    rows = (
        f"CheXpert-v1.0-small/{path},{cells}\n"
        for path, cells in CHEXPERT.items()
        if path.startswith(split)
    )
    return CHEXPERT_HEADER + "".join(rows)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Mapping[str, str | None]], Path]:
    """A source of these files: a text, or None for a drawn image."""

    def written(files: Mapping[str, str | None]) -> Path:
        for number, (path, text) in enumerate(files.items()):
            file = tmp_path / "source" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture_file(number) if text is None else text.encode())
        return tmp_path / "source"

    return written


def listed(source: Path, labels: str = "", **keys: Any) -> Layout:
    config, opened = Labels(**keys), open_source(str(source))
    table = read_table(labels, opened, config)
    assert table is not None
    paths = [file.path for file in opened.files()]
    return lay_out_by_labels(paths, table, source=opened.name, key=PatientKey(), config=config)


def told(layout: Layout) -> dict[str, tuple[str, Label]]:
    """File name -> split and label."""
    return {entry.path.rpartition("/")[2]: (entry.split, entry.label) for entry in layout.rows}


def refused(source: Path, labels: str = "", **keys: Any) -> str:
    with pytest.raises(SourceError) as caught:
        listed(source, labels, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------ NIH


def nih_files(table: str = nih(NIH)) -> dict[str, str | None]:
    images = dict.fromkeys((f"images_00{k % 2 + 1}/images/{name}" for k, name in enumerate(NIH)))
    train = "".join(f"{name}\n" for name in list(NIH)[:3])
    lists: dict[str, str | None] = {
        "train_val_list.txt": train,
        "test_list.txt": "00000003_000.png",
    }
    return {**images, "Data_Entry_2017.csv": table, **lists}


def test_nih_gives_findings_patients_and_the_official_test(write: Callable[..., Path]) -> None:
    layout = listed(write(nih_files()), layout="nih")
    assert layout.labels == LabelSpec(
        "multilabel", ("Cardiomegaly", "Emphysema", "Pleural_Thickening")
    )
    assert told(layout) == {
        "00000001_000.png": ("train", (1, 0, 0)),
        "00000001_001.png": ("train", (1, 1, 0)),
        "00000002_000.png": ("train", (0, 0, 0)),
        "00000003_000.png": ("test", (0, 1, 1)),
    }
    assert len({entry.patient for entry in layout.rows}) == 3
    assert all(entry.patient.startswith("patient:") for entry in layout.rows)
    assert layout.not_data == {"not named by Data_Entry_2017.csv": 3}


def test_nih_keys_choose_findings_and_views(write: Callable[..., Path]) -> None:
    source = write(nih_files())
    assert told(listed(source, layout="nih", names="Emphysema"))["00000003_000.png"][1] == (1,)
    layout = listed(source, layout="nih", views="pa")
    assert "00000001_001.png" not in told(layout) and len(layout.rows) == 3
    assert layout.not_data["of views that Data_Entry_2017.csv names and labels.views leaves out"]


def test_nih_without_its_lists_is_carved_by_patient(write: Callable[..., Path]) -> None:
    files = {path: text for path, text in nih_files().items() if not path.endswith("list.txt")}
    layout = listed(write(files), layout="nih")
    assert {entry.split for entry in layout.rows} == {"train"}
    assert layout.notes[0].startswith("there is no train_val_list.txt and no test_list.txt")


def test_an_nih_image_in_both_lists_or_missing_is_refused(write: Callable[..., Path]) -> None:
    files = nih_files()
    source = write({**files, "test_list.txt": "00000003_000.png\n00000001_000.png\n"})
    assert "line 2: '00000001_000.png' is in both lists" in refused(source, layout="nih")
    source = write(files)
    (source / "images_001/images/00000002_000.png").unlink()
    words = "line 4: there is no file '00000002_000.png' in source"
    assert words in refused(source, layout="nih")
    layout = listed(source, layout="nih", missing="skip")
    assert len(layout.rows) == 3
    assert any(
        note.startswith("1 file that Data_Entry_2017.csv names and") for note in layout.notes
    )


# ------------------------------------------------------------------------------------- CheXpert


def chexpert_files() -> dict[str, str | None]:
    tables = {f"{name}.csv": chexpert(name) for name in ("train", "valid")}
    return {**dict.fromkeys(CHEXPERT), **tables}


def labels_of(layout: Layout) -> list[Label]:
    return [entry.label for entry in layout.rows]


def test_chexpert_gives_frontal_views_and_both_tables(write: Callable[..., Path]) -> None:
    layout = listed(write(chexpert_files()), layout="chexpert")
    assert layout.labels.classes == (
        *("Enlarged Cardiomediastinum", "Cardiomegaly", "Edema"),
        "Support Devices",
    )
    assert [entry.path for entry in layout.rows] == [
        path for path in CHEXPERT if "lateral" not in path
    ]
    assert [entry.split for entry in layout.rows] == ["train", "train", "train", "val"]
    assert labels_of(layout) == [(0, 0, 0, 1), (-1, 1, -1, 0), (1, 0, 1, 0), (1, 1, 0, 0)]
    assert len({entry.patient for entry in layout.rows}) == 4
    assert layout.not_data == {
        "not named by train.csv and valid.csv": 2,
        "of views that train.csv and valid.csv names and labels.views leaves out": 1,
    }


def test_chexperts_policies_are_settable(write: Callable[..., Path]) -> None:
    source = write(chexpert_files())

    def labels(**keys: Any) -> list[Label]:
        return labels_of(listed(source, layout="chexpert", **keys))

    assert labels(uncertain="positive")[1] == (1, 1, 1, 0)
    assert labels(uncertain="negative")[1] == (0, 1, 0, 0)
    assert labels(blank="unknown")[0] == (-1, -1, -1, 1)
    assert len(labels(views="all")) == 5
    assert labels(views="pa") == [(-1, 1, -1, 0)]
    assert labels(names="Edema|Cardiomegaly")[1] == (-1, 1)


@pytest.mark.parametrize("above", ["", "CheXpert-v1.0-small/", "data/chexpert/"])
def test_chexpert_is_found_wherever_its_folder_stands(
    write: Callable[..., Path], above: str
) -> None:
    source = write({above + path: text for path, text in chexpert_files().items()})
    assert len(listed(source, layout="chexpert").rows) == 4
    beside = listed(source, str(source / f"{above}train.csv"), layout="chexpert")
    assert [*beside.rows] == [*listed(source, layout="chexpert").rows]
    only = listed(source, str(source / f"{above}valid.csv"), layout="chexpert")
    assert {entry.split for entry in only.rows} == {"val"}
    (source / f"{above}valid.csv").rename(source / f"{above}test_labels.csv")
    tested = listed(source, str(source / f"{above}train.csv"), layout="chexpert")
    assert {entry.split for entry in tested.rows} == {"train", "test"}


# ----------------------------------------------------------------------------------------- RSNA


def rsna_files(table: str = RSNA) -> dict[str, str | None]:
    ids = ("0004cfab-14fd", "00313ee0-9eaa", "00436515-870c")
    return {
        **dict.fromkeys(f"stage_2_train_images/{name}.dcm" for name in ids),
        "stage_2_train_labels.csv": table,
        "stage_2_detailed_class_info.csv": RSNA_DETAILS,
    }


def test_rsna_takes_the_rows_of_an_image_as_one(write: Callable[..., Path]) -> None:
    layout = listed(write(rsna_files()), layout="rsna")
    assert layout.labels == LabelSpec("binary", ("No Lung Opacity", "Lung Opacity"))
    assert told(layout) == {
        "0004cfab-14fd.dcm": ("train", 0),
        "00313ee0-9eaa.dcm": ("train", 0),
        "00436515-870c.dcm": ("train", 1),
    }
    assert len({entry.patient for entry in layout.rows}) == 3


@pytest.mark.parametrize("stray", [".DS_Store", "stage_2_train_images/.DS_Store", "LICENSE"])
def test_a_file_without_suffix_is_no_image_that_is_missing(
    write: Callable[..., Path], stray: str
) -> None:
    files = rsna_files() | dict.fromkeys([stray])
    del files["stage_2_train_images/00436515-870c.dcm"]
    layout = listed(write(files), layout="rsna", missing="skip")
    assert sorted(told(layout)) == ["0004cfab-14fd.dcm", "00313ee0-9eaa.dcm"]
    assert "there is no file '00436515-870c'" in refused(write(files), layout="rsna")


def test_rsnas_three_classes_are_those_of_the_second_table(write: Callable[..., Path]) -> None:
    source = write(rsna_files())
    for labels in ("", str(source), str(source / "stage_2_train_labels.csv")):
        layout = listed(source, labels, layout="rsna", target="subtype")
        assert layout.labels == LabelSpec(
            "multiclass", ("Normal", "Lung Opacity", "No Lung Opacity / Not Normal")
        )
        assert labels_of(layout) == [2, 0, 1]


def test_rsnas_three_classes_need_the_second_table(write: Callable[..., Path]) -> None:
    files = rsna_files()
    del files["stage_2_detailed_class_info.csv"]
    words = "takes the classes of stage_2_detailed_class_info.csv: not found"
    assert words in refused(write(files), layout="rsna", target="subtype")


def test_rsna_rows_of_a_patient_that_contradict_are_refused(write: Callable[..., Path]) -> None:
    table = RSNA.replace("870c,562.0,152.0,256.0,453.0,1", "870c,,,,,0")
    files = {**rsna_files(table)}
    del files["stage_2_detailed_class_info.csv"]
    words = "line 5: '00436515-870c' contradicts stage_2_train_labels.csv, line 4, which says label"
    assert words in refused(write(files), layout="rsna")


# ---------------------------------------------------------------------------------------- VinDr


def vindr_files(train: str = VINDR_TRAIN) -> dict[str, str | None]:
    images = ("train/a1", "train/b2", "train/c3", "test/d4", "test/e5")
    return {
        **dict.fromkeys(f"{name}.dicom" for name in images),
        "annotations/image_labels_train.csv": train,
        "annotations/image_labels_test.csv": VINDR_TEST,
    }


@pytest.mark.parametrize(
    ("readers", "labels"),
    [
        ("majority", [(1, 0, 0), (0, 1, 1), (0, 0, 0)]),
        ("any", [(1, 0, 1), (0, 1, 1), (0, 0, 0)]),
        ("all", [(0, 0, 0), (0, 1, 0), (0, 0, 0)]),
        ("agree", [(-1, 0, -1), (0, 1, -1), (0, 0, 0)]),
    ],
)
def test_vindrs_readers_come_to_one_label(
    write: Callable[..., Path], readers: str, labels: list[Label]
) -> None:
    source = write(vindr_files())
    config = Labels(layout="vindr", readers=readers)  # type: ignore[arg-type]
    table = read_table("", open_source(str(source)), config)
    assert table and table.findings == ("Aortic enlargement", "Cardiomegaly", "Other diseases")
    assert [row.findings for row in table.labels if row.cells["split"] == "train"] == labels


def test_vindr_gives_train_and_test(write: Callable[..., Path]) -> None:
    layout = listed(write(vindr_files()), layout="vindr")
    assert told(layout) == {
        "a1.dicom": ("train", (1, 0, 0)),
        "b2.dicom": ("train", (0, 1, 1)),
        "c3.dicom": ("train", (0, 0, 0)),
        "d4.dicom": ("test", (1, 1, 1)),
        "e5.dicom": ("test", (0, 0, 0)),
    }


def test_vindrs_test_is_read_beside_the_table_of_train(write: Callable[..., Path]) -> None:
    source = write(vindr_files())
    tables = (str(source / f"annotations/image_labels_{each}.csv") for each in ("train", "test"))
    beside, only = (listed(source, table, layout="vindr") for table in tables)
    assert told(beside) == told(listed(source, layout="vindr"))
    assert told(only).keys() == {"d4.dicom", "e5.dicom"}


@pytest.mark.parametrize("layout", ["chexpert", "vindr"])
def test_a_table_beside_the_named_one_is_left_out_where_its_images_are(
    write: Callable[..., Path], layout: Any
) -> None:
    files = chexpert_files() if layout == "chexpert" else vindr_files()
    source = write({path: text for path, text in files.items() if "train/" in path or text})
    (named,) = source.rglob("*train.csv")
    found = listed(source, str(named), layout=layout)
    assert len(found.rows) == 3 and {entry.split for entry in found.rows} == {"train"}
    other = "valid.csv" if layout == "chexpert" else "image_labels_test.csv"
    assert f"{other} is not used, as source has none of its images" in found.notes


def test_vindr_of_children_has_one_reader_and_numbered_images(write: Callable[..., Path]) -> None:
    header = "image_id,rad_ID,No finding,Bronchitis,Brocho-pneumonia,Other disease\n"
    layout = listed(
        write(
            {
                **dict.fromkeys(
                    f"{split}/00000{k}.jpg" for split in ("Train", "Test") for k in "012"
                ),
                "image_labels_train.csv": header
                + "000000,R1,0,1.0,0,0\n000001,R2,0,0,1,1\n000002,R2,1,0,0,0\n",
                "image_labels_test.csv": header + "000000,R1,0,0,0,1\n000001,R2,1,0,0,0\n",
            }
        ),
        layout="vindr",
    )
    assert layout.labels.classes == ("Bronchitis", "Brocho-pneumonia", "Other disease")
    assert {entry.path: entry.label for entry in layout.rows} == {
        "Train/000000.jpg": (1, 0, 0),
        "Train/000001.jpg": (0, 1, 1),
        "Train/000002.jpg": (0, 0, 0),
        "Test/000000.jpg": (0, 0, 1),
        "Test/000001.jpg": (0, 0, 0),
    }


def test_readers_who_do_not_know_do_not_count() -> None:
    assert combine([-1, 1, -1], "all") == 1
    assert combine([-1, -1], "any") == -1
    assert combine([1, 0], "majority") == 0


# --------------------------------------------------------------------------------------- COVIDx


def covidx_files(train: str = COVIDX_TRAIN) -> dict[str, str | None]:
    images = (
        *("train/1-s2.0-S0929664620300449-gr2_lrg-a.jpg", "train/COVID (3).jpeg"),
        *("train/01ae2cd3.png", "test/MIDRC-RICORD-1C-419639-003251-46647-0.png", "test/c1.png"),
    )
    return {**dict.fromkeys(images), "train.txt": train, "test.txt": COVIDX_TEST}


def test_covidx_lists_give_classes_splits_and_patients(write: Callable[..., Path]) -> None:
    layout = listed(write(covidx_files()), layout="covidx")
    assert layout.labels == LabelSpec("binary", ("negative", "positive"))
    assert {entry.path: (entry.split, entry.label) for entry in layout.rows} == {
        "test/MIDRC-RICORD-1C-419639-003251-46647-0.png": ("test", 1),
        "test/c1.png": ("test", 0),
        "train/01ae2cd3.png": ("train", 0),
        "train/1-s2.0-S0929664620300449-gr2_lrg-a.jpg": ("train", 1),
        "train/COVID (3).jpeg": ("train", 1),
    }
    groups = {entry.patient.partition(":")[0] for entry in layout.rows}
    assert groups == {"cohen", "actmed", "rsna", "ricord"}


def test_covidx_a_has_three_classes_and_any_name_of_its_lists(write: Callable[..., Path]) -> None:
    source = write(
        {
            **dict.fromkeys(f"train/{k}.png" for k in "abc"),
            **dict.fromkeys(f"test/{k}.png" for k in "de"),
            "labels/train_COVIDx9A.txt": "1 a.png COVID-19 x\n2 b.png normal\n3 c.png pneumonia\n",
            "labels/test_COVIDx9A.txt": "4 d.png normal\n5 e.png COVID-19\n",
        }
    )
    for labels in ("", str(source / "labels" / "train_COVIDx9A.txt")):
        layout = listed(source, labels, layout="covidx")
        assert layout.labels == LabelSpec("multiclass", ("normal", "COVID-19", "pneumonia"))
        assert labels_of(layout) == [0, 1, 1, 0, 2]


# ------------------------------------------------------------------------------------------ all


# A layout's table, and the files of a source that has it
SOURCES: Mapping[str, tuple[str, Callable[[str], dict[str, str | None]]]] = {
    "nih": (nih(NIH), nih_files),
    "chexpert": (chexpert("train"), lambda table: {**chexpert_files(), "train.csv": table}),
    "rsna": (RSNA, rsna_files),
    "vindr": (VINDR_TRAIN, vindr_files),
    "covidx": (COVIDX_TRAIN, covidx_files),
}


@pytest.mark.parametrize(
    ("layout", "old", "new", "words"),
    [
        (
            "nih",
            "No Finding",
            "Infiltraton",
            "2017.csv, line 4: unknown finding 'Infiltraton'; did you mean Infiltration?",
        ),
        ("nih", "No Finding", "No Finding|Mass", "line 4: findings 'No Finding|Mass' says none"),
        ("nih", "Finding Labels", "Finding", "is 'finding' meant as finding labels?"),
        (
            "nih",
            "00000002_000.png",
            "00000009_000.png",
            "line 4: '00000009_000.png' is in none of the lists of splits",
        ),
        (
            "nih",
            "00000001_001.png,Cardiomegaly|Emphysema,1",
            "00000001_000.png,Mass,1",
            "line 3: '00000001_000.png' contradicts Data_Entry_2017.csv, line 2",
        ),
        (
            "chexpert",
            "68,Frontal,AP,1.0,,,,1.0",
            "68,Frontal,AP,1.0,,,,2.0",
            "line 2: Support Devices is '2.0'",
        ),
        ("chexpert", "Path,", "Pathe,", "is 'pathe' meant as path?"),
        (
            "chexpert",
            "patient00003/",
            "subject3/",
            "line 5: path 'CheXpert-v1.0-small/train/subject3/study1/",
        ),
        (
            "chexpert",
            "Edema",
            "Oedema",
            "train.csv has an unknown column 'Oedema'; did you mean Edema?",
        ),
        ("rsna", ",,,,,0\n00313", ",,,,,2\n00313", "line 2: Target is '2', allowed are 0 and 1"),
        (
            "rsna",
            "870c,562.0,152.0,256.0,453.0,1",
            "870c,,,,,0",
            "line 5: '00436515-870c' has Target 0, but is 'Lung Opacity' in stage_2_detailed",
        ),
        ("rsna", "Target", "Targets", "is 'targets' meant as target?"),
        (
            "rsna",
            "00313ee0-9eaa",
            "10313ee0-9eaa",
            "line 3: there is no file '10313ee0-9eaa' in source",
        ),
        ("vindr", "a1,R2,1,0,1,0", "a1,R2,1,x,1,0", "line 3: Cardiomegaly is 'x', allowed are 1"),
        ("vindr", "a1,R2", "a1,R1", "line 3: 'a1' has a row of the same reader in line 2"),
        (
            "vindr",
            "Cardiomegaly",
            "Cardiomegly",
            "image_labels_test.csv has no column 'Cardiomegly', as the ",
        ),
        (
            "vindr",
            "c3,R3,0,0,0,1",
            "c3,R3,0,0",
            "1 row of image_labels_train.csv cannot be used: line 10: has 4 cells, the first line",
        ),
        ("chexpert", ",1.0,,,,1.0\n", ",1.0\n", "line 2: has 6 cells, the first line 10"),
        ("vindr", "image_id", "image", "is 'image' meant as image_id?"),
        (
            "covidx",
            "(3).jpeg positive",
            "(3).jpeg postive",
            "train.txt, line 2: unknown class 'postive'; did you mean positive?",
        ),
        (
            "covidx",
            "01ae2cd3.png negative rsna\n01",
            "01ae2cd3.png positive rsna\n01",
            "line 4: '01ae2cd3.png' contradicts train.txt, line 3, which says label 'positive'",
        ),
        (
            "covidx",
            "ANON8 COVID (3).jpeg",
            "ANON8 x.jpeg",
            "line 2: there is no file 'x.jpeg' in source",
        ),
    ],
)
def test_a_wrong_table_is_refused_by_its_line(
    write: Callable[..., Path], layout: str, old: str, new: str, words: str
) -> None:
    table, files = SOURCES[layout]
    assert words in refused(write(files(table.replace(old, new))), layout=layout)


@pytest.mark.parametrize("layout", SOURCES)
def test_a_table_of_a_layout_that_is_not_named_gets_its_name(
    write: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    table = tmp_path / "own.csv"
    table.write_text(SOURCES[layout][0])
    source = open_source(str(write({"a.png": None})))
    hint = f"this looks like a table of {layout}, which --labels.layout={layout} reads as it is"
    if layout == "chexpert":  # it has a column path, too
        found = read_table(str(table), source, Labels())
        assert found and f"own.csv: {hint}" in found.notes
        return
    with pytest.raises(SourceError) as caught:
        read_table(str(table), source, Labels())
    assert str(caught.value).endswith(f"; {hint}")


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("nih", "Data_Entry_2017.csv"),
        ("chexpert", "train.csv"),
        ("rsna", "stage_2_train_labels.csv"),
        ("vindr", "image_labels_train.csv"),
        ("covidx", "train.txt"),
    ],
)
def test_a_layout_without_its_table_says_which_one(
    write: Callable[..., Path], layout: str, name: str
) -> None:
    source = write({"a.png": None})
    assert f"there is no {name} in source, which labels.layout = {layout} reads" in refused(
        source, layout=layout
    )
    assert "there is no file --labels" in refused(source, "nowhere.csv", layout=layout)


def test_two_tables_that_may_be_meant_are_refused(write: Callable[..., Path]) -> None:
    files = {**covidx_files(), "train_COVIDx9A.txt": COVIDX_TRAIN}
    assert "name one by --labels FILE" in refused(write(files), layout="covidx")
