"""The model that ships with btray, and its name, which stands for its folder wherever a model is named."""

from __future__ import annotations

import logging
from importlib import resources
from pathlib import Path
from typing import Annotated

from btray.core.errors import UserError
from btray.core.uris import resolve, resolved

_log = logging.getLogger(__name__)

SHIPPED = "brain-mri"
FOLDER = Path(str(resources.files("btray"))) / "pretrained"
"""Where it lies; no code is there."""

Model = Annotated[str, resolved(unless=rf"(?-i:{SHIPPED})\Z")]
"""A setting that names a bundle: a URI, or SHIPPED. The name stays as it is: every node has a folder of its own."""


def locate(model: str) -> str:
    """Return the URI of a bundle that a `Model` names. Raises UserError if this btray has no shipped model."""
    if model != SHIPPED:
        return resolve(model)
    folder = FOLDER / SHIPPED
    if not folder.is_dir():
        raise UserError(f"this btray has no shipped model {SHIPPED} ({folder} is missing); name a bundle with --model")
    return str(folder)


def announce(model: str, model_id: str) -> None:
    """Log that the model in use is the shipped one, if it is."""
    if model == SHIPPED:
        message = "using the shipped model %s (%s): research use, not a diagnosis; --model takes your own"
        _log.info(message, SHIPPED, model_id)
