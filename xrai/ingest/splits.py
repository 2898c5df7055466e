"""Which image goes into which split: pure functions over manifest rows.

A source's own split folders are honoured. What is missing is carved from train, by the rules in
`xrai.dataset.rules`.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xrai.config import Splits
from xrai.dataset.manifest import Row
from xrai.dataset.rows import Rows, is_file_patient
from xrai.dataset.rules import carve, find_contradicted, find_repeated, patients_in_several
from xrai.dataset.shards import SPLITS
from xrai.errors import SourceError
from xrai.ingest.folders import SPLIT_NAMES
from xrai.labels import CLASSES, Labels, LabelSpec, folded
from xrai.log import counted

_NAME_PATIENTS = "say who is who in the column patient of a table (--labels FILE.csv)"
_FAR = 0.02  # difference from a class's share in train that people should know of
_MANY_IMAGES, _LARGE_SHARE = 20, 0.25  # implausible for a single patient


@dataclass(frozen=True)
class Assignment:
    """Rows with their splits."""

    rows: Rows  # in the order given
    carved: tuple[str, ...]  # splits carved from train
    dropped: frozenset[int]  # places of duplicates that were excluded on request
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
    """Give every usable row its split; `rows` carry those of the source. Rows that have a hash and
    a reason, such as empty files, are no images: they are compared with no other and lose the
    reason.

    A val of fewer than `splits.min_val_images` joins train. Identical images with different labels
    are all excluded, since nobody knows which label is right. A source with split folders but no
    train is kept as it is, to evaluate on.

    Raises `SourceError` when one image is in two splits of the source (unless `splits.duplicates`
    is "drop"), a class has no images in train, or train or val would be empty.
    """
    notes: list[str] = []
    rows = Rows.of(rows, labels)
    has_train = rows.splits.are("train").any()
    if has_train:
        rows, notes = _join_small_val(rows, config)
    unreadable = rows.reasons
    rows, dropped = _drop_duplicates(_exclude_contradictions(rows), duplicates=config.duplicates)
    rows = _with_no_images(rows, unreadable)
    if dropped:
        notes.append(
            f"{counted(len(dropped), 'file', 'are')} dropped: the same images are in test or val "
            "of the source"
        )
    used = rows.is_used
    given = {split for split in rows.splits.values if (rows.splits.are(split) & used).any()}
    if shared := patients_in_several(rows, given, used):
        words = counted(len(shared), "patient", "are")
        notes.append(f"{words} in two splits of the source, such as {shared[0]}")
    if not has_train:
        notes.append("the source has no train, so that this data set is to evaluate on alone")
        return Assignment(rows, (), dropped, tuple(notes))
    fractions = {"val": config.val_fraction, "test": config.test_fraction}
    carved = tuple(
        split for split, fraction in fractions.items() if split not in given and fraction > 0
    )
    pool = used & rows.splits.are("train")
    refuse_missing_class(rows.labels[pool], labels, where="train")
    if carved:
        notes += _note_common_patient(rows, pool)
        notes += _note_unknown_patients(rows, pool, carved, labels)
    rows = carve(rows, carved, config, labels)
    lacks = {
        split: [*_lacks(rows.labels[used & rows.splits.are(split)], labels)] for split in SPLITS
    }
    if lacks["train"] or not (used & rows.splits.are("val")).any():
        raise SourceError(_explain_carving(rows, pool, carved, config, missing=lacks["train"]))
    if lacks["val"] and labels.task != "binary":
        raise SourceError(_explain_val(lacks["val"][0], labels, is_carved="val" in carved))
    notes += _note_lacks(lacks, given, carved)
    balance, is_far = _tell_balance(rows, carved, labels)
    notes += balance if is_far else []
    facts = () if is_far else tuple(balance)
    return Assignment(rows, carved, dropped, tuple(notes), facts)


def _note_lacks(
    lacks: Mapping[str, Sequence[_Lack]], given: Collection[str], carved: Collection[str]
) -> Iterator[str]:
    """Notes on what each split of the source, or carved from train, has no images of."""
    for split in SPLITS:
        if lacks[split] and split in {*given, *carved}:
            missing = " and no ".join(lack.words("images") for lack in lacks[split])
            origin = "was carved from train and " if split in carved else ""
            note = f"{split} {origin}holds no {missing}"
            if split == "val":
                note += (
                    ": xrai train will refuse this data set, since validation needs images of both "
                    "classes; add images of more patients, or divide them in another way"
                )
            yield note


def _join_small_val(rows: Rows, config: Splits) -> tuple[Rows, list[str]]:
    """Rows of which a val that is too small to measure with has joined train; and notes."""
    is_val = rows.splits.are("val")
    num_val = int(is_val.sum())
    if not 0 < num_val < config.min_val_images:
        return rows, []
    note = (
        f"the source's val has {counted(num_val, 'image')}, fewer than splits.min_val_images = "
        f"{config.min_val_images}: they join train"
    )
    return rows.with_(splits=rows.splits.put(is_val, "train")), [note]


def _tell_balance(rows: Rows, carved: Collection[str], labels: LabelSpec) -> tuple[list[str], bool]:
    """A sentence on how close the shares in balanced splits are to those in train, if any are
    balanced; and whether one is far off.
    """
    if labels.is_public or not carved:
        return [], False
    used = rows.is_used
    shares = {
        split: _shares(rows.labels[used & rows.splits.are(split)], labels)
        for split in ("train", *carved)
    }
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
        f"{' and '.join(carved)} {'are' if len(carved) > 1 else 'is'} carved by "
        f"{'patient' if num_named(rows, used) else 'image'}, balanced for every {what}"
    )
    own, others = f"{100 * share:.2f} %", f"{100 * of_train:.2f} %"
    if own != others:
        told += f"; farthest from train is {name}: {own} of the images of {split}, {others} of "
        told += "those of train"
    return [told], abs(share - of_train) > _FAR


def _shares(labels: Labels, spec: LabelSpec) -> list[float]:
    """The share of each class or finding among labels where it is known."""
    present, unknown = spec.count(labels)
    known = [len(labels) - num for num in unknown or [0] * len(present)]
    return [a / b if b else math.nan for a, b in zip(present, known, strict=True)]


def _explain_val(lack: _Lack, labels: LabelSpec, *, is_carved: bool) -> str:
    """Why a val without images of a class, or with and without a finding, is refused."""
    if is_carved:
        return (
            f"no {lack.words('image')} falls into val: too few patients have one to be in both "
            "train and val; add images of more patients, or leave this class or finding out"
        )
    return _explain_lack(lack, labels, where="val")


def refuse_missing_class(labels: Labels, spec: LabelSpec, *, where: str) -> None:
    """Raise `SourceError` where a class has no image, or a finding none where it is present, or
    none where it is absent.
    """
    lack = next(_lacks(labels, spec), None)
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


def _lacks(labels: Labels, spec: LabelSpec) -> Iterator[_Lack]:
    """The classes, or sides of findings, that none of these labels has."""
    for k, name in enumerate(spec.classes):
        if spec.task != "multilabel":
            if not (labels == k).any():
                yield _Lack(name)
            continue
        yield from (_Lack(name, value) for value in (1, 0) if not (labels[:, k] == value).any())


def _explain_carving(
    rows: Rows,
    pool: NDArray[np.bool_],
    carved: Sequence[str],
    config: Splits,
    *,
    missing: Sequence[_Lack],
) -> str:
    """Why `pool`, the source's train, cannot be divided by patient."""
    what = "no image falls into val"
    if missing:
        what = f"no {missing[0].words('image')} stays in train"
    places = np.flatnonzero(pool)
    patients = np.unique(rows.patient_numbers(places))
    if len(patients) == 1:
        origin = _origin(rows.patient_key(int(patients[0])))
        return (
            f"{what}, since all {len(places)} images are of one patient{origin}, and "
            f"{' and '.join(carved)} are carved by patient; {_NAME_PATIENTS}, or lay the images "
            "out in folders train, val and test"
        )
    return (
        f"{what}: {len(patients)} patients are too few for splits.val_fraction = "
        f"{config.val_fraction} and splits.test_fraction = {config.test_fraction}; add images of "
        "more patients, change these, or lay the images out in folders train, val and test"
    )


