"""Batches, and the thread that brings them to a worker's device while it computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

NOTHING = torch.zeros(0, dtype=torch.int64)
"""The samples that were trained on before an epoch begins."""
_BUFFERS = 2  # one is computed with while the other is filled


@dataclass(frozen=True)
class Batch:
    """A worker's part of one step, as a feed gives it: n of the batch's samples."""

    frames: Tensor
    """uint8 [n, size, size]; with `rows`, [any number, size, size]"""
    labels: Tensor
    """int64 [n]"""
    samples: Tensor
    """int64 [n]: their numbers, by which augmentation is keyed."""
    weights: Tensor
    """float32 [n]: their weights in the loss; 0: it does not count."""
    whole_weight: float | None = None
    """Sum of the weights of the step over all workers, if this one knows it."""
    rows: Tensor | None = None
    """int64 [n]: which of `frames` are the batch's; None: all."""


@dataclass(frozen=True)
class LoadedBatch:
    """A batch on the device. On a CPU it lies in a buffer that is filled anew after the next one was asked for."""

    frames: Tensor
    labels: Tensor
    keys: Tensor
    """The sample numbers, int64 [n]."""
    weights: Tensor
    whole_weight: float | None
    samples: Tensor
    """The same numbers, on the host: a checkpoint lists them, and must not wait for the device."""


class BatchLoader:
    """Brings one feed's batches after the other to `device`, each while the batch before it is computed with.

    A thread gathers a batch into one of two buffers. For a GPU these are pinned, and copied on a stream of their own,
    so that neither the host nor the GPU waits for a copy.
    """

    def __init__(self, device: torch.device) -> None:
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers = [_Buffer(device, stream) for _ in range(_BUFFERS)]
        self.waited = 0.0
        """Seconds that were spent waiting for batches."""

    def __call__(self, batches: Iterator[Batch]) -> Generator[LoadedBatch]:
        """Yield `batches` from the device, in their order; what their iterator raises is raised here.

        Closing the generator ends the thread, which closes the iterator.
        """
        free: SimpleQueue[_Buffer | None] = SimpleQueue()
        filled: SimpleQueue[tuple[_Buffer, LoadedBatch] | BaseException | None] = SimpleQueue()
        closing = threading.Event()
        for buffer in self._buffers:
            free.put(buffer)
        thread = threading.Thread(target=_fill, args=(batches, free, filled, closing), name="batches", daemon=True)
        thread.start()
        try:
            while True:
                started = time.perf_counter()
                item = filled.get()
                self.waited += time.perf_counter() - started
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                buffer, batch = item
                buffer.hand_over(batch)
                yield batch
                free.put(buffer)
        finally:
            closing.set()
            free.put(None)
            thread.join()


def _fill(
    batches: Iterator[Batch],
    free: SimpleQueue[_Buffer | None],
    filled: SimpleQueue[tuple[_Buffer, LoadedBatch] | BaseException | None],
    closing: threading.Event,
) -> None:
    """Load each batch into a free buffer, until there are no more or nobody wants them."""
    try:
        for batch in batches:
            buffer = free.get()
            if buffer is None or closing.is_set():
                break
            filled.put((buffer, buffer.load(batch)))
        if isinstance(batches, Generator):
            batches.close()
        filled.put(None)
    except BaseException as error:  # the main thread raises it
        filled.put(error)


class _Buffer:
    """Memory of one batch on the host."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        """`stream` is that of the copies; None on a CPU."""
        self._device, self._stream = device, stream
        self._copied = torch.cuda.Event() if stream is not None else None
        self._memory: dict[str, Tensor] = {}

    def load(self, batch: Batch) -> LoadedBatch:
        """Gather a batch and start to copy it to the device."""
        if self._copied is not None:
            self._copied.synchronize()  # its last batch may still be on the way; only this thread waits
        on_stream: Any = torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()
        with on_stream:
            loaded = LoadedBatch(
                self._frames(batch),
                self._to_device("labels", batch.labels),
                self._to_device("keys", batch.samples),
                self._to_device("weights", batch.weights),
                batch.whole_weight,
                batch.samples,
            )
            if self._copied is not None:
                self._copied.record(self._stream)
        return loaded

    def hand_over(self, batch: LoadedBatch) -> None:
        """Let the work that the caller gives the GPU from now on wait for the copy; the host goes on."""
        if self._copied is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._copied)
        for tensor in (batch.frames, batch.labels, batch.keys, batch.weights):
            tensor.record_stream(current)  # allocated on the other stream: not to be given away before this work ends

    def _frames(self, batch: Batch) -> Tensor:
        if batch.rows is None:
            return self._to_device("frames", batch.frames)
        if batch.frames.device.type != "cpu":  # kept on the device: only the choice is copied
            return batch.frames.index_select(0, self._to_device("rows", batch.rows))
        memory = self._room("frames", (len(batch.rows), *batch.frames.shape[1:]), batch.frames.dtype)
        return torch.index_select(batch.frames, 0, batch.rows, out=memory).to(self._device, non_blocking=True)

    def _to_device(self, name: str, tensor: Tensor) -> Tensor:
        return self._room(name, tensor.shape, tensor.dtype).copy_(tensor).to(self._device, non_blocking=True)

    def _room(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the first rows of the named memory, which grows to the largest batch."""
        memory = self._memory.get(name)
        if memory is None or len(memory) < shape[0]:
            memory = torch.empty(shape, dtype=dtype, pin_memory=self._stream is not None)
            self._memory[name] = memory
        return memory[: shape[0]]
