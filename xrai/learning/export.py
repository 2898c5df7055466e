"""A run's network as one file for other programs: ONNX, and torch.export's own format.

Called by `xrai.export`. All preprocessing is in the graph, so a program that serves it cannot
preprocess images differently from training. Grey 8-bit images of any height and width go in;
probability and atypicality come out: one probability for two classes, otherwise one for each class
or finding.

Pillow scales 8-bit images in integers: each output pixel is a sum of input pixels, weighted by a
triangle in steps of 2^-22, first along the rows, then along the columns, rounded to 8 bits after
each. The graph does the same by two matrix products in float64, which holds such sums exactly, so
it gives the same pixels everywhere. They are Pillow's, except that Pillow 13 scales the columns of
some tall images first, where a pixel may differ by one grey level. Large JPEGs are another matter:
`xrai.ingest.images` decodes them at reduced size.

Graphs are traced with dynamic batch, height and width; torch 2.13's exporter (dynamo) handles all
three.
"""

import copy
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xrai.errors import UserError, XraiError
from xrai.files import write_atomically
from xrai.learning.predictor import TrainedModel, describe_calls

ONNX_FILE, TORCH_FILE = "model.onnx", "model.pt2"
METADATA_FILE = "metadata.json"  # inside of TORCH_FILE
OUTPUTS = ("probability", "atypicality")
TOLERANCE = 1e-5  # largest difference of a probability
# relative to the larger of 1 and the value; whitening magnifies rounding
TOLERANCE_ATYPICALITY = 1e-4
SCHEMA_VERSION = 1
NOTE = "No medical device: for research, not for diagnosis."
_AT_SHARE = "where it has the share that the run is calibrated at"  # a probability of it
_AT_SHARES = "where each has the share that the run is calibrated at"

_WEIGHT_BITS = 22  # of Pillow's weights
_DIMENSIONS = ("batch", "height", "width")
_LARGEST = 1 << 16  # of a dimension; the exporter asks for a bound

# OUTPUTS: (B,) of two classes, else (B, C), and (B,)
Scores = tuple[NDArray[np.float32], NDArray[np.float32]]
Run = Callable[[NDArray[np.uint8]], Scores]
Batches = Sequence[NDArray[np.uint8]]  # (B, H, W) each
Program = torch.export.ExportedProgram


class Fitting(nn.Module):
    """Images of any size to squares, as `xrai.ingest.images.decode` fits arrays."""

    def __init__(self, *, size: int, fit: str) -> None:
        super().__init__()
        assert fit in ("crop", "squash", "pad"), fit
        self._size, self._fit = size, fit

    def forward(self, images: Tensor) -> Tensor:
        """(B, H, W) uint8 to (B, size, size) float64 of whole numbers from 0 to 255."""
        rows, columns = (
            torch.arange(side, device=images.device).double() for side in images.shape[1:]
        )
        height, width = rows[-1] + 1, columns[-1] + 1  # tensors: they differ between calls
        short, long = torch.minimum(height, width), torch.maximum(height, width)
        across = images.double() @ self._weights(columns, width, short, long).T  # (B, H, size)
        across = _rounded(across)
        return _rounded(self._weights(rows, height, short, long) @ across)

    def _weights(self, places: Tensor, side: Tensor, short: Tensor, long: Tensor) -> Tensor:
        """Weights of each of `side` pixels for each of `size`, (size, side), in units of 2^-22."""
        number = torch.arange(self._size, device=places.device).double()
        if self._fit == "pad":  # black before and after the image
            filled = torch.round(side * (self._size / long)).clamp(min=1)
            number = number - torch.floor((self._size - filled) / 2)
            first, kept = torch.zeros_like(side), side
        else:
            filled = torch.full_like(side, self._size)
            kept = short if self._fit == "crop" else side
            first = (side - kept) / 2
        scale = kept / filled
        centre = (first + (number + 0.5) * scale)[:, None]  # (size, 1)
        distance = (places + 0.5 - centre).abs() / scale.clamp(min=1)  # (size, side)
        weights = (1 - distance).clamp(min=0)
        is_filled = ((number >= 0) & (number < filled))[:, None]
        total = weights.sum(dim=1, keepdim=True).clamp(min=1e-9)
        weights = torch.where(is_filled, weights / total, 0.0)
        return torch.floor(weights * 2**_WEIGHT_BITS + 0.5)


