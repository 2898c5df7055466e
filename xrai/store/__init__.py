"""A folder or a bucket behind one small interface. The one home of boto3.

Commands and packages open an address and pass the store on:

    store = open_store("data/dataset")             # also file:///abs/dir
    store = open_store("s3://bucket/prefix")       # AWS_ENDPOINT_URL_S3 names another S3

Keys are relative paths with forward slashes. A write is atomic: a reader sees the whole object, the
one before, or none. A store may be pickled, used from many threads, and used in a child after fork.
Every S3 request has a timeout; one that fails for a transient reason (no answer, a reset, a cut
body, 5xx, throttling) is repeated with growing, jittered pauses until nothing has succeeded for
`retry_s`. Permanent failures raise at once: `NotFoundError`, `ForbiddenError`,
`NoCredentialsError`, `NoSuchBucketError`, `WrongEndpointError`.
"""

import math
import os
import re
from pathlib import Path
from urllib.parse import unquote

from xrai.errors import ConfigError, StoreAccessError, StoreError
from xrai.store.answers import masked
from xrai.store.base import Store, StoredObject, check_key, refuse_others_files
from xrai.store.folder import FolderStore
from xrai.store.lease import LEASE_KEY, Lease, refuse_writer, take_lease
from xrai.store.s3 import S3Store

__all__ = [
    "LEASE_KEY",
    "FolderStore",
    "Lease",
    "S3Store",
    "Store",
    "StoredObject",
    "check_key",
    "disk_path",
    "folder_of",
    "masked",
    "open_parent",
    "open_store",
    "refuse_others_files",
    "refuse_writer",
    "scheme_of",
    "seconds_of",
    "take_lease",
]

# The name of a bucket, or the ARN of an access point, which botocore takes in its place
_BUCKET = re.compile(
    r"([A-Za-z0-9][A-Za-z0-9._-]{1,62}"
    r"|arn:aws[a-z-]*:s3:[a-z0-9-]+:[0-9]{12}:accesspoint[:/][a-z0-9][a-z0-9-]{1,48}[a-z0-9])(?:/|\Z)"
)
# What addresses without :// begin with, and should
_SLASHLESS = {
    "s3:": "an S3 address begins with s3://",
    "file:": "the address of a folder begins with file:///",
}
_ALLOWED = "give a folder, file:///folder or s3://bucket/prefix"


def open_store(uri: str, *, timeout_s: float | None = None, retry_s: float | None = None) -> Store:
    """The store at an address: a folder's path, `file:///abs/dir`, or `s3://bucket/prefix`, where
    the ARN of an access point may stand for the bucket. Nothing is contacted yet.

    For a bucket, `timeout_s` is how long one request may take to be answered, and `retry_s` how
    long a failing one is repeated: a call ends within `retry_s + 2 timeout_s` (to connect, and to
    be answered) of the last 256 KiB that arrived. Defaults: XRAI_S3_TIMEOUT_S and XRAI_S3_RETRY_S,
    else 20 and 120 s. Raises `StoreAccessError` for any other address; a folder called `s3:` is
    `./s3:`.
    """
    try:
        uri.encode()
    except UnicodeEncodeError:  # it goes into summaries, reports and requests
        raise StoreAccessError(f"the address {masked(uri)!r} is not UTF-8; rename it") from None
    scheme, rest = scheme_of(uri), uri.partition("://")[2]
    if scheme == "s3":
        found = _BUCKET.match(rest)
        if found is None:
            allowed = _ALLOWED
            if rest.startswith("arn:"):
                allowed = (
                    "an access point is s3://arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME/prefix"
                )
            raise StoreAccessError(f"{masked(uri)!r} names no bucket; {allowed}")
        bucket, prefix = found[1], rest[found.end() :]
        try:
            check_key(prefix.strip("/") or "prefix")
        except StoreError as error:
            raise StoreAccessError(f"{masked(uri)!r} has an impossible prefix: {error}") from error
        return S3Store(
            bucket,
            prefix.strip("/"),
            timeout_s=seconds_of("XRAI_S3_TIMEOUT_S", 20.0) if timeout_s is None else timeout_s,
            retry_s=seconds_of("XRAI_S3_RETRY_S", 120.0) if retry_s is None else retry_s,
        )
    if scheme == "file":
        return FolderStore(folder_of(uri))
    if scheme or not uri:
        raise StoreAccessError(f"{masked(uri)!r} is not an address of a store; {_ALLOWED}")
    return FolderStore(Path(uri))


def scheme_of(address: str) -> str:
    """What stands before `://`, in lower case; empty for a path. Raises `StoreAccessError` where
    slashes are missing, as in `s3:/bucket`.
    """
    if "://" in address:
        return address.partition("://")[0].lower()
    for beginning, advice in _SLASHLESS.items():
        if address.lower().startswith(beginning):
            raise StoreAccessError(
                f"{masked(address)!r} is not an address: {advice}; {_ALLOWED} (a file or folder "
                f"whose name begins so is ./{beginning}…)"
            )
    return ""


def open_parent(uri: str) -> tuple[Store, str]:
    """The store that a file lies in, and the file's name there; empty where the address ends with
    a slash. Raises as `open_store` does.
    """
    scheme = scheme_of(uri)
    folder, _, name = uri.rpartition("/")
    if folder.endswith(":/"):  # s3://name
        raise StoreAccessError(f"{masked(uri)!r} names no file; {_ALLOWED}, and a file in it")
    if scheme == "file":
        folder += "/"  # of file:///name, the root folder
    return open_store(folder or ("/" if uri.startswith("/") else ".")), name


def disk_path(path: str, *, flag: str) -> Path:
    """The path that a flag gives which takes no bucket, as such or as file:///path. Raises
    `StoreAccessError` for any other address.
    """
    scheme = scheme_of(path)
    if scheme not in ("", "file"):
        raise StoreAccessError(f"{flag} = {masked(path)!r} is not allowed: it takes a local path")
    return folder_of(path) if scheme else Path(path)


def folder_of(uri: str) -> Path:
    """The path that a file:// address names. Raises `StoreAccessError` if it is not of this
    machine.
    """
    host, slash, path = uri.partition("://")[2].partition("/")
    if host not in ("", "localhost") or not slash:
        raise StoreAccessError(f"{masked(uri)!r} is not a folder of this machine; {_ALLOWED}")
    return Path(unquote(f"/{path}"))


def seconds_of(variable: str, default: float) -> float:
    """A positive number of seconds from an environment variable. Raises `ConfigError`."""
    text = os.environ.get(variable, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(
            f"{variable} = {text!r} is not allowed: it takes a number of seconds above 0"
        )
    return value
