"""One training step: the network, its optimiser and moving average, and how a batch changes them.

Nothing in a step waits for the device: no value is read from it and nothing is copied to it, so that a GPU always has
its next work when it ends one. What is measured is added up there and read once per epoch.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from btray.data.preprocess import to_tensor
from btray.model.engines import supports_bf16
from btray.model.network import Network, build_network, load_matching
from btray.training import optimizer
from btray.training.augment import Augmenter
from btray.training.checkpoints import Checkpoint
from btray.training.collectives import Collectives
from btray.training.config import IMAGENET
from btray.training.feeding.loader import LoadedBatch
from btray.training.plan import Plan

# Batch statistics of fewer images are too noisy to normalise by (Wu & He 2018, arXiv:1803.08494): GPUs share theirs.
_IMAGES_OF_NORMS = 16


class TrainingStep:
    """Trains the plan's network on `device`, together with the other workers; its state is the same on all of them.

    But for batch statistics: each worker has those of its own images. What is validated and kept are rank 0's.
    """

    def __init__(self, plan: Plan, device: torch.device, collectives: Collectives) -> None:
        self.config, self.classes, self.device, self.collectives = plan.config, len(plan.classes), device, collectives
        precision, settings = plan.config.precision, plan.config.optimiser
        self.bf16 = precision == "bf16" or (precision == "auto" and supports_bf16(device))
        self.augmenter = Augmenter(plan.config.augment, plan.config.seed)
        torch.manual_seed(plan.config.seed)  # every worker begins with the same weights
        network = build_network(plan.config.network, len(plan.classes))
        if plan.initial_weights:
            load_matching(network, plan.initial_weights)
        # Convolutions of oneDNN and cuDNN work in this layout, and would convert every layer's input to it.
        self.network: Network = network.to(device).to(memory_format=torch.channels_last)
        if shares_norms(device, collectives.workers, plan.batch_size // collectives.workers // plan.config.accumulate):
            nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        self.fine_tune = plan.initial_weights is not None
        self.optimiser = optimizer.make_optimiser(self.network, settings, fine_tune=self.fine_tune)
        self.average = optimizer.Average(self.network, settings.ema) if settings.ema else None
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)
        """Of the steps of the epoch so far: loss, weight, images."""
        self._frozen: int | None = None  # parts of the network that do not learn
        self._parallel: nn.Module = self.network
        if plan.config.compile:
            self.network.compile()

    def begin(self, epoch: int) -> None:
        """Prepare the network for the steps of an epoch (from 0)."""
        self.network.train()
        # After train(), which puts all batch norms into training mode, and before the first step: a head of random
        # weights would push large gradients through pretrained layers.
        frozen = self._frozen_parts(epoch)
        optimizer.freeze(self.network, frozen)
        if frozen == self._frozen or self.collectives.workers == 1:
            return
        self._frozen = frozen  # DDP fixes early which gradients it reduces: wrap again
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has a new name, which torch 2.6 has not
            self._parallel = DistributedDataParallel(
                self.network,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                # Broadcasting rank 0's batch statistics before every step would change nothing of those kept: rank 0's.
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    def __call__(self, batch: LoadedBatch, *, epoch: int, index: int, rate: float) -> None:
        """Take the step `index` of an epoch at a learning rate, and add to `totals`."""
        config = self.config.optimiser
        optimizer.set_learning_rate(self.optimiser, rate)
        frames, weights = batch.frames, batch.weights
        images = self.augmenter(frames, batch.keys, epoch) if self.config.augment.enabled else to_tensor(frames)
        targets = optimizer.soft_targets(batch.labels, self.classes, config)
        if config.mixup:
            seed = (self.config.seed, epoch, index, self.collectives.rank)
            images, targets, weights = optimizer.mix_up(images, targets, weights, config.mixup, seed)
        # If it is known, asking would make every worker wait for the slowest twice per step. Mixup keeps the sum. One
        # of nothing but samples that do not count has no gradient.
        whole_weight = batch.whole_weight or self.collectives.sum(weights.sum()).clamp(min=1e-12)
        self.optimiser.zero_grad()
        # DDP averages gradients over workers; each must count by the weight of its samples in the whole batch.
        losses = self._accumulate(images, targets, weights, self.collectives.workers / whole_weight)
        if config.clip_norm:
            nn.utils.clip_grad_norm_(self.network.parameters(), config.clip_norm)
        self.optimiser.step()
        if self.average is not None:
            self.average.update()
        self.totals += torch.stack([losses, weights.sum(), batch.weights.count_nonzero()]).double()

    def _accumulate(self, images: Tensor, targets: Tensor, weights: Tensor, scale: float | Tensor) -> Tensor:
        """Add up the gradients of a worker's share, in `accumulate` parts, and return the sum of its losses."""
        # All workers take as many parts: their smallest share is one image smaller than the largest.
        parts = self.config.accumulate
        losses = weights.new_zeros(())
        shares = zip(images.tensor_split(parts), targets.tensor_split(parts), weights.tensor_split(parts), strict=True)
        for number, share in enumerate(shares, start=1):
            with self._reducing(number == parts):
                loss = optimizer.weighted_losses(self.logits(self._parallel, share[0]), share[1], share[2])
                (loss * scale).backward()
            losses += loss.detach()
        return losses

    def _reducing(self, last: bool) -> AbstractContextManager[None]:
        """Leave the exchange of gradients to the last backward pass of a step."""
        if last or not isinstance(self._parallel, DistributedDataParallel):
            return nullcontext()
        return self._parallel.no_sync()

    def logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """Apply `network` to images [n, 1, size, size]; the range of bf16 needs no loss scaling."""
        precision: Any = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()
        with precision:
            logits: Tensor = network(images.contiguous(memory_format=torch.channels_last))
        return logits

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated and kept: the averaged one, if there is one."""
        return self.network if self.average is None else self.average.module

    def state(self) -> dict[str, Any]:
        """Return the fields of a Checkpoint that `load` takes, and `evaluated`."""
        return {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "evaluated": self.evaluated.state_dict(),
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint."""
        self.network.load_state_dict(checkpoint.network)
        self.optimiser.load_state_dict(checkpoint.optimiser)
        if self.average is not None and checkpoint.average is not None:
            self.average.load_state_dict(checkpoint.average)
        if self.collectives.rank == 0:  # sums over all workers
            self.totals = checkpoint.totals.to(self.device)

    def _frozen_parts(self, epoch: int) -> int:
        """Return how many parts of the network, from the input, do not learn in `epoch`."""
        settings = self.config.optimiser
        if not self.fine_tune:
            return 0
        if epoch < settings.freeze_epochs:
            return len(self.network.parts)
        return settings.frozen_stages if self.config.start == IMAGENET else 0


def shares_norms(device: torch.device, workers: int, images: int) -> bool:
    """Return whether workers that compute `images` at a time normalise by the batch statistics of all of them."""
    return device.type == "cuda" and workers > 1 and images < _IMAGES_OF_NORMS  # torch has it for GPUs alone
