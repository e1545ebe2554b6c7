"""What a replica holds, whatever serves it: its models, its threads, and who may ask for what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from btray.data.frames import Rejection
from btray.data.scans import count_pages
from btray.model.prediction import Prediction
from btray.serving.access import Access
from btray.serving.batching import SharedThread
from btray.serving.config import LimitsConfig
from btray.serving.metrics import Metrics
from btray.serving.models import ConfigStore, DecodedImage, ServedModel, ServedModels, TrafficSplit
from btray.serving.problems import Problem

Result = TypeVar("Result")

_SMALL = 256 * 1024
"""Bytes that take less time here than a change of threads takes."""


class Service:
    """What a replica holds: its models, its threads, and who may ask for what."""

    def __init__(self, *, sees_callers: bool = True, configs: ConfigStore | None = None) -> None:
        """Start without a model; for `sees_callers` see `Access`, for `configs` `ServedModels`."""
        self.sees_callers = sees_callers
        self.metrics = Metrics()
        # One thread, since each replica has one CPU: a second forward pass would only slow the first one down.
        self.models = ServedModels(SharedThread("predict"), self.metrics, configs or ConfigStore())

    @property
    def access(self) -> Access:
        """Return who may ask now; before there is a model, only this machine."""
        split = self.models.split
        keys, insecure = (split.keys, split.config.insecure) if split else (None, False)
        return Access(keys, insecure=insecure, sees_callers=self.sees_callers)

    @property
    def limits(self) -> LimitsConfig:
        """Return what callers may ask now."""
        return self.models.split.config.limits if self.models.split else LimitsConfig()

    def split(self) -> TrafficSplit:
        """Return what is served now. Raises Problem if nothing is yet."""
        if self.models.split is None:
            raise Problem(503, "not_ready", "the model is being loaded", retry_after=2)
        return self.models.split

    async def decoding(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run `function` on a decoder's thread, so that no request waits for it in the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.split().decoders, function, *arguments)

    async def classify(
        self,
        model: ServedModel,
        images: Sequence[bytes],
        prepare: Callable[[list[DecodedImage]], list[DecodedImage]],
        *,
        at_once: bool = True,
    ) -> tuple[list[DecodedImage], list[Prediction]]:
        """Decode and classify encoded images. Raises Problem if they have more pages than one request may have.

        `prepare` is given the images before they are classified, and may refuse or replace them; with `at_once` not a
        small one of a single frame.
        """
        if at_once and len(images) == 1 and (answer := await model.at_once(images[0])):
            frames, predictions = answer
            self.metrics.predictions(predictions)
            return [frames], predictions
        most = self.limits.max_frames

        def count() -> int:
            return sum(map(count_pages, images))

        pages = count() if sum(map(len, images)) < _SMALL else await self.decoding(count)
        too_many = Problem(413, "too_many_frames", f"the images of the request have more than {most} pages")
        if pages > most:
            raise too_many
        read = await asyncio.gather(*(self.decoding(model.source.from_bytes, data) for data in images))
        # packed ones are not counted by their headers
        if sum(len(image) for image in read if not isinstance(image, Rejection)) > most:
            raise too_many
        decoded = prepare(read)
        return decoded, await self.predict(model, decoded)

    async def predict(self, model: ServedModel, images: Sequence[DecodedImage]) -> list[Prediction]:
        """Classify decoded images and count the answers."""
        predictions = await model.predict(images)
        self.metrics.predictions(predictions)
        return predictions

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Raise Problem if the block takes longer than the service's timeout."""
        try:
            async with asyncio.timeout(self.limits.timeout):
                yield
        except TimeoutError as error:
            detail = f"no answer within {self.limits.timeout:g} seconds"
            raise Problem(503, "timeout", detail, retry_after=5) from error
