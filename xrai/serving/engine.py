"""Has the graphs of a server's models written by another process, while it scores by torch."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from xrai.errors import XraiError
from xrai.learning import engine
from xrai.log import get_logger, place_of
from xrai.pipeline import Pipeline

_WRITE_S = 600.0  # for one graph
_logger = get_logger(__name__)


class GraphWriter:
    """Writes the graphs of one pipeline at a time. Safe to use from several threads."""

    def __init__(self, use: Callable[[Pipeline], None]) -> None:
        """`use` is called, on another thread, with a pipeline that has its graphs."""
        self._use = use
        self._lock = threading.Lock()
        self._wanted: Pipeline | None = None
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, pipeline: Pipeline) -> None:
        """Begin with the graphs of a pipeline; whatever was begun before ends. Does nothing where
        graphs are of no use: on a GPU, or where packages are missing.
        """
        self.stop()
        if not pipeline.is_on_cpu:
            _logger.info("films are scored by torch, on a GPU")
            return
        if not engine.is_installed():
            names = ", ".join(engine.PACKAGES)
            _logger.info("films are scored by torch: faster would need %s", names)
            return
        with self._lock:
            self._wanted = pipeline
        self._thread = threading.Thread(target=self._run, args=(pipeline,), name="graphs")
        self._thread.start()

    def stop(self) -> None:
        """End what was begun; no graph is used after this, until the next `start`."""
        with self._lock:
            self._wanted = None
            if self._process is not None:
                self._process.kill()
        if self._thread is not None:
            self._thread.join()

    def _run(self, pipeline: Pipeline) -> None:
        began, graphs = time.monotonic(), list[bytes]()
        try:
            for packed in pipeline.pack():
                graphs.append(self._write(pipeline, packed))
                if self._wanted is not pipeline:
                    return
            is_same = pipeline.use_graphs(graphs)
            if self._wanted is not pipeline:
                return
            if not is_same:
                raise XraiError("ONNX Runtime gives other results")
        except Exception as error:
            if self._wanted is pipeline:
                words = str(error) if isinstance(error, XraiError) else place_of(error)
                _logger.warning("films are still scored by torch: %s", words)
            return
        self._use(pipeline)
        seconds = time.monotonic() - began
        _logger.info("films are scored by ONNX Runtime from now on, after %.0f s", seconds)

    def _write(self, pipeline: Pipeline, packed: bytes) -> bytes:
        with self._lock:
            if self._wanted is not pipeline:
                return b""
            process = self._process = subprocess.Popen(
                [sys.executable, "-m", "xrai.learning.engine"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        try:
            graph, said = process.communicate(packed, timeout=_WRITE_S)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            words = said.decode(errors="replace").strip().rpartition("\n")[2]
            raise XraiError(f"their graph cannot be written ({process.returncode}: {words})")
        return graph