def _rounded(sums: Tensor) -> Tensor:
    """Sums of pixels and weights to whole grey levels, halves up."""
    return torch.floor((sums + 2 ** (_WEIGHT_BITS - 1)) * 2.0**-_WEIGHT_BITS).clamp(0, 255)


class Serving(nn.Module):
    """Everything from an image's pixels to its scores."""

    temperatures: Tensor  # (C,), or (1,) for all

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        self.fitting = Fitting(size=model.image_size, fit=model.fit)
        # copies in the plain layout: the exporter warns about others
        network = copy.deepcopy(model.network).cpu().float()
        self.network = network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.typicality = copy.deepcopy(model.typicality).cpu().float()
        self._task = model.labels.task
        self.register_buffer("temperatures", torch.tensor(model.temperatures))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, H, W) uint8 to probabilities at the run's shares, (B,) of two classes or
        (B, C), and atypicality (B,).
        """
        grey = self.fitting(images).float()[:, None] / 255  # (B, 1, size, size)
        logits, atypicality = self.typicality.atypicality(self.network, grey)
        scaled = logits / self.temperatures
        if self._task == "multiclass":
            return torch.softmax(scaled, dim=1), atypicality
        probabilities = torch.sigmoid(scaled)
        return probabilities[:, 0] if self._task == "binary" else probabilities, atypicality

    def fit(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The squares (B, size, size) uint8 that images (B, H, W) become."""
        squares: NDArray[np.uint8] = self.fitting(torch.from_numpy(images)).to(torch.uint8).numpy()
        return squares


@dataclass(frozen=True)
class Agreement:
    """How far an exported file is from torch on the images that it was checked with."""

    num_images: int
    num_shapes: int
    probability: float  # largest absolute difference
    atypicality: float  # largest difference, relative to the larger of 1 and the value


def serve(serving: nn.Module, images: NDArray[np.uint8]) -> Scores:
    """Probabilities, (B,) or (B, C), and atypicality (B,) of images (B, H, W), by torch."""
    with torch.inference_mode():
        probability, atypicality = serving(torch.from_numpy(images))
    return probability.numpy(), atypicality.numpy()


def require_onnx() -> None:
    """Raise `UserError` unless the packages that write and run ONNX are installed."""
    names = ("onnx", "onnxscript", "onnxruntime")
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"ONNX needs {' and '.join(missing)}, not installed here: pip install 'xrai[export]', "
            "or leave it out with --formats=torch"
        )


