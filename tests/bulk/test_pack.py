"""A packed archive gives the rows, labels and refusals of the objects that went into it, and grows by what is new."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from btray import storage
from btray.bulk.classify import classify
from btray.bulk.config import PackConfig
from btray.bulk.listing.archive import list_archive
from btray.bulk.listing.selection import Selection
from btray.bulk.pack import pack
from btray.bulk.worker import Prefetcher
from btray.core.errors import UserError
from btray.data import packs
from btray.data.frames import Frames, FrameSource
from btray.data.labelled import read_labelled
from btray.data.splits import hold_out
from btray.storage import FileInfo, lease, local
from btray.storage.packed import is_member, member_uri, path_of
from btray.storage.read_many import read_many
from tests.helpers.classify_helpers import (
    QUICK_LEASE,
    actors,
    job,
    mixed_objects,
    part_files,
    plain_rows,
    start,
    without_ray,
    write_objects,
)
from tests.helpers.tiny_bundle import PREPROCESS, saved_bundle
from tests.helpers.training_helpers import write_tree
from tools.processes import until

pytestmark = pytest.mark.cluster


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack in this process, for what does not depend on Ray's actors, which take seconds to start."""
    without_ray(monkeypatch)


def packed(source: Any, output: Any, **changes: Any) -> str:
    return pack(PackConfig(input=str(source), output=str(output), actors=1, **changes))


def comparable(rows: pa.Table) -> list[tuple[Any, ...]]:
    """What may not depend on where the bytes came from; messages name the place."""
    names = ("uri", "etag", "size", "frame", "status", "error_code", "retryable", "label")
    return sorted(zip(*(rows[name].to_pylist() for name in names), strict=True))


