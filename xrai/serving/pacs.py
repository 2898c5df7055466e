"""Send objects to an archive (PACS), by C-STORE or by STOW-RS. `xrai.serving.outbox` calls it."""

import io
import json
import re
import socket
import ssl
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit
from xml.etree import ElementTree

import urllib3
from pydicom.errors import InvalidDicomError
from pynetdicom.association import Association

from xrai import __version__
from xrai.errors import ConfigError, XraiError
from xrai.serving.dimse import associate, close_socket, cut, entity, shut
from xrai.serving.guard import is_loopback

if TYPE_CHECKING:
    from pydicom import Dataset

_TIMEOUT_S = 30.0
_TRY_LATER = frozenset({401, 403, 404, 408, 425, 429})  # fixed by whoever runs either end
_OUT_OF_RESOURCES = 0xA7  # high byte of a status
# The archive has the object already: PS3.7 annex C, and Failure Reason 45070 of Microsoft's service
_DUPLICATES = frozenset({0x0111, 0xB00E})
_FAILED, _STORED, _REASON = "00081198", "00081199", "00081197"  # of a STOW-RS response, PS3.18 I
_TAG = re.compile("[0-9A-Fa-f]{8}")
_MAX_ANSWER_BYTES = 1 << 20
_DICOM = "application/dicom"
_NOT_WHOLE = "the file is not a complete DICOM object"
# What pydicom raises on files that are cut short or damaged
_DAMAGE = (
    *(InvalidDicomError, ArithmeticError, AttributeError, EOFError, LookupError),
    *(NotImplementedError, TypeError, ValueError, struct.error, zlib.error),
)


class AwayError(XraiError):
    """The archive cannot be reached, or cannot take anything now."""


class RefusedError(XraiError):
    """The archive has refused one object, or its file is no object that could be sent."""


class Session(Protocol):
    """An open connection to an archive."""

    def store(self, file: Path) -> None:
        """Send one DICOM file.

        Raises `RefusedError` or `AwayError`, and `OSError` where the file cannot be read.
        """

    def cut(self) -> None:
        """From another thread: let `store` fail now, where it waits for the archive."""


class Pacs(Protocol):
    """An archive."""

    @property
    def name(self) -> str:
        """Its address, for logs."""

    def open(self) -> AbstractContextManager[Session]:
        """Connect. Raises `AwayError` where that fails."""


def find_pacs(address: str, *, calling: str, tls: ssl.SSLContext | None, token: str) -> Pacs:
    """The archive at HOST:PORT:AET, or at the https:// address of a DICOMweb service.

    `calling` is our own AE title. `tls` encrypts C-STORE, and says which certificates STOW-RS
    trusts. `token` is a bearer token for STOW-RS. Raises `ConfigError` for any other address.
    """
    parts = urlsplit(address)
    if parts.scheme in ("http", "https"):
        if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            raise ConfigError(
                f"--pacs {address}: patients' names would travel in clear text; use https://"
            )
        if parts.username or parts.query or parts.fragment:
            raise ConfigError(
                "--pacs takes an address without user, ? and #; give a token in XRAI_PACS_TOKEN"
            )
        return WebPacs(address.rstrip("/"), tls, token)
    host, _, rest = address.rpartition(":")
    host, _, port = host.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not rest or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--pacs {address}: give HOST:PORT:AET, such as pacs.example.org:104:ARCHIVE, or the "
            "https:// address of a DICOMweb service"
        )
    return DimsePacs(host, int(port), check_ae_title(rest, "--pacs"), calling, tls)


def check_ae_title(text: str, flag: str) -> str:
    """An AE title (PS3.5, VR AE). Raises `ConfigError` for an invalid one."""
    title = text.strip(" ")
    if not 1 <= len(title) <= 16 or not title.isascii() or not title.isprintable() or "\\" in title:
        raise ConfigError(
            f"{flag}: {text!r} is not an AE title: 1 to 16 ASCII characters, no backslash"
        )
    return title


