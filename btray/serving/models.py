"""The bundles that a service answers with: loaded, verified and warmed before they take over, and never half."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal, Self, TypeVar

import numpy as np
from pydantic import ConfigDict, Field, ValidationError

from btray import storage
from btray.core.cluster import given_cpus, own_device
from btray.core.errors import UserError
from btray.data.frames import Frames, FrameSource, Rejection
from btray.data.preprocess import Frame
from btray.data.scans import ScanLimits, count_pages
from btray.explain import Heat, heat_maps
from btray.model.bundle import Bundle, load_bundle
from btray.model.bundle_files import read_manifest
from btray.model.classifier import Classifier, interpret
from btray.model.prediction import Prediction
from btray.model.promotion import pinned
from btray.model.shipped import locate
from btray.serving.access import KeyRing
from btray.serving.batching import Batcher, SharedThread
from btray.serving.config import CanaryConfig, ServiceConfig
from btray.serving.metrics import Metrics
from btray.serving.problems import Answer, Problem
from btray.storage import StorageError
from btray.storage.retry import backoff_delays

_log = logging.getLogger(__name__)

# Decoded in a few milliseconds.
_SMALL = ScanLimits(max_bytes=2**18, max_pixels=2**20)

# Seconds between attempts at a bundle whose store is unavailable.
_FIRST_PAUSE = 2.0
_LONGEST_PAUSE = 60.0

DecodedImage = Frames | Rejection
"""The frames of one image, or why there are none."""


class Accuracy(Answer):
    """An accuracy, read from metrics.json or a part of it."""

    value: float | None = Field(validation_alias="accuracy")
    """None if it was measured on no image."""
    ci95: list[float] | None = Field(None, validation_alias="accuracy_ci95")
    """Its 95 % interval."""
    images: int | None = Field(None, validation_alias="n")
    """The number of images that it was measured on."""

    @classmethod
    def of(cls, metrics: Any) -> Self | None:
        """Return the accuracy of `metrics`; None if there is none."""
        with suppress(ValidationError):  # metrics.json is not part of what a bundle's digests cover
            accuracy = cls.model_validate(metrics)
            return accuracy if accuracy.images != 0 else accuracy.model_copy(update={"value": None})
        return None


class ModelFacts(Answer):
    """A bundle, as `GET /v1/models` describes it."""

    model_config = ConfigDict(frozen=True)

    model_id: str
    classes: list[str]
    created_at: str
    frame_size: int
    """Height and width, in pixels, of what the network sees."""
    abstain_below: float | None
    """Confidence below which the model abstains."""
    detects_out_of_distribution: bool
    accuracy: Accuracy | None
    """On all test images, as published."""
    clean_accuracy: Accuracy | None
    """On the test images without a twin in the training data."""
    measured_on: str | None
    """The data that the accuracy was measured on."""

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        """Return the facts of `bundle`; without a readable metrics.json there is no accuracy."""
        manifest = bundle.manifest
        content = None
        with suppress(StorageError):
            content = storage.read_json(storage.join(bundle.uri, "metrics.json"))
        metrics = content if isinstance(content, dict) else {}
        measured_on = metrics.get("measured_on")
        return cls(
            model_id=manifest.model_id,
            classes=list(manifest.classes),
            created_at=manifest.created_at,
            frame_size=manifest.preprocess.size,
            abstain_below=manifest.thresholds.abstain_below,
            detects_out_of_distribution=bundle.ood is not None and manifest.thresholds.ood_score is not None,
            accuracy=Accuracy.of(metrics),
            clean_accuracy=Accuracy.of(metrics.get("clean")),
            measured_on=None if measured_on is None else str(measured_on),
        )


class SwitchReport(Answer):
    """The outcome of the latest switch to another config."""

    model_config = ConfigDict(frozen=True)

    state: Literal["loading", "refused", "done"]
    detail: str = ""
    """Why the config was refused, or what it waits for."""


@dataclass(frozen=True)
class ServedModel:
    """One bundle in use."""

    classifier: Classifier
    source: FrameSource
    """Decodes with the service's limits."""
    batcher: Batcher[Sequence[DecodedImage], list[Prediction]]
    facts: ModelFacts
    settings: tuple[object, ...] = ()
    """What it was loaded by: a config with the same needs no other."""

    @property
    def model_id(self) -> str:
        """Its name in every answer."""
        return self.classifier.model_id

    async def predict(self, images: Sequence[DecodedImage]) -> list[Prediction]:
        """Return what `Classifier.predict` says of decoded images, in batches with those of other requests.

        More frames than a batch holds are split, and each part waits for its turn again: others come between, and a
        request that is cancelled takes what is left of it along.
        """
        # Image, frame within it, and that frame alone, or the reason why there is none.
        numbered: list[tuple[int, int, DecodedImage]] = []
        for index, image in enumerate(images):
            single: list[DecodedImage] = [image]
            if not isinstance(image, Rejection):
                single = [image.part(number, number + 1) for number in range(len(image))]
            numbered += [(index, number, piece) for number, piece in enumerate(single)]
        predictions = []
        for start in range(0, len(numbered), self.batcher.largest):
            part = numbered[start : start + self.batcher.largest]
            pieces = [piece for _, _, piece in part]
            if all(isinstance(piece, Rejection) for piece in pieces):  # which need no turn
                answers = self.classifier.predict_decoded(pieces, [None] * len(pieces))
            else:
                answers = await self.batcher.submit(pieces)
            predictions += [
                replace(prediction, index=index, frame=number)
                for prediction, (index, number, _) in zip(answers, part, strict=True)
            ]
        return predictions

    async def at_once(self, image: bytes) -> tuple[Frames, list[Prediction]] | None:
        """Return the frame and the prediction of one small image, decoded where it is classified.

        None if it is not small, cannot be read or has several pages, or if the model is at work: others must not wait
        for a decoder. Each change of thread costs a lone caller about half a millisecond, most of it in caches that
        have gone cold.
        """
        if len(image) > _SMALL.max_bytes or not self.batcher.idle or count_pages(image) > 1:
            return None
        limits = replace(_SMALL, max_pixels=min(_SMALL.max_pixels, self.source.limits.max_pixels))

        def decode_and_predict() -> tuple[Frames, list[Prediction]] | None:
            frames = replace(self.source, limits=limits).from_bytes(image)
            if isinstance(frames, Rejection) or len(frames) != 1:  # of gzip, the pages counted are the first member's
                return None
            return frames, self.classifier.predict_decoded([frames], [None])

        return await self.batcher.alone(decode_and_predict)

    async def explain(self, frames: Sequence[Frame], labels: Sequence[str]) -> Heat:
        """Return heat maps [n, size, size] of frames and labels, one each; in parts, as `predict`."""
        size, loop, heats = self.batcher.largest, asyncio.get_running_loop(), []
        for start in range(0, len(frames), size):
            part = slice(start, start + size)
            draw = partial(heat_maps, self.classifier, np.stack(frames[part]), labels[part])
            heats.append(await loop.run_in_executor(self.batcher.thread, draw))
        return np.concatenate(heats)


