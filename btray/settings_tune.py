"""What can be set of the tune job: all settings of training, of which some are varied from trial to trial."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from btray.config import ComponentConfig
from btray.settings import BACKBONES, Positive, TrainConfig

Bounds = tuple[float, float]


class SpaceConfig(ComponentConfig):
    """What differs between trials. A choice of one value, or bounds that are equal, keep that setting fixed."""

    architecture: tuple[Literal["cnn", *BACKBONES], ...] = ("cnn",)  # type: ignore[valid-type]
    """Choices of --network.architecture; a backbone ignores the five settings of the family below."""
    width: tuple[Annotated[float, Field(gt=0, le=8)], ...] = (0.5, 0.75, 1.0, 1.5)
    """Choices of a factor on --network.stem-width and --network.widths; the result is rounded to eights."""
    depth: tuple[Annotated[int, Field(ge=0, le=8)], ...] = (0, 1)
    """Choices of blocks added to every stage of --network.depths."""
    kernel: tuple[Literal[3, 5, 7], ...] = (3, 5)
    """Choices of --network.kernel."""
    squeeze_excite: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.0, 0.25)
    """Choices of --network.squeeze-excite."""
    pooling: tuple[Literal["average", "max", "average_max"], ...] = ("average", "average_max")
    """Choices of --network.pooling."""
    dropout: Bounds = (0.1, 0.5)
    """Bounds of --network.dropout, LOW,HIGH."""
    learning_rate: Bounds = (5e-4, 1e-2)
    """Bounds of --optimiser.learning-rate, drawn evenly on a logarithmic scale."""
    weight_decay: Bounds = (5e-3, 0.2)
    """Bounds of --optimiser.weight-decay, drawn evenly on a logarithmic scale."""
    label_smoothing: Bounds = (0.0, 0.2)
    """Bounds of --optimiser.label-smoothing."""
    mixup: tuple[Annotated[float, Field(ge=0, le=4)], ...] = (0.0, 0.2)
    """Choices of --optimiser.mixup."""

    @field_validator("architecture", "width", "depth", "kernel", "squeeze_excite", "pooling", "mixup")
    @classmethod
    def _at_least_one(cls, value: tuple[object, ...]) -> tuple[object, ...]:
        if not value:
            raise ValueError("give at least one value")
        return tuple(dict.fromkeys(value))

    @field_validator("dropout", "label_smoothing", "learning_rate", "weight_decay")
    @classmethod
    def _in_order(cls, value: Bounds) -> Bounds:
        if not 0 <= value[0] <= value[1]:
            raise ValueError("give LOW,HIGH with 0 <= LOW <= HIGH")
        return value

    @model_validator(mode="after")
    def _within_what_training_takes(self) -> Self:
        for key in ("dropout", "label_smoothing"):
            if getattr(self, key)[1] >= 1:
                raise ValueError(f"space.{key} {getattr(self, key)} must end below 1")
        for key in ("learning_rate", "weight_decay"):
            if getattr(self, key)[0] <= 0:
                raise ValueError(f"space.{key} {getattr(self, key)} must begin above 0: its scale is logarithmic")
        return self


class TuneConfig(TrainConfig):
    """Search network and optimiser with Ray Tune; the best trial becomes the bundle.

    Takes all settings of training, which hold for every trial but for what --space varies. Trials are judged by their
    validation images; the labels of the test split are read once, at the end, for the trial that was chosen.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "tune"
    """Name of the search; the same name takes up a search that was cut off."""
    epochs: Positive = 12
    """Epochs of a trial that is not stopped before."""
    num_workers: str | None = "1"
    """Data-parallel workers of each trial, N or MIN:MAX (elastic)."""
    trials: Positive = 16
    """Trials, the first of which is the config as it is given, where that lies in the space."""
    concurrent: Positive | None = None
    """Trials at a time; default: as many as the cluster's CPUs hold workers, or its GPUs with --use-gpu. More are \
    asked only of a cluster that was joined: it may grow."""
    grace: Positive = 3
    """Epochs that every trial gets before it may be stopped."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """At each rung (GRACE, GRACE * REDUCTION, ... epochs) one of so many trials goes on (ASHA, arXiv:1810.05934)."""
    search: Literal["optuna", "random"] | None = None
    """How the next trial is chosen: by Optuna's tree-structured Parzen estimator (extra `tune`), or at random; \
    default: by Optuna where it is installed."""
    space: SpaceConfig = SpaceConfig()
    """What differs between trials."""

    @model_validator(mode="after")
    def _weights_fit_one_network(self) -> Self:
        space = self.space
        varied = [key for key in ("architecture", "width", "depth", "kernel", "squeeze_excite", "pooling")
                  if len(getattr(space, key)) > 1]  # fmt: skip
        if self.init_from and varied:
            raise ValueError(
                f"--init-from fits one network, and --space.{varied[0].replace('_', '-')} varies it: give one value"
            )
        return self
