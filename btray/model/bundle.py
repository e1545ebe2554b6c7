"""The model bundle: the contract between training and everything after it.

A folder, local or in object storage, of `model.safetensors`, `bundle.json`, `metrics.json`, plots, `report.html` and
`MODEL_CARD.md`, with `ood.safetensors` and `fingerprints.safetensors` where training made them. `bundle.json` holds
the SHA-256 of all the others and of itself and is written last, so a bundle is there whole or not at all; loading
verifies every digest and never unpickles.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.numpy
import safetensors.torch
from pydantic import Field, ValidationError, field_validator
from safetensors import SafetensorError
from torch import Tensor

from btray import storage
from btray.core.config import ComponentConfig
from btray.core.errors import UserError
from btray.data.config import PreprocessConfig
from btray.data.fingerprint import Fingerprints
from btray.data.preprocess import preprocess_digest
from btray.model.config import NetworkConfig
from btray.model.network import Network, build_network
from btray.model.ood import Distribution
from btray.storage import StorageError, user_error

FORMAT_VERSION = 1
MANIFEST = "bundle.json"
WEIGHTS = "model.safetensors"
OOD = "ood.safetensors"
"""The distribution of the training images' features; see `btray.model.ood`."""
FINGERPRINTS = "fingerprints.safetensors"
"""Fingerprints of all images that were trained on or validated with; see `btray.data.fingerprint`."""
# Names the files of a bundle that is being written: what a killed writer left is known by it and may be replaced.
_WRITING = "_writing.json"
# The key in bundle.json of the SHA-256 of bundle.json itself, taken with zeros in its place.
_SEAL = "manifest_sha256"
_NO_SEAL = "0" * 64
# The libraries whose version can change what a bundle answers.
_LIBRARIES = ("btray", "torch", "torchvision", "numpy", "pillow", "scipy", "ray")
# What a model's name is a digest of.
_IDENTITY = ("classes", "network", "preprocess", "calibration", "weights_sha256")


class Calibration(ComponentConfig):
    """How logits become probabilities."""

    temperature: float = Field(1.0, gt=0)
    """Logits are divided by it before the softmax (Guo et al. 2017, arXiv:1706.04599)."""


