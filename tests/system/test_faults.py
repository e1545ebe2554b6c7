"""Nodes that die while jobs run on them, spot instances that are reclaimed, and a head that restarts."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from btray import phantoms
from btray.model.bundle import load_bundle
from btray.results import current
from btray.training.config import TrainConfig
from btray.training.plan import run_folder
from tests.conftest import ROOT
from tests.helpers.classify_helpers import part_files
from tests.helpers.tiny_bundle import saved_bundle
from tests.helpers.training_helpers import history_of, latest_report, write_tree
from tests.system.test_cluster_jobs import many_times, small, workers_of
from tools.loopback_cluster import LoopbackCluster, Node
from tools.processes import command_line, until

pytestmark = [pytest.mark.cluster, pytest.mark.soak, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    tree = {"train/glioma": 30, "train/no_tumor": 30, "val/glioma": 5, "val/no_tumor": 5}
    return write_tree(tmp_path_factory.mktemp("pictures"), tree)


@contextmanager
def job(cluster: LoopbackCluster, script: str, *flags: object, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a job of this checkout on the cluster."""
    command = [sys.executable, str(ROOT / "jobs" / script), *map(str, flags)]
    environment = cluster.environment_of_jobs() | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def ended(process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    try:
        assert process.wait(seconds) == 0, log.read_text()[-4000:]
    except subprocess.TimeoutExpired:
        raise AssertionError(f"still at work after {seconds} s: {log.read_text()[-4000:]}") from None


def registered(config: TrainConfig) -> dict[str, Any]:
    return latest_report(Path(run_folder(config)))


def epochs_registered(config: TrainConfig) -> int:
    return int(registered(config).get("epoch", 0))


def workers_on(node: Node) -> set[int]:
    alone = LoopbackCluster.__new__(LoopbackCluster)
    alone.nodes = [node]
    return set(workers_of(alone))


def test_training_goes_on_with_the_workers_that_are_left_when_a_node_dies(pictures: str, tmp_path: Path) -> None:
    config = TrainConfig(data=pictures, out=str(tmp_path / "model"))
    log = tmp_path / "log"
    flags = ["--data", pictures, "--out", config.out, *small(epochs=40, num_workers="1:2", patience=0)]
    with LoopbackCluster(cpus=1) as cluster:
        other = cluster.add(cpus=1)
        with job(cluster, "train.py", *flags, log=log) as process:
            until(lambda: epochs_registered(config) >= 3 or process.poll() is not None, "three epochs", 300)
            assert process.poll() is None, log.read_text()[-4000:]
            assert workers_on(other), "one of the two workers trains on the node"
            known = epochs_registered(config)
            seen = history_of(config)
            other.kill()
            ended(process, log, 400)
    history = history_of(config)
    assert [record.epoch for record in history] == list(range(1, 41))
    assert history[:known] == seen[:known]
    load_bundle(config.out).network()


def test_a_spot_notice_is_answered_by_a_checkpoint_within_the_epoch_from_which_another_node_goes_on(
    pictures: str, tmp_path: Path
) -> None:
    config = TrainConfig(data=pictures, out=str(tmp_path / "model"))
    log = tmp_path / "log"
    copies = 80
    data = many_times(pictures, copies, tmp_path / "many")
    slow = {"batch_size": 2, "preprocess__size": 96, "network__depths": "2,2"}
    flags = ["--data", data, "--out", config.out, *small(epochs=1, **slow)]
    with LoopbackCluster(cpus=0) as cluster:
        first = cluster.add(cpus=1)
        with job(cluster, "train.py", *flags, log=log) as process:
            until(lambda: workers_on(first) or process.poll() is not None, "training to begin", 300)
            until(lambda: Path(run_folder(config), "run.json").exists(), "the run to be claimed")
            time.sleep(10)
            assert process.poll() is None, log.read_text()[-4000:]
            noticed = time.monotonic()
            drained = cluster.ray(
                "drain-node", "--address", cluster.address, "--node-id", cluster.node_ids()[-1],
                "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice",
                "--deadline-remaining-seconds", "60",
            )  # fmt: skip
            assert drained.returncode == 0, drained.stderr
            saved = until(lambda: registered(config), "a checkpoint that counts", 60)
            took = time.monotonic() - noticed
            assert took < 40, f"the checkpoint came after {took:.0f} s"
            assert saved["step"] > 0
            first.kill()
            cluster.add(cpus=1)
            ended(process, log, 600)
    (record,) = history_of(config)
    assert record.epoch == 1
    whole = 60 * copies
    assert record.images == whole - 2 * saved["step"], "work done before the node was lost is not repeated"
    load_bundle(config.out).network()


def has(actor: bytes, node: Node) -> bool:
    return any(actor in command_line(pid) for pid in node.pids())


# With two stages the frames that the node has decoded, and nobody has classified yet, are lost with it.
@pytest.mark.parametrize(("pipeline", "actor"), [("one", b"PartActor"), ("two", b"ReadActor")])
def test_a_node_with_actors_dies_and_every_frame_is_there_once(tmp_path: Path, pipeline: str, actor: bytes) -> None:
    model = saved_bundle(tmp_path / "model")
    archive = tmp_path / "archive"
    archive.mkdir()
    pictures = [phantoms.encoded_phantom("glioma", seed) for seed in range(8)]
    for number in range(6000):
        (archive / f"{number:05d}.jpg").write_bytes(pictures[number % len(pictures)])
    output, log = str(tmp_path / "results"), tmp_path / "log"
    flags = ["--model", model.uri, "--input", archive, "--output", output, "--batch-size=8", "--pipeline", pipeline]
    left = 2 if pipeline == "two" else 1
    # Of two stages the one actor that reads is on the node that is added: the head has no CPU to give.
    with LoopbackCluster(cpus=2 - left) as cluster:
        other = cluster.add(cpus=1)
        with job(cluster, "classify.py", *flags, log=log) as process:
            until(lambda: (has(actor, other) and part_files(output)) or process.poll() is not None, "a part", 300)
            assert process.poll() is None, "the job ended before a node could be killed"
            other.kill()
            if left == 2:
                cluster.add(cpus=1)
            ended(process, log, 400)
        until(lambda: cluster.alive() == left, "the node to count as dead", 120)
    rows = current(output, columns=["uri", "status"])
    assert rows.num_rows == 6000
    assert len(set(rows["uri"].to_pylist())) == 6000
    assert set(rows["status"].to_pylist()) == {"ok"}


_COUNTER = """
import ray, sys

@ray.remote(num_cpus=1, lifetime="detached", name="counter", namespace="test", max_restarts=0)
class Counter:
    def __init__(self):
        self.value = 0
    def add(self):
        self.value += 1
        return self.value

ray.init(namespace="test", log_to_driver=False)
counter = ray.get_actor("counter") if sys.argv[1] == "find" else Counter.remote()
print("value", ray.get(counter.add.remote(), timeout=60))
"""


def test_a_head_that_comes_back_with_its_stored_state_finds_its_nodes_and_actors_again(tmp_path: Path) -> None:
    """Uses Ray's embedded store; Redis works the same, but may run on another machine."""
    settings = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(tmp_path / "gcs"),
                "RAY_gcs_rpc_server_reconnect_timeout_s": "120"}  # fmt: skip
    (tmp_path / "gcs").mkdir()
    with LoopbackCluster(cpus=0, settings=settings) as cluster:
        cluster.add(cpus=1)

        def count(how: str) -> str:
            done = subprocess.run([sys.executable, "-c", _COUNTER, how], env=cluster.environment_of_jobs(),
                                  capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout.split("value ")[-1].strip()

        assert count("make") == "1"
        cluster.nodes[0].kill()
        cluster.start_head()
        until(lambda: cluster.alive() == 2, "the node to be back", 120)
        assert count("find") == "2", "the same actor, with its state"
