"""How a phantom is drawn: pose, absorption, exposure. Pure functions; read upwards from
`draw_phantom`.

An image is a sum of absorptions (soft tissue and bone, minus the air in the lungs), exposed like
film. A pose maps pixels to the chest's frame (see `anatomy`). Everything but the disease (pose,
size, exposure, markers, borders) is drawn from the same distribution for all classes, so only the
lungs tell them apart.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from xrai.phantom.anatomy import (
    Anatomy,
    Disease,
    Nodule,
    Phantom,
    Pneumothorax,
    draw_anatomy,
    draw_disease,
    generator,
)
from xrai.phantom.findings import draw_findings

Array = NDArray[np.floating]  # float32
_ASPECT = 0.62  # a step of 1 in v is as long as this one in u, on average
_CAGE = 0.95  # half the inner width of the rib cage
_DRAWN_WIDTH_MAX = 640  # soft structures of wider images are drawn at this width and enlarged
_PIXELS_A_STRIP = 12_000  # 48 kB as float32


# Pixel (x, y) to chest frame: (a, b, c), (d, e, f) for u = a x + b y + c, v = d x + e y + f
_Pose = tuple[tuple[float, float, float], tuple[float, float, float]]


def _draw_pose(rng: np.random.Generator, width: int, height: int) -> _Pose:
    unit_v = min(height, width / 1.12) * rng.uniform(0.55, 0.74)
    unit_u = unit_v * _ASPECT * rng.uniform(0.92, 1.10)
    turn = math.radians(float(np.clip(rng.normal(0, 4), -10, 10)))
    shear = rng.uniform(-0.05, 0.05)
    x0 = width * (0.5 + rng.uniform(-0.05, 0.05))
    y0 = height * (0.5 + rng.uniform(-0.06, 0.07))
    cos, sin = math.cos(turn), math.sin(turn)
    a, b = cos / unit_u, (sin + shear) / unit_u
    d, e = -sin / unit_v, cos / unit_v
    return (a, b, -a * x0 - b * y0), (d, e, 0.5 - d * x0 - e * y0)


def _edge(x: Array, width: float) -> Array:
    """A straight step from 0 to 1, `width` wide, centered on x = 0: cheaper, for narrow edges."""
    t = x * np.float32(1 / width)
    t += np.float32(0.5)
    np.clip(t, 0, 1, out=t)
    return t


def _ramp(x: Array, width: float) -> Array:
    """A smooth step from 0 to 1, `width` wide, centered on x = 0."""
    t = _edge(x, width)
    step = t * np.float32(-2)
    step += 3
    step *= t
    step *= t
    return step


def _ellipse(
    u: Array, v: Array, center: tuple[float, float], radii: tuple[float, float], angle: float = 0.0
) -> Array:
    """1 at the center, 0 on the rim, negative outside: 1 - r**2."""
    cos, sin = math.cos(angle), math.sin(angle)
    du, dv = u - center[0], v - center[1]
    along = du * (cos / radii[0]) + dv * (sin / radii[0])
    across = dv * (cos / radii[1]) - du * (sin / radii[1])
    inside: Array = 1 - (along * along + across * across)
    return inside


def _capsule(
    u: Array, v: Array, start: tuple[float, float], span: tuple[Array | float, Array | float]
) -> Array:
    """Distance from a bar from `start` to `start + span`; one span for all places, or for each."""
    du, dv = span
    from_u, from_v = u - start[0], v - start[1]
    t = np.clip((from_u * du + from_v * dv) / (du * du + dv * dv), 0, 1)
    from_u -= t * du
    from_v -= t * dv
    distance: Array = np.sqrt(from_u * from_u + from_v * from_v)
    return distance


def _place_texture(tile: Array, pose: _Pose, shape: tuple[int, int]) -> Array:
    """A tile (128, 128) over u in [-1.3, 1.3], v in [-0.2, 1.4], in this pose; 0 outside."""
    su, sv = 128 / 2.6, 128 / 1.6
    (a, b, c), (d, e, f) = pose
    across, down = (a * su, b * su, (c + 1.3) * su), (d * sv, e * sv, (f + 0.2) * sv)
    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    size = (shape[1], shape[0])
    placed = Image.fromarray(tile).transform(size, affine, (*across, *down), resample=bilinear)
    texture: Array = np.asarray(placed)
    return texture


def _draw_vessels(anatomy: Anatomy, pose: _Pose, shape: tuple[int, int]) -> Array:
    """The vessel tree as strengths in [0, 1], antialiased: drawn at twice the size and halved."""
    height, width = shape
    canvas = Image.new("L", (2 * width, 2 * height))
    draw = ImageDraw.Draw(canvas)
    (a, b, c), (d, e, f) = pose
    for points, thickness in anatomy.vessels:
        size = thickness * (2 / abs(e))
        fill = int(255 * min(1.0, 0.35 + thickness / 0.03))
        u, v = np.transpose(points)
        du, dv = u - c, v - f
        xy = np.stack([e * du - b * dv, a * dv - d * du], axis=1) / (a * e - b * d) * 2
        fill = fill if size >= 1 else int(fill * size)
        draw.line(xy.ravel().tolist(), fill=fill, width=max(1, round(size)), joint="curve")
    strengths: Array = np.asarray(canvas.reduce(2), dtype=np.float32) * np.float32(1 / 255)
    return strengths


@dataclass(frozen=True)
class _Strip:
    """Rows of an image: where each pixel is in the chest, and its textures. All (rows, W)."""

    u: Array
    v: Array
    lateral: Array  # distance from the midline, on either side
    left: NDArray[np.bool_]  # the patient's left: u > 0
    texture: Array
    fine: Array
    vessels: Array

    def meets(self, low: float, high: float) -> bool:
        """Whether any pixel is at a height v between `low` and `high`, so it must be drawn."""
        return bool(self.v.max() > low and self.v.min() < high)

    def by_side(self, right: float, left: float) -> Array:
        """One number for the patient's right, another for the left."""
        return np.where(self.left, np.float32(left), np.float32(right))


