"""The publish job: make of a trained bundle one that may be passed on: small, without pictures, with its terms."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import JsonValue

from btray import storage
from btray.core.errors import UserError
from btray.data.fingerprint import shortened
from btray.data.frames import Rejection
from btray.data.labelled import read_labelled
from btray.evaluation.config import PublishConfig
from btray.evaluation.metrics import Evaluation
from btray.evaluation.parts import Part
from btray.evaluation.report import model_card, render_report
from btray.model.bundle import (
    FINGERPRINTS,
    Bundle,
    load_bundle,
    pack_fingerprints,
    read_file,
    read_fingerprints,
    save_bundle,
)
from btray.model.classifier import Classifier
from btray.model.comparison import noise_frames
from btray.model.drift import REFERENCE
from btray.model.promotion import pinned

_log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest difference of a probability that half precision may make."""
LICENSE = "LICENSE"
# Plots of numbers. All others, and those to come, may show scans, and are left out.
_PLOTS = ("confusion_matrix", "roc_curves", "reliability", "risk_coverage", "learning_curves")
_NOISE, _IMAGES = 64, 256  # frames over which answers are compared
_PLACES = {"out", "storage", "mlflow"}  # settings that say nothing but where something lies
_PLACE = re.compile(r"/|~|file:|[A-Za-z][A-Za-z0-9+.-]*://")


def publish(config: PublishConfig) -> str:
    """Write the bundle `config.model` to `config.out` as it may be passed on, and return the URI.

    Weights are in half precision if the answers stay within TOLERANCE, fingerprints are shortened, pictures of scans
    and the names of this machine's folders are left out; the terms are its LICENSE and stand on its model card.

    Raises UserError if that is larger than `max_mb`, or if the bundle does not tell how good it is.
    """
    config = pinned(config)
    config.check()
    trained = load_bundle(config.model, model_id=config.model_id)
    metrics = _metrics(trained)
    noise = noise_frames(_NOISE, trained.manifest.preprocess.size)
    images = _frames_of(trained, config.data) if config.data else noise[:0]
    bundle, note = _smaller(_without_places(trained), np.concatenate([noise, images]), len(images))
    metrics = replace(
        metrics,
        model_id=bundle.manifest.model_id,
        measured_on=metrics.measured_on.replace(trained.manifest.data.uri, bundle.manifest.data.uri),
        sources=_named_by_last_parts(metrics.sources),
        validation=_named_by_last_parts(metrics.validation),
    )
    terms = storage.read_text(config.license)
    figures = {name: _smaller_plot(png) for name in _PLOTS if (png := read_file(trained, f"{name}.png"))}
    report = render_report(
        metrics, bundle.manifest, figures=figures, notes=[note, "Pictures of scans are left out of this report."]
    )
    files = {
        "metrics.json": metrics.to_json(),
        "report.html": report.encode(),
        "MODEL_CARD.md": model_card(bundle.manifest, metrics, terms=terms, notes=[note]).encode(),
        LICENSE: terms.encode(),
    }
    if (reference := read_file(trained, REFERENCE)) is not None:
        files[REFERENCE] = reference
    if (prints := read_fingerprints(trained)) is not None:
        files[FINGERPRINTS] = pack_fingerprints(shortened(prints))
    _require_small(bundle.contents(files), config.max_mb)
    saved = save_bundle(bundle, config.out, files)
    print(f"model {saved.manifest.model_id}, published from {trained.manifest.model_id}: {note}", flush=True)
    return config.out


def probabilities(bundle: Bundle, frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.floating]:
    """Return what a model says of frames, uint8 [n, size, size]: calibrated probabilities [n, classes]."""
    logits = Classifier(bundle, device="cpu", engine="eager").answer(frames).logits
    return Classifier.calibrated(logits, bundle.manifest.calibration.temperature)


