"""The baseline of the training job: the shortest DDP loop that trains the same network, without Ray.

torchrun --nproc-per-node 2 benchmarks/bare_loop.py FRAMES.npz EPOCHS BATCH_SIZE

FRAMES.npz holds `frames` (uint8 [n, size, size]) and `labels` (int64 [n]), kept in memory. Rank 0 prints one line per
epoch, its seconds. There is no validation, weight averaging, checkpoint or history.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from btray.model.config import NetworkConfig
from btray.model.network import build_network
from btray.training.augment import Augmenter
from btray.training.config import AugmentConfig


def main(path: str, epochs: int, batch_size: int) -> None:
    """Train and print the seconds of each epoch."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, workers = dist.get_rank(), dist.get_world_size()
    arrays = np.load(path)
    frames, labels = torch.from_numpy(arrays["frames"]), torch.from_numpy(arrays["labels"])
    torch.manual_seed(0)
    network = build_network(NetworkConfig(), int(labels.max()) + 1).to(memory_format=torch.channels_last)
    parallel = DistributedDataParallel(network)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    augment = Augmenter(AugmentConfig(), seed=0)
    for epoch in range(epochs):
        started = time.perf_counter()
        order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(epoch))
        for step in range(len(frames) // batch_size):
            chosen = order[step * batch_size : (step + 1) * batch_size][rank::workers]
            images = augment(frames[chosen], chosen, epoch).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(parallel(images), labels[chosen])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        if rank == 0:
            print(f"{time.perf_counter() - started:.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
