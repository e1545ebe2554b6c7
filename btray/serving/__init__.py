"""The endpoint: `application` is what serve.yaml and `serve run btray.serving:application` import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from btray.serving.deployment import application

__all__ = ["application"]


def __getattr__(name: str) -> Any:
    """Import Ray Serve only when the application is used."""
    if name in __all__:
        from btray.serving import deployment

        return getattr(deployment, name)
    raise AttributeError(f"module 'btray.serving' has no attribute {name!r}")
