"""What each training worker runs: epochs, validation, checkpoints. All workers take the same decisions."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from btray.core import logs
from btray.core import metrics as telemetry
from btray.data.preprocess import to_tensor
from btray.model.network import Network, build_network, load_matching
from btray.training.augment import Augmenter
from btray.training.feeds import Batch, Feed, MemoryFeed, Plan, StreamFeed
from btray.training.optimizer import (
    class_weights,
    freeze_body,
    learning_rate,
    make_average,
    make_optimiser,
    mix_up,
    set_learning_rate,
    soft_targets,
    weighted_losses,
)
from btray.training.preemption import Notice, Watch
from btray.training.tracking import Record, Tracker, finite

_log = logging.getLogger(__name__)

STATE = "state.pt"
# Validation losses break ties between equal macro-F1 scores, which are common on small sets; they never outweigh one.
_TIE_BREAK = 1e-4
DIVERGED = -1.0
"""Score of an epoch whose loss is not finite, below that of every other; NaN, as a score, would pass for any."""
_BROKEN_OFF = -2.0


def train_loop(settings: dict[str, Any]) -> None:
    """The function that Ray Train runs in every worker; `settings` holds the `Plan`."""
    plan: Plan = settings["plan"]
    logs.begin_in_worker(plan.config.log_format, job="train", run_id=plan.config.name)
    torch.set_num_threads(settings["threads"])
    with telemetry.lasting():
        Trainer(plan).run()


def load_state(folder: str) -> dict[str, Any]:
    """Read a checkpoint folder on the CPU, without unpickling anything but tensors and plain values."""
    state: dict[str, Any] = torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True)
    return state


def score_of(macro_f1: float, loss: float) -> float:
    """What makes an epoch the best one: validation macro-F1, then a lower validation loss; both finite."""
    if not math.isfinite(loss):
        return DIVERGED
    return macro_f1 - _TIE_BREAK * min(loss, 10.0)


class Trainer:
    """The state of one worker: the same on all workers but for their share of the data."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.config = plan.config
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.augmenter = Augmenter(self.config.augment, self.config.seed)
        self.weights = class_weights(plan.class_counts(), self.config.optimiser).to(self.device)
        torch.manual_seed(self.config.seed)
        network = build_network(self.config.network, len(plan.classes))
        if plan.initial_weights:
            load_matching(network, plan.initial_weights)
        self.network: Network = network.to(self.device).to(memory_format=torch.channels_last)
        self.optimiser = make_optimiser(self.network, self.config.optimiser, fine_tune=plan.initial_weights is not None)
        decay = self.config.optimiser.ema
        self.average: AveragedModel | None = make_average(self.network, decay) if decay else None
        self.history: list[Record] = []
        self.steps = 0
        self.totals = torch.zeros(3, dtype=torch.float64)  # of the steps of this epoch: loss, weight, images
        self.stopping = False
        self._restore()
        self.frozen = self._is_frozen(len(self.history))
        self.parallel = self._parallel()
        self.feed: Feed = StreamFeed(plan) if plan.streaming else MemoryFeed(plan)
        self.watch = Watch(plan.run_uri, self.rank, self._summed)

    def run(self) -> None:
        """Train until the last epoch, until validation macro-F1 has not risen for `patience` epochs, or until stopped.

        A loss that is not finite ends the run too: no later step mends the weights. A run that is stopped has written a
        checkpoint from which it goes on, in the midst of an epoch if need be.
        """
        tracker = Tracker(self.plan.run_uri, self.config) if self.rank == 0 else None
        while len(self.history) < self.config.epochs and not (self.stopping or self._is_over()):
            epoch = len(self.history)
            if self.frozen != self._is_frozen(epoch):
                self.frozen = not self.frozen
                self.parallel = self._parallel()
            started = time.perf_counter()
            trained = self._train_epoch(epoch)
            if trained is None:
                break
            record: Record = {"epoch": epoch + 1, **finite(trained | self._validate(epoch))}
            record["rejected"] = self._rejected_since()
            record["seconds"] = time.perf_counter() - started
            self.history.append(record)
            self._report(record, f"epoch_{record['epoch']:05d}", ray.train.CheckpointUploadMode.ASYNC)
            if tracker:
                tracker.epoch_ended(self.history)
        if tracker:
            tracker.close()

    def _train_epoch(self, epoch: int) -> Record | None:
        """What is known of the epoch's training; None where it was broken off, with a checkpoint."""
        self._seed(epoch)
        self.network.train()
        if self.frozen:
            freeze_body(self.network, True)
        before = self.totals.clone()
        started = time.perf_counter()
        rate = waited = 0.0
        asked = started
        for index, batch in enumerate(self._in_step(self.feed.train(epoch))):
            waited += time.perf_counter() - asked
            asked = time.perf_counter()
            if index < self.steps:  # done before the run was broken off
                continue
            step = epoch * self.plan.steps_per_epoch + index
            rate = learning_rate(step, self.config.epochs * self.plan.steps_per_epoch, self.config.optimiser)
            set_learning_rate(self.optimiser, rate)
            self.totals += self._step(batch, epoch, index)
            self.steps = index + 1
            notice = self.watch.after_step()
            if notice and self.steps < self.plan.steps_per_epoch:
                self._break_off(notice)
            self.stopping = self.stopping or notice == "stop"
            if self.stopping and self.steps < self.plan.steps_per_epoch:
                return None
            asked = time.perf_counter()
        seconds = time.perf_counter() - started
        loss, weight, _ = self._summed(self.totals).tolist()
        fresh = self._summed(self.totals - before)[2].item()
        self.steps, self.totals = 0, torch.zeros_like(self.totals)
        return {
            "train_loss": loss / max(weight, 1e-12),
            "learning_rate": rate,
            "images": int(fresh),
            "images_per_second": fresh / seconds,
            "feed_ratio": 1 - waited / seconds,
        }

    def _seed(self, epoch: int) -> None:
        """Dropout draws from torch's generator: seeded here, a resumed run draws what an undisturbed one would.

        In the midst of an epoch that cannot be had, but the draws are others than those at its beginning.
        """
        seed = (self.config.seed * 1_000_003 + epoch) * 4096 + self.rank
        torch.manual_seed(hash((seed, self.steps)) % 2**63 if self.steps else seed)

    def _break_off(self, notice: Notice) -> None:
        """Write a checkpoint in the midst of an epoch. It counts as worse than any epoch's, and as the latest."""
        self.totals = self._summed(self.totals) * (self.rank == 0)
        epoch = len(self.history)
        record = {"epoch": epoch, "step": self.steps, "score": _BROKEN_OFF}
        self._report(record, f"epoch_{epoch:05d}_step_{self.steps:07d}", ray.train.CheckpointUploadMode.SYNC)
        if self.rank == 0:
            _log.warning("%s: checkpoint of epoch %d, step %d written", notice, epoch + 1, self.steps)

    def _in_step(self, batches: Any) -> Any:
        """Batches for as long as every worker has one: a step that only some take would wait for ever."""
        if not self.plan.streaming or self.workers == 1:
            yield from batches
            return
        while True:
            batch = next(batches, None)
            if self._summed(torch.tensor(float(batch is not None))).item() < self.workers:
                return
            yield batch

    def _step(self, batch: Batch, epoch: int, index: int) -> Tensor:
        """One optimiser step; returns this worker's sums of loss, weight and images."""
        config = self.config.optimiser
        frames, labels = self._to_device(batch.frames), self._to_device(batch.labels)
        augment = self.config.augment.enabled
        images = self.augmenter(frames, batch.samples, epoch) if augment else to_tensor(frames)
        targets, weights = soft_targets(labels, len(self.plan.classes), config), self.weights[labels]
        if config.mixup:
            seed = (self.config.seed, epoch, index, self.rank)
            images, targets, weights = mix_up(images, targets, weights, config.mixup, seed)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.parallel(images)
        loss = weighted_losses(logits, targets, weights)
        # DDP averages gradients over workers; each must count by the weight of its samples in the whole batch.
        whole_weight = self._whole_weight(batch, weights)
        self.optimiser.zero_grad(set_to_none=True)
        (loss * (self.workers / whole_weight)).backward()
        if config.clip_norm:
            nn.utils.clip_grad_norm_(self.network.parameters(), config.clip_norm)
        self.optimiser.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        return torch.tensor([loss.item(), weights.sum().item(), len(labels)], dtype=torch.float64)

    def _whole_weight(self, batch: Batch, weights: Tensor) -> Tensor:
        """The weights of a step's samples over all workers; computed here where their labels are known.

        Asking the others would make every worker wait for the slowest twice a step. Mixup keeps the sum.
        """
        if batch.whole_labels is None:
            return self._summed(weights.sum())
        return self.weights[self._to_device(batch.whole_labels)].sum()

    @torch.no_grad()
    def _validate(self, epoch: int) -> Record:
        if len(self.plan.validation) == 0:  # a refit: nothing is held out, and the last epoch is the one to keep
            self.evaluated()
            return {"val_loss": None, "val_macro_f1": None, "val_accuracy": None, "score": float(epoch)}
        network = self.evaluated()
        network.eval()
        logits, labels = [torch.zeros(0, len(self.plan.classes))], [torch.zeros(0, dtype=torch.int64)]
        for batch in self.feed.validation():
            images = to_tensor(self._to_device(batch.frames)).contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                logits.append(network(images).float().cpu())
            labels.append(batch.labels)
        return self._scores(*self._gathered(torch.cat(logits), torch.cat(labels)))

    def _scores(self, logits: Tensor, labels: Tensor) -> Record:
        loss = F.cross_entropy(logits, labels).item()
        answers = logits.argmax(1).numpy()
        present = np.unique(labels.numpy())
        macro_f1 = float(f1_score(labels, answers, labels=present, average="macro", zero_division=0.0))
        return {
            "val_loss": loss,
            "val_macro_f1": macro_f1,
            "val_accuracy": float(accuracy_score(labels, answers)),
            "score": score_of(macro_f1, loss),
        }

    def evaluated(self) -> nn.Module:
        """The network that is validated and kept: the averaged one, where there is one."""
        network = self.network if self.average is None else self.average.module
        if self.workers > 1:
            for buffer in network.buffers():  # batch statistics differ between workers; rank 0's are kept
                dist.broadcast(buffer, 0)
        return network

    def _report(self, record: Record, name: str, upload: ray.train.CheckpointUploadMode) -> None:
        checkpoint = None
        if self.rank == 0:
            folder = tempfile.mkdtemp(prefix="btray-checkpoint-")
            torch.save(self._state(), Path(folder) / STATE)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(
            record,
            checkpoint,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=upload,
            delete_local_checkpoint_after_upload=True,
        )

    def _state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "evaluated": (self.average.module if self.average is not None else self.network).state_dict(),
            "history": self.history,
            "steps": self.steps,
            "totals": self.totals,
        }

    def _restore(self) -> None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            state = load_state(folder)
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.history = state["history"]
        self.steps = state.get("steps", 0)  # checkpoints of before had none
        if self.rank == 0 and self.steps:
            self.totals = state["totals"]

    def _is_over(self) -> bool:
        if not self.history:
            return False
        if self.history[-1]["train_loss"] is None:
            _log.warning("training diverged in epoch %d: it ends here, and a better epoch is kept", len(self.history))
            return True
        if not self.config.patience:
            return False
        best = max(self.history, key=lambda record: record["score"])
        return self.history[-1]["epoch"] - best["epoch"] >= self.config.patience

    def _is_frozen(self, epoch: int) -> bool:
        return self.plan.initial_weights is not None and epoch < self.config.optimiser.freeze_epochs

    def _parallel(self) -> nn.Module:
        """The network as DDP sees it; made anew when the frozen phase ends, as DDP fixes what it reduces."""
        freeze_body(self.network, self.frozen)
        return ray.train.torch.prepare_model(self.network, move_to_device=False)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _summed(self, tensor: Tensor) -> Tensor:
        """The sum over all workers."""
        if self.workers == 1:
            return tensor
        total = tensor.to(self.device, copy=True)  # it is summed in place
        dist.all_reduce(total)
        return total.to(tensor.device)

    def _rejected_since(self) -> int:
        """Scans that could not be read in this epoch, over all workers."""
        rejected = self._summed(torch.tensor(self.feed.rejected))
        self.feed.rejected = 0
        return int(rejected.item())

    def _gathered(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels of all workers, the same everywhere."""
        if self.workers == 1:
            return logits, labels
        parts: list[Any] = [None] * self.workers
        dist.all_gather_object(parts, (logits, labels))
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
