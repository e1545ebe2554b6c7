"""A run that is stopped, or whose machine is reclaimed: checkpoints in the middle of an epoch, and resuming."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import ray.train
from torch import Tensor

from btray import storage
from btray.core.errors import Stopped
from btray.storage import StorageError
from btray.training import preemption
from btray.training.collectives import Collectives
from btray.training.job import train
from btray.training.plan import run_folder
from btray.training.preemption import BEGUN, STOP, InterruptionWatch, stoppable
from tests.conftest import ROOT
from tests.helpers.training_helpers import checkpoint_in, history_of, tiny, train_here, write_tree


@pytest.fixture
def nothing_is_reclaimed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No node is drained except those whose ids the test appends."""
    drained: list[str] = []
    monkeypatch.setattr(
        ray.train,
        "get_preemption_info",
        lambda: SimpleNamespace(preempted_node_ids=list(drained)) if drained else None,
    )
    return drained


def watch_in(
    folder: Path, rank: int = 0, add: Callable[[Tensor], Tensor] = lambda tensor: tensor, minutes: float = 0.0
) -> InterruptionWatch:
    """Return the watch of a worker whose tensors `add` sums over all workers."""
    return InterruptionWatch(str(folder), cast("Collectives", SimpleNamespace(rank=rank, sum=add)), minutes)


# ---- the look-out


def test_each_reclaimed_node_is_reported_once_and_a_stop_at_every_look(
    nothing_is_reclaimed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "EVERY", 0.0)  # look after every step
    watch = watch_in(tmp_path)
    assert watch.after_step() is None
    nothing_is_reclaimed.append("a")
    assert [watch.after_step() for _ in range(3)] == ["reclaimed", None, None]
    nothing_is_reclaimed.append("b")
    assert [watch.after_step() for _ in range(2)] == ["reclaimed", None]
    (tmp_path / STOP).touch()
    assert [watch.after_step() for _ in range(2)] == ["stop", "stop"]


@pytest.mark.parametrize("pace", [0.01, 2.0, 30.0])
def test_looks_are_seconds_apart_however_long_a_step_takes(
    nothing_is_reclaimed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pace: float
) -> None:
    now = 0.0
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now)
    looked: list[float] = []
    watch = watch_in(tmp_path, 0, lambda tensor: looked.append(now) or tensor)  # type: ignore[func-returns-value]
    for _ in range(2000):
        now += pace
        watch.after_step()
    gaps = [later - earlier for earlier, later in pairwise(looked)]
    assert looked[0] == pytest.approx(pace), "after the first step already"
    assert all(preemption.EVERY * 0.99 <= gap <= max(preemption.EVERY, pace) + pace for gap in gaps)


