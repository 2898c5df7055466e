"""Processes that end with their parent, however it ends: workers of a pool, ranks of torchrun."""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

from xrai import parent_at_start
from xrai.errors import StoppedError

_LOOK_EVERY_S = 0.5
_T = TypeVar("_T")
_R = TypeVar("_R")


def start_pool(
    num_workers: int,
    context: BaseContext,
    initializer: Callable[..., object] | None = None,
    *initargs: Any,
) -> ProcessPoolExecutor:
    """A pool whose workers first call `initializer(*initargs)`. They leave SIGINT to the parent."""
    return ProcessPoolExecutor(
        num_workers, context, initializer=_begin, initargs=(initializer, initargs)
    )


def map_ahead(
    pool: Executor, function: Callable[[_T], _R], tasks: Iterable[_T], *, num_ahead: int
) -> Iterator[_R]:
    """Like `pool.map`, but submits at most `num_ahead` tasks ahead of the results."""
    ahead: deque[Future[_R]] = deque()
    try:
        for task in tasks:
            ahead.append(pool.submit(function, task))
            if len(ahead) == num_ahead:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()


def follow_parent(*, grace_s: float) -> None:
    """When this process's parent ends, ask this process to stop by SIGTERM, and end it `grace_s`
    seconds later if it is still there. Raises `StoppedError` if the parent ended before.
    """
    parent = parent_at_start()
    if os.getppid() != parent:
        raise StoppedError("the process that started this one has ended")

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os._exit(1)  # it hangs, waiting for ranks that are gone

    threading.Thread(target=watch, daemon=True).start()


def _begin(initializer: Callable[..., object] | None, initargs: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the parent was killed: nobody takes results any more
