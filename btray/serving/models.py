"""The bundles that a service answers with: loaded, verified and warmed before they take over, and never half."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from btray import storage
from btray.core.cluster import own_device
from btray.core.errors import UserError
from btray.data.frames import FrameSource, Rejection
from btray.data.preprocess import Frame
from btray.data.scans import ScanLimits, count_pages
from btray.explain import Heat, heat_maps
from btray.model.bundle import Bundle, load_bundle
from btray.model.classifier import Classifier
from btray.model.prediction import Prediction
from btray.serving.batching import Batcher
from btray.serving.config import CanaryConfig, LimitsConfig, ServiceConfig
from btray.serving.metrics import Metrics
from btray.serving.problems import Problem
from btray.storage import StorageError

_log = logging.getLogger(__name__)

# What is decoded in a few milliseconds.
_SMALL = ScanLimits(max_bytes=2**18, max_pixels=2**20)

# Seconds between attempts at a bundle whose store is away.
_FIRST_PAUSE = 2.0
_LONGEST_PAUSE = 60.0

Prepare = Callable[[], Callable[[], None]]

Found = list[Frame] | Rejection
"""The frames of one image, or why there are none."""


@dataclass(frozen=True)
class ServedModel:
    """One bundle in use."""

    classifier: Classifier
    source: FrameSource
    """Decodes with the service's limits."""
    batcher: Batcher[Sequence[Found], list[Prediction]]
    facts: dict[str, Any]
    """What `GET /v1/models` says of it."""

    @property
    def model_id(self) -> str:
        """Its name in every answer."""
        return self.classifier.model_id

    async def predict(self, found: Sequence[Found]) -> list[Prediction]:
        """What `Classifier.predict` says of decoded images, in batches with those of other requests.

        More frames than a batch holds are cut up, and each part waits for its turn again: others come between, and a
        request that is given up takes what is left of it along.
        """
        predictions = []
        for part in _parts(found, self.batcher.largest):
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

    async def at_once(self, image: bytes) -> tuple[list[Frame], list[Prediction]] | None:
        """The frame and the prediction of one small image, decoded where it is classified; None where it is not small,
        cannot be read or has several pages, or where the model is at work: others are not to wait for a decoder.

        Each change of thread costs a lone caller about half a millisecond, most of it in caches that have gone cold.
        """
        if len(image) > _SMALL.max_bytes or not self.batcher.idle or count_pages(image) > 1:
            return None
        return await self.batcher.alone(partial(self._decode_and_predict, image))

    def _decode_and_predict(self, image: bytes) -> tuple[list[Frame], list[Prediction]] | None:
        limits = replace(_SMALL, max_pixels=min(_SMALL.max_pixels, self.source.limits.max_pixels))
        frames = replace(self.source, limits=limits).from_bytes(image)
        if isinstance(frames, Rejection):
            return None
        return frames, self.classifier.predict_decoded([frames], [None])

    async def explain(self, frames: Sequence[Frame], labels: Sequence[str]) -> Heat:
        """Heat maps [n, size, size] of frames and labels, one each; in parts, as `predict`."""
        size, loop, heats = self.batcher.largest, asyncio.get_running_loop(), []
        for start in range(0, len(frames), size):
            part = slice(start, start + size)
            drawing = partial(heat_maps, self.classifier, np.stack(frames[part]), labels[part])
            heats.append(await loop.run_in_executor(self.batcher.executor, drawing))
        return np.concatenate(heats)


@dataclass(frozen=True)
class TrafficSplit:
    """What is served at one moment; a switch replaces it whole."""

    config: ServiceConfig
    main: ServedModel
    canary: ServedModel | None = None

    def models(self) -> list[ServedModel]:
        """The main model, then the canary."""
        return [self.main, *([self.canary] if self.canary else [])]

    def choose(self, version: str | None = None) -> ServedModel:
        """The model of one request: `version` (a model_id) where it is given, else by share.

        Raises Problem where that version is not served.
        """
        if version is not None:
            for model in self.models():
                if model.model_id == version:
                    return model
            served = ", ".join(model.model_id for model in self.models())
            raise Problem(404, "not_found", f"no version {version[:80]!r} is served; there are {served}")
        share = self.config.canary.share if self.config.canary else 0.0
        return self.canary if self.canary and random.random() < share else self.main  # noqa: S311 - no secret


