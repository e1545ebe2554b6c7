"""The table's files are written once, and the latest rows of an object count."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pytest

from btray import results, storage
from btray.bulk import table
from btray.bulk.report import PartTally
from btray.bulk.runs import read_tally, write_part
from tests.helpers.classify_helpers import plain_rows
from tests.helpers.table_helpers import done_of, row, write, write_a_table_of_many_nights

ROOT = Path(__file__).resolve().parents[2]


def test_of_two_writers_of_a_part_one_wins(place: str) -> None:
    assert write(place, "part", row("a"))
    assert not write(place, "part", row("a"), row("b"))
    uri = storage.join(place, table.folder("1e10", "2026-11-22"), "part.parquet")
    assert read_tally(uri, PartTally) == PartTally(objects=1)
    assert read_tally(uri + "x", PartTally) is None
    assert storage.list_names(uri.rpartition("/")[0]) == ["part.parquet"]


def test_current_gives_the_latest_row_of_each_key_and_every_model_its_own(place: str) -> None:
    write(place, "1", row("a", "forbidden"), row("b"))
    write(place, "2", row("a", night=1))
    write(place, "1", row("a", night=2), model="2")
    storage.write_bytes(storage.join(place, "_runs", "x.parquet"), b"no data")
    found = results.current(place).to_pylist()
    assert sorted((r["uri"][-1], r["model_id"], r["status"]) for r in found) == [
        ("a", "1e10", "ok"), ("a", "2", "ok"), ("b", "1e10", "ok"),
    ]  # fmt: skip
    assert found[0]["probabilities"] == [("glioma", 0.75), ("no_tumor", 0.25)]
    assert results.current(place, model_id="2", columns=["uri"]).to_pydict() == {"uri": ["s3://b/a"]}


def test_a_retryable_rejection_after_an_answer_is_current_and_is_tried_again(place: str) -> None:
    write_a_table_of_many_nights(place)
    found = {(r["uri"][7:], r["frame"], r["error_code"]) for r in results.current(place).to_pylist()}
    assert found == {
        ("pages", 0, "throttled"), ("pages", 1, None), ("pages", 2, None), ("once", 0, None),
        ("hidden", 0, "throttled"), ("bad", 0, None), ("back", 0, None), ("grown", 0, None), ("grown", 1, None),
        ("lost", 0, "truncated"),
    }  # fmt: skip
    assert done_of(place) == {"once", "bad", "back", "grown", "lost"}
    assert done_of(place, retry_rejected=True) == {"once", "bad", "back", "grown"}


FIRST_COLUMNS = (
    "uri", "etag", "size", "frame", "study_uid", "series_uid", "instance_uid", "status", "error_code", "error",
    "retryable", "label", "confidence", "probabilities", "abstained", "out_of_distribution", "ood_score", "run_id",
    "classified_at",
)  # fmt: skip
"""The columns of the first tables."""


def test_files_with_the_columns_of_before_are_read_beside_new_ones(tmp_path: Path) -> None:
    root, folder = str(tmp_path), table.folder("1e10", "2026-11-21")
    write(root, "2", row("new", label_set=("glioma", "no_tumor")), row("again", label_set=("glioma",), night=1))
    old = [{name: value for name, value in row(name).items() if name != "label_set"} for name in ("old", "again")]
    schema = pa.schema([table.SCHEMA.field(name) for name in FIRST_COLUMNS])
    assert write_part(storage.join(root, folder, "1.parquet"), old, schema, PartTally(objects=2))
    rows = {r["uri"]: r for r in results.current(root).to_pylist()}
    assert {uri: r["label_set"] for uri, r in rows.items()} == {
        "s3://b/old": None, "s3://b/again": ["glioma"], "s3://b/new": ["glioma", "no_tumor"],
    }  # fmt: skip
    assert all(r["label"] == "glioma" for r in rows.values())
    assert results.current(root, columns=["label_set"]).num_rows == 3
    assert done_of(root) == {"old", "again", "new"}
    assert sorted(plain_rows(root)["uri"].to_pylist()) == ["s3://b/again", "s3://b/again", "s3://b/new", "s3://b/old"]
    files = [f"{root}/{folder}/1.parquet", *map(str, tmp_path.glob("*/run_date=2026-11-22/*.parquet"))]
    for order in (files, files[::-1]):  # a reader takes the columns of the first file it sees
        seen = pa.dataset.dataset(order).to_table()
        assert (seen.num_rows, "label_set" in seen.schema.names) == (4, order[0] != files[0])


def test_the_view_of_the_guide_gives_what_current_gives(tmp_path: Path) -> None:
    write_a_table_of_many_nights(str(tmp_path))
    guide = (ROOT / "docs" / "classify.md").read_text()
    windows = [" ".join(window.split()) for window in re.findall(r"(row_number\(\) OVER \(.*?\))", guide, re.DOTALL)]
    assert len(windows) == 2
    assert windows[0] == windows[1]
    view = re.search(r"CREATE TEMPORARY VIEW scans AS (SELECT.*?);", guide, re.DOTALL)
    assert view
    columns = ("uri", "etag", "frame", "model_id", "run_id", "classified_at", "error_code")
    with sqlite3.connect(":memory:") as database:  # it knows window functions, and needs no installation
        database.execute(f"CREATE TABLE results ({', '.join(columns)})")
        rows = zip(*(plain_rows(str(tmp_path))[name].cast("string").to_pylist() for name in columns), strict=True)
        database.executemany(f"INSERT INTO results VALUES ({', '.join('?' * len(columns))})", list(rows))
        query = re.sub(r"parquet\.`.*?`", "results", view[1])
        viewed = database.execute(f"SELECT uri, CAST(frame AS INTEGER), run_id, error_code FROM ({query})").fetchall()
    current = results.current(str(tmp_path), columns=["uri", "frame", "run_id", "error_code"])
    assert sorted(viewed, key=repr) == sorted((tuple(r.values()) for r in current.to_pylist()), key=repr)


def test_the_pandas_query_of_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(str(tmp_path / "results"), "1", row("a", "empty"), row("b"))
    monkeypatch.chdir(tmp_path)
    (query,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "classify.md").read_text(), re.DOTALL)
    exec(query, {})
    assert re.search(r"empty\s+1\s+s3://b/a", capsys.readouterr().out)
