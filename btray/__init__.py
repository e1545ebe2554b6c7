"""Brain-tumor classification of MRI slices on Ray: train, classify an archive, serve."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from btray.model.classifier import Classifier
    from btray.model.prediction import Prediction

__all__ = ["Classifier", "Prediction"]


def __getattr__(name: str) -> Any:
    """Import torch only when it is needed: `import btray` and a job's `--help` stay quick."""
    if name in __all__:
        return getattr(importlib.import_module(f"btray.model.{name.lower()}"), name)
    raise AttributeError(f"module 'btray' has no attribute {name!r}")
