"""The endpoint: `application` is what serve.yaml and `serve run btray.serving:application` import."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Import Ray Serve only when the application is used."""
    if name == "application":
        from btray.serving.deployment import application

        return application
    raise AttributeError(f"module 'btray.serving' has no attribute {name!r}")
