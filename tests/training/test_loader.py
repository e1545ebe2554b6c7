"""The thread that brings batches to the device: none is lost, changed or overtaken, and it ends with its reader."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from btray.training.feeding.loader import Batch, BatchLoader

CPU = torch.device("cpu")


def batch_of(number: int, n: int, *, kept: bool) -> Batch:
    """A batch that shows its number; `kept`: chosen among frames in memory."""
    frames = torch.full((n, 4, 4), number, dtype=torch.uint8)
    rows = None
    if kept:
        everything = torch.arange(200, dtype=torch.uint8)[:, None, None].expand(200, 4, 4).contiguous()
        frames, rows = everything, torch.full((n,), number)
    return Batch(frames, torch.arange(n), torch.arange(n) + number, torch.ones(n), number / 2, rows)


@pytest.mark.parametrize("kept", [True, False])
def test_batches_of_any_size_arrive_whole_in_their_order_and_stay_until_the_next_is_asked_for(kept: bool) -> None:
    sizes = np.random.default_rng(0).integers(1, 9, 60).tolist()
    loader = BatchLoader(CPU)
    for _ in range(2):  # the second pass finds the buffers of the first
        arrived = 0
        for number, batch in enumerate(loader(batch_of(number, n, kept=kept) for number, n in enumerate(sizes))):
            n = sizes[number]
            assert batch.frames.shape == (n, 4, 4)
            assert (batch.frames == number).all()
            assert batch.labels.tolist() == list(range(n))
            assert batch.keys.tolist() == batch.samples.tolist() == [number + one for one in range(n)]
            assert (batch.weights.tolist(), batch.whole_weight) == ([1.0] * n, number / 2)
            arrived += 1
        assert arrived == len(sizes)


def test_two_buffers_are_enough_and_the_thread_is_at_most_one_batch_ahead_of_them() -> None:
    made: list[int] = []

    def feed() -> Iterator[Batch]:
        for number in range(20):
            made.append(number)
            yield batch_of(number, 3, kept=True)

    places = set()
    for number, batch in enumerate(BatchLoader(CPU)(feed())):
        places.add(batch.frames.data_ptr())
        assert len(made) <= number + 3
    assert len(places) == 2


def test_what_the_feed_raises_is_raised_to_the_reader_after_the_batches_before_it() -> None:
    def feed() -> Iterator[Batch]:
        yield batch_of(0, 2, kept=False)
        yield batch_of(1, 2, kept=False)
        raise OSError("the store is away")

    batches = BatchLoader(CPU)(feed())
    assert [int(next(batches).frames[0, 0, 0]) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="the store is away"):
        next(batches)
    assert not threads()


def test_a_reader_that_leaves_early_ends_the_thread_and_the_feed() -> None:
    ended = threading.Event()

    def feed() -> Iterator[Batch]:
        try:
            for number in range(200):
                yield batch_of(number, 2, kept=False)
        finally:
            ended.set()

    loader = BatchLoader(CPU)
    batches = loader(feed())
    next(batches)
    assert threads()
    batches.close()
    assert ended.is_set()
    assert not threads()
    assert [int(batch.labels.sum()) for batch in loader(batch_of(0, n, kept=True) for n in (2, 3))] == [1, 3]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "batches"]
