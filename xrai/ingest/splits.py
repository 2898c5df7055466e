"""Which image goes into which split: pure functions over manifest rows.

A source's own split folders are honoured. What is missing is carved from train, by the rules in
`xrai.dataset.rules`.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from xrai.config import Splits
from xrai.dataset.manifest import Row
from xrai.dataset.rules import carve, find_contradicted, patients_in_several
from xrai.dataset.shards import SPLITS
from xrai.errors import SourceError
from xrai.labels import Label, LabelSpec
from xrai.log import counted

_NAME_PATIENTS = "say who is who in the column patient of a table (--labels FILE.csv)"
_FAR = 0.02  # difference from a class's share in train that people should know of
_MANY_IMAGES, _LARGE_SHARE = 20, 0.25  # implausible for a single patient


@dataclass(frozen=True)
class Assignment:
    """Rows with their splits."""

    rows: tuple[Row, ...]  # in the order given
    carved: tuple[str, ...]  # splits carved from train
    dropped: frozenset[str]  # paths of duplicates that were excluded on request
    notes: tuple[str, ...] = ()  # what people should know, a sentence each
    facts: tuple[str, ...] = ()  # as the notes, where nothing is doubtful


@dataclass(frozen=True)
class _Lack:
    """A class, or one side of a finding, that training needs images of and does not have."""

    name: str  # of a class or finding
    value: int | None = None  # of the finding: 1 present, 0 absent

    def words(self, image: str) -> str:
        """Names such images, for people; `image` is "image" or "images"."""
        if self.value is None:
            return f"{self.name} {image}"
        return f"{image} {'with' if self.value else 'known to be without'} {self.name}"


def assign_splits(rows: Sequence[Row], labels: LabelSpec, config: Splits) -> Assignment:
    """Give every usable row its split; `rows` carry those of the source.

    A val of fewer than `splits.min_val_images` joins train. Identical images with different labels
    are all excluded, since nobody knows which label is right. A source with split folders but no
    train is kept as it is, to evaluate on.

    Raises `SourceError` when one image is in two splits of the source (unless `splits.duplicates`
    is "drop"), a class has no images in train, or train or val would be empty.
    """
    notes: list[str] = []
    has_train = any(row.split == "train" for row in rows)
    if has_train:
        rows, notes = _join_small_val(rows, config)
    rows, dropped = _drop_duplicates(_exclude_contradictions(rows), duplicates=config.duplicates)
    if dropped:
        notes.append(
            f"{counted(len(dropped), 'file', 'are')} dropped: the same images are in test or val "
            "of the source"
        )
    used = [row for row in rows if not row.reason]
    given = {row.split for row in used}
    if shared := patients_in_several(used, given):
        words = counted(len(shared), "patient", "are")
        notes.append(f"{words} in two splits of the source, such as {shared[0]}")
    if not has_train:
        notes.append("the source has no train, so that this data set is to evaluate on alone")
        return Assignment(tuple(rows), (), dropped, tuple(notes))
    fractions = {"val": config.val_fraction, "test": config.test_fraction}
    carved = tuple(
        split for split, fraction in fractions.items() if split not in given and fraction > 0
    )
    pool = [row for row in used if row.split == "train"]
    refuse_missing_class((row.label for row in pool), labels, where="train")
    if carved:
        notes += _note_common_patient(pool)
    rows = carve(rows, carved, config, labels)
    used = [row for row in rows if not row.reason]
    lacks = {
        split: [*_lacks({row.label for row in used if row.split == split}, labels)]
        for split in SPLITS
    }
    if lacks["train"] or not any(row.split == "val" for row in used):
        raise SourceError(_explain_carving(pool, carved, config, missing=lacks["train"]))
    if lacks["val"] and labels.task != "binary":
        raise SourceError(_explain_val(lacks["val"][0], labels, is_carved="val" in carved))
    for split in SPLITS:
        if lacks[split] and split in {*given, *carved}:
            missing = " and no ".join(lack.words("images") for lack in lacks[split])
            origin = "was carved from train and " if split in carved else ""
            notes.append(f"{split} {origin}holds no {missing}")
    balance, is_far = _tell_balance(used, carved, labels)
    notes += balance if is_far else []
    facts = () if is_far else tuple(balance)
    return Assignment(tuple(rows), carved, dropped, tuple(notes), facts)


def _join_small_val(rows: Sequence[Row], config: Splits) -> tuple[Sequence[Row], list[str]]:
    """Rows of which a val that is too small to measure with has joined train; and notes."""
    num_val = sum(row.split == "val" for row in rows)
    if not 0 < num_val < config.min_val_images:
        return rows, []
    note = (
        f"the source's val has {counted(num_val, 'image')}, fewer than splits.min_val_images = "
        f"{config.min_val_images}: they join train"
    )
    return [replace(row, split="train") if row.split == "val" else row for row in rows], [note]


def _tell_balance(
    used: Sequence[Row], carved: Collection[str], labels: LabelSpec
) -> tuple[list[str], bool]:
    """A sentence on how close the shares in balanced splits are to those in train, if any are
    balanced; and whether one is far off.
    """
    if labels.is_public or not carved:
        return [], False
    shares = {split: _shares(used, split, labels) for split in ("train", *carved)}
    found = [
        (abs(share - of_train), name, split, share, of_train)
        for split in carved
        for name, share, of_train in zip(
            labels.classes, shares[split], shares["train"], strict=True
        )
        if not math.isnan(share)
    ]
    if not found:
        return [], False
    _, name, split, share, of_train = max(found)
    what = "finding" if labels.task == "multilabel" else "class"
    told = (
        f"{' and '.join(carved)} {'are' if len(carved) > 1 else 'is'} carved by patient, balanced "
        f"for every {what}"
    )
    own, others = f"{100 * share:.2f} %", f"{100 * of_train:.2f} %"
    if own != others:
        told += f"; farthest from train is {name}: {own} of the images of {split}, {others} of "
        told += "those of train"
    return [told], abs(share - of_train) > _FAR


def _shares(rows: Sequence[Row], split: str, labels: LabelSpec) -> list[float]:
    """The share of each class or finding among the images of a split where it is known."""
    array = labels.array([row.label for row in rows if row.split == split])
    present, unknown = labels.count(array)
    known = [len(array) - num for num in unknown or [0] * len(present)]
    return [a / b if b else math.nan for a, b in zip(present, known, strict=True)]


def _explain_val(lack: _Lack, labels: LabelSpec, *, is_carved: bool) -> str:
    """Why a val without images of a class, or with and without a finding, is refused."""
    if is_carved:
        return (
            f"no {lack.words('image')} falls into val: too few patients have one to be in both "
            "train and val; add images of more patients, or leave this class or finding out"
        )
    return _explain_lack(lack, labels, where="val")


def refuse_missing_class(labels: Iterable[Label], spec: LabelSpec, *, where: str) -> None:
    """Raise `SourceError` where a class has no image, or a finding none where it is present, or
    none where it is absent.
    """
    lack = next(_lacks(set(labels), spec), None)
    if lack is not None:
        raise SourceError(_explain_lack(lack, spec, where=where))


def _explain_lack(lack: _Lack, spec: LabelSpec, *, where: str) -> str:
    each = {
        "binary": "of both classes, and",
        "multiclass": "of every class, and",
        "multilabel": "with and without each finding (--labels.names='A|B|…' leaves some out);",
    }
    return (
        f"{where} has no usable {lack.words('images')}; training needs images {each[spec.task]} "
        "images to evaluate on alone belong in a folder test/ (or have test in the column split of "
        "--labels)"
    )


def _lacks(labels: Collection[Label], spec: LabelSpec) -> Iterator[_Lack]:
    """The classes, or sides of findings, that none of these labels has."""
    for k, name in enumerate(spec.classes):
        if spec.task != "multilabel":
            if k not in labels:
                yield _Lack(name)
            continue
        values = {label[k] for label in labels if isinstance(label, tuple)}
        yield from (_Lack(name, value) for value in (1, 0) if value not in values)


def _explain_carving(
    pool: Sequence[Row], carved: Sequence[str], config: Splits, *, missing: Sequence[_Lack]
) -> str:
    """Why `pool`, the source's train, cannot be divided by patient."""
    what = "no image falls into val"
    if missing:
        what = f"no {missing[0].words('image')} stays in train"
    patients = {row.patient for row in pool}
    if len(patients) == 1:
        return (
            f"{what}, since all {len(pool)} images are of one patient{_origin(pool[0])}, and "
            f"{' and '.join(carved)} are carved by patient; {_NAME_PATIENTS}, or lay the images "
            "out in folders train, val and test"
        )
    return (
        f"{what}: {len(patients)} patients are too few for splits.val_fraction = "
        f"{config.val_fraction} and splits.test_fraction = {config.test_fraction}; add images of "
        "more patients, change these, or lay the images out in folders train, val and test"
    )


