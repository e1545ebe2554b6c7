"""The model bundle: the contract between training and everything that uses a model.

A bundle is a folder, local or in object storage, of `model.safetensors`, `bundle.json`, `metrics.json`, plots,
`report.html` and `MODEL_CARD.md`, with `ood.safetensors` and `fingerprints.safetensors` if training made them.
`bundle.json` holds the SHA-256 of all other files and of itself and is written last, so that a bundle is there whole or
not at all. Loading verifies the digest of all that it reads, every file but the fingerprints, and never unpickles.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import safetensors.numpy
import safetensors.torch
from pydantic import JsonValue
from safetensors import SafetensorError
from torch import Tensor

from btray import storage
from btray.core.errors import UserError
from btray.data.config import PreprocessConfig
from btray.data.fingerprint import Fingerprints, ShortFingerprints
from btray.data.preprocess import preprocess_digest
from btray.model.bundle_files import (
    FINGERPRINTS,
    WEIGHTS,
    WRITING,
    own_names,
    read_files,
    read_verified,
    require_free,
)
from btray.model.config import MANIFEST, NetworkConfig
from btray.model.manifest import (
    FORMAT_VERSION,
    Calibration,
    Manifest,
    StudyRule,
    Thresholds,
    TrainedOn,
    code_digest,
    library_versions,
    sha256,
)
from btray.model.network import Network, build_network
from btray.model.ood import Distribution
from btray.model.promotion import resolve
from btray.model.shipped import locate

OOD = "ood.safetensors"
"""The distribution of the training images' features; see `btray.model.ood`."""

LARGE = 5_000
"""Numbers from which on a kernel may be rounded in half precision: what is smaller takes 5 % of the space."""


