"""A store that is a bucket of S3, or of another server that speaks its protocol."""

import base64
import functools
import hashlib
import io
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from xrai import errors
from xrai.errors import AlreadyExistsError, NotFoundError, WrongEndpointError
from xrai.files import explaining, replacing
from xrai.log import get_logger
from xrai.store.answers import (
    NotS3Error,
    UnknownRequestError,
    ask,
    explain,
    masked,
    network_errors,
    plain,
    watch,
)
from xrai.store.base import Store, StoredObject, check_key

_CHUNK_BYTES = 256 * 1024
_PART_BYTES = 32 * 1024 * 1024  # objects above this go up in parts; S3 takes parts from 5 MiB
_MAX_PARTS = 10_000  # S3's limit
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 4.0

_logger = get_logger(__name__)
# When the current thread stops waiting for bytes; a socket's time-out limits only a silence
_reading_ends: ContextVar[float] = ContextVar("_reading_ends")
_T = TypeVar("_T")


class S3Store(Store):
    """Objects below a prefix of a bucket. Keys, region and endpoint come from the standard AWS
    environment alone.
    """

    def __init__(self, bucket: str, prefix: str, *, timeout_s: float, retry_s: float) -> None:
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        self._timeout_s, self._retry_s = timeout_s, retry_s
        # (process id, client): boto3's clients do not survive a fork
        self._connection: tuple[int, Any] | None = None
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    def read(self, key: str, *, max_bytes: int = sys.maxsize) -> bytes:
        chunks: list[bytes] = []
        self._receive(key, chunks.append, max_bytes=max_bytes)
        return b"".join(chunks)

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        if only_if_absent:
            self._create(key, data)
        else:
            self._put(key, data)

    def download(self, key: str, path: Path) -> str:
        with explaining("written", str(path)), replacing(path) as file:
            return self._receive(key, file.write)

    def upload(self, key: str, path: Path) -> str:
        with explaining("read", str(path)), path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes > _PART_BYTES:
                part_bytes = max(_PART_BYTES, -(-size_bytes // _MAX_PARTS))
                return self._put_parts(key, file, part_bytes=part_bytes)
            data = file.read()
        self._put(key, data)
        return hashlib.sha256(data).hexdigest()

    def size(self, key: str) -> int | None:
        try:
            return int(self._ask("read", key, "head_object", Key=self._name(key))["ContentLength"])
        except NotFoundError:
            # HEAD carries no error code, so a missing bucket looks like a missing object. Keys
            # that may read and write need not have the right to list.
            with suppress(errors.ForbiddenError):
                self._ask("read", "", "list_objects_v2", MaxKeys=1)
            return None

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        request = {"Prefix": self._prefix + prefix}
        while True:
            page = self._ask("listed", prefix, "list_objects_v2", **request)
            for entry in page.get("Contents", []):
                key = entry["Key"][len(self._prefix) :]
                if key and not key.endswith("/"):  # consoles mark folders by empty objects
                    yield StoredObject(key, entry["Size"])
            if not page["IsTruncated"]:
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        self._ask("deleted", key, "delete_object", Key=self._name(key))

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def _name(self, key: str) -> str:
        name = self._prefix + check_key(key)
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise errors.StoreError(f"{name!r} is not a key: keys in a bucket are UTF-8") from error
        return name

    def _put(self, key: str, data: bytes, **conditions: str) -> None:
        self._ask("written", key, "put_object", Key=self._name(key), **_body(data), **conditions)

    def _create(self, key: str, data: bytes) -> None:
        """Put only if there is no object (If-None-Match)."""
        try:
            self._put(key, data, IfNoneMatch="*")
        except AlreadyExistsError:
            # The answer to our own first try may have been lost, and the second try refused
            # because of it.
            with suppress(NotFoundError):  # it was another's, and has been deleted since
                if self.read(key) == data:
                    return
            raise
        except UnknownRequestError:  # no conditional writes: check first, the window is small
            if self.size(key) is not None:
                raise AlreadyExistsError(f"{self._where(key)} exists already") from None
            self._put(key, data)

    def _put_parts(self, key: str, file: BinaryIO, *, part_bytes: int) -> str:
        upload = {"Key": self._name(key)}
        started = self._ask("written", key, "create_multipart_upload", **upload)
        upload["UploadId"] = started["UploadId"]
        digest = hashlib.sha256()
        parts: list[dict[str, Any]] = []
        try:
            while data := file.read(part_bytes):
                digest.update(data)
                part = {"PartNumber": len(parts) + 1}
                answer = self._ask("written", key, "upload_part", **upload, **part, **_body(data))
                parts.append({**part, "ETag": answer["ETag"]})
            whole = {**upload, "MultipartUpload": {"Parts": parts}}
            self._ask("written", key, "complete_multipart_upload", **whole)
        except NotFoundError as error:
            # There is no such upload: the answer to our own completion was lost, or somebody
            # removed the parts.
            if file.read(1) or not self._holds(key, digest.hexdigest()):
                raise errors.StoreError(f"{error}; its parts were removed meanwhile") from error
        except BaseException:
            try:  # best effort: the bucket's lifecycle rule frees what stays
                _reading_ends.set(time.monotonic() + self._timeout_s)
                self._client().abort_multipart_upload(Bucket=self._bucket, **upload)
            except network_errors() as error:
                text = "the parts of a failed upload stay in %s: %s"
                _logger.warning(text, self.uri, plain(error))
            raise
        return digest.hexdigest()

    def _holds(self, key: str, sha256: str) -> bool:
        with suppress(NotFoundError):
            return self._receive(key, lambda _: None) == sha256
        return False

    def _receive(
        self, key: str, write: Callable[[bytes], object], *, max_bytes: int = sys.maxsize
    ) -> str:
        """Stream the object into `write`; after a cut, continue where it was cut. Returns the
        SHA-256 in hex.
        """
        name = self._name(key)
        digest = hashlib.sha256()
        done, size_bytes, etag = 0, -1, ""

        def receive(client: Any) -> None:
            nonlocal done, size_bytes, etag
            if done == size_bytes:
                return
            rest = {"Range": f"bytes={done}-", "IfMatch": etag} if done else {}
            answer = ask(client, "get_object", Bucket=self._bucket, Key=name, **rest)
            with closing(answer["Body"]) as body:
                place = _range_start(answer)
                if place > done:
                    raise ConnectionError(f"bytes from {place} on came, not from {done}")
                etag, length = answer["ETag"], answer.get("ContentLength")
                if length is None and not _is_chunked(answer):
                    raise NotS3Error("its answer does not say where it ends")
                size_bytes = -1 if length is None else place + length
                self._check_size(key, size_bytes, max_bytes)
                while chunk := body.read(_CHUNK_BYTES):
                    new = chunk[max(done - place, 0) :]  # a server without ranges starts over
                    place += len(chunk)
                    self._check_size(key, place, max_bytes)
                    digest.update(new)
                    write(new)
                    done += len(new)
                    if place % _CHUNK_BYTES < len(chunk):
                        _reading_ends.set(time.monotonic() + self._retry_s)
            if length is None:
                size_bytes = done  # a chunked body that breaks off raises
            if done < size_bytes:
                raise ConnectionError(f"the body ended after {done} of {size_bytes} bytes")

        self._call("read", key, receive, progress=lambda: done)
        return digest.hexdigest()

    def _client(self) -> Any:
        process = os.getpid()
        if self._connection is None or self._connection[0] != process:
            # if two threads come here, each makes a client and either serves
            self._connection = (process, _connect(self._timeout_s, self.uri))
        return self._connection[1]

    def _ask(self, done: str, key: str, operation: str, **request: Any) -> Any:
        """The answer to one request about the bucket; see `_call`."""
        return self._call(
            done, key, lambda client: ask(client, operation, Bucket=self._bucket, **request)
        )

    def _call(
        self,
        done: str,
        key: str,
        request: Callable[[Any], _T],
        *,
        progress: Callable[[], int] = lambda: 0,
    ) -> _T:
        """`request(client)`, repeated while it fails for a transient reason; see `xrai.store`.
        `done` says in messages what was tried: read, written, listed or deleted.
        """
        where = self._where(key)
        reached, tries = progress(), 0
        deadline = time.monotonic() + self._retry_s
        jitter = random.SystemRandom()
        while True:
            try:
                _reading_ends.set(max(deadline, time.monotonic() + self._timeout_s))
                return request(self._client())
            except network_errors() as error:
                final = explain(error, done=done, where=where, bucket=self._bucket, tries=tries)
                if final is not None:
                    raise final from error
                cause = error
            if progress() >= reached + _CHUNK_BYTES:
                reached, tries = progress(), 0
                deadline = _reading_ends.get()
            tries += 1
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise errors.UnreachableError(
                    f"{where} cannot be {done}: no success in {tries} tries within "
                    f"{self._retry_s:g} s (endpoint {masked(self._client().meta.endpoint_url)}): "
                    f"{plain(cause)}"
                ) from cause
            if tries == 1:
                text = "%s: %s; trying again for up to %g s"
                _logger.warning(text, where, plain(cause), self._retry_s)
            pause_s = min(_FIRST_PAUSE_S * 2 ** min(tries - 1, 16), _LONGEST_PAUSE_S)
            time.sleep(min(pause_s * jitter.uniform(0.5, 1), left_s))


def _body(data: bytes) -> dict[str, Any]:
    """A body with its MD5, so that the server refuses what was damaged on the way."""
    md5 = hashlib.md5(data, usedforsecurity=False).digest()
    return {"Body": data, "ContentMD5": base64.b64encode(md5).decode()}


def _range_start(answer: Any) -> int:
    """The offset in the object of an answer's first byte."""
    if answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
        return 0
    found = re.match(r"bytes (\d+)-", answer.get("ContentRange", ""))
    if found is None:
        raise ConnectionError(f"an unknown part of an object: {answer.get('ContentRange')!r}")
    return int(found[1])


def _is_chunked(answer: Any) -> bool:
    headers = answer["ResponseMetadata"]["HTTPHeaders"]
    return "chunked" in headers.get("transfer-encoding", "").lower()


def _new_session() -> Any:
    """A session that reads botocore's description of S3 from memory, if another has read it."""
    from botocore.session import Session

    session = Session()
    session.register_component(
        "data_loader", _data_loader(session.get_config_variable("data_path"))
    )
    return session


@functools.cache
def _data_loader(search_path: str | None) -> Any:
    """The files of botocore, parsed: 0.1 s for each client without it, longer than the rest."""
    from botocore.loaders import create_loader

    return create_loader(search_path)


def _connect(timeout_s: float, uri: str) -> Any:
    import boto3.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    checksums: Any = {  # boto3#4392: other servers lack the checksums that are now the default
        name: os.environ.get(f"AWS_{name.upper()}", "when_required")
        for name in ("request_checksum_calculation", "response_checksum_validation")
    }
    config = Config(
        connect_timeout=timeout_s,
        read_timeout=timeout_s,
        retries={"mode": "standard", "total_max_attempts": 1},  # _call repeats, bodies included
        max_pool_connections=32,
        **checksums,
    )
    try:
        # a session of our own: threads may not share boto3's default one
        session = boto3.session.Session(botocore_session=_new_session())
        client: Any = session.client("s3", config=config)
    except ValueError as error:
        raise WrongEndpointError(
            f"{uri}: {plain(error)}; AWS_ENDPOINT_URL_S3 takes a URL such as http://s3:8333"
        ) from error
    except BotoCoreError as error:
        text = f"{uri}: the AWS settings cannot be used: {plain(error)}"
        raise errors.NoCredentialsError(text) from error
    watch(client)
    # botocore has no public way to choose the class of its connections
    client._endpoint.http_session._pool_classes_by_scheme.update(_timed_pools())
    return client


class _TimedReader(io.RawIOBase):
    """Reads a socket until `_reading_ends`."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if time.monotonic() > _reading_ends.get(math.inf):
            raise TimeoutError("the answer takes too long")
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedSocket:
    """A socket whose files end at `_reading_ends`."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def makefile(self, mode: str, buffering: int = -1) -> Any:
        timed = _TimedReader(self._socket.makefile(mode, buffering=0))
        return timed if buffering == 0 else io.BufferedReader(timed)


def _timed_pools() -> dict[str, Any]:
    """Pools of connections by scheme, whose answers are read until `_reading_ends`."""
    from botocore import awsrequest

    class Connection(awsrequest.AWSHTTPConnection):
        def connect(self) -> None:
            super().connect()
            self.sock = _TimedSocket(self.sock)

    class SecureConnection(awsrequest.AWSHTTPSConnection):
        def connect(self) -> None:
            super().connect()
            self.sock = _TimedSocket(self.sock)

    class Pool(awsrequest.AWSHTTPConnectionPool):
        ConnectionCls = Connection

    class SecurePool(awsrequest.AWSHTTPSConnectionPool):
        ConnectionCls = SecureConnection

    return {"http": Pool, "https": SecurePool}
