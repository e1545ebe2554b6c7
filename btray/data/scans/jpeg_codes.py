"""Codes of sequential JPEG, read one by one where libjpeg-turbo cannot be made to warn of damage; no pixels are made.

It takes about half a second per megabyte. References are to ITU-T T.81.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Final

import numpy as np

_SOF: Final = (0xC0, 0xC1)
_DHT, _EOI, _SOS, _DQT, _DRI, _RST0 = 0xC4, 0xD9, 0xDA, 0xDB, 0xDD, 0xD0
_MOST_DC: Final = 1024  # what the DCT makes of a block of 8x8 samples that are all -128 (A.3.3)
_ZERO_RUN: Final = 0xF0
_END: Final = 64  # coefficients of a block
_SCAN_END: Final = re.compile(rb"\xff+[^\0\xd0-\xd7\xff]")
_RESTARTS: Final = re.compile(rb"\xff+([\xd0-\xd7])")
# Codes that do not exist end the reading of a block, which takes less than so many bytes.
_PADDING: Final = b"\xff" * 512


@dataclass
class _Component:
    across: int
    down: int
    table: int
    dc: Sequence[int] = field(default_factory=list)
    ac: Sequence[int] = field(default_factory=list)
    most: int = 0
    """Largest DC coefficient that an encoder can write, whichever way it rounds."""


def check_codes(data: bytes, interval: int) -> None:
    """Raise ValueError if the codes of a JPEG (8 bit, sequential, Huffman) are not those of all its blocks.

    `data` begins at a segment; `interval` is that of the restarts, in MCUs, as said before it; 0: none.
    """
    try:
        _Reader(interval).read(data)
    except (IndexError, KeyError) as error:
        raise ValueError("Premature end of JPEG file, or a table that is missing") from error


class _Reader:
    """What the segments of a JPEG have said so far."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.size = 0, 0
        self.steps: dict[int, int] = {}
        self.tables: dict[int, list[int]] = {}
        self.components: dict[int, _Component] = {}
        self.seen: set[int] = set()

    def read(self, data: bytes) -> None:
        """Read all scans."""
        at = 0
        while True:
            if data[at] != 0xFF:
                raise ValueError("Corrupt JPEG data: bytes that belong to no segment")
            while data[at + 1] == 0xFF:
                at += 1
            marker = data[at + 1]
            if marker == _EOI:
                break
            body = data[at + 4 : at + 2 + (data[at + 2] << 8 | data[at + 3])]
            at += 4 + len(body)
            self._note(marker, body)
            if marker == _SOS:
                end = _SCAN_END.search(data, at)
                if end is None:
                    raise ValueError("Premature end of JPEG file")
                _check_scan(
                    data[at : end.start()], self.size, self.components.values(), self._choose(body), self.interval
                )
                at = end.start()
        if self.seen != self.components.keys() or not self.seen:
            raise ValueError("Corrupt JPEG data: a component without a scan")

    def _note(self, marker: int, body: bytes) -> None:
        """Note what a segment says of the scans after it."""
        if marker == _DQT:
            _add_steps(body, self.steps)
        elif marker == _DHT:
            _add_codes(body, self.tables)
        elif marker == _DRI:
            self.interval = int.from_bytes(body, "big")
        elif marker in _SOF:
            self.size = body[3] << 8 | body[4], body[1] << 8 | body[2]
            parts = (body[start : start + 3] for start in range(6, 6 + 3 * body[5], 3))
            self.components = {name: _Component(factors >> 4, factors & 15, table) for name, factors, table in parts}

    def _choose(self, body: bytes) -> list[_Component]:
        """Return the components of a scan, with its tables."""
        chosen = []
        for name, number in zip(body[1 : 1 + 2 * body[0] : 2], body[2 : 2 + 2 * body[0] : 2], strict=True):
            part, step = self.components[name], self.steps[self.components[name].table]
            part.dc, part.ac = self.tables[number >> 4], self.tables[0x10 | number & 15]
            part.most = (_MOST_DC + step) // step
            chosen.append(part)
            self.seen.add(name)
        return chosen


