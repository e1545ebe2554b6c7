"""Which model is promoted: a registry is a folder of bundles that never change, and a history of who promoted which.

    models/NAME/MODEL_ID/                    the bundles
    models/NAME/_production/00000001.json    who promoted which of them, when and why

The promotion with the highest number counts. It is made by one put that fails if the number is taken, so that of two
promoters one wins, and nothing is ever rewritten: a reader sees the old state or the new one, and the history stays.
`models/NAME@production` names the promoted bundle wherever a model is named. Free of torch.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Self, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from btray import storage
from btray.core.errors import UserError

_log = logging.getLogger(__name__)

PRODUCTION = "production"
STAGE = r"[a-z][a-z0-9-]*"
"""What a stage may be called."""
_ALIAS = re.compile(rf"(?P<registry>.+[^/])@(?P<stage>{STAGE})")
_NUMBER = re.compile(r"(\d{8})\.json")


@dataclass(frozen=True)
class Promotion:
    """One entry of the history of a stage."""

    number: int
    model_id: str
    at: str
    """When, ISO 8601, UTC."""
    by: str
    why: str
    previous: str | None = None
    """The model_id that was promoted before."""
    evidence: dict[str, Any] = field(default_factory=dict)
    """What a data set said of both; empty if none was asked."""
    forced: bool = False
    """Whether it was promoted although the data set said that it is worse."""

    @classmethod
    def from_json(cls, text: str, uri: str) -> Self:
        """Read what `record` wrote. Raises UserError if it is something else."""
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            raise UserError(f"{uri} is not a promotion of btray: {error.errors()[0]['msg']}") from error

    def __str__(self) -> str:
        return f"{self.model_id}, promoted {self.at} by {self.by}: {self.why}"


Config = TypeVar("Config", bound=BaseModel)


def split(model: str) -> tuple[str, str] | None:
    """Return registry and stage if `model` names a promoted one, NAME@STAGE; else None."""
    match = _ALIAS.fullmatch(model)
    return (match["registry"], match["stage"]) if match else None


def bundle_uri(registry: str, model_id: str) -> str:
    """Return where a registry keeps a bundle."""
    return storage.join(registry, model_id)


def resolve(model: str, model_id: str | None = None, *, log: bool = True) -> tuple[str, str | None]:
    """Return the bundle that `model` means now, and its id; what names no promoted model is returned as it is.

    Raises UserError if none is promoted, or if the promoted one is not `model_id`.
    """
    alias = split(model)
    if alias is None:
        return model, model_id
    promotion = current(*alias)
    if promotion is None:
        raise UserError(f"{model}: no model is promoted there; btray models promote --registry {alias[0]} does that")
    if model_id not in (None, promotion.model_id):
        raise UserError(f"{model} is model {promotion.model_id} now, not the pinned --model-id {model_id}")
    if log:
        _log.info("%s is model %s", model, promotion)
    return bundle_uri(alias[0], promotion.model_id), promotion.model_id


def pinned(config: Config, *, log: bool = True) -> Config:
    """Return `config` with the bundle that its `model` means now and its id, so that the whole job uses that one."""
    model, model_id = resolve(config.model, config.model_id, log=log)  # type: ignore[attr-defined]
    return config.model_copy(update={"model": model, "model_id": model_id})


def current(registry: str, stage: str) -> Promotion | None:
    """Return what is promoted; None if nothing is."""
    numbers = _numbers(registry, stage)
    return _read(registry, stage, numbers[-1]) if numbers else None


def history(registry: str, stage: str) -> list[Promotion]:
    """Return all promotions, the oldest first."""
    return [_read(registry, stage, number) for number in _numbers(registry, stage)]


def stages(registry: str) -> list[str]:
    """Return the stages in which something was promoted."""
    names = storage.list_names(registry, missing_ok=True)
    return [name[1:] for name in names if re.fullmatch(f"_{STAGE}", name) and _numbers(registry, name[1:])]


def record(registry: str, stage: str, promotion: Promotion) -> None:
    """Make `promotion`, whose number follows the one that it was decided upon, the one that counts.

    Raises UserError if another one came first, or if the store heeds no condition, by which both would win.
    """
    uri = _uri(registry, stage, promotion.number)
    body = (json.dumps(asdict(promotion), indent=2, ensure_ascii=False) + "\n").encode()
    if not storage.write_new(uri, body) and storage.read_bytes(uri) != body:  # ours, if a first response got lost
        raise UserError(
            f"{registry}@{stage}: another promotion came first ({_read(registry, stage, promotion.number)}); look at "
            "it and decide again"
        )
    if storage.write_new(uri, body):
        raise UserError(
            f"{registry}: this store overwrites an object although the request forbids it (If-None-Match: *), so that "
            "two promoters could both win; update the store, or keep the registry in another one"
        )


def _numbers(registry: str, stage: str) -> list[int]:
    names = storage.list_names(storage.join(registry, f"_{stage}"), missing_ok=True)
    return sorted(int(match[1]) for match in map(_NUMBER.fullmatch, names) if match)


def _read(registry: str, stage: str, number: int) -> Promotion:
    uri = _uri(registry, stage, number)
    return Promotion.from_json(storage.read_text(uri), uri)


def _uri(registry: str, stage: str, number: int) -> str:
    return storage.join(registry, f"_{stage}", f"{number:08d}.json")
