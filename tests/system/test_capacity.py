"""The capacity model adds up, names the limiting factor, and returns the fewest nodes that suffice."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks.capacity import Cluster, Rates, nodes_for, predict, rates_of

RATES = Rates(read=0.0001, decode=0.0012, predict=0.0033, write=0.0002, bytes=30e3, start=20.0, gflop=0.2)


def test_stages_of_an_actor_add_up_and_so_do_actors() -> None:
    one = predict(RATES, Cluster(nodes=1, cores=1, efficiency=0.5))
    assert one.rate == pytest.approx(1 / 0.0048)
    assert predict(RATES, Cluster(nodes=2, cores=3, efficiency=1.0)).rate == pytest.approx(6 / 0.0048)
    assert one.limit == "cores"
    assert one.hours(1e6, RATES) == pytest.approx((20 + 1e6 * 0.0048) / 3600)


def test_only_cores_that_share_a_node_are_in_each_others_way() -> None:
    alone = predict(RATES, Cluster(nodes=1, cores=1)).rate
    assert predict(RATES, Cluster(nodes=3, cores=1)).rate == pytest.approx(3 * alone)
    assert predict(RATES, Cluster(nodes=1, cores=2, efficiency=0.9)).rate == pytest.approx(1.8 * alone)


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({"network": 1e6}, "network of the nodes"),
        ({"store": 1e6}, "object store, bytes"),
        ({"store_requests": 10.0}, "object store, requests"),
        ({"gpus": 1, "tflops": 0.01}, "GPUs"),
        ({"gpus": 1, "tflops": 100.0, "cores": 2}, "cores that decode for them"),
    ],
)
def test_what_limits_is_named(change: dict[str, float], limit: str) -> None:
    found = predict(RATES, replace(Cluster(nodes=2, cores=16), **change))  # type: ignore[arg-type]
    assert found.limit == limit
    assert found.rate == min(found.ceilings.values())


@given(
    scans=st.floats(1e3, 1e9),
    hours=st.floats(0.1, 100),
    cores=st.integers(1, 128),
    gpus=st.integers(0, 4),
)
def test_so_many_nodes_do_it_in_time_and_one_fewer_does_not(scans: float, hours: float, cores: int, gpus: int) -> None:
    one = Cluster(nodes=1, cores=cores, gpus=gpus, tflops=5.0)
    nodes = nodes_for(RATES, one, scans, hours)
    if nodes is None:
        assert scans / (hours * 3600 - RATES.start) > min(one.store / RATES.bytes, one.store_requests)
        return
    assume(nodes < 1e7)
    assert predict(RATES, replace(one, nodes=nodes)).hours(scans, RATES) <= hours * (1 + 1e-6)
    if nodes > 1:
        open_store = replace(one, nodes=nodes - 1, store=math.inf, store_requests=math.inf)
        assert predict(RATES, open_store).hours(scans, RATES) > hours * (1 - 1e-6)


def test_rates_come_from_what_a_run_reports() -> None:
    report = {
        "objects": 1000, "taken_from_earlier_attempt": 200, "bytes": 30_000_000, "seconds_to_first_part": 12.0,
        "seconds_by_stage": {"read": 0.8, "decode": 1.6, "predict": 4.0, "write": 0.4},
    }  # fmt: skip
    found = rates_of(report, gflop=0.2)
    assert (found.read, found.decode, found.predict, found.write) == pytest.approx((0.001, 0.002, 0.005, 0.0005))
    assert (found.bytes, found.start) == (30_000, 12.0)
