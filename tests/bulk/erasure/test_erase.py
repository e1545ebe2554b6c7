"""What is erased is gone from every file of an output, and comes back by no later run; all else stays as it was."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from btray import storage
from btray.bulk import runs, worklist
from btray.bulk.classify import classify
from btray.bulk.clinical.pseudonyms import Pseudonyms
from btray.bulk.config import EraseConfig, PackConfig
from btray.bulk.erasure.job import erase
from btray.bulk.pack import pack
from btray.core.errors import UserError
from btray.data.frames import FrameSource
from btray.data.labelled import read_labelled
from btray.data.packs import FRAMES_SCHEMA, describe_pack, list_pack
from btray.model.bundle import load_bundle
from btray.results import current
from btray.storage import StorageError
from btray.storage.packed import member_uri
from tests.helpers.classify_helpers import interrupt_after, job, plain_rows, report_of, without_ray
from tests.helpers.hospital_archive import ROOT, write_archive
from tests.helpers.privacy import found_in, written
from tests.helpers.table_helpers import done_of, row, write
from tests.helpers.tiny_bundle import PREPROCESS, saved_bundle
from tests.helpers.training_helpers import write_tree


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("bundle") / "model")
    saved_bundle(folder)
    return folder


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)


def erasing(output: str, **changes: Any) -> EraseConfig:
    return EraseConfig(output=output, patience=1.0, **changes)


def listed(tmp_path: Path, *uris: str) -> str:
    (tmp_path / "list.txt").write_text("\n".join(uris))
    return str(tmp_path / "list.txt")


def rows_of(output: str) -> list[dict[str, Any]]:
    return sorted(plain_rows(output).to_pylist(), key=lambda row: (row["uri"], row["frame"], row["classified_at"]))


def test_a_study_is_erased_from_all_that_a_table_and_its_runs_hold(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count, archive, output = (
        write_archive(tmp_path / "archive", studies=3),
        str(tmp_path / "archive"),
        str(tmp_path / "out"),
    )
    config = job(model, archive, output, explain=30, explain_labels=load_bundle(model).manifest.classes)
    classify(config)
    gone = f"{ROOT}.1"
    names = (gone, f"{archive}/PLANTEDNAME^1")
    before, files = rows_of(output), {info.uri for info in storage.list_files(output)}
    pictures = sum(uri.endswith(".png") for uri in files)
    assert erase(erasing(output, study=gone, dry_run=True)) == output
    assert rows_of(output) == before
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith("6 objects (0 without a row): 6 rows in 1 files, 3 rows of series and studies, ")
    assert told.endswith("1 reports, 0 unfinished runs, 0 damaged files. Nothing was erased.")
    erase(erasing(output, study=gone))
    assert capsys.readouterr().out.splitlines()[-1] == "erased " + told.removesuffix(". Nothing was erased.")
    found = {(path, name) for path, text in written(output, f"{output}-studies") for name in names if name in text}
    assert found == set()
    assert rows_of(output) == [row for row in before if row["study_uid"] != gone]
    left = {info.uri for info in storage.list_files(output)}
    assert pictures - sum(uri.endswith(".png") for uri in left) == 6
    assert {row["study_uid"] for row in plain_rows(f"{output}-studies").to_pylist()} == {f"{ROOT}.0", f"{ROOT}.2"}
    page = next(Path(output).rglob("summary.html")).read_text()
    assert page.count("<section data-study") == 2
    assert page.count("<section") == page.count("</section>")

    # no later run takes the objects, and that of another model neither
    for changes in ({}, {"reclassify": True}):
        classify(config.model_copy(update=changes))
        assert report_of(output)["erased"] == 6
        assert {row["uri"] for row in current(output).to_pylist()} == {
            row["uri"] for row in before if row["study_uid"] != gone
        }
    assert report_of(output)["objects"] == count - 6
    assert "6 left out that were erased" in capsys.readouterr().out


def test_an_erased_frame_takes_the_answers_that_were_made_with_it_along(model: str, tmp_path: Path) -> None:
    write_archive(tmp_path / "archive")
    output, one = str(tmp_path / "out"), str(tmp_path / "archive/PLANTEDNAME^1/0/1")
    config = job(model, str(tmp_path / "archive"), output)
    classify(config)
    erase(erasing(output, uris=listed(tmp_path, one)))
    studies = plain_rows(f"{output}-studies").to_pylist()
    assert {(row["study_uid"], row["series_uid"]) for row in studies if row["study_uid"] == f"{ROOT}.1"} == set()
    classify(config)
    made = {
        row["series_uid"]: row["frames"]
        for row in plain_rows(f"{output}-studies").to_pylist()
        if row["study_uid"] == f"{ROOT}.1"
    }
    assert made == {None: 5, f"{ROOT}.1.0": 2, f"{ROOT}.1.1": 3}


def test_pseudonyms_are_erased_by_the_names_behind_them(model: str, tmp_path: Path) -> None:
    write_archive(tmp_path / "archive")
    (key := tmp_path / "key").write_bytes(bytes(range(32)))
    key.chmod(0o600)
    archive, output = str(tmp_path / "archive"), str(tmp_path / "out")
    config = job(model, archive, output, pseudonymize=str(key))
    classify(config)
    with pytest.raises(UserError, match="--pseudonymize"):
        erase(erasing(output, study=f"{ROOT}.1"))
    erase(erasing(output, study=f"{ROOT}.1", pseudonymize=str(key)))
    one = f"{archive}/PLANTEDNAME^0/1/1"
    erase(erasing(output, uris=listed(tmp_path, one), pseudonymize=str(key)))
    names = Pseudonyms(key.read_bytes())
    hidden = (names.name(one), names.uid(f"{ROOT}.1"))
    texts = list(written(output, f"{output}-studies"))
    assert [path for path, text in texts for name in hidden if name in text] == []
    classify(config)
    assert report_of(output)["erased"] == 7


@pytest.mark.parametrize("where", ["uri LIKE '%/a'", "label = 'glioma' AND uri = 's3://b/a' -- a comment"])
def test_all_rows_of_an_object_go_whichever_of_them_is_chosen(place: str, where: str) -> None:
    write(place, "1", row("a"), row("b"), row("a", frame=1))
    write(place, "2", row("a", "truncated", night=1), row("c"))
    write(place, "3", row("b"), model="0ther")
    write(place, "4", row("a"), model="0ther")
    kept = [one for one in rows_of(place) if one["uri"] != "s3://b/a"]
    erase(erasing(place, where=where))
    assert rows_of(place) == kept
    assert done_of(place) == {"b", "c"}
    erase(erasing(place, where="uri = 's3://b/c'"))
    assert done_of(place) == {"b"}


def test_an_erasure_that_is_interrupted_anywhere_is_ended_by_the_same_command(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archive(tmp_path / "archive")
    classify(job(model, str(tmp_path / "archive"), str(tmp_path / "whole"), explain=30))
    before = rows_of(str(tmp_path / "whole"))
    writes = {name: getattr(storage, name) for name in ("write_bytes", "write_text", "write_json", "delete_many")}
    gone = f"{ROOT}.1"
    for fails_at in range(40):
        output = str(tmp_path / f"out{fails_at}")
        for part in ("", "-studies"):
            shutil.copytree(tmp_path / f"whole{part}", output + part)
        left_to_do = iter(range(fails_at))

        def interrupted(name: str, *arguments: Any, left_to_do: Iterator[int] = left_to_do) -> Any:
            if next(left_to_do, None) is None:
                raise KeyboardInterrupt
            return writes[name](*arguments)

        for name in writes:
            monkeypatch.setattr(storage, name, partial(interrupted, name))
        try:
            erase(erasing(output, study=gone))
            ended = True
        except KeyboardInterrupt:
            ended = False
        for name, function in writes.items():
            monkeypatch.setattr(storage, name, function)
        # a reader sees whole files: each row as it was, or none of it
        assert all(one in before for one in rows_of(output))
        if not ended:
            erase(erasing(output, study=gone))
        assert rows_of(output) == [one for one in before if one["study_uid"] != gone]
        assert [path for path, text in written(output, f"{output}-studies") if gone in text] == []
        if ended:
            break
    assert ended
    assert fails_at > 5


def test_a_run_that_was_interrupted_does_not_bring_the_object_back(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archive(tmp_path / "archive")
    output, one = str(tmp_path / "out"), str(tmp_path / "archive/PLANTEDNAME^1/0/1")
    config = job(model, str(tmp_path / "archive"), output)
    with monkeypatch.context() as patch:
        patch.setattr("btray.bulk.driver._process", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            classify(config)
    (shard,) = [info.uri for info in storage.list_files(output) if info.uri.endswith(".segment")]
    part = runs.Run(**storage.read_json(next(map(str, Path(output).rglob("plan.json")))) | {"output": output})
    (part_id, *_) = worklist.part_ids(shard, worklist.read_shard(shard))
    write(output, "by hand", row("b"))
    erase(erasing(output, uris=listed(tmp_path, one)))
    assert [path for path, text in written(output) if one in text] == []
    # a worker that outlived its driver finds its part written
    assert storage.exists(part.part_uri(part_id))
    classify(config)
    assert one not in {row["uri"] for row in rows_of(output)}


@pytest.mark.parametrize("frames", [False, True], ids=["files", "frames"])
@pytest.mark.parametrize("ending", [".csv", ".parquet", None])
def test_a_pack_loses_bytes_and_label_of_what_is_erased(
    model: str, tmp_path: Path, ending: str | None, frames: bool
) -> None:
    tree = str(write_tree(tmp_path / "tree", {"glioma": 3, "no_tumor": 3}))
    source = tree
    if ending:
        table = read_labelled(tree).select(["uri", "label"])
        source = f"{tree}/labels{ending}"
        if ending == ".csv":
            Path(source).write_text(
                "uri;label\n" + "\n".join(f"{one['uri']};{one['label']}" for one in table.to_pylist())
            )
        else:
            pq.write_table(table, source)
    output = str(tmp_path / "packed")
    config = PackConfig(input=source, output=output, actors=1, frames=frames, model=model if frames else None)
    pack(config)
    read_pack = partial(read_labelled, output, preprocess=PREPROCESS)
    labelled = read_pack().to_pylist()
    assert len(labelled) == 6
    gone = read_labelled(tree)["uri"][1].as_py()
    secrets = (gone, hashlib.sha256(Path(gone).read_bytes()).hexdigest())
    with pytest.raises(UserError, match="give --uris"):
        erase(erasing(output, study="1.2.3"))
    erase(erasing(output, uris=listed(tmp_path, gone)))
    assert found_in(written(output), secrets) == set()
    left = read_pack().to_pylist()
    assert [one["label"] for one in left] == [
        one["label"] for one in labelled if not one["uri"].endswith(gone[len(tree) :])
    ]
    files = [one["uri"] for one in read_labelled(tree).to_pylist() if one["uri"] != gone]
    made = FrameSource(PREPROCESS)
    contents = [made.from_uris([uri])[0][0].tobytes() if frames else Path(uri).read_bytes() for uri in files]
    assert [bytes(storage.read_bytes(one["uri"])) for one in left] == contents
    pack(config)
    assert len(read_pack()) == 5
    if frames:
        classify(job(model, output, str(tmp_path / "table")))
        assert {row["uri"] for row in rows_of(str(tmp_path / "table"))} == set(files)
    # the place that an object had is no other object's
    (shard,) = [info.uri for info in storage.list_files(f"{output}/{describe_pack(output).folder}")]
    with pytest.raises(StorageError, match="lost rows"):
        storage.read_bytes(member_uri(shard, 1, gone[len(tree) + 1 :]))


@pytest.mark.parametrize("at", ["its first run", "a later run"])
def test_a_pack_that_was_interrupted_does_not_bring_the_object_back(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    tree = write_tree(tmp_path / "data", {"glioma": 20, "no_tumor": 20})
    output, gone = str(tmp_path / "packed"), read_labelled(tree)["uri"][1].as_py()
    config = PackConfig(input=tree, output=output, actors=1, frames=True, model=model)
    if at == "a later run":
        pack(config)
        write_tree(tmp_path / "data" / "more", {"glioma": 40})
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            pack(config)
    erase(erasing(output, uris=listed(tmp_path, gone)))
    pack(config)
    assert {info.uri for info in list_pack(output)} == {info.uri for info in storage.list_files(tree)} - {gone}
    shards = list((tmp_path / "packed" / describe_pack(output).folder).glob("*.parquet"))
    assert len(shards) > 2
    assert {tuple(pq.read_schema(shard).names) for shard in shards} == {tuple(FRAMES_SCHEMA.names)}


def test_what_cannot_be_erased_is_one_line(place: str, tmp_path: Path) -> None:
    write(place, "1", row("a"))
    before = rows_of(place)
    for changes, message in (
        ({"where": "colour = 'red'"}, "colour"),
        ({"where": "(label"}, "--where"),
        ({"where": "uri IN (SELECT content FROM read_text('/etc/hostname'))"}, "--where"),
        ({"where": "label = 'meningioma'"}, "no row"),
        ({"study": "1.2.3"}, "no row"),
        ({"study": "1' OR '1' = '1"}, "no row"),
    ):
        with pytest.raises(UserError, match=message):
            erase(erasing(place, **changes))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no results table"):
        erase(erasing(str(tmp_path / "empty"), where="true"))
    for changes in ({}, {"where": "true", "study": "1"}):
        with pytest.raises(ValueError, match="give one of"):
            erasing(place, **changes)
    assert rows_of(place) == before
    assert not storage.list_names(storage.join(place, "_erased"), missing_ok=True)
