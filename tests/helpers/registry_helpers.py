"""A registry and bundles for it, without torch: variants of the shipped one, with ids of their own."""

from __future__ import annotations

from typing import Any

from btray import storage
from btray.model import promotion
from btray.model.bundle_files import own_names, read_files
from btray.model.config import MANIFEST
from btray.model.shipped import FOLDER, SHIPPED
from btray.registry.config import ModelsConfig
from btray.registry.job import manage

SOURCE = str(FOLDER / SHIPPED)
IDS: dict[int, str] = {}
"""The model_id of each variant that was made."""


def models(action: str, registry: str, **settings: Any) -> str | None:
    """Do what `btray models` does."""
    return manage(ModelsConfig(action=action, registry=registry, **{"by": "ada@ward", **settings}))


def new_bundle(folder: str, seed: int) -> str:
    """Write the shipped model with another temperature to `folder` and return its URI; IDS has its model_id."""
    manifest, _ = read_files(SOURCE)
    calibration = manifest.calibration.model_copy(update={"temperature": manifest.calibration.temperature + seed})
    variant = manifest.model_copy(update={"calibration": calibration}).with_own_id()
    uri = storage.join(folder, f"run-{seed}")
    for name in own_names(SOURCE) - {MANIFEST}:
        storage.write_bytes(storage.join(uri, name), storage.read_bytes(storage.join(SOURCE, name)))
    storage.write_text(storage.join(uri, MANIFEST), variant.to_text())
    IDS[seed] = variant.model_id
    return uri


def promoted(registry: str) -> str | None:
    """Return the model_id that is promoted."""
    entry = promotion.current(registry, "production")
    return entry.model_id if entry else None
