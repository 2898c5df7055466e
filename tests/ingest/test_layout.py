import pytest

from tests.dataset.pictures import public_names
from xrai.errors import SourceError
from xrai.ingest.layout import lay_out, parse_name


def found(*paths: str) -> list[tuple[str, str, int]]:
    return [(entry.path, entry.split, entry.label) for entry in lay_out(paths, source="S").entries]


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
    assert layout.has_splits
    assert [(entry.split, entry.label) for entry in layout.entries] == [
        (path.split("/")[-3], int("PNEU" in path)) for path in sorted(paths)
    ]


def test_class_folders_alone_are_all_train() -> None:
    assert found("NORMAL/a.png", "PNEUMONIA/b.png") == [
        ("NORMAL/a.png", "train", 0),
        ("PNEUMONIA/b.png", "train", 1),
    ]
    assert not lay_out(["NORMAL/a.png", "PNEUMONIA/b.png"], source="S").has_splits


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
    assert [entry.path for entry in layout.entries] == sorted(f"chest_xray/{path}" for path in tree)
    assert layout.not_data == {
        "in a second copy of the tree": 8,
        "in __MACOSX": 1,
        "hidden (names that begin with a dot)": 1,
        "Thumbs.db or desktop.ini": 1,
    }
    assert layout.describe_not_data().startswith("11 files are not data: ")


def test_a_file_beside_the_tree_is_not_data_and_is_counted() -> None:
    layout = lay_out(["README.txt", "train/NORMAL/a.png", "train/PNEUMONIA/b.png"], source="S")
    assert len(layout.entries) == 2
    assert layout.not_data == {"outside of the class folders": 1}


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
        (
            ["train/NORMAL/a.png", "train/COVID/b.png"],
            "unknown class folder 'COVID' in S .*NORMAL and PNEUMONIA",
        ),
        (["NORMAL/a.png", "COVID/b.png"], "unknown class folder 'COVID'"),
        (["train/a.png", "train/NORMAL/b.png"], None),
        (["train/NORMAL/a.png", "NORMAL/b.png"], "in none"),
        (
            ["a/train/NORMAL/x.png", "b/train/NORMAL/y.png"],
            "several trees of images, in 'a/' and 'b/'",
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


def test_the_same_number_in_two_streams_is_two_people() -> None:
    names = [
        "person78_bacteria_1.png",
        "person78_virus_1.png",
        "IM-0078-0001.png",
        "NORMAL2-IM-0078-0001.png",
    ]
    assert len({parse_name(name)[0] for name in names}) == 4


def test_a_file_whose_name_says_nothing_is_a_patient_of_its_own_wherever_the_tree_stands() -> None:
    here = lay_out(["train/NORMAL/a.png", "train/PNEUMONIA/a.png"], source="S").entries
    there = lay_out(["x/y/train/NORMAL/a.png", "x/y/train/PNEUMONIA/a.png"], source="S").entries
    assert [entry.patient for entry in here] == [entry.patient for entry in there]
    assert len({entry.patient for entry in here}) == 2


def test_a_normal_image_has_no_subtype_whatever_its_name_says() -> None:
    (entry, _) = lay_out(
        ["train/NORMAL/person1_virus_7.jpeg", "train/PNEUMONIA/b.png"], source="S"
    ).entries
    assert entry.subtype == ""
