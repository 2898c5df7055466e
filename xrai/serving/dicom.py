"""The DICOM side of a server: its options, the node, and the results that go to an archive."""

import os
import ssl
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from xrai import __version__
from xrai.errors import ConfigError, ImageError
from xrai.ingest.find import File
from xrai.ingest.images import decode
from xrai.log import printable
from xrai.results.lettering import legible
from xrai.results.panel import Heat, draw_panel
from xrai.serving.dicom_result import (
    NOTE,
    Device,
    Kind,
    Result,
    Source,
    result_uid,
    write_capture,
    write_report,
)
from xrai.serving.dimse import Limits
from xrai.serving.films import Film, FullError
from xrai.serving.node import Node, NodeOptions, refuse_open, tls_context
from xrai.serving.outbox import Delivery, Outbox, Waits
from xrai.serving.pacs import Pacs, check_ae_title, find_pacs
from xrai.serving.scoring import ClosedError
from xrai.serving.service import Service
from xrai.store import disk_path

TOKEN: Final = "XRAI_PACS_TOKEN"  # for STOW-RS

_RESULTS: Final[Mapping[str, tuple[Kind, ...]]] = {
    "sr": ("sr",),
    "sc": ("sc",),
    "both": ("sr", "sc"),
}
_SCORING_S = 300.0  # of one film, at most
_SIDE = 512  # of the film in a secondary capture, pixels
_NUM_HEATS = 3  # heat maps in a secondary capture, at most


@dataclass(frozen=True)
class DicomOptions:
    """The command line's options for the DICOM side."""

    node: NodeOptions
    pacs: Pacs | None
    kinds: tuple[Kind, ...]  # of results
    outbox: Path | None
    waits: Waits


def read_options(flags: Mapping[str, Any]) -> DicomOptions | None:
    """The options that the flags `DICOM_FLAGS` give; None where there is no node.

    Raises `ConfigError` where they contradict each other, or would let anybody send films.
    """
    port, pacs, outbox = flags["dicom_port"], flags["pacs"], flags["outbox"]
    if not port:
        for name in ("pacs", "outbox", "dicom_cert", "dicom_allow"):
            if flags[name]:
                raise ConfigError(f"--{name} needs a DICOM node: give --dicom_port, such as 11112")
        return None
    if bool(pacs) != bool(outbox):
        raise ConfigError(
            "--pacs and --outbox belong together: results wait in the folder of --outbox until "
            "the archive of --pacs has them"
        )
    if flags["result"] not in _RESULTS:
        raise ConfigError(f"--result = {flags['result']!r}; allowed: {', '.join(_RESULTS)}")
    node = _node_options(flags)
    found = None
    if pacs:
        found = find_pacs(
            pacs, calling=node.ae_title, tls=_pacs_tls(flags), token=os.environ.get(TOKEN, "")
        )
    folder = disk_path(outbox, flag="--outbox") if outbox else None
    waits = Waits(max_age_s=flags["outbox_days"] * 24 * 3600.0)
    return DicomOptions(node, found, _RESULTS[flags["result"]], folder, waits)


def _node_options(flags: Mapping[str, Any]) -> NodeOptions:
    cert, key, client_ca = (flags[f"dicom_{name}"] for name in ("cert", "key", "client_ca"))
    if bool(cert) != bool(key) or (client_ca and not cert):
        raise ConfigError("TLS of the DICOM node needs both --dicom_cert and --dicom_key")
    callers = [text for text in flags["dicom_allow"].split(",") if text.strip()]
    if not 0 < flags["dicom_port"] < 65536:
        raise ConfigError(f"--dicom_port = {flags['dicom_port']} is not allowed: 1 to 65535")
    for name in ("dicom_associations", "dicom_max_mib", "outbox_days"):
        if flags[name] <= 0:
            raise ConfigError(f"--{name} = {flags[name]} is not allowed: it is more than 0")
    options = NodeOptions(
        port=flags["dicom_port"],
        host=flags["dicom_host"],
        ae_title=check_ae_title(flags["dicom_aet"], "--dicom_aet"),
        callers=frozenset(check_ae_title(text, "--dicom_allow") for text in callers),
        tls=tls_context(cert, key, client_ca) if cert else None,
        limits=Limits(
            max_object_bytes=flags["dicom_max_mib"] << 20,
            num_associations=flags["dicom_associations"],
        ),
    )
    refuse_open(options.host, callers=options.callers, has_tls=options.tls is not None)
    return options


