"""Every kind of input gives the objects it names, each with its size and etag, and refuses what it cannot read."""

from __future__ import annotations

import io
import itertools
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from btray import storage
from btray.bulk.listing.archive import list_archive
from btray.bulk.listing.selection import Selection
from btray.bulk.table import RETRIED
from btray.bulk.worker import Prefetcher
from btray.core.errors import UserError
from btray.data.labelled import read_labelled
from btray.storage import s3
from tests.helpers.classify_helpers import FIELDS, write_inventory

NAMES = ("_raw/_DSC0001", "a.jpg", "deep/b c+%.png", "deep/日本.jpg", "noext")


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder or bucket with the objects of NAMES, and some that do not count."""
    root = str(tmp_path / "scans") if request.param == "local" else request.getfixturevalue("bucket")
    for name in (*NAMES, ".hidden.jpg", "deep/.tmp/x.jpg", "__MACOSX/a.jpg"):
        storage.write_bytes(storage.join(root, name), name.encode())
    return root


def listed(uri: str, **selection: object) -> list[str]:
    return [info.uri for info in list_archive(uri, Selection(**selection))]  # type: ignore[arg-type]


def uris(place: str, *names: str) -> list[str]:
    return [storage.join(place, name) for name in names]


def refusal(uri: str) -> str:
    with pytest.raises(UserError) as caught:
        listed(uri)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_prefix_gives_all_but_hidden_objects(place: str) -> None:
    assert sorted(listed(place)) == sorted(uris(place, *NAMES))


def test_globs_match_the_path_below_the_input(place: str) -> None:
    assert sorted(listed(place, include=["*.jpg"])) == sorted(uris(place, "a.jpg", "deep/日本.jpg"))
    assert sorted(listed(place, exclude=["deep/*"])) == uris(place, "_raw/_DSC0001", "a.jpg", "noext")
    assert listed(place, include=["*.jpg", "noext"], exclude=["deep*", "a*"]) == uris(place, "noext")


def test_an_output_within_the_input_is_no_input(place: str) -> None:
    storage.write_bytes(storage.join(place, "deep", "results", "part.parquet"), b"rows")
    found = listed(place, outside=[storage.join(place, "deep", "results")])
    assert sorted(found) == sorted(uris(place, *NAMES))


def test_an_output_that_holds_all_of_the_input_is_refused(place: str, tmp_path: Path) -> None:
    manifest = str(tmp_path / "list.txt")
    storage.write_text(manifest, "\n".join(uris(place, *NAMES)))
    for source, output in ((f"{place}/deep", place), (f"{place}/deep", f"{place}/deep"), (manifest, place)):
        with pytest.raises(UserError, match="name an output beside") as caught:
            listed(source, outside=[output])
        assert f"--output {output} " in str(caught.value)
    assert listed(manifest, outside=[f"{place}/deep"]) == uris(place, "_raw/_DSC0001", "a.jpg", "noext")
    assert len(listed(f"{place}/deep", outside=["/elsewhere", f"{place}/de"])) == 2


def test_only_what_was_modified_since(place: str) -> None:
    assert len(listed(place, since=datetime(2020, 1, 1, tzinfo=UTC))) == len(NAMES)
    assert listed(place, since=datetime(2100, 1, 1, tzinfo=UTC)) == []


@pytest.mark.parametrize("kind", ["list.parquet", "list.csv", "list.txt"])
def test_manifests_and_lists_give_what_they_name_with_size_and_etag(place: str, kind: str) -> None:
    named = [uris(place, NAMES[1])[0], NAMES[0], "gone.jpg"]
    body = io.BytesIO()
    if kind == "list.parquet":
        pq.write_table(pa.table({"label": ["x"] * 3, "URI": named}), body)
    elif kind == "list.csv":
        body.write("label,uri\nx,{}\nx,{}\nx,{}\n".format(*named).encode())
    else:
        body.write("\n".join([*named, ""]).encode())
    manifest = storage.join(place, kind)
    storage.write_bytes(manifest, body.getvalue())
    found = list(list_archive(manifest, Selection()))
    assert [info.uri for info in found] == uris(place, NAMES[1], NAMES[0], "gone.jpg")
    of_prefix = {info.uri: info for info in storage.list_files(place)}
    assert found[:2] == [of_prefix[info.uri] for info in found[:2]]
    assert (found[2].size, found[2].etag) == (0, "")


def test_a_list_names_what_a_labelled_manifest_of_the_same_uris_names(place: str) -> None:
    lines = ["./b.jpg,x", "../deep/b c+%.png,y", "../a.jpg,x", uris(place, "noext")[0] + ",y"]
    manifest = storage.join(place, "lists", "m.csv")
    storage.write_text(manifest, "\n".join(["uri,label", *lines]))
    assert listed(manifest) == read_labelled(manifest)["uri"].to_pylist()
    assert listed(manifest) == uris(place, "lists/b.jpg", "deep/b c+%.png", "a.jpg", "noext")


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_what_a_manifest_says_of_an_object_is_not_asked_for(
    place: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    known = [info for info in storage.list_files(place) if info.size]
    columns = {
        "URI": [info.uri for info in known] + ["a.jpg", "noext", "new.jpg"],
        "Size": [info.size for info in known] + [None, 5, 7],
        "ETag": [f'"{info.etag}"' for info in known] + ["e", None, "given"],
        "label": ["x"] * (len(known) + 3),
    }
    body = io.BytesIO()
    write = pq.write_table if kind == "parquet" else pyarrow.csv.write_csv
    write(pa.table(columns), body)
    manifest = storage.join(place, f"known.{kind}")
    storage.write_bytes(manifest, body.getvalue())
    asked: list[str] = []
    describe = storage.describe
    monkeypatch.setattr("btray.storage.describe", lambda uri: (asked.append(uri), describe(uri))[1])
    found = list(list_archive(manifest, Selection()))
    assert sorted(asked) == uris(place, "a.jpg", "noext")
    assert [(info.uri, info.size, info.etag) for info in found[:-1]] == [
        (info.uri, info.size, info.etag) for info in [*known, *map(describe, sorted(asked))]
    ]
    assert (found[-1].uri, found[-1].size, found[-1].etag) == (*uris(place, "new.jpg"), 7, "given")


@pytest.mark.parametrize("code", ["unavailable", "throttled"])
def test_a_store_that_goes_away_while_a_manifest_is_examined_costs_time_and_no_etag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    names = [f"{number}.jpg" for number in range(100)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    manifest = tmp_path / "list.txt"
    manifest.write_text("\n".join(names))
    expected = [storage.describe(str(tmp_path / name)) for name in names]
    describe, asked, refusals = storage.describe, itertools.count(), 150

    def away_at_first(uri: str) -> storage.FileInfo:
        if next(asked) < refusals:
            raise storage.StorageError(code, uri)
        return describe(uri)

    monkeypatch.setattr("btray.storage.read_many._PAUSE", 0.001)
    monkeypatch.setattr("btray.storage.read_many._store_answers", lambda uri: next(asked) >= refusals)
    monkeypatch.setattr("btray.storage.describe", away_at_first)
    assert list(list_archive(str(manifest), Selection(), patience=60)) == expected

    asked, refusals = itertools.count(), 10**9
    found = list(list_archive(str(manifest), Selection(), patience=0.01))
    assert [(info.uri, info.etag) for info in found] == [(info.uri, "") for info in expected]
    assert next(asked) < 1000, "a dead store is not asked for each object"


def test_no_bytes_come_of_what_was_written_anew_since_it_was_listed(place: str) -> None:
    known = list(storage.list_files(place))
    storage.write_bytes(uris(place, "a.jpg")[0], b"quite another scan")
    ((_, answers),) = Prefetcher(threads=2, patience=1, max_bytes=100).batches(known, defaultdict(float))
    for info, answer in zip(known, answers, strict=True):
        if info.uri.endswith("a.jpg"):
            assert isinstance(answer, storage.StorageError)
            assert answer.code == "changed"
        else:
            assert answer == info.uri.removeprefix(f"{place}/").encode()


def test_no_bytes_come_of_what_was_listed_without_an_etag(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"scan")
    reader = Prefetcher(threads=2, patience=1, max_bytes=100)
    known = storage.describe(str(tmp_path / "a.jpg"))
    unknown = [storage.FileInfo(str(tmp_path / name), 0, "", 0.0) for name in ("a.jpg", "gone.jpg")]
    ((_, answers),) = reader.batches([known, *unknown], defaultdict(float))
    assert answers[0] == b"scan"
    assert [answer.code for answer in answers[1:]] == ["changed", "not_found"]  # type: ignore[union-attr]
    assert {"changed", "not_found", "withheld", "archived"} <= RETRIED


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["Parquet", "CSV"])
def test_an_inventory_gives_the_latest_versions_without_reading_or_listing_them(bucket: str, kind: str) -> None:
    rows: list[dict[str, Any]] = [
        {"Key": "scans/b c+%.jpg", "ETag": "e1"},
        {"Key": "scans/old.jpg", "IsLatest": False},
        {"Key": "scans/deleted.jpg", "IsDeleteMarker": True, "Size": None, "ETag": None},
        {"Key": "scans/日本", "ETag": "e5", "Size": 8, "LastModifiedDate": "2026-11-03T00:00:00.000Z"},
    ]
    manifest = write_inventory(bucket, kind, rows)
    assert [(info.uri, info.size, info.etag) for info in list_archive(manifest, Selection())] == [
        (f"{bucket}/scans/b c+%.jpg", 7, "e1"),
        (f"{bucket}/scans/日本", 8, "e5"),
    ]
    assert listed(manifest, since=datetime(2026, 11, 2, tzinfo=UTC)) == [f"{bucket}/scans/日本"]
    assert listed(manifest, include=["scans/b*"]) == [f"{bucket}/scans/b c+%.jpg"]
    assert listed(manifest, exclude=["scans/b*"]) == [f"{bucket}/scans/日本"]


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["Parquet", "CSV"])
def test_an_inventory_of_a_bucket_and_a_listing_of_it_count_the_same_objects(bucket: str, kind: str) -> None:
    names = [
        "_raw/a.jpg",
        ".hidden",
        "day/_tmp/a.jpg",
        "day/a_b.jpg",
        "day/.x",
        "__MACOSX/x.jpg",
        "day/x_$folder$",
        "day/",
        "k=v/#1?.jpg",
    ]
    for name in names:
        body = b"" if name.endswith(("/", "$")) else b"x"
        s3.call(bucket, "put_object", Key=name, Body=body)
    counted = sorted(info.uri for info in storage.list_files(bucket))
    assert counted == [f"{bucket}/{name}" for name in ("_raw/a.jpg", "day/_tmp/a.jpg", "day/a_b.jpg", "k=v/#1?.jpg")]
    rows = [{"Key": name, "Size": 0 if name.endswith(("/", "$")) else 1} for name in names]
    assert sorted(listed(write_inventory(bucket, kind, rows))) == counted

    assert listed(f"{bucket}/_raw") == [f"{bucket}/_raw/a.jpg"]
    assert "names 1 objects, of which none counts" in refusal(write_inventory(bucket, kind, rows[1:2]))


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["Parquet", "CSV"])
@pytest.mark.parametrize("field", ["ETag", "Size"])
def test_an_inventory_without_a_field_that_is_needed_is_refused_by_its_name(bucket: str, kind: str, field: str) -> None:
    fields = tuple(name for name in FIELDS if name != field)
    assert f"no field {field}; add it" in refusal(write_inventory(bucket, kind, [{"Key": "a.jpg"}], fields=fields))


def test_what_is_no_archive_is_refused_in_one_line_that_names_it(place: str, tmp_path: Path) -> None:
    assert "nowhere" in refusal(storage.join(place, "nowhere"))
    assert "nowhere.csv" in refusal(storage.join(place, "nowhere.csv"))
    for name, body, said in (
        ("no_uri.csv", b"path\nx\n", "no column uri"),
        ("empty_uri.csv", b"uri,x\nx,1\n,2\n", "row 2"),
        ("no_size.csv", b"uri,size,etag\nx,1,e\ny,1 kB,e\n", "row 2: size '1 kB'"),
        ("broken.parquet", b"PAR1", "cannot be read"),
        ("manifest.json", b"{}", "not a valid S3 Inventory"),
        ("binary.txt", b"\xff\xfe\n", "UTF-8"),
    ):
        storage.write_bytes(storage.join(place, name), body)
        message = refusal(storage.join(place, name))
        assert said in message
        assert name in message
    (tmp_path / "void").mkdir()
    assert "holds no file" in refusal(str(tmp_path / "void"))
