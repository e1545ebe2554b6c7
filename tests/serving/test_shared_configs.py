"""Replicas that start at different times answer with the same models, and start though the config has turned bad.

Without Ray; what of this takes a cluster is in test_serving.py.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest

from btray.core import cluster
from btray.core.errors import UserError
from btray.model.bundle import Bundle, load_bundle
from btray.model.classifier import Classifier
from btray.serving import deployment
from btray.serving import models as served_models
from btray.serving.config import ReplicasConfig, ServiceConfig
from btray.serving.deployment import Replica, SharedConfigs
from btray.serving.models import ConfigStore, SwitchReport
from btray.storage import StorageError
from tests.helpers.serving_helpers import TextsInMemory, bundle_at

STORE_AWAY = StorageError("unavailable", "s3://b/x")


def replica(texts: TextsInMemory) -> Replica:
    """A replica without Ray, which shares `texts` with others."""
    made = Replica("")
    made.configs.texts = texts  # type: ignore[assignment]
    return made


def served(made: Replica) -> list[str]:
    return [model.model_id for model in made.service.split().models]


@pytest.mark.parametrize(
    ("failure", "kept", "expected"),
    [
        (UserError("no such bundle"), "good", "no such bundle"),
        (RuntimeError("size mismatch"), "good", "size mismatch"),
        (UserError("no such bundle"), None, UserError),
        (RuntimeError("size mismatch"), "gone", RuntimeError),
        (STORE_AWAY, "good", UserError),
    ],
)
def test_a_starting_replica_serves_what_was_served_last_or_says_what_is_wrong_with_its_own_config(
    model: str, monkeypatch: pytest.MonkeyPatch, failure: Exception, kept: str | None, expected: str | type[Exception]
) -> None:
    def load(uri: str, *, model_id: str | None) -> Bundle:
        if uri != model:
            raise failure if uri.endswith("/bad") else UserError("what was served is gone")
        return load_bundle(uri)

    monkeypatch.setattr(served_models, "load_bundle", load)
    made = replica(TextsInMemory())
    if kept:
        made.configs.keep(ServiceConfig(model=model if kept == "good" else kept, model_id="0" * 32))
    if isinstance(expected, str):
        asyncio.run(made.reconfigure({"model": "bad", "model_id": "1" * 32}))
        assert made.service.split().config.model == model
        assert made.service.models.switch == SwitchReport(state="refused", detail=expected)
    else:
        with pytest.raises(expected, match=str(failure)):
            asyncio.run(made.reconfigure({"model": "bad", "model_id": "1" * 32}))


def test_a_config_that_no_config_is_leaves_what_was_served_last_too(model: str) -> None:
    texts = TextsInMemory()
    asyncio.run(replica(texts).reconfigure({"model": model}))
    last = replica(texts)
    asyncio.run(last.reconfigure({"modle": model}))
    assert served(last) == [Classifier.load(model).model_id]
    assert last.service.models.switch
    assert "modle" in last.service.models.switch.detail
    with pytest.raises(UserError, match="modle"):
        asyncio.run(replica(TextsInMemory()).reconfigure({"modle": model}))


@pytest.mark.parametrize("place", ["model", "canary"])
def test_a_bundle_that_is_replaced_at_its_place_is_loaded_by_no_replica_that_comes_later(
    place: str, model: str, tmp_path: Path
) -> None:
    path = bundle_at(tmp_path, "bundle", seed=5)
    config: dict[str, Any] = {"model": path} if place == "model" else {"model": model, "canary": {"model": path}}
    texts = TextsInMemory()
    first, late, last = (replica(texts) for _ in range(3))
    asyncio.run(first.reconfigure(config))
    bundle_at(tmp_path, "bundle", seed=6)
    for _ in range(2):  # Serve starts a replica again that failed
        with pytest.raises(UserError, match="not the pinned"):
            asyncio.run(late.reconfigure(config))
    other = config | {"max_batch": 3} | ({"model_id": Classifier.load(path).model_id} if place == "model" else {})
    asyncio.run(last.reconfigure(other))
    assert Classifier.load(path).model_id in served(last), "a config that was changed is read anew"
    assert served(first) != served(last)
    asyncio.run(late.reconfigure(config))
    assert served(late) == served(last), "as is one that was changed back"


def test_replicas_that_read_a_config_at_the_same_moment_take_what_one_of_them_found(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, numbers = Barrier(4), iter(range(4))

    def pin(self: ConfigStore, config: ServiceConfig) -> ServiceConfig:
        together.wait(10)
        return config.model_copy(update={"model_id": f"{next(numbers)}"})

    monkeypatch.setattr(ConfigStore, "pin", pin)
    texts, sharing = TextsInMemory(), [SharedConfigs("") for _ in range(4)]
    for one in sharing:
        one.texts = texts  # type: ignore[assignment]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: one.pin(ServiceConfig(model=model)), sharing))
    assert len({config.model_id for config in found}) == 1
    assert len(texts.texts) == 1


def test_each_deployment_begins_anew(model: str) -> None:
    ids = [deployment.application({"model": model})._bound_deployment.init_args for _ in range(2)]
    assert ids[0] != ids[1]
    assert all(len(one) == 1 and one[0] for one in ids)


@pytest.mark.parametrize(
    ("given", "cpus", "decoders"),
    [({"CPU": 1.0}, 16, 2), ({"CPU": 4.0}, 16, 4), ({"CPU": 0.5}, 16, 2), ({"CPU": 1.0, "GPU": 0.25}, 16, 4),
     ({"CPU": 1.0, "GPU": 1.0}, 16, 16), ({"CPU": 1.0, "GPU": 0.25}, 2, 2)],
)  # fmt: skip
def test_a_replica_decodes_in_as_many_threads_as_its_cpus_or_its_share_of_a_gpu_allows(
    given: dict[str, float], cpus: int, decoders: int, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(
        get_actor_id=lambda: "replica", get_assigned_resources=lambda: given, get_node_id=lambda: "here"
    )
    node = {"NodeID": "here", "Resources": {"CPU": float(cpus), "GPU": 1.0}}
    ray = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context, nodes=lambda: [node])
    monkeypatch.setattr(cluster, "ray", ray)
    monkeypatch.setattr(served_models, "own_device", lambda: "cpu")
    for config, expected in (({}, decoders), ({"decoders": 3}, 3)):
        made = replica(TextsInMemory())
        asyncio.run(made.reconfigure({"model": model, **config}))
        assert made.service.split().decoders._max_workers == expected  # type: ignore[attr-defined]


def test_replicas_take_the_cpus_and_the_share_of_a_gpu_that_they_are_told() -> None:
    def options(**arguments: Any) -> dict[str, float]:
        made = deployment.application(arguments)._bound_deployment.ray_actor_options
        return {name: made[name] for name in ("num_cpus", "num_gpus")}

    assert options() == {"num_cpus": 1, "num_gpus": 0}
    assert options(cpus=0.5, replicas_per_gpu=4) == {"num_cpus": 0.5, "num_gpus": 0}
    assert options(cpus=2, use_gpu=True) == {"num_cpus": 2, "num_gpus": 1}
    assert options(use_gpu=True, replicas_per_gpu=4) == {"num_cpus": 1, "num_gpus": 0.25}
    cores = os.cpu_count() or 1
    assert [ReplicasConfig(cpus=cpus).most for cpus in (0.5, 1, 1000)] == [2 * cores, cores, 1]
