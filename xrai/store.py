"""The object store: a folder or a bucket behind one small interface. The one home of boto3.

Rooms and commands open an address and pass the store on:

    store = open_store("data/dataset")             # also file:///abs/dir
    store = open_store("s3://bucket/prefix")       # AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL for another S3

Keys are relative paths with forward slashes. A write is atomic: a reader sees the whole object, the one before, or
none. A store may be pickled, used from many threads, and used in a child after fork. Every S3 request has a time-out;
one that fails for a reason that may pass (no answer, a reset, a cut body, 5xx, throttling) is repeated with growing,
jittered pauses until nothing has succeeded for `retry_s`. What can not pass is told apart at once by its class:
`NotFoundError`, `ForbiddenError`, `NoCredentialsError`, `NoSuchBucketError`, `WrongEndpointError`.
"""

import base64
import errno
import hashlib
import math
import os
import random
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit

from xrai.errors import (
    AlreadyExistsError,
    ConfigError,
    CorruptError,
    ForbiddenError,
    NoCredentialsError,
    NoSuchBucketError,
    NotFoundError,
    StoreAccessError,
    StoreError,
    UnreachableError,
    WrongEndpointError,
    XraiError,
)
from xrai.log import get_logger

_CHUNK_BYTES = 256 * 1024
_PART_BYTES = 32 * 1024 * 1024  # objects above this go up in parts; S3 takes parts from 5 MiB
_MAX_PARTS = 10_000  # S3's limit
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 4.0
_NUM_UNREADABLE = 2  # answers that make no sense, before they are taken for those of another kind of server
_STALE_TEMPORARY_S = 24 * 3600.0

_logger = get_logger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, order=True)
class StoredObject:
    """One object of a store."""

    key: str
    size_bytes: int


