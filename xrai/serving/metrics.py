"""Metrics for Prometheus: films, requests, and how long scoring takes; never a film or a name."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from xrai.serving.films import Film, Worklist
from xrai.serving.scoring import Observer, Scorer

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Metrics(Observer):
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.films = self._counter("films", "Films scored", "source", "outcome")
        self.requests = self._counter("requests", "Requests answered", "route", "method", "status")
        self.seconds = self._histogram("request_seconds", "From a request to its answer", "route")
        self._batches = self._histogram("batch_seconds", "Scoring of a batch")
        self._batch_films = Histogram(
            "xrai_batch_films", "Films of a batch", buckets=(1, 2, 4, 8, 16), registry=self.registry
        )
        self._model = Gauge("xrai_model_info", "The models in use", ["run"], registry=self.registry)

    def watch(self, worklist: Worklist, scorer: Scorer) -> None:
        """Report at each scrape how full the list is and how many films wait."""
        for name, meaning, value in (
            ("xrai_worklist_films", "Films in the list", lambda: len(worklist)),
            ("xrai_worklist_bytes", "Bytes that the films hold", lambda: worklist.num_bytes),
            ("xrai_waiting_films", "Films not scored yet", lambda: scorer.num_waiting),
        ):
            Gauge(name, meaning, registry=self.registry).set_function(value)

    def batch(self, num_films: int, seconds: float) -> None:
        """A batch was scored."""
        self._batches.observe(seconds)
        self._batch_films.observe(num_films)

    def count(self, film: Film) -> None:
        """A film was listed."""
        outcome = "scored" if film.row.is_readable else "unreadable"
        if film.is_review and film.row.is_readable:
            outcome = "review"
        self.films.labels(film.source, outcome).inc()

    def use(self, run_id: str) -> None:
        """Films are scored by these models from now on."""
        self._model.clear()
        self._model.labels(run_id).set(1)

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self.registry)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"xrai_{name}", meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, *labels: str) -> Histogram:
        return Histogram(f"xrai_{name}", meaning, labels, buckets=_SECONDS, registry=self.registry)
