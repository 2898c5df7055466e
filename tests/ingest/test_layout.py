import re
from collections.abc import Sequence
from typing import Any

import pytest

from tests.dataset.pictures import public_names
from xrai.config import Labels
from xrai.errors import SourceError
from xrai.ingest.layout import Layout, lay_out, parse_name
from xrai.labels import Label, LabelSpec


def tree(*folders: str, num: int = 3) -> list[str]:
    return [f"{folder}/{k}.png" for folder in folders for k in range(num)]


def both(*insides: str) -> Layout:
    """The layout of the same folders in both class folders."""
    folders = [f"{name}{inside}" for name in ("NORMAL", "PNEUMONIA") for inside in insides]
    return lay_out(tree(*folders), source="S")


def found(*paths: str) -> list[tuple[str, str, Label]]:
    return [(entry.path, entry.split, entry.label) for entry in lay_out(paths, source="S").rows]


@pytest.mark.parametrize("above", ["", "chest_xray/", "a/b/"])
@pytest.mark.parametrize("splits", [("train",), ("train", "val", "test"), ("train", "test")])
def test_split_and_class_folders_are_found_below_any_folder(
    above: str, splits: tuple[str, ...]
) -> None:
    paths = [
        f"{above}{split}/{name}/{k}.png"
        for split in splits
        for name in ("NORMAL", "PNEUMONIA")
        for k in (0, 1)
    ]
    layout = lay_out(paths, source="S")
    assert [(entry.split, entry.label) for entry in layout.rows] == [
        (path.split("/")[-3], int("PNEU" in path)) for path in sorted(paths)
    ]


def test_class_folders_alone_are_all_train() -> None:
    assert found("NORMAL/a.png", "PNEUMONIA/b.png") == [
        ("NORMAL/a.png", "train", 0),
        ("PNEUMONIA/b.png", "train", 1),
    ]


def test_the_case_of_folders_does_not_matter() -> None:
    assert found("Train/normal/a.png", "train/Pneumonia/b.png") == [
        ("Train/normal/a.png", "train", 0),
        ("train/Pneumonia/b.png", "train", 1),
    ]


def test_the_public_archives_second_copy_of_the_tree_is_passed_over_and_counted() -> None:
    tree = [f"train/{label}/{name}" for label, name in public_names(4, 4)]
    paths = [f"chest_xray/{path}" for path in tree] + [
        f"chest_xray/chest_xray/{path}" for path in tree
    ]
    junk = [
        "__MACOSX/chest_xray/train/NORMAL/._a.jpeg",
        "chest_xray/.DS_Store",
        "chest_xray/train/NORMAL/Thumbs.db",
    ]
    layout = lay_out(paths + junk, source="S")
    assert [entry.path for entry in layout.rows] == sorted(f"chest_xray/{path}" for path in tree)
    assert layout.not_data == {
        "in a second copy of the tree": 8,
        "in __MACOSX": 1,
        "hidden (names that begin with a dot)": 1,
        "Thumbs.db or desktop.ini": 1,
    }
    assert layout.describe_not_data().startswith("11 files are not data: ")


def test_a_file_beside_the_tree_is_not_data_and_is_counted() -> None:
    layout = lay_out(["README.txt", "train/NORMAL/a.png", "train/PNEUMONIA/b.png"], source="S")
    assert len(layout.rows) == 2
    assert layout.not_data == {"outside of the class folders": 1}


@pytest.mark.parametrize(
    "names", [("Training", "Testing"), ("train", "validation"), ("TRAIN", "Valid", "testing")]
)
@pytest.mark.parametrize("order", ["{split}/{label}", "{label}/{split}"])
def test_split_folders_have_other_names_and_may_be_inside_the_class_folders(
    names: tuple[str, ...], order: str
) -> None:
    folders = [
        order.format(split=split, label=label)
        for split in names
        for label in ("NORMAL", "PNEUMONIA")
    ]
    layout = lay_out(tree(*(f"chest/{folder}" for folder in folders)), source="S")
    assert layout.notes == ()
    words = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
    for entry in layout.rows:
        folder = entry.path.lower().split("/")[1 if order.startswith("{s") else 2]
        assert entry.split == words.get(folder, folder)


