"""What a run prints while it works: one live line on a terminal, and the lines that its workers send."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from btray.core import logs

_log = logging.getLogger(__name__)
_REDRAW_SECONDS = 0.25
# What the core tells the user although all is well: many actors that share a CPU, and the end of Serve's controller.
_HARMLESS = ("worker processes have been started", "ServeController.graceful_shutdown failed")
_ray_log = logging.getLogger("ray.workers")  # INFO of a library: --verbose shows it


class ProgressLine:
    """A line at the bottom of the terminal that is rewritten as work advances.

    Other output appears above it. At the end of the block it is left standing, whole, or goes if not `keep`, for a
    summary that the job prints. Nothing is shown if stderr is not a terminal, or if the log is JSON.

    `of_workers`: workers rewrite it too; if not, their progress is left out, because the job speaks for all of them.
    """

    _current: ClassVar[ProgressLine | None] = None

    def __init__(self, text: str = "", *, keep: bool = True, of_workers: bool = True) -> None:
        self._text = text
        self.of_workers = of_workers
        self._drawn = 0.0
        console = Console(stderr=True)
        self._live = None
        if console.is_terminal and not logs.is_json():
            # A stdout that is a file must stay one: rich would redirect it to the terminal.
            redirect = sys.stdout.isatty()
            self._live = Live(console=console, auto_refresh=False, transient=not keep, redirect_stdout=redirect)

    def update(self, text: str) -> None:
        """Replace the line; the terminal is rewritten four times per second at most."""
        self._text = text
        now = time.monotonic()
        if self._live is not None and now - self._drawn >= _REDRAW_SECONDS:
            self._drawn = now
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
            self.update(self._text)
        ProgressLine._current = self
        return self

    def __exit__(self, *_: object) -> None:
        ProgressLine._current = None
        if self._live is not None:
            self._live.update(Text(self._text))  # what stays may take two lines
            self._live.stop()


def show_progress(text: str) -> None:
    """Rewrite the live line of this process, or print `text` to stdout if there is no terminal to rewrite it on."""
    if not sys.stderr.isatty():
        print(text, flush=True)
    elif ProgressLine._current is not None:
        ProgressLine._current.update(text)


def show_worker_lines(batch: Mapping[str, Any]) -> None:
    """Print what btray logs in a worker and what goes wrong in Ray; else `batch`, Ray's message, is for --verbose."""
    source = batch.get("actor_name") or batch.get("task_name") or "process"
    for line in batch["lines"]:
        if line.startswith(logs.PROGRESS):
            if ProgressLine._current is None or ProgressLine._current.of_workers:
                show_progress(line.removeprefix(logs.PROGRESS))
        elif line.startswith(logs.LINE):
            own = line.removeprefix(logs.LINE)
            if logs.is_json() and not own.startswith("{"):  # of a replica, which is not told the format
                _log.info("%s", own)
            else:
                print(own, file=sys.stderr, flush=True)
        elif batch.get("pid") == "raylet" and not any(text in line for text in _HARMLESS):
            _log.warning("Ray: %s", " ".join(line.split()))
        elif batch.get("pid") == "autoscaler":
            _, marked, event = line.rpartition(":event_summary:")
            if "Error:" in line or "Warning:" in line:
                # The cluster cannot grow as the job needs: without this the job would seem to hang.
                _log.warning("cluster: %s", event)
            elif marked:  # the rest is the state of the whole cluster, every five seconds
                _ray_log.info("cluster: %s", event)
        else:
            _ray_log.info("(%s pid=%s) %s", source, batch.get("pid"), line)
