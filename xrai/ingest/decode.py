"""Decode the files of manifest rows, in order, with several processes if asked."""

import ctypes
import math
import multiprocessing
import multiprocessing.util
import os
import tempfile
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import forkserver
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xrai.config import Images
from xrai.dataset.manifest import Row
from xrai.errors import ImageError, SourceError, XraiError
from xrai.files import scratch_folder
from xrai.ingest.budget import MemoryBudget
from xrai.ingest.dicom import has_unknown_view, is_dicom
from xrai.ingest.images import decode_sized
from xrai.ingest.leaks import perceptual_hash
from xrai.ingest.sources import Source, hash_of
from xrai.workers import start_pool

_IMAGES_A_TASK = 16
_TASKS_AHEAD = 4  # per worker: decoded before they are needed, held in memory


@dataclass(frozen=True)
class Decoded:
    """One usable image."""

    pixels: NDArray[np.uint8]  # (H, W)
    size: tuple[int, int]  # (width, height) of the source image, upright, pixels
    perceptual_hash: str
    is_view_unknown: bool = False  # of DICOM: whether ViewPosition says nothing that is known


_File = tuple[str, str]  # path and sha256 of a source file
_Found = tuple[tuple[int, int], str, bool]  # `Decoded` without its pixels


def decode_rows(
    source: Source, images: Images, rows: Iterable[Row], *, num_workers: int
) -> Generator[Decoded | str, None, None]:
    """Each row's image, or the reason why it has none, in order.

    Memory is bounded, whatever the number of rows. Close the generator if you stop early; that
    stops the workers. Raises `SourceError` when a file has changed since it was hashed.
    """
    tasks = _tasks(rows)
    first = list(islice(tasks, num_workers))  # none is started without a task
    tasks, num_workers = chain(first, tasks), len(first)
    if num_workers <= 1:
        budget = MemoryBudget(1)
        for task in tasks:
            yield from _decode_files(source, images, task, budget)
        return
    start_workers_soon()
    context = multiprocessing.get_context("forkserver")
    num_places = _TASKS_AHEAD * num_workers + 1
    shape = (num_places, _IMAGES_A_TASK, images.size, images.size)
    # Pixels go through shared memory, everything else through pipes
    shared = context.RawArray(ctypes.c_uint8, math.prod(shape))
    places = np.ctypeslib.as_array(shared).reshape(shape)
    budget = MemoryBudget(num_workers, context)
    executor = start_pool(num_workers, context, _begin_work, source, images, shared, budget)
    ahead: deque[Future[list[_Found | str]]] = deque()
    taken = 0  # tasks whose images were handed on, so that their places are free again

    def take() -> Iterator[Decoded | str]:
        nonlocal taken
        results = ahead.popleft().result()
        for found, pixels in zip(results, places[taken % num_places], strict=False):
            yield found if isinstance(found, str) else Decoded(pixels.copy(), *found)
        taken += 1

    try:
        for number, task in enumerate(tasks):
            ahead.append(executor.submit(_work, task, number % num_places))
            if len(ahead) > _TASKS_AHEAD * num_workers:
                yield from take()
        while ahead:
            yield from take()
    except BrokenProcessPool as error:
        raise XraiError(
            "a worker process ended abruptly, perhaps killed for lack of memory; start again with "
            "fewer --workers, what is stored is kept"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _tasks(rows: Iterable[Row]) -> Iterator[list[_File]]:
    files = ((row.path, row.sha256) for row in rows)
    while task := list(islice(files, _IMAGES_A_TASK)):
        yield task


# The name of a socket has 107 bytes at most, "/pymp-xxxxxxxx/listener-xxxxxxxx" among them
_LONGEST_PLACE = 75


def start_workers_soon() -> None:
    """Let the server that workers are forked from import its modules in the background."""
    # Its sockets lie where they are removed after a kill, if their names are not too long there
    places = [str(scratch_folder()), tempfile.gettempdir()]
    fitting = (place for place in places if len(os.fsencode(place)) <= _LONGEST_PLACE)
    before, tempfile.tempdir = tempfile.tempdir, next(fitting, "/tmp")
    try:
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = before
    forkserver.set_forkserver_preload([__name__])
    forkserver.ensure_running()


_worker: tuple[Source, Images, NDArray[np.uint8], MemoryBudget] | None = None  # of a worker process


def _begin_work(source: Source, images: Images, shared: Any, budget: MemoryBudget) -> None:
    global _worker
    places = np.ctypeslib.as_array(shared).reshape(-1, _IMAGES_A_TASK, images.size, images.size)
    _worker = (source, images, places, budget)


def _work(task: Sequence[_File], place: int) -> list[_Found | str]:
    """Put the pixels of a task's images into their place; return the rest."""
    assert _worker is not None
    source, images, places, budget = _worker
    results: list[_Found | str] = []
    found = _decode_files(source, images, task, budget)
    for pixels, decoded in zip(places[place], found, strict=False):
        if isinstance(decoded, str):
            results.append(decoded)
        else:
            pixels[:] = decoded.pixels
            results.append((decoded.size, decoded.perceptual_hash, decoded.is_view_unknown))
    return results


def _decode_files(
    source: Source, images: Images, task: Sequence[_File], budget: MemoryBudget
) -> list[Decoded | str]:
    if source.num_parallel_reads == 1:
        return [_decode_file(source, images, file, budget) for file in task]
    with ThreadPoolExecutor(source.num_parallel_reads) as pool:
        return list(pool.map(lambda file: _decode_file(source, images, file, budget), task))


def _decode_file(
    source: Source, images: Images, file: _File, budget: MemoryBudget
) -> Decoded | str:
    path, sha256 = file
    try:
        data = source.read(path)
        if hash_of(data) != sha256:
            raise SourceError(
                f"{path} in source {source.name} was changed while it was read; start again"
            )
        pixels, size = decode_sized(
            data, size=images.size, fit=images.fit, max_pixels=images.max_pixels, hold=budget.hold
        )
        is_view_unknown = isinstance(data, bytes) and is_dicom(data) and has_unknown_view(data)
    except ImageError as error:
        return str(error)
    return Decoded(pixels, size, perceptual_hash(pixels), is_view_unknown)
