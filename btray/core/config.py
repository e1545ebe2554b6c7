"""The loader of every job's config: `--config file.yaml`, then the environment (`BTRAY_*`), then flags; the last wins.

The settings are in the `config.py` of each package. Only this module and `btray.launch` read `sys.argv` and the
environment.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from btray.core.errors import UserError
from btray.core.logs import LogFormat

ENV_PREFIX = "BTRAY_"
SUBMITTED_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""With this, Ray tells a submitted job its runtime environment."""
_LASTING = re.compile(r"/|~|[A-Za-z][A-Za-z0-9+.-]*:|databricks$")  # absolute paths, URIs, MLflow's name of a server
_NESTING = "__"
_ENVIRONMENT = (
    "Environment variables (--epochs is BTRAY_EPOCHS, --network.dropout is BTRAY_NETWORK__DROPOUT) win over the file, "
    "and flags over both; none unsets a setting that is a number or a choice."
)
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
FROM_ENVIRONMENT = object()
"""Marks a setting that is read from the environment alone: neither a process list nor a file of settings shows it."""
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

    def check(self) -> None:
        """Raise UserError if something that the config names cannot be used. Imports neither torch nor Ray.

        `launch` calls it before it imports the job, and the job again, for those that call it from Python.
        """

    @field_validator(
        "out", "output", "storage", "cache", "metrics_to", "mlflow", "file", mode="before", check_fields=False
    )
    @classmethod
    def _is_found_again(cls, output: Any) -> Any:
        """Refuse an output of a submitted job in a folder that ends with the job; all that jobs write to are here."""
        if is_submitted() and isinstance(output, str) and not _LASTING.match(output.removeprefix("sqlite:///")):
            raise ValueError(
                "a submitted job runs in a folder of Ray's, where nobody finds it; give s3://, or a path that begins "
                "with /"
            )
        return output

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take keywords only: a config made in Python does not depend on the environment it is made in."""
        return (init_settings,)

    @classmethod
    def from_command_line(
        cls, arguments: list[str] | None = None, prog: str | None = None, *, others: Collection[str] = ()
    ) -> Self:
        """Fill the config from file, environment and flags.

        Args:
            arguments: The command line without the program; default: that of this process.
            prog: How `--help` names the program.
            others: Settings of other jobs. They may be exported for those and are ignored here.

        Raises `UserError` with one line for an unknown key, a value out of range or an unreadable file. `--help`
        prints and exits with 0.
        """
        parser = OneLineParser(
            prog=prog or Path(sys.argv[0]).name, description=cls.__doc__, epilog=_ENVIRONMENT, allow_abbrev=False
        )
        parser.add_argument("--config", metavar="FILE", help="YAML file with the same settings; it may be nested")
        _refuse_unknown_environment({*cls.model_fields, *others})
        several: dict[str, list[str]] = {}
        config_file = None

        def parse(parser: argparse.ArgumentParser, flags: list[str], _: Any = None) -> argparse.Namespace:
            nonlocal config_file
            # Flags may stand between files, but after `--` nothing is a flag; argparse does one or the other.
            parsed = (parser.parse_args if "--" in flags else parser.parse_intermixed_args)(flags)
            values = vars(parsed)
            config_file = values.pop("config")
            # pydantic-settings would take [a] for a, true and none for no text, and split file names at commas.
            for name, field in cls.model_fields.items():
                if _POSITIONAL in field.metadata:
                    several[name] = values.pop(name)
                elif get_origin(field.annotation) is tuple and (given := values.pop(name, None)):
                    several[name] = [value for text in given for value in _split(text)]
            return parsed

        try:
            flags: CliSettingsSource[Any] = CliSettingsSource(
                cls,
                cli_parse_args=sys.argv[1:] if arguments is None else arguments,
                root_parser=parser,
                parse_args_method=parse,
                add_argument_method=partial(_add_flag, _from_environment(cls)),
                add_argument_group_method=_add_group,
            )
            flags.env_vars = {
                name: value if value is None or _can_be_unset(cls, name.split(".")) else str(value)
                for name, value in flags.env_vars.items()
            }
            # The first one wins.
            sources = (InitSettingsSource(cls, several), flags, _Environment(cls), _read(cls, config_file))
            return cls(_build_sources=(sources, {}))  # type: ignore[call-arg]  # of BaseSettings, which mypy overlooks
        except ValidationError as error:
            raise UserError(_explain(error, cls)) from error
        except SettingsError as error:
            raise UserError(f"{str(error).removeprefix('error parsing CLI: ')} (see --help)") from error

    @classmethod
    def from_environment(cls) -> Self:
        """Fill the config from the environment alone, for a process without a command line. Raises UserError."""
        try:
            return cls(_build_sources=((_Environment(cls),), {}))  # type: ignore[call-arg]
        except (ValidationError, SettingsError) as error:
            raise UserError(_explain(error, cls) if isinstance(error, ValidationError) else str(error)) from error

    def to_yaml(self) -> str:
        """Return the resolved config as YAML that `--config` reads again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def set_environment(variables: Mapping[str, str | None]) -> None:
    """Set environment variables for the processes that this one starts, if there is no other way to tell them.

    None unsets a variable.
    """
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def restored_environment() -> Iterator[None]:
    """At the end of the block, let the environment be as it was before it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        set_environment({**dict.fromkeys(os.environ), **before})


def is_submitted() -> bool:
    """Return whether `ray job submit` started this process."""
    return SUBMITTED_VARIABLE in os.environ


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors of one line."""

    def error(self, message: str) -> NoReturn:
        """Raise `message` as a UserError, with the flag that an unknown one was meant to be."""
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        meant = unknown and difflib.get_close_matches(unknown[1].replace("_", "-"), self._option_string_actions, n=1)
        raise UserError(message + (f"; did you mean {meant[0]}?" if meant else "") + " (see --help)")


