"""Films out of a request: a multipart body of files, or one file as the body, in memory alone.

Zip archives are taken apart. Nothing is written to disk, and nothing is held beyond the limits.
"""

import asyncio
import functools
import io
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from xrai.errors import ImageError, SourceError, XraiError
from xrai.ingest.find import File
from xrai.ingest.sources import ZipSource
from xrai.log import printable

MAX_FILES: Final = 5000  # of a request, those in zip archives counted
_SILENCE_S = 30.0  # between two parts of a body
_LEAST_RATE = 4096  # bytes a second of a body, on average after the first `_SILENCE_S`
_DISCARD_S, _DISCARD_BYTES = 10.0, 1 << 30  # of a body that is refused, at most
_ZIP = b"PK\x03\x04"


class RequestError(XraiError):
    """A request that is refused. `status` is that of HTTP."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


@dataclass
class Room:
    """Bytes that bodies of requests may take at once, over all requests."""

    free_bytes: int
    max_body_bytes: int


class _InMemory(MultiPartParser):
    """Starlette's parser, kept from writing files of more than 1 MiB to disk."""

    spool_max_size = 1 << 62


@asynccontextmanager
async def received(request: Request, room: Room) -> AsyncIterator[list[File]]:
    """The files of a request under the names that came with them; their bytes take up `room` until
    the block ends.

    Raises `RequestError`: 400 for a malformed body, 408 for one that stalls, 413 for one that is
    too large, 415 for one of an unknown type, 503 where `room` is used up.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > room.max_body_bytes:
        raise _too_large(room)
    taken = [0]
    stream = _limited(request, room, taken)
    try:
        if kind == "multipart/form-data":
            uploads = await _parse(request, stream)
        elif kind in ("application/dicom", "image/jpeg", "image/png", "application/zip"):
            uploads = [("film", b"".join([part async for part in stream]))]
        else:
            raise RequestError(
                415,
                "send films as multipart/form-data, or one as application/dicom, image/jpeg, "
                "image/png or application/zip",
            )
        if any(data.startswith(_ZIP) for _, data in uploads):
            yield await asyncio.to_thread(_taken_apart, uploads)
        else:
            yield _taken_apart(uploads)
    finally:
        room.free_bytes += taken[0]


async def discard(request: Request) -> None:
    """Read the rest of a refused body, within limits: a client that is still sending when the
    connection closes sees a broken connection in place of the answer.
    """
    if "expect" in request.headers:  # the client sends nothing until it is told to
        return
    left = _DISCARD_BYTES
    with suppress(ClientDisconnect, TimeoutError, RuntimeError):  # the last: it was read to its end
        async with asyncio.timeout(_DISCARD_S):
            async for part in request.stream():
                left -= len(part)
                if left < 0:
                    return


async def _limited(request: Request, room: Room, taken: list[int]) -> AsyncIterator[bytes]:
    parts, began = request.stream(), time.monotonic()
    stated = request.headers.get("content-length", "")
    while True:
        try:
            if str(taken[0]) == stated:  # the body is whole, so this does not wait
                part = await anext(parts)
            else:
                left_s = began + _SILENCE_S + taken[0] / _LEAST_RATE - time.monotonic()
                async with asyncio.timeout(min(_SILENCE_S, max(0.0, left_s))):
                    part = await anext(parts)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise RequestError(408, "the body comes too slowly, or no more of it came") from None
        except ClientDisconnect:
            raise RequestError(400, "the client left before its body was whole") from None
        if len(part) > room.free_bytes:
            raise RequestError(503, "too many films are on their way; try again")
        taken[0] += len(part)
        room.free_bytes -= len(part)
        if taken[0] > room.max_body_bytes:
            raise _too_large(room)
        yield part


async def _parse(request: Request, stream: AsyncIterator[bytes]) -> list[tuple[str, bytes]]:
    parser = _InMemory(request.headers, stream, max_files=MAX_FILES, max_fields=16)  # type: ignore[arg-type]
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise RequestError(400, f"the body is no multipart form: {error.message}") from None
    except (KeyError, UnicodeDecodeError, ValueError):
        raise RequestError(400, "the body is no multipart form") from None
    try:
        found = [each for _, each in form.multi_items() if isinstance(each, UploadFile)]
        if not found:
            raise RequestError(400, "the form holds no file")
        return [(each.filename or "film", await each.read()) for each in found]
    finally:
        await form.close()


def _taken_apart(uploads: Sequence[tuple[str, bytes]]) -> list[File]:
    files: list[File] = []
    for name, data in uploads:
        if data.startswith(_ZIP):
            files += _files_of_zip(name, data)
        else:
            files.append(File(printable(name), functools.partial(bytes, data)))
        if len(files) > MAX_FILES:
            raise RequestError(413, f"the request holds more than {MAX_FILES} films")
    return files


def _files_of_zip(name: str, data: bytes) -> list[File]:
    source = ZipSource(name, io.BytesIO(data))
    try:
        members = source.files().paths
    except SourceError as error:
        reason = f"cannot be taken apart: {printable(str(error))}"
        return [File(printable(name), functools.partial(_refuse, reason))]
    shown = [
        path
        for path in members
        if not any(part.startswith((".", "__MACOSX")) for part in path.split("/"))
    ]
    if not shown:
        return [File(printable(name), _refuse_empty)]
    return [File(printable(path), functools.partial(source.read, path)) for path in shown]


def _refuse_empty() -> bytes:
    raise ImageError("is a zip archive without a file")


def _refuse(reason: str) -> bytes:
    raise ImageError(reason)


def _too_large(room: Room) -> RequestError:
    return RequestError(
        413, f"the body is larger than {room.max_body_bytes >> 20} MiB; send fewer films at once"
    )
