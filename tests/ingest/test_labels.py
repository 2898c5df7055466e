from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xrai.config import Labels
from xrai.dataset.manifest import Row
from xrai.dataset.rows import is_file_patient
from xrai.errors import SourceError
from xrai.ingest import labels as labels_module
from xrai.ingest.classes import nearest_name
from xrai.ingest.labels import LabelTable, lay_out_by_labels, parse_labels, read_labels
from xrai.ingest.layout import Layout
from xrai.ingest.patients import PatientKey
from xrai.labels import Label, LabelSpec
from xrai.store import open_store

KEY = PatientKey()
PATHS = ("a.dcm", "b.dcm", "c.dcm", "d/e.png", "notes.txt")
GOOD = (
    "path,label,patient,split\n"
    "a.dcm,NORMAL,p1,train\nb.dcm,PNEUMONIA,p2,val\nc.dcm,Pneumonia,p2,val\n"
)


def entries(text: str, *, paths: Sequence[str] = PATHS) -> Sequence[Row]:
    return lay_out_by_labels(paths, parse_labels(text, name="t.csv"), source="films", key=KEY).rows


def refusal(text: str) -> str:
    with pytest.raises(SourceError) as caught:
        entries(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------- what comes out


def test_a_table_gives_label_split_patient_subtype_and_group() -> None:
    text = (
        "path,label,patient,split,subtype,group\n"
        "a.dcm,NORMAL,p1,train,,north\nb.dcm,pneumonia,p1,TRAIN,virus,south\nc.dcm,Pneumonia,p2,test,Bacterial,north\n"
    )
    layout = lay_out_by_labels(PATHS, parse_labels(text, name="t.csv"), source="films", key=KEY)
    assert [(e.path, e.label, e.split, e.subtype) for e in layout.rows] == [
        ("a.dcm", 0, "train", ""),
        ("b.dcm", 1, "train", "viral"),
        ("c.dcm", 1, "test", "bacterial"),
    ]
    assert [entry.patient.partition(":")[0] for entry in layout.rows] == ["north", "south", "north"]
    assert (
        len({entry.patient for entry in layout.rows}) == 3
    )  # p1 of north and p1 of south are two people
    assert layout.not_data == {"not named by t.csv": 2}


def test_a_patients_identifier_is_kept_as_a_hash_alone() -> None:
    first, second, third = entries(
        "path,label,patient\na.dcm,NORMAL,Ann\nb.dcm,NORMAL,Ann\nc.dcm,NORMAL,Bob\n"
    )
    assert first.patient == second.patient != third.patient
    assert first.patient.startswith("patient:") and "Ann" not in first.patient


@pytest.mark.parametrize(
    ("first", "second", "group", "num"),
    [
        *(("7", "7.0", "", 1), ("Ann", "ANN", "", 1), ("Ann", "Anna", "", 0)),
        *(("Mu\u0308ller", "Müller", "", 0), ("Ann", "ANN", ",south", 0), ("1", "1.01", "", 0)),
    ],
)
def test_patients_that_differ_in_case_or_a_zero_are_told_without_names(
    first: str, second: str, group: str, num: int
) -> None:
    north = ",north" if group else ""
    text = f"a.dcm,NORMAL,{first}{north}\nb.dcm,NORMAL,{second}{group}\n"
    layout = laid_out(f"path,label,patient{',group' if group else ''}\n{text}")
    told = [note for note in layout.notes if note.startswith("identifiers of patients in t.csv")]
    assert len(told) == num and not any("Ann" in note for note in layout.notes)


def test_a_patient_in_two_splits_is_found_however_accents_are_written() -> None:
    text = "a.dcm,NORMAL,Mu\u0308ller,train\nb.dcm,NORMAL,Müller,test\n"
    found = refusal(f"path,label,patient,split\n{text}")
    assert "line 3: a patient in test who is in train in line 2" in found


def test_without_patients_each_file_is_one_and_without_splits_all_is_train() -> None:
    found = entries("label,path\nNORMAL,d/e.png\nPNEUMONIA,a.dcm\n")
    assert [entry.patient for entry in found] == ["file:a.dcm", "file:d/e.png"]
    assert {entry.split for entry in found} == {"train"}
    (grouped,) = entries("label,path,group\nNORMAL,d/e.png,north\n")
    assert grouped.patient == "north:file:d/e.png"
    assert is_file_patient(grouped.patient) and is_file_patient(found[0].patient)


def test_without_patients_public_file_names_state_them_as_in_folders() -> None:
    paths = [f"x/person7_bacteria_{k}.png" for k in range(2)] + ["IM-0007-0001.png", "a.png"]
    header, rows = "path,label", [f"{path},NORMAL" for path in paths]
    found = entries("\n".join([header, *rows]), paths=paths)
    assert [entry.patient for entry in found] == ["IM:0007", "file:a.png", *["bacteria:7"] * 2]
    grouped = "\n".join([f"{header},group", *(f"{row},north" for row in rows)])
    assert [entry.patient for entry in entries(grouped, paths=paths)] == [
        *("north:IM:0007", "north:file:a.png", "north:bacteria:7", "north:bacteria:7")
    ]


@pytest.mark.parametrize(("column", "is_number"), [("note", True), ("group", False)])
def test_a_number_in_two_folders_is_told_and_is_no_patient(column: str, is_number: bool) -> None:
    paths = (
        "a/IM-0001-0001.png",
        "b/IM-0001-0001.png",
        "b/IM-0001-0002.png",
        "b/person7_virus_1.png",
    )
    rows = (f"{path},{'NORMAL' if k else 'PNEUMONIA'},{path[0]}" for k, path in enumerate(paths))
    table = parse_labels("\n".join([f"path,label,{column}", *rows]), name="t.csv")
    layout = lay_out_by_labels(paths, table, source="films", key=KEY)
    assert any("one name such as IM-0001-0001" in note for note in layout.notes) == is_number
    assert [entry.patient for entry in layout.rows] == (
        [*(f"file:{path}" for path in paths[:3]), "virus:7"]
        if is_number
        else ["a:IM:0001", "b:IM:0001", "b:IM:0001", "b:virus:7"]
    )


def test_a_column_without_any_cell_counts_as_absent() -> None:
    text = "path,label,patient,split,group\na.dcm,NORMAL,,,\nb.dcm,PNEUMONIA,,,\n"
    assert [entry.patient for entry in entries(text)] == ["file:a.dcm", "file:b.dcm"]


VARIANTS = {
    "semicolons": GOOD.replace(",", ";"),
    "tabs": GOOD.replace(",", "\t"),
    "windows line ends": GOOD.replace("\n", "\r\n"),
    "empty lines": GOOD.replace("\n", "\n\n"),
    "quotes": "\n".join(
        ",".join(f'"{cell}"' for cell in line.split(",")) for line in GOOD.splitlines()
    ),
    "spaces and case": GOOD.replace("path,label", "Path, LABEL ").replace(",NORMAL", ", normal "),
    "another order": "\n".join(",".join(reversed(line.split(","))) for line in GOOD.splitlines()),
    "another column": "\n".join(
        f"{line},{word}" for line, word in zip(GOOD.splitlines(), "kxyz", strict=True)
    ),
    "spaces before quotes": "\n".join(
        ", ".join(f'"{cell}"' for cell in reversed(line.split(","))) for line in GOOD.splitlines()
    ),
    "no last line end": GOOD.rstrip("\n"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_table_is_read_however_it_is_written(name: str) -> None:
    assert entries(VARIANTS[name]) == entries(GOOD)


def test_a_space_may_begin_a_file_name() -> None:
    text = 'label,path\n"NORMAL", a.dcm\n'
    (found,) = entries(text, paths=(" a.dcm",))
    assert found.path == " a.dcm"


@given(order=st.permutations(GOOD.splitlines()[1:]))
def test_the_order_of_rows_does_not_matter(order: list[str]) -> None:
    assert entries("\n".join([GOOD.splitlines()[0], *order])) == entries(GOOD)


# ------------------------------------------------------------------------------ classes of any name


def laid_out(text: str, **keys: Any) -> Layout:
    config = Labels(**keys)
    table = parse_labels(text, name="t.csv", config=config)
    return lay_out_by_labels(PATHS, table, source="films", key=KEY, config=config)


def refused(text: str, **keys: Any) -> str:
    with pytest.raises(SourceError) as caught:
        laid_out(text, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_labels_of_any_name_are_classes_with_the_negative_one_first() -> None:
    layout = laid_out("path,label\na.dcm,TB\nb.dcm,Covid\nc.dcm,Healthy\nd/e.png,tb\n")
    assert layout.labels == LabelSpec("multiclass", ("Healthy", "Covid", "TB"))
    assert [(entry.path, entry.label) for entry in layout.rows] == [
        ("a.dcm", 2),
        ("b.dcm", 1),
        ("c.dcm", 0),
        ("d/e.png", 2),
    ]
    assert layout.notes[0].startswith("the classes are 'Healthy' (1 image), 'Covid' (1 image)")


def test_two_classes_are_binary_and_the_negative_one_is_known_or_said() -> None:
    text = "path,label\na.dcm,TB\nb.dcm,{}\n"
    assert laid_out(text.format("No finding")).labels.classes == ("No finding", "TB")
    found = refused(text.format("Other"))
    assert "by --labels.negative=Other or =TB" in found
    assert laid_out(text.format("Other"), negative="tb").labels.classes == ("TB", "Other")
    assert "labels.negative = 'Othr' is no class of t.csv, which has Other, TB; did you mean" in (
        refused(text.format("Other"), negative="Othr")
    )


def test_names_say_the_classes_and_their_order() -> None:
    text = "path,label\na.dcm,tb\nb.dcm,Covid\n"
    layout = laid_out(text, names="Healthy|Covid|TB")
    assert layout.labels == LabelSpec("multiclass", ("Healthy", "Covid", "TB"))
    assert [entry.label for entry in layout.rows] == [2, 1]
    assert "line 3: unknown label 'Covid', allowed are TB, Cofid; did you mean Cofid?" in refused(
        text, names="TB|Cofid"
    )
    assert "labels.names has the name 'tb' twice" in refused(text, names="TB|Covid|tb")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["healthy"], "t.csv has one class alone, 'healthy' (t.csv, line 2)"),
        (["NORMAL", "PNEUMONIA", "PNUEMONIA"], "t.csv, line 4: 'PNUEMONIA' has 1 image; did you"),
        (["NORMAL", "TB", "TB (1)"], "t.csv, line 4: 'TB (1)' looks like a copy or a part of"),
        (["NORMAL", "TB", "TB (old)"], "t.csv, line 4: 'TB (old)' looks like a copy or a part"),
        (["NORMAL", "A B", "A  B"], "'A  B' differs from the class 'A B' (t.csv, line 3) only in "),
        (["NORMAL", "TB", "TB_old"], "t.csv, line 4: 'TB_old' looks like a copy or a part of"),
        (["NORMAL", "TB", "healthy"], "the classes 'healthy' and 'NORMAL', which mean the same"),
        (["NORMAL", "TB", "a|b"], "t.csv has the name 'a|b', which is no name: it takes"),
        (["NORMAL", "TB", "Review"], "t.csv has the name 'Review', which predictions use as a"),
    ],
)
def test_labels_that_are_likely_mistakes_are_refused(labels: list[str], words: str) -> None:
    rows = "".join(f"{path},{label}\n" for path, label in zip(PATHS, labels, strict=False))
    assert words in refused(f"path,label\n{rows}")


@pytest.mark.parametrize(
    ("name", "valid", "hint"),
    [
        ("abnormal", "normal", ""),
        ("non-COVID", "COVID", ""),
        ("grade 3", "grade 2", ""),
        ("stage II", "stage I", ""),
        ("positive", "negative", ""),
        ("norml", "normal", "; did you mean normal?"),
        ("COVID19", "COVID-19", "; did you mean COVID-19?"),
    ],
)
def test_no_other_grade_and_no_negation_is_proposed(name: str, valid: str, hint: str) -> None:
    assert nearest_name(name, [valid]) == hint


def test_the_negative_class_comes_first_whatever_the_order_of_the_names() -> None:
    text = "path,label\na.dcm,A\nb.dcm,B\nc.dcm,C\n"
    for names, classes in (("B|A", ("A", "B")), ("C|A|B", ("A", "C", "B"))):
        own = "".join(text.splitlines(keepends=True)[: 1 + len(classes)])
        assert laid_out(own, names=names, negative="a").labels.classes == classes


def test_subtypes_become_classes_of_their_own() -> None:
    text = "path,label,subtype\na.dcm,NORMAL,\nb.dcm,PNEUMONIA,virus\nc.dcm,PNEUMONIA,{}\n"
    layout = laid_out(text.format("bacterial"), target="subtype")
    assert layout.labels == LabelSpec("multiclass", ("NORMAL", "BACTERIAL", "VIRAL"))
    assert [(entry.label, entry.subtype) for entry in layout.rows] == [(0, ""), (2, ""), (1, "")]
    assert "1 PNEUMONIA image of t.csv without one, such as c.dcm" in refused(
        text.format(""), target="subtype"
    )
    assert "are of one subtype, 'viral'" in refused(text.format("virus"), target="subtype")
    words = "the classes of t.csv name one class twice: 'NORMAL' and 'NORMAL'"
    assert words in refused(text.format("normal"), target="subtype")


# ---------------------------------------------------------------------------------------- findings

COLUMNS = (
    "path,patient,Edema,Effusion,age,note\n"
    "a.dcm,p1,1,0,61,x\nb.dcm,p2,,-1,7,y\nc.dcm,p2,0.0,1.0,1,\n"
)


def test_columns_of_1_0_and_empty_are_findings(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        layout = laid_out(COLUMNS)
    assert layout.labels == LabelSpec("multilabel", ("Edema", "Effusion"))
    assert [entry.label for entry in layout.rows] == [(1, 0), (-1, -1), (0, 1)]
    assert layout.notes == (
        "the findings are 'Edema' (1 image, unknown in 1), 'Effusion' (1 image, unknown in 1): if "
        "one is not meant, name those to use by --labels.names='A|B|…'",
    )
    assert laid_out(COLUMNS, names="Edema").facts == (
        "the findings are 'Edema' (1 image, unknown in 1)",
    )
    assert "t.csv: 2 columns are not used: 'age', 'note'" in caplog.text


def test_the_policy_says_what_uncertain_and_blank_findings_count_as() -> None:
    def labels(**keys: Any) -> list[Label]:
        return [entry.label for entry in laid_out(COLUMNS, **keys).rows]

    assert labels(uncertain="positive") == [(1, 0), (-1, 1), (0, 1)]
    assert labels(uncertain="negative", blank="negative") == [(1, 0), (0, 0), (0, 1)]
    assert labels(names="effusion") == [(0,), (-1,), (1,)]


def test_no_finding_makes_what_is_empty_absent_but_for_devices() -> None:
    text = (
        "path,Edema,Effusion,Support Devices,No Finding\n"
        "a.dcm,,,1,1\nb.dcm,,-1,,1\nc.dcm,1,,,0\nd/e.png,,,,\n"
    )
    found = [entry.label for entry in laid_out(text).rows]
    assert found == [(0, 0, 1), (0, -1, -1), (1, -1, -1), (-1, -1, -1)]


def test_yes_and_true_are_values_and_a_column_of_scores_is_told() -> None:
    text = "path,A,B,note,C\na.dcm,Yes,TRUE,x,0\nb.dcm,no,false,,0.7\nc.dcm,,-1,y,1\n"
    assert "line 3: C is '0.7', allowed are 1, yes or true" in refused(text)
    text = text.replace(",0\n", ",0.1\n")
    layout = laid_out(text)
    assert [entry.label for entry in layout.rows] == [(1, 1), (0, 0), (-1, -1)]
    assert layout.notes[0].startswith(
        "t.csv: the column 'C' is not used as a finding: line 2 has '0.1', allowed are 1, yes"
    )
    assert "column" not in layout.notes[1] and laid_out(text, names="A").notes == ()


def test_a_finding_may_have_decimal_commas() -> None:
    text = 'path,A,B\na.dcm,"1,0","0,0"\nb.dcm,0,"-1,0"\n'
    assert [entry.label for entry in laid_out(text).rows] == [(1, 0), (0, -1)]


@pytest.mark.parametrize(
    ("header", "cells", "num_rows", "first"),
    [
        ("Edema", ("WAHR", "FALSCH"), 12, "WAHR"),
        ("Edema", ("", "x"), 12, "x"),
        ("Edema", ("a", "b", "C", "c", ""), 12, "a"),
        ("Edema", ("a", "b", "c", "d", ""), 12, ""),
        ("Edema", ("WAHR", "FALSCH"), 10, ""),  # too few rows to tell
        ("site", ("A", "a"), 12, ""),  # of one value
        ("View Position", ("PA", "AP"), 12, ""),
    ],
)
def test_an_unused_column_of_few_values_is_told(
    header: str, cells: Sequence[str], num_rows: int, first: str
) -> None:
    lines = (f"{k}.dcm,{cells[k % len(cells)]},{k % 2}" for k in range(num_rows))
    table = parse_labels("\n".join([f"path,{header},A", *lines]), name="t.csv")
    words = f"t.csv: the column '{header}' is not used as a finding: line "
    assert [note.startswith(words) for note in table.notes] == ([True] if first else [])
    assert not first or f"has {first!r}, allowed are 1" in table.notes[0]


def test_an_empty_cell_of_names_is_what_blank_says() -> None:
    text = "path,findings\na.dcm,Edema|Effusion\nb.dcm,\n"
    labels = [laid_out(text, blank=blank).rows[1].label for blank in ("unknown", "negative")]
    assert labels == [(-1, -1), (0, 0)]
    assert "or say by --labels.blank what an empty cell means" in refused(text)


def test_one_column_of_names_is_findings_too() -> None:
    text = "path,findings\na.dcm,Edema|Effusion?\nb.dcm,No Finding\nc.dcm, effusion \n"
    layout = laid_out(text)
    assert layout.labels == LabelSpec("multilabel", ("Edema", "Effusion"))
    assert [entry.label for entry in layout.rows] == [(1, -1), (0, 0), (0, 1)]
    assert [entry.label for entry in laid_out(text, names="Effusion").rows] == [(-1,), (0,), (1,)]


def test_findings_that_names_leave_out_are_told_with_their_images() -> None:
    text = "path,findings\na.dcm,Edema\nb.dcm,Efusion?|Edema\nc.dcm,efusion\nd/e.png,Mass\n"
    told = "t.csv: labels.names leaves out 'Efusion' (2 images), 'Mass' (1 image): check the"
    layout = laid_out(text, names="Edema")
    assert layout.notes[0].startswith(told)
    assert [entry.label for entry in layout.rows] == [(1,), (1,), (0,), (0,)]
    assert laid_out(text, names="Edema|Efusion|Mass").notes == ()


JOINED = "path,findings\na.dcm,Edema\nb.dcm,{}\nc.dcm,Effusion\n"


@pytest.mark.parametrize("cell", ["Edema; Effusion", "edema,Effusion", "Edema/Mass", "A+Edema"])
def test_findings_joined_by_another_mark_are_refused_unless_meant(cell: str) -> None:
    text = JOINED.format(f'"{cell}"')
    words = f"t.csv, line 3: '{cell}' looks like several findings: join them by | (1 image)"
    assert words in refused(text)
    if "Effusion" in cell:
        assert words in refused(text, names="Edema|Effusion")
    assert laid_out(text, names=f"Edema|{cell}").labels.classes == ("Edema", cell)


def test_a_name_with_a_slash_is_a_finding_where_its_parts_are_none() -> None:
    text = JOINED.format("Nodule/Mass")
    assert laid_out(text).labels.classes == ("Edema", "Effusion", "Nodule/Mass")
    assert "looks like several" in refused(JOINED.format("Nodule;Mass"))


@pytest.mark.parametrize(
    ("cell", "other", "names"),
    [
        ("Nodule/Mass", "Mass", "Mass|Edema"),
        ("Pleural Effusion, left", "Pleural Effusion", "Edema|Pleural Effusion"),
        ("Nodule/Mass", "Mass", "Edema"),
    ],
)
def test_names_leave_out_a_joined_name_that_is_not_of_findings_alone(
    cell: str, other: str, names: str
) -> None:
    text = f'path,findings\na.dcm,"{cell}"\nb.dcm,{other}\nc.dcm,Edema\nd/e.png,Edema\n'
    layout = laid_out(text, names=names)
    assert layout.labels.classes == tuple(names.split("|"))
    assert layout.rows[0].label == (0,) * len(layout.labels.classes)
    assert layout.notes[0].startswith(f"t.csv: labels.names leaves out '{cell}' (1 image)")


def test_findings_that_differ_in_their_separators_are_refused_unless_meant() -> None:
    text = "path,findings\na.dcm,Pleural Effusion\nb.dcm,pleural_effusion\nc.dcm,Edema\n"
    words = "line 3: 'pleural_effusion' differs from 'Pleural Effusion' (line 2) only in spaces"
    assert words in refused(text) and words in refused(text, names="Pleural Effusion|Edema")
    names = ("pleural_effusion", "Pleural Effusion")
    assert laid_out(text, names="|".join(names)).labels.classes == names
    assert laid_out(text, names="Edema").labels.classes == ("Edema",)


@pytest.mark.parametrize(
    ("text", "keys", "words"),
    [
        (
            "path,A,B\na.dcm,1,0\nb.dcm,2,0\n",
            {},
            "line 3: A is '2', allowed are 1, yes or true (present), 0",
        ),
        ("path,A,a\na.dcm,1,0\n", {}, "the first line of t.csv has the name 'a' twice"),
        ("path,A,B\na.dcm,1,0\n", {"names": "A|C"}, "t.csv has no column 'C' of labels.names"),
        (
            "path,Edema,B\na.dcm,1,0\n",
            {"names": "Edmea"},
            "no column 'Edmea' of labels.names; did you mean Edema?",
        ),
        ("path,A,B\na.dcm,1,0\na.dcm,0,0\n", {}, "is in line 2, too, with another label"),
        ("path,label,findings\na.dcm,x,y\n", {}, "has the columns label and findings; leave one"),
        ("path,findings\na.dcm,\n", {}, "line 2: findings is empty; write 'No finding'"),
        ("path,findings\na.dcm,A||B\n", {}, "line 2: findings 'A||B' lacks a name"),
        ("path,findings\na.dcm,?\n", {}, "line 2: findings '?' lacks a name"),
        ("path,findings\na.dcm,A|a?\n", {}, "line 2: findings 'A|a?' says 'A' twice"),
        (
            "path,findings\na.dcm,No Finding?\n",
            {},
            "line 2: findings 'No Finding?' has ? behind it",
        ),
        ("path,findings\na.dcm,A??\n", {}, "t.csv, line 2, has the name 'A?', which ends in ?"),
        ("path,A,no finding\na.dcm,1,1\n", {}, "line 2: A and no finding are both present: leave"),
        ("path,A,normal\na.dcm,1,0\nb.dcm,1,2\n", {}, "line 3: normal is '2', allowed are 1, yes"),
        ("path,findings\na.dcm,A|No finding\n", {}, "line 2: findings 'A|No finding' says none"),
        (
            "path,findings\na.dcm,Edema\n",
            {"names": "Edmea"},
            "t.csv has no finding 'Edmea' of labels.names; did you mean Edema?",
        ),
        ("path,A,B\na.dcm,1,0\n", {"target": "subtype"}, "2 findings: A, B"),
    ],
)
def test_findings_that_are_none_are_refused_by_their_lines(
    text: str, keys: dict[str, str], words: str
) -> None:
    assert words in refused(text, **keys)


# ------------------------------------------------------------------------------------------- faults

FAULTS = {
    "an absent file": (
        "a.dcm,NORMAL,p,train\nx.dcm,NORMAL,p,train",
        "line 3: there is no file 'x.dcm' in films",
    ),
    "an unknown split": (
        "a.dcm,NORMAL,p,dev",
        "line 2: unknown split 'dev', allowed are train, val, test",
    ),
    "a patient in two splits": (
        "a.dcm,NORMAL,Ann,train\nb.dcm,NORMAL,Ann,train\nc.dcm,PNEUMONIA,Ann,test",
        "line 4: a patient in test who is in train in line 2",
    ),
    "an image with two labels": (
        "a.dcm,NORMAL,p,train\na.dcm,PNEUMONIA,p,train",
        "line 3: path 'a.dcm' is in line 2, too, with another label",
    ),
    "a split that is misspelt": (
        "a.dcm,NORMAL,p,trian",
        "line 2: unknown split 'trian', allowed are train, val, test; did you mean train?",
    ),
    "a path twice": (
        "a.dcm,NORMAL,p,train\nb.dcm,NORMAL,p,train\na.dcm,NORMAL,p,train",
        "line 4: path 'a.dcm' is in line 2, too",
    ),
    "an empty path": (",NORMAL,p,train", "line 2: path is empty"),
    "an empty label": ("a.dcm,,p,train", "line 2: label is empty"),
    "a patient missing": ("a.dcm,NORMAL,p,train\nb.dcm,NORMAL,,train", "line 3: patient is empty"),
    "a split missing": ("a.dcm,NORMAL,p,train\nb.dcm,NORMAL,p,", "line 3: split is empty"),
    "a path above": ("../a.dcm,NORMAL,p,train", "line 2: path '../a.dcm' leaves the source"),
    "a path of another machine": (
        "C:\\films\\x.dcm,NORMAL,p,train",
        r"line 2: path 'C:\\films\\x.dcm' leaves the source",
    ),
    "paths of two machines": (
        "C:\\x\\a.dcm,NORMAL,p,train\nD:\\y\\b.dcm,NORMAL,p,train",
        r"line 3: path 'D:\\y\\b.dcm' leaves the source",
    ),
    "a whole path with a way up": (
        "/x/../a.dcm,NORMAL,p,train",
        "line 2: path '/x/../a.dcm' leaves the source",
    ),
    "a missing file of another machine": (
        "C:\\x\\a.dcm,NORMAL,p,train\nC:\\x\\no.dcm,NORMAL,p,train",
        r"line 3: there is no file 'C:\\x\\no.dcm' in films",
    ),
    "a missing file whose name has a colon": (
        "10:00.dcm,NORMAL,p,train",
        "line 2: there is no file '10:00.dcm' in films",
    ),
    "a path of another folder": (
        "north/a.dcm,NORMAL,p,train",
        "line 2: there is no file 'north/a.dcm' in films",
    ),
    "one file in two ways": (
        "a.dcm,NORMAL,p,train\n.\\a.dcm,NORMAL,p,train",
        "line 3: path 'a.dcm' is in line 2, too",
    ),
    "a whole path": ("/etc/passwd,NORMAL,p,train", "line 2: path '/etc/passwd' leaves the source"),
    "too few cells": ("a.dcm,NORMAL", "line 2: has 2 cells, the first line 4"),
    "too many cells": ("a.dcm,NORMAL,p,train,x", "line 2: has 5 cells, the first line 4"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_by_its_line(name: str) -> None:
    rows, words = FAULTS[name]
    found = refusal(f"path,label,patient,split\n{rows}\n")
    assert found.startswith("1 row of t.csv cannot be used: ")
    assert words in found
    assert "Ann" not in found


def test_the_line_is_that_of_the_file_where_cells_span_several_and_lines_are_empty() -> None:
    text = 'path,label,note\n\na.dcm,NORMAL,"two\nlines"\nx.dcm,NORMAL,\n'
    assert "line 5: there is no file 'x.dcm'" in refusal(text)


def test_all_faults_are_told_but_not_hundreds() -> None:
    rows = "".join(f"x{k}.dcm,NORMAL\n" for k in range(40))
    found = refusal(f"path,label\n{rows}")
    assert found.startswith("40 rows of t.csv cannot be used: line 2: ")
    assert found.count("there is no file") == 10
    assert found.endswith("; and 30 more")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the first line of t.csv has no columns path and label"),
        (
            "path,labels\na.dcm,NORMAL\n",
            "commas, semicolons or tabs, but 'path,labels'; is 'labels' meant as label?",
        ),
        ("path|label\na.dcm|NORMAL\n", "has no columns path and label"),
        ("path,label,label\na.dcm,NORMAL,NORMAL\n", "t.csv has two columns 'label'; leave one"),
        (
            "path,Edema\n" + "a.dcm,WAHR\na.dcm,FALSCH\n" * 6,
            "; the column 'Edema' is not used as a finding: line 2 has 'WAHR', allowed are 1, yes",
        ),
        ("path,label\n", "t.csv has no rows below its first line"),
        ('path,label\n"a.dcm,NORMAL\n', "t.csv, line 2, is not CSV"),
        (
            "path,label,subtype\na.dcm,NORMAL,virus\n",
            "line 2: a subtype is given to an image of class 'NORMAL'",
        ),
        ("path,label,group\na.dcm,NORMAL,a:b\n", "line 2: group 'a:b' is not 1 to 40 letters"),
    ],
)
def test_a_table_that_is_none_is_refused(text: str, words: str) -> None:
    assert words in refusal(text)


@given(text=st.text(st.sampled_from('path,label;\t\n\r"\0 NORMAL.dcm'), max_size=60))
def test_any_text_is_a_table_or_refused_in_one_line(text: str) -> None:
    for start in ("", "path,label\n"):
        try:
            assert entries(start + text)
        except SourceError as error:
            assert "\n" not in str(error)


def test_columns_that_are_not_used_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        parse_labels("path,label,age,Sex\na.dcm,NORMAL,4,f\n", name="t.csv")
    assert "t.csv: 2 columns are not used: 'age', 'Sex'" in caplog.text


@pytest.mark.parametrize(
    ("header", "cells", "words"),
    [
        ("patient_id", "7", "has a column 'patient_id' and no patient: rename it to patient; if"),
        ("Patient ID", "7", "has a column 'Patient ID' and no patient"),
        ("patient,subject", ",7", "has a column 'subject' and no patient"),
        ("mrn,split", "7,test", "has a column 'mrn' and no patient"),
        ("patient,subject", "p,7", ""),
        ("patient_id", "", ""),
        ("set", "Training", "has a column 'set' and no split: rename it to split"),
        ("split,subset", ",val", "has a column 'subset' and no split"),
        ("fold", "3", ""),
        ("set,split", "train,test", ""),
        ("age,dataset", "7,MIMIC", ""),
    ],
)
def test_a_column_that_clearly_names_patient_or_split_is_refused_where_that_is_missing(
    header: str, cells: str, words: str
) -> None:
    text = f"path,label,{header}\na.dcm,NORMAL,{cells}\nb.dcm,NORMAL,{cells}\n"
    if words:
        assert words in refusal(text)
    else:
        assert len(entries(text)) == 2


# ----------------------------------------------------------------------- paths as people have them

TREE = ("x/NORMAL/1.png", "x/NORMAL/2 b.png", "x/PNEUMONIA/1.png", "x/PNEUMONIA/3.png", "top.png")


def resolved(*paths: str, source: str = "films") -> tuple[list[str], tuple[str, ...]]:
    text = "path;label\n" + "".join(f"{path};NORMAL\n" for path in paths)
    layout = lay_out_by_labels(TREE, parse_labels(text, name="t.csv"), source=source, key=KEY)
    return [entry.path for entry in layout.rows], layout.notes


@pytest.mark.parametrize(
    "paths",
    [
        ("x\\NORMAL\\1.png", "x\\NORMAL\\2 b.png", "top.png"),
        ("./x/NORMAL/1.png", ".\\x\\NORMAL\\2 b.png", " top.png "),
        ("NORMAL/1.png", "2 b.png", "top.png"),
        ("NORMAL\\1.png", "2 b.png", "top.png"),
        ("X\\Normal\\1.PNG", "2 B.png", "Top.png"),
    ],
)
def test_backslashes_dots_and_missing_first_folders_are_taken_where_one_file_fits(
    paths: tuple[str, ...],
) -> None:
    assert resolved(*paths) == (["top.png", "x/NORMAL/1.png", "x/NORMAL/2 b.png"], ())


def test_paths_that_are_no_files_do_not_count_as_ends(caplog: pytest.LogCaptureFixture) -> None:
    text = "path,label\nNORMAL/1.png,NORMAL\n5.png,NORMAL\n6.png,NORMAL\n"
    with caplog.at_level("INFO"), pytest.raises(SourceError, match=r"2 rows of t\.csv cannot"):
        lay_out_by_labels(TREE, parse_labels(text, name="t.csv"), source="films", key=KEY)
    assert "t.csv: 1 path is matched by the end" in caplog.text


@pytest.mark.parametrize(
    ("above", "source"),
    [
        ("C:\\Users\\Ann\\films\\", "films"),
        ("FILMS\\", "films"),
        ("/data/films/", "other"),
        ("s3://bucket/films/", "s3://bucket/films"),
        ("films/", "films.zip"),
        ("/", "films"),
    ],
)
def test_paths_of_another_machine_are_taken_without_what_they_all_begin_with(
    above: str, source: str
) -> None:
    paths = ("x/NORMAL/1.png", "x/NORMAL/2 b.png", "top.png")
    mark = "\\" if "\\" in above else "/"
    found, (note,) = resolved(*(above + path.replace("/", mark) for path in paths), source=source)
    assert found == ["top.png", "x/NORMAL/1.png", "x/NORMAL/2 b.png"]
    assert note.startswith("the paths of t.csv begin with ") and note.endswith(
        "taken as the source"
    )


def test_files_that_differ_in_case_alone_are_told_apart_and_accents_may_be_composed() -> None:
    text = "path,label\nA.png,NORMAL\na.png,PNEUMONIA\nre\u0301.png,NORMAL\n"
    paths = ("a.png", "A.png", "r\u00e9.png")
    found = entries(text, paths=paths)
    assert {entry.path: entry.label for entry in found} == {"a.png": 1, "A.png": 0, paths[2]: 0}
    with pytest.raises(SourceError, match=r"line 2: 2 files fit path 'A\.PNG': 'A\.png', 'a\.png'"):
        entries("path,label\nA.PNG,NORMAL\n", paths=paths)


def test_ends_of_paths_are_found_in_linear_time_where_all_files_have_one_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_at: list[str] = []  # each path or cell, as often as its letters are folded
    fold = labels_module._folded

    def counted(text: str) -> str:
        looked_at.append(text)
        return fold(text)

    monkeypatch.setattr(labels_module, "_folded", counted)
    names = [f"p{k}/study1/view1.png" for k in range(100)]
    text = "path,label\n" + "".join(f"{name},NORMAL\n" for name in names)
    found = entries(text, paths=[f"train/{name}" for name in names])
    assert sorted(entry.path for entry in found) == sorted(f"train/{name}" for name in names)
    assert len(looked_at) < 10 * len(names)


def test_a_name_that_several_files_have_is_refused_with_two_of_them() -> None:
    with pytest.raises(SourceError) as caught:
        resolved("top.png", "1.png")
    assert "line 3: 2 files fit path '1.png': 'x/NORMAL/1.png', 'x/PNEU" in str(caught.value)


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;", "sep=;;;"])
def test_excels_line_that_names_the_separator_is_no_header(first: str) -> None:
    text = f"{first}\r\n" + GOOD.replace(",", ";").replace("\n", "\r\n")
    assert entries(text) == entries(GOOD)
    assert "line 3: there is no file 'x.dcm'" in refusal(f"{first}\npath;label\nx.dcm;NORMAL\n")
    assert entries("sep=|\npath|label\na.dcm|NORMAL\n") == entries("path,label\na.dcm,NORMAL\n")


def test_a_split_may_have_another_name() -> None:
    text = (
        "path,label,split\na.dcm,NORMAL,Training\nb.dcm,NORMAL,Validation\nc.dcm,NORMAL,testing\n"
    )
    assert [entry.split for entry in entries(text)] == ["train", "val", "test"]


# -------------------------------------------------------------------------------------------- files


def table_of(path: Path, data: bytes) -> LabelTable:
    path.write_bytes(data)
    return read_labels(str(path))


def test_a_file_is_read_with_and_without_a_byte_order_mark(tmp_path: Path) -> None:
    plain = table_of(tmp_path / "t.csv", GOOD.encode())
    assert plain.labels == table_of(tmp_path / "t.csv", b"\xef\xbb\xbf" + GOOD.encode()).labels
    assert plain.name == "t.csv"


def test_a_file_in_a_bucket_is_read_by_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.csv").write_text(GOOD)
    asked: list[str] = []
    monkeypatch.setattr(
        "xrai.store.open_store", lambda uri: asked.append(uri) or open_store(str(tmp_path))
    )
    assert len(read_labels("s3://bucket/some/t.csv").labels) == 3
    assert asked == ["s3://bucket/some"]


def test_a_file_in_another_encoding_is_refused_with_what_to_do(tmp_path: Path) -> None:
    for data in (GOOD.encode("utf-16"), GOOD.replace("p1", "Jérôme").encode("latin-1")):
        with pytest.raises(
            SourceError, match=r"t\.csv is not UTF-8 \(byte \d+\); save it as 'CSV UTF-8'"
        ):
            table_of(tmp_path / "t.csv", data)


def test_a_file_that_is_not_there_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("labels.csv", str(tmp_path / "no" / "labels.csv"), f"file://{tmp_path}/labels.csv"):
        with pytest.raises(SourceError, match=r"there is no file --labels .*labels\.csv"):
            read_labels(uri)
    with pytest.raises(SourceError, match="is not a file"):
        read_labels(f"{tmp_path}/")
    (tmp_path / "labels.csv").write_text(GOOD)
    assert (
        len(read_labels("labels.csv").labels)
        == len(read_labels(f"file://{tmp_path}/labels.csv").labels)
        == 3
    )


def test_a_table_whose_name_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"^the name .* of --labels is not UTF-8; rename it$"):
        read_labels(f"{tmp_path}/bad\udcff.csv")
