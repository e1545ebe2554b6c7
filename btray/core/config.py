"""How a job's config is filled: `--config file.yaml`, then the environment (`BTRAY_*`), then flags; the last one wins.

What there is to set stands in the `config.py` of each package. This module and `btray.launch` alone read
`sys.argv` and the environment.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from btray.core.errors import UserError
from btray.core.logs import LogFormat

ENV_PREFIX = "BTRAY_"
_NESTING = "__"
_LAYERS = (
    "--config FILE reads the same settings from a YAML file; environment variables (--epochs is BTRAY_EPOCHS, "
    "--network.dropout is BTRAY_NETWORK__DROPOUT) win over the file, and flags over both."
)
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
_POSITIONAL = get_args(CliPositionalArg[str])[1]  # what marks a field as positional


class ComponentConfig(BaseModel):
    """The settings of one component: immutable, unknown keys refused, the string below a field is its help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class JobConfig(BaseSettings):
    """The settings of one job. Build it in Python by keyword, or from the command line with `from_command_line`."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=_NESTING,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_parse_none_str="none",
        cli_exit_on_error=False,
    )

    log_format: LogFormat = Field(default="text", exclude=True)  # no part of what a result was made with
    """Lines of the log: text for people, or json with time, level, run_id and message for a log store."""
    verbose: bool = Field(default=False, exclude=True)
    """Print what Ray and its workers print as well."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keywords only: a config made in Python does not depend on the environment it is made in."""
        return (init_settings,)

    @classmethod
    def from_command_line(
        cls, arguments: list[str] | None = None, prog: str | None = None, *, others: Collection[str] = ()
    ) -> Self:
        """Fill the config from file, environment and flags.

        `others` are the settings of other jobs: they may be exported for those, and are none of this job's business.

        Raises `UserError` with one line for an unknown key, a value out of range or an unreadable file. `--help`
        prints and exits with 0.
        """
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        config_file, flags = _take_config_flag(arguments)
        _refuse_unknown_environment({*cls.model_fields, *others})
        try:
            layers = {
                "--config": _read_yaml(config_file) if config_file else {},
                "environment": EnvSettingsSource(cls)(),
                "flags": _parse_flags(cls, flags, prog or Path(sys.argv[0]).name),
            }
            merged: dict[str, Any] = {}
            for layer in layers.values():
                merged = _merge(merged, layer)
            return cls(**merged)
        except ValidationError as error:
            raise UserError(_explain(error)) from error
        except SettingsError as error:
            raise UserError(f"{str(error).removeprefix('error parsing CLI: ')} (see --help)") from error

    def to_yaml(self) -> str:
        """The resolved config as YAML that `--config` reads again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def set_environment(variables: Mapping[str, str | None]) -> None:
    """Set environment variables for the processes that are started from now on, where nothing else can tell them.

    None takes one away.
    """
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors of one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def _parse_flags(cls: type[JobConfig], flags: list[str], prog: str) -> dict[str, Any]:
    """Positional values are file names and kept as they are: pydantic-settings would split them at commas."""
    literal: dict[str, Any] = {}

    def parse(parser: argparse.ArgumentParser, flags: list[str], namespace: argparse.Namespace | None = None) -> Any:
        # Flags may stand between files, but behind `--` nothing is a flag; argparse does one or the other.
        parse_args = parser.parse_args if "--" in flags else parser.parse_intermixed_args
        parsed = parse_args(flags, namespace)
        for name, field in cls.model_fields.items():
            if _POSITIONAL in field.metadata:
                literal[name] = vars(parsed).pop(name)
        return parsed

    parser = OneLineParser(prog=prog, description=cls.__doc__, epilog=_LAYERS)
    source: CliSettingsSource[Any] = CliSettingsSource(
        cls, cli_parse_args=flags, root_parser=parser, parse_args_method=parse
    )
    return source() | literal


def _take_config_flag(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Split `--config FILE` or `--config=FILE` off: it names a layer below the flags, so it is read before them."""
    rest: list[str] = []
    config_file = None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            config_file = next(remaining, None)
            if config_file is None:
                raise UserError("--config needs the name of a YAML file")
        elif argument.startswith("--config="):
            config_file = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    return config_file, rest


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected 'key: value' lines, found a {type(content).__name__}")
    _refuse_odd_keys(content, path)
    return content


def _refuse_odd_keys(content: dict[Any, Any], path: str) -> None:
    for key, value in content.items():
        if not isinstance(key, str):
            raise UserError(
                f"--config {path}: the key {key!r} is no name of a setting (YAML reads no and on as false and true); "
                "see --help"
            )
        if isinstance(value, dict):
            _refuse_odd_keys(value, path)


def _refuse_unknown_environment(known: Collection[str]) -> None:
    for key in os.environ:
        name = key.removeprefix(ENV_PREFIX).split(_NESTING)[0].lower()
        if key.startswith(ENV_PREFIX) and name not in known:
            raise UserError(f"environment variable {key} names no setting of any job; unset it (see --help)")


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _explain(error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        flag = "--" + key.replace("_", "-")
        if item["type"] == "extra_forbidden":
            parts.append(f"{key}: no such setting (see --help)")
        elif item["type"] == "missing":
            parts.append(f"{flag} is required")
        else:
            message = item["msg"].removeprefix("Value error, ")
            parts.append(f"{flag}: {item['input']!r} is refused: {message}" if key else message)
    return "; ".join(dict.fromkeys(parts))