def _note_common_patient(rows: Rows, pool: NDArray[np.bool_]) -> list[str]:
    """A note where the most frequent patient has an implausible share of the images."""
    codes = rows.patients.codes[pool]
    counts = np.bincount(codes[codes >= 0], minlength=1)  # those known by one file have one
    count = int(counts.max())
    if count < _MANY_IMAGES or count <= _LARGE_SHARE * len(codes):
        return []
    patient = next(code for code in codes.tolist() if code >= 0 and counts[code] == count)
    return [
        f"{count} of {len(codes)} images are of one patient{_origin(rows.patient_key(patient))}, "
        f"and so go into one split; if they are not, {_NAME_PATIENTS}"
    ]


def num_named(rows: Rows, among: NDArray[np.bool_]) -> int:
    """How many images of `among` are of patients who are known by more than a file."""
    keys = rows.patients.keys
    is_named = np.fromiter((not is_file_patient(key) for key in keys), np.bool_, len(keys))
    codes = rows.patients.codes[among]
    return int(is_named[codes[codes >= 0]].sum())


def _note_unknown_patients(
    rows: Rows, pool: NDArray[np.bool_], carved: Collection[str], labels: LabelSpec
) -> list[str]:
    """A note where the patients of more than half of the images of `pool` are unknown."""
    num, num_known = int(pool.sum()), num_named(rows, pool)
    if num_known >= num / 2:
        return []
    if num_known:
        told = (
            f"patients are known for {num_known} of {num} images, so the other images are carved "
            "one by one"
        )
    else:
        verb = "are" if len(carved) > 1 else "is"
        told = f"no patients are known, so {' and '.join(carved)} {verb} carved image by image"
    if num_folders := _num_small_folders(rows, pool, labels):
        within = "a folder" if num_folders == 1 else f"{num_folders} folders"
        told += f", also within {within} of several images inside the class folders"
    return [f"{told}: if some are of one patient, {_NAME_PATIENTS}"]