@pytest.mark.s3
def test_the_same_rows_come_out_of_a_pack_and_of_loose_objects(
    ray_session: None,
    bucket: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scans, model = f"{bucket}/scans", str(tmp_path / "model")
    saved_bundle(model)
    write_objects(scans, mixed_objects(30) | {"a folder/100% #1?.jpg": mixed_objects(1)["day/0000.jpg"]})
    shards = packed(scans, f"{bucket}/packed")
    assert "0 rejected" in capsys.readouterr().out
    classify(job(model, shards, f"{bucket}/shards", exclude=("*0003*",)))
    without_ray(monkeypatch)  # whose rows those of the actors are compared with
    classify(job(model, scans, f"{bucket}/loose", exclude=("*0003*",)))
    rows = comparable(plain_rows(f"{bucket}/loose"))
    assert len(rows) > 30
    assert comparable(plain_rows(f"{bucket}/shards")) == rows

    classify(job(model, shards, f"{bucket}/loose", exclude=("*0003*",)))
    assert comparable(plain_rows(f"{bucket}/loose")) == rows  # the loose objects were known by their uri and etag


def test_a_pack_grows_by_what_is_new_and_asks_again_for_what_the_store_withheld(
    here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = tmp_path / "scans"
    write_objects(str(scans), {f"{number}.jpg": b"first %d" % number for number in range(5)})
    (scans / "gone.jpg").symlink_to(tmp_path / "nowhere")
    output = packed(scans, tmp_path / "out")
    before = {info.uri: info for info in packs.list_pack(output)}
    assert len(before) == 6
    with pytest.raises(storage.StorageError, match="nothing is there"):
        storage.read_bytes(before[str(scans / "gone.jpg")].place)

    (scans / "gone.jpg").unlink()
    (scans / "gone.jpg").write_bytes(b"found")
    (scans / "3.jpg").write_bytes(b"another")
    capsys.readouterr()
    packed(scans, output)
    assert "2 packed, 0 rejected; 4 unchanged" in capsys.readouterr().out
    listed = list(list_archive(output, Selection()))
    assert {info.uri: storage.read_bytes(info.place) for info in listed} == {
        str(path): path.read_bytes() for path in scans.iterdir()
    }
    assert len(listed) == 6
    later = {info.uri: info.etag for info in listed}
    assert later == {info.uri: info.etag for info in list_archive(str(scans), Selection())}


@pytest.mark.parametrize("frames", [False, True], ids=["files", "frames"])
def test_what_the_store_gives_again_replaces_what_it_gave_in_between(here: None, tmp_path: Path, frames: bool) -> None:
    scans, mounted, away = tmp_path / "scans", tmp_path / "mounted", tmp_path / "away"
    changes = {"frames": True, "preprocess": PREPROCESS} if frames else {}
    write_objects(str(scans), {"changed.jpg": b"first"})
    write_objects(str(mounted), {"lost.jpg": b"is back"})
    (scans / "lost.jpg").symlink_to(mounted / "lost.jpg")
    kept = shutil.copy2(scans / "changed.jpg", tmp_path)
    output = packed(scans, tmp_path / "out", **changes)

    def listed() -> set[tuple[str, str]]:
        return {(info.uri, info.etag) for info in packs.list_pack(output)}

    first = listed()
    (scans / "changed.jpg").write_bytes(b"for a night")
    mounted.rename(away)
    packed(scans, output, **changes)
    assert listed().isdisjoint(first)
    shutil.copy2(kept, scans)
    away.rename(mounted)
    packed(scans, output, **changes)
    assert listed() == first
    if not frames:
        assert {storage.read_bytes(info.place) for info in packs.list_pack(output)} == {b"first", b"is back"}


def test_a_pack_that_was_killed_is_continued_and_holds_each_object_once(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans, output = tmp_path / "scans", tmp_path / "out"
    write_objects(str(scans), {f"{number:03d}.jpg": b"scan %d" % number for number in range(100)})

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("btray.bulk.runs.finish", killed)
        with pytest.raises(KeyboardInterrupt):
            packed(scans, output)
    shards = sorted((output / "shards").iterdir())
    assert len(shards) > 1
    shards[0].unlink()  # as though it had been killed before this one
    written = {path: path.stat().st_mtime_ns for path in shards[1:]}
    packed(scans, output)
    assert sorted((output / "shards").iterdir()) == shards
    assert {path: path.stat().st_mtime_ns for path in shards[1:]} == written
    listed = [(info.uri, storage.read_bytes(info.place)) for info in packs.list_pack(str(output))]
    assert sorted(listed) == sorted((str(path), path.read_bytes()) for path in scans.iterdir())
    assert sum(pq.read_metadata(path).num_rows for path in shards) == 100


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_frame_pack_holds_each_scan_once_whichever_actor_or_driver_is_killed(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "EXPIRY", QUICK_LEASE[1])
    scans, output = tmp_path / "scans", str(tmp_path / "out")
    write_objects(str(scans), mixed_objects(40))
    for number in range(3000):
        os.link(scans / "day" / f"{number % 40:04d}.jpg", scans / f"{number:05d}.jpg")
    config = PackConfig(input=str(scans), output=output, frames=True, preprocess=PREPROCESS, actors=2)
    driver = start(config)
    until(lambda: part_files(output) or not driver.is_alive(), "a shard", 300)
    os.kill(actors()[0], signal.SIGKILL)
    before = len(part_files(output))
    until(lambda: len(part_files(output)) > before or not driver.is_alive(), "a shard after the kill", 300)
    assert driver.is_alive(), "the job ended before it could be killed"
    driver.kill()
    driver.join()
    written = {shard: Path(shard).stat().st_mtime_ns for shard in part_files(output)}
    pack(config)
    assert {shard: Path(shard).stat().st_mtime_ns for shard in written} == written
    members = {info.uri: info.place for info in packs.list_pack(output)}
    assert sum(pq.read_metadata(shard).num_rows for shard in part_files(output)) == len(members)
    assert members.keys() == {info.uri for info in storage.list_files(str(scans))}
    source, some = FrameSource(PREPROCESS), sorted(members)[::10]
    for of_file, of_member in zip(
        source.from_uris(some), source.from_uris([members[uri] for uri in some]), strict=True
    ):
        assert np.array_equal(of_file, of_member) if isinstance(of_file, Frames) else of_file == of_member


@pytest.mark.parametrize("kind", ["tree", "manifest beside", "manifest inside", "of Spark"])
def test_a_pack_is_labelled_and_split_as_what_was_packed(here: None, tmp_path: Path, kind: str) -> None:
    data = write_tree(tmp_path / "data", {f"Training/{name}": 24 for name in ("glioma", "no_tumor")} | {"Testing/x": 2})
    if kind != "tree":
        lines = [
            f"Training/{label}/{number:03d}.png,{label},train,{label[0]}{number // 4}"
            for label in ("glioma", "no_tumor")
            for number in range(24)
        ]
        text = "\n".join(["uri,label,split,patient_id", *lines])
        if kind == "of Spark":  # with the separators of Windows besides
            storage.write_text(storage.join(data, "labels.csv/part-0.csv"), text.replace("/", "\\"))
        else:
            storage.write_text(storage.join(data, "manifest.csv" if kind == "manifest inside" else "labels.csv"), text)
    source = storage.join(data, "labels.csv") if kind in {"manifest beside", "of Spark"} else data
    loose, members = read_labelled(source), read_labelled(packed(source, tmp_path / "packed"))
    assert len(members) == len(loose) >= 48
    assert all(is_member(uri) for uri in members["uri"].to_pylist())

    def said(table: pa.Table, paths: list[str]) -> dict[str, tuple[Any, ...]]:
        columns = (table[name].to_pylist() for name in ("label", "split", "patient_id", "source"))
        return dict(zip(paths, zip(*columns, strict=True), strict=True))

    of_loose = [uri.removeprefix(f"{data}/") for uri in loose["uri"].to_pylist()]
    of_members = [path_of(uri).removeprefix(f"{data[1:]}/") for uri in members["uri"].to_pylist()]
    assert of_members == of_loose
    assert said(members, of_members) == said(loose, of_loose)
    assert storage.read_bytes(members["uri"][0].as_py()) == Path(data, of_members[0]).read_bytes()

    def held(table: pa.Table, paths: list[str]) -> set[str]:
        out = hold_out(table, fraction=0.25, seed=1, prints=None)
        return {path for path, chosen in zip(paths, out, strict=True) if chosen}

    assert held(members, of_members) == held(loose, of_loose) != set()


def test_a_pack_is_split_as_a_manifest_whose_images_lie_in_several_folders(here: None, tmp_path: Path) -> None:
    classes = {"glioma": 30, "no_tumor": 30}
    elsewhere, beside = write_tree(tmp_path / "b" / "scans", classes), write_tree(tmp_path / "m" / "a", classes)
    files = [info.uri for folder in (elsewhere, beside) for info in storage.list_files(folder)]
    lines = [f"{uri.removeprefix(str(tmp_path / 'm') + '/')},{uri.split('/')[-2]}" for uri in files]
    (tmp_path / "m" / "labels.csv").write_text("\n".join(["uri,label", *lines]))
    source = tmp_path / "m" / "labels.csv"
    loose, members = (read_labelled(str(place)) for place in (source, packed(source, tmp_path / "packed")))
    assert [path_of(uri) for uri in members["uri"].to_pylist()] == [uri[1:] for uri in loose["uri"].to_pylist()]
    held = [hold_out(table, fraction=0.25, seed=1, prints=None).tolist() for table in (loose, members)]
    assert held[0] == held[1]


def test_a_damaged_shard_is_an_error_and_no_other_scan(here: None, tmp_path: Path) -> None:
    write_objects(str(tmp_path / "scans"), {"a.jpg": b"A" * 5000, "b.jpg": b"B" * 5000})
    output = packed(tmp_path / "scans", tmp_path / "out")
    place = next(info.place for info in packs.list_pack(output))
    shard = Path(place.partition("#")[0])
    body = bytearray(shard.read_bytes())
    body[body.index(b"A" * 100) + 50] ^= 1
    damaged = shard.with_name("damaged.parquet")
    damaged.write_bytes(body)
    with pytest.raises(storage.StorageError, match="damaged") as caught:
        storage.read_bytes(member_uri(str(damaged), 0, "a.jpg"))
    assert caught.value.retryable, "the scan itself may be fine: read loose, or packed again"
    assert pickle.loads(pickle.dumps(caught.value)).retryable
    with pytest.raises(storage.StorageError, match="nothing is there"):
        storage.read_bytes(member_uri(str(shard), 2, "c.jpg"))
    answers = read_many([place, f"{shard}.no.parquet#0/x", str(tmp_path / "scans" / "a.jpg")])
    assert [type(answer) for answer in answers] == [bytes, storage.StorageError, bytes]


def test_a_pack_with_damaged_footers_is_packed_anew_where_it_is_damaged(
    here: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = tmp_path / "scans"
    for run in range(4):
        write_objects(str(scans), {f"{run}-{number}.jpg": b"scan %d" % number for number in range(3)})
        output = packed(scans, tmp_path / "out")
    one, two, three, whole = shards = sorted((tmp_path / "out" / "shards").iterdir())
    one.write_bytes(one.read_bytes()[:-20])
    two.write_bytes(b"")
    three.write_bytes(b"PAR1" + bytes(200) + b"PAR1")
    with pytest.raises(UserError, match=r"\.parquet is damaged; run jobs/pack\.py again") as caught:
        list(packs.list_pack(output))
    assert "\n" not in str(caught.value)

    packed(scans, output, dry_run=True)
    assert "9 new objects" in capsys.readouterr().out
    assert all(shard.exists() for shard in shards)  # a dry run writes nothing
    packed(scans, output)
    assert "9 packed, 0 rejected; 3 unchanged" in capsys.readouterr().out
    assert all(str(shard) in caplog.text for shard in (one, two, three))
    listed = {info.uri: storage.read_bytes(info.place) for info in packs.list_pack(output)}
    assert listed == {str(path): path.read_bytes() for path in scans.iterdir()}
    held = (tmp_path / "out" / "shards").glob("*.parquet")
    assert sum(pq.read_metadata(path).num_rows for path in held) == 12
    assert sorted(path.name for path in (tmp_path / "out" / "shards" / "_damaged").iterdir()) == [
        shard.name for shard in (one, two, three)
    ]
    assert whole.exists()


@pytest.mark.parametrize("body", [b"PAR1", b"PAR1" + bytes(1000) + b"PAR1", b""])
def test_a_damaged_shard_is_read_once_and_the_scans_of_others_are_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    damaged, whole = tmp_path / "1.parquet", tmp_path / "2.parquet"
    damaged.write_bytes(body)
    rows = {"data": [b"scan"], "path": ["x.jpg"], "error_code": [None], "error": [None]}
    schema = pa.schema([packs.SCHEMA.field(name) for name in rows])
    pq.write_table(pa.table(rows, schema=schema), whole)
    reads: list[str] = []
    local_read = local.read
    monkeypatch.setattr(local, "read", lambda path, *more: (reads.append(path), local_read(path, *more))[1])
    places = [member_uri(str(damaged), row, f"{row}.jpg") for row in range(512)]
    objects = [FileInfo(place, 4, "e", 0.0, place) for place in [*places, member_uri(str(whole), 0, "x.jpg")]]
    reader = Prefetcher(threads=4, patience=60, max_bytes=100)
    *answers, last = [answer for _, batch in reader.batches(objects, defaultdict(float)) for answer in batch]
    assert last == b"scan"
    assert all(isinstance(answer, storage.StorageError) and answer.retryable for answer in answers)
    assert reads == [str(damaged), str(whole)]


def test_a_pack_of_something_else_or_of_a_pack_is_refused_in_one_line(here: None, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_objects(str(tmp_path / name), {"a.jpg": b"x"})
    output = packed(tmp_path / "one", tmp_path / "out")
    with pytest.raises(UserError, match=r"is a pack of .*one, not of .*two"):
        packed(tmp_path / "two", output)
    with pytest.raises(UserError, match="packed archive already"):
        packed(output, tmp_path / "again")
    newer = {"format_version": 99, "root": str(tmp_path), "manifest": None}
    storage.write_json(os.path.join(output, packs.DESCRIPTION), newer)
    with pytest.raises(UserError, match="format 99"):
        read_labelled(output)
    assert np.all([name in ("one", "two", "out") for name in os.listdir(tmp_path)])