@pytest.mark.parametrize("labels", [("NORMAL", "PNEUMONIA"), ("normal", "covid")])
@pytest.mark.parametrize("stray", ["train/val", "test/train"])
def test_a_split_folder_inside_another_is_outside_of_the_classes(
    labels: tuple[str, ...], stray: str
) -> None:
    layout = lay_out([*tree(*(f"{label}/train" for label in labels)), f"{stray}/c.png"], source="S")
    assert {entry.split for entry in layout.rows} == {"train"}
    assert layout.not_data == {"outside of the class folders": 1}


def test_a_folder_above_that_is_called_like_a_split_is_none() -> None:
    assert found("Testing/train/NORMAL/a.png")[0][1] == "train"


@pytest.mark.parametrize("name", ["masks", "Masks", "lung_mask", "thumbnails", "@eaDir", "a/Masks"])
def test_masks_and_thumbnails_beside_images_are_left_out_with_a_word(name: str) -> None:
    for beside in ("", "/images"):
        layout = both(beside, f"/{name}")
        assert {entry.path.rpartition("/")[0] for entry in layout.rows} == {
            f"NORMAL{beside}",
            f"PNEUMONIA{beside}",
        }
        assert layout.not_data == {"masks, thumbnails or the like": 6}
        (note,) = layout.notes
        assert note.startswith("6 files are left out") and f"NORMAL/{name}/0.png" in note
        assert "--labels" in note


def test_a_mask_that_is_named_after_an_image_beside_it_is_left_out() -> None:
    films = ["NORMAL/a (1).png", "NORMAL/b.png", "PNEUMONIA/c.jpg", "PNEUMONIA/unmasked.png"]
    masks = ["NORMAL/a (1)_mask.png", "NORMAL/b-left_mask_2.png", "PNEUMONIA/c.thumb.jpg"]
    layout = lay_out(films + masks, source="S")
    assert [entry.path for entry in layout.rows] == films
    assert layout.notes[0].startswith("3 files are left out")


@pytest.mark.parametrize(
    "name",
    ["a1_leftmask", "a1mask", "a1Mask", "a1rightlungmasks", "a1 infectionmask", "a1-predmask"],
)
def test_a_name_that_goes_on_after_an_images_to_mask_is_a_masks(name: str) -> None:
    films = ["NORMAL/a1.png", "NORMAL/b.png", "PNEUMONIA/c.png"]
    layout = lay_out([*films, f"NORMAL/{name}.png"], source="S")
    assert [entry.path for entry in layout.rows] == films
    assert layout.notes[0].startswith("1 file is left out")
    alone = lay_out(["NORMAL/x.png", *films[1:], f"NORMAL/{name}.png"], source="S")
    assert len(alone.rows) == 4


@pytest.mark.parametrize(
    "name",
    [
        *("Maskey_1", "Damaskinos_3", "damask", "unmasked", "nomask", "previewer", "unsegmented"),
        *("segmental", "Subsegmental", "segmentaire", "segmentär", "Segmentectomy"),
    ],
)
def test_a_word_with_mask_or_the_like_in_it_is_none(name: str) -> None:
    layout = both("/Jones", f"/{name}")
    assert len(layout.rows) == 12
    assert layout.not_data == {}


@pytest.mark.parametrize(
    "name",
    [
        *(
            "LungMask",
            "lungmasks",
            "CXR mask 2",
            "Masken",
            "infectionmasks",
            "predmasks",
            "Leftmask",
        ),
        *("maskimages", "masks_png", "ManualMask", "segmented", "segmentacion", "Segmentação"),
        *("lungsegmentation", "annotations", "annotatedimages", "HeatMaps", "heatmapoverlay"),
        *("thumb1", "thumbnails256", "maskoverlay"),
    ],
)
def test_masks_and_the_like_are_known_by_their_words(name: str) -> None:
    assert len(both("", f"/{name}").rows) == 6


