"""Everything that can be set, component by component, then job by job. No heavy import: `--help` must be quick."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_serializer, field_validator, model_validator
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from btray.config import ComponentConfig, JobConfig

Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]

BACKBONES = ("resnet18", "resnet50", "vgg16", "efficientnet_b0", "densenet121", "convnext_tiny")


class PreprocessConfig(ComponentConfig):
    """The deterministic transform that training, bulk classification and serving share; it travels in the bundle."""

    size: Annotated[int, Field(ge=32, le=1024)] = 160
    """Edge of the square frame that the network sees, in pixels."""
    crop: bool = True
    """Crop to the head before resizing."""
    margin: Annotated[float, Field(ge=0, le=0.5)] = 0.02
    """Room left around the head, as a share of its longer side."""
    low_percentile: Annotated[float, Field(ge=0, lt=50)] = 0.5
    """Gray level that becomes black, as a percentile of the head's pixels."""
    high_percentile: Annotated[float, Field(gt=50, le=100)] = 99.5
    """Gray level that becomes white, as a percentile of the head's pixels."""


class AugmentConfig(ComponentConfig):
    """The random transform of training. Each strength is the end of a range around "no change"; 0 switches it off."""

    enabled: bool = True
    """Off: training sees the frames as they are."""
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
    """Largest change of contrast about the mean, as a share; what passes black or white is cut off."""
    gamma: Annotated[float, Field(ge=0, le=2)] = 0.4
    """Largest exponent of the gray curve: gamma lies within exp(-value) and exp(+value)."""
    tone: Share = 0.8
    """Largest weight of a random gray curve with black at black, in half of the images: other sequences show other
    tissues bright (Zhou et al. 2019, arXiv:1908.06912)."""
    bias_field: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Largest smooth gain across the frame, as a share: the coil's uneven sensitivity."""
    noise: Annotated[float, Field(ge=0, le=1)] = 0.04
    """Largest standard deviation of added Gaussian noise; white is 1."""
    blur: Annotated[float, Field(ge=0, le=8)] = 0.8
    """Largest standard deviation of a Gaussian blur, in pixels."""
    erase: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Largest area replaced by the mean gray, as a share of the frame."""

    def only_flips(self) -> AugmentConfig:
        """The same with every strength switched off."""
        strengths = type(self).model_fields.keys() - {"enabled", "flip_horizontal", "flip_vertical"}
        return self.model_copy(update=dict.fromkeys(strengths, 0.0))


class NetworkConfig(ComponentConfig):
    """A custom 2D CNN, described wholly, or a torchvision backbone by name."""

    architecture: Literal["cnn", *BACKBONES] = "cnn"  # type: ignore[valid-type]
    """`cnn`: the family below; else a torchvision backbone, which uses only `dropout`."""
    stem_width: Positive = 24
    """Channels after the first convolution."""
    stem_stride: Literal[1, 2, 4] = 2
    """Stride of the first convolution."""
    widths: tuple[Positive, ...] = (32, 64, 96, 144)
    """Channels of each stage; every stage after the first halves the resolution."""
    depths: tuple[Positive, ...] = (1, 1, 2, 2)
    """Blocks in each stage."""
    kernel: Literal[3, 5, 7] = 3
    """Edge of the convolution kernels, in pixels."""
    first_stride: Literal[1, 2] = 2
    """Stride of the first stage."""
    norm: Literal["batch", "group", "none"] = "batch"
    """Normalisation after each convolution."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Non-linearity."""
    residual: bool = True
    """Add each block's input to its output (He et al. 2016, arXiv:1512.03385)."""
    squeeze_excite: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Width of the squeeze-and-excitation gate, a share of the channels (Hu et al. 2018, arXiv:1709.01507); 0: none."""
    pooling: Literal["average", "max", "average_max"] = "average_max"
    """How the last feature map becomes one vector."""
    dropout: Share = 0.3
    """Dropout before the last layer."""

    @model_validator(mode="after")
    def _one_depth_a_width(self) -> Self:
        if not self.widths or len(self.widths) != len(self.depths):
            raise ValueError(
                f"network.widths {self.widths} and network.depths {self.depths} must have as many entries, at least one"
            )
        return self


class OptimiserConfig(ComponentConfig):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with warm-up and a cosine schedule (arXiv:1608.03983)."""

    learning_rate: Annotated[float, Field(gt=0, le=10)] = 2e-3
    """Peak learning rate."""
    final_learning_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Learning rate at the end, as a share of the peak."""
    warmup: Share = 0.1
    """Share of all steps in which the learning rate rises from zero to its peak."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled weight decay; norms and biases are exempt."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0: no clipping."""
    label_smoothing: Share = 0.1
    """Share of each target that is spread over all classes (Szegedy et al. 2016, arXiv:1512.00567)."""
    class_balance: Literal["weights", "sampling", "none"] = "weights"
    """Rare classes weigh more in the loss, or are drawn more often, or neither."""
    mixup: Annotated[float, Field(ge=0, le=4)] = 0.0
    """Parameter of mixup's beta distribution (Zhang et al. 2018, arXiv:1710.09412); 0: none."""
    ema: Share = 0.995
    """Decay a step of the exponential moving average of the weights, which is what is evaluated; 0: none."""
    freeze_epochs: Annotated[int, Field(ge=0)] = 3
    """With --init-from: epochs in which only the last layer learns."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.7
    """With --init-from: factor on the learning rate from each stage to the one before it."""


class TrainConfig(JobConfig):
    """Train the network on Ray Train and write a model bundle."""

    data: str
    """Class-per-folder tree or manifest (Parquet or CSV with uri,label[,split][,patient_id]); local or s3://."""
    out: str
    """Where the model bundle is written; local or s3://."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "train"
    """Name of the run; the same name takes up a run that was cut off."""
    storage: str | None = None
    """Where runs keep checkpoints, history and TensorBoard events; default: OUT/_run."""
    epochs: Positive = 30
    """Passes over the training data."""
    batch_size: Positive = 64
    """Images a step, over all workers together."""
    num_workers: str | None = None
    """Data-parallel workers, N or MIN:MAX (elastic); default: one a GPU with --use-gpu, else one a CPU, at most 4."""
    use_gpu: bool = False
    """One worker a GPU, NCCL, bf16 autocast."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of every random source."""
    validation: Annotated[float, Field(gt=0, le=0.5)] = 0.15
    """Share of the training images held out, by group, for early stopping; unused where the data have a val split."""
    refit_epochs: Annotated[int, Field(ge=0)] = 10
    """Epochs in which the best network then learns from all images, held-out ones too; 0: none. Unused with a val \
    split of the data's own."""
    patience: Annotated[int, Field(ge=0)] = 15
    """Epochs without a better validation macro-F1 before training stops; 0: never."""
    on_leak: Literal["warn", "drop", "fail"] = "warn"
    """Images of the test or val split that are in the training data too: train as given and say how many; leave them \
    out of training; or stop with exit code 3."""
    abstain_below: Probability | None = None
    """Confidence below which the model abstains; stored in the bundle."""
    abstain_target: Probability | None = None
    """Accuracy wanted on what is answered: chooses --abstain-below on the validation images."""
    conformal_error: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Error rate of the label sets that each prediction then carries; default: none are made."""
    max_rejected: Probability = 0.05
    """Share of unreadable images above which the job stops."""
    cache_gb: Annotated[float, Field(ge=0)] = 2.0
    """Decoded frames up to this size, in GB, stay in memory; larger data are streamed again every epoch."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Worker failures the run survives; -1: any number."""
    init_from: str | None = None
    """Bundle or weights file (.safetensors, or a torch state dict) to start from."""
    mlflow: str | None = None
    """MLflow tracking URI to log to (extra `mlflow`); what is written down of it has no user and no password."""
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
        """Accept 2, "2" and "1:4"; `worker_range` below reads it."""
        if value is None:
            return None
        bounds = str(value).split(":")
        if len(bounds) > 2 or not all(part.isdigit() for part in bounds):
            raise ValueError("give N or MIN:MAX")
        if not 1 <= int(bounds[0]) <= int(bounds[-1]):
            raise ValueError("N, or MIN:MAX with 1 <= MIN <= MAX")
        return str(value)

    @field_serializer("mlflow")
    def _without_password(self, value: str | None) -> str | None:
        """A config stands in bundles and beside results, for whoever may read those."""
        return value and re.sub(r"(?<=://)[^/?#]*@", "", value)

    @model_validator(mode="after")
    def _one_way_to_abstain(self) -> Self:
        if self.abstain_below is not None and self.abstain_target is not None:
            raise ValueError("give --abstain-below or --abstain-target, not both")
        return self

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """(least, most) workers, equal for a fixed number; None: the job chooses."""
        if self.num_workers is None:
            return None
        bounds = [int(part) for part in self.num_workers.split(":")]
        return bounds[0], bounds[-1]

    @property
    def storage_uri(self) -> str:
        """Folder of the runs."""
        return self.storage or self.out.rstrip("/") + "/_run"


