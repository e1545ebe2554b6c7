"""One stage or two: the classify job gives the same rows, each once, whatever is killed, in bounded memory."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

from btray import phantoms, storage
from btray.bulk import worker
from btray.bulk.classify import ClassifyJob, classify
from btray.bulk.config import ClassifyConfig, PackConfig
from btray.bulk.pack import pack
from btray.bulk.runs import Run
from btray.bulk.scan_reader import Piece
from btray.bulk.worker import ReadActor
from btray.core.errors import UserError
from btray.data.frames import Frames
from btray.storage import FileInfo, lease
from tests.helpers.classify_helpers import (
    QUICK_LEASE,
    actors,
    job,
    keys_of,
    mixed_objects,
    part_files,
    plain_rows,
    report_of,
    start,
    without_ray,
    write_objects,
)
from tests.helpers.dicom_files import slice_file
from tests.helpers.nifti_files import write_nifti
from tests.helpers.scan_corpus import bad_scans, good_scans
from tests.helpers.tiny_bundle import saved_bundle
from tools.processes import until

PIXELS = np.random.default_rng(0).integers(0, 4000, (64, 64)).astype(np.uint16)
OWN = ("run_id", "classified_at")
"""Columns that differ between two runs."""


RUN = Run(run_id="run", group="model", parts="parts", output="out", request={})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_bundle(tmp_path_factory.mktemp("bundle") / "model").uri


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every good and bad kind of scan that there is: pages, volumes, two studies of DICOM, and one that is gone."""
    folder = tmp_path_factory.mktemp("scans")
    objects = mixed_objects(100) | {f"good {name}": data for name, data in good_scans().items()}
    objects["volume.nii"] = write_nifti(np.random.default_rng(1).integers(0, 900, (48, 48, 30)).astype(np.uint16))
    for number in range(5):
        position = {"ImagePositionPatient": [0, 0, number], "SOPInstanceUID": f"1.2.3.{number}"}
        objects[f"study/{number}.dcm"] = slice_file(PIXELS + number, **position)
        sagittal = {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1], "SeriesInstanceUID": "1.2.9"}
        objects[f"other/{number}.dcm"] = slice_file(PIXELS + number, **sagittal, **position)
    write_objects(str(folder), objects)
    (folder / "gone.jpg").symlink_to(folder / "nowhere")
    return str(folder)


def rows_of(output: str) -> list[dict[str, Any]]:
    """Return the rows, in the order of their keys, without what differs between two runs."""
    rows = [{name: row[name] for name in row if name not in OWN} for row in plain_rows(output).to_pylist()]
    return sorted(rows, key=str)


