"""The checkpoint of a run: its content, and the file that holds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import ray.train
import torch
from torch import Tensor

from btray.training.feeding.loader import NOTHING
from btray.training.history import EpochRecord

STATE = "state.pt"

StateDict = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The content of `state.pt`: state dicts, and how far the run has come."""

    network: StateDict
    optimiser: StateDict
    average: StateDict | None
    """The averaged network with its counter of steps, named as in torch's AveragedModel; None without `ema`."""
    evaluated: StateDict
    """The network that was validated: the averaged one, if there is one."""
    history: list[EpochRecord]
    """All completed epochs."""
    steps: int
    """Steps of an interrupted epoch; 0 after a whole one."""
    totals: Tensor
    """Sums of the interrupted epoch over all workers, float64 [3]: loss, weight, images."""
    trained: Tensor = NOTHING
    """Numbers of the samples that all workers have trained on in the interrupted epoch, int64 [images]."""

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
