"""A listing by many requests at a time gives what one by one request does, each object once."""

from __future__ import annotations

import random

import pytest

from btray import storage
from btray.storage import s3, s3_listing

pytestmark = pytest.mark.s3


@pytest.fixture
def archive(bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of a few hundred objects in folders, wide and narrow, and beside them; pages have three keys."""
    chance = random.Random(1)
    names = {f"f{chance.randrange(3)}/g{chance.randrange(40)}/{chance.randrange(9)}.jpg" for _ in range(150)}
    names |= {f"f{chance.randrange(3)}/{chance.randrange(9)}.jpg" for _ in range(20)} | {"f0.jpg", "z.jpg", "f1-x", "a"}
    names |= {f"wide/{number:03d}/x y+%.jpg" for number in range(60)} | {"f1/.hidden", "deep/1/2/3/4/5.jpg", "f0/g1"}
    for name in names:
        storage.write_bytes(storage.join(bucket, name), b"x")
    call = s3.call
    monkeypatch.setattr(s3, "call", lambda uri, method, **more: call(uri, method, **({"MaxKeys": 3} | more)))
    monkeypatch.setattr(s3_listing, "_FIRST_PAGES", 2)
    return bucket


def test_it_gives_what_a_listing_one_page_after_the_other_does(archive: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for below in ("", "/f1", "/wide", "/deep", "/f0.jpg", "/z.jpg"):
        expected = list(s3.list_files(archive + below))
        for wide in (2, 1000):
            monkeypatch.setattr(s3_listing, "_WIDE", wide)
            found = list(storage.list_files_unordered(archive + below))
            assert sorted(found, key=lambda info: info.uri) == sorted(expected, key=lambda info: info.uri)
            assert len(found) == len({info.uri for info in found}) > 0


def test_it_raises_what_a_request_does_and_ends_if_nobody_takes_more(
    archive: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = storage.list_files_unordered(archive)
    assert len([next(begun) for _ in range(20)]) == 20
    begun.close()
    with pytest.raises(storage.StorageError) as caught:
        list(storage.list_files_unordered(f"{archive}/nowhere"))
    assert caught.value.code == "not_found"
    call = s3.call

    def failing(uri: str, method: str, **more: object) -> object:
        if more.get("Prefix"):
            raise storage.StorageError("forbidden", uri)
        return call(uri, method, **more)

    monkeypatch.setattr(s3, "call", failing)
    with pytest.raises(storage.StorageError) as caught:
        list(storage.list_files_unordered(archive))
    assert caught.value.code == "forbidden"
