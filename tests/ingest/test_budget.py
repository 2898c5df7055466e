import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event

import pytest

from xrai.ingest.budget import BYTES_PER_WORKER, MemoryBudget

MIB = 1 << 20


def test_what_is_held_at_once_never_exceeds_the_budget_and_everything_gets_its_turn() -> None:
    budget, lock = MemoryBudget(2), threading.Lock()
    held, most = 0, 0

    def take(num_bytes: int) -> None:
        nonlocal held, most
        with budget.hold(num_bytes):
            with lock:
                held += num_bytes
                most = max(most, held)
            time.sleep(0.001)
            with lock:
                held -= num_bytes

    sizes = [200 * MIB, 400 * MIB, 8 * MIB, 300 * MIB, 64 * MIB] * 20
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(take, sizes))
    assert 300 * MIB < most <= 2 * BYTES_PER_WORKER


def test_what_is_larger_than_the_budget_is_alone_and_what_is_small_waits_for_nothing() -> None:
    budget = MemoryBudget(1)
    entered = threading.Event()

    def take() -> None:
        with budget.hold(8 * MIB):
            entered.set()

    with budget.hold(1 << 50):
        with budget.hold(MIB):
            pass
        thread = threading.Thread(target=take)
        thread.start()
        assert not entered.wait(0.1)
    thread.join(10)
    assert entered.is_set()


def test_a_part_is_given_back_after_an_error() -> None:
    budget = MemoryBudget(1)
    for _ in range(3):
        with pytest.raises(ValueError, match="damaged"), budget.hold(1 << 50):
            raise ValueError("damaged")


def _hold_all(budget: MemoryBudget, has_it: Event, may_end: Event) -> None:
    with budget.hold(1 << 50):
        has_it.set()
        assert may_end.wait(60)


def test_processes_share_one_budget() -> None:
    context = multiprocessing.get_context("forkserver")
    budget = MemoryBudget(2, context)
    has_it, may_end = context.Event(), context.Event()
    process = context.Process(target=_hold_all, args=(budget, has_it, may_end))
    process.start()
    assert has_it.wait(60)
    assert not budget._free.acquire(False)
    may_end.set()
    with budget.hold(1 << 50):
        pass
    process.join(60)
    assert process.exitcode == 0