@dataclass(frozen=True)
class DimsePacs:
    """An archive that takes C-STORE."""

    host: str
    port: int
    ae_title: str
    calling: str
    tls: ssl.SSLContext | None = None
    timeout_s: float = _TIMEOUT_S

    @property
    def name(self) -> str:
        """HOST:PORT:AET."""
        return f"{self.host}:{self.port}:{self.ae_title}"

    @contextmanager
    def open(self) -> Iterator[Session]:
        """An association. Raises `AwayError` where the archive accepts none."""
        from pydicom import uid

        client = entity(self.calling, timeout_s=self.timeout_s)
        client.connection_timeout = self.timeout_s
        syntaxes = [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian]
        for kind in (uid.ComprehensiveSRStorage, uid.SecondaryCaptureImageStorage):
            client.add_requested_context(kind, syntaxes)
        try:
            association = associate(client, (self.host, self.port), self.ae_title, tls=self.tls)
        except (OSError, ValueError):  # ValueError: no host can have this name
            raise AwayError(f"{self.host} is not a host that can be found") from None
        if not association.is_established:
            close_socket(association)
            how = "rejects the association" if association.is_rejected else "does not answer"
            if self.tls and not association.is_rejected:
                how += ", or a certificate is not trusted"
            raise AwayError(f"{self.name} {how}")
        try:
            yield _Association(self.name, association)
        finally:
            if association.is_established:
                association.release()
            close_socket(association)


class _Association:
    """A session of C-STORE."""

    def __init__(self, name: str, association: Association) -> None:
        self._name, self._association = name, association

    def store(self, file: Path) -> None:
        """Send one DICOM file, as `Session.store` says."""
        if not self._association.is_established:
            raise AwayError(f"{self._name} has ended the association")
        dataset = _read(file)
        try:
            answer = self._association.send_c_store(dataset)
        except ValueError:
            raise RefusedError(f"{self._name} takes no objects of this kind") from None
        except (AttributeError, LookupError, TypeError):
            raise RefusedError(_NOT_WHOLE) from None
        except (RuntimeError, OSError):
            raise AwayError(f"{self._name} has ended the association") from None
        if "Status" not in answer:
            raise AwayError(f"{self._name} did not answer")
        status = answer.Status
        if status >> 8 == _OUT_OF_RESOURCES:
            raise AwayError(f"{self._name} is out of resources (status {status:04X})")
        if status and status not in _DUPLICATES and status >> 12 != 0xB:
            raise RefusedError(f"{self._name} answers with status {status:04X}")

    def cut(self) -> None:
        """From another thread: let `store` fail now, where it waits for the archive."""
        cut(self._association)


def _read(file: Path) -> "Dataset":
    """The object in a file, whose values are still as they are stored.

    Raises `OSError` where it cannot be read, `RefusedError` where it holds no object.
    """
    from pydicom import dcmread

    data = file.read_bytes()
    try:
        dataset = dcmread(io.BytesIO(data))
    except _DAMAGE:
        raise RefusedError(_NOT_WHOLE) from None
    if not dataset:  # cut short after its file meta: pynetdicom 3.0.4 raises UnboundLocalError
        raise RefusedError(_NOT_WHOLE)
    return dataset


@dataclass(frozen=True)
class WebPacs:
    """An archive that takes STOW-RS (PS3.18)."""

    address: str  # of the DICOMweb service
    tls: ssl.SSLContext | None = None
    token: str = ""
    timeout_s: float = _TIMEOUT_S

    @property
    def name(self) -> str:
        """Its address."""
        return self.address

    @contextmanager
    def open(self) -> Iterator[Session]:
        """A client that keeps its connections."""
        accepted = f"{_DICOM}+json, {_DICOM}+xml;q=0.5"
        headers = {"User-Agent": f"xrai/{__version__}", "Accept": accepted}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        context = self.tls
        if context is None and self.address.startswith("https:"):
            context = ssl.create_default_context()
        with urllib3.PoolManager(
            headers=headers, ssl_context=context, timeout=self.timeout_s, retries=False
        ) as client:
            yield _WebSession(self, client)