def test_a_class_may_be_called_like_masks_where_it_is_named() -> None:
    folders = ("Normal", "Lobar", "Segmented")
    for above in ("", "train/"):
        paths = tree(*(above + folder for folder in folders), num=12)
        layout = lay_out(paths, source="S", config=Labels(names="Normal|Lobar|Segmented"))
        assert layout.labels.classes == folders
        assert len(layout.rows) == 36
    assert classes_of("Normal", "Lobar", "Segmental") == ("Normal", "Lobar", "Segmental")
    layout = lay_out(tree("Normal", "Lobar", "Segmented"), source="S")
    assert layout.notes[0] == (
        "3 images are not used, as outside of the class folders: 3 in 'Segmented/'"
    )


@pytest.mark.parametrize(
    ("folders", "shown"),
    [
        (
            ("siteA/NORMAL", "siteA/TB", "siteB/Healthy", "siteB/TB"),
            "24 images are outside of the class folders of S ('NORMAL', 'TB'): 12 in "
            "'siteB/Healthy/', 12 in 'siteB/TB/'; call",
        ),
        (
            ("train/Healthy", "train/TB", "holdout/normals", "holdout/Tuberculosis"),
            "12 in 'holdout/Tuberculosis/', 12 in 'holdout/normals/'; call",
        ),
        (
            ("train/A", "train/Normal", "x/p", "x/q", "x/r", "x/s"),
            "12 in 'x/r/', and so on in 4 folders; ",
        ),
    ],
)
def test_many_images_outside_of_the_class_folders_are_refused_unless_the_classes_are_named(
    folders: Sequence[str], shown: str
) -> None:
    paths = tree(*folders, num=12)
    with pytest.raises(SourceError, match=re.escape(shown)):
        lay_out(paths, source="S")
    names = "|".join(folder.rpartition("/")[2] for folder in folders[:2])
    layout = lay_out(paths, source="S", config=Labels(names=names))
    assert len(layout.rows) == 24
    assert " not used, as outside of the class folders: 12 in " in layout.notes[0]


@pytest.mark.parametrize(
    ("paths", "note"),
    [
        (["more/1.png"], "1 image is not used, as outside of the class folders: 1 in 'more/'"),
        (["1.dcm", "b/IM0001", "b/1.2.840.1"], "3 images .*: 2 in 'b/', 1 in its top folder"),
        ([f"test/{k}.png" for k in range(99)], "99 images are not used, .*: 99 in 'test/'"),
        ([f"masks/{k}.png" for k in range(99)], "99 images are not used, .*: 99 in 'masks/'"),
        (["LICENSE", "a/notes.txt", "b/model.pt"], None),
    ],
)
def test_few_images_outside_of_the_class_folders_or_told_ones_are_a_note(
    paths: Sequence[str], note: str | None
) -> None:
    layout = lay_out([*tree("train/NORMAL", "train/PNEUMONIA"), *paths], source="S")
    assert len(layout.rows) == 6
    assert len(layout.notes) == bool(note)
    assert not note or re.fullmatch(note, layout.notes[0])


def test_where_there_are_only_masks_they_are_the_images() -> None:
    layout = both("/segmented")
    assert len(layout.rows) == 6
    assert layout.notes == ()


@pytest.mark.parametrize(
    ("insides", "words"),
    [
        (("/images", "/lungs"), "6 in 'images', 6 in 'lungs'"),
        (("", "/cropped"), "6 directly, 6 in 'cropped'"),
        (("/p1/raw", "/p1/crop", "/p2/raw", "/p2/crop"), "12 in 'crop', 12 in 'raw'"),
    ],
)
def test_several_folders_alike_inside_the_class_folders_are_named(
    insides: tuple[str, ...], words: str
) -> None:
    layout = both(*insides)
    assert len(layout.rows) == 6 * len(insides)
    (note,) = layout.notes
    assert words in note and "--labels" in note


@pytest.mark.parametrize(
    "folders",
    [
        ("NORMAL/p1", "NORMAL/p2", "PNEUMONIA/p3", "PNEUMONIA/p2"),
        ("NORMAL/Meier", "NORMAL/Schmidt", "PNEUMONIA/Jones", "PNEUMONIA/Weber"),
        ("NORMAL/1/study1", "NORMAL/1/study2", "PNEUMONIA/2/study1", "PNEUMONIA/2/study2"),
        ("NORMAL/2019", "NORMAL/2020", "PNEUMONIA/2019", "PNEUMONIA/2020"),
        ("train/NORMAL/images", "train/PNEUMONIA/images"),
        ("NORMAL", "PNEUMONIA/bacterial", "PNEUMONIA/viral"),
    ],
)
def test_folders_of_patients_and_the_like_need_no_word(folders: tuple[str, ...]) -> None:
    layout = lay_out(tree(*folders), source="S")
    assert len(layout.rows) == 3 * len(folders)
    assert layout.notes == () and layout.not_data == {}