class ServedModels:
    """Loads what a config names, in threads, and switches to it once it is ready."""

    def __init__(self, executor: Executor, metrics: Metrics) -> None:
        self.executor = executor
        self.metrics = metrics
        self.line: TrafficSplit | None = None
        self.switch: dict[str, str] | None = None
        """What became of the latest switch: `state` loading, refused or done, and `detail`."""
        self._asked = 0  # configs so far; what becomes of any but the last one is no news
        self._wanted: tuple[int, ServiceConfig, Prepare] | None = None
        self._news = asyncio.Event()
        self._switching: asyncio.Task[None] | None = None

    async def configure(self, config: ServiceConfig, prepare: Prepare) -> None:
        """Serve `config`. The first one is waited for, and raises UserError where a bundle is bad.

        A later one takes over once it is ready, without this call waiting for it; where it is bad the one before it
        stays and `switch` says why, and while its store is away it is tried again. `prepare` reads what else belongs to
        the config, in the thread that loads it, and gives what is to be called when the config takes over.
        """
        self._asked += 1
        if self.line is None:
            taken, line = await asyncio.to_thread(self._prepared, config, prepare)
            taken()
            self.line = line
            self._report(self._asked, "done", config.model)
            return
        self._wanted = self._asked, config, prepare
        self._news.set()
        self._report(self._asked, "loading", config.model)
        if self._switching is None or self._switching.done():
            self._switching = asyncio.create_task(self._switch())

    def refuse(self, model: str, error: Exception) -> None:
        """Say why the config that names `model`, the latest one, is not served."""
        self._asked += 1
        self._news.set()
        self._refused(self._asked, model, error)

    async def _switch(self) -> None:
        while self._wanted is not None:
            (number, config, prepare), self._wanted = self._wanted, None
            self._news.clear()
            try:
                taken, line = await self._patiently(number, config, prepare)
            except Exception as error:
                self._refused(number, config.model, error)
            else:
                taken()
                self.line = line
                self._report(number, "done", config.model)

    async def _patiently(
        self, number: int, config: ServiceConfig, prepare: Prepare
    ) -> tuple[Callable[[], None], TrafficSplit]:
        """`_prepared`, again while a store is away and no other config comes: Serve will not ask for it twice."""
        pause = _FIRST_PAUSE
        while True:
            try:
                return await asyncio.to_thread(self._prepared, config, prepare)
            except UserError as error:
                if not is_retryable(error):
                    raise
                self._report(number, "loading", config.model, f"{error}; it is tried again")
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), pause)
                if number != self._asked:
                    raise
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _refused(self, number: int, model: str, error: Exception) -> None:
        if not isinstance(error, UserError):
            _log.error("loading %s failed", model, exc_info=error)
        self._report(number, "refused", model, str(error))

    def _report(self, number: int, state: str, model: str, why: str = "") -> None:
        if number == self._asked:
            self.switch = {"state": state, "detail": why}
        level = logging.WARNING if why else logging.INFO
        _log.log(level, "bundle %s: %s%s", model, state, why and f": {why}; the one before it goes on serving")

    def _prepared(self, config: ServiceConfig, prepare: Prepare) -> tuple[Callable[[], None], TrafficSplit]:
        return prepare(), self._load(config, self.line)

    def _load(self, config: ServiceConfig, now: TrafficSplit | None) -> TrafficSplit:
        main = self._served(CanaryConfig(model=config.model, model_id=config.model_id), config, now)
        return TrafficSplit(config, main, self._served(config.canary, config, now) if config.canary else None)

    def _served(self, wanted: CanaryConfig, config: ServiceConfig, now: TrafficSplit | None) -> ServedModel:
        """The model of a bundle; one that is served already is taken over, with the new limits."""
        for model, named in _named(now):
            if (named.model, named.model_id) == (wanted.model, wanted.model_id) and _alike(config, now):
                return replace(model, source=_source(model.classifier, config.limits))
        bundle = load_bundle(wanted.model, model_id=wanted.model_id).abstaining_below(config.abstain_below)
        classifier = Classifier(bundle, device=own_device(), batch_size=config.max_batch, engine=config.engine)
        _warm(classifier, config.max_batch)
        batcher: Batcher[Sequence[Found], list[Prediction]] = Batcher(
            lambda works: _predict(classifier, works),
            self.executor,
            largest=config.max_batch,
            weight=_frames_in,
            watch=self.metrics.batch,
        )
        return ServedModel(classifier, _source(classifier, config.limits), batcher, _facts(bundle))