@pytest.mark.parametrize(
    "changes",
    [{}, {"series": ("plane=axial",), "explain_labels": ("glioma",)}, {"batch_size": 3}],
    ids=["loose", "series", "packed"],
)
def test_both_pipelines_give_the_same_rows_bit_for_bit(
    model: str, scans: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    without_ray(monkeypatch)
    packed = "batch_size" in changes
    if packed:
        pack(PackConfig(input=scans, output=str(tmp_path / "packed")))
    source = str(tmp_path / "packed") if packed else scans
    for pipeline in ("one", "two"):
        classify(job(model, source, str(tmp_path / pipeline), pipeline=pipeline, **changes))
    rows = rows_of(str(tmp_path / "one"))
    assert rows_of(str(tmp_path / "two")) == rows
    reports = [report_of(str(tmp_path / pipeline)) for pipeline in ("one", "two")]
    for name in ("objects", "frames", "rejected_by_code", "labels", "profile", "least_certain", "most_tumor"):
        assert reports[0][name] == reports[1][name], name
    assert reports[0]["seconds_by_stage"].keys() == reports[1]["seconds_by_stage"].keys()
    assert rows_of(f"{tmp_path / 'one'}-studies") == rows_of(f"{tmp_path / 'two'}-studies")
    found = Counter(row["error_code"] for row in rows)
    if "series" in changes:
        assert found["not_selected"] > 5
    else:
        assert {code for _, code in bad_scans().values()} | {"not_found"} <= found.keys()
    assert max(row["frame"] for row in rows) == 29


def test_frames_that_are_too_many_to_be_sent_are_read_where_they_are_classified(
    model: str, scans: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    classify(job(model, scans, str(tmp_path / "one"), pipeline="one"))
    frame = 48 * 48
    sent: list[int] = []
    read = ReadActor._read

    def counted(actor: ReadActor, objects: list[FileInfo]) -> Any:
        reading = read(actor, objects)
        sent.append(sum(piece.nbytes for lot in reading.lots for piece in lot))
        return reading

    monkeypatch.setattr(ReadActor, "_read", counted)
    for most in (0, 40 * frame):
        monkeypatch.setattr(worker, "_AHEAD_BYTES", most)
        output = str(tmp_path / f"two {most}")
        classify(job(model, scans, output, pipeline="two"))
        assert max(sent) <= most + 256 * frame
        rows, expected = rows_of(output), rows_of(str(tmp_path / "one"))
        for row, one in zip(rows, expected, strict=True):  # in other batches, whose sums are rounded elsewhere
            assert row["confidence"] == pytest.approx(one["confidence"], abs=1e-5)
            assert {name: row[name] for name in row if name not in ("confidence", "probabilities", "ood_score")} == {
                name: one[name] for name in one if name not in ("confidence", "probabilities", "ood_score")
            }
        sent.clear()


def test_one_part_is_read_while_another_is_decoded_and_none_is_decoded_or_blamed_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The two threads in which Ray calls an actor that reads, started again after a part has killed it."""
    blamed: list[str] = []
    monkeypatch.setattr("btray.bulk.runs.note_attempt", lambda run, part, uri, actor: blamed.append(part))
    begun, decoding = [Event(), Event()], [Event(), Event()]
    go = Event()

    class Reader:
        def lots(self, objects: list[FileInfo], seconds: Any) -> Any:
            number = int(objects[0].uri)
            begun[number].set()

            def decoded() -> Any:
                decoding[number].set()
                assert go.wait(30)
                yield [Piece(0, 0, Frames([np.zeros((2, 2), np.uint8)]))]

            return decoded()

    actor = ReadActor.__new__(ReadActor)
    actor.reader, actor._decoding = Reader(), worker.threading.Lock()
    actor.run, actor._died_before = RUN, True
    parts = [{"part": f"{n}", "uri": [f"{n}"], "size": [1], "etag": ["e"], "place": [""]} for n in range(2)]
    threads = [Thread(target=actor._read, args=(part,)) for part in parts]
    threads[0].start()
    assert decoding[0].wait(30)
    threads[1].start()
    assert begun[1].wait(30)
    assert not decoding[1].is_set()
    assert blamed == ["0"]
    go.set()
    for thread in threads:
        thread.join(30)
    assert decoding[1].is_set()


def test_a_node_that_makes_other_frames_reads_nothing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_reader = ClassifyJob(job(model, str(tmp_path), str(tmp_path / "out"), pipeline="two")).reader()
    assert make_reader is not None
    monkeypatch.setattr("btray.core.logs.begin_in_worker", lambda *_, **__: None)
    make_reader(RUN)
    monkeypatch.setattr("btray.model.bundle.preprocess_digest", lambda config: "of other libraries")
    with pytest.raises(UserError, match=r"preprocessing gives other bits on .*; install the versions"):
        make_reader(RUN)


def test_a_part_that_is_written_is_neither_read_nor_decoded_again(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    scans, output = tmp_path / "scans", str(tmp_path / "out")
    write_objects(str(scans), {f"{number:03d}.jpg": phantoms.encoded_phantom("glioma", 1) for number in range(80)})
    with monkeypatch.context() as patch:
        patch.setattr("btray.bulk.runs.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            classify(job(model, str(scans), output, pipeline="two"))
    parts = sorted(part_files(output))
    storage.delete(parts[0])
    read: list[str] = []
    read_many = worker.read_many
    monkeypatch.setattr(worker, "read_many", lambda uris, **how: (read.extend(uris), read_many(uris, **how))[1])
    classify(job(model, str(scans), output, pipeline="two"))
    assert sorted(part_files(output)) == parts
    assert 0 < len(read) < 80
    assert Counter(keys_of(plain_rows(output))).keys() == {(str(path), 0) for path in scans.iterdir()}
    assert report_of(output)["taken_from_earlier_attempt"] == 80 - len(read)


@pytest.mark.soak
@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_each_object_is_there_once_whichever_stage_or_driver_is_killed(
    ray_session: None, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "EXPIRY", QUICK_LEASE[1])
    scans, output = tmp_path / "scans", str(tmp_path / "out")
    write_objects(str(scans), mixed_objects(40))
    pages = good_scans()["tiff_pages"]
    for number in range(3000):
        path = scans / f"{number % 7}" / f"{number:05d}.tif"
        path.parent.mkdir(exist_ok=True)
        if number < 7:
            path.write_bytes(pages)
        else:
            os.link(scans / f"{number % 7}" / f"{number % 7:05d}.tif", path)
    config: ClassifyConfig = job(model, str(scans), output, pipeline="two")
    driver = start(config)
    for kind in ("ReadActor", "PartActor"):
        # at work, which shows in the title that Ray gives it; readers end long before those that classify
        victims = until(lambda kind=kind: actors(f"{kind})).submit") or not driver.is_alive(), kind, 300)
        assert driver.is_alive(), "the job ended before an actor could be killed"
        os.kill(victims[0], signal.SIGKILL)
    before = len(part_files(output))
    until(lambda: len(part_files(output)) > before or not driver.is_alive(), "a part", 200)
    driver.kill()
    driver.join()
    assert max(Counter(keys_of(plain_rows(output))).values()) == 1
    classify(config)
    counts = Counter(keys_of(plain_rows(output)))
    assert max(counts.values()) == 1
    listed = {info.uri for info in storage.list_files(str(scans))}
    assert {uri for uri, _ in counts} == listed
    assert len(counts) == len(listed) + 2 * 3001  # a file of pages has three
