"""How a job is started: its config is read, its log begun, and what it raises becomes one line and an exit code."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
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
Job = Callable[[Any], str | None]

_ALL_CONFIGS: tuple[type[JobConfig], ...] = (
    AcquireConfig, AuditConfig, TrainConfig, TuneConfig, EvaluateConfig, ClassifyConfig, PackConfig, ServeConfig,
    PredictConfig, KeyConfig,
)  # fmt: skip


def read_config(config_class: type[Config], arguments: list[str] | None = None, prog: str | None = None) -> Config:
    """Return the config of the command line, or of `arguments`; see `JobConfig.from_command_line`."""
    others = {name for job in _ALL_CONFIGS for name in job.model_fields}
    return config_class.from_command_line(arguments, prog, others=others)


def run_job(config_class: type[Config], job: Callable[[Config], str | None]) -> None:
    """Run `job` on the config of the command line, print the URI it returns as the last line, exit with its code.

    Exit codes: 0 done, 1 failed, 2 wrong use or unusable input, 3 a threshold was crossed, 143 stopped by SIGTERM.
    """
    with _exit_codes():
        config = read_config(config_class)
        logs.begin(config.log_format, verbose=config.verbose)
        logs.bind(job=Path(sys.argv[0]).stem.rpartition(" ")[2])
        result = job(config)
        if result is not None:
            print(result, flush=True)


def run_command(prog: str, description: str, commands: Mapping[str, tuple[type[JobConfig], Job]]) -> None:
    """Run the command that the first argument names as `run_job` does, on the config that the others give."""
    width = max(map(len, commands))
    listed = (
        f"  {name:<{width}}  {(config.__doc__ or name).splitlines()[0]}" for name, (config, _) in commands.items()
    )
    parser = OneLineParser(
        prog=prog,
        description=description,
        epilog="\n".join(["commands:", *listed]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_versions(prog), help="show what is installed and exit")
    parser.add_argument(
        "command", choices=commands, metavar="command", help=f"see below; {prog} COMMAND --help says more"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    with _exit_codes():
        parsed = parser.parse_args()
    # From here on this is that job's own process: what it reads again, as SIGHUP makes the service do, is its own part.
    sys.argv = [f"{prog} {parsed.command}", *parsed.arguments]
    run_job(*commands[parsed.command])


def _versions(prog: str) -> str:
    """Return a line each for what is installed, from its metadata: importing torch and Ray takes seconds."""
    lines = [f"{name} {importlib.metadata.version(name)}" for name in (prog, "ray", "torch")]
    return "\n".join([*lines, f"python {platform.python_version()}"])


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Log to stderr, and turn what a job raises into one line there and its exit code."""
    logs.begin()
    try:
        yield
    except (Failed, UserError, ThresholdExceeded) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        sys.exit(143)