AUDIT_FINDINGS = ("leak", "conflict", "patient", "duplicate", "not_mri", "unreadable")


class AuditConfig(JobConfig):
    """Look for what makes figures untrue in labelled data: duplicates, leakage between splits, label conflicts.

    Writes audit.json, duplicates.parquet, report.html and lists of unreadable files and of what is no MRI slice.
    """

    data: str
    """Labelled data, as for training; one class is enough."""
    out: str
    """Where the audit is written; local or s3://."""
    fail_on: str = ""
    """Findings that end the job with exit code 3 once all is written, separated by commas: leak (an image of the val \
    or test split has a twin in a split before it), conflict (one image, several labels), patient (in several splits), \
    duplicate, not_mri, unreadable."""
    report_groups: Annotated[int, Field(ge=0, le=1000)] = 60
    """Most duplicate groups whose pictures the report shows; leaks and conflicts come first."""

    @field_validator("fail_on")
    @classmethod
    def _known_findings(cls, value: str) -> str:
        for name in (part.strip() for part in value.split(",") if part.strip()):
            if name not in AUDIT_FINDINGS:
                raise ValueError(f"{name!r} is no finding; choose of {', '.join(AUDIT_FINDINGS)}")
        return value

    @property
    def failing(self) -> tuple[str, ...]:
        """The findings of --fail-on, in the order of AUDIT_FINDINGS."""
        named = {part.strip() for part in self.fail_on.split(",")}
        return tuple(name for name in AUDIT_FINDINGS if name in named)


