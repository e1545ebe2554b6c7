"""Processes of this machine, by their number: what one started, whether it lives, and waiting for what they do."""

from __future__ import annotations

import ipaddress
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def descendants(root: int) -> set[int]:
    """All processes that `root` started, directly or not, and that live."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        children.setdefault(parent, []).append(int(status.parent.name))
    found: set[int] = set()
    frontier = [root]
    while frontier:
        frontier = [child for pid in frontier for child in children.get(pid, [])]
        found.update(frontier)
    return found


def named(word: bytes, root: int) -> list[int]:
    """Those that `root` started whose command line, or Ray's title, holds `word`."""
    return [pid for pid in sorted(descendants(root)) if word in command_line(pid)]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def command_line(pid: int) -> bytes:
    """The process's words, each followed by a zero; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def cpu_seconds(pid: int) -> float:
    """What the process has used of the cores so far, in user mode and in the kernel; 0 once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def listened_on(pids: Iterable[int]) -> set[tuple[str, int]]:
    """IP addresses, `::` and `0.0.0.0` for all, and ports on which these processes take TCP connections."""
    sockets = set()
    for pid in pids:
        for open_file in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(os.readlink(open_file))
            except OSError:  # closed, or the process has ended
                continue
    found = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:  # LISTEN
                address, _, port = words[1].partition(":")
                found.add((_address(address), int(port, 16)))
    return found


def _address(digits: str) -> str:
    """The kernel's hexadecimal digits, words of four bytes with the lowest one first, as people write them."""
    words = [bytes.fromhex(digits[start : start + 8])[::-1] for start in range(0, len(digits), 8)]
    address = ipaddress.ip_address(b"".join(words))
    return str(getattr(address, "ipv4_mapped", None) or address)


def until(condition: Callable[[], Any], what: str = "a condition", seconds: float = 120) -> Any:
    """What `condition` gives once it is true; raises TimeoutError, which names `what`, after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s in vain for {what}")
        time.sleep(0.05)
    return found
