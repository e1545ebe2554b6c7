"""Frames in memory: one file per node that its workers share, and epochs that resume where they were left."""

from __future__ import annotations

import errno
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from btray.data.frames import FRAMES_PER_SCAN
from btray.training import train_loop
from btray.training.collectives import Collectives
from btray.training.feeding import memory
from btray.training.feeding.loader import BatchLoader
from btray.training.feeding.memory import MemoryFeed, node_frames
from btray.training.history import EpochRecord
from btray.training.plan import Plan
from btray.training.step import TrainingStep
from tests.helpers.one_worker import OneWorker, collectives, plan_of
from tests.helpers.training_helpers import checkpoint_in, tiny

LABELS = [0, 1] * 30


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


# ---- the file


def test_workers_of_a_node_map_one_file_which_is_gone_when_all_have_it(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tiny("d", tmp_path), LABELS)
    OneWorker(plan, tmp_path).install(monkeypatch)
    barrier, given = Barrier(3, timeout=20), [None] * 3
    files: list[list[str]] = []

    def everyones(rank: int, own: Any) -> list[Any]:
        given[rank] = own
        barrier.wait()
        seen = list(given)
        if rank == 0:
            files.append(os.listdir(temporary))
        barrier.wait()
        return seen

    def member(rank: int, node: int, local_rank: int) -> torch.Tensor:
        place = SimpleNamespace(node=node, local_rank=local_rank, gather_objects=lambda own: everyones(rank, own))
        return node_frames(plan, cast("Collectives", place))

    with ThreadPoolExecutor(3) as pool:
        first, other, alone = pool.map(member, range(3), [0, 0, 1], [0, 1, 0])
    assert [len(names) for names in files] == [2, 2], "one per node, until all have it"
    assert not os.listdir(temporary)
    for frames in (first, other, alone):
        assert frames[:, 0, 0].tolist() == list(range(len(LABELS)))
    first[3] = 77
    assert (int(other[3, 0, 0]), int(alone[3, 0, 0])) == (77, 3), "the memory is the same, not a copy"