def _flesh(at: _Strip, anatomy: Anatomy) -> Array:
    """Neck, shoulders and trunk as one silhouette, arms with their bones, and the chin."""
    neck = 0.36 + 0.10 * _ramp(at.v + 0.3, 0.4)
    trunk = neck + (anatomy.body_width - neck) * _ramp(at.v - 0.01, 0.42)
    trunk += 0.35 * _edge(at.v - 1.15, 1.2)
    inside = trunk - at.lateral
    body = _edge(inside, 0.05) * (0.45 + 0.55 * _ramp(inside - 0.22, 0.60))

    shoulder, joint = (anatomy.body_width - 0.24, 0.16), (anatomy.body_width - 0.06, 0.09)
    right, left = anatomy.arm_angles
    reach_u = at.by_side(1.2 * math.cos(right), 1.2 * math.cos(left))
    reach_v = at.by_side(1.2 * math.sin(right), 1.2 * math.sin(left))
    from_arm = _capsule(at.lateral, at.v, joint, (reach_u, reach_v))
    arm = 0.23 - from_arm
    if at.meets(-0.2, 0.5):
        span = (joint[0] - shoulder[0], joint[1] - shoulder[1])
        arm = np.maximum(arm, 0.25 - _capsule(at.lateral, at.v, shoulder, span))
    flesh = 0.66 * _edge(arm, 0.06) * (0.45 + 0.55 * _ramp(arm - 0.1, 0.28))
    body = np.maximum(body, flesh) + 0.25 * np.minimum(body, flesh)
    bone = 0.07 - from_arm
    if at.meets(-0.1, 0.3):
        bone = np.maximum(bone, 0.08 * _ellipse(at.lateral, at.v, joint, (0.115, 0.115)))
    body += anatomy.bone_density * _edge(bone, 0.05)

    if at.meets(-2.0, anatomy.chin_v + 0.42):
        chin = _ellipse(at.u, at.v, (0.0, anatomy.chin_v), (0.50, 0.34))
        body = np.maximum(body, 1.05 * _ramp(chin - 0.1, 0.7))
    return body


def _heart_scale(anatomy: Anatomy, ratio: float) -> float:
    """How much larger a heart is whose width is `ratio` of the chest's; 1 for a ratio of 0."""
    if not ratio:
        return 1.0
    angle = anatomy.heart_angle
    left = math.hypot(anatomy.heart_width * math.cos(angle), 0.25 * math.sin(angle))
    return (2 * _CAGE * ratio - anatomy.heart_u - 0.06) / (left + 0.22)