def _smaller(bundle: Bundle, frames: npt.NDArray[np.uint8], images: int) -> tuple[Bundle, str]:
    """Return the model with as many kernels in half precision as change little; and what was found, for a reader."""
    shown = f"{len(frames) - images} frames of noise" + (f" and {images} images" if images else "")
    before = probabilities(bundle, frames)

    def change(kernels: Sequence[str]) -> float:
        return float(np.abs(probabilities(bundle.in_half_precision(kernels), frames) - before).max())

    rounded = bundle.large_kernels
    worst = change(rounded)
    if worst > TOLERANCE:
        # Those stay as they are whose rounding alone changes most for the space that it saves.
        harm = {name: change([name]) / bundle.weights[name].numel() for name in rounded}
        rounded.sort(key=harm.__getitem__)
        while rounded and worst > TOLERANCE:
            rounded.pop()
            worst = change(rounded)
    if not rounded:
        _log.warning("half precision changes a probability by more than %g on %s: it stays single", TOLERANCE, shown)
        return bundle, "Weights are in single precision, as they were trained."
    return bundle.in_half_precision(rounded), (
        f"{len(rounded)} of {len(bundle.large_kernels)} large kernels are in half precision, chosen so that over "
        f"{shown} no probability differs by more than {TOLERANCE:g}; it differs by {worst:.1e} at most. The figures "
        "were measured in single precision."
    )


def _smaller_plot(png: bytes) -> bytes:
    """Return a plot at half the resolution, that of a plain screen, and in 128 colours, as they lie in the cube.

    A palette that follows the pixels' number gives thin lines, whose colour says what they are, that of another.
    """
    file = io.BytesIO()
    plot = Image.open(io.BytesIO(png)).convert("RGB").reduce(2)
    plot.quantize(128, Image.Quantize.FASTOCTREE).save(file, "png", optimize=True)
    return file.getvalue()


def _metrics(bundle: Bundle) -> Evaluation:
    body = read_file(bundle, "metrics.json")
    if body is None:
        raise UserError(
            f"{bundle.uri} has no metrics.json: nobody could tell how good it is; give the --out of a train"
        )
    return Evaluation.from_json(body)


def _frames_of(bundle: Bundle, data: str) -> npt.NDArray[np.uint8]:
    """Return the first frames, uint8 [n, size, size], of some of the labelled images of `data`, whatever their split.

    Raises UserError if not one of them can be read.
    """
    uris = read_labelled(data, least_classes=1, preprocess=bundle.manifest.preprocess)["uri"]
    chosen = np.random.default_rng(0).permutation(len(uris))[:_IMAGES]
    read = Classifier(bundle, device="cpu", engine="eager").frames(uris.take(np.sort(chosen)).to_pylist())
    frames = [scan[0] for scan in read if not isinstance(scan, Rejection)]
    if not frames:
        raise UserError(f"--data {data}: not one of {len(chosen)} images can be read")
    return np.stack(frames)


def _without_places(bundle: Bundle) -> Bundle:
    """Return the same model; of folders and URIs that its manifest names, only their last part is left."""
    manifest = bundle.manifest
    training: Any = _last_parts(manifest.training | dict.fromkeys(_PLACES & manifest.training.keys()))
    data = manifest.data.model_copy(update={"uri": _last_parts(manifest.data.uri)})
    return replace(bundle, manifest=manifest.model_copy(update={"training": training, "data": data}))


def _named_by_last_parts(parts: dict[str, Part] | None) -> dict[str, Part] | None:
    """Return the same figures; a source may be named by its place."""
    return parts and {str(_last_parts(name)): part for name, part in parts.items()}


def _last_parts(value: JsonValue) -> JsonValue:
    if isinstance(value, dict):
        return {name: _last_parts(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_last_parts(entry) for entry in value]
    return storage.name(value) if isinstance(value, str) and _PLACE.match(value) else value


def _require_small(contents: dict[str, bytes], max_mb: float) -> None:
    """Raise UserError if the files of a bundle are larger than `max_mb` MB together."""
    total = sum(map(len, contents.values()))
    if total > max_mb * 1e6:
        largest = sorted(contents, key=lambda name: -len(contents[name]))[:3]
        named = ", ".join(f"{name} {len(contents[name]) / 1e6:.1f}" for name in largest)
        raise UserError(f"the bundle would have {total / 1e6:.1f} MB ({named}), above --max-mb {max_mb:g}")