class Store(ABC):
    """A place for objects under keys. `uri` is its address in normal form.

    All methods raise `StoreError` kinds that name the address, the key and the cause. A key that is absolute, has an
    empty part, or a part that is `.` or `..`, is refused.
    """

    uri: str

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object. Raises `NotFoundError` where there is none, `CorruptError` if it is replaced meanwhile."""

    @abstractmethod
    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        """Store `data`, replacing what was there; or raise `AlreadyExistsError` if asked not to replace."""

    @abstractmethod
    def download(self, key: str, path: Path) -> str:
        """Copy the object to a local file, atomically. Returns the SHA-256 of the bytes that arrived, in hex."""

    @abstractmethod
    def upload(self, key: str, path: Path) -> str:
        """Store a local file. Returns the SHA-256 of the bytes that were sent, in hex."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """The object's size in bytes, or None where there is none."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """The objects whose keys begin with `prefix`, sorted by key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; nothing happens where there is none."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """The object's own file for a folder, None for a bucket."""

    def _where(self, key: str) -> str:
        return f"{self.uri}/{key}" if key else self.uri


def open_store(uri: str, *, timeout_s: float | None = None, retry_s: float | None = None) -> Store:
    """The store at an address: a folder's path, `file:///abs/dir`, or `s3://bucket/prefix`. Nothing is contacted yet.

    For a bucket `timeout_s` is how long one request may be without an answer, and `retry_s` how long a failing one is
    repeated: a call ends within `retry_s + 2 timeout_s` (one to connect, one to be answered) of the last 256 KiB that
    arrived. Where they are not given, XRAI_S3_TIMEOUT_S and XRAI_S3_RETRY_S say, else they are 20 and 120 s. Raises
    `StoreAccessError` for any other address.
    """
    allowed = "give a folder, file:///folder or s3://bucket/prefix"
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme == "s3":
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}", bucket):
            raise StoreAccessError(f"{uri!r} names no bucket: {bucket!r} is not a bucket's name; {allowed}")
        return S3Store(
            bucket,
            prefix.strip("/"),
            timeout_s=_seconds("XRAI_S3_TIMEOUT_S", 20.0) if timeout_s is None else timeout_s,
            retry_s=_seconds("XRAI_S3_RETRY_S", 120.0) if retry_s is None else retry_s,
        )
    if scheme == "file":
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise StoreAccessError(f"{uri!r} is not a folder of this machine; {allowed}")
        return FileStore(Path(unquote(parts.path)))
    if scheme or not uri:
        raise StoreAccessError(f"{uri!r} is not an address of a store; {allowed}")
    return FileStore(Path(uri))


def _seconds(variable: str, default: float) -> float:
    """A positive number of seconds from the environment."""
    text = os.environ.get(variable, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"{variable} = {text!r} is not allowed: it takes a number of seconds above 0")
    return value


def check_key(key: str) -> str:
    """`key` itself, if it is a relative path that stays inside the store; raises `StoreError` if it is not."""
    if "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise StoreError(f"{key!r} is not a key: keys are relative paths such as report/card.md, without '..'")
    return key


# ------------------------------------------------------------------------------------------------------------- folders


class FileStore(Store):
    """Objects as files below a folder. The folder is made by the first write."""

    def __init__(self, folder: Path) -> None:
        self._folder = Path(os.path.abspath(folder))  # noqa: PTH100, Path.resolve would follow links
        self.uri = str(self._folder)

    def read(self, key: str) -> bytes:
        path = self._path(key)
        with self._explained("read", key):
            return path.read_bytes()

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        path = self._path(key)
        with self._explained("written", key), _replacing(path, only_if_absent=only_if_absent) as file:
            file.write(data)

    def download(self, key: str, path: Path) -> str:
        source = self._path(key)
        with self._explained("read", key):
            opened = source.open("rb")
        with opened, _explained_file("written", str(path)), _replacing(path) as file:
            return _copy(opened, file.write)

    def upload(self, key: str, path: Path) -> str:
        target = self._path(key)
        with _explained_file("read", str(path)):
            opened = path.open("rb")
        with opened, self._explained("written", key), _replacing(target) as file:
            return _copy(opened, file.write)

    def size(self, key: str) -> int | None:
        path = self._path(key)
        try:
            with self._explained("read", key):
                return path.stat().st_size if not path.is_dir() else None
        except NotFoundError:
            return None

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        if prefix.startswith("/") or ".." in prefix.split("/"):
            raise StoreError(f"{prefix!r} is not the beginning of a key: keys are relative paths, without '..'")
        top = self._folder / prefix.rpartition("/")[0]
        found = []
        with self._explained("listed", prefix):
            for folder, _, names in os.walk(top, onerror=_refuse_unless_missing):
                for name in names:
                    path = Path(folder, name)
                    key = path.relative_to(self._folder).as_posix()
                    if key.startswith(prefix) and not _is_temporary(name):
                        with suppress(FileNotFoundError):  # deleted meanwhile
                            found.append(StoredObject(key, path.stat().st_size))
        yield from sorted(found)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._explained("deleted", key):
            path.unlink(missing_ok=True)

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def _path(self, key: str) -> Path:
        return self._folder / PurePosixPath(check_key(key))

    def _explained(self, done: str, key: str) -> Any:
        return _explained_file(done, self._where(key))


@contextmanager
def _explained_file(done: str, where: str) -> Iterator[None]:
    """Turn the operating system's errors into ours, with one line that says what to do."""
    try:
        yield
    except FileExistsError as error:
        raise AlreadyExistsError(f"{where} exists already") from error
    except OSError as error:
        cause = error.strerror or str(error)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ForbiddenError(
                f"{where} can not be {done}: {cause}; mend the rights or use another folder"
            ) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(f"{where} can not be {done}: {cause}; free some space or use another folder") from error
        if done == "written" and error.errno == errno.ENOTDIR:
            raise StoreAccessError(f"{where} can not be written: it is below a file; choose another folder") from error
        if done != "written" and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            raise NotFoundError(f"there is no {where}") from error
        raise StoreError(f"{where} can not be {done}: {cause}") from error


def _refuse_unless_missing(error: OSError) -> None:
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        raise error


@contextmanager
def _replacing(path: Path, *, only_if_absent: bool = False) -> Iterator[BinaryIO]:
    """A new file that takes `path`'s place when the block ends well, and is gone when it does not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "it is a file", str(path.parent)) from error
    _remove_stale_temporaries(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if only_if_absent and _link(temporary, path):
            return
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> bool:
    """Give a whole file its name, where no file has it. False on a file system without links, when no file has it."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, "it exists already", str(path)) from error
        return False
    return True


def _is_temporary(name: str) -> bool:
    return re.fullmatch(r"\..+\.[0-9a-f]{12}\.tmp", name) is not None


def _remove_stale_temporaries(path: Path) -> None:
    """Remove what killed writers of the same file left a day ago or more."""
    for left in path.parent.glob(f".{_glob_escape(path.name)}.*.tmp"):
        with suppress(FileNotFoundError):  # another writer may be done with it at this moment
            if _is_temporary(left.name) and left.stat().st_mtime < time.time() - _STALE_TEMPORARY_S:
                left.unlink()


