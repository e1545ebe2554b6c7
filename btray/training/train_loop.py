"""What each training worker runs: epochs, steps, validation. All workers take the same decisions."""

from __future__ import annotations

import logging
import tempfile
import time
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from torch.optim.swa_utils import update_bn

from btray.core import logs
from btray.core.metrics import lasting
from btray.data.preprocess import to_tensor
from btray.training import optimizer
from btray.training.checkpoints import Checkpoint
from btray.training.collectives import Collectives
from btray.training.feeding.loader import NOTHING, BatchLoader
from btray.training.feeding.memory import MemoryFeed
from btray.training.feeding.stream import StreamFeed
from btray.training.history import INTERRUPTED, EpochRecord, best_record, finite_or_none, score_of
from btray.training.plan import Plan
from btray.training.preemption import InterruptionWatch
from btray.training.step import TrainingStep
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
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # batches are all of one size
    with lasting():
        Trainer(plan).run()


class Trainer:
    """One worker of a training; its state is the same on all workers but for their share of the data."""

    def __init__(self, plan: Plan) -> None:
        device = ray.train.torch.get_device()
        self.collectives = Collectives(device)
        self.plan = plan = plan.for_workers(self.collectives.workers)
        self.config = plan.config
        self.step = TrainingStep(plan, device, self.collectives)
        self.history: list[EpochRecord] = []
        # Of the epoch that is running: its steps, the samples that all workers have trained on up to the last
        # checkpoint, and those of this one since.
        self.steps, self.saved, self.samples = 0, NOTHING, list[Tensor]()
        self.stopping = False
        self._resume()
        self.feed = StreamFeed(plan) if plan.streaming else MemoryFeed(plan, self.collectives, device)
        self.loader = BatchLoader(device)
        self.watch = InterruptionWatch(plan.run_uri, self.collectives, self.config.checkpoint_minutes)

    def run(self) -> None:
        """Train until the last epoch, until macro-F1 has not risen for `patience` epochs, or until stopped.

        A loss that is not finite ends the run too: no later step mends the weights. A run that is stopped has written a
        checkpoint to resume from, in the middle of an epoch if need be.
        """
        tracker = Tracker(self.plan.run_uri, self.config) if self.collectives.rank == 0 else None
        if tracker and self.history:  # it may have died after the checkpoint of the last epoch, before this
            tracker.epoch_ended(self.history)
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
        self.step.begin(epoch)
        plan, resumed = self.plan, self.step.totals.clone()
        started, self.loader.waited, rate = time.perf_counter(), 0.0, 0.0
        left = plan.steps_left(len(self.saved))
        # By images and not by steps: their batch may have had another size.
        first = epoch * plan.steps_per_epoch + len(self.saved) / plan.batch_size
        with closing(self.loader(self.feed.train(epoch, self.saved))) as batches:
            for number, batch in enumerate(batches, start=1):
                rate = optimizer.learning_rate(
                    first + number - 1, self.config.epochs * plan.steps_per_epoch, self.config.optimiser
                )
                self.step(batch, epoch=epoch, index=self.steps, rate=rate)
                self.steps += 1
                self.samples.append(batch.samples)
                if self._interrupted(epoch, last=number == left):
                    return None
        loss, weight, _ = self.collectives.sum(self.step.totals).tolist()
        images = self.collectives.sum(self.step.totals - resumed)[2].item()
        seconds = time.perf_counter() - started  # now the device has done what it was given
        self.step.totals.zero_()
        self.steps, self.saved, self.samples = 0, NOTHING, []
        return {
            "train_loss": finite_or_none(loss / max(weight, 1e-12)),
            "learning_rate": rate,
            "images": int(images),
            "images_per_second": images / seconds,
            "feed_ratio": 1 - self.loader.waited / seconds,
        }

    def _interrupted(self, epoch: int, *, last: bool) -> bool:
        """Look for a notice after a step, write a checkpoint if there is one, and return whether the epoch ends here.

        Only a stop ends it. A machine that is about to go does not: Ray Train starts the worker again elsewhere, from
        that checkpoint.
        """
        notice = self.watch.after_step()
        self.stopping = self.stopping or notice == "stop"
        if last:  # the epoch's own checkpoint follows
            return False
        if notice:
            # The sums over all workers are kept by rank 0 alone, so that they count once however many resume.
            self.step.totals = self.collectives.sum(self.step.totals) * (self.collectives.rank == 0)
            self.saved = torch.cat([self.saved, *self.collectives.gather(torch.cat(self.samples))])
            self.samples.clear()
            # Waiting for the upload if the machine may go afterwards.
            metrics = {"epoch": epoch, "step": self.steps, "score": INTERRUPTED}
            self._report(metrics, f"epoch_{epoch:05d}_step_{self.steps:07d}", wait=notice != "due")
            if self.collectives.rank == 0 and notice != "due":
                _log.warning("%s: wrote a checkpoint of epoch %d, step %d", notice, epoch + 1, self.steps)
        return self.stopping

    @torch.no_grad()
    def _validate(self, epoch: int) -> dict[str, Any]:
        """Measure the network on the validation images and return its fields of EpochRecord."""
        network = self.step.evaluated
        taken = (epoch + 1) * self.plan.steps_per_epoch
        if taken < _STEPS_OF_NORMS and not (self.step.fine_tune or self.plan.streaming):
            # Batch statistics still lean on their start, 0 and 1, and so would every answer.
            with closing(self.loader(self.feed.train(epoch))) as batches:
                update_bn((to_tensor(batch.frames) for batch in islice(batches, _BATCHES_OF_NORMS)), network)
        self.collectives.share_buffers(network)
        if len(self.plan.validation) == 0:  # a refit: the last epoch is the one to keep
            return {"val_loss": None, "val_macro_f1": None, "val_accuracy": None, "score": float(epoch)}
        network.eval()
        # Begun with empty tensors: with more workers than validation images some have none, but all must gather.
        logits, labels = [self.step.totals.new_zeros(0, len(self.plan.classes)).float()], [self.step.totals[:0].long()]
        with closing(self.loader(self.feed.validation())) as batches:
            for batch in batches:
                logits.append(self.step.logits(network, to_tensor(batch.frames)).float())
                labels.append(batch.labels.clone())  # the loader fills its buffer anew
        all_logits, truth = self.collectives.gather(torch.cat(logits).cpu(), torch.cat(labels).cpu())
        predicted, present = all_logits.argmax(1).numpy(), np.unique(truth.numpy())
        loss = F.cross_entropy(all_logits, truth).item()
        macro_f1 = float(f1_score(truth, predicted, labels=present, average="macro", zero_division=0.0))
        return {
            "val_loss": finite_or_none(loss),
            "val_macro_f1": macro_f1,
            "val_accuracy": float(accuracy_score(truth, predicted)),
            "score": score_of(macro_f1, loss),
        }

    def _report(self, metrics: dict[str, Any], name: str, *, wait: bool = False) -> None:
        """Report to Ray Train, from all workers; rank 0 writes the checkpoint that is kept as `name`.

        The upload runs while training continues, unless `wait`.
        """
        checkpoint = None
        if self.collectives.rank == 0:
            folder = tempfile.mkdtemp(prefix="btray-checkpoint-")  # deleted by Ray after the upload
            Checkpoint(
                **self.step.state(),
                history=self.history,
                steps=self.steps,
                totals=self.step.totals.cpu(),
                trained=self.saved,
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
        self.watch.saved()

    def _resume(self) -> None:
        """Continue from the latest checkpoint of the run, if it has one."""
        latest = ray.train.get_checkpoint()
        if latest is None:
            return
        checkpoint = Checkpoint.load(latest)
        self.step.load(checkpoint)
        self.history, self.steps, self.saved = checkpoint.history, checkpoint.steps, checkpoint.trained
        if len(self.saved) == 0:  # an earlier version counted them: enough for frames in memory
            self.saved = torch.full((int(checkpoint.totals[2]),), -1)

    def _is_over(self) -> bool:
        """Return whether training ends before its last epoch: it diverged, or no epoch was better for `patience`."""
        if not self.history:
            return False
        latest = self.history[-1]
        if latest.train_loss is None:
            _log.warning("training diverged in epoch %d: it ends here, and the best epoch is kept", latest.epoch)
            return True
        return 0 < self.config.patience <= latest.epoch - best_record(self.history).epoch
