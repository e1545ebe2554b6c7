"""Parts come out as they went in, however they are cut into chunks; an answer that ends early is never a whole one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btray.pacs.multipart import CutShort, Part, boundary_of, read_parts, write_parts

BODIES = st.lists(st.binary(max_size=60) | st.just(b"\r\n--b") | st.just(b"--b--\r\n\r\n"), max_size=4)
MOST = 1 << 20


def chunks(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def without_lengths(bodies: list[bytes]) -> bytes:
    parts = [b"--boundary\r\nContent-Type: application/dicom\r\n\r\n" + body + b"\r\n" for body in bodies]
    return b"".join([*parts, b"--boundary--\r\n"])


@settings(max_examples=150, deadline=None)
@given(bodies=BODIES, size=st.integers(1, 50), lengths=st.booleans(), data=st.data())
def test_a_body_gives_its_parts_and_one_that_was_cut_gives_some_and_an_error(
    bodies: list[bytes], size: int, lengths: bool, data: st.DataObject
) -> None:
    whole = write_parts(bodies, b"boundary", "application/dicom") if lengths else without_lengths(bodies)
    whole = b"a preamble\r\n" + whole
    parts = [part.body for part in read_parts(chunks(whole, size), b"boundary", max_bytes=MOST)]
    assert parts == bodies

    end = data.draw(st.integers(0, len(whole) - 5), label="cut after")
    found: list[bytes] = []
    with pytest.raises(CutShort):
        found.extend(part.body for part in read_parts(chunks(whole[:end], size), b"boundary", max_bytes=MOST))
    assert found == bodies[: len(found)]


@pytest.mark.parametrize("lengths", [True, False])
def test_of_a_part_that_is_too_large_little_is_held(lengths: bool) -> None:
    large = bytes(range(256)) * 4096
    bodies = [b"small", large, b"last"]
    whole = write_parts(bodies, b"boundary", "application/dicom") if lengths else without_lengths(bodies)
    first, second, third = read_parts(chunks(whole, 5000), b"boundary", max_bytes=100_000)
    assert (first, third) == (Part(b"small", 5), Part(b"last", 4))
    assert second.size == len(large)
    assert large.startswith(second.body)
    assert 0 < len(second.body) <= 64 << 10


@pytest.mark.parametrize("length", [b"3", b"9"])
def test_a_part_of_another_length_than_it_says_is_none(length: bytes) -> None:
    whole = b"--b\r\nContent-Length: " + length + b"\r\n\r\n12345\r\n--b--"
    with pytest.raises(CutShort):
        list(read_parts([whole], b"b", max_bytes=MOST))


def test_the_boundary_is_found_in_any_spelling() -> None:
    assert boundary_of('multipart/related; type="application/dicom"; boundary="a b"') == b"a b"
    assert boundary_of("Multipart/Related; boundary=ab; type=application/dicom") == b"ab"
    assert boundary_of("application/dicom") is boundary_of("text/plain; boundary=ab") is boundary_of("") is None
