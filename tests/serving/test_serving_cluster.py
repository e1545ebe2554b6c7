"""`serve deploy` on a cluster of two nodes: HAProxy before replicas of both, closed to others, and a node may go."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from btray.model.classifier import Classifier
from tests.helpers.serving_helpers import problem, scan
from tests.helpers.serving_load import Served, under_load
from tools.loopback_cluster import LoopbackCluster
from tools.processes import listened_on, named, until
from tools.serving_cluster import replica_nodes, serving_cluster

pytestmark = [pytest.mark.soak, pytest.mark.cluster]


@pytest.fixture(scope="module")
def deployed(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, LoopbackCluster]]:
    with serving_cluster(model, tmp_path_factory.mktemp("cluster")) as (url, cluster):
        yield Served(url, model), cluster


def test_haproxy_stands_before_the_replicas_of_both_nodes_and_only_this_machine_reaches_anything(
    deployed: tuple[Served, LoopbackCluster],
) -> None:
    served, cluster = deployed
    assert sorted(replica_nodes(cluster)) == sorted(cluster.node_ids())
    assert served.classify(scan()).json()["model_id"] == Classifier.load(served.model).model_id
    problem(served.classify(b"x"), 400, "not_an_image")
    (haproxy,) = {pid for node in cluster.nodes for pid in named(b"haproxy.cfg", node.process.pid)}
    listens = listened_on([haproxy])
    assert ("127.0.0.1", int(served.url.rpartition(":")[2])) in listens
    assert len(listens) == 3, "the service, and what Ray asks for metrics and statistics"
    replicas = [pid for node in cluster.nodes for pid in named(b"ServeReplica:btray", node.process.pid)]
    ingress = {one for one in listened_on(replicas) if 30_000 <= one[1] < 31_000}
    assert len(ingress) == 2
    assert {address for address, _ in listens | ingress} == {"127.0.0.1"}
    folder = Path(cluster.environment["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (socket,) = folder.rglob("admin.sock")
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    hidden = {"X-Forwarded-For": "203.0.113.9"}
    assert served.session.get(served.url + "/v1/models", headers=hidden, timeout=30).status_code == 200


def test_a_node_that_dies_under_load_costs_no_request(deployed: tuple[Served, LoopbackCluster]) -> None:
    served, cluster = deployed
    with under_load(served) as load:
        cluster.nodes[-1].kill()
        until(lambda: len(replica_nodes(cluster)) == 1)
    assert load.lost == 0
