"""Collective operations of the workers of a run. A single worker exchanges nothing and needs no process group."""

from __future__ import annotations

from typing import Any

import ray.train
import torch
import torch.distributed as dist
from torch import Tensor, nn


class Collectives:
    """The place of this worker among all, and the operations that all of them must call at the same step."""

    def __init__(self, device: torch.device) -> None:
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.node, self.local_rank = context.get_node_rank(), context.get_local_rank()
        self._device = device

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all workers; the result lies where `tensor` does."""
        if self.workers == 1:
            return tensor
        total = tensor.to(self._device, copy=True)  # all_reduce works in place, and NCCL on GPU memory alone
        dist.all_reduce(total)
        return total.to(tensor.device)

    def gather(self, *tensors: Tensor) -> list[Tensor]:
        """Concatenate each tensor over all workers, in the same order everywhere; lengths may differ by worker."""
        if self.workers == 1:
            return [*tensors]
        return [torch.cat(column) for column in zip(*self.gather_objects(tensors), strict=True)]

    def gather_objects(self, own: Any) -> list[Any]:
        """Return what each worker gives, by rank, as soon as all have given it."""
        if self.workers == 1:
            return [own]
        given: list[Any] = [None] * self.workers
        dist.all_gather_object(given, own)
        return given

    def share_buffers(self, network: nn.Module) -> None:
        """Give every worker rank 0's buffers: batch statistics differ by worker, and rank 0 writes checkpoints."""
        if self.workers > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)
