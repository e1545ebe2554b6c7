"""What workers exchange: one worker needs no others."""

from __future__ import annotations

import torch

from tests.helpers.one_worker import collectives


def test_one_worker_exchanges_nothing() -> None:
    alone = collectives()
    tensor = torch.tensor([1.0, 2.0])
    assert alone.sum(tensor) is tensor
    assert alone.gather(tensor)[0] is tensor
    assert alone.gather_objects("own") == ["own"]
