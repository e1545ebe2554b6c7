"""Hostile requests: damaged scans, bombs, bodies with false content types, and invalid HTTP."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

from tests.helpers.scan_corpus import bad_scans, good_scans

KINDS = [
    "image/jpeg",
    "image/png",
    "application/octet-stream",
    "application/json",
    "text/html",
    "multipart/form-data",
    "",
]


@dataclass
class Hostile:
    """One request."""

    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    path: str = "/v1/classify"
    raw: bool = False
    """Send `body` over the socket as it is, including the HTTP head."""


@cache
def corpus() -> list[bytes]:
    return [data for data, _ in bad_scans().values()] + list(good_scans().values())


@cache
def bombs() -> list[bytes]:
    packed = gzip.compress(bytes(200_000_000))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("scan.jpg", bytes(50_000_000))
    return [packed, gzip.compress(packed), zlib.compress(bytes(200_000_000)), file.getvalue()]


def a_scan(rng: random.Random) -> Hostile:
    return Hostile(rng.choice(corpus()), {"Content-Type": rng.choice(KINDS)})


def a_damaged_scan(rng: random.Random) -> Hostile:
    data = bytearray(rng.choice(corpus())[:200_000])
    for _ in range(rng.randint(1, 20)):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    return Hostile(bytes(data[: rng.randint(0, len(data))]), {"Content-Type": "image/jpeg"})


def noise(rng: random.Random) -> Hostile:
    return Hostile(rng.randbytes(rng.randint(0, 20_000)), {"Content-Type": rng.choice(KINDS)})


def a_bomb(rng: random.Random) -> Hostile:
    headers = {
        "Content-Type": "image/png",
        "Content-Encoding": rng.choice(["gzip", "deflate", "br", "gzip, gzip", "x"]),
    }
    return Hostile(rng.choice(bombs()), headers)


def a_multipart(rng: random.Random) -> Hostile:
    boundary = rng.choice(["b", "-" * 70, "x" * 300, 'a"b', "\xff", "b; charset=x"])
    line = f"--{boundary}\r\n"
    part = 'Content-Disposition: form-data; name="images"; filename="a"\r\n\r\nx\r\n'
    depth = rng.randint(1, 40)
    bodies = [
        (line + part) * rng.choice([1, 65, 5000]) + f"--{boundary}--\r\n",
        (line + part) * 3,
        line + "X: " + "y" * 100_000 + "\r\n\r\nx\r\n" + f"--{boundary}--",
        line + "X: y\r\n" * 1000 + "\r\nx\r\n" + f"--{boundary}--",
        "".join(
            f"--{boundary}{n}\r\nContent-Type: multipart/mixed; boundary={boundary}{n + 1}\r\n\r\n"
            for n in range(depth)
        ),
        line + part.replace('"a"', '"' + "../" * 2000 + 'etc/passwd\0"') + f"--{boundary}--\r\n",
        f"--{boundary}--",
        "\r\n" * 10_000 + line,
        (f"\r\n--{boundary[:-1]}" * 20_000),
    ]
    return Hostile(rng.choice(bodies).encode("latin-1"), {"Content-Type": f"multipart/form-data; boundary={boundary}"})


def a_push(rng: random.Random) -> Hostile:
    """Make a body of STOW-RS, damaged or of objects that are none."""
    boundary = rng.choice(["b", "-" * 70, "x" * 300, 'a"b', "b--", ""])
    line = f"\r\n--{boundary}\r\n".encode()
    heads = [b"Content-Type: application/dicom\r\n\r\n", b"\r\n", b"X: " + b"y" * 100_000, b"X: y\r\n" * 1000 + b"\r\n"]
    objects = [rng.choice(corpus())[:100_000] for _ in range(rng.choice([1, 3, 17]))]
    body = b"".join(line + rng.choice(heads) + data for data in objects)
    body += rng.choice([f"\r\n--{boundary}--".encode(), b"", line, b"\r\n--"])
    kind = rng.choice(['type="application/dicom"; ', "type=x; ", "", 'start="<x>"; '])
    path = rng.choice(["/dicomweb/studies", "/dicomweb/studies/1.2", "/dicomweb/studies/..", "/v1/classify"])
    return Hostile(body, {"Content-Type": f"multipart/related; {kind}boundary={boundary}"}, path)


def a_json(rng: random.Random) -> Hostile:
    texts = [
        "[" * 100_000, '{"images":' * 5000, '{"images": [' + "1e999," * 1000 + "1]}", '{"images": NaN}', "\ufeff{}",
        '{"images": [{"data": "' + "A" * 100_000 + '"}]}', '{"images": [{"data": "eA==", "url": "http://127.0.0.1/"}]}',
        '{"images": ["file:///etc/passwd"]}', json.dumps({"images": ["\ud800"]}), '{"images": {"data": "eA=="}}',
        "9" * 10_000, '{"images": [' + ",".join(['"eA=="'] * 5000) + "]}", "null", '"x"',
    ]  # fmt: skip
    return Hostile(rng.choice(texts).encode("utf-8", "surrogatepass"), {"Content-Type": "application/json"})


def a_tensor(rng: random.Random) -> Hostile:
    entry = {
        "name": rng.choice(["image", "pixels", "x"]),
        "datatype": rng.choice(["BYTES", "UINT8", "FP32", "FP64", None]),
        "shape": rng.choice(
            [
                [1],
                [1, 2, 2],
                [2**31 - 1] * 3,
                [-1],
                [],
                [0, 0, 0],
                "x",
                [1, 40, 40],
                [1] * 65,
                [0, 2**31 - 1, 2**31 - 1],
                [2**31 - 1] * 5000,
            ]
        ),
    }
    tail = rng.choice([b"", rng.randbytes(1600), struct.pack("<I", 2**32 - 1), rng.randbytes(6400), b"\0" * 8000])
    key = rng.choice(["data", "parameters"])
    entry[key] = (
        [rng.randint(-9, 300)] if key == "data" else {"binary_data_size": rng.choice([len(tail), -1, 2**70, "x"])}
    )
    head = json.dumps({"inputs": [entry] * rng.choice([1, 1, 1, 50])}).encode()
    length = rng.choice([str(len(head)), "0", "-1", "99999999999999999999", "x"])
    return Hostile(head + tail, {"Inference-Header-Content-Length": length}, "/v2/models/btray/infer")


def broken_http(rng: random.Random) -> Hostile:
    start = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    requests = [
        start + b"X-Large: " + b"x" * rng.choice([10_000, 70_000, 1_000_000]) + b"\r\n\r\n",
        start + b"X: y\r\n" * 20_000 + b"\r\n",
        start + b"Content-Length: -5\r\n\r\nhello",
        start + b"Content-Length: 5\r\nContent-Length: 7\r\n\r\nhello",
        start + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nhello",
        start + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nhello",
        start + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\nGET /v1/models HTTP/1.1\r\n\r\n",
        start + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a/" * 50_000 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET /v1/%00%ff%2e%2e/..;/etc HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET /v1/models HTTP/9.9\r\n\r\n", b"\0\1\2\3" * 100, b"\r\n" * 1000, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET http://example.org/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"POST /v1/classify?top_k=" + b"9" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"TRACE /v1/classify HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    ]  # fmt: skip
    return Hostile(rng.choice(requests), raw=True)


MAKERS: list[Callable[[random.Random], Hostile]] = [
    a_scan, a_damaged_scan, noise, a_multipart, a_push, a_json, a_tensor, broken_http, a_bomb,
]  # fmt: skip


def hostile_bodies(count: int, seed: int) -> Iterator[tuple[str, Hostile]]:
    """Yield `count` requests and the name of their maker; the same seed gives the same requests."""
    for number in range(count):
        rng = random.Random(f"{seed}-{number}")
        maker = MAKERS[number % len(MAKERS)]
        if maker is a_bomb and number % 5:  # fewer of these: they are slow to send and all alike
            maker = a_damaged_scan
        yield f"{maker.__name__} {number}", maker(rng)