@dataclass(frozen=True)
class TrafficSplit:
    """The models served at one moment, and their shares; a switch replaces it whole."""

    config: ServiceConfig
    decoders: Executor
    """Images are decoded on its threads, which end once nobody holds the split."""
    keys: KeyRing | None
    models: list[ServedModel]
    """The main model, then the canary if there is one."""

    @property
    def shares(self) -> list[float]:
        """Return the share of the requests that each of `models` answers."""
        share = self.config.canary.share if self.config.canary else 0.0
        return [1 - share, share][: len(self.models)]

    def choose(self, version: str | None = None) -> ServedModel:
        """Return the model of one request: `version` (a model_id) if it is given, else by share.

        Raises Problem if that version is not served.
        """
        if version is None:
            return random.choices(self.models, self.shares)[0]  # noqa: S311 - no secret
        for model in self.models:
            if model.model_id == version:
                return model
        served = ", ".join(model.model_id for model in self.models)
        raise Problem(404, "not_found", f"no version {version[:80]!r} is served; there are {served}")


class ConfigStore:
    """Says which models a config means, and keeps what was served. This one is of a service with a single process."""

    def pin(self, config: ServiceConfig) -> ServiceConfig:
        """Return `config` with the bundles and ids of the models that it means now. Raises UserError."""
        canary = _pinned(config.canary) if config.canary else None
        return _pinned(config).model_copy(update={"canary": canary})

    def keep(self, config: ServiceConfig) -> None:
        """Keep `config`, which is pinned and loaded, as what is served."""


Entry = TypeVar("Entry", ServiceConfig, CanaryConfig)


def _pinned(entry: Entry) -> Entry:
    entry = pinned(entry)
    model_id = entry.model_id or read_manifest(locate(entry.model)).model_id
    return entry.model_copy(update={"model_id": model_id})


