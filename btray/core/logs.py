"""How a job logs: lines for people, or one JSON object per line that names the job and the run it belongs to."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

# A worker puts one of these before each line of btray's own, so that the driver can tell them from what Ray and the
# libraries write to the same stream. Ray's log files keep it.
LINE, PROGRESS = "[btray] ", "[btray progress] "

_PLAIN = logging.LogRecord("", 0, "", 0, "", None, None).__dict__.keys() | {"message", "asctime", "taskName"}


class _Stderr(logging.Handler):
    """Writes to whatever `sys.stderr` is at the moment: a live progress line redirects it."""

    style: LogFormat = "text"
    verbose = False
    in_worker = False
    bound: dict[str, str]

    def __init__(self) -> None:
        super().__init__()
        self.bound = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass btray's lines from INFO on, and those of libraries from WARNING on unless all are wanted."""
        least = logging.INFO if self.verbose or record.name.startswith("btray") else logging.WARNING
        # Ray Data marks with `hide` what is for its own log file alone.
        return record.levelno >= least and (self.verbose or not getattr(record, "hide", False))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, which in a worker is marked for the driver."""
        try:
            line = self._as_json(record) if self.style == "json" else self.format(record)
            mark = ""
            if self.in_worker:
                mark = PROGRESS if self.style == "text" and hasattr(record, "_progress") else LINE
            # Not print(): in its workers Ray Train logs what is printed, and the line would come twice.
            sys.stderr.write(mark + line.replace("\n", "\n" + mark) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for people: `_progress`, if the call gave one, else the message."""
        return getattr(record, "_progress", None) or super().format(record)

    def _as_json(self, record: logging.LogRecord) -> str:
        """Return time (UTC), level, logger, message, what is bound and the call's `extra`; never the arguments."""
        content: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self.bound,
            **{name: value for name, value in record.__dict__.items() if name not in _PLAIN and name[0] != "_"},
        }
        if record.exc_info:
            content["exception"] = logging.Formatter().formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False, default=str)


_handler = _Stderr()


def begin(style: LogFormat = "text", *, verbose: bool = False) -> None:
    """Log to stderr; called again with other arguments, replace the first. `verbose` adds INFO lines of libraries."""
    _handler.style, _handler.verbose, _handler.in_worker = style, verbose, False
    logging.root.addHandler(_handler)
    logging.getLogger("btray").setLevel(logging.INFO)
    if verbose:
        logging.root.setLevel(logging.INFO)


def begin_in_worker(style: LogFormat, **names: str) -> None:
    """Log from a process that Ray started: the driver prints these lines and, unless --verbose, no others."""
    take_over("root")  # Ray Train prints there: each line would come twice
    begin(style)
    bind(**names)
    _handler.in_worker = True


def take_over(*loggers: str) -> None:
    """Let this module's handler print what these loggers print to stderr; the files that they write stay."""
    for name in loggers:
        logger = logging.getLogger(name)
        for handler in [*logger.handlers]:
            if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stderr, sys.__stderr__):
                logger.removeHandler(handler)
        logger.propagate = True


def is_json() -> bool:
    """Return whether this process logs JSON."""
    return _handler.style == "json"


def bind(**names: str) -> None:
    """Put `names` (job, run_id, ...) into every JSON line of this process from now on."""
    _handler.bound.update(names)
