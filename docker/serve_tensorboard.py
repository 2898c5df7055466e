"""TensorBoard that ends when it can no longer read the runs, and shows a sign of life until then.

TensorBoard reads the runs in threads. The first failed request to a bucket ends such a thread, and
the page then shows forever what was read before (seen with 2.21). Here the process ends instead,
with status 1, to be restarted by whatever started it. Each time all runs have been read, the file
that XRAI_HEARTBEAT names is touched: a readiness probe looks at its age. `xrai tensorboard` runs
this as `python -m serve_tensorboard OPTIONS…`.
"""

import logging
import os
import sys
import threading
from pathlib import Path

from tensorboard.main import run_main

_READ = "TensorBoard done reloading"  # begins what data_ingester logs after each pass


def main() -> None:
    """Serve as `tensorboard` does, until a thread that reads runs fails."""
    os.environ.setdefault("AWS_RETRY_MODE", "standard")  # boto3 tries again first, with pauses
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "6")
    logger = logging.getLogger("tensorboard")
    logger.setLevel(logging.INFO)
    logger.addFilter(_note_reading)
    threading.excepthook = _end_with_reader
    run_main()


def _note_reading(record: logging.LogRecord) -> bool:
    """Touch the heartbeat when the log says that runs were read; pass warnings on, as usual."""
    if str(record.msg).startswith(_READ) and (heartbeat := os.environ.get("XRAI_HEARTBEAT")):
        Path(heartbeat).touch()
    return record.levelno >= logging.WARNING


def _end_with_reader(failed: threading.ExceptHookArgs) -> None:
    threading.__excepthook__(failed)
    if failed.thread is not None and failed.thread.name.startswith("Reloader"):
        cause = " ".join(str(failed.exc_value).split())
        print(f"xrai: error: the runs cannot be read: {cause}", file=sys.stderr, flush=True)
        os._exit(1)  # the server's threads would keep the process alive


if __name__ == "__main__":
    main()
