"""The settings of the network, of `btray predict` and of the export job. No heavy import: `--help` must be quick."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from btray.core.config import ComponentConfig, JobConfig, Positive, Probability, Share
from btray.core.errors import UserError
from btray.core.uris import Uri
from btray.model.shipped import SHIPPED, Model, locate

MANIFEST = "bundle.json"
"""The file of a bundle that describes it."""
_QUICK = 0.1  # seconds of asking a store: one that does not answer is the job's to wait for
EXPORT = "export.json"
"""The file of an export that describes it."""
NO_BUNDLE = f"{{}} is not a model bundle: it has no {MANIFEST}; give the --out of a training"
EngineName = Literal["auto", "eager", "frozen", "onnx"]
"""How a network is run: see `btray.model.engines`."""
Precision = Literal["float32", "bf16"]
"""In what the feature maps are computed."""
# Images per forward pass by default. On a CPU the activations of more images than that no longer fit into what the C
# library keeps of freed memory, and every layer pays page faults for its output: 10 to 20 % of the time.
_CPU_BATCH, _GPU_BATCH = 16, 64
BACKBONES = ("resnet18", "resnet50", "vgg16", "squeezenet1_0", "efficientnet_b0", "densenet121", "convnext_tiny")
ARCHITECTURES = ("mobile_cnn", "cnn", *BACKBONES)


class NetworkConfig(ComponentConfig):
    """A custom 2D CNN, described wholly, or a torchvision backbone by name."""

    architecture: Literal[ARCHITECTURES] = "mobile_cnn"  # type: ignore[valid-type]
    """`mobile_cnn`: 15 inverted residual blocks, whose weights start from ImageNet; `cnn`: the family below, \
    meant whenever one of its settings is given; else a torchvision backbone. All use `dropout`."""
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

    @model_validator(mode="before")
    @classmethod
    def _settings_of_the_family_mean_it(cls, values: Any) -> Any:
        if isinstance(values, dict) and "architecture" not in values and values.keys() - {"dropout"}:
            return values | {"architecture": "cnn"}
        return values

    @model_validator(mode="after")
    def _one_depth_per_width(self) -> Self:
        if not self.widths or len(self.widths) != len(self.depths):
            raise ValueError(
                f"network.widths {self.widths} and network.depths {self.depths} must have as many entries, at least one"
            )
        return self


def default_batch_size(*, gpu: bool) -> int:
    """Return the number of images per forward pass that suits a CPU, or a GPU."""
    return _GPU_BATCH if gpu else _CPU_BATCH


def require_bundle(model: str) -> None:
    """Raise UserError if there is no bundle `model`; it is not read. A store that cannot tell is left to the job."""
    from btray import storage
    from btray.model.promotion import resolve

    with storage.retry_timeout(_QUICK), suppress(storage.StorageError):
        model, _ = resolve(model, log=False)
    if not storage.may_exist(storage.join(locate(model), MANIFEST)):
        raise UserError(NO_BUNDLE.format(locate(model)))


class PredictConfig(JobConfig):
    """Classify a few scans on this machine and print what the model says; no cluster is needed.

    Exit code 0 if at least one scan was classified; rejected ones are named with a code. 2 if none could be.
    """

    model_config = SettingsConfigDict(cli_shortcuts={"json-lines": "json"})

    # As they are given, not resolved: no other process reads them, and each line of the output names its scan so.
    files: CliPositionalArg[Annotated[tuple[str, ...], Field(min_length=1)]]
    """Scans, or folders of them, local or s3://."""
    model: Model = SHIPPED
    """Model bundle: a folder, local or s3://, or the name of the shipped one."""
    model_id: str | None = None
    """Refuse the bundle unless this is its model_id."""
    abstain_below: Probability | None = None
    """Confidence below which the model abstains; default: the bundle's own."""
    precision: Precision = "float32"
    """In what the network computes; bf16, bfloat16, takes less time on CPUs with AVX512_BF16 or AMX and on GPUs."""
    json_lines: bool = False
    """Print one JSON object per line instead of a table."""

    def check(self) -> None:
        """Refuse a bundle that is not there."""
        require_bundle(self.model)


class ExportConfig(JobConfig):
    """Write a model as ONNX or torch.export, with a description, for runtimes without btray; no cluster is needed."""

    model: Model = SHIPPED
    """Model bundle: a folder, local or s3://, or the name of the shipped one."""
    out: Uri
    """Folder for the exported file, its description (export.json) and an example; local or s3://."""
    format: Literal["onnx", "torch"] = "onnx"
    """onnx: model.onnx, for ONNX Runtime, Triton, OpenVINO (extra onnx); torch: model.pt2, a torch.export program."""
    model_id: str | None = None
    """Refuse the bundle unless this is its model_id."""
    overwrite: bool = Field(default=False, exclude=True)
    """Replace the export at --out."""

    def check(self) -> None:
        """Refuse a bundle that is not there, a missing package, and an --out that is taken or cannot be written to."""
        from btray import storage

        require_bundle(self.model)
        if self.format == "onnx" and not (find_spec("onnx") and find_spec("onnxruntime")):
            raise UserError("--format onnx needs the extra: pip install 'btray[onnx]'")
        if not self.overwrite and storage.exists(storage.join(self.out, EXPORT)):
            raise UserError(f"--out {self.out} holds an export; give another --out, or --overwrite to replace it")
        storage.require_writable(self.out, "--out")
