"""A store that is a bucket of S3, or of another server that speaks its protocol."""

import base64
import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from xrai.errors import (
    AlreadyExistsError,
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
from xrai.files import explaining, replacing
from xrai.log import get_logger
from xrai.store.base import Store, StoredObject, check_key

_CHUNK_BYTES = 256 * 1024
_PART_BYTES = 32 * 1024 * 1024  # objects above this go up in parts; S3 takes parts from 5 MiB
_MAX_PARTS = 10_000  # S3's limit
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 4.0
_NUM_UNREADABLE = (
    2  # answers that make no sense, before they are taken for those of another kind of server
)

_logger = get_logger(__name__)
_T = TypeVar("_T")


class S3Store(Store):
    """Objects below a prefix of a bucket. Keys, region and endpoint come from the standard AWS
    environment alone.
    """

    def __init__(self, bucket: str, prefix: str, *, timeout_s: float, retry_s: float) -> None:
        self._bucket, self._prefix = bucket, check_key(prefix) + "/" if prefix else ""
        self._timeout_s, self._retry_s = timeout_s, retry_s
        self._connection: tuple[int, Any] | None = (
            None  # (process id, client); boto3's clients do not survive a fork
        )
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
        with explaining("written", str(path)), replacing(path) as file:
            return self._receive(key, file.write)

    def upload(self, key: str, path: Path) -> str:
        with explaining("read", str(path)), path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes > _PART_BYTES:
                return self._put_parts(
                    key, file, part_bytes=max(_PART_BYTES, -(-size_bytes // _MAX_PARTS))
                )
            data = file.read()
        self._put(key, data)
        return hashlib.sha256(data).hexdigest()

    def size(self, key: str) -> int | None:
        name = self._name(key)
        try:
            answer = self._call(
                "read", key, lambda client: client.head_object(Bucket=self._bucket, Key=name)
            )
        except NotFoundError:
            # an answer to HEAD has no text, so that a bucket that is missing looks like an object
            # that is
            with suppress(
                ForbiddenError
            ):  # keys that may read and write need not have the right to list
                self._call(
                    "read",
                    "",
                    lambda client: client.list_objects_v2(Bucket=self._bucket, MaxKeys=1),
                )
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
        self._call(
            "deleted", key, lambda client: client.delete_object(Bucket=self._bucket, Key=name)
        )

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _put(self, key: str, data: bytes, **conditions: str) -> None:
        request = {
            "Bucket": self._bucket,
            "Key": self._name(key),
            "Body": data,
            "ContentMD5": _md5(data),
            **conditions,
        }
        self._call("written", key, lambda client: client.put_object(**request))

    def _create(self, key: str, data: bytes) -> None:
        """Put only where there is no object (If-None-Match), and know our own object from
        another's.
        """
        try:
            self._put(key, data, IfNoneMatch="*")
        except AlreadyExistsError:
            # the answer to our own first try may have been lost, and the repeated one refused
            # because of it
            if self.read(key) != data:
                raise
        except (
            _NotImplementedError
        ):  # a server without conditional writes: check first, the window is small
            if self.size(key) is not None:
                raise AlreadyExistsError(f"{self._where(key)} exists already") from None
            self._put(key, data)

    def _put_parts(self, key: str, file: BinaryIO, *, part_bytes: int) -> str:
        target = {"Bucket": self._bucket, "Key": self._name(key)}
        upload = {
            **target,
            "UploadId": self._call(
                "written", key, lambda client: client.create_multipart_upload(**target)
            )["UploadId"],
        }
        digest = hashlib.sha256()
        parts: list[dict[str, Any]] = []
        try:
            while data := file.read(part_bytes):
                digest.update(data)
                part = {
                    **upload,
                    "PartNumber": len(parts) + 1,
                    "Body": data,
                    "ContentMD5": _md5(data),
                }
                answer = self._call("written", key, lambda client: client.upload_part(**part))  # noqa: B023
                parts.append({"PartNumber": part["PartNumber"], "ETag": answer["ETag"]})
            whole = {**upload, "MultipartUpload": {"Parts": parts}}
            self._call("written", key, lambda client: client.complete_multipart_upload(**whole))
        except NotFoundError:
            # no such upload: an answer to our own completion was lost, if the object is there in
            # full
            if self.size(key) != file.tell():
                raise
        except BaseException:
            self._abort(upload)
            raise
        return digest.hexdigest()

    def _abort(self, upload: dict[str, str]) -> None:
        """Free the parts of a failed upload, once and without hope: a bucket's life-cycle rule
        frees the others.
        """
        try:
            self._client().abort_multipart_upload(**upload)
        except _network_errors() as error:
            _logger.warning(
                "the parts of a failed upload stay in %s/%s: %s", self.uri, upload["Key"], error
            )

    def _receive(self, key: str, write: Callable[[bytes], object]) -> str:
        """Stream the object into `write`, going on after a cut where it was cut. Returns the
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
            answer = client.get_object(Bucket=self._bucket, Key=name, **rest)
            if (
                "ETag" not in answer
            ):  # the head of a web page, say; botocore does not look at a body that is streamed
                raise WrongEndpointError(
                    f"{self._where(key)} cannot be read: the endpoint {_endpoint(client)} does not speak S3 "
                    "(its answer has no ETag); see AWS_ENDPOINT_URL_S3"
                )
            place = _range_start(answer)
            if place > done:
                raise ConnectionError(f"bytes from {place} on came, not from {done}")
            etag, size_bytes = answer["ETag"], place + int(answer["ContentLength"])
            with closing(answer["Body"]) as body:
                while chunk := body.read(_CHUNK_BYTES):
                    new = chunk[
                        max(done - place, 0) :
                    ]  # a server may know no ranges and begin anew
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
        self,
        done: str,
        key: str,
        request: Callable[[Any], _T],
        *,
        progress: Callable[[], int] = lambda: 0,
    ) -> _T:
        """`request(client)`, repeated while it fails for a reason that may pass; see the
        module's first lines.
        """
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
                    f"{where} cannot be {done}: no success in {tries} tries within {self._retry_s:g} s "
                    f"(endpoint {_endpoint(self._client())}): {_plain(cause)}"
                ) from cause
            if tries == 1:
                _logger.warning(
                    "%s: %s; trying again for up to %g s", where, _plain(cause), self._retry_s
                )
            pause_s = min(
                _FIRST_PAUSE_S * 2 ** min(tries - 1, 16), _LONGEST_PAUSE_S
            ) * jitter.uniform(0.5, 1)
            time.sleep(min(pause_s, left_s))


def _range_start(answer: Any) -> int:
    """The place in the object of the first byte of an answer to GET."""
    if answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
        return 0
    found = re.match(r"bytes (\d+)-", answer.get("ContentRange", ""))
    if found is None:
        raise ConnectionError(
            f"part of an object came, and not which: {answer.get('ContentRange')!r}"
        )
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
        raise WrongEndpointError(
            f"{uri}: {error}; AWS_ENDPOINT_URL_S3 takes a URL such as http://s3:8333"
        ) from error
    except BotoCoreError as error:
        raise NoCredentialsError(f"{uri}: the AWS settings cannot be used: {error}") from error


def _network_errors() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    return (
        BotoCoreError,
        ClientError,
        ResponseParserError,
        HTTPError,
        ConnectionError,
        TimeoutError,
    )


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
_KEY_CODES = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
}
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


def _explain(
    error: Exception, *, done: str, where: str, bucket: str, tries: int = 0
) -> XraiError | None:
    """The error of ours for one that trying again cannot mend, or None for one that may pass.

    `tries` is how often it was tried again before.
    """
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    what = f"{where} cannot be {done}"
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
        return WrongEndpointError(
            f"{what}: the endpoint does not speak S3 ({_plain(error)}); see AWS_ENDPOINT_URL_S3"
        )
    if isinstance(error, exceptions.SSLError):
        return WrongEndpointError(
            f"{what}: {_plain(error)}; AWS_CA_BUNDLE names the certificates to trust"
        )
    if isinstance(error, exceptions.ParamValidationError | exceptions.InvalidRegionError):
        return StoreAccessError(f"{what}: {_plain(error)}")
    return None


def _explain_answer(response: Any, *, done: str, where: str, bucket: str) -> XraiError | None:
    """The same for an answer of the server that is no success."""
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    answer = response.get("Error", {})
    code, text = (
        str(answer.get("Code", status)),
        str(answer.get("Message", "no further explanation")),
    )
    what, said = f"{where} cannot be {done}", f"{code}: {text}"
    if code == "NotImplemented":
        return _NotImplementedError(f"{what}: {said}")
    if status >= 500 or status == 429 or code in _PASSING_CODES:
        return None
    if code == "NoSuchBucket":
        return NoSuchBucketError(
            f"{what}: there is no bucket {bucket!r}; make it first, or mend the address"
        )
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
        return ForbiddenError(
            f"{what}: the keys are refused ({said}); see AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if status in (401, 403):
        return ForbiddenError(
            f"{what}: forbidden ({said}); these keys lack the right, or this machine's clock is wrong"
        )
    if status == 404:
        return NotFoundError(f"there is no {where}")
    return StoreError(f"{what}: {said}")
