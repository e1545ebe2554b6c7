"""The settings of the train and tune jobs. No heavy import: `--help` must be quick."""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_serializer, field_validator, model_validator

from btray.core.config import ComponentConfig, JobConfig, Positive, Probability, Share
from btray.core.errors import UserError
from btray.core.uris import TrackingUri, Uri, resolved
from btray.data.config import PreprocessConfig
from btray.data.labels import Label
from btray.model.config import ARCHITECTURES, MANIFEST, NetworkConfig

LOGARITHMIC = ("learning_rate", "weight_decay")
"""Settings of a search that are drawn evenly on a logarithmic scale."""
BATCH = 64
"""Images per step, if neither --batch-size nor --images-per-worker is given."""
IMAGENET, RANDOM = "imagenet", "random"
"""Values of --init-from that are no URI."""
BOUNDED = ("dropout", "label_smoothing", *LOGARITHMIC)
"""Settings of a search of which the bounds are given; of the others, the choices."""


class AugmentConfig(ComponentConfig):
    """The random transform of training. Each strength is the end of a range around "no change"; 0 switches it off."""

    enabled: bool = True
    """If off, training sees the frames as they are."""
    flip_horizontal: Probability = 0.5
    """Probability of a left-right mirror image."""
    flip_vertical: Probability = 0.0
    """Probability of a top-bottom mirror image."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 20.0
    """Largest rotation, in degrees."""
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Largest change of size, as a share."""
    shear: Annotated[float, Field(ge=0, le=45)] = 6.0
    """Largest shear, in degrees."""
    translation: Annotated[float, Field(ge=0, le=0.5)] = 0.08
    """Largest shift, as a share of the frame."""
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Largest change of contrast about the mean, as a share; what exceeds black or white is clipped."""
    gamma: Annotated[float, Field(ge=0, le=2)] = 0.4
    """Largest exponent of the gray curve: gamma lies within exp(-value) and exp(+value)."""
    tone: Share = 0.8
    """Largest weight of a random gray curve that keeps black at black, in half of the images: what is bright in one MRI
    sequence is dark in another (Zhou et al. 2019, arXiv:1908.06912)."""
    bias_field: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Largest smooth gain across the frame, as a share: the coil's uneven sensitivity."""
    noise: Annotated[float, Field(ge=0, le=1)] = 0.04
    """Largest standard deviation of added Gaussian noise; white is 1."""
    blur: Annotated[float, Field(ge=0, le=8)] = 0.8
    """Largest standard deviation of a Gaussian blur, in pixels."""
    erase: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Largest area replaced by the mean gray, as a share of the frame."""

    def only_flips(self) -> AugmentConfig:
        """Return the same with every strength switched off: images stay as they are, but for mirroring."""
        strengths = type(self).model_fields.keys() - {"enabled", "flip_horizontal", "flip_vertical"}
        return self.model_copy(update=dict.fromkeys(strengths, 0.0))


class OptimiserConfig(ComponentConfig):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with warm-up and a cosine schedule (arXiv:1608.03983)."""

    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-3
    """Peak learning rate."""
    final_learning_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Learning rate at the end, as a share of the peak."""
    warmup: Share = 0.1
    """Share of all steps in which the learning rate rises from zero to its peak (arXiv:1706.02677)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled weight decay; norms and biases are exempt."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0: no clipping."""
    label_smoothing: Share = 0.1
    """Share of each target that is spread over all classes (Szegedy et al. 2016, arXiv:1512.00567)."""
    class_balance: Literal["weights", "sampling", "none"] = "weights"
    """Whether images of rare classes and sources weigh more in the loss, are drawn more often, or neither."""
    class_power: Probability = 0.5
    """How far rare classes are lifted: 0, every image counts the same; 1, every class does."""
    source_power: Probability = 0.5
    """How far small sources are lifted within a class, likewise."""
    mixup: Annotated[float, Field(ge=0, le=4)] = 0.0
    """Parameter of mixup's beta distribution (Zhang et al. 2018, arXiv:1710.09412); 0: none."""
    ema: Share = 0.995
    """Decay per step of the moving average of the weights, which is evaluated instead of the weights; 0: none."""
    freeze_epochs: Annotated[int, Field(ge=0)] = 1
    """With pretrained weights: epochs in which only the last layer learns: its random start would spoil the others."""
    frozen_stages: Annotated[int, Field(ge=0)] = 3
    """With ImageNet's weights: stages from the input that never learn; their edges and textures serve as they are."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.7
    """With pretrained weights: factor on the learning rate from each stage to the one before it."""


class TrainConfig(JobConfig):
    """Train the network on Ray Train and write a model bundle."""

    record: ClassVar[str] = "config.yaml"
    """The file of the bundle that holds the settings it was made with."""
    may_change: ClassVar[frozenset[str]] = frozenset({
        "out", "storage", "epochs", "num_workers", "patience", "max_rejected", "max_failures", "mlflow",
        "abstain_below", "abstain_target", "conformal_error", "refit_epochs", "gpu_cache_gb", "checkpoint_minutes",
        "compile",
    })  # fmt: skip
    """Settings that may differ between two commands for one run: none changes an epoch that is already trained."""
    data: Uri
    """Class-per-folder tree or manifest (Parquet or CSV with uri,label[,split][,patient_id][,source]); local or s3://."""
    classes: tuple[str, ...] = ()
    """Class folders, or labels of a manifest, that are meant; all others are left out. Default: all."""
    outliers: Label | None = None
    """Label of images that show none of the classes: training learns to be unsure of them, and they are in no figure \
    but the share that is rejected."""
    leave_out: tuple[Literal["ct"], ...] = ()
    """Training and validation images to leave out: ct (what the audit calls looks_like_ct)."""
    out: Uri
    """Where the model bundle is written; local or s3://."""
    overwrite: bool = Field(default=False, exclude=True)
    """Replace the bundle at --out, and the run of this name, if they were made with other settings or data."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "train"
    """Name of the run; the same name resumes a run that was interrupted."""
    storage: Uri | None = None
    """Where runs keep checkpoints, history and TensorBoard events; default: OUT/_run."""
    epochs: Positive = 10
    """Passes over the training data."""
    batch_size: Positive | None = None
    """Images per step, over all workers together; default: 64."""
    images_per_worker: Positive | None = None
    """Images that a worker computes at a time, instead of --batch-size: a step then takes so many for each worker, \
    times --accumulate, and the learning rate is --optimiser.learning-rate for every 64 of them (arXiv:1706.02677)."""
    accumulate: Positive = 1
    """Parts in which a worker computes its share of a step, one after the other: a batch that does not fit into a \
    GPU at once."""
    num_workers: str | None = None
    """Data-parallel workers, N or MIN:MAX (elastic); default: one per GPU with --use-gpu, else per CPU, at most 4."""
    use_gpu: bool = False
    """One worker per GPU, NCCL."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """In what feature maps are computed; auto: bf16, bfloat16 by autocast, on GPUs and on CPUs with AVX512_BF16 or \
    AMX, else float32."""
    compile: bool = False
    """Compile the network with torch.compile: takes minutes at the start, and needs a C++ compiler on every node."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of every random source."""
    validate_by: Literal["patients", "sources", "folds"] = "patients"
    """Hold out a share of the patients (or of what stands for them) once; or train one network without each source or \
    fold, choose epochs and thresholds by their answers to what they have not seen, and then train on all images."""
    validation: Annotated[float, Field(gt=0, le=0.5)] = 0.15
    """With --validate-by patients: share of the training images held out, by group, for early stopping; unused if the \
    data have a val split."""
    folds: Annotated[int, Field(ge=2, le=20)] = 3
    """With --validate-by folds: number of folds, which no patient is cut by."""
    refit_epochs: Annotated[int, Field(ge=0)] = 4
    """Epochs in which the network then learns from unaltered images, with --validate-by patients from those held out \
    too; 0: none. Unused if the data have a val split."""
    patience: Annotated[int, Field(ge=0)] = 15
    """Epochs without a better validation macro-F1 before training stops; 0: never."""
    on_leak: Literal["warn", "drop", "fail"] = "warn"
    """What to do about images of the test or val split that are in the training data too: train as given and report \
    how many; leave them out of training; or stop with exit code 3."""
    abstain_below: Probability | None = None
    """Confidence below which the model abstains; stored in the bundle."""
    abstain_target: Probability | None = None
    """Accuracy to reach on the images that are answered: chooses --abstain-below on the validation images."""
    conformal_error: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Error rate of the label sets that each prediction then carries; default: no label sets."""
    max_rejected: Probability = 0.05
    """Share of unreadable images above which the job stops."""
    cache_gb: Annotated[float, Field(ge=0)] = 2.0
    """Decoded frames up to this size, in GB, stay in memory; larger data are streamed again every epoch."""
    gpu_cache_gb: Annotated[float, Field(ge=0)] = 2.0
    """Frames in memory up to this size, in GB, lie in the memory of each GPU."""
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Minutes after which a checkpoint is written within an epoch: what is lost at most when a worker dies or joins; \
    0: one per epoch."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Worker failures that the run survives; -1: any number."""
    init_from: Annotated[str, resolved(unless=f"({IMAGENET}|{RANDOM})$")] | None = None
    """Bundle or weights file (.safetensors, or a torch state dict) to start from, or `imagenet` or `random`; default: \
    imagenet for --network.architecture mobile_cnn, random for all others."""
    mlflow: TrackingUri | None = None
    """MLflow tracking URI to log to (extra `mlflow`); it is recorded without user and password."""
    preprocess: PreprocessConfig = PreprocessConfig()
    """Preprocessing."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation."""
    network: NetworkConfig = NetworkConfig()
    """Network."""
    optimiser: OptimiserConfig = OptimiserConfig()
    """Optimiser and loss."""

    @field_validator("num_workers", mode="before")
    @classmethod
    def _worker_range(cls, value: object) -> object:
        """Accept 2, "2" and "1:4"; `worker_range` below parses it."""
        if value is None:
            return None
        bounds = str(value).split(":")
        whole = len(bounds) <= 2 and all(part.isdigit() for part in bounds)
        if not whole or not 1 <= int(bounds[0]) <= int(bounds[-1]):
            raise ValueError("give N, or MIN:MAX with 1 <= MIN <= MAX")
        return str(value)

    @field_serializer("mlflow")
    def _without_password(self, value: str | None) -> str | None:
        """Remove the credentials: configs are kept in bundles and beside results, for whoever may read those."""
        return value and re.sub(r"(?<=://)[^/?#]*@", "", value)

    @model_validator(mode="after")
    def _one_batch(self) -> Self:
        if self.batch_size is not None and self.images_per_worker is not None:
            raise ValueError("give --batch-size or --images-per-worker, not both")
        return self

    @model_validator(mode="after")
    def _one_way_to_abstain(self) -> Self:
        if self.abstain_below is not None and self.abstain_target is not None:
            raise ValueError("give --abstain-below or --abstain-target, not both")
        return self

    def check(self) -> None:
        """Refuse data and weights that are not there, an --out that is taken, and what cannot be written to."""
        from btray import storage
        from btray.model.bundle_files import require_free

        storage.require_input(self.data, "--data")
        if self.start not in (None, IMAGENET):
            storage.require_input(self.start, "--init-from")
        if self.mlflow and find_spec("mlflow") is None:
            raise UserError("--mlflow needs the extra: pip install 'btray[mlflow]'")
        if self.compile and not (shutil.which("g++") or shutil.which("clang++")):
            raise UserError("--compile needs a C++ compiler; install g++ on every node, or leave it out")
        if not self.overwrite:
            settings = self.model_dump(mode="json", exclude={*self.may_change} - {"storage"})
            storage.require_own(self.out, settings, result=MANIFEST, record=self.record)
        require_free(self.out)
        storage.require_writable(self.out, "--out")
        if self.storage:
            storage.require_writable(self.storage, "--storage")

    @property
    def start(self) -> str | None:
        """Return what the weights start from: a URI, IMAGENET, or None for random ones."""
        if self.init_from is None:
            return IMAGENET if self.network.architecture == "mobile_cnn" else None
        return None if self.init_from == RANDOM else self.init_from

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """Return the least and the most workers, equal for a fixed number; None if the job chooses."""
        if self.num_workers is None:
            return None
        bounds = [int(part) for part in self.num_workers.split(":")]
        return bounds[0], bounds[-1]

    @property
    def storage_uri(self) -> str:
        """Return the folder of the runs."""
        return self.storage or self.out + "/_run"


