"""An authority of a hospital's own, and the certificate of a server on loopback that it has signed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.helpers.debian import install

_NEW = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]


def private_authority(folder: Path) -> Path:
    """Write ca.crt, and server.crt and server.key for 127.0.0.1; skip the test with a message without openssl."""
    if not install("openssl", "openssl"):
        pytest.skip("OPENSSL ABSENT: a server with a private certificate is NOT tested here")
    for command in (
        [*_NEW, "-subj", "/CN=a hospital", "-keyout", "ca.key", "-out", "ca.crt"],
        [*_NEW, "-subj", "/CN=store", "-keyout", "server.key", "-out", "server.crt", "-CA", "ca.crt", "-CAkey",
         "ca.key", "-addext", "basicConstraints=critical,CA:FALSE", "-addext", "subjectAltName=IP:127.0.0.1"],
    ):  # fmt: skip
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder
