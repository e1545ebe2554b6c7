"""Ray Train for one worker in this process, without Ray: what it tells a training, and what it is told."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.train
import ray.train.torch
import torch

from btray.data.frames import FRAMES_PER_SCAN
from btray.training.collectives import Collectives
from btray.training.config import TrainConfig
from btray.training.plan import Plan


def plan_of(config: TrainConfig, labels: Sequence[int], validation: Sequence[int] = (), **fields: Any) -> Plan:
    """Plan a run on samples with `labels`, of which those at the positions `validation` are held out."""
    everything = np.arange(len(labels))
    given: dict[str, Any] = {
        "config": config,
        "classes": tuple(f"class {index}" for index in range(max(labels) + 1)),
        "run_uri": config.storage_uri,
        "samples": everything * FRAMES_PER_SCAN,
        "labels": np.array(labels),
        "sources": np.zeros(len(labels), np.int64),
        "train": np.setdiff1d(everything, validation),
        "validation": np.array(validation, np.int64),
        "streaming": False,
    }
    return Plan(**given | fields)


def collectives(rank: int = 0, workers: int = 1) -> Collectives:
    """Return the collectives of one worker, which exchange nothing unless it is one of several."""
    place = {"world_rank": rank, "world_size": workers, "local_rank": rank, "node_rank": 0}
    context = SimpleNamespace(**{f"get_{name}": lambda value=value: value for name, value in place.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray.train, "get_context", lambda: context)
        return Collectives(torch.device("cpu"))


class OneWorker:
    """The only worker of a run: its frames show their position, and its checkpoints lie in `folder`."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.latest: ray.train.Checkpoint | None = None
        """The checkpoint to resume from: the last one that was reported."""
        self.reports: list[str] = []
        """The names of all checkpoints."""

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the place of Ray Train until the test ends."""
        alone = SimpleNamespace(
            get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_rank=lambda: 0, get_node_rank=lambda: 0
        )
        monkeypatch.setattr(ray.train, "get_context", lambda: alone)
        monkeypatch.setattr(ray.train, "get_dataset_shard", lambda name: self)
        monkeypatch.setattr(ray.train, "get_checkpoint", lambda: self.latest)
        monkeypatch.setattr(ray.train, "get_preemption_info", lambda: None)
        monkeypatch.setattr(ray.train, "report", self.report)
        monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))

    def iter_batches(self, **_: Any) -> Iterator[dict[str, np.ndarray]]:
        """Yield blocks as decoding gives them: in any order, rejected scans and scans that are left out among them."""
        size, positions = self.plan.config.preprocess.size, np.arange(len(self.plan.samples), dtype=np.uint8)
        frames = np.broadcast_to(positions[:, None, None], (len(positions), size, size))
        yield {"sample": np.array([-1, 1, 1 << 40]), "frame": 255 - frames[:3]}
        yield {"sample": self.plan.samples[::-1], "frame": frames[::-1]}

    def report(self, metrics: dict[str, Any], checkpoint: Any, *, checkpoint_dir_name: str, **_: Any) -> None:
        """Keep a checkpoint."""
        kept = self.folder / checkpoint_dir_name
        shutil.copytree(checkpoint.path, kept, dirs_exist_ok=True)
        shutil.rmtree(checkpoint.path)
        self.reports.append(checkpoint_dir_name)
        self.latest = ray.train.Checkpoint.from_directory(kept)