def test_files_in_folders_below_a_class_folder_belong_to_the_class() -> None:
    assert found("train/NORMAL/2019/a.png", "train/PNEUMONIA/b.png")[0] == (
        "train/NORMAL/2019/a.png",
        "train",
        0,
    )


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "S holds no images laid out as .*; it is empty"),
        (["a.png", "b/c.png"], "it holds 2 other files, such as a.png"),
        (["train/images/NORMAL/a.png"], "unknown class folder 'images'.*directly in a split"),
        (["NORMAL/a.png", "NORMAL/PNEUMONIA/b.png"], "a class folder is inside another"),
        (["val/NORMAL/a.png", "valid/NORMAL/b.png"], "two folders for .* val, 'val' and 'valid'"),
        (["train/a.png", "train/NORMAL/b.png"], None),
        (["train/NORMAL/a.png", "dev/NORMAL/b.png"], "in none; .* train, val, test, .*--labels"),
        (["NORMAL/a.png", "masks/b.png"], None),
        (
            ["a/train/NORMAL/x.png", "b/train/NORMAL/y.png"],
            "several trees of images, in 'a/' and 'b/'; call them train, .*--labels",
        ),
        (["x/train/NORMAL/x.png", "x/x/train/NORMAL/y.png"], "several trees"),
        (
            ["small/train/NORMAL/x.png", "large/train/NORMAL/x.png"],
            "several trees of images, in 'large/' and 'small/'",
        ),
    ],
)
def test_what_is_not_laid_out_as_documented_is_refused(
    paths: list[str], message: str | None
) -> None:
    if message is None:
        assert lay_out(paths, source="S").not_data == {"outside of the class folders": 1}
        return
    with pytest.raises(SourceError, match=message):
        lay_out(paths, source="S")


# ------------------------------------------------------------------------------ classes of any name


def classes_of(*folders: str, num: int = 12, **keys: Any) -> tuple[str, ...]:
    return lay_out(tree(*folders, num=num), source="S", config=Labels(**keys)).labels.classes


@pytest.mark.parametrize("above", ["", "chest/", "a/b/"])
@pytest.mark.parametrize("order", ["{name}", "{split}/{name}", "{name}/{split}"])
def test_class_folders_have_any_names(above: str, order: str) -> None:
    names = ("Viral Pneumonia", "COVID", "Normal", "Lung_Opacity")
    folders = [
        above + order.format(split=split, name=name)
        for split in ("train", "test")
        for name in names
    ]
    folders = sorted(set(folders))
    layout = lay_out(tree(*folders), source="S")
    assert layout.labels == LabelSpec(
        "multiclass", ("Normal", "COVID", "Lung_Opacity", "Viral Pneumonia")
    )
    places = {name: k for k, name in enumerate(layout.labels.classes)}
    for entry in layout.rows:
        name = next(part for part in entry.path.split("/") if part in places)
        assert entry.label == places[name]
        assert entry.split == ("test" if "/test/" in f"/{entry.path}" else "train")
    assert [entry.path for entry in layout.rows] == sorted(tree(*folders))
    assert layout.notes[0].startswith("the classes are 'Normal' (")


def test_without_known_names_the_first_folders_beside_each_other_are_the_classes() -> None:
    assert classes_of("x/TB/p1/s1", "x/TB/p2", "x/Healthy/p3", "x/masks") == ("Healthy", "TB")
    layout = lay_out(
        [*tree("COVID/images", "COVID/masks", "No_findings/images"), "COVID.metadata.xlsx"],
        source="S",
    )
    assert layout.labels.classes == ("No_findings", "COVID")
    assert len(layout.rows) == 6
    assert layout.not_data == {
        "masks, thumbnails or the like": 3,
        "outside of the class folders": 1,
    }


