"""The service's numbers for monitoring: counted in each replica by Ray's metrics, gathered at `/metrics`.

Ray's agents collect the numbers every ten seconds and export them as `ray_btray_serve_*` with everything else that Ray
measures; `/metrics` has those of the service alone, of all replicas, as `btray_serve_*`.
"""

from __future__ import annotations

import ipaddress
import urllib.request
from collections.abc import Iterable, Sequence

from btray.model.prediction import Prediction

PREFIX = "btray_serve_"
_EXPORTED = "ray_" + PREFIX
_SECONDS = [0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]
_FRAMES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
_TIMEOUT = 5.0
"""Seconds that a node's agent has to answer."""
_LARGEST_PAGE = 64 << 20
"""Bytes read of an agent's page: it has all that Ray measures on the node."""


class Metrics:
    """The numbers of one replica."""

    def __init__(self) -> None:
        """Register the metrics with Ray; without a running Ray they count nothing."""
        from ray.serve.metrics import Counter, Gauge, Histogram  # Serve is not loaded for --help

        def counter(name: str, description: str, *tags: str) -> Counter:
            return Counter(PREFIX + name, description=description, tag_keys=tags)  # type: ignore[arg-type]

        self._requests = counter("requests", "Requests by route and status.", "route", "code")
        latency = "Seconds from the first byte of a request to the last one of its answer."
        self._latency = Histogram(PREFIX + "latency_seconds", latency, _SECONDS, tag_keys=("route",))
        self._batch = Histogram(PREFIX + "batch_size", description="Frames in a forward pass.", boundaries=_FRAMES)
        self._queue = Gauge(PREFIX + "queue", description="Frames that wait for a forward pass.")
        self._in_work = Gauge(PREFIX + "requests_in_work", description="Requests in work.")
        self._predictions = counter("predictions", "Predictions by label.", "model_id", "label")
        self._abstentions = counter("abstentions", "Predictions below the threshold of confidence.", "model_id")
        self._unlike = counter("out_of_distribution", "Images unlike the training images.", "model_id")
        self._rejects = counter("rejects", "Images that could not be used, by code.", "code")

    def request(self, route: str, code: int, seconds: float) -> None:
        """Count a request to `route` that was answered with `code` after `seconds`."""
        self._requests.inc(tags={"route": route, "code": str(code)})
        self._latency.observe(seconds, tags={"route": route})

    def in_work(self, requests: int) -> None:
        """Set how many requests are in work."""
        self._in_work.set(requests)

    def batch(self, frames: int, waiting: int) -> None:
        """Count a forward pass of so many frames that begins, while so many continue to wait."""
        self._batch.observe(max(1, frames))
        self._queue.set(waiting)

    def predictions(self, predictions: Iterable[Prediction]) -> None:
        """Count the predictions of an answer."""
        for prediction in predictions:
            if prediction.status != "ok":
                self._rejects.inc(tags={"code": str(prediction.error_code)})
                continue
            self._predictions.inc(tags={"model_id": prediction.model_id, "label": str(prediction.label)})
            if prediction.abstained:
                self._abstentions.inc(tags={"model_id": prediction.model_id})
            if prediction.out_of_distribution:
                self._unlike.inc(tags={"model_id": prediction.model_id})


def exported_pages() -> list[str]:
    """Return what the metrics agent of each node of the cluster exports. Raises OSError if none answers."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"] and node.get("MetricsExportPort")]
    pages, failure = [], OSError("Ray has no metrics agent here")
    for node in nodes:
        address = ipaddress.ip_address(node["NodeManagerAddress"])
        host = f"[{address}]" if address.version == 6 else str(address)
        url = f"http://{host}:{node['MetricsExportPort']}/metrics"  # Ray names it, never a caller
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
                pages.append(answer.read(_LARGEST_PAGE).decode("utf-8", "replace"))
        except OSError as error:
            failure = error
    if not pages:
        raise failure
    return pages


def merged(pages: Sequence[str]) -> str:
    """Return the service's own metrics of several Prometheus pages as one page, each family once."""
    families: dict[str, list[str]] = {}
    for page in pages:
        family, heading = "", ""
        for line in page.splitlines():
            if line.startswith("#"):
                words = line.split(" ", 3)
                heading = words[1] if len(words) > 2 else ""
                family = words[2] if heading in ("HELP", "TYPE") else ""
            if not family.startswith(_EXPORTED):
                continue
            lines = families.setdefault(family, [])
            own = line.replace(_EXPORTED, PREFIX, 1)
            if not line.startswith("#") or own not in lines:
                lines.append(own)
    return "".join(f"{line}\n" for lines in families.values() for line in lines)
