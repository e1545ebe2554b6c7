"""Memory that is freed stays with the process that asked for that."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource, sys, threading
import numpy as np
from btray.core.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def work():
    for _ in range(20):
        np.ones(48 << 20, np.uint8)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
work()
print(faults())
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_arrays_that_come_again_cost_no_page_faults() -> None:
    assert faults("keep") * 20 < faults("give back")
