"""Frames for training: decoded by Ray Data, kept in memory while they fit, streamed again every epoch when not."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
import ray.train
import torch
from torch import Tensor

from btray.data.fingerprint import NO_FINGERPRINT, fingerprint_of
from btray.data.frames import FRAMES_PER_SCAN, FrameSource, Rejection
from btray.data.scans import Scan
from btray.training.config import TrainConfig

_log = logging.getLogger(__name__)

# Rows a block of the decoding pipeline: some 6 MB of frames of 160 x 160, a second's work for one core.
_BLOCK_ROWS = 256
# CPUs of a task that decodes frames to be kept. A node that dies takes its frames along, and they are decoded anew
# while workers hold the rest of every CPU: if it took more than that leaves, both would wait for ever.
_KEPT_CPUS = 0.05
TRAINING_CPUS = 1.0 - _KEPT_CPUS
"""Most CPUs that a training worker may ask for."""
# Batches held back for shuffling when data are streamed; the driver has put the rows in random order before.
_SHUFFLED_BATCHES = 32
# The columns that the driver looks at: all but the frames.
_SURVEYED = ["sample", "label", "digest", "fingerprint", "code", "message"]

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Batch:
    """A worker's part of one step."""

    frames: Tensor
    """uint8 [n, size, size]"""
    labels: Tensor
    """int64 [n]"""
    samples: Tensor
    """int64 [n]: what augmentation is keyed by."""
    whole_labels: Tensor | None = None
    """int64 [batch]: labels of the step over all workers, where this one knows them."""


@dataclass(frozen=True)
class Plan:
    """All that a worker must know; the same for every worker and every restart."""

    config: TrainConfig
    classes: tuple[str, ...]
    run_uri: str
    """Folder of the run: checkpoints, history, TensorBoard events."""
    samples: npt.NDArray[np.int64]
    """Numbers of all samples that are used, ascending."""
    labels: npt.NDArray[np.int64]
    """Their classes."""
    train: npt.NDArray[np.int64]
    """Positions in `samples` that are trained on."""
    validation: npt.NDArray[np.int64]
    """Positions in `samples` that are held out; none in a refit."""
    streaming: bool
    """Frames do not fit in memory."""
    initial_weights: dict[str, Tensor] | None = None
    """Tensors to start from, by name."""

    @property
    def batch_size(self) -> int:
        """Samples a step over all workers: fewer than asked for only where there are fewer."""
        return min(self.config.batch_size, len(self.train))

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches an epoch; the samples left over change from epoch to epoch."""
        return len(self.train) // self.batch_size

    def class_counts(self) -> list[int]:
        """Training samples of each class."""
        return np.bincount(self.labels[self.train], minlength=len(self.classes)).tolist()


class Feed(Protocol):
    """What the training loop draws from."""

    rejected: int
    """Scans that were readable when the run began and gave no frame since."""

    def train(self, epoch: int) -> Iterator[Batch]:
        """This worker's batches of one epoch, shuffled."""

    def validation(self) -> Iterator[Batch]:
        """This worker's share of the held-out samples."""


def decode_rows(table: pa.Table, source: FrameSource, *, num_cpus: float = 1.0, kept: bool = False) -> ray.data.Dataset:
    """Decode the scans of `table` (columns row, uri, label as a number) to one row a frame.

    Columns: sample, label, frame (uint8 [size, size]), digest (of the frame), fingerprint (of the scan, packed), code
    and message (of a rejection, whose frame is black). Nothing runs before the data set is used; each task then takes
    `num_cpus`, or, where the frames are `kept` while workers train, the little that these leave, one task a CPU at a
    time. A cluster that has no CPU yet will grow, and by whole ones.
    """
    blocks = [table.slice(start, _BLOCK_ROWS) for start in range(0, len(table), _BLOCK_ROWS)]
    tasks = min(len(blocks), int(ray.cluster_resources().get("CPU", 0.0))) if kept else 0
    return ray.data.from_arrow(blocks).map_batches(
        _Decode(source),
        batch_size=None,
        batch_format="numpy",
        num_cpus=_KEPT_CPUS if tasks else num_cpus,
        compute=ray.data.TaskPoolStrategy(size=tasks or None),
    )