def trace(serving: Serving) -> Program:
    """The graph of a model, with dynamic batch, height and width."""
    example = torch.zeros(2, 70, 90, dtype=torch.uint8)  # a side of 1 would become a constant
    sides = [torch.export.Dim(name, min=1, max=_LARGEST) for name in _DIMENSIONS]
    shapes = (dict(enumerate(sides)),)
    program = torch.export.export(serving, (example,), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    return program


def write(
    program: Program, serving: Serving, path: Path, *, metadata: dict[str, Any], batches: Batches
) -> Agreement:
    """Write a traced graph with its metadata to an ONNX_FILE or a TORCH_FILE, if what is written
    agrees with torch on `batches`.

    Raises `XraiError` if it does not agree, and `UserError` if a package is missing.
    """
    data, run = (_to_onnx if path.name == ONNX_FILE else _to_torch)(program, metadata)
    agreement = _compare(serving, run, batches)
    if agreement.probability > TOLERANCE or agreement.atypicality > TOLERANCE_ATYPICALITY:
        raise XraiError(
            f"{path.name} is not kept: it differs from torch by {agreement.probability:.1e} in "
            f"probability, where {TOLERANCE:.0e} is allowed, and by {agreement.atypicality:.1e} in "
            f"atypicality, where {TOLERANCE_ATYPICALITY:.0e} is; other versions of torch, onnx or "
            "onnxruntime may do better"
        )
    write_atomically(path, data)
    return agreement


def _to_onnx(program: Program, metadata: dict[str, Any]) -> tuple[bytes, Run]:
    """The graph as a file for onnxruntime, and what runs it there."""
    require_onnx()
    import onnx
    import onnxruntime

    with quiet():
        written = torch.onnx.export(
            program, (), dynamo=True, verbose=False, input_names=["images"], output_names=OUTPUTS
        )
    assert written is not None
    proto = written.model_proto
    _tidy(proto)
    texts = {key: of if isinstance(of, str) else json.dumps(of) for key, of in metadata.items()}
    onnx.helper.set_model_props(proto, texts)
    onnx.checker.check_model(proto, full_check=True)
    data = proto.SerializeToString(deterministic=True)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda images: session.run(list(OUTPUTS), {"images": images})


def _to_torch(program: Program, metadata: dict[str, Any]) -> tuple[bytes, Run]:
    """The graph in torch.export's format, and what runs it."""
    buffer = io.BytesIO()
    with quiet():
        extra = {METADATA_FILE: json.dumps(metadata, indent=2)}
        torch.export.save(program, buffer, extra_files=extra)
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
    return buffer.getvalue(), lambda images: serve(loaded, images)


def describe_model(model: TrainedModel, *, version: str) -> dict[str, Any]:
    """What a program that serves the file needs to know, and what it must tell its users."""
    first, last = model.labels.spoken[0], model.labels.spoken[-1]
    num_outputs = model.labels.num_outputs
    decision, shape = {
        "binary": (
            f"{last} where probability is at least the threshold; else {first}",
            f"(batch,) float32, of {model.labels.classes[-1]}, {_AT_SHARE}",
        ),
        "multiclass": (
            "the class of the highest probability",
            f"(batch, {num_outputs}) float32, of each of the classes, {_AT_SHARES}; the sum is 1",
        ),
        "multilabel": (
            "each finding whose probability is at least its threshold",
            f"(batch, {num_outputs}) float32, of each of the findings in `classes`, {_AT_SHARES}",
        ),
    }[model.labels.task]
    return {
        "schema_version": SCHEMA_VERSION,
        "tool_version": version,
        "note": NOTE,
        "run_id": model.run_id,
        "dataset_fingerprint": model.fingerprint,
        **describe_calls(model.labels, model.thresholds, model.temperatures),
        "decision": f"review where atypicality is above 1; else {decision}",
        "image_size": model.image_size,
        "fit": model.fit,
        "input": "images (batch, height, width) uint8, grey, upright, 0 is black",
        "outputs": {
            "probability": shape,
            "atypicality": "(batch,) float32, how unlike the training images; above 1 asks for "
            "review",
        },
    }


def _tidy(proto: Any) -> None:
    """Name the dimensions, and remove traces of the machine that exported."""
    graph = proto.graph
    sides = [side.dim_param for side in graph.input[0].type.tensor_type.shape.dim]
    dimensions = dict(zip(sides, _DIMENSIONS, strict=True))
    for value in (*graph.input, *graph.output):
        for side in value.type.tensor_type.shape.dim:
            if side.dim_param:
                side.dim_param = dimensions[side.dim_param]
    for node in graph.node:
        node.doc_string = ""
    for entry in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del entry.metadata_props[:]
    del graph.value_info[:], proto.functions[:]


def _compare(serving: Serving, run: Run, batches: Batches) -> Agreement:
    worst = [0.0, 0.0]
    for images in batches:
        pairs = zip(serve(serving, images), run(images), strict=True)
        for number, (ours, theirs) in enumerate(pairs):
            scale = np.maximum(1, np.abs(ours))  # a probability is at most 1
            found = float(np.max(np.abs(ours.astype(np.float64) - theirs) / scale))
            worst[number] = max(worst[number], found if np.isfinite(found) else np.inf)
    shapes = {images.shape for images in batches}
    return Agreement(sum(map(len, batches)), len(shapes), *worst)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences torch's deprecation warnings and its notes that torchvision is missing."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
