"""What is drawn at random: which phantoms there are, each patient's body, and what pneumonia adds.
The findings of other phantoms are in `findings`.

Places are in the chest's own frame: u is 0 on the midline, -1 and 1 at the widest part of the rib
cage (the patient's left is at u > 0, on the right, as radiologists look at it); v is 0 at the tips
of the lungs and about 1 at the diaphragm; m is the distance from the midline into one lung.

All randomness is keyed by (seed, patient, image), so an image does not depend on how many others
are drawn, or by whom.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Kind = Literal["normal", "bacteria", "virus", "findings"]
Finding = Literal[
    "Cardiomegaly", "Consolidation", "Effusion", "Infiltration", "Nodule", "Pneumothorax"
]
Array = NDArray[np.floating]  # float32 for images
Line = tuple[list[tuple[float, float]], float]  # (u, v) points and a width

# 40 normal patients to 60 with pneumonia, in an order in which neighbours hold both classes
_KINDS: tuple[Kind, ...] = (
    *("normal", "bacteria", "normal", "virus", "bacteria"),
    *("normal", "bacteria", "virus", "normal", "bacteria"),
)
_NUM_IMAGES_OF_PATIENT = (1, 1, 1, 1, 2, 2, 2, 3, 3, 4)


def generator(seed: int, *key: int) -> np.random.Generator:
    """The random numbers of one key."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


@dataclass(frozen=True)
class Phantom:
    """One image to draw: the image-th (from 0) of a patient (from 1). The kind "findings" shows the
    findings listed, or none.
    """

    patient: int
    image: int
    kind: Kind
    findings: frozenset[Finding] = frozenset()

    @property
    def label(self) -> str:
        """The class folder."""
        return "NORMAL" if self.kind == "normal" else "PNEUMONIA"

    @property
    def stem(self) -> str:
        """The file name without its suffix: as in the public data set, behind `phantom-`; with
        findings, patient and image.
        """
        if self.kind == "findings":
            return f"phantom-{self.patient:06d}-{self.image + 1}"
        if self.kind == "normal":
            return f"phantom-IM-{self.patient:04d}-{self.image + 1:04d}"
        return f"phantom-person{self.patient}_{self.kind}_{self.image + 1}"

    @property
    def patient_id(self) -> str:
        """The invented patient id of a DICOM file."""
        return f"PHANTOM-{self.patient:06d}"


def plan(seed: int) -> Iterator[Phantom]:
    """All phantoms of a seed, without end: the first N are the same whatever N.

    Patients come ten at a time, all first images before the second ones, so a few images already
    show many patients.
    """
    for block in itertools.count():
        first = block * len(_KINDS) + 1
        patients = [Phantom(first + position, 0, kind) for position, kind in enumerate(_KINDS)]
        yield from images_of(patients, generator(seed, 0, block))


def images_of(patients: Sequence[Phantom], rng: np.random.Generator) -> Iterator[Phantom]:
    """One to four images of each patient: all first images, then the second ones, and so on."""
    chosen = rng.integers(len(_NUM_IMAGES_OF_PATIENT), size=len(patients))
    for image in range(max(_NUM_IMAGES_OF_PATIENT)):
        for patient, number in zip(patients, chosen, strict=True):
            if image < _NUM_IMAGES_OF_PATIENT[number]:
                yield replace(patient, image=image)


def _between(*ranges: tuple[float, float]) -> Any:
    """A field drawn from a range, or a tuple drawn from several."""
    return field(metadata={"ranges": ranges})


