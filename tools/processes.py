"""Processes of this machine by their ids: descendants, state, CPU time and ports, and waiting for a condition."""

from __future__ import annotations

import ipaddress
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def descendants(root: int) -> set[int]:
    """Return all running processes that `root` started, directly or indirectly."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:  # the process has ended
            continue
        children.setdefault(parent, []).append(int(status.parent.name))
    pids: set[int] = set()
    frontier = [root]
    while frontier:
        frontier = [child for pid in frontier for child in children.get(pid, [])]
        pids.update(frontier)
    return pids


def named(word: bytes, root: int) -> list[int]:
    """Return the descendants of `root` whose command line, or the title that Ray sets, contains `word`."""
    return [pid for pid in sorted(descendants(root)) if word in command_line(pid)]


def is_alive(pid: int) -> bool:
    """Return whether a process is running; a zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def command_line(pid: int) -> bytes:
    """Return the command line of a process, each word followed by a zero byte; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds, user and kernel, that a process has used; 0 once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def listened_on(pids: Iterable[int]) -> set[tuple[str, int]]:
    """Return the (IP address, port) pairs on which these processes accept TCP; `::` and `0.0.0.0` mean all."""
    sockets = set()
    for pid in pids:
        for open_file in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(os.readlink(open_file))
            except OSError:  # closed, or the process has ended
                continue
    listening = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:  # LISTEN
                address, _, port = words[1].partition(":")
                listening.add((_address(address), int(port, 16)))
    return listening


def _address(digits: str) -> str:
    """Convert an address from /proc/net/tcp (hexadecimal words of four bytes, little-endian) to its usual notation."""
    words = [bytes.fromhex(digits[start : start + 8])[::-1] for start in range(0, len(digits), 8)]
    address = ipaddress.ip_address(b"".join(words))
    return str(getattr(address, "ipv4_mapped", None) or address)


def until(condition: Callable[[], Any], what: str = "a condition", seconds: float = 120) -> Any:
    """Wait until `condition` returns something true, and return that.

    Raises:
        TimeoutError: it did not within `seconds`; the message names `what`.
    """
    deadline = time.monotonic() + seconds
    while not (outcome := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s in vain for {what}")
        time.sleep(0.05)
    return outcome