class EvaluateConfig(JobConfig):
    """Measure a bundle on labelled data: metrics.json, plots and report.html."""

    model: str
    """Model bundle."""
    data: str
    """Labelled data, as for training; its test split where it has one, else all of it. One class is enough."""
    out: str
    """Where the report is written; local or s3://."""
    model_id: str | None = None
    """Refuse the bundle unless this is its model_id."""
    abstain_below: Probability | None = None
    """Confidence below which the model abstains; default: the bundle's own."""
    max_rejected: Probability = 0.05
    """Share of unreadable images above which the job ends with exit code 3."""
    batch_size: Positive | None = None
    """Images a forward pass; default: 16 on a CPU, 64 on a GPU."""
    use_gpu: bool = False
    """One actor a GPU."""


class PredictConfig(JobConfig):
    """Classify a few scans on this machine and print what the model says; no cluster is needed.

    Exit code 0 where at least one scan was classified; rejected ones are named with a code. 2 where none could be.
    """

    model_config = SettingsConfigDict(cli_shortcuts={"json-lines": "json"})

    files: CliPositionalArg[Annotated[tuple[str, ...], Field(min_length=1)]]
    """Scans, or folders of them, local or s3://."""
    model: str
    """Model bundle."""
    model_id: str | None = None
    """Refuse the bundle unless this is its model_id."""
    abstain_below: Probability | None = None
    """Confidence below which the model abstains; default: the bundle's own."""
    json_lines: bool = False
    """Print one JSON object a line in place of a table."""


class AcquireConfig(JobConfig):
    """Bring data sets in: download, verify, unpack, merge, and write a manifest."""

    source: Annotated[tuple[str, ...], Field(min_length=1)]
    """kaggle:OWNER/NAME, an http(s):// archive (zip, tar, tar.gz, tar.bz2, tar.xz), an archive, folder or manifest, \
    local or s3://; several are merged. A comma separates: put one that holds a comma between double quotes."""
    out: str
    """Where images, manifest.parquet and dataset.json are written; local or s3://."""
    sha256: tuple[str, ...] = ()
    """SHA-256 of each archive, in the order of --source; `-` for none."""
    license: tuple[str, ...] = ()
    """Licence of each source, in the order of --source, recorded in dataset.json; one alone holds for all."""
    name: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)], ...] = ()
    """Name of each source, in the order of --source, for folders and the manifest; default: made from the source."""
    cache: str | None = None
    """Local folder for downloads, so that a broken one is taken up, and for unpacking; default: ~/.cache/btray."""
    max_unpacked_gb: Annotated[float, Field(gt=0)] = 50.0
    """Unpacked size above which an archive is refused as a bomb, in GB."""
    max_files: Positive = 10_000_000
    """Number of files above which an archive is refused as a bomb."""
    max_ratio: Annotated[float, Field(ge=1)] = 200.0
    """Unpacked size, in times the archive's own, above which it is refused as a bomb; 64 MiB are always allowed."""

    @field_validator("sha256")
    @classmethod
    def _hexadecimal(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        lower = tuple(digest.strip().lower() for digest in value)
        for digest in lower:
            if digest != "-" and not (len(digest) == 64 and all(c in "0123456789abcdef" for c in digest)):
                raise ValueError(f"{digest!r} is no SHA-256: give 64 hexadecimal digits, or - for none")
        return lower

    @model_validator(mode="after")
    def _at_most_one_a_source(self) -> Self:
        for key in ("sha256", "license", "name"):
            if len(getattr(self, key)) > len(self.source):
                raise ValueError(f"--{key} is given {len(getattr(self, key))} times for {len(self.source)} sources")
        return self
