"""Streaming: frames are read again every epoch, in an order that follows from seed, epoch and workers alone.

Samples are read in units, which are drawn in random order: a scan, or a shard of a pack, which is thus read once. Each
worker reads an equal part of that order and trains on it in another one, in which each sample has moved by up to
`MOVED` places. Nothing depends on what arrives when: so all workers know the number of steps, and a run that resumes
in the middle of an epoch knows what it has trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
import ray.train
import torch
from torch import Tensor

from btray.data.duplicates import numbered
from btray.data.frames import FRAMES_PER_SCAN, FrameSource
from btray.storage.packed import shard_of
from btray.training.feeding.loader import NOTHING, Batch
from btray.training.feeds import Arrays, stream_block
from btray.training.plan import Indices, Plan

_log = logging.getLogger(__name__)

MOVED = 20_000
"""Places by which shuffling moves a sample at most: half as many frames are held back, 10,000 of them."""
# Bytes of frames that are decoded ahead for a worker.
_AHEAD = 512 << 20
# Frames of one task, or those of one shard if it has more.
_TASK_FRAMES = 256
# CPUs of a task that decodes while workers train: on a machine with one CPU it must fit beside a worker.
_TASK_CPUS = 0.5


def read_order(units: Indices, *, seed: int, epoch: int) -> Indices:
    """Draw the order in which samples are read in an epoch: their positions [n], those of a unit next to one another.

    `units` [n] are the numbers of the units that they belong to.
    """
    numbers, unit = np.unique(units, return_inverse=True)
    rank = np.random.default_rng([seed, epoch]).permutation(len(numbers))
    return np.argsort(rank[unit], kind="stable")


def training_order(count: int, seed: Sequence[int]) -> Indices:
    """Return the order in which a worker trains on the `count` samples that it reads, as positions among these."""
    return np.argsort(np.arange(count) + np.random.default_rng(seed).random(count) * MOVED, kind="stable")


def worker_orders(
    units: Indices,
    *,
    seed: int,
    epoch: int,
    steps: int,
    batch_size: int,
    workers: int,
    trained: npt.NDArray[np.bool_] | None = None,
) -> list[tuple[Indices, Indices]]:
    """Return of each worker the samples that it reads in so many steps, and the order in which it trains on them.

    Args:
        units: of all samples, [n].
        seed: of the run.
        epoch: from 0.
        steps: that are left of it.
        batch_size: over all workers.
        workers: that share each batch.
        trained: which samples were trained on before in this epoch, [n].
    """
    order = read_order(units, seed=seed, epoch=epoch)
    before = 0
    if trained is not None:
        order, before = order[~trained[order]], int(trained.sum())
    size = steps * (batch_size // workers)
    parts = (order[rank * size : (rank + 1) * size] for rank in range(workers))
    return [(part, training_order(size, [seed, epoch, 1 + before, rank])) for rank, part in enumerate(parts)]


class StreamFeed:
    """Frames of this worker's share of an epoch, for data larger than memory."""

    def __init__(self, plan: Plan) -> None:
        """Take the data set `scans` of Ray Train: columns row and uri, ascending, of all rows that the plan uses."""
        context = ray.train.get_context()
        self.plan, self.rank, self.workers = plan, context.get_world_rank(), context.get_world_size()
        self.rejected = 0  # scans that were readable when the run began
        scans = ray.train.get_dataset_shard("scans").iter_batches(batch_size=None, batch_format="pyarrow")
        self._scans = pa.concat_tables(scans).sort_by("row")
        self._row = plan.samples // FRAMES_PER_SCAN
        # Of each sample the place of its scan in that table, and its unit.
        self._place = np.searchsorted(self._scans["row"].to_numpy(), self._row)
        units = [shard_of(uri) or str(row) for row, uri in enumerate(self._scans["uri"].to_pylist())]
        self._units = numbered(pa.array(units))[self._place]
        self._weights = plan.loss_weights()

    def train(self, epoch: int, trained: Tensor = NOTHING) -> Iterator[Batch]:
        """Yield this worker's batches of an epoch, as many as each other worker's.

        The samples that all workers have `trained` on before are left out.
        """
        plan = self.plan
        orders = worker_orders(
            self._units[plan.train],
            seed=plan.config.seed,
            epoch=epoch,
            steps=plan.steps_left(len(trained)),
            batch_size=plan.batch_size,
            workers=self.workers,
            trained=np.isin(plan.samples[plan.train], trained.numpy()),
        )
        size = plan.batch_size // self.workers
        chosen = [plan.train[part[then]].reshape(-1, size) for part, then in orders]
        whole_weights = np.sum([self._weights[steps].sum(1) for steps in chosen], axis=0)
        part, then = orders[self.rank]
        for step, (places, there, frames) in enumerate(self._frames(plan.train[part], then, size)):
            # What has become unreadable counts for nothing, but it keeps its place: all batches have one shape.
            yield self._batch(plan.train[part[places]], frames, there, float(whole_weights[step]))

    def validation(self) -> Iterator[Batch]:
        """Yield this worker's share of the held-out samples."""
        share = np.array_split(self.plan.validation, self.workers)[self.rank]
        for places, there, frames in self._frames(share, np.arange(len(share)), self.plan.batch_size):
            if there.any():
                yield self._batch(share[places[there]], frames[there], there[there])

    def _batch(
        self,
        samples: Indices,
        frames: npt.NDArray[np.uint8],
        there: npt.NDArray[np.bool_],
        whole_weight: float | None = None,
    ) -> Batch:
        return Batch(
            torch.from_numpy(frames),
            torch.from_numpy(self.plan.labels[samples]),
            torch.from_numpy(self.plan.samples[samples]),
            torch.from_numpy(self._weights[samples] * there),
            whole_weight,
        )

    def _frames(
        self, read: Indices, then: Indices, size: int
    ) -> Iterator[tuple[Indices, npt.NDArray[np.bool_], npt.NDArray[np.uint8]]]:
        """Read the samples at the positions `read`, and yield `size` at a time in the order `then`.

        Yields their places in `read`, which of them could be read, and their frames; black ones of the others.
        """
        pool = FramePool(len(read), self.plan.config.preprocess.size)
        arrived = 0  # places in `read` up to here have arrived, or never will
        blocks = self._arrivals(read)
        for start in range(0, len(then), size):
            places = then[start : start + size]
            while arrived <= places.max():
                arrived, ready, frames = next(blocks, (len(read), read[:0], None))
                if frames is not None:
                    pool.put(ready, frames)
            yield places, *pool.take(places)

    def _arrivals(self, read: Indices) -> Iterator[tuple[int, Indices, npt.NDArray[np.uint8]]]:
        """Yield frames with their places in `read`, and with the place up to which all have arrived or never will."""
        if not len(read):
            return
        scan = self._place[read]
        starts = np.flatnonzero(np.diff(scan, prepend=-1))  # where in `read` each scan begins
        wanted = np.argsort(self.plan.samples[read], kind="stable")
        samples = self.plan.samples[read][wanted]
        start_of = np.zeros(len(self._scans), np.int64)
        start_of[scan[starts]] = starts
        for block in self._decode(scan[starts], np.diff(starts, append=len(read)), self._units[read][starts]):
            if not len(block["sample"]):
                continue
            unreadable = block["code"] != ""
            for code, message in zip(block["code"][unreadable], block["message"][unreadable], strict=True):
                self.rejected += 1
                _log.warning("rejected, though readable when the run began (%s): %s", code, message)
            # A scan that was exchanged since may have more frames than it had.
            found = np.searchsorted(samples, block["sample"]).clip(max=len(samples) - 1)
            used = ~unreadable & (samples[found] == block["sample"])
            last = np.searchsorted(self._scans["row"].to_numpy(), block["sample"][-1] // FRAMES_PER_SCAN)
            # Blocks come in order: of all scans but the last one nothing more will come.
            yield int(start_of[last]), wanted[found[used]], block["frame"][used]

    def _decode(self, scans: Indices, counts: Indices, units: Indices) -> Iterator[Arrays]:
        """Decode scans in their order, at least _TASK_FRAMES frames and whole units in each task."""
        table = self._scans.take(scans)
        ends = np.flatnonzero(np.diff(units, append=-1)) + 1  # of units
        before = np.concatenate([[0], np.cumsum(counts)])
        blocks, start = [], 0
        for end in ends.tolist():
            if before[end] - before[start] >= _TASK_FRAMES or end == len(table):
                blocks.append(table.slice(start, end - start))
                start = end
        frames = ray.data.from_arrow(blocks).map_batches(
            partial(stream_block, source=FrameSource(self.plan.config.preprocess)),
            batch_size=None,
            batch_format="numpy",
            num_cpus=_TASK_CPUS,
        )
        options = frames.context.execution_options
        options.preserve_order = True
        options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=_AHEAD)
        yield from frames.iter_batches(batch_size=None, batch_format="numpy")


