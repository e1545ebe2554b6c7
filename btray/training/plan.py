"""The plan of a run: everything that a worker must know, the same for all workers and after every restart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from btray import storage
from btray.data.frames import FRAMES_PER_SCAN
from btray.training.config import BATCH, TrainConfig
from btray.training.optimizer import sample_weights

Indices = npt.NDArray[np.int64]

# Peak learning rate of the refit, as a share of the first one: high enough to learn the images that are new to it.
_REFIT_RATE = 0.3


def run_folder(config: TrainConfig) -> str:
    """Return the URI of the run's folder."""
    return storage.join(config.storage_uri, config.name)


@dataclass(frozen=True)
class Plan:
    """Which samples a run trains on and validates with, and how.

    A sample is one frame; its number is the row of its scan in the source times FRAMES_PER_SCAN plus its place there.
    """

    config: TrainConfig
    classes: tuple[str, ...]
    run_uri: str
    """Folder of the run: checkpoints, history, TensorBoard events."""
    samples: Indices
    """Numbers of all samples that are used, ascending."""
    labels: Indices
    """Their classes, as positions in `classes`; -1 for outliers, which are none."""
    sources: Indices
    """Numbers of the data sets they come from; all 0 if the source names none."""
    train: Indices
    """Positions in `samples` that are trained on."""
    validation: Indices
    """Positions in `samples` that are held out, without outliers; none in a refit."""
    streaming: bool
    """Whether the frames exceed memory and are decoded again every epoch."""
    held_outliers: Indices = field(default_factory=lambda: np.zeros(0, np.int64))
    """Positions in `samples` of outliers that are held out."""
    initial_weights: dict[str, Tensor] | None = None
    """Tensors to start from, by name."""

    def for_workers(self, workers: int) -> Plan:
        """Return the plan as so many workers carry it out: its batch and its learning rate may depend on their number.

        A batch of so many images per worker has a learning rate in proportion to its size (Goyal et al. 2017,
        arXiv:1706.02677); the configured one is that of a batch of BATCH.
        """
        config = self.config
        if config.images_per_worker is None:
            return self
        size = min(config.images_per_worker * config.accumulate * workers, len(self.train))
        rate = config.optimiser.learning_rate * size / BATCH
        optimiser = config.optimiser.model_copy(update={"learning_rate": rate})
        return replace(self, config=config.model_copy(update={"batch_size": size, "optimiser": optimiser}))

    @property
    def batch_size(self) -> int:
        """Samples per step over all workers: the configured number unless there are fewer."""
        return min(self.config.batch_size or BATCH, len(self.train))

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches per epoch; which samples are left over changes from epoch to epoch."""
        return self.steps_left(0)

    def steps_left(self, trained: int) -> int:
        """Return how many steps are left of an epoch of which so many samples were trained on."""
        return max(0, len(self.train) - trained) // self.batch_size

    def class_counts(self) -> list[int]:
        """Count the training samples of each class; outliers count nowhere."""
        return np.bincount(self.labels[self.train] + 1, minlength=len(self.classes) + 1)[1:].tolist()

    def label_names(self, positions: Indices) -> list[str]:
        """Return the labels of samples, as the source names them."""
        names = (*self.classes, self.config.outliers or "")
        return [names[label] for label in self.labels[positions]]

    def rows(self, positions: Indices) -> Indices:
        """Return the rows of the source that samples belong to, ascending, each once."""
        return np.unique(self.samples[positions] // FRAMES_PER_SCAN)

    def labels_of_rows(self, rows: Indices) -> Indices:
        """Return the labels of rows that are trained on or validated with."""
        # All frames of a scan are used, or none: the first sample from a used row's number on is the row's own.
        return self.labels[np.searchsorted(self.samples, rows * FRAMES_PER_SCAN)]

    def weights(self) -> npt.NDArray[np.float32]:
        """Return the weight of every sample in training, [samples]; 0 for those that are not trained on."""
        weights = np.zeros(len(self.samples), np.float32)
        weights[self.train] = sample_weights(self.labels[self.train], self.sources[self.train], self.config.optimiser)
        return weights

    def loss_weights(self) -> npt.NDArray[np.float32]:
        """Return the weight of every sample in the loss, [samples]: 1 if `class_balance` is not "weights"."""
        weighted = self.config.optimiser.class_balance == "weights"
        return self.weights() if weighted else np.ones(len(self.samples), np.float32)

    def epoch_order(self, epoch: int) -> Indices:
        """Shuffle the training positions by seed and epoch alone, so that every worker and restart agrees.

        With `class_balance` "sampling" they are drawn with replacement, as often as they weigh.
        """
        generator = np.random.default_rng([self.config.seed, epoch])
        if self.config.optimiser.class_balance != "sampling":
            return generator.permutation(self.train)
        chance = self.weights()[self.train].astype(np.float64)
        return generator.choice(self.train, len(self.train), p=chance / chance.sum())

    def hold_out(self, held: npt.NDArray[np.bool_], number: int, twins: npt.NDArray[np.bool_]) -> Plan:
        """Plan the round that trains without the samples `held`, bool [samples]; the run has its `number` in its name.

        Nor is anything learnt from `twins`, which look like some of them: they are not used. Of classes that the rest
        does not have nothing can be learnt: their samples are not validated with.
        """
        name, learnt = f"{self.config.name}.round-{number}", ~(held | twins)
        known = np.isin(self.labels, self.labels[learnt & (self.labels >= 0)])
        return self._renamed(
            {"name": name},
            train=np.flatnonzero(learnt),
            validation=np.flatnonzero(held & known),
            held_outliers=np.flatnonzero(held & (self.labels < 0)),
        )

    def on_everything(self, epochs: int) -> Plan:
        """Plan a run of so many epochs on all samples, from the start."""
        # Named after its length: with another one, the learning rate would have had another course.
        changes = {"name": f"{self.config.name}.final-{epochs}", "epochs": epochs, "patience": 0}
        return self._renamed(changes)

    def refit(self, weights: dict[str, Tensor], epochs_before: int, *, without_held: bool = False) -> Plan:
        """Plan the last epochs: from `weights`, on all samples, at a lower rate and without augmentation but flips.

        `without_held` leaves out what this plan holds out, for it to be tested with.

        Strong augmentation teaches the network images that nobody will show it; ending on clean ones closes that gap
        (He et al. 2019, Data Augmentation Revisited, arXiv:1909.09148).
        """
        config = self.config
        # Named after both lengths: if the first run is continued, or the refit is to be longer, that is another refit.
        name = f"{config.name}.refit-{epochs_before}-{config.refit_epochs}"
        rate = config.optimiser.learning_rate * _REFIT_RATE
        optimiser = config.optimiser.model_copy(update={"learning_rate": rate, "freeze_epochs": 0, "layer_decay": 1.0})
        changes = {"name": name, "epochs": config.refit_epochs, "patience": 0, "optimiser": optimiser}
        fields: dict[str, Any] = {"initial_weights": weights} | ({"train": self.train} if without_held else {})
        return self._renamed(changes | {"augment": config.augment.only_flips()}, **fields)

    def _renamed(self, changes: Mapping[str, Any], **fields: Any) -> Plan:
        """Return the plan of another run: on all samples, but for what `fields` say."""
        changed = self.config.model_copy(update=dict(changes))
        nothing = np.zeros(0, np.int64)
        everything = {"train": np.arange(len(self.samples)), "validation": nothing, "held_outliers": nothing}
        return replace(self, config=changed, run_uri=run_folder(changed), **{**everything, **fields})