def test_all_workers_look_after_the_same_steps_however_their_clocks_differ(
    nothing_is_reclaimed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that looked alone would wait for the others for ever."""
    said: list[Tensor] = []
    first = watch_in(tmp_path, 0, lambda tensor: said.append(tensor) or tensor)  # type: ignore[func-returns-value]
    answers: list[Tensor] = []
    other = watch_in(tmp_path, 1, lambda tensor: answers.pop(0) + tensor)
    looks: list[tuple[bool, bool]] = []
    for step in range(400):
        if step == 100:
            (tmp_path / STOP).touch()
        if step % 50 == 0:
            time.sleep(0.01)  # clocks differ
        before = len(said)
        found = first.after_step()
        answers += said[before:]
        waiting = len(answers)
        also = other.after_step()
        looks.append((len(said) > before, waiting > len(answers)))
        assert found == also
    assert all(mine == yours for mine, yours in looks)


def test_a_checkpoint_is_due_so_many_minutes_after_the_last_one_and_a_stop_comes_first(
    nothing_is_reclaimed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now)
    watch, never = watch_in(tmp_path, minutes=2), watch_in(tmp_path)
    due = []
    for step in range(1, 400):
        now = float(step)
        notice = watch.after_step()
        assert never.after_step() is None
        if notice:
            due.append((step, notice))
            watch.saved()
    assert [notice for _, notice in due] == ["due"] * 3
    assert all(
        120 <= later - earlier <= 120 + preemption.EVERY for (earlier, _), (later, _) in pairwise([(0, ""), *due])
    )
    now += 1000
    (tmp_path / STOP).touch()
    notices = [watch.after_step() for _ in range(20)]
    assert set(notices) == {None, "stop"}


def test_an_unreachable_store_does_not_end_the_training(
    nothing_is_reclaimed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(uri: str) -> bool:
        raise StorageError("unavailable", uri, "no answer")

    monkeypatch.setattr(storage, "exists", away)
    assert watch_in(tmp_path).after_step() is None


def test_a_worker_says_that_it_has_begun_before_it_looks_whether_to_stop(
    nothing_is_reclaimed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver asks in the other order, so a stop is never missed by both."""
    looked: list[bool] = []
    monkeypatch.setattr(storage, "exists", lambda uri: bool(looked.append((tmp_path / BEGUN).exists())))
    watch = watch_in(tmp_path)
    assert not (tmp_path / BEGUN).exists(), "it has taken no step"
    assert watch.after_step() is None
    assert looked == [True]


# ---- the signal


def test_the_signal_leaves_a_mark_and_only_within_the_block(tmp_path: Path) -> None:
    (tmp_path / STOP).touch()
    before = signal.getsignal(signal.SIGTERM)
    with stoppable(str(tmp_path)) as asked:
        assert not (tmp_path / STOP).exists(), "the mark of an earlier stop does not count"
        assert not asked()
        (tmp_path / BEGUN).touch()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
        deadline = time.monotonic() + 10
        while not (tmp_path / STOP).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert signal.getsignal(signal.SIGTERM) == before


def test_while_workers_start_the_signal_ends_the_wait_though_an_earlier_run_had_begun(tmp_path: Path) -> None:
    (tmp_path / BEGUN).touch()

    def wait_for_workers() -> bool:
        with stoppable(str(tmp_path)):
            os.kill(os.getpid(), signal.SIGTERM)
            return threading.Event().wait(60)

    with pytest.raises(Stopped, match="the same command continues it"):
        wait_for_workers()


_WAITS = """
import sys, time
from pathlib import Path
from btray.core.config import JobConfig
from btray.launch import run_job
from btray.core.errors import Stopped
from btray.training.preemption import stoppable
class Config(JobConfig):
    '''A job.'''
def job(config):
    with stoppable(sys.argv[1]) as asked:
        if sys.argv[2] != "starts":
            Path(sys.argv[1], "begun").touch()
        print("ready", flush=True)
        while not (asked() and sys.argv[2] == "obeys"):
            time.sleep(0.02)
    raise Stopped("stopped; the same command resumes it")
arguments, sys.argv[1:] = sys.argv[1:], []
sys.argv += arguments
import btray.core.config
btray.core.config.JobConfig.from_command_line = classmethod(lambda cls, *_, **__: cls())
run_job(Config, job)
"""


@pytest.mark.parametrize(("how", "signals"), [("obeys", 1), ("does not", 2), ("starts", 1)])
def test_a_stopped_job_ends_with_143_and_a_second_signal_ends_one_that_hangs(
    tmp_path: Path, how: str, signals: int
) -> None:
    job = subprocess.Popen([sys.executable, "-c", _WAITS, str(tmp_path), how], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    try:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        for _ in range(signals):
            job.terminate()
            time.sleep(0.3)
        _, said = job.communicate(timeout=20)
    finally:
        job.kill()
    assert job.returncode == 143
    assert "Traceback" not in said
    assert ("the same command" in said) == (how != "does not")


# ---- a training


@pytest.mark.cluster
@pytest.mark.soak
def test_a_training_that_is_stopped_within_an_epoch_resumes_at_that_step_as_if_it_had_not_been(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    data = write_tree(tmp_path / "data", {"Training/glioma": 30, "Training/no_tumor": 20})
    config = tiny(data, tmp_path / "model", epochs=2, batch_size=8)
    undisturbed, _ = train_here(tiny(data, tmp_path / "undisturbed", epochs=2, batch_size=8))

    def stop() -> None:
        deadline = time.monotonic() + 120
        while "stoppable" not in repr(signal.getsignal(signal.SIGTERM)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        storage.write_text(storage.join(run_folder(config), BEGUN), "")  # else the job would not wait for the workers
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(Stopped, match="the same command resumes it"):
        train(config)
    stopper.join()
    (name,) = [name for name in storage.list_names(run_folder(config)) if name.startswith("epoch_")]
    checkpoint = checkpoint_in(Path(run_folder(config), name))
    assert checkpoint.steps == 1
    assert checkpoint.history == history_of(config) == []
    train(config)
    curves = [[(record.train_loss, record.val_loss) for record in history]
              for history in (history_of(config), undisturbed)]  # fmt: skip
    assert [loss for pair in curves[0] for loss in pair] == pytest.approx(
        [loss for pair in curves[1] for loss in pair], rel=1e-4
    )