@dataclass(frozen=True)
class Anatomy:
    """One body: shapes in the chest's frame, absorption in units of the chest's soft tissue.

    `draw_anatomy` draws the fields that have ranges in this order, and then the others.
    """

    vessels: tuple[Line, ...]
    texture: Array  # (128, 128)
    fine_texture: Array  # (128, 128)
    cage_shape: float = _between((0.3, 1.0))
    body_width: float = _between((1.10, 1.24))
    arm_angles: tuple[float, float] = _between((-0.9, 0.9), (-0.9, 0.9))
    chin_v: float = _between((-0.75, -0.42))
    spine_u: float = _between((-0.04, 0.04))
    vertebra_height: float = _between((0.085, 0.105))
    rib_spacing: float = _between((0.098, 0.122))
    rib_phase: float = _between((0.0, 1.0))
    rib_slope: float = _between((0.12, 0.30))
    rib_density: float = _between((0.07, 0.17))
    bone_density: float = _between((0.14, 0.30))
    clavicle_v: float = _between((0.02, 0.12))
    clavicle_slope: float = _between((-0.22, 0.02))
    heart_u: float = _between((0.12, 0.22))
    heart_v: float = _between((0.66, 0.74))
    heart_width: float = _between((0.34, 0.48))
    heart_angle: float = _between((0.45, 0.85))
    mediastinum: float = _between((0.15, 0.24))
    thymus: tuple[float, float] = _between((-0.3, 0.14), (-0.3, 0.14))
    dome_right: float = _between((0.84, 0.97))
    dome_left: float = _between((0.88, 1.01))
    stomach: tuple[float, float, float, float] = _between(
        (0.25, 0.6), (0.06, 0.16), (0.12, 0.26), (-0.15, 0.35)
    )
    air: float = _between((0.52, 0.72))
    scapula: float = _between((0.02, 0.12))
    breast: float = _between((-0.06, 0.10))
    hilum: float = _between((0.05, 0.22))
    vessel_density: float = _between((0.08, 0.22))


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """One patient's body; the same in all images of the patient."""
    drawn: list[Any] = []
    for shape in fields(Anatomy):
        if ranges := shape.metadata.get("ranges"):
            values = tuple(rng.uniform(*within) for within in ranges)
            drawn.append(values if len(values) > 1 else values[0])
    return Anatomy(_grow_vessels(rng), _noise_tile(rng, 12), _noise_tile(rng, 4), *drawn)


