"""How a job is started: its config is read, its log begun, and what it raises becomes one line and an exit code."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import TypeVar

from btray.acquire.config import AcquireConfig
from btray.audit.config import AuditConfig
from btray.bulk.config import ClassifyConfig, EraseConfig, PackConfig
from btray.core import logs
from btray.core.config import JobConfig, OneLineParser, is_submitted
from btray.core.errors import Failed, Stopped, ThresholdExceeded, UserError
from btray.evaluation.config import EvaluateConfig, PublishConfig
from btray.model.config import ExportConfig, PredictConfig
from btray.pacs.report.config import ReportConfig
from btray.registry.config import ModelsConfig
from btray.serving.config import KeyConfig, ServeConfig
from btray.training.config import TrainConfig, TuneConfig

Config = TypeVar("Config", bound=JobConfig)

COMMANDS: dict[str, tuple[type[JobConfig], str]] = {
    "acquire": (AcquireConfig, "btray.acquire.job:acquire"),
    "audit": (AuditConfig, "btray.audit.job:audit"),
    "train": (TrainConfig, "btray.training.job:train"),
    "tune": (TuneConfig, "btray.training.tuning:tune"),
    "evaluate": (EvaluateConfig, "btray.evaluation.job:evaluate"),
    "publish": (PublishConfig, "btray.evaluation.publish:publish"),
    "models": (ModelsConfig, "btray.registry.job:manage"),
    "export": (ExportConfig, "btray.model.export:export"),
    "predict": (PredictConfig, "btray.cli:predict"),
    "classify": (ClassifyConfig, "btray.bulk.classify:classify"),
    "report": (ReportConfig, "btray.pacs.report.job:report"),
    "pack": (PackConfig, "btray.bulk.pack:pack"),
    "erase": (EraseConfig, "btray.bulk.erasure.job:erase"),
    "serve": (ServeConfig, "btray.cli:serve"),
    "key": (KeyConfig, "btray.cli:key"),
}
"""Every command in the order in which one uses them: its config, and the function that takes it.

The function is imported when it is called: `--help` must load neither torch nor Ray."""


def read_config(config_class: type[Config], arguments: list[str] | None = None, prog: str | None = None) -> Config:
    """Return the config of the command line, or of `arguments`; see `JobConfig.from_command_line`."""
    others = {name for other, _ in COMMANDS.values() for name in other.model_fields}
    return config_class.from_command_line(arguments, prog, others=others)


def run_job(config_class: type[Config], job: Callable[[Config], str | None]) -> None:
    """Run `job` on the config of the command line, print the URI it returns as the last line, exit with its code.

    Exit codes: 0 done, 1 failed, 2 wrong use or unusable input, 3 a threshold was crossed, 143 stopped by SIGTERM.
    """
    with _exit_codes():
        config = read_config(config_class)
        logs.begin(config.log_format, verbose=config.verbose)
        logs.bind(job=Path(sys.argv[0]).stem.rpartition(" ")[2])
        config.check()  # before the job is imported, which takes seconds
        result = job(config)
        if result is not None:
            print(result, flush=True)


def run_command(prog: str, description: str) -> None:
    """Run the command that the first argument names as `run_job` does, on the config that the others give."""
    width = max(map(len, COMMANDS))
    listed = (
        f"  {name:<{width}}  {(config.__doc__ or name).splitlines()[0]}" for name, (config, _) in COMMANDS.items()
    )
    # From its metadata: importing torch and Ray takes seconds.
    installed = [f"{name} {importlib.metadata.version(name)}" for name in (prog, "ray", "torch")]
    installed.append(f"python {platform.python_version()}")
    parser = OneLineParser(
        prog=prog,
        description=description,
        epilog="\n".join(["commands:", *listed]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version="\n".join(installed), help="show what is installed and exit"
    )
    parser.add_argument(
        "command", choices=COMMANDS, metavar="command", help=f"see below; {prog} COMMAND --help says more"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    with _exit_codes():
        parsed = parser.parse_args()
    # From here on this is that job's own process: what it reads again, as SIGHUP makes the service do, is its own part.
    sys.argv = [f"{prog} {parsed.command}", *parsed.arguments]
    config_class, function = COMMANDS[parsed.command]
    run_job(config_class, lambda config: resolve_name(function)(config))  # noqa: PLW0108 - imports it when it is called


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Log to stderr, and turn what a job raises into one line there and its exit code."""
    logs.begin()
    try:
        yield
    except (Failed, UserError, ThresholdExceeded) as error:
        hint = ""
        if is_submitted() and f"{Path.cwd()}/" in str(error):
            hint = "; `ray job submit` leaves out what .rayignore and .gitignore name: give s3://, or a path from / on"
        print(f"error: {error}{hint}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        sys.exit(143)
