"""The format of a checkpoint: a run that an earlier version left is resumed, and nothing in it can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch

from btray.training.checkpoints import STATE, Checkpoint

# As every version has written it, in the middle of an epoch.
WRITTEN: dict[str, Any] = {
    "network": {"w": torch.ones(2)},
    "optimiser": {"state": {}, "param_groups": []},
    "average": None,
    "evaluated": {"w": torch.ones(2)},
    "history": [
        {
            "epoch": 1, "train_loss": 1.8, "learning_rate": 0.002, "images": 128, "images_per_second": 31.8,
            "feed_ratio": 0.99, "val_loss": 1.6, "val_macro_f1": 0.06, "val_accuracy": 0.2, "score": 0.066,
            "rejected": 0, "seconds": 4.2,
        }
    ],
    "steps": 3,
    "totals": torch.tensor([4.0, 5.0, 48.0], dtype=torch.float64),
}  # fmt: skip


def test_a_checkpoint_of_an_earlier_version_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    torch.save(WRITTEN, tmp_path / STATE)
    checkpoint = Checkpoint.load(ray.train.Checkpoint.from_directory(tmp_path))
    assert checkpoint.steps == 3
    assert [record.val_macro_f1 for record in checkpoint.history] == [0.06]
    checkpoint.save(str(tmp_path))
    again = torch.load(tmp_path / STATE, weights_only=True)
    assert list(again) == [*WRITTEN, "trained"]
    assert again["trained"].tolist() == []
    assert again["history"] == WRITTEN["history"]
    assert torch.equal(again["totals"], WRITTEN["totals"])


def test_what_would_have_to_be_unpickled_is_refused(tmp_path: Path) -> None:
    torch.save({**WRITTEN, "network": Path("anything")}, tmp_path / STATE)
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        Checkpoint.load(ray.train.Checkpoint.from_directory(tmp_path))
