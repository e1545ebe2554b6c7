"""How a job logs: lines for people, or one JSON object a line, each with the job and the run that it belongs to."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

_NOISY = ("aiobotocore", "botocore", "fsspec", "s3fs", "urllib3", "matplotlib", "fontTools")
_bound: dict[str, str] = {}
_PLAIN = logging.LogRecord("", 0, "", 0, "", None, None).__dict__.keys() | {"message", "asctime", "taskName"}


def begin(style: LogFormat = "text") -> None:
    """Log to stderr from INFO on; again with another style replaces the first."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if style == "json":
        for handler in logging.root.handlers:
            handler.setFormatter(_Json())
        ray = logging.getLogger("ray")  # has a handler of its own as soon as it is imported
        ray.handlers.clear()
        ray.propagate = True


def is_json() -> bool:
    """Whether this process logs JSON."""
    return any(isinstance(handler.formatter, _Json) for handler in logging.root.handlers)


def begin_in_worker(style: LogFormat, **names: str) -> None:
    """The same in a process that Ray started; its own way of logging stays where lines are for people."""
    if style == "json":
        for handler in [*logging.root.handlers]:
            if isinstance(handler, logging.StreamHandler):  # Ray's, which heeds no formatter
                logging.root.removeHandler(handler)
        logging.root.addHandler(logging.StreamHandler(sys.stderr))
        begin(style)
        bind(**names)


def bind(**names: str) -> None:
    """Put `names` (job, run_id, ...) into every JSON line of this process from now on."""
    _bound.update(names)


class _Json(logging.Formatter):
    """time (UTC), level, logger, message, what is bound, and whatever `extra` the call gave; never arguments."""

    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_bound,
            **{name: value for name, value in record.__dict__.items() if name not in _PLAIN and name[0] != "_"},
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False, default=str)