def _add_steps(body: bytes, steps: dict[int, int]) -> None:
    """Add the DC's quantisation step of each table (B.2.4.1)."""
    while body:
        wide = 1 + (body[0] >> 4)
        steps[body[0] & 15] = int.from_bytes(body[1 : 1 + wide], "big")
        body = body[1 + 64 * wide :]


def _add_codes(body: bytes, tables: dict[int, list[int]]) -> None:
    """Add tables that give, for the next 16 bits, what to do with the code that these begin with (B.2.4.2).

    For DC: length of the code << 8 | bits of the difference. For AC: bits of code and coefficient << 8 | coefficients.
    0 stands for codes that do not exist.
    """
    while body:
        kind, counts, symbols = body[0], body[1:17], iter(body[17:])
        table: list[int] = []
        for length, count in enumerate(counts, start=1):
            for symbol in (next(symbols) for _ in range(count)):
                table += [_entry(length, symbol, kind >> 4)] * (1 << 16 - length)
        tables[kind] = (table + [0] * 65536)[:65536]
        body = body[17 + sum(counts) :]


def _entry(length: int, symbol: int, is_ac: int) -> int:
    if not is_ac:
        return length << 8 | symbol if symbol <= 11 else 0
    run, bits = symbol >> 4, symbol & 15
    if bits:
        return length + bits << 8 | run + 1
    return length << 8 | {0: _END, _ZERO_RUN: 16}[symbol] if symbol in (0, _ZERO_RUN) else 0


def _check_scan(
    body: bytes, size: tuple[int, int], components: Collection[_Component], chosen: list[_Component], interval: int
) -> None:
    """Read one scan, which has blocks of `chosen` (A.2)."""
    across, down = 8 * max(part.across for part in components), 8 * max(part.down for part in components)
    if len(chosen) == 1:
        (part,) = blocks = chosen
        count = -(-size[0] * part.across // across) * -(-size[1] * part.down // down)
    else:
        blocks = [part for part in chosen for _ in range(part.across * part.down)]
        count = -(-size[0] // across) * -(-size[1] // down)
    pieces = _RESTARTS.split(body)
    for number, piece in enumerate(pieces[::2]):
        if number and pieces[2 * number - 1][0] != _RST0 + (number - 1) % 8:
            raise ValueError("Corrupt JPEG data: a restart marker out of order")
        mcus = min(interval or count, count)
        count -= mcus
        _check_blocks(piece.replace(b"\xff\0", b"\xff"), blocks, mcus)
    if count:
        raise ValueError("Premature end of JPEG file")


def _check_blocks(codes: bytes, blocks: list[_Component], mcus: int) -> None:
    """Read the blocks between two restarts: so many MCUs of `blocks`."""
    levels = np.frombuffer(codes + _PADDING, np.uint8).astype(np.uint32)
    words = (levels[:-3] << 24 | levels[1:-2] << 16 | levels[2:-1] << 8 | levels[3:]).data
    end, at = 8 * len(codes), 0
    means = {id(part): 0 for part in blocks}
    for part in chain.from_iterable(repeat(blocks, mcus)):
        entry = part.dc[words[at >> 3] >> 16 - (at & 7) & 0xFFFF]
        at += entry >> 8
        if bits := entry & 0xFF:
            value = (words[at >> 3] << (at & 7) & 0xFFFFFFFF) >> 32 - bits
            means[id(part)] += value if value >> bits - 1 else value - (1 << bits) + 1
            at += bits
            if abs(means[id(part)]) > part.most:
                raise ValueError("Corrupt JPEG data: a DC coefficient is out of range")
        table, number = part.ac, 1
        while entry and number < _END:
            entry = table[words[at >> 3] >> 16 - (at & 7) & 0xFFFF]
            at += entry >> 8
            number += entry & 0xFF
        if not entry:
            raise ValueError("Corrupt JPEG data: a code that does not exist")
        if number > _END and entry & 0xFF < _END:
            raise ValueError("Corrupt JPEG data: more than 64 coefficients in a block")
        if at > end:
            raise ValueError("Premature end of JPEG file")
    if end - at >= 8:
        raise ValueError("Corrupt JPEG data: bytes after the last block")
