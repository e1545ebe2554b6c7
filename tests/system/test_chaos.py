"""Whatever is killed, and however often: one row for every frame of every object, with the answer of a quiet run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from btray import phantoms, storage
from btray.bulk.config import ClassifyConfig
from tests.helpers.classify_helpers import Contents, job, keys_of, part_files, plain_rows, start, write_objects
from tests.helpers.scan_corpus import bad_scans
from tests.helpers.tiny_bundle import saved_bundle
from tools.loopback_cluster import LoopbackCluster, Node
from tools.processes import command_line, until
from tools.s3_server import S3Server

KILLS = 12
COMPARED = ("uri", "frame", "status", "error_code", "label")

pytestmark = [pytest.mark.cluster, pytest.mark.soak, pytest.mark.s3, pytest.mark.timeout(1800)]


class Chaos:
    """A classify job that is started again as often as it ends, and what is done to it meanwhile."""

    def __init__(self, cluster: LoopbackCluster, store: S3Server, config: ClassifyConfig) -> None:
        self.cluster = cluster
        self.store = store
        self.config = config
        self.node: Node = cluster.add(cpus=1)
        self.driver: BaseProcess | None = None
        self.kills: Counter[str] = Counter()

    def running(self) -> None:
        """Have a driver at work; it waits by itself for the lease of one that was killed."""
        if self.driver is None or not self.driver.is_alive():
            self.driver = start(self.config, address=self.cluster.address)

    def kill(self, victim: str) -> None:
        self.kills[victim] += 1
        getattr(self, f"_{victim}")()

    def _driver(self) -> None:
        assert self.driver is not None
        self.driver.kill()
        self.driver.join()

    def _worker(self) -> None:
        pids = [pid for node in self.cluster.nodes for pid in node.pids() if b"PartActor" in command_line(pid)]
        if pids:
            os.kill(random.Random(len(pids)).choice(pids), signal.SIGKILL)

    def _node(self) -> None:
        self.node.kill()
        self.cluster.nodes.remove(self.node)
        self.node = self.cluster.add(cpus=1)

    def _store(self) -> None:
        self.store.kill()
        time.sleep(30)
        self.store.start()


def batch_of_objects(number: int, good: int) -> Contents:
    """A fifth of them bad, of every kind there is."""
    pictures = [phantoms.encoded_phantom("glioma", seed) for seed in range(12)]
    objects = {f"{number}/{place:05d}.jpg": pictures[place % len(pictures)] for place in range(good)}
    wrong = [data for data, _ in bad_scans().values()]
    return objects | {f"{number}/{place:05d} bad": wrong[place % len(wrong)] for place in range(good // 4)}


def compared(rows: pa.Table) -> list[tuple[Any, ...]]:
    return sorted(zip(*(rows[name].to_pylist() for name in COMPARED), strict=True), key=repr)


def test_a_dozen_kills_and_a_lost_store_lose_nothing_repeat_nothing_and_change_no_answer(
    s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    model = str(tmp_path / "model")
    saved_bundle(model)
    scans, output = f"{bucket}/scans", f"{bucket}/out"
    expected = batch_of_objects(0, 1200)
    write_objects(scans, expected)
    chance = random.Random(11)
    victims = ["store", *(chance.choice(["driver", "worker", "node"]) for _ in range(KILLS - 1))]
    chance.shuffle(victims)
    with LoopbackCluster(cpus=1, settings=s3.environment) as cluster:
        chaos = Chaos(cluster, s3, job(model, scans, output, batch_size=8, actors=2))
        for number, victim in enumerate(victims, start=1):
            chaos.running()
            parts = len(part_files(output))
            until(lambda: len(part_files(output)) > parts or not chaos.driver.is_alive(), "a part", 240)  # noqa: B023
            time.sleep(2 * chance.random())
            chaos.kill(victim)
            seen = Counter(keys_of(plain_rows(output)))
            assert max(seen.values(), default=1) == 1, f"after {dict(chaos.kills)}"
            if not chaos.driver.is_alive() and victim != "driver":  # it was done: the archive grows
                more = batch_of_objects(number, 400)
                write_objects(scans, more)
                expected |= more
        chaos.running()
        chaos.driver.join(600)
        assert chaos.driver.exitcode == 0
        chaos.running()  # nothing is left to do
        chaos.driver.join(300)
        assert chaos.driver.exitcode == 0
        quiet = start(job(model, scans, f"{bucket}/quiet"), address=cluster.address)
        quiet.join(600)
        assert quiet.exitcode == 0
    rows = plain_rows(output)
    assert set(keys_of(rows)) == {(storage.join(scans, name), 0) for name in expected}
    assert len(rows) == len(expected)
    assert compared(rows) == compared(plain_rows(f"{bucket}/quiet"))
    assert chaos.kills.total() == KILLS
