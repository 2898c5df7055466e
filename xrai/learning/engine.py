"""A network and its review rule as a graph for ONNX Runtime, by which `xrai serve` scores on a CPU.

The graph takes images as the network sees them and gives logits and atypicality, as
`xrai.learning.tracing` does, in a third to nine tenths of the time (docs/decisions/0032-engine.md).
To write it takes seconds, 0.3 GB and the interpreter's lock, so a server has a process of its own
do that: `python -m xrai.learning.engine` reads what `pack` gave and writes the graph.
"""

import importlib.util
import io
import os
import sys
from typing import Any, Final

import torch
from torch import Tensor

from xrai.learning.export import quiet
from xrai.learning.network import Network
from xrai.learning.predictor import TrainedModel, build_trained, contents_of
from xrai.learning.tracing import Look, Whole, agrees
from xrai.learning.typicality import Typicality

PACKAGES: Final = ("onnx", "onnxscript", "onnxruntime")

_INPUT, _OUTPUTS = "images", ("logits", "atypicality")
_MOST_IMAGES = 1 << 16  # of a batch; the exporter asks for a bound
_ERRORS_ONLY = 3  # ONNX Runtime's severity
_NICE = 10  # of the process that writes a graph: the films of a server come first


def is_installed() -> bool:
    """Whether graphs can be written and run here."""
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES)


def pack(model: TrainedModel) -> bytes:
    """What another process needs to write the graph of a model."""
    buffer = io.BytesIO()
    torch.save(contents_of(model), buffer)
    return buffer.getvalue()


def write_graph(packed: bytes) -> bytes:
    """The graph, as an ONNX file, of the model that `pack` got: of images as its network sees them,
    (B, 1, size, size) in [0, 1].
    """
    model = build_trained(torch.load(io.BytesIO(packed), weights_only=True))
    whole = Whole(model.network.for_inference(), model.typicality).eval()
    # The plain layout: the exporter warns about others
    whole.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    whole.requires_grad_(False)
    size = model.image_size
    images = torch.rand(3, 1, size, size, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1, max=_MOST_IMAGES)
    with quiet():
        program = torch.export.export(whole, (images,), dynamic_shapes=({0: batch},), strict=False)
        written = torch.onnx.export(
            program, (), dynamo=True, verbose=False, input_names=[_INPUT], output_names=_OUTPUTS
        )
    assert written is not None
    data: bytes = written.model_proto.SerializeToString()
    return data


def run_graph(
    graph: bytes, network: Network, typicality: Typicality, images: Tensor
) -> Look | None:
    """The graph as a function, for batches of any size; it uses as many threads as torch has on the
    thread that calls. None where it gives other results than the network for parts of these images
    (B, 1, H, W), B >= 7, in [0, 1].
    """
    look = _Sessions(graph)
    return look if agrees(Whole(network, typicality).eval(), look, images) else None


class _Sessions:
    """ONNX Runtime's session of a graph, made again where another number of threads is asked for:
    a session's is fixed.
    """

    def __init__(self, graph: bytes) -> None:
        self._graph = graph
        self._session: tuple[int, Any] = (0, None)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        num_threads, session = self._session
        if num_threads != torch.get_num_threads():
            num_threads = torch.get_num_threads()
            session = _open(self._graph, num_threads)
            self._session = num_threads, session
        logits, atypicality = session.run(list(_OUTPUTS), {_INPUT: images.contiguous().numpy()})
        return torch.from_numpy(logits), torch.from_numpy(atypicality)


def _open(graph: bytes, num_threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # Threads that wait would otherwise keep the cores that decode busy
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = _ERRORS_ONLY
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Read what `pack` gave from standard input, and write the graph to standard output."""
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # whatever packages print is no part of the graph
        os.nice(_NICE)
        out.write(write_graph(sys.stdin.buffer.read()))


if __name__ == "__main__":
    main()
