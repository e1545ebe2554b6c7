"""On real Ray Serve: answers equal the archive's; switches and killed replicas cost no request; metrics are there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.http as triton
import yaml

from btray.bulk.classify import classify
from btray.core.errors import Failed, UserError
from btray.model.classifier import Classifier
from btray.model.manifest import Thresholds
from btray.model.network import build_network
from btray.model.ood import Distribution
from btray.results import current
from btray.serving.config import ReplicasConfig, ServeConfig, ServiceConfig, is_loopback
from btray.serving.dicomweb.pending import PendingStudies
from btray.serving.ray_serve_private import ClusterTexts
from tests.conftest import ROOT
from tests.helpers.classify_helpers import job, write_objects
from tests.helpers.hospital_archive import ROOT as UIDS
from tests.helpers.hospital_archive import instance
from tests.helpers.hostile_bodies import hostile_bodies
from tests.helpers.orthanc import Orthanc
from tests.helpers.pushes import RELATED, STOW, related, reports
from tests.helpers.scan_corpus import bad_scans, good_scans
from tests.helpers.serving_helpers import bundle_at, pages, problem, scan, status_of
from tests.helpers.serving_load import Served, replica_states, replicas, under_load
from tests.helpers.tiny_bundle import NETWORK
from tools.processes import named, until


@pytest.fixture(scope="module")
def objects() -> dict[str, bytes]:
    return {name: data for name, (data, _) in list(bad_scans().items())[:12]} | good_scans()


@pytest.fixture(scope="module")
def rows(
    ray_session: None, model: str, objects: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """What bulk classification says of `objects`, by name; it has run before the replicas take all CPUs."""
    folder = tmp_path_factory.mktemp("archive")
    write_objects(str(folder / "scans"), objects)
    classify(job(model, str(folder / "scans"), str(folder / "table"), actors=1))
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(current(str(folder / "table")).to_pylist(), key=lambda row: row["frame"]):
        found.setdefault(Path(row["uri"]).name, []).append(row)
    return found


@pytest.fixture(scope="module")
def served(rows: dict[str, list[dict[str, Any]]], model: str) -> Iterator[Served]:
    from ray import serve
    from ray.serve.config import HTTPOptions

    from btray.serving.job import free_port

    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host="0.0.0.0", port=port))
    made = Served(f"http://127.0.0.1:{port}", model)
    made.deploy()
    made.wait()
    yield made
    serve.shutdown()


@pytest.mark.cluster
def test_answers_equal_those_of_bulk_classification(
    served: Served, objects: dict[str, bytes], rows: dict[str, list[dict[str, Any]]]
) -> None:
    for name, data in objects.items():
        answer = served.classify(data)
        if rows[name][0]["status"] == "rejected":
            assert answer.json()["code"] == rows[name][0]["error_code"], name
            continue
        results = answer.json()["results"]
        assert len(results) == len(rows[name]), name
        for result, row in zip(results, rows[name], strict=True):
            assert (result["label"], result["model_id"]) == (row["label"], row["model_id"]), name
            assert result["probabilities"] == pytest.approx(dict(row["probabilities"]), abs=1e-5), name
            assert (result["abstained"], result["out_of_distribution"]) == (
                row["abstained"],
                row["out_of_distribution"],
            )


@pytest.mark.cluster
def test_a_switch_under_load_costs_no_request_and_a_bad_bundle_changes_nothing(served: Served, tmp_path: Path) -> None:
    other = bundle_at(tmp_path, "other", seed=5)
    wanted = Classifier.load(other).model_id
    before = sorted(replicas())
    with under_load(served) as load:
        served.deploy(model=other)
        until(lambda: load.answers[-1][1] == wanted)
        until(lambda: all(model_id == wanted for _, model_id in load.answers[-30:]))
        served.deploy(model=str(tmp_path / "nothing"))
        until(lambda: "not a model bundle" in served.models()["switch"]["detail"])
        seen = len(load.answers)
        until(lambda: len(load.answers) > seen + 30)
        assert {model_id for _, model_id in load.answers[seen:]} == {wanted}
        served.deploy()
    assert (load.retried, load.lost) == (0, 0)
    assert sorted(replicas()) == before, "a switch is no restart"


@pytest.mark.cluster
def test_one_process_reports_what_is_pushed_to_any_replica_and_comes_back_when_it_is_killed(
    served: Served, tmp_path: Path
) -> None:
    pending = PendingStudies(str(tmp_path / "pending"))
    with Orthanc(tmp_path / "pacs", AuthenticationEnabled=False) as pacs:
        served.deploy(report_to=pacs.address, report_after_seconds=0.5, pending=pending.folder)
        for study in (1, 2):
            study_uid, files = f"{UIDS}.{study}", [instance(study, 0, place) for place in range(2)]
            pacs.upload(files)

            def noted(files: list[bytes] = files) -> bool:  # a replica may not have the config yet
                answer = served.session.post(
                    served.url + STOW, related(files), headers={"Content-Type": RELATED}, timeout=60
                )
                return answer.status_code == 200 and bool(pending.marks())

            until(noted, seconds=60)
            until(lambda: not pending.marks(), seconds=120)
            assert len(reports(pacs, study_uid)) == 1
            (process,) = named(b"ReportJob", os.getpid())
            os.kill(process, signal.SIGKILL)
        served.deploy()
        until(lambda: not named(b"ReportJob", os.getpid()), seconds=60)


@pytest.mark.cluster
def test_a_replica_killed_under_load_costs_retries_and_no_request(served: Served) -> None:
    until(lambda: len(replicas()) == 2)
    with under_load(served) as load:
        killed = replicas()[0]
        os.kill(killed, signal.SIGKILL)
        until(lambda: killed not in replicas())
        until(lambda: len(replicas()) == 2, seconds=60)
    assert load.lost == 0
    assert load.retried < 30


@pytest.mark.cluster
def test_though_the_config_is_bad_and_all_replicas_die_those_that_start_serve_what_was_served_last(
    served: Served, model: str, tmp_path: Path
) -> None:
    until(lambda: len(replicas()) == 2)
    served.deploy(model=str(tmp_path / "nothing"))
    until(lambda: "not a model bundle" in served.models()["switch"]["detail"])
    before = replicas()
    for old in before:
        os.kill(old, signal.SIGKILL)
    until(lambda: len(set(replicas()) - set(before)) == 2, seconds=60)
    served.wait()
    answer = until(lambda: (found := served.classify(scan())).status_code == 200 and found)
    assert answer.json()["model_id"] == Classifier.load(model).model_id
    assert "not a model bundle" in served.models()["switch"]["detail"]
    served.deploy()
    served.wait()


@pytest.mark.cluster
def test_the_cluster_keeps_the_first_or_the_last_text_of_a_name_for_those_who_share_it(served: Served) -> None:
    texts, others = ClusterTexts("one"), ClusterTexts("another")
    for text in ("first", "second"):
        texts.put("pinned 1", text, replace=False)
        texts.put("served", text, replace=True)
    texts.put("pinned 0", "", replace=False)
    assert texts.names("pinned ") == ["pinned 0", "pinned 1"]
    assert (texts.get("pinned 1"), texts.get("served"), texts.get("nothing")) == ("first", "second", "")
    assert (others.names(""), others.get("served")) == ([], "")


@pytest.mark.cluster
def test_without_keys_no_other_machine_is_answered_though_serve_listens_to_all(served: Served) -> None:
    from ray.util import get_node_ip_address

    address = get_node_ip_address()
    if is_loopback(address):
        pytest.skip(f"this machine has no address but {address}: whether others are refused is NOT shown here")
    other = f"http://{address}:{served.url.rpartition(':')[2]}"
    for host in (address, "localhost"):
        answer = requests.get(other + "/v1/models", headers={"Host": host, "X-Forwarded-For": "127.0.0.1"}, timeout=30)
        problem(answer, 403, "forbidden")


@pytest.mark.cluster
def test_tritons_client_and_hostile_bodies_are_answered_through_serve_as_without_it(served: Served, model: str) -> None:
    (expected,) = Classifier.load(model).predict([scan()])
    image = triton.InferInput("image", [1], "BYTES")
    image.set_data_from_numpy(np.array([scan()], np.object_))
    with triton.InferenceServerClient(served.url.removeprefix("http://")) as client:
        for compression in (None, "gzip"):
            answer = client.infer("btray", [image], request_compression_algorithm=compression)
            assert answer.as_numpy("label")[0].decode() == expected.label
    for path in ("/healthz", "/v2/health/ready", "/"):
        head = requests.head(served.url + path, timeout=60)
        assert (head.status_code, head.content) == (200, b"")
    for name, hostile in hostile_bodies(40, seed=3):
        assert status_of(served.url, hostile) < 500, name
    assert served.classify(scan()).status_code == 200


@pytest.mark.cluster
def test_monitoring_finds_every_number_of_all_replicas(served: Served, tmp_path: Path) -> None:
    served.classify(b"no image")
    # A model that never is sure and knows no image: both marks are counted.
    features = np.random.default_rng(0).normal(size=(20, build_network(NETWORK, 5).head.in_features))
    marks = {"thresholds": Thresholds(abstain_below=1.1, ood_score=0.0), "ood": Distribution.fit(features)}
    unsure = bundle_at(tmp_path, "unsure", seed=9, **marks)
    served.deploy(model=unsure)
    until(lambda: served.classify(scan()).json()["model_id"] == Classifier.load(unsure).model_id)
    names = [
        "requests_total",
        "latency_seconds_bucket",
        "batch_size_bucket",
        "queue",
        "requests_in_work",
        "predictions_total",
        "abstentions_total",
        "out_of_distribution_total",
        "rejects_total",
    ]

    def all_there() -> str | None:
        text = served.session.get(served.url + "/metrics", timeout=30).text
        return text if all(f"btray_serve_{name}{{" in text for name in names) else None

    text = until(all_there, seconds=60)
    assert re.search(r'btray_serve_requests_total\{.*code="400".*route="/v1/classify"', text)
    assert re.search(r'btray_serve_rejects_total\{.*code="not_an_image"', text)
    served.deploy()
    families = re.findall(r"# TYPE (\S+)", text)
    assert len(families) == len(set(families)), "a family stands twice, which Prometheus refuses"


@pytest.mark.cluster
def test_overload_that_waits_or_is_refused_has_the_autoscaler_go_to_the_maximum(served: Served) -> None:
    """Each replica works on one request at a time, which is far below the six that the autoscaler aims at."""
    few = ReplicasConfig(min_replicas=1, max_replicas=3, cpus=0.5, upscale_delay=1)
    served.deploy(few, limits={"max_requests": 1, "max_reading": 64})
    # Replicas of the test before may be there still: Serve waits ten minutes before it takes one away.
    until(lambda: list(replica_states()) == ["RUNNING"])
    assert replica_states()["RUNNING"] < 3
    with under_load(served, clients=24, body=pages(100)):
        until(lambda: replica_states() == {"RUNNING": 3})


# ---- the job, and the files of a deployment


def test_wrong_use_is_told_before_anything_starts(tmp_path: Path) -> None:
    import socket

    from btray.serving.job import run_service

    model = bundle_at(tmp_path, "model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for flags, said in (
            ({"model": str(tmp_path / "nothing")}, "not a model bundle"),
            ({"model": model, "model_id": "0" * 32}, "not the pinned"),
            ({"model": model, "canary": {"model": str(tmp_path / "other")}}, "not a model bundle"),
            ({"model": model, "keys": str(tmp_path / "no keys")}, "no keys"),
            ({"model": model, "port": taken.getsockname()[1]}, "cannot listen"),
        ):
            with pytest.raises(UserError, match=said):
                run_service(ServeConfig(**flags), lambda: ServeConfig(model=model))


def test_a_machine_too_busy_for_serve_to_start_is_a_failure_that_a_restart_may_mend(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from btray.serving import job as serving

    def start(**options: Any) -> None:
        raise TimeoutError("HTTP proxies not available\nafter 60s.")

    monkeypatch.setattr(serving, "_local_ray", lambda config: nullcontext())
    monkeypatch.setattr(serving, "_put_into", lambda signals: None)
    monkeypatch.setattr(serving.serve, "start", start)
    with pytest.raises(Failed, match="not available after 60s") as caught:
        serving.run_service(ServeConfig(model=model, port=serving.free_port()), lambda: ServeConfig(model=model))
    assert "\n" not in str(caught.value)


def test_a_service_that_never_starts_ends_when_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ray.serve.schema import ApplicationStatus

    from btray.serving import job as serving

    waiting = SimpleNamespace(message="no CPU is left")
    application = SimpleNamespace(status=ApplicationStatus.DEPLOYING, message="", deployments={"Classifier": waiting})
    monkeypatch.setattr(serving.serve, "status", lambda: SimpleNamespace(applications={"btray": application}))
    monkeypatch.setattr(serving, "_PATIENCE", 0.0)
    signals: SimpleQueue[int] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(serving._wait_until_running, signals)
        signals.put(signal.SIGHUP)
        until(lambda: "no CPU is left" in caplog.text)
        signals.put(signal.SIGTERM)
        assert running.result(10) is False
        signals.put(signal.SIGHUP)
        running = pool.submit(serving._wait_until_running, signals)
        until(signals.empty)
        application.status = ApplicationStatus.RUNNING
        assert running.result(10) is True
        assert signals.get_nowait() == signal.SIGHUP, "a reload that was asked for while it started is lost"


def test_an_open_address_is_refused_by_the_job_itself() -> None:
    command = [sys.executable, "jobs/serve.py", "--model", "m", "--host", "0.0.0.0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 2
    assert "--insecure" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_serve_yaml_is_what_the_application_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    from btray.serving.deployment import DEPLOYMENT, application

    content = yaml.safe_load((ROOT / "serve.yaml").read_text(encoding="utf-8"))
    (app,) = ServeDeploySchema.model_validate(content).applications
    (deployment,) = app.deployments
    assert app.import_path == "btray.serving:application"
    assert deployment.name == DEPLOYMENT
    assert ServiceConfig.model_validate(deployment.user_config)
    assert application(app.args)
    with pytest.raises(UserError, match="modle"):
        application({"modle": "x"})
