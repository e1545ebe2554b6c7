"""Numbers and logs for operators: names that stay, a drift that means something, a real Prometheus that reads them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from prometheus_client.parser import text_string_to_metric_families

from btray import phantoms
from btray.bulk import progress
from btray.core import metrics
from btray.core.errors import UserError
from btray.model.drift import Drift
from tests.conftest import ROOT
from tests.helpers.classify_helpers import run_report
from tests.helpers.debian import install
from tests.helpers.http_files import PathServer
from tests.helpers.tiny_bundle import saved_bundle
from tests.helpers.training_helpers import write_tree
from tools.loopback_cluster import LoopbackCluster, free_ports
from tools.processes import until

DEPLOY = ROOT / "deploy"
# What the service counts (btray/serving/metrics.py), as Prometheus has it.
OF_SERVICE = {
    "btray_serve_requests_total", "btray_serve_latency_seconds_bucket", "btray_serve_batch_size_bucket",
    "btray_serve_queue", "btray_serve_requests_in_work", "btray_serve_predictions_total",
    "btray_serve_abstentions_total", "btray_serve_out_of_distribution_total", "btray_serve_rejects_total",
}  # fmt: skip
REPORT = run_report(
    objects=200, rejected=4, rejected_by_code={"truncated": 3, "empty": 1}, images_per_second=41.5,
    seconds_by_stage={"read": 1.0, "decode": 3.0, "predict": 5.0, "write": 1.0},
    drift={"runs before": Drift(frames=900, observed=900, labels=0.02, by_label={}, confidence=0.3, ood_score=0.1)},
)  # fmt: skip


# ---- names


def test_the_names_and_labels_that_dashboards_rely_on_stay() -> None:
    """Whoever changes one of these breaks the dashboards and alerts of others: add, and let the old ones be."""
    for job in ("classify", "pack"):
        for name, labels in {
            "objects": ("run_id",), "bytes": ("run_id",), "rejected": ("run_id", "code"),
            "stage_seconds": ("run_id", "stage"), "images_per_second": ("run_id",), "queue": ("run_id",),
            "reject_ratio": ("run_id",), "last_objects": (), "last_rejected": ("code",),
            "last_success_timestamp_seconds": (),
        }.items():  # fmt: skip
            assert metrics.METRICS[f"btray_{job}_{name}"][2] == labels
    for name in ("epoch", "loss", "val_loss", "val_macro_f1", "images_per_second", "feed_ratio", "rejected"):
        assert metrics.METRICS[f"btray_train_{name}"][2] == ("run_id",)
    assert metrics.METRICS["btray_classify_drift_psi"][2] == ("run_id", "of")
    assert metrics.METRICS["btray_classify_feed_ratio"][2] == ("run_id",)


def exported() -> set[str]:
    return OF_SERVICE | {
        f"{name}_total" if kind == "counter" else name for name, (kind, _, _) in metrics.METRICS.items()
    }


def test_what_the_service_counts_is_what_stands_here() -> None:
    source = (ROOT / "btray" / "serving" / "metrics.py").read_text(encoding="utf-8")
    made = set(re.findall(r'(?:counter\(|PREFIX \+ )"(\w+)"', source))
    assert made == {re.sub(r"^btray_serve_|_total$|_bucket$", "", name) for name in OF_SERVICE}


def expressions() -> list[str]:
    """Everything that the dashboard and the alerts ask for."""
    board = json.loads((DEPLOY / "grafana" / "btray.json").read_text(encoding="utf-8"))
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    return asked + [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def test_dashboard_and_alerts_ask_only_for_what_is_exported() -> None:
    asked = {name for text in expressions() for name in re.findall(r"\bbtray_\w+", text)}
    assert asked <= exported()
    assert asked >= {
        "btray_classify_objects_total", "btray_classify_feed_ratio", "btray_classify_rejected_total",
        "btray_classify_queue", "btray_serve_latency_seconds_bucket", "btray_classify_drift_psi",
    }  # fmt: skip


def test_the_dashboard_is_whole() -> None:
    board = json.loads((DEPLOY / "grafana" / "btray.json").read_text(encoding="utf-8"))
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken, f"{panel['title']} lies over another"
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert all(
        target["datasource"]["uid"] == "${datasource}" for panel in panels for target in panel.get("targets", [])
    )


@pytest.fixture(scope="session")
def debian_prometheus() -> None:
    """Debian's Prometheus with its promtool; without it the tests that need it are skipped and say so."""
    if not install("prometheus", "prometheus"):
        pytest.skip("PROMETHEUS ABSENT: apt-get install prometheus; that it reads rules and numbers is NOT shown here")


