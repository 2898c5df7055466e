"""Send objects to an archive (PACS), by C-STORE or by STOW-RS. `xrai.serving.outbox` calls it."""

import json
import ssl
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import urllib3
from pydicom.errors import InvalidDicomError
from pynetdicom.association import Association

from xrai import __version__
from xrai.errors import ConfigError, XraiError
from xrai.serving.dimse import close_socket, entity
from xrai.serving.guard import is_loopback

_TIMEOUT_S = 30.0
_TRY_LATER = frozenset({401, 403, 404, 408, 425, 429})  # fixed by whoever runs either end
_DUPLICATE = 0x0111
_DICOM = "application/dicom"


class AwayError(XraiError):
    """The archive cannot be reached, or cannot take anything now."""


class RefusedError(XraiError):
    """The archive has refused one object."""


class Session(Protocol):
    """An open connection to an archive."""

    def store(self, file: Path) -> None:
        """Send one DICOM file. Raises `RefusedError` or `AwayError`."""


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
    """An AE title (PS3.5, VR AE). Raises `ConfigError` where it is none."""
    title = text.strip(" ")
    if not 1 <= len(title) <= 16 or not title.isascii() or not title.isprintable() or "\\" in title:
        raise ConfigError(
            f"{flag}: {text!r} is no AE title: 1 to 16 ASCII characters, no backslash"
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

    @property
    def name(self) -> str:
        """HOST:PORT:AET."""
        return f"{self.host}:{self.port}:{self.ae_title}"

    @contextmanager
    def open(self) -> Iterator[Session]:
        """An association. Raises `AwayError` where there is none to be had."""
        from pydicom import uid

        client = entity(self.calling, timeout_s=_TIMEOUT_S)
        client.connection_timeout = _TIMEOUT_S
        syntaxes = [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian]
        for kind in (uid.ComprehensiveSRStorage, uid.SecondaryCaptureImageStorage):
            client.add_requested_context(kind, syntaxes)
        tls = (self.tls, self.host) if self.tls else None
        association = client.associate(self.host, self.port, ae_title=self.ae_title, tls_args=tls)
        if not association.is_established:
            close_socket(association)
            how = "rejects the association" if association.is_rejected else "does not answer"
            raise AwayError(f"{self.name} {how}")
        try:
            yield _Association(self.name, association)
        finally:
            if association.is_established:
                association.release()


class _Association:
    """A session of C-STORE."""

    def __init__(self, name: str, association: Association) -> None:
        self._name, self._association = name, association

    def store(self, file: Path) -> None:
        """Send one DICOM file. Raises `RefusedError` or `AwayError`."""
        if not self._association.is_established:
            raise AwayError(f"{self._name} has ended the association")
        try:
            answer = self._association.send_c_store(file)
        except ValueError:
            raise RefusedError(f"{self._name} takes no objects of this kind") from None
        except (InvalidDicomError, AttributeError, KeyError):
            raise RefusedError("the file is no whole DICOM object") from None
        except (RuntimeError, OSError):
            raise AwayError(f"{self._name} has ended the association") from None
        if "Status" not in answer:
            raise AwayError(f"{self._name} did not answer")
        status = answer.Status
        if status >> 8 == 0xA7:
            raise AwayError(f"{self._name} is out of resources (status {status:04X})")
        if status not in (0, _DUPLICATE) and status >> 12 != 0xB:
            raise RefusedError(f"{self._name} answers with status {status:04X}")


@dataclass(frozen=True)
class WebPacs:
    """An archive that takes STOW-RS (PS3.18)."""

    address: str  # of the DICOMweb service
    tls: ssl.SSLContext | None = None
    token: str = ""

    @property
    def name(self) -> str:
        """Its address."""
        return self.address

    @contextmanager
    def open(self) -> Iterator[Session]:
        """A client that keeps its connections."""
        headers = {"User-Agent": f"xrai/{__version__}", "Accept": "application/dicom+json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        context = self.tls or ssl.create_default_context()
        with urllib3.PoolManager(
            headers=headers, ssl_context=context, timeout=_TIMEOUT_S, retries=False
        ) as client:
            yield _WebSession(self.address, client)


class _WebSession:
    """A session of STOW-RS."""

    def __init__(self, address: str, client: urllib3.PoolManager) -> None:
        self._address, self._client = address, client

    def store(self, file: Path) -> None:
        """Send one DICOM file. Raises `RefusedError` or `AwayError`."""
        boundary = f"xrai-{file.stem}"  # a UID, which no file has behind "--xrai-"
        head = f"--{boundary}\r\nContent-Type: {_DICOM}\r\n\r\n"
        body = head.encode() + file.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        kind = f'multipart/related; type="{_DICOM}"; boundary={boundary}'
        headers = {**self._client.headers, "Content-Type": kind}
        try:
            answer = self._client.request(
                "POST", f"{self._address}/studies", body=body, headers=headers
            )
        except urllib3.exceptions.HTTPError as error:
            raise AwayError(f"{self._address} cannot be reached ({type(error).__name__})") from None
        if answer.status in _TRY_LATER or answer.status >= 500 or 300 <= answer.status < 400:
            raise AwayError(f"{self._address} answers with HTTP status {answer.status}")
        if answer.status >= 400 or _has_failures(answer.status, answer.data):
            raise RefusedError(f"{self._address} refuses the object (HTTP status {answer.status})")


def _has_failures(status: int, body: bytes) -> bool:
    """Whether a response names objects that were not stored (Failed SOP Sequence)."""
    try:
        content = json.loads(body)
        return bool(content["00081198"]["Value"])
    except (ValueError, KeyError, TypeError):
        return status == 202 and not body  # some were not, and it does not say which
