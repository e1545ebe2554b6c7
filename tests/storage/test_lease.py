"""One run an output: a live holder is left alone, a dead one is replaced by one of those that wait."""

from __future__ import annotations

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from btray import storage
from btray.core.errors import UserError
from btray.storage import lease


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT", 0.4)
    monkeypatch.setattr(lease, "EXPIRY", 3.0)  # the store's clock has seconds


def test_a_second_run_is_refused_while_the_first_lives_and_let_in_at_once_after_it(place: str, quick: None) -> None:
    with lease.hold(place) as check:
        for _ in range(2):
            with pytest.raises(UserError, match="another run") as caught, lease.hold(place):
                pass
            assert place in str(caught.value)
            assert "\n" not in str(caught.value)
        check()
    started = time.monotonic()
    with lease.hold(place):
        assert time.monotonic() - started < lease.EXPIRY, "a lease that was given back is not waited for"


def _hold_for_ever(place: str, ready: object) -> None:
    with lease.hold(place):
        ready.set()  # type: ignore[attr-defined]
        time.sleep(600)


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold_for_ever, args=(str(tmp_path), ready))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match=f"process {holder.pid} "), lease.hold(str(tmp_path)):
        pass
    holder.kill()
    holder.join()
    with lease.hold(str(tmp_path)):
        pass


@pytest.mark.s3
def test_a_dead_holder_is_replaced_by_exactly_one_of_many(bucket: str, quick: None) -> None:
    dead = lease._Lease(storage.join(bucket, lease.NAME))
    dead.take()
    start, refused = threading.Barrier(6), threading.Semaphore(0)
    began = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        winners = list(pool.map(_attempt, [(bucket, start, refused)] * 6))
    assert winners.count(True) == 1
    assert time.monotonic() - began > 2, "the lease of a holder that may be alive was taken"
    dead.keep()  # comes back to life for one heartbeat, and learns that it has lost
    with pytest.raises(UserError, match="taken over"):
        dead.check()


def _attempt(job: tuple[str, threading.Barrier, threading.Semaphore]) -> bool:
    bucket, start, refused = job
    start.wait()
    try:
        with lease.hold(bucket):
            assert all(refused.acquire(timeout=60) for _ in range(5)), "a taker was neither refused nor let in"
    except UserError:
        refused.release()
        return False
    return True


@pytest.mark.s3
def test_a_holder_that_was_suspended_learns_at_its_first_look_that_it_was_replaced(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    suspended = lease._Lease(storage.join(bucket, lease.NAME))
    suspended.take()
    suspended.check()
    monkeypatch.setattr(lease, "EXPIRY", 0.0)
    suspended.check()  # nobody came meanwhile
    other = lease._Lease(suspended.uri)
    other._write(suspended.etag)
    with pytest.raises(UserError, match="taken over"):
        suspended.check()
    other.check()


def test_a_lease_that_was_renewed_of_late_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    held = lease._Lease("s3://nowhere/" + lease.NAME)
    monkeypatch.setattr(held, "_write", None)
    held.check()