def promtool(*arguments: object) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_finds_rules_and_queries_valid_and_alerts_fire_when_they_should(
    debian_prometheus: None, tmp_path: Path
) -> None:
    promtool("check", "rules", DEPLOY / "prometheus" / "alerts.yaml")
    promtool("test", "rules", DEPLOY / "prometheus" / "alerts_test.yaml")
    promtool("check", "config", "--syntax-only", DEPLOY / "prometheus" / "prometheus.yml")
    rules = [{"record": f"asked:{number}", "expr": text} for number, text in enumerate(expressions())]
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": rules}]}))
    promtool("check", "rules", tmp_path / "asked.yaml")


def test_every_alert_says_what_to_do() -> None:
    guide = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
               for title in re.findall(r"^#+ (.+)$", guide, re.MULTILINE)}  # fmt: skip
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert page == "docs/operations.md"
        assert anchor == rule["alert"].lower()
        assert anchor in anchors, f"{rule['alert']} stands in no heading"


def test_every_metric_is_explained() -> None:
    guide = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(btray_\w+)`", guide))
    own = {re.sub(r"^btray_pack_", "btray_classify_", name) for name in exported()}
    assert own - {re.sub(r"_bucket$", "", name) for name in documented} - documented <= {
        name for name in own if name.endswith("_bucket") and name.removesuffix("_bucket") in documented
    }


# ---- gauges last


class Gauge:
    def __init__(self) -> None:
        self.seen: list[tuple[float, dict[str, str]]] = []

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.seen.append((value, tags))


@pytest.fixture
def gauge(monkeypatch: pytest.MonkeyPatch) -> Gauge:
    """What every metric is, of a Ray that seems to be there."""
    made = Gauge()
    monkeypatch.setattr(metrics, "_metric", lambda name: made)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(metrics, "EVERY", 0.01)
    return made


def test_a_gauge_is_set_again_and_again_with_its_last_value_until_the_run_ends(gauge: Gauge) -> None:
    with metrics.lasting():
        metrics.record({"btray_train_epoch": 1.0, "btray_train_loss": None}, run_id="r")
        metrics.record({"btray_train_epoch": 2.0}, run_id="r")
        until(lambda: len(gauge.seen) > 5)
    seen = list(gauge.seen)
    assert seen[0] == (1.0, {"run_id": "r"})
    assert all(again == (2.0, {"run_id": "r"}) for again in seen[1:] if again != seen[0])
    assert seen[-1] == (2.0, {"run_id": "r"})
    assert not [thread for thread in threading.enumerate() if thread.name == "gauges"]
    with metrics.lasting():
        time.sleep(0.05)
    assert gauge.seen == seen, "of a run that has ended nothing is said again"


# ---- what a run leaves


def values_of(lines: str) -> dict[str, float]:
    return {
        sample.name + "".join(f"{{{key}={value}}}" for key, value in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(lines)
        for sample in family.samples
    }


def test_a_run_leaves_its_numbers_whole_in_a_file(tmp_path: Path) -> None:
    target = tmp_path / "btray.prom"
    before = os.umask(0o027)  # as in deploy/systemd
    try:
        for ended in (1000.0, 2000.0):
            metrics.leave(str(target), "classify", progress.prometheus_text("classify", REPORT, ended))
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == 0o644, "node-exporter is another user"
    values = values_of(target.read_text())
    assert values["btray_classify_last_success_timestamp_seconds"] == 2000
    assert values["btray_classify_reject_ratio"] == 0.02
    assert values["btray_classify_last_rejected{code=truncated}"] == 3
    assert values["btray_classify_drift_psi{of=label}"] == 0.02
    assert values["btray_classify_drift_psi{of=confidence}"] == 0.3
    assert values["btray_classify_feed_ratio"] == 0.5
    assert values.keys() <= {key for key in values if key.split("{")[0] in metrics.METRICS}
    assert [path.name for path in tmp_path.iterdir()] == ["btray.prom"]
    assert "btray_pack_last_objects 200.0" in progress.prometheus_text("pack", REPORT, 1.0)


def test_a_run_that_found_nothing_has_succeeded_too() -> None:
    values = values_of(progress.prometheus_text("classify", run_report(), 3.0))
    assert values["btray_classify_last_success_timestamp_seconds"] == 3
    assert values["btray_classify_reject_ratio"] == 0


def test_a_pushgateway_gets_them_under_the_name_of_the_job(tmp_path: Path) -> None:
    lines = progress.prometheus_text("classify", REPORT, 5.0)
    with PathServer({"/metrics/job/btray_classify": b""}) as gateway:
        metrics.leave(gateway.url + "/", "classify", lines)
        assert values_of(gateway.put["/metrics/job/btray_classify"].decode()) == values_of(lines)
        with pytest.raises(UserError, match=r"^--metrics-to http://127.*Pushgateway\?$"):
            metrics.leave(gateway.url, "pack", lines)
    with pytest.raises(UserError, match=r"^--metrics-to .*absent/btray.prom: No such file"):
        metrics.leave(str(tmp_path / "absent" / "btray.prom"), "classify", lines)


def test_a_pushgateway_that_is_away_for_a_moment_is_asked_again_and_one_that_stays_away_fails_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "_BACKOFF", 0.01)
    with PathServer({"/metrics/job/btray_pack": b""}) as gateway:
        gateway.refusals = [503, 502, 429]
        metrics.leave(gateway.url, "pack", "x 1\n")
        assert gateway.put["/metrics/job/btray_pack"] == b"x 1\n"
        gateway.refusals = [503] * 100
        metrics.leave(gateway.url, "pack", "x 2\n")
        assert "took no numbers: 503" in caplog.text
    metrics.leave(gateway.url, "pack", "x 3\n")
    assert "does not answer" in caplog.text
    with pytest.raises(UserError, match="is not the URL"):
        metrics.leave("http://[bad", "pack", "x 4\n")


# ---- logs


_LOGGING = """
import logging, sys
from btray.core.config import JobConfig
from btray.launch import run_job
from btray.core import logs
class Config(JobConfig):
    '''A job.'''
def job(config):
    logs.bind(run_id="run-7")
    logging.getLogger("btray.some").info("read %d of %s", 3, "s3://bucket/ü")
    logging.getLogger("btray.some").warning("two\\nlines", extra={"code": "truncated"})
    try:
        raise ValueError("inner")
    except ValueError:
        logging.getLogger("btray.some").exception("it failed")
    return "uri"
sys.argv = ["jobs/audit.py", *sys.argv[1:]]
run_job(Config, job)
"""


def said(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _LOGGING, *arguments], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


@pytest.mark.parametrize("how", [{"flags": ["--log-format", "json"]}, {"BTRAY_LOG_FORMAT": "json"}], ids=str)
def test_each_line_of_a_json_log_is_one_object_with_job_and_run(how: dict[str, Any]) -> None:
    flags = how.get("flags", [])
    done = said(*flags, **{name: value for name, value in how.items() if name != "flags"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "uri\n"
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["level"] for line in lines] == ["info", "warning", "error"]
    assert {(line["job"], line["run_id"], line["logger"]) for line in lines} == {("audit", "run-7", "btray.some")}
    assert lines[0]["message"] == "read 3 of s3://bucket/ü"
    assert lines[1]["code"] == "truncated"
    assert "ValueError: inner" in lines[2]["exception"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", line["time"]) for line in lines)


def test_lines_for_people_stay_as_they_were_and_another_format_is_refused() -> None:
    assert said().stderr.splitlines()[0] == "read 3 of s3://bucket/ü"
    refused = said("--log-format", "xml")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1


# ---- a real Prometheus


@contextmanager
def prometheus(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    """A Prometheus server of this test's own; its URL."""
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}",
               f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]  # fmt: skip
    with (folder / "prometheus.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


def query(url: str, expression: str) -> list[tuple[dict[str, str], float]]:
    asked = f"{url}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(asked, timeout=5) as answer:
            result = json.load(answer)["data"]["result"]
    except OSError:  # it is just starting
        return []
    return [(series["metric"], float(series["value"][1])) for series in result]


@pytest.mark.cluster
@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_real_prometheus_reads_a_training_a_classification_and_what_it_left(
    debian_prometheus: None, tmp_path: Path
) -> None:
    data = write_tree(tmp_path / "data", {"train/glioma": 40, "train/no_tumor": 40, "val/glioma": 5, "val/no_tumor": 5})
    model = saved_bundle(tmp_path / "model")
    archive = tmp_path / "archive"
    archive.mkdir()
    for number in range(1500):
        (archive / f"{number:04d}.jpg").write_bytes(phantoms.encoded_phantom("glioma", number % 8))
    (archive / "broken.jpg").write_bytes(b"broken")
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / "alerts.yaml")]
    often = {"RAY_metrics_report_interval_ms": "1000"}
    with LoopbackCluster(cpus=2, settings=often) as cluster, PathServer({"/metrics": b""}) as node:
        of_ray, of_node = config["scrape_configs"]
        found = until(lambda: list(cluster.folder.rglob("prom_metrics_service_discovery.json")), "Ray's list of agents")
        of_ray["file_sd_configs"] = [{"files": [str(found[0])]}]
        of_node["static_configs"] = [{"targets": [f"127.0.0.1:{node.port}"]}]
        with prometheus(tmp_path, config) as url:
            run_while_scraped(
                cluster, url, "train.py",
                ["--data", data, "--out", tmp_path / "trained", "--epochs=60", "--num-workers=1", "--batch-size=4",
                 "--preprocess.size=64", "--network.widths=8,16", "--network.depths=1,1", "--network.stem-width=8",
                 "--refit-epochs=0", "--patience=0", "--name=watched"],
                ['btray_train_epoch{run_id="watched"} > 2', "btray_train_feed_ratio > 0", "btray_train_val_macro_f1"],
            )  # fmt: skip
            left = tmp_path / "btray.prom"
            run_while_scraped(
                cluster, url, "classify.py",
                ["--model", model.uri, "--input", archive, "--output", tmp_path / "results", "--metrics-to", left,
                 "--batch-size=8"],
                ["btray_classify_objects_total > 0", 'btray_classify_stage_seconds_total{stage="predict"} > 0',
                 "btray_classify_queue >= 0"],
            )  # fmt: skip
            node.files["/metrics"] = left.read_bytes()
            until(lambda: query(url, "btray_classify_last_success_timestamp_seconds"), "what the run left", 60)
            assert time.time() - query(url, "max(btray_classify_last_success_timestamp_seconds)")[0][1] < 300
            assert query(url, "btray_classify_last_objects")[0][1] == 1501
            assert query(url, 'sum(btray_classify_last_rejected{code!=""})')[0][1] == 1
            assert not query(url, '{__name__=~"ray_btray_.+"}'), "the prefix is taken off"
            with urllib.request.urlopen(f"{url}/api/v1/rules", timeout=5) as answer:
                rules = [rule for group in json.load(answer)["data"]["groups"] for rule in group["rules"]]
            assert len(rules) > 8
            assert {rule["health"] for rule in rules} <= {"ok", "unknown"}


def run_while_scraped(cluster: LoopbackCluster, url: str, script: str, flags: list[Any], wanted: list[str]) -> None:
    """Run a job on the cluster; each query has an answer at some time while it runs or shortly after."""
    job = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / script), *map(str, flags)], env=cluster.environment_of_jobs(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    missing = set(wanted)
    try:
        deadline = time.monotonic() + 300
        while missing and time.monotonic() < deadline and job.poll() is None:
            missing -= {expression for expression in missing if query(url, expression)}
            time.sleep(0.5)
        output = job.communicate(timeout=300)[0]
    finally:
        job.kill()
    assert job.returncode == 0, output[-3000:]
    # Ray's agents take numbers over every ten seconds: a short job's last ones come after its end.
    until(lambda: all(query(url, f"last_over_time({e.split(' ')[0]}[10m])") for e in missing), f"{missing}", 40)