@dataclass(frozen=True)
class Bundle:
    """A verified bundle in memory."""

    uri: str
    """Where it is stored; empty if it is not."""
    manifest: Manifest
    weights: dict[str, Tensor]
    ood: Distribution | None = None
    """The distribution of the training images' features."""

    def abstaining_below(self, confidence: float | None) -> Bundle:
        """Return the same bundle with another threshold of abstention; None keeps its own."""
        if confidence is None:
            return self
        thresholds = self.manifest.thresholds.model_copy(update={"abstain_below": confidence})
        return replace(self, manifest=self.manifest.model_copy(update={"thresholds": thresholds}))

    @property
    def large_kernels(self) -> list[str]:
        """Names of the weights that may be rounded."""
        return [name for name, tensor in self.weights.items() if tensor.is_floating_point() and tensor.numel() >= LARGE]

    def in_half_precision(self, kernels: Collection[str]) -> Bundle:
        """Return the model with some of its weights, by name, as float16; it has another model_id.

        `network`, and training from the bundle, compute in float32 as before.
        """
        weights = {name: tensor.half() if name in kernels else tensor for name, tensor in self.weights.items()}
        manifest = self.manifest.model_copy(update={"weights_sha256": sha256(safetensors.torch.save(weights))})
        ood = self.ood and replace(self.ood, directions=self.ood.directions.astype(np.float16))
        return Bundle("", manifest.with_own_id(), weights, ood)

    def contents(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """Return all files of the bundle by name, with `files`, its plots, metrics and texts; bundle.json is last."""
        if self.ood is not None:
            files = {**files, OOD: safetensors.torch.save(self.ood.tensors())}
        manifest = self.manifest.model_copy(update={"files": {name: sha256(files[name]) for name in sorted(files)}})
        return {WEIGHTS: safetensors.torch.save(self.weights), **files, MANIFEST: manifest.to_text().encode()}

    def network(self) -> Network:
        """Return the network with its weights, in evaluation mode. Raises UserError if the weights do not fit it."""
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
    training: dict[str, JsonValue],
    data: TrainedOn,
    created_at: str,
    thresholds: Thresholds | None = None,
    ood: Distribution | None = None,
    study_rule: StudyRule | None = None,
) -> Bundle:
    """Return a bundle in memory, named by its digest; `save_bundle` publishes it."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        model_id="",
        classes=classes,
        network=network,
        preprocess=preprocess,
        preprocess_digest=preprocess_digest(preprocess),
        calibration=Calibration(temperature=temperature),
        thresholds=thresholds or Thresholds(),
        study_rule=study_rule,
        training=training,
        data=data,
        versions=library_versions(),
        code_version=code_digest(),
        created_at=created_at,
        weights_sha256=sha256(safetensors.torch.save(on_cpu)),
        files={},
    )
    return Bundle("", manifest.with_own_id(), on_cpu, ood)


def save_bundle(bundle: Bundle, uri: str, files: Mapping[str, bytes]) -> Bundle:
    """Write `bundle` to `uri`, in place of a bundle that is there; `files` are plots, metrics and texts by name.

    Raises UserError if `uri` holds anything that does not belong to a bundle.
    """
    uri = storage.resolve(uri)
    require_free(uri)
    contents = bundle.contents(files)
    names = own_names(uri) | contents.keys()
    storage.write_json(storage.join(uri, WRITING), sorted(names))
    # The manifest goes first: without it there is no bundle, and a reader never sees half of one.
    for name in (MANIFEST, *sorted(names - contents.keys())):
        storage.delete(storage.join(uri, name))
    for name, body in contents.items():  # the manifest is last
        storage.write_bytes(storage.join(uri, name), body)
    storage.delete(storage.join(uri, WRITING))
    return Bundle(uri, Manifest.from_text(contents[MANIFEST].decode(), uri), bundle.weights, bundle.ood)


def require_same_frames(manifest: Manifest, uri: str) -> None:
    """Raise UserError if preprocessing makes other frames here than where the model, that of `uri`, was trained."""
    if preprocess_digest(manifest.preprocess) != manifest.preprocess_digest:
        raise UserError(
            f"{uri}: preprocessing gives other bits on {socket.gethostname()} than where the model was trained; "
            f"install the versions it was trained with: {manifest.differing_versions()}"
        )


def load_bundle(uri: str, *, model_id: str | None = None) -> Bundle:
    """Read and verify a bundle, given by URI, as a promoted one or by the name of the shipped one.

    `model_id` pins which model is meant.

    Raises UserError for whatever is missing, changed, unlisted, newer than this btray or not the pinned model.
    """
    uri, model_id = resolve(uri, model_id)
    uri = locate(uri)
    manifest, files = read_files(uri, model_id=model_id)
    require_same_frames(manifest, uri)
    weights = _tensors(uri, WEIGHTS, files[WEIGHTS])
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise UserError(f"{uri}: {name} has weights that are not finite: its training diverged; train it again")
    if OOD not in files:
        return Bundle(uri, manifest, weights)
    try:
        distribution = Distribution.from_tensors(_tensors(uri, OOD, files[OOD]))
    except KeyError as error:
        raise UserError(f"{uri}: {OOD} is damaged: it has no {error}; train or copy the bundle again") from error
    return Bundle(uri, manifest, weights, distribution)


def pack_fingerprints(prints: Fingerprints | ShortFingerprints) -> bytes:
    """Return the file FINGERPRINTS of fingerprints [n, VIEWS, LENGTH], or of short ones."""
    # safetensors writes the memory as it lies, so a view must be copied first
    return safetensors.numpy.save({"fingerprints": np.ascontiguousarray(prints)})


def read_fingerprints(bundle: Bundle) -> Fingerprints | ShortFingerprints | None:
    """Return fingerprints, whole or short, of the images that made a saved bundle; None if it keeps none."""
    body = read_file(bundle, FINGERPRINTS)
    return None if body is None else _tensors(bundle.uri, FINGERPRINTS, body)["fingerprints"].numpy()


def read_file(bundle: Bundle, name: str) -> bytes | None:
    """Return another file of a saved bundle, verified; None if it has no file of this name. Raises UserError."""
    digest = bundle.manifest.files.get(name)
    return None if digest is None else read_verified(bundle.uri, name, digest)


def _tensors(uri: str, name: str, body: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(body)
    except SafetensorError as error:
        raise UserError(f"{uri}: {name} is not a safetensors file: {error}") from error
