"""The settings of preprocessing. No heavy import: `--help` must be quick."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from btray.core.config import ComponentConfig


class PreprocessConfig(ComponentConfig):
    """The deterministic transform that training, bulk classification and serving share; it travels in the bundle."""

    size: Annotated[int, Field(ge=32, le=1024)] = 192
    """Edge of the square frame that the network sees, in pixels."""
    crop: bool = True
    """Crop to the head before resizing."""
    margin: Annotated[float, Field(ge=0, le=0.5)] = 0.02
    """Room left around the head, as a share of its longer side."""
    low_percentile: Annotated[float, Field(ge=0, lt=50)] = 0.5
    """Gray level that becomes black, as a percentile of the head's pixels."""
    high_percentile: Annotated[float, Field(gt=50, le=100)] = 99.5
    """Gray level that becomes white, as a percentile of the head's pixels."""
