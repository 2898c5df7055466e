"""The films that a server holds: in memory alone, for a stated time, up to a stated size."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Final, Literal

from xrai.errors import XraiError
from xrai.ingest.classes import is_negative_word
from xrai.ingest.dicom import Window
from xrai.labels import REVIEW
from xrai.pipeline import Pipeline, Prediction
from xrai.serving.scoring import Scored

Source = Literal["upload", "DICOM"]

MAX_NAME: Final = 200  # characters of a film's name that are kept


class FullError(XraiError):
    """A film cannot be taken now: the list or the outbox is full, or the server is stopping. The
    message says which.
    """


@dataclass(frozen=True, eq=False)  # each is its own, and a key of weak dictionaries
class Film:
    """A film that was scored. Holds what may identify a patient: never logged."""

    id: str  # drawn at random; says nothing of the film
    name: str  # as it came with the film; text for people, never a path
    source: Source
    received: datetime
    expires: datetime
    data: bytes = field(repr=False)  # the file; empty if it could not be read
    row: Prediction
    size: tuple[int, int] | None  # (width, height) in pixels; None if it cannot be read
    window: Window | None  # None unless it is DICOM whose stored values are shown
    pipeline: Pipeline = field(repr=False)  # that scored it, and draws its heat maps
    pixels: str = field(repr=False)  # SHA-256 of what its networks saw; "" where it has no pixels

    @property
    def is_review(self) -> bool:
        """Whether the film is left to a person, for whatever reason."""
        return self.row.decision == REVIEW

    @cached_property
    def is_positive(self) -> bool:
        """Whether anything but the absence of findings is called."""
        task = self.pipeline.model.labels.task
        if task == "binary":
            return self.pipeline.outputs[0].name in self.row.calls
        return any(not is_negative_word(name) for name in self.row.calls)

    @cached_property
    def score_of(self) -> str | None:
        """The class or finding whose probability ranks the film in the list: the most probable one
        that is not negative. None where there is none, or the film cannot be read.
        """
        # The one name of two classes is the positive one
        is_binary = self.pipeline.model.labels.task == "binary"
        names = (name for name in self.row.highest() if is_binary or not is_negative_word(name))
        return next(names, None)

    @property
    def score(self) -> float | None:
        """How probable `score_of` is."""
        return None if self.score_of is None else self.row.probabilities[self.score_of]

    @cached_property
    def urgency(self) -> tuple[bool, float, datetime]:
        """The sort key of the list: films for review first, then the highest score, then the
        longest wait. Films that cannot be read come before all that have a score.
        """
        unscored = 0.0 if self.row.is_readable else 1.0
        return not self.is_review, -(unscored if self.score is None else self.score), self.received


class Worklist:
    """The films of a server. Safe to use from several threads."""

    def __init__(
        self,
        *,
        max_films: int,
        max_bytes: int,
        lifetime_s: float,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.lifetime_s = lifetime_s
        self._max_films, self._max_bytes = max_films, max_bytes
        self._now = now
        self._lock = threading.Lock()
        self._films: dict[str, Film] = {}  # in order of expiry, since all live equally long
        self._num_bytes = 0  # that they hold
        self._reserved = [0, 0]  # films and bytes that are being scored
        self._version = secrets.randbits(48)

    @contextmanager
    def reserve(self, num_bytes: int) -> Iterator[None]:
        """Keep room for a film while it is scored. Raises `FullError` where there is none."""
        with self._lock:
            self._expire()
            num_films = len(self._films) + self._reserved[0] + 1
            if num_films > self._max_films or self._held + num_bytes > self._max_bytes:
                raise FullError(
                    f"the list is full ({num_films - 1} films); films leave it "
                    f"{_span(self.lifetime_s)} after they came, or when they are deleted"
                )
            self._reserved[0] += 1
            self._reserved[1] += num_bytes
        try:
            yield
        finally:
            with self._lock:
                self._reserved[0] -= 1
                self._reserved[1] -= num_bytes

    def add(self, name: str, data: bytes, scored: Scored, *, source: Source) -> Film:
        """List a film that was scored, within the room that was reserved for it."""
        now = datetime.fromtimestamp(self._now(), UTC)
        film = Film(
            id=secrets.token_urlsafe(12),
            name=name[-MAX_NAME:],
            source=source,
            received=now,
            expires=now + timedelta(seconds=self.lifetime_s),
            data=data if scored.row.is_readable else b"",
            **vars(scored),
        )
        with self._lock:
            self._films[film.id] = film
            self._num_bytes += len(film.data)
            self._version += 1
        return film

    def films(self) -> list[Film]:
        """All films, the most urgent first."""
        with self._lock:
            self._expire()
            films = list(self._films.values())
        return sorted(films, key=lambda film: film.urgency)

    def named(self, name: str) -> list[Film]:
        """The films that came with a name, in the order in which they came."""
        with self._lock:
            self._expire()
            films = list(self._films.values())
        return [film for film in films if film.name == name[-MAX_NAME:]]

    def get(self, film_id: str) -> Film | None:
        """A film by its id; None if it is unknown or has expired."""
        with self._lock:
            self._expire()
            return self._films.get(film_id)

    def remove(self, film_id: str) -> bool:
        """Forget a film; returns whether there was one."""
        with self._lock:
            self._version += 1
            return self._pop(film_id)

    def forget_expired(self) -> None:
        """Forget the films that have expired; every access to the list does so, too."""
        with self._lock:
            self._expire()

    @property
    def version(self) -> str:
        """A text that changes whenever the list does."""
        with self._lock:
            self._expire()
            return f"{self._version:x}"

    @property
    def num_bytes(self) -> int:
        """Bytes that the films hold, those being scored included."""
        with self._lock:
            self._expire()
            return self._held

    def __len__(self) -> int:
        with self._lock:
            self._expire()
            return len(self._films)

    @property
    def _held(self) -> int:
        return self._reserved[1] + self._num_bytes

    def _pop(self, film_id: str) -> bool:
        film = self._films.pop(film_id, None)
        self._num_bytes -= len(film.data) if film else 0
        return film is not None

    def _expire(self) -> None:
        now = datetime.fromtimestamp(self._now(), UTC)
        while (first := next(iter(self._films.values()), None)) and first.expires <= now:
            self._pop(first.id)
            self._version += 1


def _span(seconds: float) -> str:
    """A time in units that English and French share."""
    for unit_s, unit in ((3600, "h"), (60, "min")):
        if seconds % unit_s == 0 or seconds >= 10 * unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds:.3g} s"