def _middle(at: _Strip, anatomy: Anatomy, heart_ratio: float) -> Array:
    """The heart and what else lies between the lungs, 0 to 1."""
    half_width = anatomy.mediastinum + 0.03 * np.cos(9 * at.v) + 0.14 * _ramp(at.v - 0.45, 0.5)
    middle = _ramp(half_width - at.lateral, 0.09)
    if at.meets(0.2, 1.3):
        scale = _heart_scale(anatomy, heart_ratio)
        height = 0.25 * (0.75 + 0.25 * scale)
        center, radii = (anatomy.heart_u, anatomy.heart_v), (scale * anatomy.heart_width, height)
        heart = _ellipse(at.u, at.v, center, radii, anatomy.heart_angle)
        center, radii = (-0.06, anatomy.heart_v - 0.02), (0.22 * scale, height)
        right_heart = _ellipse(at.u, at.v, center, radii)
        middle = np.maximum(middle, _ramp(np.maximum(heart, right_heart), 0.30))
    if at.meets(0.0, 0.6):
        aorta = _ellipse(at.u, at.v, (anatomy.mediastinum, 0.30), (0.10, 0.09))
        middle = np.maximum(middle, 0.8 * _ramp(aorta, 0.5))
        for side, size in zip((-1, 1), anatomy.thymus, strict=True):
            if size > 0:
                bulge = _ellipse(at.u, at.v, (side * 0.12, 0.28), (0.14 + size, 0.20))
                middle = np.maximum(middle, 0.6 * _ramp(bulge, 0.6))
    return middle


def _filling(at: _Strip, disease: Disease, severity: float) -> Array:
    """How much of the lungs' air pneumonia has replaced, 0 to 0.95."""
    filling = np.zeros_like(at.u)
    for lobe in disease.lobes:
        edge = at.v - lobe.fissure_v - lobe.slope * (at.lateral - 0.4) + 0.03 * at.texture
        shade = _ramp(-edge if lobe.upper else edge, lobe.softness)
        shade = shade * (at.left if lobe.side > 0 else ~at.left)
        filling = np.maximum(filling, severity * lobe.density * shade * (0.85 + 0.08 * at.texture))
    for opacity in disease.opacities:
        reach = 1.9 * max(opacity.radius_m, opacity.radius_v)
        if at.meets(opacity.v - reach, opacity.v + reach):
            center = (opacity.side * opacity.m, opacity.v)
            radii = (opacity.radius_m, opacity.radius_v)
            depth = _ellipse(at.u, at.v, center, radii, opacity.angle)
            depth += opacity.roughness * at.texture
            shade = _ramp(depth - 0.5 * opacity.softness + 0.4, 1.4 * opacity.softness)
            filling = np.maximum(filling, severity * opacity.density * shade)
    return np.minimum(filling, 0.95)


def _bones(at: _Strip, anatomy: Anatomy, cage: Array) -> Array:
    """Ribs, spine, collar bones and shoulder blades. `cage` is the rib cage's inner edge."""
    # Back ribs run out and down, front ribs come back steeper; both bend with the cage
    turns, phase = 2 * math.pi / anatomy.rib_spacing, 2 * math.pi * anatomy.rib_phase
    inside_cage = _edge(cage + 0.05 - at.lateral, 0.03)
    inside_cage = inside_cage * _edge(at.v + 0.02, 0.06) * _edge(1.3 - at.v, 0.5)
    rim = 1 + 1.1 * _ramp(at.lateral - cage + 0.10, 0.16)
    back = np.cos(turns * (at.v - at.lateral * (anatomy.rib_slope * at.lateral - 0.05)) + phase)
    front = np.cos(turns * (at.v + 0.42 * at.lateral) + phase)
    ribs = _ramp(back - 0.25, 0.9) * rim * _edge(at.lateral - 0.1, 0.1)
    ribs += 0.55 * _ramp(front - 0.35, 0.9) * _edge(at.lateral - 0.45, 0.35)
    bones = anatomy.rib_density * ribs * inside_cage
    discs = np.cos(at.v * (2 * math.pi / anatomy.vertebra_height))
    spine = anatomy.bone_density * _edge(0.115 - np.abs(at.u - anatomy.spine_u), 0.05)
    bones += spine * (0.8 + 0.2 * _edge(discs + 0.5, 0.8)) * _edge(at.v + 0.9, 0.4)
    if at.meets(-0.4, 0.4):
        collar_v = anatomy.clavicle_v + anatomy.clavicle_slope * at.lateral
        collar_v = collar_v + 0.03 * np.sin(5 * at.lateral)
        collar = _ramp(0.034 - np.abs(at.v - collar_v), 0.04)
        collar *= _edge(at.lateral - 0.12, 0.06) * _edge(1.05 - at.lateral, 0.1)
        bones += 1.1 * anatomy.bone_density * collar
    if at.meets(-0.1, 0.7):
        blade = _capsule(at.lateral, at.v, (0.90, 0.10), (0.12, 0.32))
        bones += anatomy.scapula * _edge(0.13 - blade, 0.08)
    return bones


