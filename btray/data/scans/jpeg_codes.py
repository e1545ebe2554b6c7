"""Codes of JPEG, read one by one where libjpeg-turbo cannot be made to warn of damage; no pixels are made.

It takes about half a second per megabyte. References are to ITU-T T.81.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Final

import numpy as np

_SOF: Final = (0xC0, 0xC1, 0xC2)
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
    known: dict[int, int] = field(default_factory=dict)
    """Of a progressive JPEG, for each block that has any: a bit for each AC coefficient that is not zero so far."""


def check_codes(data: bytes, interval: int, *, progressive: bool) -> None:
    """Raise ValueError if the codes of a JPEG (8 bit, Huffman) are not those of all its blocks.

    `data` begins at a segment; `interval` is that of the restarts, in MCUs, as said before it; 0: none.
    """
    try:
        _Reader(interval, progressive).read(data)
    except (IndexError, KeyError) as error:
        raise ValueError("Premature end of JPEG file, or a table that is missing") from error


class _Reader:
    """What the segments of a JPEG have said so far."""

    def __init__(self, interval: int, progressive: bool) -> None:
        self.interval, self.progressive = interval, progressive
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
                self._check_scan(data[at : end.start()], self._choose(body), body[-3:])
                at = end.start()
        if self.seen != self.components.keys() or not self.seen:
            raise ValueError("Corrupt JPEG data: a component without a scan")

    def _note(self, marker: int, body: bytes) -> None:
        """Note what a segment says of the scans after it."""
        if marker == _DQT:
            _add_steps(body, self.steps)
        elif marker == _DHT:
            _add_codes(body, self.tables, self.progressive)
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
            # a scan of DC or AC alone needs no table of the other
            part.dc, part.ac = self.tables.get(number >> 4, ()), self.tables.get(0x10 | number & 15, ())
            part.most = (_MOST_DC + step) // step
            chosen.append(part)
            self.seen.add(name)
        return chosen

    def _check_scan(self, body: bytes, chosen: list[_Component], band: bytes) -> None:
        """Read one scan, which has blocks of `chosen` (A.2); `band` is what it has of them if it is progressive."""
        across, down = (
            8 * max(getattr(part, side) for part in self.components.values()) for side in ("across", "down")
        )
        width, height = self.size
        if len(chosen) == 1:
            (part,) = blocks = chosen
            count = -(-width * part.across // across) * -(-height * part.down // down)
        else:
            blocks = [part for part in chosen for _ in range(part.across * part.down)]
            count = -(-width // across) * -(-height // down)
        pieces, done = _RESTARTS.split(body), 0
        for number, piece in enumerate(pieces[::2]):
            if number and pieces[2 * number - 1][0] != _RST0 + (number - 1) % 8:
                raise ValueError("Corrupt JPEG data: a restart marker out of order")
            mcus = min(self.interval or count, count - done)
            codes = piece.replace(b"\xff\0", b"\xff")
            if not self.progressive:
                _check_blocks(codes, blocks, mcus)
            elif band[0] == 0:
                _check_means(_Codes(codes), blocks, mcus, band)
            elif len(chosen) > 1:
                raise ValueError("Corrupt JPEG data: a band of several components")
            else:
                _check_details(_Codes(codes), chosen[0], range(done, done + mcus), band)
            done += mcus
        if done < count:
            raise ValueError("Premature end of JPEG file")


def _add_steps(body: bytes, steps: dict[int, int]) -> None:
    """Add the DC's quantisation step of each table (B.2.4.1)."""
    while body:
        wide = 1 + (body[0] >> 4)
        steps[body[0] & 15] = int.from_bytes(body[1 : 1 + wide], "big")
        body = body[1 + 64 * wide :]


def _add_codes(body: bytes, tables: dict[int, list[int]], progressive: bool) -> None:
    """Add tables that give, for the next 16 bits, what to do with the code that these begin with (B.2.4.2).

    For DC: length of the code << 8 | bits of the difference. For AC: bits of code and coefficient << 8 | coefficients;
    if the JPEG is progressive, length of the code << 8 | its symbol. 0 stands for codes that do not exist.
    """
    while body:
        kind, counts, symbols = body[0], body[1:17], iter(body[17:])
        table: list[int] = []
        for length, count in enumerate(counts, start=1):
            for symbol in (next(symbols) for _ in range(count)):
                entry = length << 8 | symbol if progressive and kind >> 4 else _entry(length, symbol, kind >> 4)
                table += [entry] * (1 << 16 - length)
        tables[kind] = (table + [0] * 65536)[:65536]
        body = body[17 + sum(counts) :]


