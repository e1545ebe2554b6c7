"""Stands before HAProxy's binary and mends what Ray Serve configures; then becomes HAProxy.

Ray 2.60 has HAProxy's metrics and statistics listen on all interfaces, makes its admin socket writable for everyone,
turns its own 502, 503 and 504 into 500, does not tell replicas who asks, and lets everything through to them at once.
Ray starts this file's `wrapper` in place of the binary (RAY_SERVE_HAPROXY_BINARY_PATH); it mends the configuration that
Ray wrote and starts nothing where it cannot.

Run by a bare Python: only the standard library is imported here.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import sys
from http import HTTPStatus
from pathlib import Path

QUEUE_SECONDS = 1
"""Longest that a request waits for a place at a replica."""

_MENDED = "# Mended by btray.serving.haproxy.\n"
# HAProxy's own answers are pages of HTML: status -> the code that programs are told, and what people are.
_ANSWERS: dict[int, tuple[str, str]] = {
    400: ("bad_request", "this is no HTTP that is understood here"),
    408: ("timeout", "the request did not arrive in time"),
    500: ("internal", "the proxy failed"),
    502: ("internal", "the replica that was asked is gone: try again"),
    503: ("busy", "the replicas have as many requests as they take"),
    504: ("timeout", "the replica did not answer in time"),
}
_Rule = tuple[str, str, str]


def mended(configuration: str, host: str, places: int) -> str:
    """The configuration, kept to this machine but for the service itself, which listens on `host`.

    A replica is given `places` requests at a time, and as many wait for all of them together; the next ones are refused
    here, which costs the replicas nothing. Raises ValueError where the configuration is not what Ray 2.60 writes.
    """
    if configuration.startswith(_MENDED):
        return configuration
    section, lines = "", [_MENDED]
    required, optional = _required(host), _optional(places)
    used: set[_Rule] = set()
    for line in configuration.splitlines(keepends=True):
        section = " ".join(line.split()) if re.match(r"\w", line) else section
        rule = next((rule for rule in (*required, *optional) if _fits(rule, section, line)), None)
        if rule:
            used.add(rule)
            lines.append(re.sub(rule[1], rule[2], line))
        elif re.search(r"^\s*bind\b|mode 666", line):
            raise ValueError(f"HAProxy's configuration would be open: {line.strip()} in {section}")
        else:
            lines.append(line)
    for where, pattern, _ in set(required) - used:
        raise ValueError(f"HAProxy's configuration has no line like {pattern} in {where}: this Ray writes another one")
    return "".join(lines)


def _fits(rule: _Rule, section: str, line: str) -> bool:
    return re.match(rule[0], section) is not None and re.fullmatch(rule[1], line.rstrip("\n")) is not None


def _required(host: str) -> list[_Rule]:
    """Section, whole line, and what stands there instead; without one of them HAProxy is not started."""
    service = f"[{host.strip('[]')}]" if ":" in host else host
    return [
        ("global$", r"(\s*stats socket \S+) mode 666( .*)", r"\1 mode 600\2"),
        ("frontend prometheus$", r"(\s*)bind :(\d+)", r"\1bind 127.0.0.1:\2"),
        ("listen stats$", r"(\s*)bind \*:(\d+)", r"\1bind 127.0.0.1:\2"),
        # Replicas listen on loopback alone and take the caller's address from HAProxy, never from the caller.
        (
            "frontend http_frontend$",
            r"(\s*)bind \S+:(\d+)",
            rf"\1bind {service}:\2\n\1http-request set-header X-Forwarded-For %[src]",
        ),
    ]


def _optional(places: int) -> list[_Rule]:
    answers = "".join(rf"\n\1http-error status {status} {_answer(status)}" for status in _ANSWERS)
    away = _problem(503, "not_ready", "the service starts, or ends")
    refused = f"http-request return status 503 {_answer(503)} if METH_POST {{ queue ge {places} }}"
    return [
        # Who asked for what goes to no log of the machine; the socket for metrics is another one.
        ("global$", r"\s*log \S+ local0 info", ""),
        ("defaults$", r"\s*errorfile 50[234] .*", ""),
        ("defaults$", r"(\s*)mode http", rf"\1mode http\n\1timeout queue {QUEUE_SECONDS}s{answers}"),
        # A client that sends its headers or its body drop by drop holds a connection for as long, not for an hour.
        ("defaults$", r"(\s*)timeout client 3600s", r"\1timeout client 75s\n\1timeout http-request 20s"),
        # The service has every path: it is missing where it is not there yet, or no longer.
        (
            "backend default_backend$",
            r"(\s*)http-request return status 404 .*",
            rf"\1http-request return status 503 {away}",
        ),
        # Health and metrics pass by what waits.
        (
            "backend http-",
            r"(\s*)# Servers in this backend",
            rf"\1{refused}\n\1http-request set-priority-class int(-1) unless METH_POST",
        ),
        ("backend http-", r"(\s*server \S+ \S+ check(?!.* backup$).*)", rf"\1 maxconn {places}"),
    ]


def _answer(status: int) -> str:
    """HAProxy's own answer of a status."""
    return _problem(status, *_ANSWERS[status])


def _problem(status: int, code: str, detail: str) -> str:
    """problem+json, in HAProxy's words."""
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "code": code}
    text = json.dumps({**content, "detail": detail, "error": detail})
    wait = " hdr Retry-After 1" if status in (502, 503, 504) else ""
    return f"content-type application/problem+json string '{text}'{wait}"


def wrapper(folder: Path, binary: str, host: str, places: int) -> Path:
    """Write the executable that Ray is to start in place of `binary` into `folder`, and return it."""
    path = folder / "haproxy"
    program = "from runpy import run_path; from sys import argv; run_path(argv[1])['main'](*argv[2:5], argv[5:])"
    guard = os.path.abspath(__file__)
    command = shlex.join([sys.executable, "-I", "-S", "-c", program, guard, binary, host, str(places)])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    path.chmod(0o700)
    return path


def main(binary: str, host: str, places: str, arguments: list[str]) -> None:
    """Mend the configuration file that `arguments` name, then become `binary`."""
    os.umask(0o077)
    for flag, value in itertools.pairwise(arguments):
        if flag == "-f":
            file = Path(value)
            file.write_text(mended(file.read_text(encoding="utf-8"), host, int(places)), encoding="utf-8")
    os.execv(binary, [binary, *arguments])  # noqa: S606 - no shell; Ray asks after the process that it started