def _pneumonia(at: _Strip, disease: Disease, severity: float, air: Array, marks: Array) -> None:
    """Fill the lungs' `air` and thicken their `marks`, in place."""
    if not (disease.lobes or disease.opacities or any(disease.haze)):
        return
    filling = _filling(at, disease, severity)
    if any(disease.haze):
        near_hilum = _ellipse(at.lateral, at.v, (0.25, 0.52), (0.75, 0.62)) + 0.25 * at.texture
        near_hilum = _ramp(near_hilum, 1.3)
        filling = np.maximum(filling, severity * at.by_side(*disease.haze) * near_hilum)
        net = severity * at.by_side(*disease.reticulation)
        marks += net * (at.fine + 0.5) * (0.4 + 0.6 * near_hilum)
    air *= 1 - filling


def _up(v: Array) -> Array:
    """1 at the tips of the lungs and above, 0 where the rib cage is widest and below."""
    up: Array = np.clip(1 - v * (1 / 0.95), 0, 1)
    return up


def _cage(up: Array, anatomy: Anatomy) -> Array:
    """The rib cage's inner edge, as a distance from the midline."""
    shape = anatomy.cage_shape
    edge: Array = _CAGE * np.sqrt(1 - up * up * (shape + (1 - shape) * up))
    return edge


def _fluid_surface(outer: Array, height: Array) -> Array:
    """Where fluid of a height ends, relative to the diaphragm's dome; it creeps up at the ribs,
    which are `outer` away.
    """
    meniscus = np.exp(np.maximum(outer, 0) * np.float32(-10))
    surface: Array = 0.14 - height - (0.08 + 0.3 * height) * meniscus
    surface[height <= 0] = 9
    return surface


def _collapse(
    at: _Strip, anatomy: Anatomy, pneumothorax: Pneumothorax, air: Array, texture: Array
) -> Array:
    """Thicken a lung that has shrunk, in its `air`. Returns its texture, which the air beside it
    lacks, with the line of the pleura between the two.
    """
    gap = pneumothorax.gap * (1 - 0.6 * _ramp(at.v - 0.6, 0.6))
    inner = _cage(_up(at.v - pneumothorax.drop), anatomy) - gap - at.lateral
    own = at.left if pneumothorax.side > 0 else ~at.left
    lung = _edge(inner, 0.02)
    pleura = 0.12 * _edge(0.018 - np.abs(inner), 0.02)
    air *= np.where(own, 1.25 - (0.25 + 0.6 * pneumothorax.gap) * lung, np.float32(1))
    return np.where(own, texture * lung + pleura, texture)


def _nodule(at: _Strip, nodule: Nodule) -> Array:
    """The length of the beam's path through a ball, relative to that through its middle."""
    center, radii = (nodule.side * nodule.m, nodule.v), (nodule.radius, _ASPECT * nodule.radius)
    return np.sqrt(np.maximum(_ellipse(at.u, at.v, center, radii), 0))


