"""HAProxy as Ray configures it is kept to this machine, or not started."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
from ray.serve._private import haproxy_templates

from btray.haproxy_guard import narrowed, wrapper

CONFIGURATION = """global
    stats socket /tmp/x/admin.sock mode 666 level admin expose-fd listeners
defaults
    timeout client 3600s
    errorfile 502 /tmp/x/500.http
    errorfile 503 /tmp/x/500.http
    errorfile 504 /tmp/x/500.http
    balance leastconn
frontend prometheus
    bind :9101
frontend http_frontend
    bind 0.0.0.0:8000
listen stats
  bind *:8404
"""


def test_all_but_the_frontend_is_kept_to_this_machine() -> None:
    safe = narrowed(CONFIGURATION)
    assert re.findall(r"bind (\S+)", safe) == ["127.0.0.1:9101", "0.0.0.0:8000", "127.0.0.1:8404"]
    assert "mode 600 level admin" in safe
    assert "mode 666" not in safe
    assert "errorfile" not in safe
    assert "timeout http-request" in safe
    assert narrowed(safe) == safe, "what is mended already stays as it is"


@pytest.mark.parametrize("line", ["    bind :9101 name x", "  bind *:8404 ssl", "    stats socket ipv4@:1 mode 666"])
def test_what_another_ray_writes_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"open|no line"):
        narrowed(CONFIGURATION + line + "\n")
    with pytest.raises(ValueError, match="no line"):
        narrowed(CONFIGURATION.replace("stats socket", "stats no socket").replace("mode 666", ""))


def test_the_installed_ray_writes_what_the_guard_expects() -> None:
    template = haproxy_templates.HAPROXY_CONFIG_TEMPLATE
    for line in ("mode 666 level admin", "bind :{{ config.metrics_port }}", "bind *:{{ config.stats_port }}"):
        assert line in template
    assert "errorfile 503 {{ config.error_file_path }}" in template


def test_the_wrapper_mends_the_file_and_becomes_the_binary(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_text('#!/bin/sh\necho "$$ $@"\n')
    binary.chmod(0o700)
    file = tmp_path / "a file.cfg"
    file.write_text(CONFIGURATION)
    path = wrapper(tmp_path, str(binary))
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    process = subprocess.Popen([path, "-db", "-f", str(file), "-sf", "1"], stdout=subprocess.PIPE, text=True)
    said, _ = process.communicate(timeout=20)
    assert said.strip() == f"{process.pid} -db -f {file} -sf 1", "Ray looks for the process that it started"
    assert file.read_text() == narrowed(CONFIGURATION)
    file.write_text("nothing that is known")
    refused = subprocess.run([path, "-f", str(file)], capture_output=True, text=True, check=False, timeout=20)
    assert refused.returncode != 0
    assert refused.stdout == ""
