"""What a replica holds, whatever serves it: its models, its threads, and who may ask for what."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from btray.data.scans import count_pages
from btray.model.prediction import Prediction
from btray.serving import metrics as serving_metrics
from btray.serving.access import KeyRing
from btray.serving.config import LimitsConfig, ServiceConfig
from btray.serving.gate import Access
from btray.serving.models import Found, ServedModel, ServedModels, TrafficSplit
from btray.serving.problems import Problem

Result = TypeVar("Result")

_SMALL = 256 * 1024


class Service:
    """What a replica holds: its models, its threads, and who may ask for what."""

    def __init__(self, *, sees_callers: bool = True) -> None:
        """`sees_callers`: see `Access`."""
        self.sees_callers = sees_callers
        self.metrics = serving_metrics.Metrics()
        # One thread, since each replica has one CPU: a second forward pass would only slow the first one down.
        self.models = ServedModels(ThreadPoolExecutor(1, "predict"), self.metrics)
        self.decoders = ThreadPoolExecutor(ServiceConfig.model_fields["decoders"].default, "decode")
        self.key_reader = ThreadPoolExecutor(1, "keys")
        self.access = Access(None, insecure=False, sees_callers=sees_callers)
        self.limits = LimitsConfig()

    async def configure(self, config: ServiceConfig) -> None:
        """Serve `config`, keys and limits and all, once its models are ready.

        The first config raises UserError where it cannot be served; a later one is refused, and all stays as it was.
        """

        def prepare() -> Callable[[], None]:
            keys = KeyRing.of(config.keys) if config.keys is not None else None
            return lambda: self._take(config, keys)

        await self.models.configure(config, prepare)

    def _take(self, config: ServiceConfig, keys: KeyRing | None) -> None:
        self.access = Access(keys, insecure=config.insecure, sees_callers=self.sees_callers, reader=self.key_reader)
        self.limits = config.limits
        # The old threads end once they have done what they were given.
        before, self.decoders = self.decoders, ThreadPoolExecutor(config.decoders, "decode")
        before.shutdown(wait=False)

    def line(self) -> TrafficSplit:
        """What is served now. Raises Problem where nothing is yet."""
        if self.models.line is None:
            raise Problem(503, "not_ready", "the model is being loaded", retry_after=2)
        return self.models.line

    async def decoding(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run `function` on a decoder's thread, so that no request waits behind it for the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.decoders, function, *arguments)

    async def decoded(self, model: ServedModel, images: Sequence[bytes]) -> list[Found]:
        """The frames of encoded images. Raises Problem where they are more than one request may have."""
        most = self.limits.max_frames
        if await quickly(self, sum(map(len, images)), lambda: sum(map(count_pages, images))) > most:
            raise Problem(413, "too_many_frames", f"the images of the request have more than {most} pages")
        return await asyncio.gather(*(self.decoding(model.source.from_bytes, data) for data in images))

    async def at_once(self, model: ServedModel, images: Sequence[bytes]) -> tuple[list[Found], list[Prediction]] | None:
        """`decoded` and `predict` of a request in one go, where that is quicker; see `ServedModel.at_once`."""
        answer = await model.at_once(images[0]) if len(images) == 1 else None
        if answer is None:
            return None
        frames, predictions = answer
        self.metrics.predictions(predictions)
        return [frames], predictions

    async def predict(self, model: ServedModel, found: Sequence[Found]) -> list[Prediction]:
        """Classify decoded images and count what came of it."""
        predictions = await model.predict(found)
        self.metrics.predictions(predictions)
        return predictions

    async def in_time(self, answering: Awaitable[Result]) -> Result:
        """What `answering` gives. Raises Problem where it takes longer than the service's timeout."""
        try:
            async with asyncio.timeout(self.limits.timeout):
                return await answering
        except TimeoutError as error:
            detail = f"no answer within {self.limits.timeout:g} seconds"
            raise Problem(503, "timeout", detail, retry_after=5) from error


async def quickly(service: Service, size: int, function: Callable[[], Result]) -> Result:
    """Run `function` here where `size` bytes take less time than changing threads, else on a decoder's thread."""
    return function() if size < _SMALL else await service.decoding(function)
