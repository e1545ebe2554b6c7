"""How a job is started: its config is read, its log begun, and what it raises becomes one line and an exit code."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from btray.acquire.config import AcquireConfig
from btray.audit.config import AuditConfig
from btray.bulk.config import ClassifyConfig, PackConfig
from btray.core import logs
from btray.core.config import JobConfig, OneLineParser
from btray.core.errors import Failed, Stopped, ThresholdExceeded, UserError
from btray.evaluation.config import EvaluateConfig
from btray.model.config import PredictConfig
from btray.serving.config import KeyConfig, ServeConfig
from btray.training.config import TrainConfig, TuneConfig

Config = TypeVar("Config", bound=JobConfig)

_ALL_JOBS: tuple[type[JobConfig], ...] = (
    AcquireConfig, AuditConfig, TrainConfig, TuneConfig, EvaluateConfig, ClassifyConfig, PackConfig, ServeConfig,
    PredictConfig, KeyConfig,
)  # fmt: skip


def read_config(config_class: type[Config], arguments: list[str] | None = None, prog: str | None = None) -> Config:
    """The config of the command line, or of `arguments`; see `JobConfig.from_command_line`."""
    others = {name for job in _ALL_JOBS for name in job.model_fields}
    return config_class.from_command_line(arguments, prog, others=others)


def run_job(config_class: type[Config], job: Callable[[Config], str]) -> None:
    """Run `job` on the config of the command line, print the URI it returns as the last line, exit with its code.

    Exit codes: 0 done, 1 failed, 2 wrong use or unusable input, 3 a threshold was crossed, 143 stopped by SIGTERM.
    """
    with _exit_codes():
        config = read_config(config_class)
        _begin_output(config, Path(sys.argv[0]).stem)
        print(job(config), flush=True)


def run_command(
    prog: str, description: str, commands: Mapping[str, tuple[type[JobConfig], Callable[[Any], None]]]
) -> None:
    """Run the command that the first argument names on the config that the others give; exit codes as for `run_job`."""
    parser = OneLineParser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"{prog} {importlib.metadata.version(prog)}")
    parser.add_argument("command", choices=sorted(commands), help=f"{prog} COMMAND --help says more")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    with _exit_codes():
        parsed = parser.parse_args()
        config_class, command = commands[parsed.command]
        config = read_config(config_class, parsed.arguments, f"{prog} {parsed.command}")
        _begin_output(config, parsed.command)
        command(config)


def _begin_output(config: JobConfig, job: str) -> None:
    """Log as `config` says, and keep Ray's C++ core quiet, which no Python call can do."""
    logs.begin(config.log_format, verbose=config.verbose)
    logs.bind(job=job)
    if not config.verbose:
        # Read by each Ray process as it starts. Ray Data makes its actors with arguments in the object store, and the
        # core of the driver calls that an error, on its stderr. What fails is raised in Python all the same.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Log to stderr, and turn what a job raises into one line there and its exit code."""
    logs.begin()
    try:
        yield
    except Failed as error:
        sys.exit(_report(error, 1))
    except UserError as error:
        sys.exit(_report(error, 2))
    except ThresholdExceeded as error:
        sys.exit(_report(error, 3))
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        sys.exit(143)
    except Exception as error:
        known = _storage_failure(error)
        if known is None:
            raise
        sys.exit(_report(*known))


def _storage_failure(error: Exception) -> tuple[UserError, int] | None:
    """One line and the exit code where the error is of storage; None for any other, whose traceback is wanted."""
    from btray.storage.errors import StorageError, user_error  # heavy, and only a failure needs it

    if not isinstance(error, StorageError):
        return None
    return user_error(error), 1 if error.retryable else 2


def _report(error: Exception, code: int) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return code
