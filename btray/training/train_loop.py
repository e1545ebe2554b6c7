"""What each training worker runs: epochs, steps, validation. All workers take the same decisions."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from btray.core import logs
from btray.core.metrics import lasting
from btray.data.preprocess import to_tensor
from btray.model.engines import supports_bf16
from btray.model.network import Network, build_network, load_matching
from btray.training import optimizer
from btray.training.augment import Augmenter
from btray.training.checkpoints import Checkpoint
from btray.training.collectives import Collectives
from btray.training.config import IMAGENET
from btray.training.feeds import NOTHING, Batch, MemoryFeed
from btray.training.history import INTERRUPTED, EpochRecord, best_record, finite_or_none, score_of
from btray.training.plan import Plan
from btray.training.preemption import InterruptionWatch
from btray.training.stream import StreamFeed
from btray.training.tracking import Tracker

_log = logging.getLogger(__name__)

# Running statistics of batch norms (momentum 0.1) and their moving average follow the weights with a lag of some ten
# steps each: in a run of a few steps the network learns and its validation score stays flat. Until this many steps
# were taken, they are measured anew before each validation, on so many batches.
_STEPS_OF_NORMS = 100
_BATCHES_OF_NORMS = 16


def train_loop(settings: dict[str, Any]) -> None:
    """Run a training in a worker of Ray Train; `settings` holds the `plan` and the `threads` that torch may use."""
    plan: Plan = settings["plan"]
    logs.begin_in_worker(plan.config.log_format, job="train", run_id=plan.config.name)
    # Ray limits OMP_NUM_THREADS to the CPUs that a worker reserves, which are fewer than its share of the machine.
    torch.set_num_threads(settings["threads"])
    with lasting():
        Trainer(plan).run()


class Trainer:
    """One worker of a training; its state is the same on all workers but for their share of the data."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.config, settings = plan, plan.config, plan.config.optimiser
        self.device = ray.train.torch.get_device()
        precision = plan.config.precision
        self.bf16 = precision == "bf16" or (precision == "auto" and supports_bf16(self.device))
        self.collectives = Collectives(self.device)
        self.augmenter = Augmenter(self.config.augment, self.config.seed)
        torch.manual_seed(self.config.seed)  # every worker begins with the same weights
        network = build_network(self.config.network, len(plan.classes))
        if plan.initial_weights:
            load_matching(network, plan.initial_weights)
        # Convolutions of oneDNN and cuDNN work in this layout, and would convert every layer's input to it.
        self.network: Network = network.to(self.device).to(memory_format=torch.channels_last)
        self.fine_tune = plan.initial_weights is not None
        self.optimiser = optimizer.make_optimiser(self.network, settings, fine_tune=self.fine_tune)
        self.average = optimizer.make_average(self.network, settings.ema) if settings.ema else None
        self.history: list[EpochRecord] = []
        self.steps = 0  # of the epoch that is running
        self.before = NOTHING  # samples of those before it was resumed, of all workers
        self.trained: list[Tensor] = []  # of those since, of this worker
        self.totals = torch.zeros(3, dtype=torch.float64)  # of those steps: loss, weight, images
        self.waited = 0.0  # seconds for batches of this epoch
        self.stopping = False
        self.frozen: int | None = None  # parts of the network that do not learn
        self._resume()
        self.feed = StreamFeed(plan) if plan.streaming else MemoryFeed(plan)
        self.watch = InterruptionWatch(plan.run_uri, self.collectives)

    def run(self) -> None:
        """Train until the last epoch, until macro-F1 has not risen for `patience` epochs, or until stopped.

        A loss that is not finite ends the run too: no later step mends the weights. A run that is stopped has written a
        checkpoint to resume from, in the middle of an epoch if need be.
        """
        tracker = Tracker(self.plan.run_uri, self.config) if self.collectives.rank == 0 else None
        while len(self.history) < self.config.epochs and not (self.stopping or self._is_over()):
            epoch, started = len(self.history), time.perf_counter()
            trained = self._train_epoch(epoch)
            if trained is None:
                break
            validated = self._validate(epoch)
            rejected = int(self.collectives.sum(torch.tensor(self.feed.rejected)).item())
            self.feed.rejected = 0
            seconds = time.perf_counter() - started
            record = EpochRecord(epoch=epoch + 1, **trained, **validated, rejected=rejected, seconds=seconds)
            self.history.append(record)
            self._report(asdict(record), f"epoch_{record.epoch:05d}")
            if tracker:
                tracker.epoch_ended(self.history)
        if tracker:  # not if an error ended the run: a resumed one continues it in MLflow
            tracker.close()

    def _train_epoch(self, epoch: int) -> dict[str, Any] | None:
        """Train the rest of an epoch (from 0) and return its fields of EpochRecord; None if the run was interrupted."""
        # Dropout draws from torch's generator: a resumed run shall draw as an undisturbed one does. In the middle of
        # an epoch that is not possible, but the draws then differ from those at its beginning.
        seed = (self.config.seed * 1_000_003 + epoch) * 4096 + self.collectives.rank
        torch.manual_seed(hash((seed, self.steps)) % 2**63 if self.steps else seed)
        self.network.train()
        # After train(), which puts all batch norms into training mode, and before the first step: a head of random
        # weights would push large gradients through pretrained layers.
        frozen = self._frozen_parts(epoch)
        optimizer.freeze(self.network, frozen)
        if frozen != self.frozen:  # DDP fixes early which gradients it reduces: wrap again
            self.frozen = frozen
            self.parallel = ray.train.torch.prepare_model(self.network, move_to_device=False)
        resumed = self.totals.clone()
        started = time.perf_counter()
        rate, self.waited = 0.0, 0.0
        # All but the steps that were taken before the run was interrupted; as many for each worker.
        for index, batch in enumerate(self._timed(self.feed.train(epoch, self.before)), self.steps):
            step = epoch * self.plan.steps_per_epoch + index
            rate = optimizer.learning_rate(step, self.config.epochs * self.plan.steps_per_epoch, self.config.optimiser)
            optimizer.set_learning_rate(self.optimiser, rate)
            self.totals += self._step(batch, epoch, index)
            self.trained.append(batch.samples)
            self.steps = index + 1
            if self._interrupted(epoch):
                return None
        seconds = time.perf_counter() - started
        loss, weight, _ = self.collectives.sum(self.totals).tolist()
        images = self.collectives.sum(self.totals - resumed)[2].item()
        self.steps, self.totals = 0, torch.zeros_like(self.totals)
        self.before, self.trained = NOTHING, []
        return {
            "train_loss": finite_or_none(loss / max(weight, 1e-12)),
            "learning_rate": rate,
            "images": int(images),
            "images_per_second": images / seconds,
            "feed_ratio": 1 - self.waited / seconds,
        }

    def _frozen_parts(self, epoch: int) -> int:
        """Return how many parts of the network, from the input, do not learn in `epoch`."""
        settings = self.config.optimiser
        if not self.fine_tune:
            return 0
        if epoch < settings.freeze_epochs:
            return len(self.network.parts)
        return settings.frozen_stages if self.config.start == IMAGENET else 0

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield batches and add the time that this worker waits for them to `waited`."""
        started = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - started
            yield batch
            started = time.perf_counter()

    def _interrupted(self, epoch: int) -> bool:
        """Look for a notice after a step, write a checkpoint if there is one, and return whether the epoch ends here.

        A machine that is about to go ends nothing: Ray Train starts the worker again elsewhere, from that checkpoint.
        """
        notice = self.watch.after_step()
        self.stopping = self.stopping or notice == "stop"
        if self.steps >= self.plan.steps_per_epoch:  # the epoch's own checkpoint follows
            return False
        if notice:
            # The sums over all workers are kept by rank 0 alone, so that they count once however many resume.
            self.totals = self.collectives.sum(self.totals) * (self.collectives.rank == 0)
            (since,) = self.collectives.gather(torch.cat([NOTHING, *self.trained]))
            self.before, self.trained = torch.cat([self.before, since]), []
            # Waiting for the upload: afterwards the machine may go.
            metrics = {"epoch": epoch, "step": self.steps, "score": INTERRUPTED}
            self._report(metrics, f"epoch_{epoch:05d}_step_{self.steps:07d}", wait=True)
            if self.collectives.rank == 0:
                _log.warning("%s: wrote a checkpoint of epoch %d, step %d", notice, epoch + 1, self.steps)
        return self.stopping

    def _step(self, batch: Batch, epoch: int, index: int) -> Tensor:
        """Take one optimiser step and return this worker's sums of loss, weight and images, float64 [3]."""
        config = self.config.optimiser
        frames, labels = self._to_device(batch.frames), self._to_device(batch.labels)
        images = self.augmenter(frames, batch.samples, epoch) if self.config.augment.enabled else to_tensor(frames)
        targets = optimizer.soft_targets(labels, len(self.plan.classes), config)
        weights = self._to_device(batch.weights)
        if config.mixup:
            seed = (self.config.seed, epoch, index, self.collectives.rank)
            images, targets, weights = optimizer.mix_up(images, targets, weights, config.mixup, seed)
        loss = optimizer.weighted_losses(self._logits(self.parallel, images), targets, weights)
        # If it is known, asking would make every worker wait for the slowest twice per step. Mixup keeps the sum.
        whole_weight = batch.whole_weight or self.collectives.sum(weights.sum())
        self.optimiser.zero_grad()
        # DDP averages gradients over workers; each must count by the weight of its samples in the whole batch.
        (loss * (self.collectives.workers / whole_weight)).backward()
        if config.clip_norm:
            nn.utils.clip_grad_norm_(self.network.parameters(), config.clip_norm)
        self.optimiser.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        return torch.tensor([loss.item(), weights.sum().item(), len(labels)], dtype=torch.float64)

    @torch.no_grad()
    def _validate(self, epoch: int) -> dict[str, Any]:
        """Measure the network on the validation images and return its fields of EpochRecord."""
        network = self.evaluated
        taken = (epoch + 1) * self.plan.steps_per_epoch
        if taken < _STEPS_OF_NORMS and not (self.fine_tune or self.plan.streaming):
            # Batch statistics still lean on their start, 0 and 1, and so would every answer.
            batches = islice(self.feed.train(epoch), _BATCHES_OF_NORMS)
            update_bn((to_tensor(self._to_device(batch.frames)) for batch in batches), network)
        self.collectives.share_buffers(network)
        if len(self.plan.validation) == 0:  # a refit: the last epoch is the one to keep
            return {"val_loss": None, "val_macro_f1": None, "val_accuracy": None, "score": float(epoch)}
        network.eval()
        # Begun with empty tensors: with more workers than validation images some have none, but all must gather.
        logits, labels = [torch.zeros(0, len(self.plan.classes))], [torch.zeros(0, dtype=torch.int64)]
        for batch in self.feed.validation():
            logits.append(self._logits(network, to_tensor(self._to_device(batch.frames))).float().cpu())
            labels.append(batch.labels)
        all_logits, truth = self.collectives.gather(torch.cat(logits), torch.cat(labels))
        predicted, present = all_logits.argmax(1).numpy(), np.unique(truth.numpy())
        loss = F.cross_entropy(all_logits, truth).item()
        macro_f1 = float(f1_score(truth, predicted, labels=present, average="macro", zero_division=0.0))
        return {
            "val_loss": finite_or_none(loss),
            "val_macro_f1": macro_f1,
            "val_accuracy": float(accuracy_score(truth, predicted)),
            "score": score_of(macro_f1, loss),
        }

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated and kept: the averaged one, if there is one."""
        return self.network if self.average is None else self.average.module

    def _logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """Apply `network` to images [n, 1, size, size]; the range of bf16 needs no loss scaling."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits: Tensor = network(images.contiguous(memory_format=torch.channels_last))
        return logits

    def _report(self, metrics: dict[str, Any], name: str, *, wait: bool = False) -> None:
        """Report to Ray Train, from all workers; rank 0 writes the checkpoint that is kept as `name`.

        The upload runs while training continues, unless `wait`.
        """
        checkpoint = None
        if self.collectives.rank == 0:
            folder = tempfile.mkdtemp(prefix="btray-checkpoint-")  # deleted by Ray after the upload
            Checkpoint(
                network=self.network.state_dict(),
                optimiser=self.optimiser.state_dict(),
                average=self.average.state_dict() if self.average is not None else None,
                evaluated=self.evaluated.state_dict(),
                history=self.history,
                steps=self.steps,
                trained=self.before,
                totals=self.totals,
            ).save(folder)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        upload = ray.train.CheckpointUploadMode.SYNC if wait else ray.train.CheckpointUploadMode.ASYNC
        ray.train.report(
            metrics,
            checkpoint,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=upload,
            delete_local_checkpoint_after_upload=True,
        )

    def _resume(self) -> None:
        """Continue from the latest checkpoint of the run, if it has one."""
        latest = ray.train.get_checkpoint()
        if latest is None:
            return
        checkpoint = Checkpoint.load(latest)
        self.network.load_state_dict(checkpoint.network)
        self.optimiser.load_state_dict(checkpoint.optimiser)
        if self.average is not None and checkpoint.average is not None:
            self.average.load_state_dict(checkpoint.average)
        self.history, self.steps, self.before = checkpoint.history, checkpoint.steps, checkpoint.trained
        if self.collectives.rank == 0:  # sums over all workers
            self.totals = checkpoint.totals

    def _is_over(self) -> bool:
        """Return whether training ends before its last epoch: it diverged, or no epoch was better for `patience`."""
        if not self.history:
            return False
        latest = self.history[-1]
        if latest.train_loss is None:
            _log.warning("training diverged in epoch %d: it ends here, and the best epoch is kept", latest.epoch)
            return True
        return 0 < self.config.patience <= latest.epoch - best_record(self.history).epoch

    def _to_device(self, tensor: Tensor) -> Tensor:
        """Copy to the worker's device; from pinned memory the copy overlaps with work on the GPU."""
        return tensor if self.device.type != "cuda" else tensor.pin_memory().to(self.device, non_blocking=True)