def test_a_folder_without_room_is_an_error_and_not_a_killed_process(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    plan = plan_of(tiny("d", tmp_path), LABELS)
    OneWorker(plan, tmp_path).install(monkeypatch)
    monkeypatch.setattr(memory.os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"TMPDIR.*No space left"):
        node_frames(plan, collectives())
    assert not os.listdir(temporary)


# ---- batches


def feed_of(plan: Plan, rank: int = 0, workers: int = 1) -> MemoryFeed:
    """Return the feed of one of several workers; its frames show their position."""
    size = plan.config.preprocess.size
    positions = torch.arange(len(plan.samples), dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "node_frames", lambda *_: positions[:, None, None].expand(-1, size, size))
        return MemoryFeed(plan, collectives(rank, workers), torch.device("cpu"))


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_share_each_batch_of_one_worker_between_them(workers: int) -> None:
    plan = plan_of(tiny("d", "o", batch_size=10), [index % 2 for index in range(50)], range(43, 50))
    alone, team = feed_of(plan), [feed_of(plan, rank, workers) for rank in range(workers)]
    for epoch in (0, 5):
        whole = list(alone.train(epoch))
        parts = [list(feed.train(epoch)) for feed in team]
        assert len(whole) == 4
        assert all(len(steps) == 4 for steps in parts)
        for step, batch in enumerate(whole):
            together = [sample for steps in parts for sample in steps[step].samples.tolist()]
            assert sorted(together) == sorted(batch.samples.tolist())
            assert len(together) == 10
    held_out = [sample for feed in team for batch in feed.validation() for sample in batch.samples.tolist()]
    assert sorted(held_out) == (np.arange(43, 50) * FRAMES_PER_SCAN).tolist()


def test_each_frame_keeps_its_label_and_sample_number() -> None:
    plan = plan_of(tiny("d", "o", batch_size=3), [0, 1, 2, 0, 1, 2, 1, 1], [0, 6])
    for batch in BatchLoader(torch.device("cpu"))(feed_of(plan).train(3)):
        positions = batch.samples.numpy() // FRAMES_PER_SCAN
        assert batch.labels.tolist() == plan.labels[positions].tolist()
        assert batch.frames[:, 0, 0].tolist() == positions.tolist()


# ---- resuming


@given(first=st.integers(0, 45), before=st.integers(1, 12), after=st.integers(1, 12))
def test_the_rest_of_an_epoch_is_the_rest_of_its_order_whatever_size_its_batches_have_then(
    first: int, before: int, after: int
) -> None:
    plan = plan_of(tiny("d", "o", batch_size=after), [0, 1] * 23)
    order = plan.samples[plan.epoch_order(3)]
    trained = first // before * before
    rest = [batch.samples.tolist() for batch in feed_of(plan).train(3, torch.from_numpy(order[:trained]))]
    assert len(rest) == plan.steps_left(trained)
    assert [sample for batch in rest for sample in batch] == order[
        trained : trained + len(rest) * plan.batch_size
    ].tolist()


class Killed(BaseException):
    """Stands for a SIGKILL."""


class Recorded:
    """A training whose steps are written down, and which is killed after some of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[int, list[int]]] = []
        """Epoch and samples of each step."""
        self.kill_after = 1 << 30
        take = TrainingStep.__call__

        def step(this: TrainingStep, batch: Any, *, epoch: int, **options: Any) -> None:
            if len(self.steps) == self.kill_after:
                raise Killed
            take(this, batch, epoch=epoch, **options)
            self.steps.append((epoch, batch.samples.tolist()))

        monkeypatch.setattr(TrainingStep, "__call__", step)

    def of_epoch(self, epoch: int) -> list[int]:
        return [sample for other, samples in self.steps if other == epoch for sample in samples]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    monkeypatch.setattr("btray.training.preemption.EVERY", 0.0)  # a look after every step
    return Recorded(monkeypatch)


def run(worker: OneWorker) -> list[EpochRecord]:
    trainer = train_loop.Trainer(worker.plan)
    trainer.run()
    return trainer.history


@pytest.mark.parametrize("resized", [False, True], ids=["same workers", "other number of images per step"])
def test_a_run_killed_in_mid_epoch_trains_on_each_image_of_it_exactly_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: Recorded, resized: bool
) -> None:
    now = 0.0

    def clock() -> float:  # a checkpoint is due after every third step: its two looks at the clock
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr("btray.training.preemption.time.monotonic", clock)
    config = tiny("d", tmp_path, epochs=2, batch_size=6, checkpoint_minutes=0.05)
    worker = OneWorker(plan_of(config, LABELS, range(54, 60)), tmp_path / "checkpoints")
    worker.install(monkeypatch)
    recorded.kill_after = 9 + 6  # the second epoch has nine steps
    with pytest.raises(Killed):
        run(worker)
    assert worker.latest is not None
    saved = checkpoint_in(worker.latest.path)
    assert 0 < saved.steps < 6, worker.reports
    del recorded.steps[9 + saved.steps :]  # what was learnt after the checkpoint is lost, and must be learnt again
    assert sorted(saved.trained.tolist()) == sorted(recorded.of_epoch(1))
    recorded.kill_after = 1 << 30
    if resized:
        worker.plan = plan_of(config.model_copy(update={"batch_size": 3}), LABELS, range(54, 60))
    history = run(worker)
    for epoch in (0, 1):
        assert sorted(recorded.of_epoch(epoch)) == (np.arange(54) * FRAMES_PER_SCAN).tolist()
    assert [record.epoch for record in history] == [1, 2]
    assert history[1].images == 54 - len(saved.trained), "since it was resumed"


def test_a_resumed_epoch_has_the_curve_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: Recorded
) -> None:
    curves = []
    for killed in (False, True):
        config = tiny("d", tmp_path / str(killed), epochs=2, batch_size=6, checkpoint_minutes=1e-9)
        worker = OneWorker(plan_of(config, LABELS, range(54, 60)), tmp_path / str(killed) / "checkpoints")
        worker.install(monkeypatch)
        recorded.kill_after = len(recorded.steps) + 9 + 4 if killed else 1 << 30
        if killed:
            with pytest.raises(Killed):
                run(worker)
            assert worker.reports[-1] == "epoch_00001_step_0000004"
            recorded.kill_after = 1 << 30
        curves.append([[record.train_loss, record.val_loss, record.learning_rate] for record in run(worker)])
    assert np.allclose(curves[0], curves[1], rtol=1e-6)


def test_an_epoch_whose_line_was_lost_with_the_worker_is_reported_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("d", tmp_path, epochs=2, batch_size=6)
    worker = OneWorker(plan_of(config, LABELS, range(54, 60)), tmp_path / "checkpoints")
    worker.install(monkeypatch)
    report = train_loop.Tracker.epoch_ended

    def lost(tracker: train_loop.Tracker, history: Any) -> None:
        if len(history) == 2:
            raise Killed
        report(tracker, history)

    with monkeypatch.context() as patch:
        patch.setattr(train_loop.Tracker, "epoch_ended", lost)
        with pytest.raises(Killed):
            run(worker)
    run(worker)
    folder = Path(worker.plan.run_uri)
    assert len((folder / "history.jsonl").read_text().splitlines()) == 2
    assert [path.name[-1] for path in sorted((folder / "tensorboard").iterdir())] == ["1", "2"]


def test_without_minutes_only_whole_epochs_have_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: Recorded
) -> None:
    config = tiny("d", tmp_path, epochs=2, batch_size=6, checkpoint_minutes=0)
    worker = OneWorker(plan_of(config, LABELS, range(54, 60)), tmp_path / "checkpoints")
    worker.install(monkeypatch)
    run(worker)
    assert worker.reports == ["epoch_00001", "epoch_00002"]


def test_a_checkpoint_that_only_counts_its_images_is_resumed_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: Recorded
) -> None:
    """As the version before wrote it."""
    config = tiny("d", tmp_path, epochs=1, batch_size=6, checkpoint_minutes=1e-9)
    worker = OneWorker(plan_of(config, LABELS, range(54, 60)), tmp_path / "checkpoints")
    worker.install(monkeypatch)
    recorded.kill_after = 4
    with pytest.raises(Killed):
        run(worker)
    path = Path(cast("Any", worker.latest).path, "state.pt")
    state = torch.load(path, weights_only=True)
    del state["trained"]
    torch.save(state, path)
    recorded.kill_after = 1 << 30
    run(worker)
    assert sorted(recorded.of_epoch(0)) == (np.arange(54) * FRAMES_PER_SCAN).tolist()


def plan_for(plan: Plan, workers: int) -> tuple[int, float]:
    changed = plan.for_workers(workers)
    return changed.batch_size, changed.config.optimiser.learning_rate


# ---- how many images


def test_images_per_worker_make_the_batch_and_the_rate_grow_with_the_workers() -> None:
    rate = tiny("d", "o").optimiser.learning_rate
    labels = [0, 1] * 2000
    each = tiny("d", "o", batch_size=None, images_per_worker=32)
    assert plan_for(plan_of(each, labels), 1) == (32, pytest.approx(rate / 2))
    assert plan_for(plan_of(each, labels), 8) == (256, pytest.approx(rate * 4))
    thrice = each.model_copy(update={"accumulate": 3})
    assert plan_for(plan_of(thrice, labels), 8) == (768, pytest.approx(rate * 12))
    assert plan_for(plan_of(thrice, labels), 64) == (4000, pytest.approx(rate * 4000 / 64)), "no more than there are"
    total = tiny("d", "o", batch_size=48)
    assert plan_for(plan_of(total, labels), 8) == (48, rate)
    assert plan_for(plan_of(tiny("d", "o", batch_size=None), labels), 8) == (64, rate)


def test_a_batch_is_given_in_one_way() -> None:
    with pytest.raises(ValueError, match="--batch-size or --images-per-worker"):
        tiny("d", "o", batch_size=32, images_per_worker=8)