def _glob_escape(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)


def _copy(file: BinaryIO, write: Callable[[bytes], object]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        write(chunk)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- buckets


class S3Store(Store):
    """Objects below a prefix of a bucket. Keys, region and endpoint come from the standard AWS environment alone."""

    def __init__(self, bucket: str, prefix: str, *, timeout_s: float, retry_s: float) -> None:
        self._bucket, self._prefix = bucket, check_key(prefix) + "/" if prefix else ""
        self._timeout_s, self._retry_s = timeout_s, retry_s
        self._connection: tuple[int, Any] | None = None  # (process id, client); boto3's clients do not survive a fork
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    def read(self, key: str) -> bytes:
        chunks: list[bytes] = []
        self._receive(key, chunks.append)
        return b"".join(chunks)

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        if only_if_absent:
            self._create(key, data)
        else:
            self._put(key, data)

    def download(self, key: str, path: Path) -> str:
        with _explained_file("written", str(path)), _replacing(path) as file:
            return self._receive(key, file.write)

    def upload(self, key: str, path: Path) -> str:
        with _explained_file("read", str(path)), path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes > _PART_BYTES:
                return self._put_parts(key, file, part_bytes=max(_PART_BYTES, -(-size_bytes // _MAX_PARTS)))
            data = file.read()
        self._put(key, data)
        return hashlib.sha256(data).hexdigest()

    def size(self, key: str) -> int | None:
        name = self._name(key)
        try:
            answer = self._call("read", key, lambda client: client.head_object(Bucket=self._bucket, Key=name))
        except NotFoundError:
            # an answer to HEAD has no text, so that a bucket that is missing looks like an object that is
            with suppress(ForbiddenError):  # keys that may read and write need not have the right to list
                self._call("read", "", lambda client: client.list_objects_v2(Bucket=self._bucket, MaxKeys=1))
            return None
        return int(answer["ContentLength"])

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        request = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        while True:
            page = self._call("listed", prefix, lambda client: client.list_objects_v2(**request))
            for entry in page.get("Contents", []):
                key = entry["Key"][len(self._prefix) :]
                if key and not key.endswith("/"):  # consoles mark folders by empty objects
                    yield StoredObject(key, entry["Size"])
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        name = self._name(key)
        self._call("deleted", key, lambda client: client.delete_object(Bucket=self._bucket, Key=name))

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _put(self, key: str, data: bytes, **conditions: str) -> None:
        request = {"Bucket": self._bucket, "Key": self._name(key), "Body": data, "ContentMD5": _md5(data), **conditions}
        self._call("written", key, lambda client: client.put_object(**request))

    def _create(self, key: str, data: bytes) -> None:
        """Put only where there is no object (If-None-Match), and know our own object from another's."""
        try:
            self._put(key, data, IfNoneMatch="*")
        except AlreadyExistsError:
            # the answer to our own first try may have been lost, and the repeated one refused because of it
            if self.read(key) != data:
                raise
        except _NotImplementedError:  # a server without conditional writes: check first, the window is small
            if self.size(key) is not None:
                raise AlreadyExistsError(f"{self._where(key)} exists already") from None
            self._put(key, data)

    def _put_parts(self, key: str, file: BinaryIO, *, part_bytes: int) -> str:
        target = {"Bucket": self._bucket, "Key": self._name(key)}
        upload = {
            **target,
            "UploadId": self._call("written", key, lambda client: client.create_multipart_upload(**target))["UploadId"],
        }
        digest = hashlib.sha256()
        parts: list[dict[str, Any]] = []
        try:
            while data := file.read(part_bytes):
                digest.update(data)
                part = {**upload, "PartNumber": len(parts) + 1, "Body": data, "ContentMD5": _md5(data)}
                answer = self._call("written", key, lambda client: client.upload_part(**part))  # noqa: B023
                parts.append({"PartNumber": part["PartNumber"], "ETag": answer["ETag"]})
            whole = {**upload, "MultipartUpload": {"Parts": parts}}
            self._call("written", key, lambda client: client.complete_multipart_upload(**whole))
        except NotFoundError:
            # no such upload: an answer to our own completion was lost, if the object is there in full
            if self.size(key) != file.tell():
                raise
        except BaseException:
            self._abort(upload)
            raise
        return digest.hexdigest()

    def _abort(self, upload: dict[str, str]) -> None:
        """Free the parts of a failed upload, once and without hope: a bucket's life-cycle rule frees the others."""
        try:
            self._client().abort_multipart_upload(**upload)
        except _network_errors() as error:
            _logger.warning("the parts of a failed upload stay in %s/%s: %s", self.uri, upload["Key"], error)

    def _receive(self, key: str, write: Callable[[bytes], object]) -> str:
        """Stream the object into `write`, going on after a cut where it was cut. Returns the SHA-256 in hex."""
        name = self._name(key)
        digest = hashlib.sha256()
        done, size_bytes, etag = 0, -1, ""

        def receive(client: Any) -> None:
            nonlocal done, size_bytes, etag
            if done == size_bytes:
                return
            rest = {"Range": f"bytes={done}-", "IfMatch": etag} if done else {}
            answer = client.get_object(Bucket=self._bucket, Key=name, **rest)
            if "ETag" not in answer:  # the head of a web page, say; botocore does not look at a body that is streamed
                raise WrongEndpointError(
                    f"{self._where(key)} can not be read: the endpoint {_endpoint(client)} does not speak S3 "
                    "(its answer has no ETag); see AWS_ENDPOINT_URL_S3"
                )
            place = _range_start(answer)
            if place > done:
                raise ConnectionError(f"bytes from {place} on came, not from {done}")
            etag, size_bytes = answer["ETag"], place + int(answer["ContentLength"])
            with closing(answer["Body"]) as body:
                while chunk := body.read(_CHUNK_BYTES):
                    new = chunk[max(done - place, 0) :]  # a server may know no ranges and begin anew
                    place += len(chunk)
                    digest.update(new)
                    write(new)
                    done += len(new)
            if done < size_bytes:
                raise ConnectionError(f"the body ended after {done} of {size_bytes} bytes")

        self._call("read", key, receive, progress=lambda: done)
        return digest.hexdigest()

    def _client(self) -> Any:
        process = os.getpid()
        if self._connection is None or self._connection[0] != process:
            # two threads may both come here: each makes a client, either serves
            self._connection = (process, _connect(self._timeout_s, self.uri))
        return self._connection[1]

    def _call(
        self, done: str, key: str, request: Callable[[Any], _T], *, progress: Callable[[], int] = lambda: 0
    ) -> _T:
        """`request(client)`, repeated while it fails for a reason that may pass; see the module's first lines."""
        where = self._where(key)
        reached, tries = progress(), 0
        deadline = time.monotonic() + self._retry_s
        jitter = random.SystemRandom()
        while True:
            try:
                return request(self._client())
            except _network_errors() as error:
                final = _explain(error, done=done, where=where, bucket=self._bucket, tries=tries)
                if final is not None:
                    raise final from error
                cause = error
            if progress() > reached:
                reached, tries = progress(), 0
                deadline = time.monotonic() + self._retry_s
            tries += 1
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise UnreachableError(
                    f"{where} can not be {done}: no success in {tries} tries within {self._retry_s:g} s "
                    f"(endpoint {_endpoint(self._client())}): {_plain(cause)}"
                ) from cause
            if tries == 1:
                _logger.warning("%s: %s; trying again for up to %g s", where, _plain(cause), self._retry_s)
            pause_s = min(_FIRST_PAUSE_S * 2 ** min(tries - 1, 16), _LONGEST_PAUSE_S) * jitter.uniform(0.5, 1)
            time.sleep(min(pause_s, left_s))


def _range_start(answer: Any) -> int:
    """The place in the object of the first byte of an answer to GET."""
    if answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
        return 0
    found = re.match(r"bytes (\d+)-", answer.get("ContentRange", ""))
    if found is None:
        raise ConnectionError(f"part of an object came, and not which: {answer.get('ContentRange')!r}")
    return int(found[1])


class _NotImplementedError(StoreError):
    """The server does not know a request that not all servers know."""


def _md5(data: bytes) -> str:
    """Content-MD5: the server refuses an upload that was damaged on its way."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _connect(timeout_s: float, uri: str) -> Any:
    import boto3.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    checksums = os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    validation = os.environ.get("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    config = Config(
        connect_timeout=timeout_s,
        read_timeout=timeout_s,
        retries={"mode": "standard", "total_max_attempts": 1},  # _call repeats, bodies included
        max_pool_connections=32,
        request_checksum_calculation=checksums,  # type: ignore[arg-type]  # boto3#4392: others' S3 lack the new ones
        response_checksum_validation=validation,  # type: ignore[arg-type]
    )
    try:
        # a session of our own: boto3's default one may not be shared by threads
        return boto3.session.Session().client("s3", config=config)
    except ValueError as error:
        raise WrongEndpointError(f"{uri}: {error}; AWS_ENDPOINT_URL_S3 takes a URL such as http://s3:8333") from error
    except BotoCoreError as error:
        raise NoCredentialsError(f"{uri}: the AWS settings can not be used: {error}") from error


def _network_errors() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    return (BotoCoreError, ClientError, ResponseParserError, HTTPError, ConnectionError, TimeoutError)


def _endpoint(client: Any) -> str:
    return str(client.meta.endpoint_url)


def _plain(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


_PASSING_CODES = {
    "BadDigest",  # the body was damaged on its way
    "XAmzContentSHA256Mismatch",
    "IncompleteBody",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "ConditionalRequestConflict",
    "OperationAborted",
}
_KEY_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
_REGION_CODES = {
    "301",
    "307",
    "400",  # to a HEAD of another region
    "405",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "MethodNotAllowed",
    "PermanentRedirect",
}


def _explain(error: Exception, *, done: str, where: str, bucket: str, tries: int = 0) -> XraiError | None:
    """The error of ours for one that trying again can not mend, or None for one that may pass.

    `tries` is how often it was tried again before.
    """
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    what = f"{where} can not be {done}"
    if isinstance(error, exceptions.ClientError):
        in_no_words = error.response.get("Error", {}).get("Code") in ("404", "501")
        if in_no_words and error.operation_name != "HeadObject":
            return WrongEndpointError(
                f"{what}: the endpoint does not speak S3 ({_plain(error)}); see AWS_ENDPOINT_URL_S3"
            )
        return _explain_answer(error.response, done=done, where=where, bucket=bucket)
    no_keys = (
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.CredentialRetrievalError,
        exceptions.TokenRetrievalError,
        exceptions.SSOError,
    )
    if isinstance(error, no_keys):
        return NoCredentialsError(
            f"{what}: {_plain(error)}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or any other standard AWS way"
        )
    if isinstance(error, ResponseParserError):
        if tries < _NUM_UNREADABLE:  # may have been damaged on its way
            return None
        return WrongEndpointError(f"{what}: the endpoint does not speak S3 ({_plain(error)}); see AWS_ENDPOINT_URL_S3")
    if isinstance(error, exceptions.SSLError):
        return WrongEndpointError(f"{what}: {_plain(error)}; AWS_CA_BUNDLE names the certificates to trust")
    if isinstance(error, exceptions.ParamValidationError | exceptions.InvalidRegionError):
        return StoreAccessError(f"{what}: {_plain(error)}")
    return None


def _explain_answer(response: Any, *, done: str, where: str, bucket: str) -> XraiError | None:
    """The same for an answer of the server that is no success."""
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    answer = response.get("Error", {})
    code, text = str(answer.get("Code", status)), str(answer.get("Message", "no further explanation"))
    what, said = f"{where} can not be {done}", f"{code}: {text}"
    if code == "NotImplemented":
        return _NotImplementedError(f"{what}: {said}")
    if status >= 500 or status == 429 or code in _PASSING_CODES:
        return None
    if code == "NoSuchBucket":
        return NoSuchBucketError(f"{what}: there is no bucket {bucket!r}; make it first, or mend the address")
    if code in _REGION_CODES:
        region = answer.get("Region")
        hint = (
            f"the bucket is in {region}, set AWS_DEFAULT_REGION"
            if region
            else "see AWS_DEFAULT_REGION and AWS_ENDPOINT_URL_S3"
        )
        return WrongEndpointError(f"{what}: wrong region or endpoint ({said}); {hint}")
    if code == "PreconditionFailed" and done == "read":
        return CorruptError(f"{what}: it was replaced while it was read; start again")
    if code == "PreconditionFailed":
        return AlreadyExistsError(f"{where} exists already")
    if code in _KEY_CODES:
        return ForbiddenError(f"{what}: the keys are refused ({said}); see AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if status in (401, 403):
        return ForbiddenError(
            f"{what}: forbidden ({said}); these keys lack the right, or this machine's clock is wrong"
        )
    if status == 404:
        return NotFoundError(f"there is no {where}")
    return StoreError(f"{what}: {said}")
