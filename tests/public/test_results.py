"""The table's files are written once, and the latest rows of an object count."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import duckdb
import pyarrow
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest

from btray import results, storage
from btray.bulk import table
from btray.bulk.report import PartTally
from btray.bulk.runs import read_tally, write_part
from btray.data import packs
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


GUIDE = (ROOT / "docs" / "classify.md").read_text(encoding="utf-8")
NOT_DATA = ("_lease.json", "_lease/7.json", "_runs/1e10/N/run.json", "_runs/1e10/N/0.segment", "_explained/N/0.png")
"""What stands beside the data in a table's root."""


@pytest.fixture
def table_of_many_nights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The table `results` of the current folder, with everything that is no data."""
    monkeypatch.chdir(tmp_path)
    write_a_table_of_many_nights("results")
    write("results", "5", row("a"), model="123")
    for name in NOT_DATA:
        storage.write_bytes(f"results/{name}", b"{}")
    return "results"


def names_for_spark(root: str) -> list[str]:
    """Files that Spark reads below `root`, by its rule for names (HadoopFSUtils.shouldFilterOutPathName)."""
    names = [path.relative_to(root) for path in Path(root).rglob("*") if path.is_file()]
    return [
        str(name)
        for name in names
        if not any(part[0] == "." or (part[0] == "_" and "=" not in part) for part in name.parts)
    ]


def test_each_reader_of_the_guide_reads_all_of_a_table_in_the_line_that_is_given(table_of_many_nights: str) -> None:
    (lines,) = re.findall(r"```python\n(pandas\.read_parquet\(\"results.*?)```", GUIDE, re.DOTALL)
    readers = {line.partition(".")[0]: line for line in lines.splitlines()}
    assert readers.keys() == {"pandas", "pyarrow", "polars", "duckdb", "spark"}
    assert readers.pop("spark") == 'spark.read.parquet("results")'
    assert {name.rpartition(".")[2] for name in names_for_spark(table_of_many_nights)} == {"parquet"}
    assert_read(readers, plain_rows(table_of_many_nights))


def assert_read(readers: dict[str, str], expected: pa.Table) -> None:
    """Run a line for each reader, and compare the shape and the names of what it gives."""
    for name, line in readers.items():
        found = eval(line, {name: import_module(name), "pyarrow": pyarrow})
        found = found.df() if name == "duckdb" else found
        assert found.shape == expected.shape, name
        assert set(found.columns if name in ("pandas", "polars", "duckdb") else found.column_names) == {
            *expected.column_names
        }, name


def test_each_reader_of_the_guide_reads_all_of_a_pack_in_the_line_that_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"```python\n(pandas\.read_parquet\(\"pack.*?)```", GUIDE, re.DOTALL)
    readers = {line.partition(".")[0]: line for line in lines.splitlines()}
    assert readers.keys() == {"pandas", "pyarrow", "polars", "duckdb"}
    packs.write_description("pack", packs.Pack("scans", None))
    Path("pack/shards/_damaged").mkdir(parents=True)
    Path("pack/shards/_damaged/0.parquet").write_bytes(b"no Parquet")
    for shard, count in (("1", 3), ("2", 2)):
        row = {"data": b"pixels", "uri": "scans/a", "path": "a", "etag": shard, "size": 6, "retryable": False}
        pa.parquet.write_table(pa.Table.from_pylist([row] * count, packs.SCHEMA), f"pack/shards/{shard}.parquet")
    assert_read(readers, pa.table({"uri": ["scans/a"] * 5, "size": [6] * 5}))


def test_the_views_of_the_guide_give_what_current_gives(table_of_many_nights: str) -> None:
    columns = ["uri", "frame", "model_id", "run_id", "error_code"]
    current = results.current(table_of_many_nights, columns=columns).to_pylist()
    expected = sorted(map(repr, (tuple(each.values()) for each in current)))
    sql = re.findall(r"```sql\n(.*?)```", GUIDE, re.DOTALL)
    assert len(sql) == 2
    for code in sql:  # DuckDB speaks Spark's dialect too, but for the names of files
        view, query, _ = re.sub(r"parquet\.`.*?`", "'results/model_id=*/*/*.parquet'", code).split(";")
        with duckdb.connect() as database:
            database.execute(view)
            assert database.execute(query).fetchall()
            viewed = database.sql(f"SELECT {', '.join(columns)} FROM scans").fetchall()
        assert sorted(map(repr, viewed)) == expected


def test_the_pandas_query_of_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(str(tmp_path / "results"), "1", row("a", "empty"), row("b"))
    monkeypatch.chdir(tmp_path)
    (query,) = re.findall(r"```python\n(from btray.*?)```", GUIDE, re.DOTALL)
    exec(query, {})
    assert re.search(r"empty\s+1\s+s3://b/a", capsys.readouterr().out)
