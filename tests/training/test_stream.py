"""Streaming: every sample once per epoch, in an order that all workers know, whatever arrives when or never."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray.train
import torch
from hypothesis import given
from hypothesis import strategies as st

from btray.data.frames import FRAMES_PER_SCAN
from btray.training.config import TrainConfig
from btray.training.feeding.stream import FramePool, StreamFeed, read_order, training_order, worker_orders
from btray.training.plan import Plan
from tests.helpers.training_helpers import prepared, tiny, train_here, write_tree

SIZE = 32


def in_steps(units: np.ndarray, workers: int, **more: Any) -> list[np.ndarray]:
    """What each worker trains on in the rest of an epoch, step by step."""
    orders = worker_orders(units, workers=workers, **more)
    return [part[then].reshape(more["steps"], more["batch_size"] // workers) for part, then in orders]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=4, max_size=40),
    stretches=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=4),
    seed=st.integers(0, 9),
)
def test_each_sample_is_trained_on_once_and_after_a_restart_only_what_was_not(
    sizes: list[int], stretches: list[tuple[int, int]], seed: int
) -> None:
    units = np.repeat(np.arange(len(sizes)), sizes)
    batch_size = min(8, len(units))
    left, trained = len(units) // batch_size, np.zeros(len(units), bool)
    for number, (workers, steps) in enumerate(stretches):
        fixed: dict[str, Any] = {"seed": seed, "epoch": 3, "batch_size": batch_size, "trained": trained}
        parts = in_steps(units, workers, steps=left, **fixed)
        done = left if number == len(stretches) - 1 else min(steps, left)
        seen = np.concatenate([part[:done].ravel() for part in parts])
        assert len(np.unique(seen)) == len(seen) == done * (batch_size // workers) * workers
        assert not trained[seen].any()
        trained[seen] = True
        left -= done
    if all(batch_size % workers == 0 for workers, _ in stretches):
        assert trained.sum() == len(units) // batch_size * batch_size


def test_epochs_and_seeds_differ_in_order_and_the_same_ones_do_not() -> None:
    units = np.repeat(np.arange(30), 3)
    orders = {
        (seed, epoch): in_steps(units, 2, seed=seed, epoch=epoch, steps=11, batch_size=8)[1].tobytes()
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len(set(orders.values())) == 6
    again = in_steps(units, 2, seed=1, epoch=2, steps=11, batch_size=8)[1]
    assert again.tobytes() == orders[1, 2]


def test_a_unit_is_read_in_one_go_and_units_in_another_order_each_epoch() -> None:
    units = np.random.default_rng(0).integers(0, 50, 1000)
    orders = [units[read_order(units, seed=0, epoch=epoch)] for epoch in (0, 1)]
    for read in orders:
        assert np.count_nonzero(np.diff(read)) == 49
    assert (orders[0] != orders[1]).any()


def test_some_ten_thousand_frames_are_held_back_for_shuffling_and_never_twice_as_many() -> None:
    order = training_order(100_000, [0])
    assert sorted(order) == list(range(100_000))
    held = np.maximum.accumulate(order) - np.arange(100_000)
    assert held[20_000:-20_000].min() >= 8192
    assert held.max() < 16_384


class InWorker:
    """What Ray Train tells a worker, and scans whose frames show their numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, frames: list[int], *, workers: int = 1, rank: int = 0) -> None:
        self.frames, self.workers, self.rank = frames, workers, rank
        self.now = list(frames)  # of each scan, as its file is in this epoch; 0: it is unreadable
        rows = np.repeat(np.arange(len(frames)), frames)
        numbers = np.concatenate([np.arange(count) for count in frames])
        config = TrainConfig(data="d", out="o", batch_size=6, preprocess={"size": SIZE})
        everything = np.arange(len(rows))
        self.plan = Plan(
            config=config,
            classes=("a", "b"),
            run_uri="",
            samples=rows * FRAMES_PER_SCAN + numbers,
            labels=rows % 2,
            sources=np.zeros(len(rows), np.int64),
            train=everything[everything % 5 > 0],
            validation=everything[everything % 5 == 0],
            streaming=True,
        )
        monkeypatch.setattr(ray.train, "get_context", lambda: self)
        monkeypatch.setattr(ray.train, "get_dataset_shard", lambda name: self)
        monkeypatch.setattr(StreamFeed, "_decode", lambda feed, scans, *_: self.decode(scans))
        self.feed = StreamFeed(self.plan)

    def get_world_rank(self) -> int:
        return self.rank

    def get_world_size(self) -> int:
        return self.workers

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        uris = [f"{number // 3}.parquet#{number}/x" for number in range(len(self.frames))]
        yield pa.table({"row": np.arange(len(uris)), "uri": uris})

    def decode(self, scans: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        lines = []
        for scan in scans.tolist():
            if self.now[scan] == 0:
                lines.append((scan * FRAMES_PER_SCAN, "truncated", 0))
            lines += [(scan * FRAMES_PER_SCAN + number, "", number) for number in range(self.now[scan])]
        for start in range(0, len(lines), 7):
            sample, code, number = (np.array(column) for column in zip(*lines[start : start + 7], strict=True))
            shown = (sample // FRAMES_PER_SCAN * 16 + number).astype(np.uint8)
            frame = np.broadcast_to(shown[:, None, None], (len(shown), SIZE, SIZE))
            yield {"sample": sample, "code": code, "message": code, "frame": frame}


def check(worker: InWorker, batches: list[Any], *, training: bool = True) -> list[int]:
    """Return the samples of some batches that count, whose frames and labels are theirs."""
    seen: list[int] = []
    for batch in batches:
        row = batch.samples.numpy() // FRAMES_PER_SCAN
        counts = batch.weights.numpy() > 0 if training else np.ones(len(row), bool)
        shown = (row * 16 + batch.samples.numpy() % FRAMES_PER_SCAN).astype(np.uint8) * counts
        assert (batch.frames.numpy() == shown[:, None, None]).all()
        assert (batch.labels.numpy() == row % 2).all()
        seen += batch.samples.numpy()[counts].tolist()
    return seen


@pytest.mark.parametrize("workers", [1, 2])
def test_the_frames_of_all_workers_are_those_of_the_epoch_and_of_validation(
    monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    counts = [1, 3, 2, 9, 1, 1, 4, 7, 1, 2]
    samples: list[int] = []
    held: list[int] = []
    teams = [InWorker(monkeypatch, counts, workers=workers, rank=rank).feed for rank in range(workers)]
    first = [sample for feed in teams for sample in next(feed.train(1)).samples.tolist()]
    assert len(first) == 6
    for rank in range(workers):
        worker = InWorker(monkeypatch, counts, workers=workers, rank=rank)
        batches = list(worker.feed.train(1))
        assert len(batches) == worker.plan.steps_per_epoch == 4
        assert [len(batch.frames) for batch in batches] == [6 // workers] * 4
        rest = list(worker.feed.train(1, torch.tensor(first)))
        assert len(rest) == 3
        assert not set(check(worker, rest)) & set(first)
        samples += check(worker, batches)
        held += check(worker, list(worker.feed.validation()), training=False)
        assert worker.feed.rejected == 0
    assert len(set(samples)) == len(samples) == 24
    assert set(samples) <= set(worker.plan.samples[worker.plan.train].tolist())
    assert sorted(held) == worker.plan.samples[worker.plan.validation].tolist()


def test_scans_that_have_changed_are_left_out_and_take_no_step_away(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = InWorker(monkeypatch, [1, 3, 2, 9, 1, 1, 4, 7, 1, 2])
    whole = set(check(worker, list(worker.feed.train(0))))
    worker.now[3], worker.now[7], worker.now[1] = 0, 2, 8  # unreadable, fewer frames, more frames
    batches = list(worker.feed.train(0))
    assert [len(batch.frames) for batch in batches] == [6] * 4
    left = set(check(worker, batches))
    lost = {3 * FRAMES_PER_SCAN + number for number in range(9)} | {
        7 * FRAMES_PER_SCAN + number for number in range(2, 7)
    }
    assert left == whole - lost
    assert worker.feed.rejected == 1

    worker.now = [0] * 10
    batches = list(worker.feed.train(0))
    assert [batch.weights.tolist() for batch in batches] == [[0.0] * 6] * 4
    assert all(batch.whole_weight > 0 for batch in batches)
    assert not list(worker.feed.validation())


def test_a_pool_gives_each_frame_back_once_and_uses_its_room_again() -> None:
    pool, random = FramePool(1000, SIZE), np.random.default_rng(0)
    shown = random.integers(0, 256, (1000, 1, 1)).astype(np.uint8) * np.ones((1, SIZE, SIZE), np.uint8)
    places = random.permutation(1000)
    for start in range(0, 1000, 50):
        some = places[start : start + 50]
        pool.put(some[:40], shown[some[:40]])
        there, frames = pool.take(some)
        assert there.tolist() == [True] * 40 + [False] * 10
        assert (frames[:40] == shown[some[:40]]).all()
        assert not frames[40:].any()
    assert len(pool._frames) == 40


@pytest.mark.cluster
def test_a_streamed_run_learns_from_every_image_and_records_the_same_as_one_from_memory(
    ray_session: None, tmp_path: Path
) -> None:
    data = write_tree(tmp_path / "data", {"train/glioma": 17, "train/no_tumor": 15, "val/glioma": 3, "val/no_tumor": 3})
    config = tiny(data, tmp_path / "out", cache_gb=0, epochs=2)
    assert prepared(config).plan.streaming
    history, checkpoint = train_here(config)
    assert [(record.images, record.rejected) for record in history] == [(32, 0)] * 2
    assert history[1].train_loss < history[0].train_loss
    assert len(checkpoint.trained) == checkpoint.steps == 0
