"""A bundle in use, with no Ray in it: bytes, paths or arrays in, predictions out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from btray import storage
from btray.core.errors import UserError
from btray.data.frames import FrameSource, Rejection
from btray.data.preprocess import Frame, make_frame, to_tensor
from btray.model.abstention import label_sets
from btray.model.bundle import Bundle, Manifest, load_bundle
from btray.model.engines import EngineName, make_engine
from btray.model.ood import Distribution
from btray.model.prediction import Place, Prediction

_log = logging.getLogger(__name__)

_CPU_BATCH, _GPU_BATCH = 16, 64
"""Images a forward pass where nothing else is said. On a CPU the activations of more images than that no longer fit
what the C library keeps of freed memory, and every layer pays page faults for its output: 10 to 20 % of the time."""

Input = bytes | str | PathLike[str] | npt.NDArray[Any]


@dataclass(frozen=True)
class NetworkOutput:
    """What one forward pass gives for n frames."""

    logits: npt.NDArray[np.float32]
    """Raw outputs, [n, classes]."""
    features: npt.NDArray[np.float32]
    """Channel means of the feature maps, [n, features]: what the out-of-distribution score is made of."""


class Classifier:
    """Classifies scans with one bundle on one device. Thread-safe; `batch_size` halves where a GPU's memory is full."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        engine: EngineName = "eager",
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if batch_size is None:
            batch_size = _CPU_BATCH if self.device.type == "cpu" else _GPU_BATCH
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} must be at least 1")
        self.ood = bundle.ood
        self.manifest = bundle.manifest
        self.classes = bundle.manifest.classes
        self.model_id = bundle.manifest.model_id
        self.batch_size = batch_size
        self.source = FrameSource(bundle.manifest.preprocess)
        self.network = bundle.network().to(self.device).to(memory_format=torch.channels_last)
        self._engine = make_engine(engine, self.network, size=bundle.manifest.preprocess.size, device=self.device)

    @classmethod
    def load(
        cls,
        uri: str | PathLike[str],
        *,
        model_id: str | None = None,
        device: str | None = None,
        batch_size: int | None = None,
        abstain_below: float | None = None,
        engine: EngineName = "eager",
    ) -> Self:
        """Load and verify the bundle at `uri`; `model_id` pins which model is meant. Raises UserError.

        `abstain_below` replaces the bundle's own threshold. `engine` says how the network is run (see `engines`):
        `eager` starts at once, `auto` is faster over many scans.
        """
        bundle = load_bundle(str(uri), model_id=model_id).abstaining_below(abstain_below)
        return cls(bundle, device=device, batch_size=batch_size, engine=engine)

    def predict(self, inputs: Sequence[Input]) -> list[Prediction]:
        """Classify encoded images (bytes), paths or URIs (str, Path), or gray arrays ([height, width]).

        Gives one prediction a frame, in the order of the inputs; an input that cannot be used gives one with status
        `rejected`, never an exception. Raises UserError where the model, whatever the input, gives no numbers.
        """
        uris = [None if isinstance(given, bytes | np.ndarray) else str(given) for given in inputs]
        return self.predict_decoded(self.frames(inputs), uris)

    def predict_decoded(self, found: Sequence[list[Frame] | Rejection], uris: Sequence[str | None]) -> list[Prediction]:
        """Classify inputs whose frames, or the reason why there are none, are at hand; `uris` are their names."""
        places = [
            Place(index, number, uri)
            for index, (uri, frames) in enumerate(zip(uris, found, strict=True))
            for number in range(1 if isinstance(frames, Rejection) else len(frames))
        ]
        frames = [frame for frames in found if not isinstance(frames, Rejection) for frame in frames]
        answered = [place for place in places if not isinstance(found[place.index], Rejection)]
        answers = iter(self.interpret(self.answer(np.stack(frames)), answered) if frames else ())
        return [
            Prediction.of_rejection(rejection, place, self.model_id)
            if isinstance(rejection := found[place.index], Rejection)
            else next(answers)
            for place in places
        ]

    def answer(self, frames: npt.NDArray[np.uint8]) -> NetworkOutput:
        """What the network gives for preprocessed frames (uint8 [n, size, size])."""
        while True:
            try:
                passes = [self._forward(batch) for batch in torch.from_numpy(frames).split(self.batch_size)]
                return NetworkOutput(*(np.concatenate(parts) for parts in zip(*passes, strict=True)))
            except torch.OutOfMemoryError:  # of a GPU's memory, which others may share
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
                torch.cuda.empty_cache()
                _log.warning("the GPU's memory is full: going on with batches of %d", self.batch_size)

    def probabilities(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return calibrated probabilities [n, classes]. Raises UserError if the model gives no numbers."""
        return _probabilities(logits, self.manifest)

    @staticmethod
    def calibrated(logits: npt.NDArray[np.float32], temperature: float) -> npt.NDArray[np.float32]:
        """Softmax of logits [n, classes] divided by `temperature`; each row depends on itself alone."""
        return (torch.from_numpy(logits) / temperature).softmax(1).numpy()

    @torch.inference_mode()
    def _forward(self, frames: Tensor) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        images = to_tensor(frames.to(self.device)).contiguous(memory_format=torch.channels_last)
        logits, features = self._engine(images)
        return logits.float().cpu().numpy(), features.float().cpu().numpy()

    def frames(self, inputs: Sequence[Input]) -> list[list[Frame] | Rejection]:
        """Frames (uint8 [size, size]) of each input, or why there are none; stored ones are read together."""
        uris = [_uri(given) for given in inputs]
        stored = iter(self.source.from_uris([uri for uri in uris if isinstance(uri, str)]))
        found: list[list[Frame] | Rejection] = []
        for given, uri in zip(inputs, uris, strict=True):
            if isinstance(given, bytes):
                found.append(self.source.from_bytes(given))
            elif isinstance(given, np.ndarray):
                found.append(self._from_array(given))
            else:
                found.append(uri if isinstance(uri, Rejection) else next(stored))
        return found

    def _from_array(self, pixels: npt.NDArray[Any]) -> list[Frame] | Rejection:
        if pixels.ndim != 2:
            return Rejection("unsupported", f"an array of shape {pixels.shape} is not [height, width]", False)
        least = self.source.limits.min_side
        if min(pixels.shape) < least:
            return Rejection("too_small", f"{pixels.shape[1]}x{pixels.shape[0]} pixels, below min_side {least}", False)
        if pixels.dtype not in (np.uint8, np.uint16):
            if pixels.dtype.kind not in "biuf" or not np.isfinite(pixels).all():
                return Rejection("unsupported", f"{pixels.dtype} array with values that are no finite numbers", False)
            pixels = _spread_over_uint16(pixels)
        return [make_frame(pixels, self.manifest.preprocess)]

    def interpret(self, output: NetworkOutput, places: Sequence[Place]) -> list[Prediction]:
        """Return the predictions for frames that stand at `places`. Raises UserError if the model gives no numbers."""
        return interpret(output, places, self.manifest, self.ood)


def interpret(
    output: NetworkOutput, places: Sequence[Place], manifest: Manifest, distribution: Distribution | None
) -> list[Prediction]:
    """Return what a model says of the frames that stand at `places`: calibrated, and marked by its thresholds.

    `distribution` is that of its training images' features, if it has one. Raises UserError if the model gives no
    numbers.
    """
    if not places:
        return []
    thresholds, classes = manifest.thresholds, manifest.classes
    probabilities = _probabilities(output.logits, manifest)
    scores = distribution.scores(output.features).tolist() if distribution else [None] * len(places)
    conformal = thresholds.conformal
    sets = None if conformal is None else label_sets(probabilities, conformal)
    predictions = []
    for number, (place, row, score) in enumerate(zip(places, probabilities, scores, strict=True)):
        best = int(row.argmax())
        confidence = float(row[best])
        predictions.append(
            Prediction(
                **vars(place),
                label=classes[best],
                confidence=confidence,
                probabilities=dict(zip(classes, map(float, row), strict=True)),
                abstained=thresholds.abstain_below is not None and confidence < thresholds.abstain_below,
                label_set=() if sets is None else tuple(np.array(classes, object)[sets[number]]),
                out_of_distribution=None not in (score, thresholds.ood_score) and score > thresholds.ood_score,
                ood_score=score,
                model_id=manifest.model_id,
            )
        )
    return predictions


def _probabilities(logits: npt.NDArray[np.float32], manifest: Manifest) -> npt.NDArray[np.float32]:
    probabilities = Classifier.calibrated(logits, manifest.calibration.temperature)
    if not np.isfinite(probabilities).all():
        raise UserError(
            f"model {manifest.model_id} gives no finite probabilities: its training diverged; train it again"
        )
    return probabilities


def _uri(given: object) -> str | Rejection | None:
    """Where a path or URI points to; None for what is at hand already."""
    if isinstance(given, bytes | np.ndarray):
        return None
    if not isinstance(given, str | PathLike):
        return Rejection("unsupported", f"{type(given).__name__} is neither bytes, path nor array", False)
    try:
        return storage.resolve(given if isinstance(given, str) else Path(given))
    except UserError as error:
        return Rejection("unsupported", str(error), False)


def _spread_over_uint16(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Map the range of `pixels` to 0 to 65535; preprocessing stretches gray levels anyway, so no unit is lost by it."""
    wide = pixels.astype(np.float64)
    wide /= max(1.0, float(np.abs(wide).max()))  # so that the range of the largest doubles stays finite
    low, high = float(wide.min()), float(wide.max())
    return ((wide - low) * (65535.0 / (high - low or 1.0))).astype(np.uint16)
