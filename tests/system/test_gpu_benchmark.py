"""The benchmark for machines with a GPU says why it measures nothing where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_without_a_gpu_nothing_is_measured_and_the_reason_is_told(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(out)]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=hidden, capture_output=True, text=True, check=True, timeout=120)
    result = json.loads(done.stdout)
    assert result == json.loads(out.read_text(encoding="utf-8"))
    assert result.keys() == {"skipped"}
    assert "GPU" in result["skipped"] or "CPUs" in result["skipped"]
