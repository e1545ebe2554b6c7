"""Stands before HAProxy's binary and keeps what Ray Serve makes of it to this machine; then becomes HAProxy.

Ray 2.60 has HAProxy's metrics and statistics listen on all interfaces, makes its admin socket writable for everyone and
turns its own 502, 503 and 504 into 500. Ray starts this file's `wrapper` in place of the binary
(RAY_SERVE_HAPROXY_BINARY_PATH); it mends the configuration that Ray wrote and starts nothing where it cannot.

Run by a bare Python: only the standard library is imported here.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import sys
from pathlib import Path

# Pattern of a whole line -> its replacement, and whether a configuration without such a line is refused.
_RULES: tuple[tuple[str, str, bool], ...] = (
    (r"^(\s*)bind :(\d+)\s*$", r"\1bind 127.0.0.1:\2", False),
    (r"^(\s*)bind \*:(\d+)\s*$", r"\1bind 127.0.0.1:\2", False),
    (r"^(\s*stats socket \S+) mode 666 (.*)$", r"\1 mode 600 \2", True),
    (r"^\s*errorfile 50[234] .*\n", "", False),
    # A client that sends its headers or its body drop by drop holds a connection for as long, not for an hour.
    (r"^(\s*)timeout client 3600s$", r"\1timeout client 75s\n\1timeout http-request 20s", False),
)
# What may not be left: a listener on all interfaces that is not the service's own frontend, an open socket.
_FORBIDDEN = re.compile(r"^\s*bind (:|\*:)|mode 666", re.MULTILINE)


def narrowed(configuration: str) -> str:
    """The configuration, kept to this machine. Raises ValueError where it is not what Ray 2.60 writes."""
    for pattern, replacement, needed in _RULES:
        configuration, count = re.subn(pattern, replacement, configuration, flags=re.MULTILINE)
        if needed and not count and "mode 600" not in configuration:
            raise ValueError(f"HAProxy's configuration has no line like {pattern}: this Ray writes another one")
    found = _FORBIDDEN.search(configuration)
    if found:
        raise ValueError(f"HAProxy's configuration would be open: {found.group().strip()}")
    return configuration


def wrapper(folder: Path, binary: str) -> Path:
    """Write the executable that Ray is to start in place of `binary` into `folder`, and return it."""
    path = folder / "haproxy"
    program = "from runpy import run_path; from sys import argv; run_path(argv[1])['main'](argv[2], argv[3:])"
    command = shlex.join([sys.executable, "-I", "-S", "-c", program, os.path.abspath(__file__), binary])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    path.chmod(0o700)
    return path


def main(binary: str, arguments: list[str]) -> None:
    """Mend the configuration file that `arguments` name, then become `binary`."""
    os.umask(0o077)
    for flag, value in itertools.pairwise(arguments):
        if flag == "-f":
            file = Path(value)
            file.write_text(narrowed(file.read_text(encoding="utf-8")), encoding="utf-8")
    os.execv(binary, [binary, *arguments])  # noqa: S606 - no shell; Ray asks after the process that it started