def test_a_folder_of_texts_is_no_class() -> None:
    paths = [*tree("TB", "Healthy"), "docs/readme.txt", "docs/table.csv"]
    layout = lay_out(paths, source="S")
    assert layout.labels.classes == ("Healthy", "TB")
    assert layout.not_data == {"outside of the class folders": 2}


def test_the_classes_of_splits_are_the_same_in_any_case() -> None:
    layout = lay_out(tree("train/Tb", "train/Healthy", "test/TB", "test/Healthy"), source="S")
    assert layout.labels.classes == ("Healthy", "TB")
    assert len(layout.rows) == 12


def test_the_usual_two_are_these_also_where_one_is_missing() -> None:
    for folders in (("test/Pneumonia",), ("test/normal",), ("Normal", "pneumonia")):
        layout = lay_out(tree(*folders), source="S")
        assert layout.labels == LabelSpec("binary", ("NORMAL", "PNEUMONIA"))
        assert layout.notes == ()


def test_two_of_any_names_need_a_negative_one() -> None:
    with pytest.raises(SourceError, match=r"by --labels\.negative='No TB' or =TB"):
        classes_of("TB", "No TB")
    assert classes_of("TB", "No TB", negative="no tb") == ("No TB", "TB")
    assert classes_of("TB", "No TB", names="No TB|TB") == ("No TB", "TB")


def test_a_third_class_is_told() -> None:
    layout = lay_out(tree("NORMAL", "PNEUMONIA", "COVID"), source="S")
    assert layout.labels == LabelSpec("multiclass", ("NORMAL", "COVID", "PNEUMONIA"))
    assert layout.notes[0].startswith(
        "the classes are 'NORMAL' (3 images), 'COVID' (3 images), 'PNEUMONIA' (3 images): if one "
        "is not meant as a class, move its images away or name the classes by --labels.names"
    )


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("NORMAL (1)", r"NORMAL \(1\)/: 'NORMAL \(1\)' looks like a copy or a part of .*'NORMAL'"),
        ("pneumonia_old", "'pneumonia_old' looks like a copy or a part of the class 'PNEUMONIA'"),
        ("Pneumonia - Kopie", "looks like a copy or a part of the class 'PNEUMONIA'"),
        ("NORMAL2", "looks like a copy or a part of the class 'NORMAL'"),
        ("Normal", "two folders of one class, 'NORMAL' and 'Normal' in its top folder: make"),
        ("PNEUMONA", "PNEUMONA/: 'PNEUMONA' has 3 images; did you mean PNEUMONIA"),
        ("healthy", "the classes 'healthy' and 'NORMAL', which mean the same"),
    ],
)
def test_a_folder_that_looks_like_another_is_refused(extra: str, words: str) -> None:
    paths = [*tree("NORMAL", "PNEUMONIA", num=12), *tree(extra)]
    with pytest.raises(SourceError, match=words) as caught:
        lay_out(paths, source="S")
    assert "\n" not in str(caught.value)


def test_a_class_of_hardly_an_image_is_refused_and_taken_where_it_is_named() -> None:
    paths = [*tree("NORMAL", "PNEUMONIA", num=900), *tree("todo")]
    with pytest.raises(SourceError, match="'todo' would be a class of 3 images beside one of 900"):
        lay_out(paths, source="S")
    config = Labels(names="NORMAL|PNEUMONIA|todo")
    assert len(lay_out(paths, source="S", config=config).rows) == 1803


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (("TB",), "no images laid out as .* two classes at least"),
        (("train/TB",), "S has one class alone, 'TB' .train/TB/."),
        (("images_001", "images_002"), "look like parts or patients and not like classes"),
        (("train/TB/Healthy", "train/Healthy"), "a class folder is inside another"),
        ([f"q{k}x" for k in range(101)], "S has 101 classes, more than 100"),
    ],
)
def test_folders_that_are_no_classes_are_refused(folders: Sequence[str], words: str) -> None:
    with pytest.raises(SourceError, match=words):
        classes_of(*folders)


