"""A strict reader of baseline JPEG in pure Python: it says why a stream is none that T.81 allows, and makes no pixels.

It is the oracle of the damage tests: what it finds nothing wrong with is a valid file, whatever it shows. `sampled`
writes JPEG with sampling factors that no encoder here knows.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

_SOF, _DHT, _DQT, _DRI, _SOS, _EOI = (0xC0, 0xC1), 0xC4, 0xDB, 0xDD, 0xDA, 0xD9
_DC_LIMIT, _LAST = 1024, 63


class InvalidStreamError(Exception):
    """The text is the rule of T.81 that the stream breaks."""


@dataclass
class _Component:
    h: int
    v: int
    table: int
    predictor: int = 0
    dc: Any = None
    ac: Any = None


@dataclass
class _Frame:
    width: int
    height: int
    components: dict[int, _Component]


def fault_of(data: bytes) -> str | None:
    """Return the first rule that a sequential Huffman JPEG of 8 bit breaks, or None if it is valid.

    Raises NotImplementedError for any other kind of JPEG.
    """
    try:
        _read(data)
    except InvalidStreamError as error:
        return str(error)
    except (IndexError, KeyError, struct.error):
        return "headers"
    return None


def _read(data: bytes) -> None:
    quantization: dict[int, int] = {}
    codes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    frame, interval, at = None, 0, 2
    seen: set[int] = set()
    while True:
        if data[at] != 0xFF:
            raise InvalidStreamError("bytes between segments")
        while data[at + 1] == 0xFF:
            at += 1
        marker = data[at + 1]
        if marker == _EOI:
            break
        length = struct.unpack_from(">H", data, at + 2)[0]
        body, at = data[at + 4 : at + 2 + length], at + 2 + length
        if marker == _DQT:
            _quantization(body, quantization)
        elif marker == _DHT:
            _codes(body, codes)
        elif marker == _DRI:
            interval = struct.unpack(">H", body)[0]
        elif marker in _SOF:
            frame = _frame(body)
        elif marker == _SOS:
            assert frame is not None
            at = _scan(data, at, frame, _chosen(frame, body, codes, seen), quantization, interval)
        elif 0xC0 <= marker <= 0xCF and marker != 0xCC:
            raise NotImplementedError(f"SOF{marker - 0xC0}")
    if frame is None or seen != set(frame.components):
        raise InvalidStreamError("a component without a scan")


def _quantization(body: bytes, into: dict[int, int]) -> None:
    while body:
        wide = body[0] >> 4
        into[body[0] & 15] = int.from_bytes(body[1 : 2 + wide], "big")
        body = body[1 + 64 * (1 + wide) :]


def _codes(body: bytes, into: dict[tuple[int, int], list[tuple[int, int]]]) -> None:
    """Fill tables that give (length, symbol) for the next 16 bits; length 0 is a code that does not exist."""
    while body:
        counts, symbols = body[1:17], iter(body[17:])
        table: list[tuple[int, int]] = []
        for length, count in enumerate(counts, start=1):
            for _ in range(count):
                table += [(length, next(symbols))] * (1 << 16 - length)
        into[body[0] >> 4, body[0] & 15] = (table + [(0, 0)] * 65536)[:65536]
        body = body[17 + sum(counts) :]


def _frame(body: bytes) -> _Frame:
    bits, height, width, count = struct.unpack_from(">BHHB", body)
    if bits != 8:
        raise NotImplementedError(f"{bits} bit")
    parts = [body[6 + 3 * index : 9 + 3 * index] for index in range(count)]
    return _Frame(width, height, {number: _Component(hv >> 4, hv & 15, table) for number, hv, table in parts})


def _chosen(frame: _Frame, body: bytes, codes: dict[tuple[int, int], Any], seen: set[int]) -> list[_Component]:
    chosen = []
    for index in range(body[0]):
        number, tables = body[1 + 2 * index : 3 + 2 * index]
        component = frame.components[number]
        component.dc, component.ac = codes[0, tables >> 4], codes[1, tables & 15]
        seen.add(number)
        chosen.append(component)
    return chosen


def _scan(
    data: bytes, at: int, frame: _Frame, chosen: list[_Component], quantization: dict[int, int], interval: int
) -> int:
    """Read the entropy-coded data of one scan and return where the next marker is."""
    most_h = max(part.h for part in frame.components.values())
    most_v = max(part.v for part in frame.components.values())
    if len(chosen) == 1:
        wide = -(-frame.width * chosen[0].h // (8 * most_h))
        high = -(-frame.height * chosen[0].v // (8 * most_v))
        blocks = [chosen[0]]
    else:
        wide, high = -(-frame.width // (8 * most_h)), -(-frame.height // (8 * most_v))
        blocks = [part for part in chosen for _ in range(part.h * part.v)]
    left, number = wide * high, 0
    while left:
        count = min(left, interval or left)
        end = _end_of_segment(data, at)
        _blocks(data[at:end].replace(b"\xff\0", b"\xff"), blocks * count, quantization)
        left -= count
        at = end
        if left:
            if data[at + 1] != 0xD0 + number % 8:
                raise InvalidStreamError("restart marker")
            number, at = number + 1, at + 2
    return at


def _end_of_segment(data: bytes, at: int) -> int:
    while True:
        at = data.find(b"\xff", at)
        if at < 0:
            raise InvalidStreamError("end of data")
        if data[at + 1] != 0:
            return at
        at += 2


def _blocks(bits: bytes, blocks: list[_Component], quantization: dict[int, int]) -> None:
    end, at = 8 * len(bits), 0
    bits += b"\xff\xff\xff\xff"
    for component in blocks:
        component.predictor = 0
    for component in blocks:
        word = int.from_bytes(bits[at >> 3 : (at >> 3) + 4], "big") << (at & 7)
        length, size = component.dc[word >> 16 & 0xFFFF]
        if not length or size > 11:
            raise InvalidStreamError("code")
        at += length
        if size:
            word = int.from_bytes(bits[at >> 3 : (at >> 3) + 4], "big")
            value = word >> 32 - (at & 7) - size & (1 << size) - 1
            component.predictor += value if value >> size - 1 else value - (1 << size) + 1
            at += size
        if at > end:
            raise InvalidStreamError("end of data")
        step = quantization[component.table]
        if abs(component.predictor) * step > _DC_LIMIT + step:
            raise InvalidStreamError("range of DC")
        table, k = component.ac, 1
        while k <= _LAST:
            first = at >> 3
            word = bits[first] << 16 | bits[first + 1] << 8 | bits[first + 2]
            length, symbol = table[word >> 8 - (at & 7) & 0xFFFF]
            at += length + (symbol & 15)
            if at > end:
                raise InvalidStreamError("end of data")
            if not symbol & 15:
                if symbol == 0xF0:
                    k += 16
                    continue
                if symbol or not length:
                    raise InvalidStreamError("code")
                break
            k += (symbol >> 4) + 1
        if k > _LAST + 1:
            raise InvalidStreamError("more than 64 coefficients")
        if at > end:
            raise InvalidStreamError("end of data")
    if end - at >= 8:
        raise InvalidStreamError("bytes after the last block")


def sampled(planes: list[np.ndarray], factors: list[tuple[int, int]], interval: int = 0) -> bytes:
    """Return a JPEG of uint8 `planes` [height, width], all of one size, of which each is sampled by its factors.

    `factors` are across and down, as in its frame header; `interval` is that of the restarts, in MCUs.
    """
    height, width = planes[0].shape
    across, down = (max(pair[axis] for pair in factors) for axis in (0, 1))
    wide, high = -(-width // (8 * across)), -(-height // (8 * down))
    grid = []
    for plane, (h, v) in zip(planes, factors, strict=True):
        resized = Image.fromarray(plane).resize((wide * h * 8, high * v * 8))
        blocks, head = _blocks_of(resized)
        grid.append(np.array(blocks, dtype=object).reshape(high, v, wide, h, 2).transpose(0, 2, 1, 3, 4))
    names = range(1, 1 + len(planes))
    sof = struct.pack(">BHHB", 8, height, width, len(planes))
    sof += b"".join(bytes((name, h << 4 | v, 0)) for name, (h, v) in zip(names, factors, strict=True))
    sos = bytes((len(planes), *(byte for name in names for byte in (name, 0)), 0, 63, 0))
    data = b"\xff\xd8" + head["tables"] + struct.pack(">HHH", 0xFFDD, 4, interval)
    data += b"\xff\xc0" + struct.pack(">H", 2 + len(sof)) + sof + b"\xff\xda" + struct.pack(">H", 2 + len(sos)) + sos
    bits, before = "", [0] * len(planes)
    for number, (row, column) in enumerate(np.ndindex(high, wide)):
        if interval and number and number % interval == 0:
            data += _packed(bits) + bytes((0xFF, 0xD0 + (number // interval - 1) % 8))
            bits, before = "", [0] * len(planes)
        for index, part in enumerate(grid):
            for mean, rest in part[row, column].reshape(-1, 2):
                bits += _difference(mean - before[index], head["dc"]) + rest
                before[index] = mean
    return data + _packed(bits) + b"\xff\xd9"


def _blocks_of(image: Image.Image) -> tuple[list[tuple[int, str]], dict[str, Any]]:
    """Return DC coefficient and bits of the others of each block of a gray JPEG; its tables, and codes of DC."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    data, at, tables = buffer.getvalue(), 2, b""
    codes: dict[int, dict[str, int]] = {}
    while data[at + 1] != _SOS:
        length = struct.unpack_from(">H", data, at + 2)[0]
        segment = data[at : at + 2 + length]
        if data[at + 1] in (_DQT, _DHT):
            tables += segment
        if data[at + 1] == _DHT:
            codes[segment[4]] = _by_code(segment[5:])
        at += 2 + length
    body = data[at + 2 + struct.unpack_from(">H", data, at + 2)[0] : -2].replace(b"\xff\0", b"\xff")
    bits, blocks, mean, at = f"{int.from_bytes(body, 'big'):0{8 * len(body)}b}", [], 0, 0
    for _ in range(image.width * image.height // 64):
        size, at = _symbol(bits, at, codes[0])
        value = int(bits[at : at + size] or "0", 2)
        mean += value if not size or bits[at] == "1" else value - (1 << size) + 1
        at += size
        start, number = at, 1
        while number < 64:
            symbol, at = _symbol(bits, at, codes[0x10])
            at += symbol & 15
            number += 64 if symbol == 0 else (symbol >> 4) + 1
        blocks.append((mean, bits[start:at]))
    return blocks, {"tables": tables, "dc": {symbol: code for code, symbol in codes[0].items()}}


def _by_code(body: bytes) -> dict[str, int]:
    found, code, symbols = {}, 0, iter(body[16:])
    for length, count in enumerate(body[:16], start=1):
        for _ in range(count):
            found[f"{code:0{length}b}"] = next(symbols)
            code += 1
        code <<= 1
    return found


def _symbol(bits: str, at: int, codes: dict[str, int]) -> tuple[int, int]:
    length = next(length for length in range(1, 17) if bits[at : at + length] in codes)
    return codes[bits[at : at + length]], at + length


def _difference(value: int, codes: dict[int, str]) -> str:
    size = abs(value).bit_length()
    return codes[size] + (f"{value if value > 0 else value + (1 << size) - 1:0{size}b}" if size else "")


def _packed(bits: str) -> bytes:
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
