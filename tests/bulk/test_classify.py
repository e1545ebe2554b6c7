"""The classify job: every frame once, only what is new is read, and the answers are those of the classifier."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from PIL import Image

from btray import phantoms, storage
from btray.bulk import runs
from btray.bulk.classify import ClassifyJob, classify
from btray.bulk.config import ClassifyConfig
from btray.bulk.listing.tasks import RayTasks
from btray.bulk.pipeline import process_parts
from btray.bulk.scan_reader import pieces_of
from btray.bulk.table import KEY
from btray.bulk.worker import PartActor, ReadActor
from btray.core import cluster
from btray.core.errors import ThresholdExceeded, UserError
from btray.data.frames import Rejection
from btray.data.preprocess import make_frame
from btray.model.classifier import Classifier
from btray.model.drift import Profile
from btray.results import current
from btray.storage import FileInfo, lease
from tests.conftest import ROOT
from tests.helpers.classify_helpers import (
    classify_killed_thrice,
    job,
    keys_of,
    mixed_objects,
    part_classifier,
    plain_rows,
    report_of,
    without_ray,
    write_inventory,
    write_objects,
)
from tests.helpers.scan_corpus import bad_scans, good_scans
from tests.helpers.tiny_bundle import PREPROCESS, saved_bundle

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("bundle") / "model")
    saved_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def archive(s3: Any) -> str:
    """A bucket with a bad object of every kind among good ones."""
    s3.make_bucket("test-classify")
    write_objects("s3://test-classify/scans", mixed_objects(600))
    return "s3://test-classify/scans"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classify in this process, for what does not depend on Ray's actors, which take seconds to start."""
    without_ray(monkeypatch)


def one_colour(gray: int, side: int) -> bytes:
    body = io.BytesIO()
    Image.new("L", (side, 90), gray).save(body, "PNG")
    return body.getvalue()


