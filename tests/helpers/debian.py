"""Debian packages that a test needs, installed if possible."""

from __future__ import annotations

import os
import shutil
import subprocess

INSTALL_SECONDS = 240


def install(packages: str, program: str) -> bool:
    """Try to install the packages, with blanks between them, that `program` needs; return whether it is available."""
    if shutil.which(program) is None and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", *packages.split()]):
            command = ["timeout", str(INSTALL_SECONDS), "apt-get", "-qq", *words]
            subprocess.run(command, env=quiet, capture_output=True, check=False)
    return shutil.which(program) is not None