def _entry(length: int, symbol: int, is_ac: int) -> int:
    if not is_ac:
        return length << 8 | symbol if symbol <= 11 else 0
    run, bits = symbol >> 4, symbol & 15
    if bits:
        return length + bits << 8 | run + 1
    return length << 8 | {0: _END, _ZERO_RUN: 16}[symbol] if symbol in (0, _ZERO_RUN) else 0


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


class _Codes:
    """The codes between two restarts of a scan of a progressive JPEG."""

    def __init__(self, codes: bytes) -> None:
        levels = np.frombuffer(codes + _PADDING, np.uint8).astype(np.uint32)
        self._words = (levels[:-3] << 24 | levels[1:-2] << 16 | levels[2:-1] << 8 | levels[3:]).data
        self._end, self._at = 8 * len(codes), 0

    def symbol(self, table: Sequence[int]) -> int:
        """Return what the next code stands for."""
        entry = table[self._words[self._at >> 3] >> 16 - (self._at & 7) & 0xFFFF]
        if not entry:
            raise ValueError("Corrupt JPEG data: a code that does not exist")
        self._at += entry >> 8
        return entry & 0xFF

    def bits(self, count: int) -> int:
        """Return the next bits as a number; `count` is 16 at most."""
        value: int = (self._words[self._at >> 3] << (self._at & 7) & 0xFFFFFFFF) >> 32 - count
        self._at += count
        return value

    def end_block(self) -> None:
        """Raise ValueError if the codes ended before the block did."""
        if self._at > self._end:
            raise ValueError("Premature end of JPEG file")

    def end(self) -> None:
        """Raise ValueError if there are more codes."""
        if self._end - self._at >= 8:
            raise ValueError("Corrupt JPEG data: bytes after the last block")


def _check_means(codes: _Codes, blocks: list[_Component], mcus: int, band: bytes) -> None:
    """Read the DC coefficients of so many MCUs, or one more bit of each (G.1.2.1)."""
    means = {id(part): 0 for part in blocks}
    refines, shift = band[2] >> 4, band[2] & 15
    for part in chain.from_iterable(repeat(blocks, mcus)):
        if refines:
            codes.bits(1)
        elif bits := codes.symbol(part.dc):
            value = codes.bits(bits)
            means[id(part)] += value if value >> bits - 1 else value - (1 << bits) + 1
            if abs(means[id(part)]) - 1 << shift > part.most:  # an encoder shifts negative ones away from zero
                raise ValueError("Corrupt JPEG data: a DC coefficient is out of range")
        codes.end_block()
    codes.end()


def _check_details(codes: _Codes, part: _Component, blocks: range, band: bytes) -> None:
    """Read AC coefficients of some blocks, or one more bit of each (G.1.2.2, G.1.2.3)."""
    if not band[0] <= band[1] < _END:
        raise ValueError("Corrupt JPEG data: a band that does not exist")
    held = sorted(part.known) if band[2] >> 4 else []
    run, block = 0, blocks.start
    while block < blocks.stop:
        if run:  # blocks without new coefficients; a few bytes may stand for very many, which are not walked through
            end = min(block + run, blocks.stop)
            for known in held[bisect_left(held, block) : bisect_left(held, end)]:
                _refine(codes, part.known[known], band[0], band[1], _END)
                codes.end_block()
            run, block = run - (end - block), end
            continue
        run = _check_band(codes, part, block, band)
        codes.end_block()
        block += 1
    if run:
        raise ValueError("Corrupt JPEG data: a run of blocks that are not there")
    codes.end()


def _check_band(codes: _Codes, part: _Component, block: int, band: bytes) -> int:
    """Read a band of one block; return how many blocks after it have no new coefficients."""
    at, last, refines, run = band[0], band[1], band[2] >> 4, 1
    known = part.known.get(block, 0)
    while at <= last:
        zeros, bits = divmod(codes.symbol(part.ac), 16)
        if not bits and zeros < 15:  # of 15: sixteen zeros
            run = (1 << zeros) + codes.bits(zeros)
            break
        if refines and bits > 1:
            raise ValueError("Corrupt JPEG data: a code that does not exist")
        codes.bits(bits)
        at = _refine(codes, known, at, last, zeros) if refines else at + zeros
        if at > last:
            raise ValueError("Corrupt JPEG data: more coefficients than the band has")
        if bits:
            known = part.known[block] = known | 1 << at
        at += 1
    if refines:
        _refine(codes, known, at, last, _END)
    return run - 1


def _refine(codes: _Codes, known: int, at: int, last: int, zeros: int) -> int:
    """Read a bit for each coefficient from `at` that is not zero, up to the one after so many zeros; return where."""
    while at <= last:
        if known >> at & 1:
            codes.bits(1)
        elif zeros == 0:
            break
        else:
            zeros -= 1
        at += 1
    return at