def _pacs_tls(flags: Mapping[str, Any]) -> ssl.SSLContext | None:
    """The TLS context for the archive, with the node's own certificate where it has one."""
    shows_own = flags["dicom_cert"] and urlsplit(flags["pacs"]).scheme == "https"
    if not (flags["pacs_tls"] or flags["pacs_ca"] or shows_own):
        return None
    try:
        context = ssl.create_default_context(cafile=flags["pacs_ca"] or None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--pacs_ca {flags['pacs_ca']} cannot be read") from error
    if flags["dicom_cert"]:
        context.load_cert_chain(flags["dicom_cert"], flags["dicom_key"])
    return context


class DicomSide:
    """The node, the results, and their way to an archive."""

    def __init__(self, options: DicomOptions, service: Service) -> None:
        """Open the outbox. Raises `UserError` where it cannot be opened."""
        self._options, self._service = options, service
        self._outbox = Outbox(options.outbox) if options.outbox else None
        self._delivery = None
        if self._outbox and options.pacs:
            self._delivery = delivery = Delivery(self._outbox, options.pacs, options.waits)
            service.parts["outbox_up"] = lambda: delivery.is_running
        self._node = Node(options.node, self.take)
        service.metrics.registry.register(_Figures(self._node, self._delivery))
        service.closers.append(self.stop)

    def start(self) -> None:
        """Listen, and send what waits. Raises `ConfigError` where the port is taken."""
        self._node.start()
        if self._delivery:
            self._delivery.start()

    def stop(self) -> None:
        """Answer what has arrived, and stop. What waits in the outbox stays there."""
        self._node.stop()
        is_over = self._delivery is None or self._delivery.stop()
        if self._outbox and is_over:  # else it stays locked as long as this process lives
            self._outbox.close()

    def take(self, data: bytes, source: Source) -> None:
        """Score a film, list it, and put its results into the outbox.

        Raises `FullError` and `ImageError`, as `Taker` says.
        """
        if self._outbox:
            self._outbox.refuse_full()
        film = self._listed(data, source) or self._score(data, source)
        if self._outbox:
            scored = replace(source, pixels=film.pixels)
            device = self._device(film)
            for kind in self._options.kinds:
                if not self._outbox.knows(result_uid(kind, scored, device)):
                    result = self._result(kind, film, scored, device)
                    self._outbox.put(result.sop_instance_uid, result.data)

    def _listed(self, data: bytes, source: Source) -> Film | None:
        """The listed film, if a sender repeats it and the models are the same; else None."""
        now = self._service.models.pipeline
        for film in self._service.worklist.named(source.sop_instance_uid):
            if film.data == data and film.pipeline is now:
                return film
        return None

    def _score(self, data: bytes, source: Source) -> Film:
        file = File(source.sop_instance_uid, lambda: data)
        try:
            listed: Future[Film] = self._service.add(file, source="DICOM")
            film = listed.result(_SCORING_S)
        except ClosedError as error:
            raise FullError(str(error)) from error
        if not film.row.is_readable:  # the sender is told
            self._service.worklist.remove(film.id)
            raise ImageError(film.row.reason)
        return film

    def _result(self, kind: Kind, film: Film, source: Source, device: Device) -> Result:
        if kind == "sr":
            return write_report(source, film.row, device)
        return write_capture(source, self._draw(film), device)

    def _draw(self, film: Film) -> bytes:
        """A PNG of the film next to heat maps of what is called, or else of the most probable."""
        row, pipeline = film.row, film.pipeline
        names = tuple(row.probabilities)
        drawn = dict(zip(names, legible(names, "finding"), strict=True))
        chosen = [name for name in row.highest() if name in row.calls] or row.highest(1)
        heats = []
        for name in chosen[:_NUM_HEATS]:
            heat = self._service.scorer.explain(pipeline, film.data, name).result(_SCORING_S)
            probability, threshold = row.probabilities[name], row.thresholds.get(name, 1.0)
            title = f"LayerCAM: evidence for {printable(drawn[name])}, {probability:.3f}"
            heats.append(Heat(heat, title, strength=min(1.0, probability / max(threshold, 1e-9))))
        side, fit = _SIDE, pipeline.model.fit
        image = decode(film.data, size=side, fit=fit, max_pixels=pipeline.max_pixels)
        verdict = drawn.get(row.decision, "|".join(drawn.get(call, call) for call in row.calls))
        return draw_panel(
            image,
            heats,
            verdict=verdict or row.decision,
            note=NOTE,
            has_thresholds=bool(row.thresholds),
        )

    def _device(self, film: Film) -> Device:
        """The models that scored a film."""
        hashes = self._service.hashes[film.pipeline]
        prior = ",".join(f"{name}={share!r}" for name, share in sorted(film.row.prior.items()))
        return Device(film.pipeline.run_id, __version__, hashes, prior)


class _Figures(Collector):
    """Prometheus metrics of the DICOM side, collected at each scrape."""

    def __init__(self, node: Node, delivery: Delivery | None) -> None:
        self._node, self._delivery = node, delivery

    def collect(self) -> Iterable[Metric]:
        """The metrics."""
        state = self._node.state()
        objects = CounterMetricFamily(
            "xrai_dicom_objects", "Objects answered by the DICOM node", labels=["outcome"]
        )
        for outcome, number in state.objects.items():
            objects.add_metric([outcome], number)
        refused = CounterMetricFamily(
            "xrai_dicom_refused", "Peers that the DICOM node turned away", labels=["reason"]
        )
        for reason, number in state.refused.items():
            refused.add_metric([reason], number)
        yield objects
        yield refused
        yield CounterMetricFamily("xrai_dicom_echoes", "C-ECHO answered", value=state.num_echoes)
        yield GaugeMetricFamily(
            "xrai_dicom_associations", "Associations that are open", value=state.num_associations
        )
        if self._delivery is None:
            return
        sent = self._delivery.state()
        is_up = self._delivery.is_running and not sent.trouble
        for name, meaning, value in (
            ("xrai_outbox_pending", "Results that wait to be sent", sent.num_pending),
            ("xrai_outbox_given_up", "Results that were given up", sent.num_given_up),
            ("xrai_outbox_oldest_seconds", "Age of the result that waits longest", sent.oldest_s),
            ("xrai_outbox_up", "Whether the last attempt succeeded", is_up),
        ):
            yield GaugeMetricFamily(name, meaning, value=float(value))
        yield CounterMetricFamily("xrai_outbox_sent", "Results sent", value=sent.num_sent)
        yield CounterMetricFamily(
            "xrai_outbox_failures", "Attempts that failed", value=sent.num_failures
        )
