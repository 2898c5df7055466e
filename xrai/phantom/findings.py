"""Phantoms with findings, for `xrai phantom --task multilabel`: who has which, and what they add.

Names are those of NIH ChestX-ray14. Sizes and places are drawn at random; findings of one patient
fit each other: in heart failure, fluid lies on both sides; with pneumonia, on the same side.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Final, get_args

import numpy as np

from xrai.labels import UNKNOWN
from xrai.phantom.anatomy import (
    Disease,
    Finding,
    Nodule,
    Phantom,
    Pneumothorax,
    draw_disease,
    generator,
    images_of,
)

FINDINGS: Final[tuple[Finding, ...]] = get_args(Finding)

# What 24 patients have, by letters: nothing, heart failure, pneumonia, tumor, pneumothorax
_LETTERS: Final = "HCEINP"  # heart, then the first letters, in the order of `FINDINGS`
_PATIENTS: Final = (
    *("", "", "", "", "", "H", "HE", "HI", "HEI", "HCE", "C", "C", "CE", "CI", "E", "I"),
    *("N", "N", "IN", "EN", "P", "P", "P", "CP"),
)
_ALSO = 0.04  # chance of each other finding
_UNKNOWN = 0.2  # share of labels


def plan_findings(seed: int) -> Iterator[Phantom]:
    """All phantoms with findings of a seed, without end: the first N are the same whatever N."""
    for block in itertools.count():
        rng = generator(seed, 4, block)
        patients = []
        for number, position in enumerate(rng.permutation(len(_PATIENTS))):
            also = rng.random(len(FINDINGS)) < _ALSO
            findings = frozenset(
                name
                for name, letter, by_chance in zip(FINDINGS, _LETTERS, also, strict=True)
                if by_chance or letter in _PATIENTS[position]
            )
            patient = block * len(_PATIENTS) + number + 1
            patients.append(Phantom(patient, 0, "findings", findings))
        yield from images_of(patients, rng)


def draw_labels(seed: int, phantom: Phantom) -> tuple[int, ...]:
    """The label of each of `FINDINGS`: 1, 0, or unknown in a fifth of cases, by chance alone."""
    unknown = generator(seed, 5, phantom.patient, phantom.image).random(len(FINDINGS)) < _UNKNOWN
    return tuple(
        UNKNOWN if hidden else int(name in phantom.findings)
        for name, hidden in zip(FINDINGS, unknown, strict=True)
    )


def draw_findings(rng: np.random.Generator, findings: frozenset[Finding]) -> Disease:
    """What a patient's findings add to the image; the same in all images of the patient."""
    pneumothorax = None
    side = int(rng.choice([-1, 1]))
    if "Pneumothorax" in findings:
        pneumothorax = Pneumothorax(side, gap=rng.uniform(0.10, 0.40), drop=rng.uniform(0.04, 0.14))
        side = -side  # of all else: that lung has shrunk
    disease = Disease(pneumothorax=pneumothorax)
    if "Consolidation" in findings:
        filled = draw_disease(rng, "bacteria")
        disease = replace(disease, lobes=filled.lobes, opacities=filled.opacities)
        side = filled.lobes[0].side if filled.lobes else filled.opacities[0].side
    if "Infiltration" in findings:
        diffuse = draw_disease(rng, "virus")
        opacities = (*disease.opacities, *diffuse.opacities)
        disease = replace(
            disease, opacities=opacities, haze=diffuse.haze, reticulation=diffuse.reticulation
        )
    if "Cardiomegaly" in findings:
        disease = replace(disease, heart_ratio=rng.uniform(0.55, 0.68))
    if "Effusion" in findings:
        disease = replace(disease, fluid=_draw_fluid(rng, disease, side))
    if "Nodule" in findings:
        nodule = _draw_nodule(rng, disease, side)
        disease = replace(disease, nodules=(nodule,))
    return disease


def _draw_fluid(rng: np.random.Generator, disease: Disease, side: int) -> tuple[float, float]:
    """Fluid on one side, often on both in heart failure; none below a pneumothorax, where it has no
    meniscus.
    """
    height = 0.08 + 0.42 * rng.random() ** 2  # small ones are the most frequent
    other = height * rng.uniform(0.4, 1.0)
    if disease.pneumothorax is not None:
        side, other = -disease.pneumothorax.side, 0.0
    elif rng.random() >= (0.75 if disease.heart_ratio else 0.15):
        other = 0.0
    return (height, other) if side < 0 else (other, height)


def _draw_nodule(rng: np.random.Generator, disease: Disease, side: int) -> Nodule:
    """A nodule in a lung that has room for it: beside the heart and above fluid."""
    if disease.pneumothorax is not None:
        side = -disease.pneumothorax.side
    fluid = disease.fluid[0 if side < 0 else 1]
    lowest = 0.45 if disease.heart_ratio else max(0.30, 0.80 - 1.3 * fluid)
    v = rng.uniform(0.20, lowest)
    innermost = 0.32 if v < 0.45 else 0.62 if side > 0 else 0.42
    m, *shape = (rng.uniform(*of) for of in ((innermost, 0.75), (0.07, 0.14), (0.24, 0.44)))
    return Nodule(side, m, v, *shape)
