"""Checkpoints of a run: their content, and how workers read and write them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import ray.train
import torch
from torch import Tensor

from btray.training.history import EpochRecord

STATE = "state.pt"

StateDict = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The content of `state.pt`: state dicts, and how far the run has come."""

    network: StateDict
    optimiser: StateDict
    average: StateDict | None
    """torch's AveragedModel with its counter of steps; None without `ema`."""
    evaluated: StateDict
    """The network that was validated: the averaged one, if there is one."""
    history: list[EpochRecord]
    """All completed epochs."""
    steps: int
    """Steps of an interrupted epoch; 0 after a whole one."""
    totals: Tensor
    """Sums of the interrupted epoch over all workers, float64 [3]: loss, weight, images."""

    def save(self, folder: str) -> None:
        """Write the checkpoint into `folder`, as tensors and plain values alone."""
        state = vars(self) | {"history": [asdict(record) for record in self.history]}
        torch.save(state, Path(folder, STATE))

    @classmethod
    def load(cls, checkpoint: ray.train.Checkpoint) -> Self:
        """Read a checkpoint to the CPU. `weights_only` refuses to unpickle anything but tensors and plain values."""
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, STATE), map_location="cpu", weights_only=True)
        return cls(**state | {"history": [EpochRecord(**record) for record in state["history"]]})


def report(metrics: Mapping[str, Any], content: Checkpoint | None, name: str, *, wait: bool = False) -> None:
    """Report to Ray Train, from all workers; rank 0 gives the content of the checkpoint that is kept as `name`.

    The upload runs while training continues, unless `wait`.
    """
    checkpoint = None
    if content is not None:
        folder = tempfile.mkdtemp(prefix="btray-checkpoint-")  # deleted by Ray after the upload
        content.save(folder)
        checkpoint = ray.train.Checkpoint.from_directory(folder)
    upload = ray.train.CheckpointUploadMode.SYNC if wait else ray.train.CheckpointUploadMode.ASYNC
    ray.train.report(
        dict(metrics),
        checkpoint,
        checkpoint_dir_name=name,
        checkpoint_upload_mode=upload,
        delete_local_checkpoint_after_upload=True,
    )