def survey(frames: ray.data.Dataset) -> pa.Table:
    """Everything about decoded rows but the frames: sample, label, digest, fingerprint, code, message; by sample."""
    batches = frames.select_columns(_SURVEYED).iter_batches(batch_size=None, batch_format="pyarrow")
    return pa.concat_tables(batches).sort_by("sample")


def keep(frames: ray.data.Dataset, most: int) -> tuple[ray.data.Dataset | None, pa.Table]:
    """The decoded frames in Ray's object store, None where they are more than `most`; and their `survey`.

    Frames are counted, not scans, of which some have hundreds; those past the limit are let go as they come.
    """
    kept: list[Any] = []
    seen, count = [], 0
    blocks: Iterator[Any] = iter(frames.iter_batches(batch_size=None, batch_format="pyarrow"))
    for block in blocks:
        seen.append(block.select(_SURVEYED).take(np.arange(len(block))))  # a copy, which does not hold the frames
        count += len(block)
        if count <= most:
            kept.append(ray.put(block))
        else:
            kept.clear()
    found = pa.concat_tables(seen).sort_by("sample")
    return (ray.data.from_arrow_refs(kept) if kept else None), found


class _Decode:
    """Turns a block of URIs into a block of frames; picklable."""

    def __init__(self, source: FrameSource) -> None:
        self.source = source

    def __call__(self, batch: Arrays) -> Iterator[Arrays]:
        """Blocks of some _BLOCK_ROWS frames each, as they are decoded: scans of many frames do not fill the memory."""
        rows: list[dict[str, Any]] = []
        scans = self.source.scans([str(uri) for uri in batch["uri"]])
        for row, label, scan in zip(batch["row"], batch["label"], scans, strict=True):
            rows += self._frames(int(row), int(label), _numberable(scan))
            if len(rows) >= _BLOCK_ROWS:
                yield _as_columns(rows)
                rows = []
        if rows:
            yield _as_columns(rows)

    def _frames(self, row: int, label: int, scan: Scan | Rejection) -> Iterator[dict[str, Any]]:
        rejection = scan if isinstance(scan, Rejection) else None
        size = self.source.preprocess.size
        shown = [np.zeros((size, size), np.uint8)] if isinstance(scan, Rejection) else self.source.frames_of(scan)
        fingerprint = NO_FINGERPRINT if isinstance(scan, Rejection) else fingerprint_of(scan.frames)
        for number, frame in enumerate(shown):
            yield {
                "sample": row * FRAMES_PER_SCAN + number,
                "label": label,
                "digest": hashlib.blake2b(frame.tobytes(), digest_size=16).hexdigest(),
                "fingerprint": fingerprint,
                "code": rejection.code if rejection else "",
                "message": rejection.message if rejection else "",
                "frame": frame,
            }


def _numberable(scan: Scan | Rejection) -> Scan | Rejection:
    """The scan, rejected where its last frames would have the sample numbers of the next scan."""
    if isinstance(scan, Rejection) or len(scan.frames) <= FRAMES_PER_SCAN:
        return scan
    said = f"{len(scan.frames)} frames, more than the {FRAMES_PER_SCAN} that training takes of a scan: split it"
    return Rejection("bomb", said, retryable=False)


def _as_columns(rows: list[dict[str, Any]]) -> Arrays:
    return {name: _as_array(name, [row[name] for row in rows]) for name in rows[0]}


def _as_array(name: str, values: list[Any]) -> npt.NDArray[Any]:
    if name == "frame":
        return np.stack(values)
    # As objects: numpy's own bytes lose the zeros at their end.
    return np.array(values, object if name == "fingerprint" else None)


