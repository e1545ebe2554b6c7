"""Brain-tumor classification of MRI slices on Ray: train, classify an archive, serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from btray.model.classifier import Classifier, Prediction

__all__ = ["Classifier", "Prediction"]


def __getattr__(name: str) -> Any:
    """Import torch only where it is needed: `import btray` and a job's `--help` stay quick."""
    if name in __all__:
        from btray.model import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module 'btray' has no attribute {name!r}")