def is_retryable(error: Exception) -> bool:
    """Whether what stands behind an error is a store that is away."""
    return isinstance(error.__cause__, StorageError) and error.__cause__.retryable


def _named(now: TrafficSplit | None) -> list[tuple[ServedModel, CanaryConfig]]:
    if now is None:
        return []
    named = [(now.main, CanaryConfig(model=now.config.model, model_id=now.config.model_id))]
    return [*named, *([(now.canary, now.config.canary)] if now.canary and now.config.canary else [])]


def _alike(config: ServiceConfig, now: TrafficSplit | None) -> bool:
    """Whether a loaded model answers to `config` as one that is loaded anew."""
    names = ("abstain_below", "max_batch", "engine")
    return now is not None and all(getattr(config, name) == getattr(now.config, name) for name in names)


def _source(classifier: Classifier, limits: LimitsConfig) -> FrameSource:
    bounds = ScanLimits(max_bytes=limits.max_body, max_pixels=int(limits.max_megapixels * 1e6))
    return replace(classifier.source, limits=bounds)


def _parts(found: Sequence[Found], largest: int) -> Iterator[Sequence[tuple[int, int, Found]]]:
    """Number of the image, number of the frame within it, and the frame or rejection; at most `largest` a part."""
    pieces: list[tuple[int, int, Found]] = []
    for index, result in enumerate(found):
        alone: list[Found] = [result] if isinstance(result, Rejection) else [[frame] for frame in result]
        pieces += [(index, number, piece) for number, piece in enumerate(alone)]
    return (pieces[start : start + largest] for start in range(0, len(pieces), largest))


def _frames_in(found: Sequence[Found]) -> int:
    return sum(1 if isinstance(result, Rejection) else len(result) for result in found)


def _predict(classifier: Classifier, works: Sequence[Sequence[Found]]) -> list[list[Prediction]]:
    """The predictions of each request, indexed within it."""
    every = [result for work in works for result in work]
    starts = np.cumsum([0, *(len(work) for work in works)]).tolist()
    answers: list[list[Prediction]] = [[] for _ in works]
    owner = [number for number, work in enumerate(works) for _ in work]
    for prediction in classifier.predict_decoded(every, [None] * len(every)):
        number = owner[prediction.index]
        answers[number].append(replace(prediction, index=prediction.index - starts[number]))
    return answers


def _warm(classifier: Classifier, largest: int) -> None:
    """Run what requests will run, so that the first ones are as quick as the others. Raises UserError for NaN."""
    side = classifier.manifest.preprocess.size
    for count in (1, largest, 1, largest):  # a frozen graph is made ready at its second pass
        frames = np.zeros((count, side, side), np.uint8)
        classifier.probabilities(classifier.answer(frames).logits)
    heat_maps(classifier, frames[:1])


def _facts(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    metrics = _metrics(bundle)
    return {
        "model_id": manifest.model_id,
        "classes": list(manifest.classes),
        "created_at": manifest.created_at,
        "frame_size": manifest.preprocess.size,
        "abstain_below": manifest.thresholds.abstain_below,
        "detects_out_of_distribution": bundle.ood is not None and manifest.thresholds.ood_score is not None,
        "accuracy": _accuracy(metrics),
        "clean_accuracy": _accuracy(metrics.get("clean")),
        "measured_on": metrics.get("measured_on"),
    }


def _metrics(bundle: Bundle) -> dict[str, Any]:
    """metrics.json of the bundle; empty where it has none that is read here."""
    try:
        content = storage.read_json(storage.join(bundle.uri, "metrics.json"))
    except StorageError:
        return {}
    return content if isinstance(content, dict) else {}


def _accuracy(metrics: Any) -> dict[str, Any] | None:
    """Accuracy, its 95 % interval and the number of images it was measured on."""
    if not isinstance(metrics, dict) or "accuracy" not in metrics:
        return None
    images = metrics.get("n")
    value = metrics["accuracy"] if images != 0 else None
    return {"value": value, "ci95": metrics.get("accuracy_ci95"), "images": images}
