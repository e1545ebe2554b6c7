"""Runs command lines as their users do, each in a process of its own, but pays for the imports once.

python -m tests.helpers.forked_jobs < cases.json: a list of {"script", "arguments", "environment"}; prints a list of
{"code", "stdout", "stderr"}. The scripts' modules are imported first, then each case runs in a fork.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Ended(NamedTuple):
    """How a command line ended."""

    code: int
    stdout: str
    stderr: str


def run_all(
    cases: Sequence[tuple[str, Sequence[str]]],
    environment: Mapping[str, str] | None = None,
    **of_case: Mapping[str, str],
) -> list[Ended]:
    """Run (script below the checkout, arguments) each; `of_case` adds to the environment by position, as `case3={}`."""
    wanted = [
        {"script": script, "arguments": list(arguments), "environment": dict(of_case.get(f"case{number}", {}))}
        for number, (script, arguments) in enumerate(cases)
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.forked_jobs"],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )
    return [Ended(**ended) for ended in json.loads(done.stdout)]


def _run(case: Mapping[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        child = os.fork()
        if child == 0:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            os.environ.update(case["environment"])
            os._exit(_outcome(str(ROOT / case["script"]), case["arguments"]))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        stdout.seek(0)
        stderr.seek(0)
        return {"code": code, "stdout": stdout.read(), "stderr": stderr.read()}


def _outcome(script: str, arguments: Sequence[str]) -> int:
    sys.argv = [script, *arguments]
    code: Any = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code)


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    import btray.evaluation.job
    import btray.training.job  # noqa: F401

    print(json.dumps([_run(case) for case in cases]))
