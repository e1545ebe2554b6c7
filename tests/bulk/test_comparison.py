"""Of an inventory only the files are read that the last one had not, and still no object is lost or read twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from btray import storage
from btray.bulk.classify import ClassifyJob, classify
from btray.bulk.config import EraseConfig
from btray.bulk.erasure.job import erase
from btray.bulk.listing.completed import RunKeys
from btray.bulk.listing.inventory import InventoryPiece
from tests.helpers.classify_helpers import job, part_files, report_of, without_reading
from tests.helpers.tiny_bundle import saved_bundle

Files = dict[str, list[str]]
"""Name of a file of an inventory -> the objects in it, as `NUMBER` or, of a later version, `NUMBER*`."""

FIRST: Files = {"a": ["0", "1", "2"], "b": ["3", "4"]}
SECOND: Files = {"a": ["0", "1", "2"], "b again": ["3", "4*", "5"]}
NEW = {"4*", "5"}
DAMAGED = b"damaged"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("bundles")
    return [saved_bundle(folder / str(seed), seed=seed) and str(folder / str(seed)) for seed in range(2)]


class Nights:
    """Runs on inventories whose objects are not read; what each run wrote a row of, and which files it looked at."""

    def __init__(self, folder: Path, bundles: list[str], patch: pytest.MonkeyPatch) -> None:
        self.folder, self.bundles, self.output = folder, bundles, str(folder / "out")
        self.codes: dict[str, str] = {}
        self.looked_at: set[str] = set()
        without_reading(patch, lambda info: self.codes.get(_object(info.uri, info.etag)))
        patch.setattr(ClassifyJob, "_summarized", lambda self, run, report, studies: report)
        read = InventoryPiece.__call__
        patch.setattr(
            InventoryPiece, "__call__", lambda piece: (self.looked_at.add(storage.name(piece.uri)), read(piece))[1]
        )

    def inventory(self, files: Files) -> str:
        """Write a report whose files are those of earlier nights, if they have the same name."""
        for name, objects in files.items():
            path = self.folder / name
            if not path.exists():
                columns = {
                    "bucket": ["archive"] * len(objects),
                    "key": [f"scans/{name.rstrip('*')}.jpg" for name in objects],
                    "size": [7] * len(objects),
                    "e_tag": ["later" if name.endswith("*") else "first" for name in objects],
                    "last_modified_date": pa.array([datetime(2026, 11, 1, tzinfo=UTC)] * len(objects)),
                }
                pq.write_table(pa.table(columns), path)
        report = {
            "destinationBucket": "arn:aws:s3:::archive",
            "fileFormat": "Parquet",
            "fileSchema": "Bucket, Key, Size, ETag, LastModifiedDate",
            "files": [{"key": name} for name in files],
        }
        manifest = self.folder / "manifest.json"
        manifest.write_text(json.dumps(report))
        return str(manifest)

    def run(self, files: Files, **changes: Any) -> set[str]:
        """Classify what is new; return the objects of which rows were written."""
        before = {row["run_id"] for row in self.rows()}
        self.looked_at.clear()
        settings: dict[str, Any] = {"model": self.bundles[0], "source": self.inventory(files), "output": self.output}
        classify(job(**{**settings, **changes}))
        written = [_object(row["uri"], row["etag"]) for row in self.rows() if row["run_id"] not in before]
        assert len(written) == len(set(written))
        return set(written)

    def rows(self) -> list[dict[str, Any]]:
        files = [path for path in map(Path, part_files(self.output)) if path.parent.name != "_damaged"]
        whole = [path for path in files if path.read_bytes() != DAMAGED]
        return [row for path in whole for row in pq.ParquetFile(path).read().to_pylist()]


def _object(uri: str, etag: str) -> str:
    return uri.rpartition("/")[2].removesuffix(".jpg") + ("*" if etag == "later" else "")


@pytest.fixture
def nights(tmp_path: Path, bundles: list[str], monkeypatch: pytest.MonkeyPatch) -> Nights:
    return Nights(tmp_path, bundles, monkeypatch)


def test_only_files_that_the_last_inventory_had_not_are_read(nights: Nights, capsys: Any) -> None:
    nights.codes = {"1": "empty"}
    assert nights.run(FIRST) == {"0", "1", "2", "3", "4"}
    assert nights.looked_at == {"a", "b"}
    assert nights.run(FIRST) == nights.looked_at == set()
    assert report_of(nights.output)["unchanged"] == 5
    assert nights.run(SECOND, dry_run=True) == set()
    assert "2 new objects" in capsys.readouterr().out
    assert nights.looked_at == {"b again"}
    assert nights.run(SECOND) == NEW
    assert nights.looked_at == {"b again"}
    report = report_of(nights.output)
    assert (report["objects"], report["unchanged"]) == (2, 4)
    assert nights.run(FIRST) == set()
    assert nights.looked_at == {"b"}, "an older inventory"
    assert nights.run(SECOND, limit=1) == set()
    assert nights.looked_at == {"b again"}


def interrupted(nights: Nights, **changes: Any) -> None:
    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassifyJob, "conclude", stopped)
        with pytest.raises(KeyboardInterrupt):
            nights.run(FIRST, **changes)


def resumed(nights: Nights) -> None:
    interrupted(nights)
    nights.run(FIRST)
    assert report_of(nights.output)["resumed"]


def erased(nights: Nights) -> None:
    nights.run(FIRST)
    erase(EraseConfig(output=nights.output, where="uri LIKE '%/1.jpg'"))


def taken_again_at_once(nights: Nights) -> None:
    """It was erased, and whoever did it changed his mind."""
    erased(nights)
    for path in (Path(nights.output) / "_erased").glob("*.hashes"):
        path.unlink()


def taken_again(nights: Nights) -> None:
    erased(nights)
    nights.run(FIRST)
    for path in (Path(nights.output) / "_erased").glob("*.hashes"):
        path.unlink()


def file_removed(nights: Nights) -> None:
    nights.run(FIRST)
    for uri in part_files(nights.output):
        storage.delete(uri)


def files_removed_meanwhile(nights: Nights) -> None:
    """While a run goes on, its own files and those that it has found completed objects in."""
    nights.run(FIRST)
    conclude = RunKeys.conclude

    def remove_all(keys: RunKeys, files: int) -> None:
        for uri in part_files(nights.output):
            storage.delete(uri)
        conclude(keys, files)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunKeys, "conclude", remove_all)
        nights.run({**FIRST, "b again": SECOND["b again"]})


def damaged_without_key_files(nights: Nights) -> None:
    nights.run(FIRST)
    for uri in part_files(nights.output):
        Path(uri).write_bytes(DAMAGED)
    for path in Path(nights.output).rglob("keys.json"):
        path.unlink()


def file_overwritten(nights: Nights) -> None:
    nights.run(FIRST)
    nights.run({"a": FIRST["a"]})
    (nights.folder / "a").unlink()
    nights.inventory({"a": ["0*", "1", "2"]})


def withheld(nights: Nights) -> None:
    nights.codes = {"1": "throttled"}
    nights.run(FIRST)
    nights.codes = {}


def rejected(nights: Nights) -> None:
    nights.codes = {"1": "empty"}
    nights.run(FIRST)
    nights.codes = {}


ALL = {"0", "1", "2", "3"} | NEW


@pytest.mark.parametrize(
    ("before", "changes", "expected"),
    [
        pytest.param(lambda nights: nights.run(FIRST, limit=2), {}, {"2", "3"} | NEW, id="limit"),
        pytest.param(lambda nights: nights.run(FIRST, include=["*0.jpg"]), {}, ALL - {"0"}, id="fewer"),
        pytest.param(lambda nights: nights.run(FIRST, since=datetime(2027, 1, 1, tzinfo=UTC)), {}, ALL, id="later"),
        pytest.param(lambda nights: nights.run(FIRST), {"exclude": ["*1.jpg"]}, NEW, id="more"),
        pytest.param(lambda nights: nights.run(FIRST), {"reclassify": True}, ALL, id="reclassify"),
        pytest.param(lambda nights: (nights.run(FIRST), nights.run({"c": ["9"]})), {}, NEW, id="another between"),
        pytest.param(
            lambda nights: (nights.run(FIRST), interrupted(nights, include=["*0.jpg"])), {}, NEW, id="abandoned between"
        ),
        pytest.param(resumed, {}, NEW, id="resumed"),
        pytest.param(erased, {}, NEW, id="erased"),
        pytest.param(taken_again, {}, {"1"} | NEW, id="taken again"),
        pytest.param(taken_again_at_once, {}, {"1"} | NEW, id="taken again at once"),
        pytest.param(file_removed, {}, ALL, id="file removed"),
        pytest.param(files_removed_meanwhile, {}, ALL, id="files removed meanwhile"),
        pytest.param(damaged_without_key_files, {}, ALL, id="damaged without key files"),
        pytest.param(file_overwritten, {}, {"0*"} | NEW, id="file overwritten"),
        pytest.param(withheld, {}, {"1"} | NEW, id="withheld"),
        pytest.param(rejected, {"retry_rejected": True}, {"1"} | NEW, id="retry rejected"),
    ],
)
def test_what_may_hide_an_object_has_all_of_the_inventory_looked_at(
    nights: Nights, before: Callable[[Nights], Any], changes: dict[str, Any], expected: set[str]
) -> None:
    before(nights)
    assert nights.run(SECOND, **changes) == expected
    assert nights.looked_at == {"a", "b again"}
    nights.run(SECOND)
    assert nights.run(SECOND) == nights.looked_at == set()


def test_another_model_looks_at_all(nights: Nights) -> None:
    nights.run(FIRST)
    assert nights.run(FIRST, model=nights.bundles[1]) == {"0", "1", "2", "3", "4"}
    assert nights.run(FIRST) == nights.looked_at == set()