def _absorption_at(at: _Strip, anatomy: Anatomy, disease: Disease, severity: float) -> Array:
    """The absorption of some rows of the image."""
    body, middle = _flesh(at, anatomy), _middle(at, anatomy, disease.heart_ratio)

    # The lungs: between rib cage, middle and diaphragm; what fills them replaces their air
    up = _up(at.v)
    up_squared = up * up
    cage = _cage(up, anatomy)
    offset = at.lateral - 0.42
    dome = anatomy.dome_right + (anatomy.dome_left - anatomy.dome_right) * _ramp(at.u, 0.5)
    diaphragm = dome + 0.55 * offset * offset
    if any(disease.effusion):
        diaphragm -= 1.6 * severity * at.by_side(*disease.effusion) * _ramp(at.lateral - 0.6, 0.7)
    outer = cage - at.lateral
    if any(disease.fluid):
        height = severity * at.by_side(*disease.fluid)
        diaphragm = np.minimum(diaphragm, dome + _fluid_surface(outer, height))
    air = _edge(outer, 0.05) * (0.62 + 0.38 * _ramp(outer - 0.18, 0.4))
    air *= _ramp(diaphragm - at.v, 0.035)
    air *= _ramp(at.lateral - 0.10 - 0.22 * up_squared * up_squared * up_squared, 0.08)
    hilum = _ellipse(at.lateral, at.v, (0.22, 0.47), (0.14, 0.17)) + 0.2 * at.texture
    marks = anatomy.hilum * _ramp(hilum, 1.2)
    _pneumonia(at, disease, severity, air, marks)
    marks *= air
    air *= 1 - 0.86 * middle
    texture = anatomy.vessel_density * at.vessels + 0.012 * at.fine + 0.015 * at.texture
    if disease.pneumothorax:
        texture = _collapse(at, anatomy, disease.pneumothorax, air, texture)
    marks += texture * air
    for nodule in disease.nodules:
        marks += severity * nodule.density * _nodule(at, nodule)

    below = _edge(at.v - diaphragm, 0.05)
    soft = 0.16 * below + 0.18 * middle + 1
    if at.meets(0.3, 1.2):
        breast = _ellipse(at.lateral, at.v, (0.55, 0.75), (0.45, 0.30))
        soft += anatomy.breast * _ramp(breast + 0.1, 0.5)
    if at.meets(0.8, 9.0):
        belly = 0.10 * at.texture * _edge(at.v - 0.9, 0.2) * _edge(1.28 - at.v, 0.2)
        soft += belly * _edge(1.15 - at.lateral, 0.25)
    if at.meets(-0.6, 0.5):
        trachea = _edge(0.055 - np.abs(at.u - 0.6 * anatomy.spine_u), 0.05)
        soft -= 0.10 * trachea * _edge(0.40 - at.v, 0.1) * _edge(at.v + 0.45, 0.2)
    total = body * (soft + _bones(at, anatomy, cage)) - anatomy.air * air + marks
    stomach_u, stomach_v, stomach_size, stomach_air = anatomy.stomach
    if stomach_air > 0 and at.meets(0.7, 1.4):
        center, radii = (stomach_u, anatomy.dome_left + stomach_v), (stomach_size, stomach_size / 2)
        total -= stomach_air * _ramp(_ellipse(at.u, at.v, center, radii), 0.8) * below
    absorption: Array = np.maximum(total, 0)
    return absorption


