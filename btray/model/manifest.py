"""The content of `bundle.json`: what a model is, what it was made of, and which files belong to it. Free of torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from importlib import resources
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, JsonValue, ValidationError, field_validator

from btray.core.config import ComponentConfig, Probability
from btray.core.errors import UserError
from btray.core.notice import percent
from btray.data.config import PreprocessConfig
from btray.model.config import MANIFEST, NetworkConfig, Precision

FORMAT_VERSION = 2  # 1: frames were made otherwise

# What `--precision bf16` asks for, in Agreement.
LEAST_EQUAL_LABELS = 0.99
LARGEST_DIFFERENCE = 0.1

# The key of the SHA-256 of bundle.json itself, computed with zeros in its place. It covers the text and not the parsed
# content, so that no bit of the file can flip unnoticed.
_SEAL = "manifest_sha256"
_NO_SEAL = "0" * 64
# The libraries whose version can change the answers of a bundle.
_LIBRARIES = ("btray", "torch", "torchvision", "numpy", "pillow", "scipy", "ray")
# The fields that decide the answers. Two bundles with equal ones are the same model, whatever else differs.
_IDENTITY = {"classes", "network", "preprocess", "calibration", "weights_sha256"}


class Calibration(ComponentConfig):
    """How logits become probabilities."""

    temperature: float = Field(1.0, gt=0)
    """Logits are divided by it before the softmax (Guo et al. 2017, arXiv:1706.04599)."""


class Thresholds(ComponentConfig):
    """Values from which on answers are marked; None: never. From validation images, or chosen by the user."""

    abstain_below: Annotated[float | None, Field(ge=0)] = None
    """Confidence below which the model abstains."""
    ood_score: Annotated[float | None, Field(ge=0)] = None
    """Score above which an input is out of distribution."""
    conformal: Annotated[float | None, Field(ge=0, le=1)] = None
    """Probability from which a label belongs to the label set."""
    conformal_error: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Error rate for which `conformal` was chosen."""


class StudyRule(ComponentConfig):
    """How the frames of a series are decided together."""

    top: Annotated[int, Field(ge=1)]
    """Frames with the most tumor whose probabilities are averaged."""


class TrainedOn(ComponentConfig):
    """The data of a training, and how long it took."""

    uri: str
    """Where the labelled data were read."""
    fingerprint: str
    """Digest of the images and labels."""
    counts: dict[str, dict[str, int]]
    """Split -> class -> images, of `train`, `validation` and `test`."""
    rejected: int
    """Images that could not be read."""
    leak: dict[str, int]
    """Split -> images of it that show the same as a training image."""
    on_leak: str
    """What was done about these: `warn`, `drop` or `fail`."""
    epochs: int
    """Epochs until the end. The config may say another number: training may have stopped early, or been resumed."""
    best_epoch: int
    """The epoch whose weights were kept, from 1."""
    refit_epochs: int
    """Further epochs, on the validation images too."""
    patient_ids: bool
    """The data name patients, so that no patient is in several splits."""


class Agreement(ComponentConfig):
    """How far answers computed in bfloat16 agree with those in float32."""

    images: Annotated[int, Field(ge=1)]
    """Validation images that were answered twice."""
    equal_labels: Probability
    """Share of them that got the same label."""
    largest_difference: Probability
    """Of a probability, over all images and classes."""