class SpaceConfig(ComponentConfig):
    """What differs between trials. A setting with one choice, or with equal bounds, is fixed."""

    architecture: tuple[Literal[ARCHITECTURES], ...] = ("cnn",)  # type: ignore[valid-type]
    """Choices of --network.architecture; all but cnn ignore the five settings of its family below."""
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
    dropout: tuple[float, float] = (0.1, 0.5)
    """Bounds of --network.dropout, LOW,HIGH."""
    learning_rate: tuple[float, float] = (5e-4, 1e-2)
    """Bounds of --optimiser.learning-rate, drawn evenly on a logarithmic scale."""
    weight_decay: tuple[float, float] = (5e-3, 0.2)
    """Bounds of --optimiser.weight-decay, drawn evenly on a logarithmic scale."""
    label_smoothing: tuple[float, float] = (0.0, 0.2)
    """Bounds of --optimiser.label-smoothing."""
    mixup: tuple[Annotated[float, Field(ge=0, le=4)], ...] = (0.0, 0.2)
    """Choices of --optimiser.mixup."""

    @field_validator("*")
    @classmethod
    def _searchable(cls, values: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        if info.field_name not in BOUNDED:
            if not values:
                raise ValueError("give at least one value")
            return tuple(dict.fromkeys(values))
        if not 0 <= values[0] <= values[1]:
            raise ValueError("give LOW,HIGH with 0 <= LOW <= HIGH")
        if info.field_name in LOGARITHMIC and values[0] == 0:
            raise ValueError("the bounds must begin above 0: the scale is logarithmic")
        if info.field_name not in LOGARITHMIC and values[1] >= 1:
            raise ValueError("the bounds must end below 1")
        return values


class TuneConfig(TrainConfig):
    """Search network and optimiser with Ray Tune; the best trial becomes the bundle.

    Takes all settings of training, which hold for every trial except for what --space varies. Trials are judged on
    their validation images; the labels of the test split are read once, at the end, for the chosen trial.
    """

    record: ClassVar[str] = "tune.yaml"
    validate_by: Literal["patients"] = "patients"
    """Trials are compared on the same held-out patients."""
    # Unlike in a single run, epochs, workers and patience are fixed: trials that differ in them cannot be compared.
    may_change: ClassVar[frozenset[str]] = TrainConfig.may_change - {"epochs", "num_workers", "patience"} | {
        "concurrent"
    }
    network: NetworkConfig = NetworkConfig(architecture="cnn")
    """Network; what --space varies is varied from here."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "tune"
    """Name of the search; the same name resumes a search that was interrupted."""
    epochs: Positive = 12
    """Epochs of a trial that is not stopped early."""
    num_workers: str | None = "1"
    """Data-parallel workers of each trial, N or MIN:MAX (elastic)."""
    trials: Positive = 16
    """Trials, the first of which is the config as it is given, if that lies in the space."""
    concurrent: Positive | None = None
    """Trials at a time; default: as many as the cluster's CPUs hold workers, or its GPUs with --use-gpu. More \
    run only on a cluster that the job joined, as that may grow."""
    grace: Positive = 3
    """Epochs that every trial gets before it may be stopped."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """At each rung (GRACE, GRACE * REDUCTION, ... epochs) one of so many trials continues (ASHA, arXiv:1810.05934)."""
    search: Literal["optuna", "random"] | None = None
    """How the next trial is chosen: by Optuna's tree-structured Parzen estimator (extra `tune`), or at random; \
    default: by Optuna if it is installed."""
    space: SpaceConfig = SpaceConfig()
    """What differs between trials."""

    def check(self) -> None:
        """As training does; and refuse a search whose library is not installed."""
        if self.search == "optuna" and find_spec("optuna") is None:
            raise UserError("--search optuna needs the extra: pip install 'btray[tune]'; or give --search random")
        super().check()

    @property
    def start(self) -> str | None:
        """As in training, but ImageNet's weights only if all trials are of the architecture that they fit."""
        if self.init_from is None:
            return IMAGENET if self.space.architecture == ("mobile_cnn",) else None
        return super().start

    @model_validator(mode="after")
    def _weights_fit_one_network(self) -> Self:
        shape = ("architecture", "width", "depth", "kernel", "squeeze_excite", "pooling")
        varied = [name for name in shape if len(getattr(self.space, name)) > 1]
        if self.start and varied:
            raise ValueError(
                f"--init-from fits one network, and --space.{varied[0].replace('_', '-')} varies it: give one value"
            )
        return self
