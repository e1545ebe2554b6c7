"""A bundle in use, with no Ray in it: bytes, paths or arrays in, predictions out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from btray import storage
from btray.core.allocator import keep_freed_memory
from btray.core.errors import UserError
from btray.data.frames import Frames, FrameSource, Rejection
from btray.data.preprocess import make_frame, to_tensor
from btray.data.scans.gray import to_uint16
from btray.model.abstention import label_sets
from btray.model.bundle import Bundle, load_bundle
from btray.model.config import EngineName, Precision, default_batch_size
from btray.model.engines import make_engine
from btray.model.manifest import Manifest, require_agreement
from btray.model.network import Network
from btray.model.ood import Distribution
from btray.model.prediction import Answer, Prediction, facts_of
from btray.model.shipped import SHIPPED

_log = logging.getLogger(__name__)

Input = bytes | str | PathLike[str] | npt.NDArray[Any]


@dataclass(frozen=True)
class NetworkOutput:
    """What the network gives for n frames."""

    logits: npt.NDArray[np.float32]
    """Raw outputs, [n, classes]."""
    features: npt.NDArray[np.float32]
    """Channel means of the feature maps, [n, features]: what the out-of-distribution score is made of."""


class Classifier:
    """Classifies scans with one bundle on one device. Thread-safe; `batch_size` halves if a GPU's memory is full."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        engine: EngineName = "auto",
        precision: Precision = "float32",
    ) -> None:
        """Put the network of `bundle` on `device`; the arguments are those of `load`."""
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if batch_size is None:
            batch_size = default_batch_size(gpu=self.device.type != "cpu")
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} must be at least 1")
        if bundle.uri:  # else it is being made, and how far it agrees is being measured
            require_agreement(bundle.manifest, bundle.uri, precision)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.ood = bundle.ood
        self.manifest = bundle.manifest
        self.classes = bundle.manifest.classes
        self.model_id = bundle.manifest.model_id
        self.batch_size = batch_size
        self.source = FrameSource(bundle.manifest.preprocess)
        self._bundle = bundle
        size = bundle.manifest.preprocess.size
        self._engine = make_engine(engine, self._build_network(), size=size, device=self.device, precision=precision)

    @property
    def engine(self) -> str:
        """How the network is run, and in which precision: `frozen float32`."""
        return self._engine.name

    @cached_property
    def network(self) -> Network:
        """The network as it was trained, built when it is first asked for: Grad-CAM needs it, answers do not."""
        return self._build_network()

    def _build_network(self) -> Network:
        return self._bundle.network().to(self.device).to(memory_format=torch.channels_last)

    @classmethod
    def load(
        cls,
        uri: str | PathLike[str] = SHIPPED,
        *,
        model_id: str | None = None,
        device: str | None = None,
        batch_size: int | None = None,
        abstain_below: float | None = None,
        engine: EngineName = "auto",
        precision: Precision = "float32",
    ) -> Self:
        """Load and verify a bundle. Raises UserError.

        Args:
            uri: the bundle, local or s3://; by default the one that ships with btray.
            model_id: refuse any other model.
            device: `cpu` or `cuda`; by default a GPU if there is one.
            batch_size: images per forward pass; by default as many as suit the device.
            abstain_below: replaces the bundle's own threshold.
            engine: how the network is run, see `engines`; `auto`: a frozen graph on a CPU, eager elsewhere.
            precision: in what it computes; `bf16` takes less time on CPUs with AVX512_BF16 or AMX and on GPUs.
        """
        bundle = load_bundle(str(uri), model_id=model_id).abstaining_below(abstain_below)
        return cls(bundle, device=device, batch_size=batch_size, engine=engine, precision=precision)

    def predict(self, inputs: Sequence[Input]) -> list[Prediction]:
        """Classify encoded images (bytes), paths or URIs (str, Path), or gray arrays ([height, width]).

        Returns one prediction per frame, in the order of the inputs; an input that cannot be used gives one with status
        `rejected`, never an exception. Raises UserError if the model gives no numbers, whatever the input.
        """
        uris = [None if isinstance(given, bytes | np.ndarray) else str(given) for given in inputs]
        return self.predict_decoded(self.frames(inputs), uris)

    def predict_decoded(self, scans: Sequence[Frames | Rejection], uris: Sequence[str | None]) -> list[Prediction]:
        """Classify inputs whose frames, or the reason why there are none, are at hand; `uris` are their names."""
        frames = [frame for scan in scans if not isinstance(scan, Rejection) for frame in scan]
        answers = iter(interpret(self.answer(np.stack(frames)), self.manifest, self.ood) if frames else ())
        predictions = []
        for index, (scan, uri) in enumerate(zip(scans, uris, strict=True)):
            if isinstance(scan, Rejection):
                predictions.append(Prediction.of_rejection(scan, index=index, uri=uri, model_id=self.model_id))
                continue
            predictions += [
                Prediction(
                    index=index,
                    uri=uri,
                    frame=frame,
                    engine=self.engine,
                    model_id=self.model_id,
                    **vars(next(answers)),
                    **facts_of(scan.info(frame)),
                )
                for frame in range(len(scan))
            ]
        return predictions

    def answer(self, frames: npt.NDArray[np.uint8]) -> NetworkOutput:
        """Run the network over preprocessed frames, uint8 [n, size, size], in batches."""
        images = torch.from_numpy(frames)
        if self.device.type == "cuda":
            images = images.pin_memory()  # so that their copies do not wait for what the GPU still computes
        while True:
            try:
                passes = [self._forward(batch) for batch in images.split(self.batch_size)]
                return NetworkOutput(*(torch.cat(parts).cpu().numpy() for parts in zip(*passes, strict=True)))
            except torch.OutOfMemoryError:  # of a GPU's memory, which others may share
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
                torch.cuda.empty_cache()
                _log.warning("the GPU's memory is full: continuing with batches of %d", self.batch_size)

    @torch.inference_mode()
    def _forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and features on the device: nothing waits for them before all batches are on their way."""
        images = frames.to(self.device, non_blocking=True)
        return self._engine(to_tensor(images).contiguous(memory_format=torch.channels_last))

    @staticmethod
    def calibrated(logits: npt.NDArray[np.float32], temperature: float) -> npt.NDArray[np.float32]:
        """Return the softmax of logits [n, classes] divided by `temperature`; each row depends on itself alone."""
        return (torch.from_numpy(logits) / temperature).softmax(1).numpy()

    def frames(self, inputs: Sequence[Input]) -> list[Frames | Rejection]:
        """Return the frames, uint8 [size, size], of each input, or why there are none; reads stored ones together."""
        scans = [self._frames_or_uri(given) for given in inputs]
        stored = iter(self.source.from_uris([scan for scan in scans if isinstance(scan, str)]))
        return [next(stored) if isinstance(scan, str) else scan for scan in scans]

    def _frames_or_uri(self, given: object) -> Frames | Rejection | str:
        """Return the frames of an input that is at hand, the URI of a stored one, or why it is neither."""
        if isinstance(given, bytes):
            return self.source.from_bytes(given)
        if isinstance(given, np.ndarray):
            return self._from_array(given)
        if not isinstance(given, str | PathLike):
            return Rejection("unsupported", f"{type(given).__name__} is neither bytes, path nor array", False)
        try:
            return storage.resolve(given if isinstance(given, str) else Path(given))
        except UserError as error:
            return Rejection("unsupported", str(error), False)

    def _from_array(self, pixels: npt.NDArray[Any]) -> Frames | Rejection:
        if pixels.ndim != 2:
            return Rejection("unsupported", f"an array of shape {pixels.shape} is not [height, width]", False)
        least = self.source.limits.min_side
        if min(pixels.shape) < least:
            return Rejection("too_small", f"{pixels.shape[1]}x{pixels.shape[0]} pixels, below min_side {least}", False)
        if pixels.dtype not in (np.uint8, np.uint16):
            if pixels.dtype.kind not in "biuf" or not np.isfinite(pixels).all():
                return Rejection("unsupported", f"{pixels.dtype} array with values that are not finite numbers", False)
            pixels = to_uint16(pixels)  # preprocessing stretches gray levels anyway: no unit is lost
        return Frames([make_frame(pixels, self.manifest.preprocess)])


def interpret(output: NetworkOutput, manifest: Manifest, distribution: Distribution | None) -> list[Answer]:
    """Return what a model says of n frames: probabilities calibrated, answers marked by its thresholds.

    `distribution` is that of its training images' features, if it has one. Raises UserError if the model gives no
    numbers.
    """
    if len(output.logits) == 0:
        return []
    thresholds, classes = manifest.thresholds, manifest.classes
    probabilities = Classifier.calibrated(output.logits, manifest.calibration.temperature)
    if not np.isfinite(probabilities).all():
        raise UserError(
            f"model {manifest.model_id} gives no finite probabilities: its training diverged; train it again"
        )
    scores = distribution.scores(output.features).tolist() if distribution else [None] * len(probabilities)
    sets = None if thresholds.conformal is None else label_sets(probabilities, thresholds.conformal)
    answers = []
    for number, (row, score) in enumerate(zip(probabilities, scores, strict=True)):
        best = int(row.argmax())
        confidence = float(row[best])
        answers.append(
            Answer(
                label=classes[best],
                confidence=confidence,
                probabilities=dict(zip(classes, map(float, row), strict=True)),
                abstained=thresholds.abstain_below is not None and confidence < thresholds.abstain_below,
                label_set=() if sets is None else tuple(np.array(classes, object)[sets[number]]),
                out_of_distribution=None not in (score, thresholds.ood_score) and score > thresholds.ood_score,
                ood_score=score,
            )
        )
    return answers
