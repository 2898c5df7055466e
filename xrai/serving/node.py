"""The DICOM node: takes films by C-STORE, has them scored, and answers each with a status.

A film is accepted (status 0000) only when it has been scored and, where results go to an archive,
its results are in the outbox on disk. So if the server is killed, the sender still has the film and
sends it again. A film that is not a frontal chest radiograph gets a warning: after a failure, some
senders retry forever. `Outcome` has all answers; docs/serve.md explains them.

No log line and no answer holds text of a header.
"""

import ssl
import threading
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

from pydicom import Dataset, uid
from pynetdicom import evt
from pynetdicom.dimse_primitives import C_STORE

from xrai.errors import ConfigError, ImageError, OtherImageError
from xrai.ingest.dicom import open_radiograph, read_texts, transfer_syntaxes
from xrai.log import get_logger, place_of
from xrai.serving.dicom_result import Source, read_source
from xrai.serving.dimse import GuardedServer, Limits, entity
from xrai.serving.films import FullError
from xrai.serving.guard import is_loopback

STORAGE_CLASSES: Final = (
    *(uid.ComputedRadiographyImageStorage, uid.DigitalXRayImageStorageForPresentation),
    *(uid.DigitalXRayImageStorageForProcessing, uid.SecondaryCaptureImageStorage),
    uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
)
# BodyPartExamined (PS3.16 annex L) that surely names another part; other texts are not trusted
_OTHER_PART_NAMES = """
ABDOMEN ABDOMENPELVIS ANKLE ARM BREAST CALCANEUS CALF CLAVICLE COCCYX CSPINE ELBOW EXTREMITY FACE
FEMUR FINGER FOOT FOREARM HAND HEAD HIP HUMERUS JAW KNEE LEG LSPINE LUMBAR MANDIBLE MAXILLA NECK
NOSE ORBIT PATELLA PELVIS RADIUS RIB SACRUM SCAPULA SHOULDER SINUS SKULL SPINE SSPINE STERNUM TIBIA
TOE TSPINE TOOTH ULNA WRIST ZYGOMA
"""
_OTHER_PARTS = frozenset(_OTHER_PART_NAMES.split())
_VERIFICATION = "1.2.840.10008.1.1"  # C-ECHO
_TIMEOUT_S = 30.0  # of a handshake, and of an association that says nothing at first
_ABORT_S = 2.0  # for peers to react to an abort
_logger = get_logger(__name__)


class Outcome(Enum):
    """What became of an object: the word in metrics, and the status of its answer (PS3.4 B.2.3)."""

    SCORED = "scored", 0x0000
    OTHER = "other", 0xB006  # elements discarded: read, and not a film to score
    FULL = "full", 0xA700  # out of resources: the sender is to try again later
    MISMATCH = "mismatch", 0xA900  # of data set and request
    UNREADABLE = "unreadable", 0xC000
    TOO_LARGE = "too_large", 0xC001
    CLASS = "class", 0x0122  # the SOP class differs from that of the presentation context
    FAILED = "failed", 0x0110  # a fault in xrai

    def __init__(self, word: str, status: int) -> None:
        self.word, self.status = word, status


class Taker(Protocol):
    """Scores a film, lists it, and keeps its results for the archive."""

    def __call__(self, data: bytes, source: Source) -> None:
        """Take a DICOM file. Raises `ImageError` where it cannot be scored, `FullError` where there
        is no room for it now.
        """


@dataclass(frozen=True)
class NodeOptions:
    """How a node listens."""

    port: int
    host: str = "127.0.0.1"
    ae_title: str = "XRAI"
    callers: frozenset[str] = frozenset()  # AE titles that may send; empty: any
    tls: ssl.SSLContext | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class NodeState:
    """What a node has seen since its start."""

    num_associations: int  # now
    objects: dict[str, int]  # by `Outcome`
    refused: dict[str, int]  # peers, by reason
    num_echoes: int


