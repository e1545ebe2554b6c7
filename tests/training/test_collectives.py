"""What workers exchange: one worker needs no others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray.train
import torch

from btray.training.collectives import Collectives


def test_one_worker_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    place = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: place)
    alone = Collectives(torch.device("cpu"))
    tensor = torch.tensor([1.0, 2.0])
    assert alone.sum(tensor) is tensor
    assert alone.gather(tensor)[0] is tensor
