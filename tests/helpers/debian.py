"""Debian's packages that a test needs: installed where that is possible."""

from __future__ import annotations

import os
import shutil
import subprocess

INSTALL_SECONDS = 240


def install(package: str, program: str) -> bool:
    """Whether `program` is there, after an attempt to install the package that has it."""
    if shutil.which(program) is None and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", package]):
            command = ["timeout", str(INSTALL_SECONDS), "apt-get", "-qq", *words]
            subprocess.run(command, env=quiet, capture_output=True, check=False)
    return shutil.which(program) is not None