def _num_small_folders(rows: Rows, pool: NDArray[np.bool_], labels: LabelSpec) -> int:
    """Folders inside class folders that hold several images, and no more than of one patient."""
    folders = Counter(
        path.rpartition("/")[0] for path, is_in in zip(rows.paths, pool, strict=True) if is_in
    )
    names = {folded(name) for name in (*labels.classes, *CLASSES)}
    num = 0
    for folder, count in folders.items():
        *above, own = (folded(name) for name in folder.split("/"))
        is_inside = own not in names and own not in SPLIT_NAMES and not names.isdisjoint(above)
        num += is_inside and 1 < count < _MANY_IMAGES
    return num


def _origin(patient: str) -> str:
    is_dicom = patient.startswith("dicom:")
    return " by their PatientID, as some ways of anonymizing leave it" if is_dicom else ""


def _exclude_contradictions(rows: Rows) -> Rows:
    contradicted = find_contradicted(rows, rows.is_used)
    why = "is under another label, too, as the same image"
    reasons = dict.fromkeys(np.flatnonzero(contradicted).tolist(), why)
    return rows.with_(reasons={**rows.reasons, **reasons})


def _with_no_images(rows: Rows, excluded: Mapping[int, str]) -> Rows:
    """The rows with those of `excluded` that were hashed, which are no images: such files are the
    same as others of the kind by chance. What decodes them says so, and they keep their places.
    """
    is_hashed = rows.is_hashed
    reasons = {
        place: reason
        for place, reason in rows.reasons.items()
        if place not in excluded or not is_hashed[place]
    }
    return rows.with_(reasons=reasons)


def _drop_duplicates(rows: Rows, *, duplicates: str) -> tuple[Rows, frozenset[int]]:
    """Exclude images that the source has in two splits, keeping the one in test, else val.

    Returns all rows, and the places of the excluded ones.
    """
    places, starts = find_repeated(rows, rows.is_used)
    if not len(places):
        return rows, frozenset()
    ranks = np.zeros(len(places), np.int8)  # the split that goes before the others has 0
    for rank, split in enumerate(reversed(SPLITS)):
        ranks[rows.splits.are(split)[places]] = rank
    lengths = np.diff(starts, append=len(places))
    image = np.repeat(np.arange(len(starts)), lengths)
    order = np.lexsort((places, ranks, image))
    places, ranks = places[order], ranks[order]
    first = np.repeat(starts, lengths)
    kept, is_dropped = places[first], ranks != ranks[first]
    places, kept, ranks = places[is_dropped], kept[is_dropped], ranks[is_dropped]
    if len(places) and duplicates == "error":
        k = int(np.lexsort((places, ranks))[0])
        raise SourceError(
            f"the source has the same image in two splits: {rows.paths[int(kept[k])]} and "
            f"{rows.paths[int(places[k])]}; remove one, or set --splits.duplicates=drop to keep "
            "the one in test, else val"
        )
    reasons = {
        place: f"is the same image as {rows.paths[other]}"
        for place, other in zip(places.tolist(), kept.tolist(), strict=True)
    }
    return rows.with_(reasons={**rows.reasons, **reasons}), frozenset(reasons)
