"""Leases: one writer at a time, at an address in a folder, in an S3 of this process and in a real
one.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from xrai.errors import InUseError, NotFoundError, StoreError
from xrai.store import LEASE_KEY, FolderStore, Lease, Store, lease, open_store, take_lease

pytestmark = pytest.mark.timeout(60)

HOLD = """
import sys, time
from xrai.store import open_store, take_lease
with take_lease(open_store(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that are renewed every 0.1 s and stale after 1.5 s."""
    for name, seconds in (("RENEW_S", 0.1), ("STALE_S", 1.5), ("SETTLE_S", 0.2)):
        monkeypatch.setattr(lease, name, seconds)


def leave_lease(store: Store, holder: lease.Holder) -> None:
    """A lease that nobody renews."""
    store.write(LEASE_KEY, json.dumps(asdict(holder)).encode())


def elsewhere() -> lease.Holder:
    """A process of another machine."""
    return replace(lease.Holder(), host="node-7", process=1, machine="another boot")


def holder_of(store: Store) -> lease.Holder:
    return lease.Holder(**json.loads(store.read(LEASE_KEY)))


def test_a_lease_names_its_holder_and_goes_at_the_end(store: Store) -> None:
    with take_lease(store):
        assert holder_of(store).process == os.getpid()
        assert holder_of(store).host == os.uname().nodename
    with pytest.raises(NotFoundError):
        store.read(LEASE_KEY)
    with take_lease(store):  # may be taken again
        pass


def test_a_second_writer_of_the_same_machine_is_refused_at_once(store: Store) -> None:
    with take_lease(store):
        began = time.monotonic()
        with pytest.raises(InUseError, match=f"written by process {os.getpid()} on"):
            take_lease(store)
        assert time.monotonic() - began < 5
    assert InUseError.exit_status == 2


def test_a_writer_on_another_machine_is_refused_as_soon_as_it_renews(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_S", 30.0)  # looked at every second
    leave_lease(store, elsewhere())
    renewal = threading.Timer(0.4, leave_lease, (store, replace(elsewhere(), renewals=1)))
    renewal.start()
    with pytest.raises(InUseError, match="process 1 on node-7"):
        take_lease(store)
    renewal.join()


def test_what_another_machine_left_is_taken_when_it_is_stale(store: Store, is_quick: None) -> None:
    leave_lease(store, elsewhere())
    began = time.monotonic()
    with take_lease(store):
        assert time.monotonic() - began >= lease.STALE_S
        assert holder_of(store).process == os.getpid()


def test_a_damaged_lease_is_taken_when_it_is_stale(store: Store, is_quick: None) -> None:
    store.write(LEASE_KEY, b"\xff{")
    with take_lease(store):
        assert holder_of(store).process == os.getpid()


def make_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [make_folder, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_in_place_of_a_lease_is_refused_in_time(
    tmp_path: Path, is_quick: None, make: Callable[[Path], None]
) -> None:
    make(tmp_path / LEASE_KEY)
    with pytest.raises(StoreError, match=r"\.lease\.json"):
        take_lease(open_store(str(tmp_path)))


def test_a_lease_that_is_nested_too_deep_is_a_damaged_one(tmp_path: Path, is_quick: None) -> None:
    (tmp_path / LEASE_KEY).write_text("[" * 100_000)
    with take_lease(open_store(str(tmp_path))):
        pass


def test_of_many_that_find_a_stale_lease_one_gets_it(store: Store, is_quick: None) -> None:
    leave_lease(store, elsewhere())

    def attempt(_: int) -> Lease | None:
        try:
            return take_lease(store)
        except InUseError:
            return None

    with ThreadPoolExecutor(6) as pool:
        held = [taken for taken in pool.map(attempt, range(6)) if taken is not None]
    assert len(held) == 1
    held[0].confirm()
    held[0].release()


def test_a_lease_is_kept_for_longer_than_it_takes_to_go_stale(store: Store, is_quick: None) -> None:
    with take_lease(store) as held:
        time.sleep(2 * lease.STALE_S)
        held.confirm()
        assert holder_of(store).renewals > 3


def test_a_holder_that_was_taken_over_learns_it_and_leaves_the_lease(
    store: Store, is_quick: None
) -> None:
    with take_lease(store) as held:
        leave_lease(store, replace(elsewhere(), owner="another"))
        time.sleep(0.5)
        with pytest.raises(InUseError, match="node-7"):
            held.confirm()
    assert holder_of(store).owner == "another"


class HangingFolder(FolderStore):
    """Its writes take longer than a lease needs to go stale while `is_hanging` is set; meanwhile
    `taker` takes the lease over, if there is one, and renews it as soon as it is deleted.
    """

    def __init__(self, folder: Path, taker: lease.Holder | None) -> None:
        super().__init__(folder)
        self.is_hanging, self.has_written = threading.Event(), threading.Event()
        self._taker = taker

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        if not self.is_hanging.is_set():
            return super().write(key, data, only_if_absent=only_if_absent)
        self.is_hanging.clear()
        time.sleep(lease.STALE_S)
        self._take_over()
        super().write(key, data, only_if_absent=only_if_absent)
        self.has_written.set()

    def delete(self, key: str) -> None:
        super().delete(key)
        self._take_over()

    def _take_over(self) -> None:
        if self._taker is not None:
            leave_lease(self, self._taker)


def test_a_renewal_that_hangs_does_not_win_over_who_took_the_stale_lease(
    tmp_path: Path, is_quick: None
) -> None:
    store = HangingFolder(tmp_path, replace(elsewhere(), owner="another"))
    with take_lease(store) as held:
        store.is_hanging.set()
        assert store.has_written.wait(30)
        with pytest.raises(InUseError, match="node-7"):
            held.confirm()
    assert holder_of(store).owner == "another"


def test_a_renewal_that_hangs_costs_no_lease_that_nobody_took(
    tmp_path: Path, is_quick: None
) -> None:
    store = HangingFolder(tmp_path, None)
    with take_lease(store) as held:
        store.is_hanging.set()
        assert store.has_written.wait(30)
        held.confirm()
        assert holder_of(store).process == os.getpid()


class FailingFolder(FolderStore):
    """Nothing can be read while `is_failing` is set."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.is_failing, self.num_deleted = threading.Event(), 0

    def read(self, key: str, *, max_bytes: int = sys.maxsize) -> bytes:
        if self.is_failing.is_set():
            raise StoreError("there is no answer")
        return super().read(key, max_bytes=max_bytes)

    def delete(self, key: str) -> None:
        self.num_deleted += 1
        super().delete(key)


def test_a_lease_that_nobody_took_during_an_outage_is_never_given_away(
    tmp_path: Path, is_quick: None
) -> None:
    store = FailingFolder(tmp_path)
    with take_lease(store) as held:
        store.is_failing.set()
        time.sleep(2 * lease.STALE_S)
        store.is_failing.clear()
        time.sleep(5 * lease.RENEW_S)
        held.confirm()
        assert store.num_deleted == 0


def test_a_killed_writer_of_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    address = str(tmp_path / "store")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, address], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(InUseError, match=f"process {holder.pid} on"):
            take_lease(open_store(address))
        holder.send_signal(signal.SIGKILL)
    began = time.monotonic()
    with take_lease(open_store(address)):
        assert time.monotonic() - began < lease.STALE_S / 2