class FramePool:
    """Frames [size, size] that have arrived and were not taken yet, by their places; each is copied in and out once."""

    def __init__(self, places: int, size: int) -> None:
        self._slot = np.full(places, -1, np.int64)  # of each place
        self._frames = np.empty((1, size, size), np.uint8)
        self._free = np.zeros(1, np.int64)

    def put(self, places: Indices, frames: npt.NDArray[np.uint8]) -> None:
        """Keep frames [n, size, size] for `places` [n]."""
        if missing := max(0, len(places) - len(self._free)):
            count = len(self._frames)
            larger = np.empty((count + max(missing, count // 4), *self._frames.shape[1:]), np.uint8)
            larger[:count] = self._frames
            self._free = np.concatenate([self._free, np.arange(count, len(larger))])
            self._frames = larger
        slots, self._free = np.split(self._free, [len(places)])
        self._frames[slots] = frames
        self._slot[places] = slots

    def take(self, places: Indices) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint8]]:
        """Return which of `places` [n] have a frame, and the frames [n, size, size], which are no longer kept."""
        slots = self._slot[places]
        there = slots >= 0
        self._free = np.concatenate([self._free, slots[there]])
        frames = self._frames.take(slots.clip(0), axis=0)
        frames[~there] = 0
        return there, frames


def scans_of(rows: Indices, uris: Any) -> ray.data.Dataset:
    """Return the data set `scans` of some rows of a labelled table, ascending, whose column uri is `uris`."""
    return ray.data.from_arrow(pa.table({"row": rows, "uri": uris.take(rows)}))
