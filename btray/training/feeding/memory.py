"""Frames that fit in memory: one memory-mapped file per node, which all its workers share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray.train
import torch
from torch import Tensor

from btray.training.collectives import Collectives
from btray.training.feeding.loader import NOTHING, Batch
from btray.training.plan import Indices, Plan


class MemoryFeed:
    """All frames of the run; every worker knows the whole order of an epoch and takes its part of each batch.

    So the batches of an epoch hold the same samples however many workers there are. On a GPU, frames of up to
    `gpu_cache_gb` in all lie in its memory.
    """

    def __init__(self, plan: Plan, collectives: Collectives, device: torch.device) -> None:
        self.plan, self.rank, self.workers = plan, collectives.rank, collectives.workers
        self.rejected = 0  # as a StreamFeed counts them: frames in memory stay readable
        frames = node_frames(plan, collectives)
        fit = frames.numel() <= plan.config.gpu_cache_gb * 1e9
        self.frames = frames.to(device) if fit else frames  # uint8: floats are made on the device, per batch
        self.labels = torch.from_numpy(plan.labels.copy())  # Ray's arrays are read-only, which torch warns of
        self.samples = torch.from_numpy(plan.samples.copy())
        self.weights = torch.from_numpy(plan.loss_weights())

    def train(self, epoch: int, trained: Tensor = NOTHING) -> Iterator[Batch]:
        """Yield this worker's batches of an epoch, shuffled by seed and epoch alone.

        The order's first samples are those that all workers have `trained` on before the run was interrupted.
        """
        first, size = len(trained), self.plan.batch_size
        left = self.plan.epoch_order(epoch)[first : first + self.plan.steps_left(first) * size]
        for whole in torch.from_numpy(left).split(size) if len(left) else ():
            yield self._batch(whole[self.rank :: self.workers], float(self.weights[whole].sum()))

    def validation(self) -> Iterator[Batch]:
        """Yield this worker's share of the held-out samples."""
        share = torch.tensor(self.plan.validation[self.rank :: self.workers])
        for start in range(0, len(share), self.plan.batch_size):
            yield self._batch(share[start : start + self.plan.batch_size])

    def _batch(self, rows: Tensor, whole_weight: float | None = None) -> Batch:
        return Batch(self.frames, self.labels[rows], self.samples[rows], self.weights[rows], whole_weight, rows)


def node_frames(plan: Plan, collectives: Collectives) -> Tensor:
    """Return the frames of the plan's samples, uint8 [samples, size, size], from a file that this node's workers share.

    The first worker of the node writes it, to the folder of temporary files. It loses its name as soon as all have
    opened it, so it ends with the last of them, however they end.

    Raises OSError if that folder has no room for it.
    """
    shape = (len(plan.samples), *(plan.config.preprocess.size,) * 2)
    path = _write(plan.samples, shape) if collectives.local_rank == 0 else ""
    of_nodes = dict(pair for pair in collectives.gather_objects((collectives.node, path)) if pair[1])
    frames = _mapped(of_nodes[collectives.node], shape)
    collectives.gather_objects(None)  # all have opened it
    if path:
        os.unlink(path)
    return frames


def _write(samples: Indices, shape: tuple[int, ...]) -> str:
    """Copy the frames of `samples`, which ascend, from Ray's object store to a new file, and return its path."""
    descriptor, path = tempfile.mkstemp(prefix="btray-frames-")
    try:
        try:
            os.posix_fallocate(descriptor, 0, int(np.prod(shape)))  # a mapped file without room would kill the process
        except OSError as error:
            gigabytes = np.prod(shape) / 1e9
            raise OSError(
                f"{gigabytes:.2f} GB of frames do not fit into {path}; set TMPDIR on the nodes: {error}"
            ) from error
        finally:
            os.close(descriptor)
        frames = _mapped(path, shape).numpy()
        for block in _blocks():
            places = np.searchsorted(samples, block["sample"]).clip(max=len(samples) - 1)
            used = samples[places] == block["sample"]  # neither unreadable nor left out
            frames[places[used]] = block["frame"][used]
    except BaseException:
        os.unlink(path)
        raise
    return path


def _blocks() -> Iterator[dict[str, Any]]:
    yield from ray.train.get_dataset_shard("frames").iter_batches(batch_size=None, batch_format="numpy")


def _mapped(path: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_file(path, shared=True, size=int(np.prod(shape)), dtype=torch.uint8).view(shape)
