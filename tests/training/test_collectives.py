"""What workers exchange: none of them takes a step alone, and one worker needs no others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import pytest
import ray.train
import torch
from torch import Tensor

from btray.training.collectives import Collectives


def team(monkeypatch: pytest.MonkeyPatch, workers: int) -> list[Collectives]:
    """Return the collectives of several workers, which are threads here and add up in memory."""
    barrier, parts = Barrier(workers, timeout=20), [torch.zeros(()) for _ in range(workers)]

    class InMemory(Collectives):
        def sum(self, tensor: Tensor) -> Tensor:
            parts[self.rank] = tensor
            barrier.wait()
            total = torch.stack(parts).sum(0)
            barrier.wait()
            return total

    members: list[Collectives] = []
    for rank in range(workers):
        place = SimpleNamespace(get_world_rank=lambda rank=rank: rank, get_world_size=lambda: workers)
        monkeypatch.setattr(ray.train, "get_context", lambda place=place: place)
        members.append(InMemory(torch.device("cpu")))
    return members


@pytest.mark.parametrize("lengths", [(3, 3), (0, 2), (4, 1), (2, 5, 3)])
def test_workers_take_as_many_batches_as_the_one_that_has_fewest_and_none_waits_for_ever(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]
) -> None:
    members = team(monkeypatch, len(lengths))

    def take(member: Collectives) -> list[int]:
        return list(member.in_step(iter(range(lengths[member.rank]))))

    with ThreadPoolExecutor(len(lengths)) as pool:
        taken = list(pool.map(take, members))
    assert taken == [list(range(min(lengths)))] * len(lengths)


def test_one_worker_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    place = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: place)
    alone = Collectives(torch.device("cpu"))
    tensor = torch.tensor([1.0, 2.0])
    assert alone.sum(tensor) is tensor
    assert alone.gather(tensor)[0] is tensor
    assert list(alone.in_step(iter("abc"))) == ["a", "b", "c"]