def _absorption(
    anatomy: Anatomy, disease: Disease, pose: _Pose, shape: tuple[int, int], severity: float
) -> Array:
    """How much of the beam the body absorbs, (H, W): 0 outside, 1 in soft tissue, more in bone.

    Computed in strips of rows that fit the processor's cache, in two thirds of the time.
    """
    height, width = shape
    x = np.arange(width, dtype=np.float32)
    y = np.arange(height, dtype=np.float32)[:, None]
    u, v = (np.float32(a) * x + np.float32(b) * y + np.float32(c) for a, b, c in pose)
    texture = _place_texture(anatomy.texture, pose, shape)
    fine = _place_texture(anatomy.fine_texture, pose, shape)
    vessels = _draw_vessels(anatomy, pose, shape)
    absorption = np.empty(shape, dtype=np.float32)
    num_rows = max(1, _PIXELS_A_STRIP // width)
    for first in range(0, height, num_rows):
        rows = slice(first, first + num_rows)
        own = u[rows]
        strip = _Strip(own, v[rows], np.abs(own), own > 0, texture[rows], fine[rows], vessels[rows])
        absorption[rows] = _absorption_at(strip, anatomy, disease, severity)
    return absorption


def _expose(rng: np.random.Generator, absorption: Array, size: tuple[int, int]) -> Array:
    """The image (H, W) in [0, 1], black where the beam got through, of a size (width, height)."""
    gain, fog, gamma = (rng.uniform(*of) for of in ((0.52, 0.78), (-0.03, 0.12), (0.75, 1.45)))
    image: Array = np.clip(absorption * gain + fog, 0, None) ** np.float32(gamma)
    image = image / (1 + np.float32(0.22) * image * image)  # film saturates
    blur = np.float32(rng.uniform(0.0, 0.3))
    for _axis in range(2):
        image = image.T.copy()
        image[1:-1] += blur * (0.5 * (image[:-2] + image[2:]) - image[1:-1])
    if (image.shape[1], image.shape[0]) != size:
        image = np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    image += np.float32(rng.uniform(0.005, 0.022)) * noise * np.sqrt(0.15 + np.clip(image, 0, 1))
    return image


def _add_tubes(rng: np.random.Generator, image: Array) -> None:
    """A cable or tube across some images."""
    if rng.random() >= 0.15:
        return
    height, width = image.shape
    canvas = Image.new("L", (width, height))
    steps = np.linspace(0, 1, 24)
    waves = 0.06 * np.sin(steps * rng.uniform(3, 9))
    x = width * (rng.uniform(0.1, 0.9) + rng.uniform(-0.5, 0.5) * steps + waves)
    y = height * (rng.uniform(-0.1, 0.5) + rng.uniform(0.2, 0.9) * steps)
    points = np.stack([x, y], axis=1).ravel().tolist()
    ImageDraw.Draw(canvas).line(points, fill=255, width=max(1, width // 150), joint="curve")
    image += np.float32(rng.uniform(0.08, 0.3) / 255) * np.asarray(canvas, dtype=np.float32)


def _add_frame(rng: np.random.Generator, image: Array) -> None:
    """Black edges where the beam was stopped, and the lead letter that marks the side."""
    height, width = image.shape
    if rng.random() < 0.45:
        top, bottom, left, right = np.maximum(0, rng.uniform(-0.05, 0.06, 4))
        shade = rng.uniform(0.0, 0.06)
        image[: round(top * height)] = shade
        image[height - round(bottom * height) :] = shade
        image[:, : round(left * width)] = shade
        image[:, width - round(right * width) :] = shade
    if rng.random() < 0.85:
        letter = "R" if rng.random() < 0.7 else "L"
        size = max(8.0, height * rng.uniform(0.05, 0.10))
        x = width * rng.uniform(0.02, 0.14)
        if letter == "L":
            x = width - x - 0.7 * size
        y = height * rng.uniform(0.02, 0.5)
        canvas = Image.new("L", (width, height))
        font = ImageFont.load_default(size=size)
        ImageDraw.Draw(canvas).text((x, y), letter, fill=255, font=font)
        ink = np.asarray(canvas, dtype=np.float32) * np.float32(rng.uniform(0.6, 1.0) / 255)
        np.maximum(image, ink, out=image)


def draw_phantom(seed: int, phantom: Phantom, *, full_size: bool = False) -> Array:
    """Draw one image: (H, W) float32 in [0, 1], bright where the beam was absorbed.

    W is 160 to 320 pixels, or 1,000 to 2,500 with `full_size`; W / H is 0.85 to 1.45.
    """
    of_patient = generator(seed, 1, phantom.patient)
    anatomy = draw_anatomy(of_patient)
    if phantom.kind == "findings":
        disease = draw_findings(of_patient, phantom.findings)
    else:
        disease = draw_disease(of_patient, phantom.kind)
    rng = generator(seed, 2, phantom.patient, phantom.image)
    narrow, wide = (1000, 2500) if full_size else (160, 320)
    width = round(narrow * (wide / narrow) ** rng.random())
    height = round(width / rng.uniform(0.85, 1.45))
    enlarge = max(1.0, width / _DRAWN_WIDTH_MAX)
    drawn = (round(width / enlarge), round(height / enlarge))
    pose = _draw_pose(rng, *drawn)
    severity = rng.uniform(0.85, 1.15)
    absorption = _absorption(anatomy, disease, pose, (drawn[1], drawn[0]), severity)
    image = _expose(rng, absorption, (width, height))
    _add_tubes(rng, image)
    _add_frame(rng, image)
    return np.clip(image, 0, 1, out=image)