class MemoryFeed:
    """All frames in this process; every worker knows the whole order of an epoch and takes its part of each batch.

    So the batches of an epoch hold the same samples however many workers there are.
    """

    def __init__(self, plan: Plan) -> None:
        context = ray.train.get_context()
        self.plan, self.rank, self.workers = plan, context.get_world_rank(), context.get_world_size()
        self.rejected = 0
        size = plan.config.preprocess.size
        frames = np.empty((len(plan.samples), size, size), np.uint8)
        for batch in ray.train.get_dataset_shard("frames").iter_batches(batch_size=None, batch_format="numpy"):
            used = np.isin(batch["sample"], plan.samples)  # neither unreadable nor left out
            frames[np.searchsorted(plan.samples, batch["sample"][used])] = batch["frame"][used]
        self.frames = torch.from_numpy(frames)
        self.labels = torch.from_numpy(plan.labels.copy())
        self.samples = torch.from_numpy(plan.samples.copy())

    def train(self, epoch: int) -> Iterator[Batch]:
        """This worker's batches of one epoch, shuffled by seed and epoch alone."""
        order = epoch_order(self.plan, epoch)
        for step in range(self.plan.steps_per_epoch):
            whole = order[step * self.plan.batch_size : (step + 1) * self.plan.batch_size]
            yield self._batch(whole[self.rank :: self.workers], whole)

    def validation(self) -> Iterator[Batch]:
        """This worker's share of the held-out samples."""
        mine = self.plan.validation[self.rank :: self.workers]
        for start in range(0, len(mine), self.plan.config.batch_size):
            yield self._batch(mine[start : start + self.plan.config.batch_size])

    def _batch(self, positions: npt.NDArray[np.int64], whole: npt.NDArray[np.int64] | None = None) -> Batch:
        chosen = torch.tensor(positions)
        whole_labels = None if whole is None else self.labels[torch.tensor(whole)]
        return Batch(self.frames[chosen], self.labels[chosen], self.samples[chosen], whole_labels)


class StreamFeed:
    """Frames decoded anew every epoch, each worker reading its own share; for data larger than memory."""

    def __init__(self, plan: Plan) -> None:
        context = ray.train.get_context()
        self.plan, self.share = plan, max(1, plan.batch_size // context.get_world_size())
        self.rejected = 0

    def train(self, epoch: int) -> Iterator[Batch]:
        """This worker's batches of one epoch: rows in the driver's random order, shuffled again within a buffer."""
        yield from self._stream(
            "train",
            drop_last=True,
            local_shuffle_buffer_size=_SHUFFLED_BATCHES * self.share,
            local_shuffle_seed=self.plan.config.seed + epoch,
        )

    def validation(self) -> Iterator[Batch]:
        """This worker's share of the held-out samples."""
        yield from self._stream("validation")

    def _stream(self, name: str, **options: Any) -> Iterator[Batch]:
        shard = ray.train.get_dataset_shard(name)
        for arrays in shard.iter_batches(batch_size=self.share, batch_format="numpy", **options):
            readable = arrays["code"] == ""
            self._count_rejected(arrays, ~readable)
            if readable.any():
                tensors = (torch.from_numpy(arrays[key][readable]) for key in ("frame", "label", "sample"))
                yield Batch(*tensors)

    def _count_rejected(self, arrays: Arrays, rejected: npt.NDArray[np.bool_]) -> None:
        for code, message in zip(arrays["code"][rejected], arrays["message"][rejected], strict=True):
            self.rejected += 1
            _log.warning("rejected, though readable when the run began (%s): %s", code, message)


def epoch_order(plan: Plan, epoch: int) -> npt.NDArray[np.int64]:
    """Positions in the order in which an epoch takes them; with `class_balance` "sampling", rare classes more often."""
    generator = np.random.default_rng([plan.config.seed, epoch])
    if plan.config.optimiser.class_balance != "sampling":
        return generator.permutation(plan.train)
    chance = 1.0 / np.array(plan.class_counts())[plan.labels[plan.train]]
    return generator.choice(plan.train, len(plan.train), p=chance / chance.sum())