class Manifest(ComponentConfig):
    """The content of `bundle.json`."""

    format_version: int
    """Rises when a bundle and a btray before and after could not go together, as when frames are made otherwise."""
    model_id: str
    """Digest of weights, network, preprocessing, calibration and classes; the name of this model in every result."""
    classes: tuple[str, ...] = Field(min_length=2)
    """Labels in the order of the network's outputs."""
    network: NetworkConfig
    """The network."""
    preprocess: PreprocessConfig
    """The deterministic transform."""
    preprocess_digest: str
    """SHA-256 of what preprocessing makes of a fixed test pattern."""
    calibration: Calibration
    """How logits become probabilities."""
    thresholds: Thresholds
    """Values from which on answers are marked."""
    training: dict[str, JsonValue]
    """The resolved training config."""
    data: TrainedOn
    """The data of the training."""
    versions: dict[str, str]
    """Python and library versions of the training."""
    code_version: str
    """SHA-256 of btray's own source files."""
    created_at: str
    """When training ended, UTC, ISO 8601."""
    weights_sha256: str
    """SHA-256 of the weights file."""
    files: dict[str, str]
    """SHA-256 of every other file, by name."""
    bf16: Agreement | None = None
    """Whether `--precision bf16` may be used; None: it was not measured, and may not."""
    study_rule: StudyRule | None = None
    """Chosen on validation images; None: there were no groups of several slices, and a default is used."""

    @field_validator("files")
    @classmethod
    def _plain_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not is_plain_name(name):
                raise ValueError(f"{name!r} is not a plain file name")
        return value

    @classmethod
    def from_text(cls, text: str, uri: str) -> Self:
        """Read bundle.json of the bundle at `uri`. Raises UserError if it is damaged, or of another format version."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{uri}: {MANIFEST} is damaged: {error}; train or copy the bundle again") from error
        version = content.get("format_version") if isinstance(content, dict) else None
        if not isinstance(version, int):
            raise UserError(f"{uri}: {MANIFEST} has no format_version; train or copy the bundle again")
        if version > FORMAT_VERSION:
            raise UserError(f"{uri} has format_version {version}; this btray reads {FORMAT_VERSION}: upgrade btray")
        if version < FORMAT_VERSION:
            raise UserError(
                f"{uri} has format_version {version}; this btray makes other frames and reads {FORMAT_VERSION}: train "
                "the model again, into another folder"
            )
        seal = content.pop(_SEAL, None)
        if not isinstance(seal, str) or sha256(text.replace(seal, _NO_SEAL).encode()) != seal:
            raise UserError(
                f"{uri}: {MANIFEST} was changed or damaged: its {_SEAL} does not fit; copy the bundle again"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{uri}: {MANIFEST} is damaged at {key!r}: {first['msg']}") from error

    def to_text(self) -> str:
        """Return bundle.json, with the digest of its own text."""
        content = {**self.model_dump(mode="json"), _SEAL: _NO_SEAL}
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        return text.replace(_NO_SEAL, sha256(text.encode()))

    def identity_digest(self) -> str:
        """Return the `model_id` that this content has."""
        return sha256(json.dumps(self.model_dump(mode="json", include=_IDENTITY), sort_keys=True).encode())[:32]

    def with_own_id(self) -> Self:
        """Return the same content with the `model_id` that it has."""
        return self.model_copy(update={"model_id": self.identity_digest()})

    def differing_versions(self) -> str:
        """Return the libraries whose versions differ here from those of the training, as text."""
        now = library_versions()
        differing = [
            f"{name} {old} (here {now[name]})" for name, old in self.versions.items() if now.get(name, old) != old
        ]
        return ", ".join(differing) or "all are equal, so the processor may differ"


def require_agreement(manifest: Manifest, uri: str, precision: Precision) -> None:
    """Raise UserError unless the model of the bundle at `uri` was found to answer in `precision` as in float32."""
    found = manifest.bf16
    if precision == "float32":
        return
    if found is None:
        raise UserError(
            f"--precision {precision}: {uri} does not say how far its answers agree with those in float32; leave it "
            "out, or train again on a CPU with AVX512_BF16 or AMX"
        )
    if found.equal_labels < LEAST_EQUAL_LABELS or found.largest_difference > LARGEST_DIFFERENCE:
        raise UserError(
            f"--precision {precision}: of {found.images} validation images {uri} gives {percent(found.equal_labels)} "
            f"the label that it gives in float32, at least {percent(LEAST_EQUAL_LABELS, 0)} are asked for; "
            f"probabilities differ by up to {found.largest_difference:.3f}, at most {LARGEST_DIFFERENCE} is "
            "allowed; leave it out"
        )


def is_plain_name(name: str) -> bool:
    """Return whether `name` is that of a file in the bundle's folder and leads nowhere else."""
    return name not in ("", "..") and Path(name).name == name


def sha256(data: bytes) -> str:
    """Return the digest as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that can change the answers of a model."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _LIBRARIES}


def code_digest() -> str:
    """Return the SHA-256 of btray's source files and of their paths."""
    digest = hashlib.sha256()
    root = Path(str(resources.files("btray")))
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
