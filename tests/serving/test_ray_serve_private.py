"""Every private name of Ray Serve that btray relies on is where it was; an upgrade that moves one fails here."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
from ray.experimental import internal_kv
from ray.serve._private import client, constants, controller
from ray.serve.schema import ServeDeploySchema

from btray.serving import ray_serve_private
from btray.serving.gate import proxy_middlewares


def test_serve_reads_every_variable_that_is_set() -> None:
    source = inspect.getsource(constants)
    environment = ray_serve_private.serve_environment()
    module, _, name = environment["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].partition(":")
    assert getattr(importlib.import_module(module), name) is proxy_middlewares
    environment |= ray_serve_private.haproxy_environment(Path("/folder"), Path("/folder/haproxy"), lambda: 1)
    for name in environment:
        assert f'"{name}"' in source, name


def test_the_client_of_serve_deploys_a_config_and_knows_where_proxies_listen() -> None:
    (config, *others) = list(inspect.signature(client.ServeControllerClient.deploy_apps).parameters.values())[1:]
    assert "ServeDeploySchema" in str(config.annotation)
    assert all(other.default is not inspect.Parameter.empty for other in others)
    assert isinstance(client.ServeControllerClient.http_config, property)
    assert ServeDeploySchema.model_fields["applications"].is_required()


def test_behind_haproxy_its_host_is_known_and_without_it_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(constants.RAY_SERVE_ENABLE_HA_PROXY, bool)
    assert "RAY_SERVE_ENABLE_HA_PROXY" in inspect.getsource(controller)
    monkeypatch.setattr(ray_serve_private, "RAY_SERVE_ENABLE_HA_PROXY", False)
    assert ray_serve_private.haproxy_host() is None


def test_the_store_of_the_cluster_is_called_as_it_takes_it() -> None:
    for name in ("get", "list", "put"):
        parameters = inspect.signature(getattr(internal_kv, f"_internal_kv_{name}")).parameters
        assert "namespace" in parameters
    assert "overwrite" in parameters
