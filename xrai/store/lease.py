"""One writer at a time: a lease on a run or a data set, an object at the address that is written.

    with take_lease(store) as lease:  # raises `InUseError` where another process writes
        ...
        lease.confirm()  # before what only the holder may write

The lease names its holder: host, process and time. It is made only if there is none (O_EXCL in a
folder, If-None-Match in a bucket), renewed by a thread while the holder lives, and deleted at the
end. One that a killed process left is taken over: at once where its process is known to be gone,
else when it has not been renewed for `STALE_S`. No two machines' clocks are compared.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from xrai.errors import AlreadyExistsError, InUseError, NotFoundError, StoreError
from xrai.log import get_logger
from xrai.store.base import Store

LEASE_KEY: Final = ".lease.json"
RENEW_S = 5.0
STALE_S = 30.0
SETTLE_S = 1.0  # between taking a lease over and being sure that nobody else did
_NUM_ROUNDS = 5  # attempts at a lease that exists but cannot be read, such as a dangling link

_logger = get_logger(__name__)


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, as the object says it."""

    host: str = field(default_factory=socket.gethostname)
    process: int = field(default_factory=os.getpid)
    began: str = field(default_factory=lambda: _began(os.getpid()))  # of the process
    machine: str = field(default_factory=lambda: _machine())
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    owner: str = field(default_factory=lambda: secrets.token_hex(8))
    renewals: int = 0

    @property
    def words(self) -> str:
        return f"process {self.process} on {self.host}"

    def is_gone(self) -> bool:
        """Whether the process is known to have ended: one of this machine, and no longer there."""
        return self.machine == _machine() != "" and _began(self.process) != self.began


class Lease:
    """A lease that this process holds; `take_lease` makes it."""

    def __init__(self, store: Store, key: str, holder: Holder) -> None:
        self._store, self._key, self._holder = store, key, holder
        self._renewed = time.monotonic()
        self._other: Holder | None = None  # who has taken it over
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def confirm(self) -> None:
        """Raise `InUseError` if another process has taken the lease over."""
        if time.monotonic() - self._renewed > STALE_S / 2:  # this process was held up
            with contextlib.suppress(StoreError):
                self._renew()
        if self._other is not None:
            raise _in_use(self._store, self._other)

    def release(self) -> None:
        """Stop renewing, and delete the lease if it is still this process's."""
        self._ended.set()
        self._thread.join(RENEW_S)
        if self._thread.is_alive():  # the store does not answer: the lease goes stale
            return
        with contextlib.suppress(StoreError):
            found = _read(self._store, self._key)
            if found is not None and found.owner == self._holder.owner:
                self._store.delete(self._key)

    def _keep(self) -> None:
        is_failing = False
        while not self._ended.wait(RENEW_S) and self._other is None:
            try:
                self._renew()
                is_failing = False
            except StoreError as error:
                if not is_failing:
                    _logger.warning("the lease cannot be renewed: %s", error)
                is_failing = True

    def _renew(self) -> None:
        with self._lock:
            while True:
                began = time.monotonic()
                found = _read(self._store, self._key)
                if found is not None and found.owner != self._holder.owner:
                    self._other = found
                    return
                renewals = self._holder.renewals + 1
                renewed = replace(Holder(), owner=self._holder.owner, renewals=renewals)
                try:
                    _write(self._store, self._key, renewed, only_if_absent=found is None)
                except AlreadyExistsError:
                    return  # the next renewal sees whose it is
                self._holder = renewed
                now = time.monotonic()
                # Who took over since the read has not looked yet, and gives way
                is_seen = now - began < SETTLE_S or now - self._renewed < STALE_S
                if found is None or is_seen:
                    self._renewed = began
                    return
                # Another process may have taken over before this write, which then replaced its
                # lease: where there is none, its next renewal makes it anew
                self._store.delete(self._key)
                self._ended.wait(RENEW_S + SETTLE_S)


def take_lease(store: Store, key: str = LEASE_KEY) -> Lease:
    """Take the lease of an address. Raises `InUseError`, naming the holder, where another process
    has it and renews it.
    """
    own = Holder()
    for _ in range(_NUM_ROUNDS):
        with contextlib.suppress(AlreadyExistsError):
            _write(store, key, own, only_if_absent=True)
            return Lease(store, key, own)
        found = _read(store, key)
        if found is not None and not found.is_gone():
            found = _watch(store, key, found)
        if found is None:
            continue  # it has just been released
        _write(store, key, own)
        time.sleep(SETTLE_S)
        now = _read(store, key)
        if now is not None and now.owner != own.owner:
            raise _in_use(store, now)
        if now is not None:
            _logger.info("taken over from %s, which has ended: %s", found.words, store.uri)
            return Lease(store, key, own)
    raise StoreError(f"{store.uri}/{key} can be neither read nor made: remove it")


def refuse_writer(store: Store, key: str) -> None:
    """Raise `InUseError` where another process holds a lease and renews it."""
    found = _read(store, key)
    if found is not None and not found.is_gone():
        _watch(store, key, found)


def _watch(store: Store, key: str, found: Holder) -> Holder | None:
    """Wait until a lease is stale, or None when it is released. Raises `InUseError` as soon as it
    is renewed.
    """
    if found.machine == _machine() != "":  # its process is there
        raise _in_use(store, found)
    _logger.info("%s may be writing %s: waiting %g s", found.words, store.uri, STALE_S)
    deadline = time.monotonic() + STALE_S
    while time.monotonic() < deadline:
        time.sleep(STALE_S / 30)
        now = _read(store, key)
        if now is None:
            return None
        if now != found:
            raise _in_use(store, now)
    return found


def _read(store: Store, key: str) -> Holder | None:
    """The holder that a lease names, or None where there is no lease."""
    try:
        return Holder(**json.loads(store.read(key)))
    except NotFoundError:
        return None
    except (ValueError, TypeError, RecursionError):
        # Damaged: nobody's, and so stale unless it is renewed
        return Holder("an unknown host", 0, "", "", "an unknown time", "")


def _write(store: Store, key: str, holder: Holder, *, only_if_absent: bool = False) -> None:
    data = (json.dumps(asdict(holder), indent=1) + "\n").encode()
    store.write(key, data, only_if_absent=only_if_absent)


def _in_use(store: Store, holder: Holder) -> InUseError:
    return InUseError(
        f"{store.uri} is being written by {holder.words}, last seen at {holder.time}: wait for it "
        "to end, stop it, or use another address"
    )


def _machine() -> str:
    """The boot and the PID namespace of this process; "" where the system does not tell them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _began(process: int) -> str:
    """When a process of this machine began, in clock ticks after boot; "" if there is none."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]