def _note_common_patient(pool: Sequence[Row]) -> list[str]:
    """A note where the most frequent patient has an implausible share of the images."""
    ((patient, count),) = Counter(row.patient for row in pool).most_common(1)
    if count < _MANY_IMAGES or count <= _LARGE_SHARE * len(pool):
        return []
    row = next(row for row in pool if row.patient == patient)
    return [
        f"{count} of {len(pool)} images are of one patient{_origin(row)}, and so go into one "
        f"split; if they are not, {_NAME_PATIENTS}"
    ]


def _origin(row: Row) -> str:
    is_dicom = row.patient.startswith("dicom:")
    return " by their PatientID, as some ways of anonymizing leave it" if is_dicom else ""


def _exclude_contradictions(rows: Sequence[Row]) -> list[Row]:
    contradicted = find_contradicted(row for row in rows if not row.reason)
    return [
        replace(row, reason="is under another label, too, as the same image")
        if not row.reason and row.sha256 in contradicted
        else row
        for row in rows
    ]


def _drop_duplicates(rows: Sequence[Row], *, duplicates: str) -> tuple[list[Row], frozenset[str]]:
    """Exclude images that the source has in two splits, keeping the one in test, else val.

    Returns all rows, and the paths of the excluded ones.
    """
    kept: dict[str, Row] = {}
    for split in reversed(SPLITS):
        for row in rows:
            if row.reason or row.split != split:
                continue
            other = kept.setdefault(row.sha256, row)
            if other.split != split and duplicates == "error":
                raise SourceError(
                    f"the source has the same image in two splits: {other.path} and {row.path}; "
                    "remove one, or set --splits.duplicates=drop to keep the one in test, else val"
                )
    dropped = frozenset(
        row.path for row in rows if not row.reason and kept[row.sha256].split != row.split
    )
    return [
        replace(row, reason=f"is the same image as {kept[row.sha256].path}")
        if row.path in dropped
        else row
        for row in rows
    ], dropped