class Node:
    """Listens for C-STORE and C-ECHO until it is stopped."""

    def __init__(self, options: NodeOptions, take: Taker) -> None:
        self._options, self._take = options, take
        self._lock = threading.Lock()
        self._objects: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._num_echoes = self._num_busy = 0
        self._server: GuardedServer | None = None
        self._own = entity(options.ae_title, timeout_s=_TIMEOUT_S)

    def start(self) -> int:
        """Begin to listen; the port. Raises `ConfigError` where the address is not available."""
        options, own = self._options, self._own
        own.network_timeout = options.limits.idle_timeout_s
        own.maximum_associations = 1 << 16  # `GuardedServer` has limits of its own
        own.require_calling_aet = sorted(options.callers)
        own.require_called_aet = True
        own.add_supported_context(_VERIFICATION)
        syntaxes = transfer_syntaxes()
        for storage_class in STORAGE_CLASSES:
            own.add_supported_context(storage_class, syntaxes)
        handlers: list[evt.EventHandlerType] = [
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_C_ECHO, self._echo),
            (evt.EVT_REJECTED, lambda event: self._refuse("rejected")),
        ]
        try:
            server = GuardedServer(
                own,
                (options.host, options.port),
                handlers,
                tls=options.tls,
                limits=options.limits,
                refuse=self._refuse,
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--dicom_port {options.port} on {options.host} is not available: {error}"
            ) from error
        self._server = server
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True
        ).start()
        port = int(server.server_address[1])
        _logger.info("DICOM node %s listens on %s, port %d", options.ae_title, options.host, port)
        return port

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """Accept nothing more, answer what has arrived, and end all associations."""
        if self._server is None:
            return
        self._server.shutdown()
        deadline = time.monotonic() + timeout_s
        while self._num_busy and time.monotonic() < deadline:
            time.sleep(0.02)
        self._server.end(timeout_s=_ABORT_S)
        self._server = None

    def state(self) -> NodeState:
        """Counts since the start."""
        with self._lock:
            associations = self._server.active_associations if self._server else []
            return NodeState(
                sum(association.is_established for association in associations),
                {outcome.word: self._objects[outcome.word] for outcome in Outcome},
                dict(self._refused),
                self._num_echoes,
            )

    def _refuse(self, reason: str) -> None:
        with self._lock:
            self._refused[reason] += 1

    def _echo(self, event: evt.Event) -> int:
        with self._lock:
            self._num_echoes += 1
        return 0x0000

    def _store(self, event: evt.Event) -> Dataset:
        """Answer a C-STORE request."""
        with self._lock:
            self._num_busy += 1
        try:
            outcome, why = self._outcome(event)
        except Exception as error:  # the sender needs an answer, and the node goes on
            _logger.error("a DICOM object failed: %s", place_of(error))
            outcome, why = Outcome.FAILED, "failed inside xrai"
        finally:
            with self._lock:
                self._num_busy -= 1
        with self._lock:
            self._objects[outcome.word] += 1
        answer = Dataset()
        answer.Status = outcome.status
        if why:
            answer.ErrorComment = why[:64]  # VR LO
        return answer

    def _outcome(self, event: evt.Event) -> tuple[Outcome, str]:
        request = event.request
        assert isinstance(request, C_STORE)
        if request.AffectedSOPClassUID != event.context.abstract_syntax:
            return Outcome.CLASS, "is of another SOP class than the presentation context"
        if request.DataSet is None:
            return Outcome.UNREADABLE, "has no data set"
        if request.DataSet.getbuffer().nbytes > self._options.limits.max_object_bytes:
            return Outcome.TOO_LARGE, "has more bytes than are taken"
        data = event.encoded_dataset()
        request.DataSet = None  # not held twice while it is scored
        try:
            refuse_other_parts(data)
            open_radiograph(data)
            source = read_source(data)
            if source.sop_instance_uid != request.AffectedSOPInstanceUID:
                return Outcome.MISMATCH, "has another SOP Instance UID than the request"
            if source.sop_class_uid != request.AffectedSOPClassUID:
                return Outcome.MISMATCH, "has another SOP Class UID than the request"
            self._take(data, source)
        except OtherImageError as error:
            return Outcome.OTHER, str(error)
        except ImageError as error:
            return Outcome.UNREADABLE, str(error)
        except FullError as error:
            return Outcome.FULL, str(error)
        return Outcome.SCORED, ""


def refuse_other_parts(data: bytes) -> None:
    """Raise `OtherImageError` where a header names another part of the body than the chest."""
    part = read_texts(data, ["BodyPartExamined"])["BodyPartExamined"].upper()
    if "".join(character for character in part if character.isalpha()) in _OTHER_PARTS:
        raise OtherImageError("is DICOM of another part of the body (BodyPartExamined)")


def refuse_open(host: str, *, callers: Collection[str], has_tls: bool) -> None:
    """Raise `ConfigError` where anybody on the network could send films."""
    if not callers and not has_tls and not is_loopback(host):
        raise ConfigError(
            f"the DICOM node would take films from anybody on {host}: name the AE titles that may "
            "send with --dicom_allow, or encrypt with --dicom_cert and --dicom_key, or listen on "
            "127.0.0.1"
        )


def tls_context(cert: str, key: str, client_ca: str) -> ssl.SSLContext:
    """TLS for a node from PEM files; with `client_ca`, peers have to show a certificate of it.

    Raises `ConfigError` where a file is missing or damaged.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key, password="")  # else it asks for one at the terminal
        if client_ca:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the DICOM node's certificate, key or CA cannot be read ({type(error).__name__}): "
            f"{cert}, {key}{f', {client_ca}' if client_ca else ''}"
        ) from error
    return context