class _WebSession:
    """A session of STOW-RS."""

    def __init__(self, pacs: WebPacs, client: urllib3.PoolManager) -> None:
        self._address, self._timeout_s, self._client = pacs.address, pacs.timeout_s, client
        self._socket: socket.socket | None = None  # of the newest connection
        pool = client.connection_from_url(pacs.address)
        self._make: Callable[..., Any] = pool.ConnectionCls
        pool.ConnectionCls = self._connection  # type: ignore[assignment]

    def store(self, file: Path) -> None:
        """Send one DICOM file, as `Session.store` says."""
        boundary = f"xrai-{file.stem}"  # ends in the file's UID, and occurs in no file
        head = f"--{boundary}\r\nContent-Type: {_DICOM}\r\n\r\n"
        body = head.encode() + file.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        kind = f'multipart/related; type="{_DICOM}"; boundary={boundary}'
        headers = {**self._client.headers, "Content-Type": kind}
        try:
            answer = self._client.request(
                *("POST", f"{self._address}/studies"),
                body=body,
                headers=headers,
                redirect=False,  # no other server may get patients' names and the token
                preload_content=False,
            )
            status, said = answer.status, self._read(answer)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise AwayError(f"{self._address} cannot be reached ({type(error).__name__})") from None
        self._judge(status, said)

    def cut(self) -> None:
        """From another thread: let `store` fail now, where it waits for the archive."""
        if self._socket is not None:
            shut(self._socket)

    def _connection(self, *arguments: Any, **options: Any) -> Any:
        """A connection of urllib3, which itself gives no access to the socket of one in use."""
        made = self._make(*arguments, **options)
        connect = made.connect

        def connect_and_note() -> None:
            connect()
            self._socket = made.sock

        made.connect = connect_and_note
        return made

    def _read(self, answer: urllib3.BaseHTTPResponse) -> bytes:
        """The body of an answer, within limits of size and time."""
        said, deadline = b"", time.monotonic() + self._timeout_s
        try:
            while part := answer.read1(_MAX_ANSWER_BYTES, decode_content=False):
                said += part
                if len(said) > _MAX_ANSWER_BYTES or time.monotonic() > deadline:
                    raise AwayError(f"{self._address} sends an endless answer")
        except BaseException:
            answer.close()
            raise
        answer.release_conn()
        return said

    def _judge(self, status: int, said: bytes) -> None:
        """Raise `RefusedError` or `AwayError` unless an answer says that the object is stored."""
        how = f"{self._address} answers with HTTP status {status}"
        if status in _TRY_LATER or status >= 500 or status // 100 in (1, 3):
            raise AwayError(how)
        found = _Response.read(said)
        if found is None and said and status < 300:  # such as the page of a proxy
            raise AwayError(f"{how}, but not as DICOMweb does: is --pacs its address?")
        failed = () if found is None else found.failed
        if any(reason >> 8 == _OUT_OF_RESOURCES for reason in failed):
            raise AwayError(f"{self._address} is out of resources")
        if failed and _DUPLICATES.issuperset(failed):
            return
        is_unclear = status == 202 and (found is None or not found.is_stored)
        if status >= 400 or failed or is_unclear:
            why = ", ".join([f"HTTP status {status}", *(f"reason {each:04X}" for each in failed)])
            raise RefusedError(f"{self._address} refuses the object ({why})")


@dataclass(frozen=True)
class _Response:
    """What a STOW-RS response says of the one object of its request (PS3.18 I)."""

    failed: tuple[int, ...]  # the reasons why it is not stored, 0 for one that is not stated
    is_stored: bool

    @classmethod
    def read(cls, said: bytes) -> "_Response | None":
        """From JSON or XML; None where a body is no such response."""
        try:
            return cls._of_xml(said) if said.lstrip().startswith(b"<") else cls._of_json(said)
        except (ValueError, ElementTree.ParseError, RecursionError):
            return None

    @classmethod
    def _of_json(cls, said: bytes) -> "_Response | None":
        content = json.loads(said)
        if not isinstance(content, dict) or not all(map(_TAG.fullmatch, content)):
            return None
        reasons = [_values(item, _REASON) for item in _values(content, _FAILED)]
        failed = (each[0] if each and isinstance(each[0], int) else 0 for each in reasons)
        return cls(tuple(failed), bool(_values(content, _STORED)))

    @classmethod
    def _of_xml(cls, said: bytes) -> "_Response | None":
        root = ElementTree.fromstring(said)
        if not root.tag.endswith("NativeDicomModel"):
            return None
        attribute = "{*}DicomAttribute[@tag='%s']/{*}"
        failed, stored = (root.findall(f"{attribute % tag}Item") for tag in (_FAILED, _STORED))
        reasons = (item.findtext(f"{attribute % _REASON}Value") for item in failed)
        return cls(tuple(int(text or 0) for text in reasons), bool(stored))


def _values(item: Any, tag: str) -> list[Any]:
    """The values of an attribute in the JSON of DICOM (PS3.18 F); empty where it has none."""
    attribute = item.get(tag) if isinstance(item, dict) else None
    found = attribute.get("Value") if isinstance(attribute, dict) else None
    return found if isinstance(found, list) else []
