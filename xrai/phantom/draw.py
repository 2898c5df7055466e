"""Procedurally drawn chest phantoms: made-up X-rays for the quickstart, the tests and scale runs,
without a download.

    python -m xrai.phantom --num-images 600 --out data/phantoms

They show no patient and teach nothing about real ones; folder, file and patient names say that they
are phantoms. Quickstart and the tests call `make_phantoms`. Read upwards: `make_phantoms` <-
`draw_film` <- `_absorption` <- anatomy.

A picture is drawn as a sum of absorptions (soft tissue, bone, minus the air in the lungs), then
exposed like a film. Places are given in the chest's own frame: u is 0 on the midline, -1 and 1 at
the widest part of the rib cage (the patient's left is at u > 0, on the right, as radiologists look
at it); v is 0 at the tips of the lungs and about 1 at the diaphragm; m is the distance from the
midline into one lung. A pose maps pixels to that frame. All that is not the disease (pose, size,
exposure, markers, borders) is drawn from one distribution for all classes, so that only the lungs
tell them apart.

All randomness is keyed by (seed, patient, image): a picture does not depend on how many others are
made, nor by whom.
"""

import argparse
import importlib.util
import io
import math
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from xrai.errors import UserError, XraiError, run_command
from xrai.ingest.dicom import write_radiograph
from xrai.log import get_logger, progress, setup_logging
from xrai.workers import start_pool

Kind = Literal["normal", "bacteria", "virus"]
Array = npt.NDArray[np.floating]  # float32 wherever a picture is meant

_README_TITLE = "xrai chest phantoms, version 1"
_SUFFIXES = {"png": ".png", "jpeg": ".jpeg", "dicom": ".dcm"}
_LABELS_HEADER = "path,label,patient,split,subtype"
_DICOM_BITS = (12, 12, 14, 16)
_CHEST_MM = 350.0  # a picture's width, for the spacing of pixels
# Forty normal patients to sixty with pneumonia. The order is fixed, so that any two neighbours hold
# both classes.
_KINDS: tuple[Kind, ...] = (
    "normal", "bacteria", "normal", "virus", "bacteria", "normal", "bacteria", "virus", "normal", "bacteria",
)  # fmt: skip
_NUM_IMAGES_OF_PATIENT = (1, 1, 1, 1, 2, 2, 2, 3, 3, 4)
_DRAWN_WIDTH_MAX = 640  # a full-size picture's soft structures are drawn at this width and enlarged
_PIXELS_A_STRIP = 12_000  # 48 kB as float32
_IMAGES_A_TASK = 8

_logger = get_logger("xrai.phantom")  # run as a command, __name__ is __main__


# ---------------------------------------------------------------------------------------------------------------------
# Which pictures there are


@dataclass(frozen=True)
class Phantom:
    """One picture to draw: the image-th (from 0) of a patient (from 1)."""

    patient: int
    image: int
    kind: Kind

    @property
    def label(self) -> str:
        """The class folder."""
        return "NORMAL" if self.kind == "normal" else "PNEUMONIA"

    @property
    def stem(self) -> str:
        """The file name without its suffix, by the public data set's rules behind the prefix
        `phantom-`.
        """
        if self.kind == "normal":
            return f"phantom-IM-{self.patient:04d}-{self.image + 1:04d}"
        return f"phantom-person{self.patient}_{self.kind}_{self.image + 1}"

    @property
    def patient_id(self) -> str:
        """The invented patient id of a DICOM file."""
        return f"PHANTOM-{self.patient:06d}"


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def plan(seed: int) -> Iterator[Phantom]:
    """All pictures of a seed, without end: the first N are the same whatever N.

    Patients come ten at a time, their first pictures before their second ones, so that few pictures
    hold many patients.
    """
    num_patients = len(_KINDS)
    block = 0
    while True:
        counts = _generator(seed, 0, block).integers(len(_NUM_IMAGES_OF_PATIENT), size=num_patients)
        for image in range(max(_NUM_IMAGES_OF_PATIENT)):
            for position, kind in enumerate(_KINDS):
                if image < _NUM_IMAGES_OF_PATIENT[counts[position]]:
                    yield Phantom(block * num_patients + position + 1, image, kind)
        block += 1


# ---------------------------------------------------------------------------------------------------------------------
# The patient: everything that is the same in all of a patient's pictures


@dataclass(frozen=True)
class Opacity:
    """A soft patch in a lung. `side` is -1 or 1; centre and radii are in the chest's frame;
    `angle` in radians.
    """

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
    """A lobe filled up to a fissure: above it (`upper`) or below it."""

    side: int
    upper: bool
    fissure_v: float
    slope: float
    density: float
    softness: float


@dataclass(frozen=True)
class Disease:
    """What pneumonia adds. Haze and reticulation are strengths for the (right, left) lung."""

    opacities: tuple[Opacity, ...] = ()
    lobes: tuple[Lobe, ...] = ()
    haze: tuple[float, float] = (0.0, 0.0)
    reticulation: tuple[float, float] = (0.0, 0.0)
    effusion: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Anatomy:
    """One body: shapes in the chest's frame, absorptions in units of the chest's soft tissue."""

    cage_shape: float
    body_width: float
    arm_angles: tuple[float, float]
    chin_v: float
    spine_u: float
    vertebra_height: float
    rib_spacing: float
    rib_phase: float
    rib_slope: float
    rib_density: float
    bone_density: float
    clavicle_v: float
    clavicle_slope: float
    heart_u: float
    heart_v: float
    heart_width: float
    heart_angle: float
    mediastinum: float
    thymus: tuple[float, float]
    dome_right: float
    dome_left: float
    stomach: tuple[float, float, float, float]
    air: float
    scapula: float
    breast: float
    hilum: float
    vessel_density: float
    vessels: tuple[tuple[tuple[tuple[float, float], ...], float], ...]
    texture: Array  # (128, 128) smooth noise over the chest, about standard normal
    fine_texture: Array  # (128, 128) the same, finer


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(rng.uniform(low, high))