def _noise_tile(rng: np.random.Generator, cell: int) -> Array:
    """Smooth noise (128, 128) with features of `cell` pixels, mean 0 and standard deviation 1."""
    coarse = rng.standard_normal((128 // cell + 3,) * 2, dtype=np.float32)
    first, last = 1.5, coarse.shape[0] - 1.5  # enlarging flattens noise at the edges
    tile = Image.fromarray(coarse).resize(
        (128, 128), Image.Resampling.BICUBIC, box=(first, first, last, last)
    )
    values = np.asarray(tile)
    noise: Array = (values - values.mean()) / values.std()
    return noise


def _grow_vessels(rng: np.random.Generator) -> tuple[Line, ...]:
    """Lines that branch out of both hila."""
    steps = np.linspace(0.0, 1.0, 6)
    lines: list[Line] = []
    for side in (-1, 1):
        num = int(rng.integers(9, 14))
        start = np.tile([[0.24, 0.46]], (num, 1)) + rng.normal(0, 0.03, (num, 2))  # (num, 2), m, v
        angle = np.linspace(-1.5, 1.45, num) + rng.normal(0, 0.12, num)
        length = rng.uniform(0.22, 0.55, num)
        width = rng.uniform(0.012, 0.026, num)
        for _generation in range(3):
            bend = rng.normal(0, 0.5, len(angle))
            heading = angle[:, None] + bend[:, None] * steps  # (num, 6)
            step = length[:, None] / 5
            along, down = np.cos(heading), np.sin(heading)
            m = start[:, :1] + np.cumsum(along * step, axis=1) - along[:, :1] * step
            v = start[:, 1:] + np.cumsum(down * step, axis=1) - down[:, :1] * step
            points = np.stack([side * m, v], axis=2).tolist()
            lines += zip(points, width.tolist(), strict=True)
            fork = rng.integers(2, 5, len(angle))
            rows = np.arange(len(angle))
            start = np.stack([m[rows, fork], v[rows, fork]], axis=1)
            turn = rng.choice([-1.0, 1.0], len(angle)) * rng.uniform(0.3, 0.9, len(angle))
            angle = heading[rows, fork] + turn
            length, width = length * 0.65, width * 0.6
    return tuple(lines)


@dataclass(frozen=True)
class Opacity:
    """A soft patch in a lung. `side` is -1 or 1, `angle` in radians."""

    side: int
    m: float
    v: float
    radius_m: float
    radius_v: float
    angle: float
    density: float
    softness: float
    roughness: float


@dataclass(frozen=True)
class Lobe:
    """A lobe that is filled: above (`upper`) or below a fissure."""

    side: int
    upper: bool
    fissure_v: float
    slope: float
    density: float
    softness: float


@dataclass(frozen=True)
class Nodule:
    """A ball in a lung. `side` is -1 or 1; the density is that of its middle."""

    side: int
    m: float
    v: float
    radius: float
    density: float


@dataclass(frozen=True)
class Pneumothorax:
    """Air beside a lung that has shrunk: by `gap` from the ribs, by `drop` from its tip."""

    side: int
    gap: float
    drop: float


@dataclass(frozen=True)
class Disease:
    """What pneumonia and findings add. Pairs are strengths for the (right, left) lung."""

    opacities: tuple[Opacity, ...] = ()
    lobes: tuple[Lobe, ...] = ()
    haze: tuple[float, float] = (0.0, 0.0)
    reticulation: tuple[float, float] = (0.0, 0.0)
    effusion: tuple[float, float] = (0.0, 0.0)  # of pneumonia: a diaphragm that is blunted
    fluid: tuple[float, float] = (0.0, 0.0)  # height of an effusion with a meniscus
    heart_ratio: float = 0.0  # width of heart to width of chest; 0: the body's own
    nodules: tuple[Nodule, ...] = ()
    pneumothorax: Pneumothorax | None = None


# m, v, radius_m, radius_v, angle, density, softness, roughness
_FOCUS = (
    *((0.30, 0.75), (0.2, 0.9), (0.20, 0.38), (0.13, 0.26)),
    *((0.0, math.pi), (0.55, 0.95), (0.5, 1.1), (0.1, 0.35)),
)
_PATCH = (
    *((0.22, 0.75), (0.2, 0.92), (0.10, 0.22), (0.08, 0.18)),
    *((0.0, math.pi), (0.25, 0.6), (0.9, 1.6), (0.2, 0.5)),
)


def draw_disease(rng: np.random.Generator, kind: Kind) -> Disease:
    """Bacterial pneumonia fills a lobe or a focus, mostly on one side; viral is diffuse, patchy
    and on both.
    """
    if kind == "normal":
        return Disease()
    if kind == "virus":
        strength = rng.uniform(0.50, 1.0)
        patches = []
        for _ in range(int(rng.integers(2, 7))):
            patch = _draw_opacity(rng, int(rng.choice([-1, 1])), _PATCH)
            patches.append(replace(patch, density=patch.density * strength))
        haze = (strength * rng.uniform(0.25, 0.60), strength * rng.uniform(0.25, 0.60))
        net = (strength * rng.uniform(0.04, 0.12), strength * rng.uniform(0.04, 0.12))
        return Disease(tuple(patches), haze=haze, reticulation=net)
    side = int(rng.choice([-1, 1]))
    lobes = []
    if rng.random() < 0.4:
        upper = bool(rng.random() < 0.4)
        fissure_v = rng.uniform(0.32, 0.48) if upper else rng.uniform(0.5, 0.72)
        shape = [rng.uniform(*within) for within in ((-0.25, 0.25), (0.45, 0.90), (0.06, 0.25))]
        lobes.append(Lobe(side, upper, fissure_v, *shape))
    opacities = [
        _draw_opacity(rng, side if rng.random() < 0.8 else -side, _FOCUS)
        for _ in range(int(rng.integers(0 if lobes else 1, 3)))
    ]
    drop = rng.uniform(0.05, 0.22) if rng.random() < 0.2 else 0.0
    effusion = (drop, 0.0) if side < 0 else (0.0, drop)
    return Disease(tuple(opacities), tuple(lobes), effusion=effusion)


def _draw_opacity(
    rng: np.random.Generator, side: int, shape: tuple[tuple[float, float], ...]
) -> Opacity:
    return Opacity(side, *(rng.uniform(*within) for within in shape))