def _can_be_unset(model: type[BaseModel], path: list[str]) -> bool:
    """Return whether a flag's `none`, a subclass of str, unsets a setting: it may be None, and cannot be a text.

    A folder, a label or a model may be called none.
    """
    field = model.model_fields.get(path[0])
    options = () if field is None else get_args(field.annotation) or (field.annotation,)
    if len(path) == 1:
        kinds = [get_args(option)[0] if get_origin(option) is Annotated else option for option in options]
        return not kinds or (type(None) in kinds and str not in kinds)
    return any(
        _can_be_unset(part, path[1:]) for part in options if isinstance(part, type) and issubclass(part, BaseModel)
    )


def _split(text: str) -> list[str]:
    """Return the values of a setting that takes several: a list of texts in JSON, or else what stands between commas.

    One that holds a comma stands between double quotes. A single one is taken as it is, spaces included.
    """
    with suppress(ValueError):
        listed = json.loads(text)
        if isinstance(listed, list) and all(isinstance(value, str) for value in listed):
            return listed
    with suppress(csv.Error):
        values = next(csv.reader([text], skipinitialspace=True), [])
        if len(values) > 1:
            return [value.strip() for value in values]
        return next(csv.reader([text]), []) or [text]
    return [text]


# Pydantic's own terms for settings of a component that need not be there, "ifdef" and "undefined", tell a user nothing.


def _from_environment(cls: type[JobConfig]) -> frozenset[str]:
    return frozenset(name for name, field in cls.model_fields.items() if FROM_ENVIRONMENT in field.metadata)


class _Refused(argparse.Action):
    """A flag that is none, since its value would stand in the list of processes."""

    def __call__(self, *_: Any) -> NoReturn:
        raise UserError(f"{self.option_strings[0]} is no flag: set {ENV_PREFIX}{self.dest.upper()} in the environment")


def _add_flag(hidden: Collection[str], parser: argparse.ArgumentParser, *names: str, **options: Any) -> argparse.Action:
    if (name := names[0].lstrip("-").replace("-", "_")) in hidden:
        return parser.add_argument(
            names[0], dest=name, action=_Refused, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    help_text = options["help"].replace("(ifdef: required)", "(required if one of these is given)")
    help_text = help_text.removesuffix("(default: none)").rstrip()  # to most flags, none is a name like any
    return argparse.ArgumentParser.add_argument(parser, *names, **options | {"help": help_text})


def _add_group(parser: argparse.ArgumentParser, *, description: str | None, **options: Any) -> Any:
    text = (description or "").removeprefix("default: none (undefined)").lstrip()
    return argparse.ArgumentParser.add_argument_group(parser, description=text, **options)


class _Environment(EnvSettingsSource):
    """Environment variables; several values stand between commas, as in flags, or in a list of JSON."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        if get_origin(field.annotation) is tuple:
            return _split(value) if value else []
        return super().decode_complex_value(field_name, field, value)


class _ConfigFile(YamlConfigSettingsSource):
    """The file of --config."""

    def _read_file(self, file_path: Any) -> dict[str, Any]:
        content = yaml.safe_load(Path(file_path).read_bytes()) or {}  # bytes: Windows may have written UTF-16
        if not isinstance(content, dict):
            raise UserError(f"--config {file_path}: expected 'key: value' lines, found a {type(content).__name__}")
        _refuse_odd_keys(content, f"--config {file_path}")
        return content


def _read(cls: type[JobConfig], path: str | None) -> _ConfigFile:
    """Read the file of --config, if there is one. Raises UserError if it cannot be read or is not YAML."""
    try:
        if path is not None:
            Path(path).read_bytes()  # pydantic-settings passes over a file that it cannot find
        file = _ConfigFile(cls, path)
        if secret := next((name for name in file.yaml_data if name in _from_environment(cls)), None):
            raise UserError(f"--config {path}: {secret} is read from the environment alone; take it out")
        return file
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error


def _refuse_odd_keys(content: dict[Any, Any], where: str) -> None:
    for key, value in content.items():
        if not isinstance(key, str):
            raise UserError(
                f"{where}: the key {key!r} is not the name of a setting (YAML reads no and on as false and true); "
                "see --help"
            )
        if isinstance(value, dict):
            _refuse_odd_keys(value, where)


def _refuse_unknown_environment(known: Collection[str]) -> None:
    for key in os.environ:
        name = key.removeprefix(ENV_PREFIX).split(_NESTING)[0].lower()
        if key.startswith(ENV_PREFIX) and name not in known:
            raise UserError(f"environment variable {key} names no setting of any job; unset it (see --help)")


def _explain(error: ValidationError, cls: type[JobConfig]) -> str:
    positional = {name for name, field in cls.model_fields.items() if _POSITIONAL in field.metadata}
    parts = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        flag = key.upper() if positional.intersection(item["loc"][:1]) else "--" + key.replace("_", "-")
        if item["type"] == "extra_forbidden":
            parts.append(f"{key}: no such setting (see --help)")
        elif item["type"] == "missing":
            parts.append(f"{flag} is required")
        else:
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "string_type" and isinstance(item["input"], bool):
                message += " (YAML reads yes, no, on and off as true and false: put the word between quotes)"
            parts.append(f"{flag}: {item['input']!r} is refused: {message}" if key else message)
    return "; ".join(dict.fromkeys(parts))
