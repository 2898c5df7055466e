"""A pool of worker processes that end with their parent, however it ends."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from typing import Any


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