def test_names_and_case_say_which_classes_there_are() -> None:
    with pytest.raises(
        SourceError, match=r"'Covd', labels\.names allows Covid, TB; did you mean Cov"
    ):
        classes_of("Covd", "TB", names="Covid|TB")
    assert classes_of("test/TB", names="Healthy|TB") == ("Healthy", "TB")


def test_subtypes_of_public_names_become_three_classes() -> None:
    paths = [f"train/{label}/{name}" for label, name in public_names(4, 8)]
    layout = lay_out(paths, source="S", config=Labels(target="subtype"))
    assert layout.labels == LabelSpec("multiclass", ("NORMAL", "BACTERIAL", "VIRAL"))
    for entry in layout.rows:
        assert entry.label == (1 if "bacteria" in entry.path else 2 if "virus" in entry.path else 0)
    with pytest.raises(SourceError, match="1 PNEUMONIA image of S without one, such as train/PN"):
        lay_out([*paths, "train/PNEUMONIA/a.png"], source="S", config=Labels(target="subtype"))
    with pytest.raises(
        SourceError, match=r"; these are the labels from which labels\.target makes"
    ):
        names = "NORMAL|BACTERIAL|VIRAL"
        lay_out(paths, source="S", config=Labels(target="subtype", names=names))


# -------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "patient", "subtype"),
    [
        ("IM-0115-0001.jpeg", "IM:0115", ""),
        ("IM-0115-0001-0002.jpeg", "IM:0115", ""),
        ("NORMAL2-IM-0416-0001-0002.jpeg", "NORMAL2:0416", ""),
        ("person1000_bacteria_2931.jpeg", "bacteria:1000", "bacterial"),
        ("person1_virus_7_1.jpeg", "virus:1", "viral"),
        ("phantom-IM-0012-0003.png", "phantom-IM:0012", ""),
        ("phantom-person12_virus_3.png", "phantom-virus:12", "viral"),
        ("scan 7.png", "", ""),
        ("person_bacteria_1.png", "", ""),
        ("IM-0115.png", "", ""),
        ("xIM-0115-0001.png", "", ""),
    ],
)
def test_patients_and_subtypes_are_read_from_public_names(
    name: str, patient: str, subtype: str
) -> None:
    assert parse_name(name) == (patient, subtype)


@pytest.mark.parametrize(
    ("second", "is_noted"),
    [
        ("train/NORMAL/b/IM-0001-0001.jpeg", True),
        ("train/PNEUMONIA/IM-0001-0001.jpeg", True),
        ("test/NORMAL/a/IM-0001-0001.jpeg", False),  # perhaps the same image
        ("train/NORMAL/b/IM-0001-0002.jpeg", False),
        ("train/NORMAL/b/NORMAL2-IM-0001-0001.jpeg", False),
    ],
)
def test_a_note_says_that_a_name_in_two_folders_may_be_no_patients(
    second: str, is_noted: bool
) -> None:
    first, other = "train/NORMAL/a/IM-0001-0001.jpeg", "train/PNEUMONIA/person1_virus_1.jpeg"
    layout = lay_out([first, second, other], source="S")
    assert {"IM:0001", "virus:1"} <= {row.patient for row in layout.rows}
    assert any("is in several folders" in note for note in layout.notes) == is_noted


def test_the_same_number_in_two_streams_is_two_people() -> None:
    names = [
        "person78_bacteria_1.png",
        "person78_virus_1.png",
        "IM-0078-0001.png",
        "NORMAL2-IM-0078-0001.png",
    ]
    assert len({parse_name(name)[0] for name in names}) == 4


def test_a_file_whose_name_says_nothing_is_a_patient_of_its_own_wherever_the_tree_stands() -> None:
    here = lay_out(["train/NORMAL/a.png", "train/PNEUMONIA/a.png"], source="S").rows
    there = lay_out(["x/y/train/NORMAL/a.png", "x/y/train/PNEUMONIA/a.png"], source="S").rows
    assert [entry.patient for entry in here] == [entry.patient for entry in there]
    assert len({entry.patient for entry in here}) == 2


def test_a_normal_image_has_no_subtype_whatever_its_name_says() -> None:
    (entry, _) = lay_out(
        ["train/NORMAL/person1_virus_7.jpeg", "train/PNEUMONIA/b.png"], source="S"
    ).rows
    assert entry.subtype == ""
