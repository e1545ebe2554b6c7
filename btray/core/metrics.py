"""Metrics of training and archive jobs for Prometheus; their names are a contract.

While a job runs, they go through Ray's metrics (`ray.util.metrics`): the agent of each node exports them with
the prefix `ray_`, which deploy/prometheus/prometheus.yml takes off again. A job that has ended
cannot be scraped, so archive jobs also leave their last numbers (`leave`). The service's `btray_serve_*` are made
by the service itself. docs/operations.md says what each one means.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

from btray.core.errors import UserError

_log = logging.getLogger(__name__)

Kind = Literal["counter", "gauge"]

# Retries of a Pushgateway that is away: half a minute of pauses in all.
_PUSHES = 5
_BACKOFF = 1.0
_AWAY = (429, 500, 502, 503, 504)

_RUN = ("run_id",)
_OF_ARCHIVE: dict[str, tuple[Kind, str, tuple[str, ...]]] = {
    "objects": ("counter", "Objects done or rejected.", _RUN),
    "bytes": ("counter", "Bytes of the objects.", _RUN),
    "rejected": ("counter", "Objects and frames rejected, by code.", (*_RUN, "code")),
    "stage_seconds": ("counter", "Seconds of the actors by stage.", (*_RUN, "stage")),
    "images_per_second": ("gauge", "Objects per second since the first part.", _RUN),
    "queue": ("gauge", "Objects listed and not yet done.", _RUN),
    "reject_ratio": ("gauge", "Share of the run's objects that were rejected.", _RUN),
    "last_objects": ("gauge", "Objects of the last run.", ()),
    "last_rejected": ("gauge", "Objects and frames that the last run rejected, by code.", ("code",)),
    "last_success_timestamp_seconds": ("gauge", "When the last run ended in order.", ()),
}
METRICS: Mapping[str, tuple[Kind, str, tuple[str, ...]]] = {
    "btray_train_epoch": ("gauge", "Epochs that the run has ended.", _RUN),
    "btray_train_loss": ("gauge", "Mean training loss of the last epoch.", _RUN),
    "btray_train_val_loss": ("gauge", "Validation loss of the last epoch.", _RUN),
    "btray_train_val_macro_f1": ("gauge", "Validation macro-F1 of the last epoch.", _RUN),
    "btray_train_images_per_second": ("gauge", "Images per second of the last epoch, all workers.", _RUN),
    "btray_train_feed_ratio": ("gauge", "Share of the last epoch in which the device did not wait for images.", _RUN),
    "btray_train_rejected": ("counter", "Scans that gave no frame while training.", _RUN),
    **{f"btray_{job}_{name}": what for job in ("classify", "pack") for name, what in _OF_ARCHIVE.items()},
    "btray_classify_feed_ratio": ("gauge", "Share of the actors' time in which the model classified.", _RUN),
    "btray_classify_drift_psi": ("gauge", "Population stability index against earlier runs.", (*_RUN, "of")),
}
"""Name (counters are exported with `_total` behind it) -> kind, meaning, labels. Names and labels are a contract."""

EVERY = 1.0
"""Seconds between two settings of a gauge. Ray forgets it after twice its report interval, which is 20 s by default and
2 s at least."""

_lock = threading.Lock()
_gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}


@cache
def _metric(name: str) -> Any:
    from ray.util import metrics

    kind, meaning, labels = METRICS[name]
    return (metrics.Counter if kind == "counter" else metrics.Gauge)(name, meaning, labels)


def record(values: Mapping[str, float | None], **labels: str) -> None:
    """Add to counters and set gauges by name, all with the same labels; None and NaN are left out.

    Does nothing without a connection to Ray.
    """
    import ray  # takes a second, which a night with nothing new does without

    if not ray.is_initialized():
        return
    for name, value in values.items():
        if value is None or math.isnan(value):
            continue
        metric = _metric(name)
        if METRICS[name][0] == "gauge":
            with _lock:
                _gauges[name, tuple(labels.items())] = value
            metric.set(value, tags=labels)
        elif value > 0:
            metric.inc(value, tags=labels)


@contextmanager
def lasting() -> Iterator[None]:
    """For the block, keep exporting the last values of the gauges that this process sets.

    Ray exports a gauge for some seconds after it was set, and alerts wait for minutes.
    """
    ended = threading.Event()

    def again() -> None:
        while not ended.wait(EVERY):
            with _lock:
                held = list(_gauges.items())
            for (name, labels), value in held:
                _metric(name).set(value, tags=dict(labels))

    thread = threading.Thread(target=again, name="gauges", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with _lock:
            _gauges.clear()


# ---- what stays when the job has ended


def leave(target: str, job: str, lines: str) -> None:
    """Leave a job's numbers for later: in a file of node-exporter's textfile collector, or at a Pushgateway's URL.

    Raises UserError if neither takes them. A Pushgateway that stays away is only an error in the log: the run has ended
    in order and would not be run again for its numbers.
    """
    if target.startswith(("http://", "https://")):
        _push(target, job, lines)
        return
    temporary = f"{target}.{os.getpid()}"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(lines)
        os.chmod(temporary, 0o644)  # another user reads it, whatever the umask of this one
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"--metrics-to {target}: {error.strerror or error}; name a .prom file or an http:// URL") from (
            error
        )


def _push(url: str, job: str, lines: str) -> None:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    again = Retry(
        _PUSHES, backoff_factor=_BACKOFF, status_forcelist=_AWAY, allowed_methods=["PUT"], raise_on_status=False,
        respect_retry_after_header=False,
    )  # fmt: skip
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=again))
        try:
            answer = session.put(
                f"{url.rstrip('/')}/metrics/job/btray_{job}",
                data=lines.encode(),
                headers={"Content-Type": "text/plain; version=0.0.4"},
                timeout=10,
            )
        except ValueError as error:  # how requests refuses what is not a URL
            raise UserError(f"--metrics-to {url} is not the URL of a Pushgateway: {error}") from error
        except requests.RequestException as error:
            _log.error("--metrics-to %s does not answer, and the run's numbers are not left there: %s", url, error)
            return
    message = f"--metrics-to {url} took no numbers: {answer.status_code} {answer.reason}"
    if answer.status_code in _AWAY:
        _log.error("%s", message)
    elif not answer.ok:
        raise UserError(f"{message}; is it a Pushgateway?")