def _noise_tile(rng: np.random.Generator, cell: int) -> Array:
    """Smooth noise (128, 128) with features of `cell` pixels, mean 0 and standard deviation 1."""
    coarse = rng.standard_normal((128 // cell + 3,) * 2, dtype=np.float32)
    first, last = (
        1.5,
        coarse.shape[0] - 1.5,
    )  # away from the edges, where enlarging flattens the noise
    tile = Image.fromarray(coarse).resize(
        (128, 128), Image.Resampling.BICUBIC, box=(first, first, last, last)
    )
    values = np.asarray(tile)
    noise: Array = (values - values.mean()) / values.std()
    return noise


def _grow_vessels(
    rng: np.random.Generator,
) -> tuple[tuple[tuple[tuple[float, float], ...], float], ...]:
    """Lines ((u, v) points, width in units of the frame) that branch out of both hila."""
    steps = np.linspace(0.0, 1.0, 6)
    lines: list[tuple[tuple[tuple[float, float], ...], float]] = []
    for side in (-1, 1):
        num = int(rng.integers(9, 14))
        start = np.tile([[0.24, 0.46]], (num, 1)) + rng.normal(
            0, 0.03, (num, 2)
        )  # (num, 2) as (m, v)
        angle = np.linspace(-1.5, 1.45, num) + rng.normal(0, 0.12, num)
        length = rng.uniform(0.22, 0.55, num)
        width = rng.uniform(0.012, 0.026, num)
        for _generation in range(3):
            bend = rng.normal(0, 0.5, len(angle))
            heading = angle[:, None] + bend[:, None] * steps  # (num, 6)
            step = length[:, None] / 5
            m = (
                start[:, :1]
                + np.cumsum(np.cos(heading) * step, axis=1)
                - np.cos(heading[:, :1]) * step
            )
            v = (
                start[:, 1:]
                + np.cumsum(np.sin(heading) * step, axis=1)
                - np.sin(heading[:, :1]) * step
            )
            for k in range(len(angle)):
                points = tuple(zip((side * m[k]).tolist(), v[k].tolist(), strict=True))
                lines.append((points, float(width[k])))
            fork = rng.integers(2, 5, len(angle))
            rows = np.arange(len(angle))
            start = np.stack([m[rows, fork], v[rows, fork]], axis=1)
            angle = heading[rows, fork] + rng.choice([-1.0, 1.0], len(angle)) * rng.uniform(
                0.3, 0.9, len(angle)
            )
            length, width = length * 0.65, width * 0.6
    return tuple(lines)


def _draw_anatomy(rng: np.random.Generator) -> Anatomy:
    return Anatomy(
        cage_shape=_uniform(rng, 0.3, 1.0),
        body_width=_uniform(rng, 1.10, 1.24),
        arm_angles=(_uniform(rng, -0.9, 0.9), _uniform(rng, -0.9, 0.9)),
        chin_v=_uniform(rng, -0.75, -0.42),
        spine_u=_uniform(rng, -0.04, 0.04),
        vertebra_height=_uniform(rng, 0.085, 0.105),
        rib_spacing=_uniform(rng, 0.098, 0.122),
        rib_phase=_uniform(rng, 0.0, 1.0),
        rib_slope=_uniform(rng, 0.12, 0.30),
        rib_density=_uniform(rng, 0.07, 0.17),
        bone_density=_uniform(rng, 0.14, 0.30),
        clavicle_v=_uniform(rng, 0.02, 0.12),
        clavicle_slope=_uniform(rng, -0.22, 0.02),
        heart_u=_uniform(rng, 0.12, 0.22),
        heart_v=_uniform(rng, 0.66, 0.74),
        heart_width=_uniform(rng, 0.34, 0.48),
        heart_angle=_uniform(rng, 0.45, 0.85),
        mediastinum=_uniform(rng, 0.15, 0.24),
        thymus=(_uniform(rng, -0.3, 0.14), _uniform(rng, -0.3, 0.14)),
        dome_right=_uniform(rng, 0.84, 0.97),
        dome_left=_uniform(rng, 0.88, 1.01),
        stomach=(
            _uniform(rng, 0.25, 0.6), _uniform(rng, 0.06, 0.16), _uniform(rng, 0.12, 0.26), _uniform(rng, -0.15, 0.35),
        ),
        air=_uniform(rng, 0.52, 0.72),
        scapula=_uniform(rng, 0.02, 0.12),
        breast=_uniform(rng, -0.06, 0.10),
        hilum=_uniform(rng, 0.05, 0.22),
        vessel_density=_uniform(rng, 0.08, 0.22),
        vessels=_grow_vessels(rng),
        texture=_noise_tile(rng, 12),
        fine_texture=_noise_tile(rng, 4),
    )  # fmt: skip


def _draw_disease(rng: np.random.Generator, kind: Kind) -> Disease:
    """Bacterial pneumonia fills a lobe or a focus, mostly on one side; viral is diffuse, patchy
    and on both.
    """
    if kind == "normal":
        return Disease()
    if kind == "bacteria":
        side = int(rng.choice([-1, 1]))
        lobes: list[Lobe] = []
        opacities: list[Opacity] = []
        if rng.random() < 0.4:
            upper = bool(rng.random() < 0.4)
            lobes.append(
                Lobe(
                    side,
                    upper,
                    fissure_v=_uniform(rng, 0.32, 0.48) if upper else _uniform(rng, 0.5, 0.72),
                    slope=_uniform(rng, -0.25, 0.25),
                    density=_uniform(rng, 0.45, 0.90),
                    softness=_uniform(rng, 0.06, 0.25),
                )
            )
        for _ in range(int(rng.integers(0 if lobes else 1, 3))):
            opacities.append(
                Opacity(
                    side if rng.random() < 0.8 else -side,
                    m=_uniform(rng, 0.30, 0.75),
                    v=_uniform(rng, 0.2, 0.9),
                    radius_m=_uniform(rng, 0.20, 0.38),
                    radius_v=_uniform(rng, 0.13, 0.26),
                    angle=_uniform(rng, 0.0, math.pi),
                    density=_uniform(rng, 0.55, 0.95),
                    softness=_uniform(rng, 0.5, 1.1),
                    roughness=_uniform(rng, 0.1, 0.35),
                )
            )
        drop = _uniform(rng, 0.05, 0.22) if rng.random() < 0.2 else 0.0
        return Disease(
            tuple(opacities),
            tuple(lobes),
            effusion=(drop if side < 0 else 0.0, drop if side > 0 else 0.0),
        )
    strength = _uniform(rng, 0.50, 1.0)
    patches = tuple(
        Opacity(
            int(rng.choice([-1, 1])),
            m=_uniform(rng, 0.22, 0.75),
            v=_uniform(rng, 0.2, 0.92),
            radius_m=_uniform(rng, 0.10, 0.22),
            radius_v=_uniform(rng, 0.08, 0.18),
            angle=_uniform(rng, 0.0, math.pi),
            density=strength * _uniform(rng, 0.25, 0.6),
            softness=_uniform(rng, 0.9, 1.6),
            roughness=_uniform(rng, 0.2, 0.5),
        )
        for _ in range(int(rng.integers(2, 7)))
    )
    return Disease(
        patches,
        haze=(strength * _uniform(rng, 0.25, 0.60), strength * _uniform(rng, 0.25, 0.60)),
        reticulation=(strength * _uniform(rng, 0.04, 0.12), strength * _uniform(rng, 0.04, 0.12)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The picture: pose, absorption, exposure


@dataclass(frozen=True)
class _Pose:
    """Pixel (x, y) to chest frame: u = a x + b y + c, v = d x + e y + f."""

    a: float
    b: float
    c: float
    d: float
    e: float
    f: float

    def pixel(self, u: float, v: float) -> tuple[float, float]:
        determinant = self.a * self.e - self.b * self.d
        du, dv = u - self.c, v - self.f
        return (self.e * du - self.b * dv) / determinant, (self.a * dv - self.d * du) / determinant


def _draw_pose(rng: np.random.Generator, width: int, height: int) -> _Pose:
    lung_height = min(height, width / 1.12) * _uniform(rng, 0.55, 0.74)
    unit_v = lung_height
    unit_u = lung_height * 0.62 * _uniform(rng, 0.92, 1.10)
    turn = math.radians(float(np.clip(rng.normal(0, 4), -10, 10)))
    shear = _uniform(rng, -0.05, 0.05)
    x0 = width * (0.5 + _uniform(rng, -0.05, 0.05))
    y0 = height * (0.5 + _uniform(rng, -0.06, 0.07))
    cos, sin = math.cos(turn), math.sin(turn)
    a, b = cos / unit_u, (sin + shear) / unit_u
    d, e = -sin / unit_v, cos / unit_v
    return _Pose(a, b, -a * x0 - b * y0, d, e, 0.5 - d * x0 - e * y0)


def _edge(x: Array, width: float) -> Array:
    """A straight step from 0 to 1, `width` wide, centred on x = 0: cheaper, for narrow edges."""
    t = x * np.float32(1 / width)
    t += np.float32(0.5)
    np.maximum(t, 0, out=t)
    np.minimum(t, 1, out=t)
    return t


def _ramp(x: Array, width: float) -> Array:
    """A smooth step from 0 to 1, `width` wide, centred on x = 0."""
    t = _edge(x, width)
    step = t * np.float32(-2)
    step += 3
    step *= t
    step *= t
    return step


def _ellipse(
    u: Array, v: Array, u0: float, v0: float, radius_u: float, radius_v: float, angle: float = 0.0
) -> Array:
    """1 at the centre, 0 on the rim, negative outside: 1 - r**2."""
    cos, sin = math.cos(angle), math.sin(angle)
    du, dv = u - u0, v - v0
    along = du * (cos / radius_u) + dv * (sin / radius_u)
    across = dv * (cos / radius_v) - du * (sin / radius_v)
    along *= along
    across *= across
    along += across
    return 1 - along


def _capsule(
    u: Array, v: Array, start: tuple[float, float], span: tuple[Array | float, Array | float]
) -> Array:
    """Distance from a bar that goes from `start` to `start + span`; spans of one length, one for
    all places or each.
    """
    du, dv = span
    from_u, from_v = u - start[0], v - start[1]
    t = (from_u * du + from_v * dv) / (du * du + dv * dv)
    np.maximum(t, 0, out=t)
    np.minimum(t, 1, out=t)
    from_u -= t * du
    from_v -= t * dv
    distance: Array = np.sqrt(from_u * from_u + from_v * from_v)
    return distance


def _place_texture(tile: Array, pose: _Pose, shape: tuple[int, int]) -> Array:
    """A (128, 128) tile laid over u in [-1.3, 1.3], v in [-0.2, 1.4], seen in this pose; 0
    outside.
    """
    su, sv = 128 / 2.6, 128 / 1.6
    matrix = (
        pose.a * su, pose.b * su, (pose.c + 1.3) * su,
        pose.d * sv, pose.e * sv, (pose.f + 0.2) * sv,
    )  # fmt: skip
    placed = Image.fromarray(tile).transform(
        (shape[1], shape[0]), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR
    )
    texture: Array = np.asarray(placed)
    return texture


def _draw_vessels(anatomy: Anatomy, pose: _Pose, shape: tuple[int, int]) -> Array:
    """The vessel tree as strengths in [0, 1], antialiased: drawn at twice the size and halved."""
    height, width = shape
    canvas = Image.new("L", (2 * width, 2 * height))
    draw = ImageDraw.Draw(canvas)
    pixels_a_unit = 2 / abs(pose.e)
    for points, thickness in anatomy.vessels:
        size = thickness * pixels_a_unit
        fill = int(255 * min(1.0, 0.35 + thickness / 0.03))
        xy = [2 * coordinate for u, v in points for coordinate in pose.pixel(u, v)]
        draw.line(
            xy,
            fill=fill if size >= 1 else int(fill * size),
            width=max(1, round(size)),
            joint="curve",
        )
    strengths: Array = np.asarray(canvas.reduce(2), dtype=np.float32) * np.float32(1 / 255)
    return strengths


@dataclass(frozen=True)
class _Strip:
    """Some rows of a picture: where each pixel is in the chest, and what textures it shows. All
    (rows, W).
    """

    u: Array
    v: Array
    lateral: Array  # distance from the midline, on either side
    left: npt.NDArray[np.bool_]  # the patient's left: u > 0
    texture: Array
    fine: Array
    vessels: Array
    top: float
    bottom: float

    def meets(self, low: float, high: float) -> bool:
        """Whether any pixel is at a height v between `low` and `high`: what lies elsewhere need
        not be drawn.
        """
        return self.bottom > low and self.top < high

    def by_side(self, right: float, left: float) -> Array:
        """One number for the patient's right, another for the left."""
        return np.where(self.left, np.float32(left), np.float32(right))


def _flesh(at: _Strip, anatomy: Anatomy) -> Array:
    """Neck, shoulders and trunk as one silhouette, arms with their bones, and the chin."""
    neck = 0.36 + 0.10 * _ramp(at.v + 0.3, 0.4)
    trunk = (
        neck
        + (anatomy.body_width - neck) * _ramp(at.v - 0.01, 0.42)
        + 0.35 * _edge(at.v - 1.15, 1.2)
    )
    inside = trunk - at.lateral
    body = _edge(inside, 0.05) * (0.45 + 0.55 * _ramp(inside - 0.22, 0.60))

    shoulder, joint = (anatomy.body_width - 0.24, 0.16), (anatomy.body_width - 0.06, 0.09)
    right_angle, left_angle = anatomy.arm_angles
    reach = (
        at.by_side(1.2 * math.cos(right_angle), 1.2 * math.cos(left_angle)),
        at.by_side(1.2 * math.sin(right_angle), 1.2 * math.sin(left_angle)),
    )
    from_arm = _capsule(at.lateral, at.v, joint, reach)
    arm = 0.23 - from_arm
    if at.meets(-0.2, 0.5):
        over_shoulder = _capsule(
            at.lateral, at.v, shoulder, (joint[0] - shoulder[0], joint[1] - shoulder[1])
        )
        arm = np.maximum(arm, 0.25 - over_shoulder)
    flesh = 0.66 * _edge(arm, 0.06) * (0.45 + 0.55 * _ramp(arm - 0.1, 0.28))
    body = np.maximum(body, flesh) + 0.25 * np.minimum(body, flesh)
    bone = 0.07 - from_arm
    if at.meets(-0.1, 0.3):
        bone = np.maximum(bone, 0.08 * _ellipse(at.lateral, at.v, *joint, 0.115, 0.115))
    body += anatomy.bone_density * _edge(bone, 0.05)

    if at.meets(-2.0, anatomy.chin_v + 0.42):
        chin = _ellipse(at.u, at.v, 0.0, anatomy.chin_v, 0.50, 0.34)
        body = np.maximum(body, 1.05 * _ramp(chin - 0.1, 0.7))
    return body


def _middle(at: _Strip, anatomy: Anatomy) -> Array:
    """The heart and what else lies between the lungs, 0 to 1."""
    half_width = anatomy.mediastinum + 0.03 * np.cos(9 * at.v) + 0.14 * _ramp(at.v - 0.45, 0.5)
    middle = _ramp(half_width - at.lateral, 0.09)
    if at.meets(0.2, 1.3):
        heart = _ellipse(
            at.u,
            at.v,
            anatomy.heart_u,
            anatomy.heart_v,
            anatomy.heart_width,
            0.25,
            anatomy.heart_angle,
        )
        heart = np.maximum(heart, _ellipse(at.u, at.v, -0.06, anatomy.heart_v - 0.02, 0.22, 0.25))
        middle = np.maximum(middle, _ramp(heart, 0.30))
    if at.meets(0.0, 0.6):
        middle = np.maximum(
            middle, 0.8 * _ramp(_ellipse(at.u, at.v, anatomy.mediastinum, 0.30, 0.10, 0.09), 0.5)
        )
        for side, size in zip((-1, 1), anatomy.thymus, strict=True):
            if size > 0:
                bulge = _ellipse(at.u, at.v, side * 0.12, 0.28, 0.14 + size, 0.20)
                middle = np.maximum(middle, 0.6 * _ramp(bulge, 0.6))
    return middle


def _filling(at: _Strip, disease: Disease, severity: float) -> Array:
    """How much of the lungs' air pneumonia has replaced, 0 to 0.95."""
    filling = np.zeros_like(at.u)
    for lobe in disease.lobes:
        edge = at.v - lobe.fissure_v - lobe.slope * (at.lateral - 0.4) + 0.03 * at.texture
        shade = _ramp(-edge if lobe.upper else edge, lobe.softness) * (
            at.left if lobe.side > 0 else ~at.left
        )
        filling = np.maximum(filling, severity * lobe.density * shade * (0.85 + 0.08 * at.texture))
    for opacity in disease.opacities:
        reach = 1.9 * max(opacity.radius_m, opacity.radius_v)
        if at.meets(opacity.v - reach, opacity.v + reach):
            depth = _ellipse(
                at.u,
                at.v,
                opacity.side * opacity.m,
                opacity.v,
                opacity.radius_m,
                opacity.radius_v,
                opacity.angle,
            )
            depth += opacity.roughness * at.texture
            shade = _ramp(depth - 0.5 * opacity.softness + 0.4, 1.4 * opacity.softness)
            filling = np.maximum(filling, severity * opacity.density * shade)
    return np.minimum(filling, 0.95)


def _bones(at: _Strip, anatomy: Anatomy, cage: Array) -> Array:
    """Ribs, spine, collar bones and shoulder blades. `cage` is the rib cage's inner edge."""
    # Back ribs run out and down, front ribs come back steeper; both bend with the cage.
    turns, phase = 2 * math.pi / anatomy.rib_spacing, 2 * math.pi * anatomy.rib_phase
    inside_cage = (
        _edge(cage + 0.05 - at.lateral, 0.03) * _edge(at.v + 0.02, 0.06) * _edge(1.3 - at.v, 0.5)
    )
    rim = 1 + 1.1 * _ramp(at.lateral - cage + 0.10, 0.16)
    back = np.cos(turns * (at.v - at.lateral * (anatomy.rib_slope * at.lateral - 0.05)) + phase)
    front = np.cos(turns * (at.v + 0.42 * at.lateral) + phase)
    ribs = _ramp(back - 0.25, 0.9) * rim * _edge(at.lateral - 0.1, 0.1)
    ribs += 0.55 * _ramp(front - 0.35, 0.9) * _edge(at.lateral - 0.45, 0.35)
    bones = anatomy.rib_density * ribs * inside_cage
    discs = np.cos(at.v * (2 * math.pi / anatomy.vertebra_height))
    spine = _edge(0.115 - np.abs(at.u - anatomy.spine_u), 0.05)
    bones += (
        anatomy.bone_density
        * spine
        * (0.8 + 0.2 * _edge(discs + 0.5, 0.8))
        * _edge(at.v + 0.9, 0.4)
    )
    if at.meets(-0.4, 0.4):
        collar_v = (
            anatomy.clavicle_v + anatomy.clavicle_slope * at.lateral + 0.03 * np.sin(5 * at.lateral)
        )
        collar = _ramp(0.034 - np.abs(at.v - collar_v), 0.04)
        collar *= _edge(at.lateral - 0.12, 0.06) * _edge(1.05 - at.lateral, 0.1)
        bones += 1.1 * anatomy.bone_density * collar
    if at.meets(-0.1, 0.7):
        bones += anatomy.scapula * _edge(
            0.13 - _capsule(at.lateral, at.v, (0.90, 0.10), (0.12, 0.32)), 0.08
        )
    return bones


def _absorption_at(at: _Strip, anatomy: Anatomy, disease: Disease, severity: float) -> Array:
    """The absorption of some rows of the picture."""
    body, middle = _flesh(at, anatomy), _middle(at, anatomy)

    # The lungs: between rib cage, middle and diaphragm; what fills them replaces their air.
    up = np.clip(1 - at.v * (1 / 0.95), 0, 1)
    up_squared = up * up
    cage = 0.95 * np.sqrt(1 - up_squared * (anatomy.cage_shape + (1 - anatomy.cage_shape) * up))
    offset = at.lateral - 0.42
    dome = anatomy.dome_right + (anatomy.dome_left - anatomy.dome_right) * _ramp(at.u, 0.5)
    diaphragm = dome + 0.55 * offset * offset
    if any(disease.effusion):
        diaphragm -= 1.6 * severity * at.by_side(*disease.effusion) * _ramp(at.lateral - 0.6, 0.7)
    outer = cage - at.lateral
    air = (
        _edge(outer, 0.05)
        * (0.62 + 0.38 * _ramp(outer - 0.18, 0.4))
        * _ramp(diaphragm - at.v, 0.035)
    )
    air *= _ramp(at.lateral - 0.10 - 0.22 * up_squared * up_squared * up_squared, 0.08)
    marks = anatomy.hilum * _ramp(
        _ellipse(at.lateral, at.v, 0.22, 0.47, 0.14, 0.17) + 0.2 * at.texture, 1.2
    )
    if disease.lobes or disease.opacities or any(disease.haze):
        filling = _filling(at, disease, severity)
        if any(disease.haze):
            near_hilum = _ramp(
                _ellipse(at.lateral, at.v, 0.25, 0.52, 0.75, 0.62) + 0.25 * at.texture, 1.3
            )
            filling = np.maximum(filling, severity * at.by_side(*disease.haze) * near_hilum)
            net = severity * at.by_side(*disease.reticulation)
            marks += net * (at.fine + 0.5) * (0.4 + 0.6 * near_hilum)
        air *= 1 - filling
    marks *= air
    air *= 1 - 0.86 * middle
    marks += (anatomy.vessel_density * at.vessels + 0.012 * at.fine + 0.015 * at.texture) * air

    below = _edge(at.v - diaphragm, 0.05)
    soft = 0.16 * below + 0.18 * middle + 1
    if at.meets(0.3, 1.2):
        soft += anatomy.breast * _ramp(
            _ellipse(at.lateral, at.v, 0.55, 0.75, 0.45, 0.30) + 0.1, 0.5
        )
    if at.meets(0.8, 9.0):
        soft += (
            0.10
            * at.texture
            * _edge(at.v - 0.9, 0.2)
            * _edge(1.28 - at.v, 0.2)
            * _edge(1.15 - at.lateral, 0.25)
        )
    if at.meets(-0.6, 0.5):
        trachea = _edge(0.055 - np.abs(at.u - 0.6 * anatomy.spine_u), 0.05)
        soft -= 0.10 * trachea * _edge(0.40 - at.v, 0.1) * _edge(at.v + 0.45, 0.2)
    total = body * (soft + _bones(at, anatomy, cage)) - anatomy.air * air + marks
    stomach_u, stomach_v, stomach_size, stomach_air = anatomy.stomach
    if stomach_air > 0 and at.meets(0.7, 1.4):
        bubble = _ellipse(
            at.u, at.v, stomach_u, anatomy.dome_left + stomach_v, stomach_size, 0.5 * stomach_size
        )
        total -= stomach_air * _ramp(bubble, 0.8) * below
    absorption: Array = np.maximum(total, 0)
    return absorption


def _absorption(
    anatomy: Anatomy, disease: Disease, pose: _Pose, shape: tuple[int, int], severity: float
) -> Array:
    """How much of the beam the body takes, (H, W): 0 beside it, about 1 in soft tissue, more behind
    bone.

    Computed in strips of rows that fit the processor's cache, in two thirds of the time.
    """
    height, width = shape
    x = np.arange(width, dtype=np.float32)
    y = np.arange(height, dtype=np.float32)[:, None]
    u = np.float32(pose.a) * x + np.float32(pose.b) * y + np.float32(pose.c)
    v = np.float32(pose.d) * x + np.float32(pose.e) * y + np.float32(pose.f)
    texture = _place_texture(anatomy.texture, pose, shape)
    fine = _place_texture(anatomy.fine_texture, pose, shape)
    vessels = _draw_vessels(anatomy, pose, shape)
    absorption = np.empty(shape, dtype=np.float32)
    num_rows = max(1, _PIXELS_A_STRIP // width)
    for first in range(0, height, num_rows):
        rows = slice(first, first + num_rows)
        strip = _Strip(
            u[rows],
            v[rows],
            lateral=np.abs(u[rows]),
            left=u[rows] > 0,
            texture=texture[rows],
            fine=fine[rows],
            vessels=vessels[rows],
            top=float(v[rows].min()),
            bottom=float(v[rows].max()),
        )
        absorption[rows] = _absorption_at(strip, anatomy, disease, severity)
    return absorption


def _expose(rng: np.random.Generator, absorption: Array, size: tuple[int, int]) -> Array:
    """The film (H, W) in [0, 1], black where the beam was not held up, in the size (width,
    height) asked for.
    """
    gain, fog, gamma = (
        _uniform(rng, 0.52, 0.78),
        _uniform(rng, -0.03, 0.12),
        _uniform(rng, 0.75, 1.45),
    )
    film: Array = np.clip(absorption * gain + fog, 0, None) ** np.float32(gamma)
    film = film / (1 + np.float32(0.22) * film * film)  # the film's shoulder
    blur = np.float32(_uniform(rng, 0.0, 0.3))
    for _axis in range(2):
        film = film.T.copy()
        film[1:-1] += blur * (0.5 * (film[:-2] + film[2:]) - film[1:-1])
    if (film.shape[1], film.shape[0]) != size:
        film = np.array(Image.fromarray(film).resize(size, Image.Resampling.BICUBIC))
    noise = rng.standard_normal(film.shape, dtype=np.float32)
    film += np.float32(_uniform(rng, 0.005, 0.022)) * noise * np.sqrt(0.15 + np.clip(film, 0, 1))
    return film


def _add_tubes(rng: np.random.Generator, film: Array) -> None:
    """A cable or tube across some pictures."""
    if rng.random() >= 0.15:
        return
    height, width = film.shape
    canvas = Image.new("L", (width, height))
    steps = np.linspace(0, 1, 24)
    waves = 0.06 * np.sin(steps * _uniform(rng, 3, 9))
    x = width * (_uniform(rng, 0.1, 0.9) + _uniform(rng, -0.5, 0.5) * steps + waves)
    y = height * (_uniform(rng, -0.1, 0.5) + _uniform(rng, 0.2, 0.9) * steps)
    ImageDraw.Draw(canvas).line(
        np.stack([x, y], axis=1).ravel().tolist(),
        fill=255,
        width=max(1, width // 150),
        joint="curve",
    )
    film += np.float32(_uniform(rng, 0.08, 0.3) / 255) * np.asarray(canvas, dtype=np.float32)


def _add_frame(rng: np.random.Generator, film: Array) -> None:
    """Black edges where the beam was stopped, and the letter of the side, in lead."""
    height, width = film.shape
    if rng.random() < 0.45:
        top, bottom, left, right = np.maximum(0, rng.uniform(-0.05, 0.06, 4))
        shade = _uniform(rng, 0.0, 0.06)
        film[: round(top * height)] = shade
        film[height - round(bottom * height) :] = shade
        film[:, : round(left * width)] = shade
        film[:, width - round(right * width) :] = shade
    if rng.random() < 0.85:
        letter = "R" if rng.random() < 0.7 else "L"
        size = max(8.0, height * _uniform(rng, 0.05, 0.10))
        font = ImageFont.load_default(size=size)
        x = width * _uniform(rng, 0.02, 0.14)
        if letter == "L":
            x = width - x - 0.7 * size
        y = height * _uniform(rng, 0.02, 0.5)
        canvas = Image.new("L", (width, height))
        ImageDraw.Draw(canvas).text((x, y), letter, fill=255, font=font)
        ink = np.asarray(canvas, dtype=np.float32) * np.float32(_uniform(rng, 0.6, 1.0) / 255)
        np.maximum(film, ink, out=film)


def draw_film(seed: int, phantom: Phantom, *, full_size: bool = False) -> Array:
    """Draw one picture: (H, W) float32 in [0, 1], bright where the beam was absorbed.

    W is 160 to 320 pixels, or 1,000 to 2,500 with `full_size`; W / H is 0.85 to 1.45.
    """
    of_patient = _generator(seed, 1, phantom.patient)
    anatomy = _draw_anatomy(of_patient)
    disease = _draw_disease(of_patient, phantom.kind)
    rng = _generator(seed, 2, phantom.patient, phantom.image)
    narrow, wide = (1000, 2500) if full_size else (160, 320)
    width = round(narrow * (wide / narrow) ** rng.random())
    height = round(width / _uniform(rng, 0.85, 1.45))
    enlarge = max(1.0, width / _DRAWN_WIDTH_MAX)
    drawn = (round(width / enlarge), round(height / enlarge))
    pose = _draw_pose(rng, *drawn)
    severity = _uniform(rng, 0.85, 1.15)
    absorption = _absorption(anatomy, disease, pose, (drawn[1], drawn[0]), severity)
    film = _expose(rng, absorption, (width, height))
    _add_tubes(rng, film)
    _add_frame(rng, film)
    return np.clip(film, 0, 1, out=film)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _encode_dicom(seed: int, phantom: Phantom, film: Array) -> bytes:
    """A file as a digital detector writes it for viewing: 12 to 16 bits in 16, a window, a
    quarter of them inverted.
    """
    rng = _generator(seed, 3, phantom.patient, phantom.image)
    bits = int(rng.choice(_DICOM_BITS))
    largest = 2**bits - 1
    black, white = (int(rng.uniform(low, high) * largest) for low, high in ((0, 0.07), (0.6, 1)))
    inverted = bool(rng.random() < 0.25)
    stored = np.rint(black + film * np.float32(white - black)).astype(np.uint16)
    centre, width = (black + white + 1) / 2, white - black + 1
    if inverted:
        stored = largest - stored
        centre = largest + 1 - centre
    tags = {
        "PatientID": phantom.patient_id,
        "PatientName": f"PHANTOM^{phantom.patient:06d}",
        **dict.fromkeys(("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime"), ""),
        **dict.fromkeys(("StudyID", "AccessionNumber", "ReferringPhysicianName"), ""),
        "Manufacturer": "xrai phantoms",
        "Modality": "DX",
        "BodyPartExamined": "CHEST",
        "ViewPosition": "PA",
        "PatientOrientation": ["L", "F"],
        "PresentationIntentType": "FOR PRESENTATION",
        "SeriesNumber": 1,
        "InstanceNumber": phantom.image + 1,
        "ImageComments": "Procedurally drawn phantom: no patient",
        "PhotometricInterpretation": "MONOCHROME1" if inverted else "MONOCHROME2",
        "PresentationLUTShape": "INVERSE" if inverted else "IDENTITY",
        "ImagerPixelSpacing": [f"{_CHEST_MM / stored.shape[1]:.4f}"] * 2,
        "BitsStored": bits,
        "PixelIntensityRelationship": "LOG",
        "PixelIntensityRelationshipSign": 1 if inverted else -1,
        "RescaleIntercept": 0,
        "RescaleSlope": 1,
        "RescaleType": "US",
        "WindowCenter": centre,
        "WindowWidth": width,
        "VOILUTFunction": "LINEAR",
        "LossyImageCompression": "00",
    }
    return write_radiograph(
        stored, tags, identity=["phantom", str(seed), str(phantom.patient), str(phantom.image)]
    )


def encode(seed: int, phantom: Phantom, film: Array, *, image_format: str) -> bytes:
    """The bytes of a picture's file: `png` (8 bit), `jpeg` (8 bit, quality 90) or `dicom` (12 to
    16 bit).
    """
    if image_format == "dicom":
        return _encode_dicom(seed, phantom, film)
    picture = Image.fromarray(np.rint(film * np.float32(255)).astype(np.uint8))
    buffer = io.BytesIO()
    if image_format == "jpeg":
        picture.save(buffer, "JPEG", quality=90)
    else:
        picture.save(
            buffer, "PNG", compress_level=1
        )  # noise hardly shrinks: level 6 saves 3 % in four times the time
    return buffer.getvalue()


def _require_pydicom() -> None:
    if importlib.util.find_spec("pydicom") is None:
        raise UserError(
            "--format dicom needs pydicom, which is missing; pip install 'xrai[dicom]', or use png or jpeg"
        )


@dataclass(frozen=True)
class _Job:
    """What all pictures of one call share; sent to the workers."""

    out: Path
    seed: int
    image_format: str
    full_size: bool

    def path(self, phantom: Phantom) -> str:
        return f"train/{phantom.label}/{phantom.stem}{_SUFFIXES[self.image_format]}"


def _write(path: Path, data: bytes) -> None:
    """Write a file that is never seen half-written."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _draw_files(job: _Job, phantoms: tuple[Phantom, ...]) -> int:
    for phantom in phantoms:
        film = draw_film(job.seed, phantom, full_size=job.full_size)
        _write(
            job.out / job.path(phantom),
            encode(job.seed, phantom, film, image_format=job.image_format),
        )
    return len(phantoms)


def _num_cores() -> int:
    """The cores this process may use; all of the machine's where the system cannot say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _batches(phantoms: Iterator[Phantom]) -> Iterator[tuple[Phantom, ...]]:
    while batch := tuple(islice(phantoms, _IMAGES_A_TASK)):
        yield batch


def _draw_all(job: _Job, phantoms: Iterator[Phantom], *, workers: int) -> Iterator[int]:
    """Draw and write all pictures; yields how many more are done. A few tasks wait at a time,
    whatever their number.
    """
    if workers == 1:
        for batch in _batches(phantoms):
            yield _draw_files(job, batch)
        return
    spawn = multiprocessing.get_context("spawn")
    waiting: deque[Future[int]] = deque()
    with start_pool(workers, spawn) as pool:
        try:
            for batch in _batches(phantoms):
                waiting.append(pool.submit(_draw_files, job, batch))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def _is_ours(out: Path, path: Path) -> bool:
    """Whether a file of an existing folder can only come from an earlier call, finished or not."""
    place = path.relative_to(out).as_posix()
    if path.is_symlink() or not path.is_file():
        return False
    if place in {"README.txt", "labels.csv"}:
        head = path.read_bytes()[:200].decode("utf-8", "replace")
        return head.startswith((f"{_README_TITLE}\n", f"{_LABELS_HEADER}\ntrain/NORMAL/phantom-"))
    folder, name = path.parent.relative_to(out).as_posix(), path.name
    if folder == ".":
        return name in {".README.txt.tmp", ".labels.csv.tmp"}
    return folder in {"train/NORMAL", "train/PNEUMONIA"} and name.startswith(
        ("phantom-", ".phantom-")
    )


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder; links are not followed."""
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        yield from (Path(place) / name for name in (*links, *names))


def _clear(out: Path) -> None:
    """Make way: an empty folder for the pictures. Phantoms of an earlier call go; anything else
    stops the work.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a new or empty folder")
    if out.is_dir():
        for path in _files(out):
            if not _is_ours(out, path):
                raise UserError(
                    f"--out {out} holds {path.relative_to(out)}, which is no phantom; name a new or empty folder, "
                    "or one that holds phantoms alone (they are drawn anew)"
                )
        (out / "README.txt").unlink(missing_ok=True)  # first: from here on the folder is unfinished
        for path in _files(out):
            path.unlink()
    for label in ("NORMAL", "PNEUMONIA"):
        (out / "train" / label).mkdir(parents=True, exist_ok=True)


def _labels_csv(job: _Job, phantoms: Iterable[Phantom]) -> Iterator[str]:
    yield f"{_LABELS_HEADER}\n"
    for phantom in phantoms:
        subtype = "" if phantom.kind == "normal" else phantom.kind
        yield f"{job.path(phantom)},{phantom.label},{phantom.patient_id},,{subtype}\n"


def _readme(job: _Job, *, num_images: int) -> str:
    size = "1,000 to 2,500" if job.full_size else "160 to 320"
    return (
        f"{_README_TITLE}\n\n"
        "These pictures are phantoms: drawn by a program (python -m xrai.phantom), not taken of any person.\n"
        "They serve tests and demonstrations. A model trained on them knows nothing about patients.\n\n"
        f"images: {num_images}\nseed: {job.seed}\nformat: {job.image_format}\nwidth: {size} pixels\n\n"
        "Layout: train/{NORMAL,PNEUMONIA}/; splits are carved from it by patient. The number behind IM- or person is\n"
        "the patient's, _bacteria_ and _virus_ the kind of pneumonia that was drawn.\n"
        "This file is written last: without it the folder is unfinished.\n"
    )


def make_phantoms(
    out: Path,
    *,
    num_images: int,
    seed: int = 0,
    image_format: str = "png",
    full_size: bool = False,
    workers: int = 0,
) -> None:
    """Draw `num_images` phantoms into OUT/train/{NORMAL,PNEUMONIA}/ and write OUT/README.txt last.

    The first N pictures of a seed are byte for byte the same whatever `num_images` and `workers`
    (0: all cores). About 40 of 100 are normal. DICOM files come with OUT/labels.csv, for
    `xrai.preprocess --labels`. Phantoms that OUT already holds are replaced.

    Raises UserError for a value out of range, a folder that holds anything else, one that cannot
    be written, or DICOM without pydicom; XraiError if writing fails later.
    """
    if num_images < 2:
        raise UserError(
            f"--num-images {num_images}: at least 2 are needed, one of each class; the default is 600"
        )
    if seed < 0:
        raise UserError(f"--seed {seed}: must be 0 or more")
    if workers < 0:
        raise UserError(f"--workers {workers}: must be 0 (all cores) or more")
    if image_format not in _SUFFIXES:
        raise UserError(f"--format {image_format}: must be one of {', '.join(_SUFFIXES)}")
    if image_format == "dicom":
        _require_pydicom()
    out = Path(out)
    try:
        _clear(out)
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error.strerror}); name a folder that can"
        ) from error
    job = _Job(out, seed, image_format, full_size)
    workers = min(workers or _num_cores(), math.ceil(num_images / _IMAGES_A_TASK))
    try:
        with progress("drawing phantoms", total=num_images, unit="images") as bar:
            for num_done in _draw_all(job, islice(plan(seed), num_images), workers=workers):
                bar.update(num_done)
        if image_format == "dicom":
            temporary = out / ".labels.csv.tmp"
            with temporary.open("w", encoding="utf-8", newline="") as file:
                file.writelines(_labels_csv(job, islice(plan(seed), num_images)))
            temporary.replace(out / "labels.csv")
        _write(out / "README.txt", _readme(job, num_images=num_images).encode())
    except OSError as error:
        raise XraiError(
            f"writing phantoms to {out} failed ({error.strerror}); the folder has no README.txt and is unfinished: "
            "mend the cause and run the same command again"
        ) from error
    _logger.info("%d phantoms (drawn, no patients) are in %s", num_images, out)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m xrai.phantom --help")


def main() -> None:
    """The command line of `python -m xrai.phantom`."""
    parser = _Parser(
        prog="python -m xrai.phantom",
        description="Draw made-up chest X-rays (phantoms) for trying xrai and for tests. They show no patient.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder: new, empty or of phantoms"
    )
    parser.add_argument(
        "--num-images", type=int, default=600, metavar="N", help="how many pictures, at least 2"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the same seed draws the same pictures"
    )
    parser.add_argument("--format", choices=tuple(_SUFFIXES), default="png", help="file format")
    parser.add_argument(
        "--full-size", action="store_true", help="1,000 to 2,500 pixels wide instead of 160 to 320"
    )
    parser.add_argument(
        "--workers", type=int, default=0, metavar="W", help="processes; 0 means one for each core"
    )
    arguments = parser.parse_args()
    setup_logging()
    make_phantoms(
        arguments.out,
        num_images=arguments.num_images,
        seed=arguments.seed,
        image_format=arguments.format,
        full_size=arguments.full_size,
        workers=arguments.workers,
    )


if __name__ == "__main__":
    run_command(main)
