"""Log lines of other packages, without what they quote.

An error may quote a film's name, and uvicorn, asyncio and concurrent.futures log errors with their
message and traceback. `xrai.serve` has them logged by their place alone.
"""

import logging
import threading
from typing import TextIO

from xrai.log import place_of, printable

_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class _Bare(logging.Formatter):
    """Formats an error as the place where it happened, and any other record as the first line of
    its message without the values.
    """

    def format(self, record: logging.LogRecord) -> str:
        words = printable(str(record.msg).partition("\n")[0])
        if isinstance(record.exc_info, tuple) and record.exc_info[1] is not None:
            words = f"failed: {place_of(record.exc_info[1])}"
        bare = logging.makeLogRecord({**vars(record), "args": (), "exc_info": None})
        bare.exc_text = bare.stack_info = None
        bare.msg = f"{record.name} {words}"
        return super().format(bare)


def log_others(stream: TextIO) -> logging.Handler:
    """Write warnings and errors of other packages, and the errors that end threads, to a stream.
    Returns the handler, which stays on the root logger.
    """
    handler = logging.StreamHandler(stream)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_Bare(_FORMAT, datefmt="%H:%M:%S"))
    handler.addFilter(lambda record: record.name.partition(".")[0] != "xrai")  # it has its own
    logging.getLogger().addHandler(handler)
    # it warns of each malformed form and quotes it; the client gets an answer that says so
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    threading.excepthook = _log_end
    return handler


def _log_end(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_value is not None and not isinstance(ended.exc_value, SystemExit):
        name = ended.thread.name if ended.thread else "unknown"
        logging.getLogger("xrai.serve").error("thread %s %s", name, place_of(ended.exc_value))
