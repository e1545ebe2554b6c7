"""Graphs that are captured for a GPU, here a pretended one: what is captured when, and that no answer is another's.

That a real one computes the same is checked whenever an engine is made, and by benchmarks/gpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from btray.model import engines
from btray.model.engines import Captured


class Graph:
    """Replays what was run within `graph`, on the same input and into the same outputs."""

    made: list[Graph] = []  # noqa: RUF012

    def replay(self) -> None:
        for place, value in zip(self.outputs, compute(self.given), strict=True):
            place.copy_(value)


def compute(images: Tensor) -> tuple[Tensor, Tensor]:
    if Graph.made and not hasattr(Graph.made[-1], "given"):  # within a capture
        Graph.made[-1].given = images
        Graph.made[-1].outputs = (torch.zeros(len(images)), torch.zeros(len(images), 2))
        return Graph.made[-1].outputs
    return images.sum((1, 2, 3)), images.sum((1, 2))[:, :2]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Captured:
    @contextmanager
    def graph(graph: Any, **_: Any) -> Iterator[None]:
        Graph.made.append(graph)
        yield

    Graph.made.clear()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return Captured(compute)


def test_a_shape_is_captured_once_it_has_come_often_and_each_answer_stays_as_it_was(run: Captured) -> None:
    inputs = [torch.rand(count, 1, 4, 4) for _ in range(6) for count in (2, 3)] + [torch.rand(9, 1, 4, 4)]
    answers = [run(images) for images in inputs]
    for images, (logits, features) in zip(inputs, answers, strict=True):
        assert torch.equal(logits, images.sum((1, 2, 3)))
        assert torch.equal(features, images.sum((1, 2))[:, :2])
    assert sorted(len(graph.given) for graph in Graph.made) == [2, 3]


def test_few_shapes_are_captured_however_many_come(run: Captured) -> None:
    for count in range(1, 12):
        for _ in range(5):
            run(torch.ones(count, 1, 4, 4))
    assert len(Graph.made) == engines._MOST_CAPTURED