class Thresholds(ComponentConfig):
    """Where answers are marked; None: never. They come from validation images, or were chosen by the user."""

    abstain_below: Annotated[float | None, Field(ge=0)] = None
    """Confidence below which the model abstains."""
    ood_score: Annotated[float | None, Field(ge=0)] = None
    """Score above which an input is out of distribution."""
    conformal: Annotated[float | None, Field(ge=0, le=1)] = None
    """Probability from which a label belongs to the label set."""
    conformal_error: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Error rate for which `conformal` was chosen."""


class Manifest(ComponentConfig):
    """What `bundle.json` holds."""

    format_version: int
    """Rises when an older btray could not read the bundle."""
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
    """Where answers are marked."""
    training: dict[str, Any]
    """The resolved training config."""
    data: dict[str, Any]
    """Fingerprint and counts of the data that training saw."""
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

    @field_validator("files")
    @classmethod
    def _plain_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _is_plain(name):
                raise ValueError(f"{name!r} is no plain file name")
        return value


@dataclass(frozen=True)
class Bundle:
    """A verified bundle in memory."""

    uri: str
    manifest: Manifest
    weights: dict[str, Tensor]
    ood: Distribution | None = None
    """What the training images' features are like."""

    def abstaining_below(self, confidence: float | None) -> Bundle:
        """The same bundle with another threshold of abstention; None leaves its own."""
        if confidence is None:
            return self
        thresholds = self.manifest.thresholds.model_copy(update={"abstain_below": confidence})
        return replace(self, manifest=self.manifest.model_copy(update={"thresholds": thresholds}))

    def network(self) -> Network:
        """The network with its weights, in evaluation mode. Raises UserError where the weights do not fit it."""
        network = build_network(self.manifest.network, len(self.manifest.classes))
        try:
            network.load_state_dict(self.weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(
                f"{self.uri}: the weights do not fit the network that {MANIFEST} describes: {reason}"
            ) from error
        return network.eval()


def make_bundle(
    *,
    weights: Mapping[str, Tensor],
    classes: tuple[str, ...],
    network: NetworkConfig,
    preprocess: PreprocessConfig,
    temperature: float,
    training: dict[str, Any],
    data: dict[str, Any],
    created_at: str,
    thresholds: Thresholds | None = None,
    ood: Distribution | None = None,
) -> Bundle:
    """A bundle in memory, named by its digest; `save_bundle` publishes it."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    identity = {
        "classes": classes,
        "network": network,
        "preprocess": preprocess,
        "calibration": Calibration(temperature=temperature),
        "weights_sha256": _sha256(safetensors.torch.save(kept)),
    }
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        model_id=_model_id(identity),
        preprocess_digest=preprocess_digest(preprocess),
        thresholds=thresholds or Thresholds(),
        training=training,
        data=data,
        versions=_versions(),
        code_version=_code_version(),
        created_at=created_at,
        files={},
        **identity,  # type: ignore[arg-type]
    )
    return Bundle("", manifest, kept, ood)


def save_bundle(bundle: Bundle, uri: str, files: Mapping[str, bytes]) -> Bundle:
    """Write `bundle` to `uri`, in place of the one that is there; `files` are plots, metrics and texts by name.

    Raises UserError where `uri` holds something that is no bundle.
    """
    uri = storage.resolve(uri)
    require_free(uri)
    if bundle.ood is not None:
        files = {**files, OOD: safetensors.torch.save(bundle.ood.tensors())}
    manifest = bundle.manifest.model_copy(update={"files": {name: _sha256(files[name]) for name in sorted(files)}})
    left = _own_names(uri) - {WEIGHTS, *files}
    storage.write_json(storage.join(uri, _WRITING), sorted(left | {WEIGHTS, *files}))
    # Without its manifest there is no bundle, not half of one.
    for name in (MANIFEST, *sorted(left)):
        storage.delete(storage.join(uri, name))
    for name, body in {WEIGHTS: safetensors.torch.save(bundle.weights), **files}.items():
        storage.write_bytes(storage.join(uri, name), body)
    storage.write_text(storage.join(uri, MANIFEST), _sealed(manifest))
    storage.delete(storage.join(uri, _WRITING))
    return Bundle(uri, manifest, bundle.weights, bundle.ood)


def load_bundle(uri: str, *, model_id: str | None = None) -> Bundle:
    """Read and verify a bundle; `model_id` pins which model is meant.

    Raises UserError for whatever is missing, changed, unlisted, newer than this btray or not the pinned model.
    """
    uri = storage.resolve(uri)
    manifest = _read_manifest(uri)
    if model_id is not None and model_id != manifest.model_id:
        raise UserError(f"{uri} holds model {manifest.model_id}, not the pinned --model-id {model_id}")
    blob = _read_verified(uri, WEIGHTS, manifest.weights_sha256)
    others = {name: _read_verified(uri, name, digest) for name, digest in manifest.files.items()}
    _refuse_unlisted(uri, manifest)
    if manifest.model_id != _model_id({name: getattr(manifest, name) for name in _IDENTITY}):
        raise UserError(f"{uri}: {MANIFEST} was changed: its model_id is not that of its content; train or copy again")
    if preprocess_digest(manifest.preprocess) != manifest.preprocess_digest:
        raise UserError(
            f"{uri}: preprocessing gives other bits here than where the model was trained; "
            f"install the versions it was trained with: {_differing(manifest.versions)}"
        )
    weights = _tensors(uri, WEIGHTS, blob)
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise UserError(f"{uri}: {name} has weights that are not finite: its training diverged; train it again")
    return Bundle(uri, manifest, weights, _read_distribution(uri, others[OOD]) if OOD in others else None)


def pack_fingerprints(prints: Fingerprints) -> bytes:
    """The file FINGERPRINTS of fingerprints [n, VIEWS, LENGTH]."""
    return safetensors.numpy.save({"fingerprints": np.ascontiguousarray(prints)})  # it writes memory as it lies


def read_fingerprints(bundle: Bundle) -> Fingerprints | None:
    """Fingerprints [n, VIEWS, LENGTH] of what a saved bundle was made with; None where it keeps none."""
    blob = read_file(bundle, FINGERPRINTS)
    return None if blob is None else _tensors(bundle.uri, FINGERPRINTS, blob)["fingerprints"].numpy()


def read_file(bundle: Bundle, name: str) -> bytes | None:
    """A file that a saved bundle holds besides, verified; None where it holds none of this name. Raises UserError."""
    digest = bundle.manifest.files.get(name)
    return None if digest is None else _read_verified(bundle.uri, name, digest)


def _read_distribution(uri: str, blob: bytes) -> Distribution:
    try:
        return Distribution.from_tensors(_tensors(uri, OOD, blob))
    except KeyError as error:
        raise UserError(f"{uri}: {OOD} is damaged: it has no {error}; train or copy the bundle again") from error


def _tensors(uri: str, name: str, blob: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(blob)
    except SafetensorError as error:
        raise UserError(f"{uri}: {name} is not a safetensors file: {error}") from error


def require_free(uri: str) -> None:
    """Raise UserError unless `uri` can take a bundle: not there, empty, a bundle, or only names that begin with `_`."""
    if storage.is_remote(uri):
        _require_bucket(uri)
    elif storage.exists(uri) and not storage.is_folder(uri):
        raise UserError(f"--out {uri} is a file; name a folder")
    foreign = sorted(set(_visible(uri)) - _own_names(uri))
    if foreign:
        raise UserError(f"--out {uri} is not empty and holds {foreign[0]}, which is no bundle's; name an empty folder")


def _require_bucket(uri: str) -> None:
    bucket = "/".join(uri.split("/")[:3])
    try:
        there = storage.is_folder(bucket)
    except StorageError:  # whoever may write below a prefix may be forbidden to list the bucket
        return
    if not there:
        raise UserError(f"--out {uri}: there is no bucket {bucket}; make it, or name another")


def _own_names(uri: str) -> set[str]:
    """What lies in `uri` by the word of its bundle, or of a writer that was killed. Raises UserError for a bad one."""
    own: set[str] = set()
    names = _names(uri)
    if MANIFEST in names:
        own |= {MANIFEST, WEIGHTS, *_read_manifest(uri).files}
    if _WRITING in names:
        try:
            own |= {str(name) for name in storage.read_json(storage.join(uri, _WRITING))}
        except StorageError as error:
            raise user_error(error) from error
    for name in own:
        if not _is_plain(name):
            raise UserError(f"{uri}: {_WRITING} lists {name!r}, which is no plain file name; name an empty folder")
    return own


def _is_plain(name: str) -> bool:
    return name not in ("", "..") and Path(name).name == name


def _visible(uri: str) -> list[str]:
    return [name for name in _names(uri) if not name.startswith(("_", "."))]


def _names(uri: str) -> list[str]:
    try:
        return storage.list_names(uri, missing_ok=True)
    except StorageError as error:
        raise user_error(error) from error


def _sealed(manifest: Manifest) -> str:
    """The text of bundle.json."""
    content = {**manifest.model_dump(mode="json"), _SEAL: _NO_SEAL}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.replace(_NO_SEAL, _sha256(text.encode()))


def _read_manifest(uri: str) -> Manifest:
    try:
        text = storage.read_text(storage.join(uri, MANIFEST))
        content = json.loads(text)
    except StorageError as error:
        if error.code == "not_found":
            raise UserError(f"{uri} is no model bundle: it has no {MANIFEST}; give the --out of a training") from error
        raise user_error(error) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{uri}: {MANIFEST} is damaged: {error}; train or copy the bundle again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise UserError(f"{uri}: {MANIFEST} has no format_version; train or copy the bundle again")
    if version > FORMAT_VERSION:
        raise UserError(f"{uri} has format_version {version}; this btray reads up to {FORMAT_VERSION}: upgrade btray")
    seal = content.pop(_SEAL, None)
    if not isinstance(seal, str) or _sha256(text.replace(seal, _NO_SEAL).encode()) != seal:
        raise UserError(f"{uri}: {MANIFEST} was changed or damaged: its {_SEAL} does not fit; copy the bundle again")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{uri}: {MANIFEST} is damaged at {key!r}: {first['msg']}") from error


def _read_verified(uri: str, name: str, digest: str) -> bytes:
    try:
        body = storage.read_bytes(storage.join(uri, name))
    except StorageError as error:
        if error.code == "not_found":
            raise UserError(f"{uri} is incomplete: {name} is missing; copy the bundle again") from error
        raise user_error(error) from error
    if _sha256(body) != digest:
        raise UserError(f"{uri}: {name} was changed or damaged: its SHA-256 is not the one in {MANIFEST}")
    return body


def _refuse_unlisted(uri: str, manifest: Manifest) -> None:
    listed = {MANIFEST, WEIGHTS, *manifest.files}
    for name in _visible(uri):
        if name not in listed:
            raise UserError(f"{uri} holds {name}, which {MANIFEST} does not list; remove it or copy the bundle again")


def _model_id(identity: Mapping[str, Any]) -> str:
    content = {
        name: value.model_dump(mode="json") if isinstance(value, ComponentConfig) else value
        for name, value in identity.items()
    }
    return _sha256(json.dumps(content, sort_keys=True).encode())[:32]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _LIBRARIES}


def _differing(then: dict[str, str]) -> str:
    now = _versions()
    differences = [f"{name} {then[name]} (here {now[name]})" for name in now if then.get(name, now[name]) != now[name]]
    return ", ".join(differences) or "all are equal, so the processor may differ"


def _code_version() -> str:
    digest = hashlib.sha256()
    root = Path(str(resources.files("btray")))
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