class ServedModels:
    """Loads what a config names, in threads, and switches to it once it is ready."""

    def __init__(self, thread: SharedThread, metrics: Metrics, configs: ConfigStore) -> None:
        """Start without a model; forward passes run on `thread` and are counted in `metrics`."""
        self.thread = thread
        self.metrics = metrics
        self.configs = configs
        self.split: TrafficSplit | None = None
        self.switch: SwitchReport | None = None
        self._latest = 0  # configs so far: the outcome of any but the last one is not reported
        self._pending: tuple[int, ServiceConfig] | None = None
        self._changed = asyncio.Event()
        self._switching: asyncio.Task[None] | None = None

    async def configure(self, config: ServiceConfig, *, kept: bool = False) -> None:
        """Serve `config`, keys and limits and all. The first one is waited for, and raises UserError if it is bad.

        A later one takes over once it is ready, without this call waiting for it; if it is bad the one before it
        stays and `switch` says why, and while its store is unavailable it is tried again. One that was `kept` by
        `ConfigStore` is taken as it is, and is not the config that was read last.
        """
        self._latest += 1
        if self.split is None:
            load = self._load_pinned if kept else self._load
            self._take_over(self._latest, await asyncio.to_thread(load, config))
            return
        self._pending = self._latest, config
        self._changed.set()
        self._report(self._latest, "loading", config.model)
        if self._switching is None or self._switching.done():
            self._switching = asyncio.create_task(self._switch())

    def refuse(self, model: str, error: Exception) -> None:
        """Report why the config that names `model`, the latest one, is not served."""
        self._latest += 1
        self._changed.set()
        self._report_refusal(self._latest, model, error)

    async def _switch(self) -> None:
        while self._pending is not None:
            (number, config), self._pending = self._pending, None
            self._changed.clear()
            try:
                self._take_over(number, await self._load_patiently(number, config))
            except Exception as error:
                self._report_refusal(number, config.model, error)

    def _take_over(self, number: int, split: TrafficSplit) -> None:
        self.split = split
        self._report(number, "done", split.config.model)

    async def _load_patiently(self, number: int, config: ServiceConfig) -> TrafficSplit:
        """`_load`, again while a store is unavailable and no other config comes: Serve will not ask for it twice."""
        pauses = backoff_delays(math.inf, first=_FIRST_PAUSE, longest=_LONGEST_PAUSE)
        while True:
            try:
                return await asyncio.to_thread(self._load, config)
            except StorageError as error:
                if not error.retryable:
                    raise
                self._report(number, "loading", config.model, f"{error}; it is tried again")
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), next(pauses))
                if number != self._latest:
                    raise

    def _report_refusal(self, number: int, model: str, error: Exception) -> None:
        if not isinstance(error, UserError):
            _log.error("loading %s failed", model, exc_info=error)
        self._report(number, "refused", model, str(error))

    def _report(self, number: int, state: Literal["loading", "refused", "done"], model: str, reason: str = "") -> None:
        if number == self._latest:
            self.switch = SwitchReport(state=state, detail=reason)
        level = logging.WARNING if reason else logging.INFO
        _log.log(level, "bundle %s: %s%s", model, state, reason and f": {reason}; the one before it continues to serve")

    def _load(self, config: ServiceConfig) -> TrafficSplit:
        config.require_archive()
        return self._load_pinned(self.configs.pin(config))

    def _load_pinned(self, config: ServiceConfig) -> TrafficSplit:
        keys = KeyRing.of(config.keys) if config.keys is not None else None
        models = [self._served(entry.model, entry.model_id, config) for entry in (config, config.canary) if entry]
        self.configs.keep(config)
        decoders = config.decoders or max(2, math.ceil(given_cpus()))
        return TrafficSplit(config, ThreadPoolExecutor(decoders, "decode"), keys, models)

    def _served(self, uri: str, model_id: str | None, config: ServiceConfig) -> ServedModel:
        """Return the model of a bundle; one that is served already is kept, with the new limits."""
        settings = (uri, model_id, config.abstain_below, config.max_batch, config.engine, config.precision)
        most = int(config.limits.max_megapixels * 1e6)
        limits = ScanLimits(max_bytes=config.limits.max_body, max_pixels=most, max_volume_pixels=most)
        for model in self.split.models if self.split else ():
            if model.settings == settings:
                return replace(model, source=replace(model.source, limits=limits))
        bundle = load_bundle(uri, model_id=model_id).abstaining_below(config.abstain_below)
        classifier = Classifier(
            bundle,
            device=own_device(),
            batch_size=config.max_batch,
            engine=config.engine,
            precision=config.precision,
        )
        _warm(classifier, config.max_batch)
        batcher: Batcher[Sequence[DecodedImage], list[Prediction]] = Batcher(
            partial(_predict, classifier),
            self.thread,
            largest=config.max_batch,
            weight=len,  # each is a single frame, or a rejection
            watch=self.metrics.batch,
        )
        source = replace(classifier.source, limits=limits)
        return ServedModel(classifier, source, batcher, ModelFacts.of(bundle), settings)


def _predict(classifier: Classifier, requests: Sequence[Sequence[DecodedImage]]) -> list[list[Prediction]]:
    """Return the predictions of each request: one for each of its images, which have one frame at most."""
    images = [image for request in requests for image in request]
    answers = iter(classifier.predict_decoded(images, [None] * len(images)))
    return [list(islice(answers, len(request))) for request in requests]


def _warm(classifier: Classifier, largest: int) -> None:
    """Run what requests will run, so that the first ones are as quick as the others. Raises UserError for NaN."""
    side = classifier.manifest.preprocess.size
    for count in (1, largest, 1, largest):  # a frozen graph is made ready at its second pass
        frames = np.zeros((count, side, side), np.uint8)
        interpret(classifier.answer(frames), classifier.manifest, None)