def assert_equal_to_the_classifier(rows: pa.Table, model: str) -> None:
    by_key = {(row["uri"], row["frame"]): row for row in rows.to_pylist()}
    uris = sorted({uri for uri, _ in by_key})
    predictions = Classifier.load(model, batch_size=7).predict(uris)
    assert len(predictions) == len(by_key)
    for expected in predictions:
        row = by_key[str(expected.uri), expected.frame]
        assert (row["status"], row["error_code"]) == (expected.status, expected.error_code)
        assert row["label"] == expected.label
        if expected.status == "ok":
            assert dict(row["probabilities"]) == pytest.approx(expected.probabilities, abs=1e-5)
            assert row["confidence"] == pytest.approx(expected.confidence, abs=1e-5)
        else:
            assert row["probabilities"] is None


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.s3
def test_each_frame_is_there_once_whatever_is_killed_and_answers_are_the_classifiers(
    ray_session: None, model: str, archive: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = "s3://test-classify/killed"

    def look() -> None:
        assert not {key for key, count in Counter(keys_of(plain_rows(output))).items() if count > 1}

    classify_killed_thrice(monkeypatch, job(model, archive, output, actors=2), look)
    rows = plain_rows(output)
    listed = {info.uri for info in storage.list_files(archive)}
    assert {uri for uri, _ in keys_of(rows)} == listed
    assert max(Counter(keys_of(rows)).values()) == 1
    assert len(rows) == len(listed) + 2  # pages.tif has three
    assert_equal_to_the_classifier(rows, model)
    report = report_of(output)
    assert (report["objects"], report["unchanged"]) == (len(listed), 0)
    rejected = Counter(code for code in rows["error_code"].to_pylist() if code is not None)
    assert rejected == Counter(code for _, code in bad_scans().values())
    assert not [name for name in storage.list_names(f"{output}/_runs/{report['model_id']}") if "worklist" in name]


@pytest.mark.soak
def test_the_first_rows_are_there_long_before_a_slow_listing_ends(
    ray_session: None, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listing gives an object now and then, and does not end before it has seen a file of the table."""
    scans, output, whole = tmp_path / "scans", tmp_path / "out", good_scans()["jpeg_gray"]
    write_objects(str(scans), {f"{number:03}.jpg": whole for number in range(600)})
    listed = storage.list_files_unordered
    left_when_rows_came: list[int] = []

    def slowly(uri: str) -> Iterator[FileInfo]:
        files = list(listed(uri))
        for number, file in enumerate(files):
            yield file
            if not left_when_rows_came and any("/_" not in str(path) for path in output.rglob("*.parquet")):
                left_when_rows_came.append(len(files) - number)
            if not left_when_rows_came:
                time.sleep(0.1)

    for place in ("listing.objects._SECONDS", "worklist._LONGEST_WAIT", "listing.new_objects._ROUND_SECONDS"):
        monkeypatch.setattr(f"btray.bulk.{place}", 0.3)  # seconds of many
    monkeypatch.setattr(storage, "list_files_unordered", slowly)
    classify(job(model, str(scans), str(output)))
    assert left_when_rows_came
    assert left_when_rows_came[0] > 100
    assert len(plain_rows(str(output))) == 600


def test_what_is_done_is_not_read_again_what_changed_is_and_old_rows_stay(
    ray_session: None, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scans, output = tmp_path / "scans", str(tmp_path / "out")
    objects = {name: data for name, data in mixed_objects(40).items() if name.endswith((".jpg", "gif", "json"))}
    write_objects(str(scans), objects)
    (scans / "gone.jpg").symlink_to(tmp_path / "nowhere")
    config = job(model, str(scans), output)

    classify(config.model_copy(update={"dry_run": True, "limit": 3}))
    assert capsys.readouterr().out.startswith("3 new objects, ")
    assert not Path(output).exists()

    with pytest.raises(ThresholdExceeded, match="--max-rejected"):
        classify(config.model_copy(update={"max_rejected": 0.0}))
    count = len(objects) + 1
    assert len(plain_rows(output)) == count
    report = report_of(output)
    assert report["objects"] == count
    wrong = Counter(code for name, (_, code) in bad_scans().items() if name.endswith((".jpg", "gif", "json")))
    assert report["rejected_by_code"] == dict(wrong + Counter(not_found=1))
    assert sum(report["labels"].values()) == report["frames"] == count - report["rejected"]
    gone = current(output).filter(pa.compute.equal(current(output)["error_code"], "not_found"))
    assert gone["retryable"].to_pylist() == [True]

    (scans / "gone.jpg").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("btray.core.cluster.connected", None)  # nothing is new, so there is no need for Ray
        classify(config)
    assert report_of(output)["unchanged"] == len(objects)
    assert len(plain_rows(output)) == count
    without_ray(monkeypatch)  # actors have shown what they do; what follows is decided before they start

    name = "day/0001.jpg"
    (scans / name).write_bytes(objects["day/0002.jpg"])
    (scans / "gone.jpg").write_bytes(objects["day/0003.jpg"])
    classify(config)
    assert report_of(output)["objects"] == 2
    assert sorted(Counter(plain_rows(output)["uri"].to_pylist()).values())[-3:] == [1, 2, 2]
    assert len(current(output)) == count + 2

    classify(config.model_copy(update={"retry_rejected": True}))
    assert report_of(output)["objects"] == report_of(output)["rejected"] == sum(".jpg" not in name for name in objects)
    classify(config.model_copy(update={"reclassify": True, "include": ("*.jpg",), "limit": 5}))
    assert report_of(output)["objects"] == 5
    rows = current(output)
    assert len(rows) == count + 2
    assert max(Counter(zip(*(rows[column].to_pylist() for column in KEY), strict=True)).values()) == 1
    assert_equal_to_the_classifier(
        rows.filter(pa.array([uri != str(scans / name) and "gone" not in uri for uri in rows["uri"].to_pylist()])),
        model,
    )


@pytest.mark.s3
def test_an_inventory_is_classified_whatever_its_keys_are(
    ray_session: None, bucket: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts as large, so that tasks of Ray list and join it."""
    without_ray(monkeypatch)  # those tasks aside
    monkeypatch.setattr("btray.bulk.listing.archive._LARGE", 0)
    functions: list[str] = []
    start = RayTasks.start
    monkeypatch.setattr(
        RayTasks,
        "start",
        lambda self, function, *arguments, **how: (
            functions.append(getattr(function, "__name__", "split")),
            start(self, function, *arguments, **how),
        )[1],
    )
    scan = mixed_objects(1)["day/0000.jpg"]
    names = [
        "patient=1/a=b.jpg",
        "100% #1?.jpg",
        "a+b c.jpg",
        "%41.jpg",
        "日本/x",
        "q?x=1&y=2",
        "changed.jpg",
        "gone.jpg",
    ]
    write_objects(bucket, dict.fromkeys(names, scan))
    listed = {info.uri.removeprefix(f"{bucket}/"): info for info in storage.list_files(bucket)}
    rows = [{"Key": name, "Size": info.size, "ETag": info.etag} for name, info in listed.items()]
    manifest, output = write_inventory(bucket, "CSV", rows), str(tmp_path / "dataset=1")
    storage.write_bytes(f"{bucket}/changed.jpg", mixed_objects(2)["day/0001.jpg"])
    storage.delete(f"{bucket}/gone.jpg")

    classify(job(model, manifest, output))
    found = {row["uri"].removeprefix(f"{bucket}/"): row for row in plain_rows(output).to_pylist()}
    assert len(plain_rows(output)) == len(names)
    assert {name: row["etag"] for name, row in found.items()} == {name: listed[name].etag for name in names}
    retried = {name: row["error_code"] for name, row in found.items() if row["retryable"]}
    assert retried == {"changed.jpg": "changed", "gone.jpg": "not_found"}
    assert {row["status"] for name, row in found.items() if name not in retried} == {"ok"}

    classify(job(model, manifest, output))
    assert report_of(output)["objects"] == 2
    assert report_of(output)["unchanged"] == len(names) - 2
    tasks = Counter(functions)
    assert tasks["split"] == 2
    assert tasks["join"] > 1, "partition by partition"


@pytest.mark.parametrize(("names", "include"), [("", ()), ("a.jpg\n", ("*.dcm",))], ids=["empty list", "no match"])
def test_an_input_of_which_no_object_is_chosen_is_a_night_without_work_that_says_so(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, names: str, include: tuple[str, ...]
) -> None:
    (tmp_path / "new.txt").write_text(names)
    classify(job(model, str(tmp_path / "new.txt"), str(tmp_path / "out"), include=include))
    assert report_of(str(tmp_path / "out"))["objects"] == 0
    assert re.search(r"no object of .*new.txt is chosen", caplog.text)


def test_another_model_writes_beside_the_first(here: None, model: str, tmp_path: Path) -> None:
    other = saved_bundle(tmp_path / "other", seed=9)
    write_objects(str(tmp_path / "scans"), {"a.jpg": mixed_objects(1)["day/0000.jpg"]})
    for bundle in (model, str(tmp_path / "other")):
        classify(job(bundle, str(tmp_path / "scans"), str(tmp_path / "out")))
    assert len(set(plain_rows(str(tmp_path / "out"))["model_id"].to_pylist())) == 2
    assert len(current(str(tmp_path / "out"), model_id=other.manifest.model_id)) == 1


_ON_ONE_CPU = """
import ray, sys
from btray.bulk.classify import classify
from btray.bulk.config import ClassifyConfig
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
classify(ClassifyConfig(model=sys.argv[1], input=sys.argv[2], output=sys.argv[3]))
"""


@pytest.mark.slow
def test_one_cpu_is_enough(model: str, tmp_path: Path) -> None:
    write_objects(str(tmp_path / "scans"), {name: mixed_objects(40)[name] for name in ("day/0001.jpg", "pages.tif")})
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _ON_ONE_CPU, model, str(tmp_path / "scans"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(plain_rows(str(tmp_path / "out"))) == 4


def test_wrong_use_is_refused_before_anything_is_written(model: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for changes, said in (
        ({"input": str(tmp_path / "nowhere")}, "nowhere"),
        ({"model": str(tmp_path)}, "not a model bundle"),
        ({"model_id": "0" * 32}, "0" * 32),
    ):
        with pytest.raises(UserError, match=re.escape(said)) as caught:
            classify(ClassifyConfig(**{"model": model, "input": str(tmp_path), "output": str(output), **changes}))
        assert "\n" not in str(caught.value)
        assert not output.exists()
    (tmp_path / "scan.jpg").write_bytes(b"x")
    with lease.hold(str(output)), pytest.raises(UserError, match="another run"):
        classify(job(model, str(tmp_path), str(output)))


def test_actors_use_the_gpus_that_they_asked_for_and_none_that_happens_to_be_there(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: dict[type, dict[str, Any]] = {}
    parts = SimpleNamespace()
    parts.map_batches = lambda actor, **how: (requests.update({actor: how}), parts)[1]
    monkeypatch.setattr("btray.bulk.pipeline.ray.data.read_datasource", lambda *_, **__: parts)
    monkeypatch.setattr("btray.bulk.pipeline.cpus", lambda: 32.0)
    monkeypatch.setattr("btray.bulk.pipeline.gpus", lambda: 2)
    monkeypatch.setattr("btray.bulk.pipeline.require_gpus", lambda: 2)
    monkeypatch.setattr("btray.bulk.pipeline.started_ray_here", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    devices: list[str] = []
    load = Classifier.load
    monkeypatch.setattr(
        Classifier, "load", lambda *model, device, **how: (devices.append(device), load(*model, device="cpu", **how))[1]
    )
    run = runs.Run(run_id="r", group="m", parts="p", output="out", request={})
    for changes, device, actors_of, share, readers in (
        ({}, "cpu", 32, None, None),
        ({"actors": 3}, "cpu", 3, None, None),
        ({"pipeline": "two"}, "cpu", 16, None, 16),
        ({"pipeline": "two", "actors": 3}, "cpu", 3, None, 29),
        ({"use_gpu": True}, "cuda", 4, 0.5, 28),
        ({"use_gpu": True, "gpu_share": 1.0}, "cuda", 2, 1.0, 30),
        ({"use_gpu": True, "pipeline": "one", "gpu_share": 0.25}, "cuda", 8, 0.25, None),
    ):
        requests.clear()
        config = ClassifyConfig(model=model, input=str(tmp_path), output="out", **changes)
        archive_job = ClassifyJob(config)
        process_parts(
            archive_job.processor(),
            run,
            actors=config.actors,
            patience=1,
            gpu_share=archive_job.gpu_share(),
            make_reader=archive_job.reader(),
        )
        request = requests.pop(PartActor)
        pool = request["compute"]
        assert (pool.initial_size, pool.max_size, request["num_gpus"]) == (actors_of, actors_of, share), changes
        assert (requests.pop(ReadActor)["compute"].max_size if readers else None) == readers, changes
        assert not requests
        part_classifier(monkeypatch, model, **changes)
        assert devices.pop() == device
    with pytest.raises(ValueError, match="onnx runs on a CPU: leave out --use-gpu"):
        ClassifyConfig(model=model, input="in", output="out", use_gpu=True, engine="onnx")


@pytest.mark.parametrize("make_reader", [None, lambda run: None])
def test_actors_with_gpus_are_a_pipeline_that_ray_accepts(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_reader: Any
) -> None:
    monkeypatch.setattr("btray.bulk.pipeline.require_gpus", lambda: 1)
    run = runs.Run(run_id="r", group="m", parts="p", output=str(tmp_path), request={})
    dataset = process_parts(
        lambda run, cpus: None,  # type: ignore[arg-type, return-value]
        run,
        actors=2,
        patience=1,
        gpu_share=0.5,
        make_reader=make_reader,
    )
    assert PartActor.__name__ in str(dataset)


def test_an_actor_may_use_its_share_of_the_cpus_of_its_own_node(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ray.get_runtime_context().get_node_id()
    nodes = [{"NodeID": "other", "Resources": {"CPU": 64.0}}, {"NodeID": here, "Resources": {"CPU": 16.0, "GPU": 2.0}}]
    monkeypatch.setattr("btray.core.cluster.ray.nodes", lambda: nodes)
    monkeypatch.setattr("btray.core.cluster.cpus", lambda: 80.0)
    assert [cluster.own_cpus(4, share) for share in (1.0, 0.5, 0.01)] == [8, 4, 1]
    assert [cluster.own_cpus(workers) for workers in (1, 10, 80, 200)] == [16, 8, 1, 1]


@pytest.mark.parametrize("cpus", [1, 3])
def test_scans_of_many_pages_take_the_memory_of_a_few_and_give_the_rows_of_all(
    model: str, monkeypatch: pytest.MonkeyPatch, cpus: int
) -> None:
    monkeypatch.setattr("btray.bulk.scan_reader._SMALL", 8 * PREPROCESS.size**2)
    monkeypatch.setattr("btray.bulk.scan_reader._FRAMES", 20)
    worker = part_classifier(monkeypatch, model, cpus=cpus)
    most = worker.scans.most_frames
    assert most == 2 * worker.classifier.batch_size == 32
    pages = [Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 20), np.uint8)) for seed in range(40)]
    body = io.BytesIO()
    pages[0].save(body, "TIFF", save_all=True, append_images=pages[1:])
    objects = [*list(good_scans().values())[:5], good_scans()["tiff_pages"], b"", body.getvalue(), b"<html>"]
    objects += [body.getvalue(), body.getvalue()]
    batch = [FileInfo(str(number), len(data), "e", 0.0) for number, data in enumerate(objects)]

    expected = worker.classifier.predict(objects)
    made = itertools.count()
    monkeypatch.setattr("btray.data.frames.make_frame", lambda *given: (next(made), make_frame(*given))[1])
    used = 0
    decoded = enumerate(worker.scans.decode(objects))
    for number, pieces in enumerate(pieces_of(decoded, worker.classifier.source, most=most)):
        some = sum(0 if isinstance(piece.frames, Rejection) else len(piece.frames) for piece in pieces)
        used += some
        assert some <= most
        # what stood between the two looks at the counter was counted by them
        assert next(made) - number - used <= 8 * (2 * cpus + 1), "frames are made long before they are used"
    assert used == sum(said.status == "ok" for said in expected)

    monkeypatch.setattr("btray.bulk.worker.read_many", lambda uris, **_: [objects[int(uri)] for uri in uris])
    seconds: defaultdict[str, float] = defaultdict(float)
    rows = [row for lot in worker.lots(batch, seconds) for row in worker.rows(batch, lot, seconds)]
    assert [(row["uri"], row["frame"], row["status"], row["error_code"], row["label"]) for row in rows] == [
        (str(said.index), said.frame, said.status, said.error_code, said.label) for said in expected
    ]
    assert [row["confidence"] for row in rows] == pytest.approx([said.confidence for said in expected], abs=1e-5)


def test_a_run_leaves_a_report_a_page_and_pictures_that_explain_it(here: None, model: str, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    good = [name for name in mixed_objects(6) if name.endswith(".jpg") and "bad" not in name]
    write_objects(str(tmp_path / "scans"), mixed_objects(6) | {"bad.jpg": b"<html>"})
    classes = Classifier.load(model).classes
    chosen = Classifier.load(model).predict([str(tmp_path / "scans" / good[0])])[0].label
    classify(job(model, str(tmp_path / "scans"), output, explain=3, explain_labels=(chosen,)))
    report = report_of(output)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["rejected_by_code"]["not_an_image"] >= 1
    assert set(report["seconds_by_stage"]) == {"read", "decode", "predict", "explain", "write"}

    rows = [row for row in plain_rows(output).to_pylist() if row["status"] == "ok"]
    assert Profile.model_validate(report["profile"]) == Profile.of(rows)
    least = sorted(row["confidence"] for row in rows)[:24]
    assert [scan["confidence"] for scan in report["least_certain"]] == pytest.approx(least)

    folder = Path(output, "_explained", report["run_id"])
    said = [line for path in folder.glob("*.csv") for line in csv.DictReader(path.open())]
    explained = {(line["uri"], int(line["frame"])) for line in said}
    assert explained >= {(row["uri"], row["frame"]) for row in rows if row["label"] == chosen}
    assert len([line for path in folder.glob("least*.csv") for line in csv.DictReader(path.open())]) == 3
    for line in said:
        assert line["label"] in classes
        with Image.open(folder / line["picture"]) as picture:
            assert picture.size == (PREPROCESS.size, PREPROCESS.size)

    page = Path(output, "_runs", report["model_id"], report["run_id"], "summary.html").read_text(encoding="utf-8")
    assert page.count('<img src="data:image/png') == 2 + len(report["least_certain"])  # this model has no score
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "not_an_image" in page

    with pytest.raises(UserError, match=r"glioblastoma.*it knows glioma"):
        classify(job(model, str(tmp_path / "scans"), output, explain_labels=("glioblastoma",)))


@pytest.mark.soak
def test_a_change_of_the_answers_is_seen_against_the_runs_before(here: None, model: str, tmp_path: Path) -> None:
    pictures = {f"{number}.jpg": phantoms.encoded_phantom("glioma", number) for number in range(30)}
    write_objects(str(tmp_path / "scans"), pictures)
    output = str(tmp_path / "out")
    classify(job(model, str(tmp_path / "scans"), output))
    assert report_of(output)["drift"] == {}  # a first run of a bundle without the profile of its validation images
    classify(job(model, str(tmp_path / "scans"), output, reclassify=True))
    assert report_of(output)["drift"]["runs before"]["confidence"] == pytest.approx(0, abs=1e-6)
    white = {f"{number}.png": one_colour(255, 90 + number) for number in range(30)}
    write_objects(str(tmp_path / "scans"), white)
    classify(job(model, str(tmp_path / "scans"), output))
    found = report_of(output)["drift"]["runs before"]
    assert (found["frames"], report_of(output)["objects"]) == (60, 30)
    assert found["confidence"] > 0.25
