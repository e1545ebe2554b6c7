"""One run an output: a live holder is left alone, a dead one is replaced by one of those that wait, on any store."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from btray import storage
from btray.core.errors import UserError
from btray.storage import StorageError, lease
from btray.storage.lease import Lease
from tests.helpers.s3_proxy import Request, s3_proxy
from tools.s3_server import S3Server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT", 0.2)
    monkeypatch.setattr(lease, "EXPIRY", 2.0)


def lease_at(output: str) -> Lease:
    return Lease(storage.join(output, lease.NAME))


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
    names = storage.list_names(storage.join(place, lease.NAME))
    assert names == (["00000002.json"] if storage.is_remote(place) else ["lock"])


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
def test_a_dead_holder_is_replaced_by_exactly_one_of_many_who_say_what_they_wait_for(
    bucket: str, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    dead = lease_at(bucket)
    dead.take()
    start, refused = threading.Barrier(6), threading.Semaphore(0)
    began = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        winners = list(pool.map(_attempt, [(bucket, start, refused)] * 6))
    assert winners.count(True) == 1
    assert time.monotonic() - began > lease.EXPIRY, "the lease of a holder that may be alive was taken"
    assert f"{bucket} may be in use by another run (process" in caplog.text
    assert "waiting until " in caplog.text
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


def test_a_holder_that_was_suspended_learns_at_its_first_look_that_it_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suspended, other = lease_at(str(tmp_path)), lease_at(str(tmp_path))
    suspended.take()
    suspended.check()
    monkeypatch.setattr(lease, "EXPIRY", 0.5)
    time.sleep(0.6)
    suspended.check()  # nobody came meanwhile
    other.take()
    with pytest.raises(UserError, match="taken over"):
        suspended.check()
    suspended.release()
    other.check()


def test_a_lease_that_was_renewed_of_late_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    held = lease_at("s3://nowhere")
    monkeypatch.setattr(held, "_renew", None)
    held.check()


def test_a_lost_lease_is_lost_also_to_who_may_not_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(uri: str) -> None:
        raise StorageError("forbidden", uri)

    monkeypatch.setattr(storage, "delete", forbidden)
    monkeypatch.setattr(lease, "EXPIRY", 0.5)
    first, second = lease_at(str(tmp_path)), lease_at(str(tmp_path))
    first.take()
    second.take()
    with pytest.raises(UserError, match="taken over"):
        first.check()
    second.check()


# ---- stores that have their own ways with conditions


@pytest.mark.s3
def test_a_store_that_refuses_the_tag_of_the_object_that_is_there_is_no_hindrance(
    s3: S3Server, bucket: str, quick: None
) -> None:
    """Ceph's gateway 16.2 does so, if the tag is quoted as it gave it."""

    def as_ceph(request: Request) -> None:
        if request.headers.get("If-Match", "").startswith('"'):
            request.refuse(412, "PreconditionFailed")
        else:
            request.forward()

    with s3_proxy(s3, as_ceph):
        with lease.hold(bucket) as check:
            with pytest.raises(UserError, match="another run"), lease.hold(bucket):
                pass
            check()
        started = time.monotonic()
        with lease.hold(bucket):
            assert time.monotonic() - started < lease.EXPIRY


@pytest.mark.s3
@pytest.mark.parametrize("answer", ["overwrites", "501"])
def test_a_store_that_ignores_conditions_is_refused_in_one_line(s3: S3Server, bucket: str, answer: str) -> None:
    server_alone = storage.s3.client()

    def careless(request: Request) -> None:
        if request.command == "PUT" and request.headers.get("If-None-Match"):
            if answer == "501":
                request.refuse(501, "NotImplemented")
                return
            server_alone.call_s3("delete_object", Bucket=bucket[5:], Key=request.path.split("/", 2)[2])
        request.forward()

    with s3_proxy(s3, careless), pytest.raises(UserError) as caught, lease.hold(bucket):
        pass
    assert str(caught.value).startswith(bucket)
    assert "If-None-Match" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert storage.list_names(f"{bucket}/{lease.NAME}", missing_ok=True) == []


# ---- any order of events: threads that run one at a time, by a clock of the test's own


class _KilledError(BaseException):
    """Ends an actor as SIGKILL would, in the middle of a request or after it."""


class _World:
    """A store and a clock; each request takes a random time, in which another actor may go on, or is the last one."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.objects: dict[str, bytes] = {}
        self.written: list[int] = []
        self.may_run = {number: threading.Semaphore(0) for number in range(4)}
        self.wakes = dict.fromkeys(self.may_run, 0.0)
        self.paused = threading.Semaphore(0)
        self.current = 0

    def run(self) -> None:
        threads = [threading.Thread(target=self._act, args=(number,), daemon=True) for number in self.may_run]
        for thread in threads:
            thread.start()
        while self.wakes:
            self.now = max(self.now, min(self.wakes.values()))
            self.current = self.random.choice([number for number, wake in self.wakes.items() if wake <= self.now])
            self.may_run[self.current].release()
            assert self.paused.acquire(timeout=30)

    def sleep(self, seconds: float) -> None:
        number = self.current
        self.wakes[number] = self.now + seconds
        self.paused.release()
        self.may_run[number].acquire()

    def request(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            for end in (False, True):
                if self.random.random() < 0.01:
                    raise _KilledError
                # at times as long as a suspended machine or a lost packet lasts
                self.sleep(self.random.choice([0.0, 0.1, 0.1, 1.0]) if self.random.random() < 0.97 else 30.0)
                if not end:
                    result = getattr(self, f"_{name}")(*arguments, **options)
            return result

        return call

    def _write_new(self, uri: str, data: bytes) -> bool:
        return self.objects.setdefault(uri, data) is data

    def _write_bytes(self, uri: str, data: bytes) -> None:
        self.objects[uri] = data

    def _read_bytes(self, uri: str) -> bytes:
        if uri not in self.objects:
            raise StorageError("not_found", uri)
        return self.objects[uri]

    def _list_names(self, folder: str, *, missing_ok: bool) -> list[str]:
        return sorted(uri.rpartition("/")[2] for uri in self.objects)

    def _delete(self, uri: str) -> None:
        self.objects.pop(uri, None)

    def _act(self, number: int) -> None:
        self.may_run[number].acquire()
        try:
            for _ in range(6):
                held = lease_at("s3://bucket")
                try:
                    held.take()
                    for _ in range(self.random.randrange(8)):
                        self.sleep(self.random.choice([0.0, 4.0, 25.0]))
                        if self.random.random() < 0.7:
                            held._renew()
                        held.check()
                        self.written.append(held.number)
                    held.release()
                except UserError:
                    self.sleep(self.random.uniform(0, 60))
                except _KilledError:
                    self.sleep(self.random.uniform(0, 60))
        finally:
            del self.wakes[number]
            self.paused.release()


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 1500), marks=pytest.mark.soak)])
def test_in_any_order_of_events_no_run_writes_after_a_later_one_has_written(
    seeds: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = ("write_new", "write_bytes", "read_bytes", "list_names", "delete")
    others = {name: getattr(storage, name) for name in ("join", "name", "suppress_missing")}
    runs = 0
    for seed in seeds:
        world = _World(seed)
        fake = SimpleNamespace(**others, **{name: world.request(name) for name in requests})
        monkeypatch.setattr(lease, "storage", fake)
        monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda world=world: world.now, sleep=world.sleep))
        world.run()
        assert world.written == sorted(world.written), f"seed {seed}"
        runs += len(set(world.written))
    assert runs > 3 * len(seeds), "few runs got the lease"
