"""Deployment files are valid for the tools that read them, as strict as documented, and name only what exists."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
import urllib.parse
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from btray.bulk.config import ClassifyConfig
from btray.core.config import ENV_PREFIX, JobConfig
from btray.serving.config import ServeConfig
from tests.conftest import ROOT
from tests.helpers.deploy_helpers import DEPLOY, cluster_of, rendered
from tests.helpers.http_files import PathServer
from tools.processes import until

EXTRAS = ("tune",)
"""Extras of btray that the jobs on a cluster need."""


# ---- ray up


@pytest.fixture(params=["cluster.yaml", "deploy/cluster-onprem.yaml"])
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / request.param).read_text(encoding="utf-8"))
    return loaded


def test_ray_itself_finds_the_cluster_files_valid(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(cluster))
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**cluster, "idle_timeout": 3}))


def test_a_cluster_asks_for_its_token_and_its_dashboard_answers_on_loopback_alone(cluster: dict[str, Any]) -> None:
    head, workers = (" ".join(cluster[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    assert "RAY_AUTH_MODE=token" in head
    assert "RAY_AUTH_MODE=token" in workers
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in json.dumps(cluster)
    assert "RAY_JOB_STOP_WAIT_TIME_S=60" in head
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    for source in cluster["file_mounts"].values():
        assert source.startswith("~") or (ROOT / source).exists(), source


def test_on_aws_workers_come_and_go_and_gpus_are_spot() -> None:
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    kinds = cluster["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert all(kinds[kind]["min_workers"] == 0 for kind in kinds)
    assert sum(kinds[kind]["max_workers"] for kind in kinds) == cluster["max_workers"]
    assert kinds["gpu_worker"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert cluster["idle_timeout_minutes"] <= 10
    profiles = {kind: kinds[kind]["node_config"]["IamInstanceProfile"]["Arn"] for kind in kinds}
    assert profiles["cpu_worker"] == profiles["gpu_worker"] != profiles["head"]
    assert all(kinds[kind]["node_config"]["MetadataOptions"]["HttpTokens"] == "required" for kind in kinds)


def test_on_aws_ray_makes_no_security_group_and_chooses_no_image() -> None:
    """Ray opens SSH to the world in any group that it fills, whatever the file says; its default image is of 2018."""
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    kinds = cluster["available_node_types"]
    assert all(kind["node_config"]["SecurityGroupIds"] for kind in kinds.values())
    assert "security_group" not in cluster["provider"]
    assert all(kind["node_config"]["ImageId"].startswith("ami-") for kind in kinds.values())
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    assert all("CHANGE" in line for line in text.splitlines() if re.search(r"^\s+(ImageId|SecurityGroupIds):", line))
    source = importlib.util.find_spec("ray.autoscaler._private.aws.config")
    assert source is not None
    assert source.origin is not None
    assert "0.0.0.0/0" in Path(source.origin).read_text(), "Ray no longer opens SSH to all: update cluster.yaml"


def test_the_head_may_do_what_workers_may_since_drivers_run_there() -> None:
    head, worker = (json.loads((DEPLOY / "aws" / f"{kind}-policy.json").read_text())["Statement"]
                    for kind in ("head", "worker"))  # fmt: skip
    assert [statement for statement in worker if statement not in head] == []


@pytest.mark.parametrize("name", sorted(path.stem for path in (DEPLOY / "aws").glob("*-policy.json")))
def test_a_role_may_do_what_it_needs_and_no_more(name: str) -> None:
    policy = json.loads((DEPLOY / "aws" / f"{name}.json").read_text(encoding="utf-8"))
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        for action in statement["Action"]:
            assert "*" not in action
            harmless = action.split(":")[1].startswith("Describe") or action == "ecr:GetAuthorizationToken"
            limited = "*" not in statement["Resource"] or "Condition" in statement
            assert harmless or limited, f"{action} on all resources"
            assert not action.startswith("s3:") or all("EXAMPLE-BUCKET" in where for where in statement["Resource"])
            on_instances = any(where.endswith(":instance/*") for where in statement["Resource"])
            assert not on_instances or re.search("ray-cluster-name|CreateAction", json.dumps(statement["Condition"]))
    text = json.dumps(policy)
    assert ("ec2:RunInstances" in text) == (name == "head-policy")
    assert ("s3:DeleteBucket" in text) is False


def test_each_job_has_a_role_of_its_own_and_none_may_promote_what_it_trained() -> None:
    written = {"classify": {"results"}, "train": {"runs"}, "promote": {"models"}}
    for name in ("serve", "head", "worker", *written):
        folders = written.get(name, set())
        policy = json.loads((DEPLOY / "aws" / f"{name}-policy.json").read_text(encoding="utf-8"))
        changing = [one for one in policy["Statement"] if {"s3:PutObject", "s3:DeleteObject"} & set(one["Action"])]
        assert {where.split("/")[1] for one in changing for where in one["Resource"]} == folders
    promote = (DEPLOY / "aws" / "promote-policy.json").read_text(encoding="utf-8")
    assert "s3:DeleteObject" not in promote, "models and their history stay"


def test_a_spot_notice_drains_the_node_in_the_time_that_is_left(tmp_path: Path) -> None:
    taken = (datetime.now(UTC) + timedelta(seconds=120)).strftime("%Y-%m-%dT%H:%M:%SZ")
    called = tmp_path / "called"
    fake = tmp_path / "ray"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {called}\n')
    fake.chmod(0o755)
    with PathServer({"/latest/api/token": b"t"}) as server:
        command = [sys.executable, str(DEPLOY / "aws" / "spot_notice.py"), "--address", "h:6379"]
        command += ["--metadata", server.url, "--every", "0.05"]
        watcher = subprocess.Popen(
            command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, stdout=subprocess.PIPE, text=True
        )
        try:
            until(lambda: server.count("/latest/meta-data/spot/instance-action") >= 2)
            assert not called.exists(), "no notice, no drain"
            server.files["/latest/meta-data/spot/instance-action"] = json.dumps(
                {"action": "terminate", "time": taken}
            ).encode()
            assert watcher.wait(20) == 0
        finally:
            watcher.kill()
            watcher.communicate()
    words = called.read_text().split("\n")
    assert words[:5] == ["drain-node", "--address", "h:6379", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    assert 90 <= int(words[words.index("--deadline-remaining-seconds") + 1]) <= 110


# ---- image, runtime environment, systemd


def test_the_image_copies_what_is_there_and_runs_as_nobody_in_particular() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines(), source
    (user,) = re.findall(r"^USER (.*)$", text, re.MULTILINE)
    assert int(user) > 0
    assert f"useradd --uid {user} " in text
    assert f"'.[{','.join(EXTRAS)}]'" in text
    arguments = set(re.findall(r"^ARG (\w+)", text, re.MULTILINE))
    assert arguments == {"BASE", "TORCH_INDEX", "GPUS"}
    assert all(re.search(rf"\$\{{{name}[:}}]", text) for name in arguments)
    assert "NVIDIA_VISIBLE_DEVICES=${GPUS:-all}" in text, "the CUDA image's containers see the GPUs"
    ray = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert ray
    versions = {cluster["rayVersion"] for cluster in map(cluster_of, rendered()) if cluster}
    assert versions == {ray[1]}, "the image's Ray and rayVersion must be the same"


def test_the_runtime_environment_is_one_and_names_every_package_with_its_pin() -> None:
    from ray.runtime_env import RuntimeEnv

    text = (ROOT / "runtime-env.yaml").read_text(encoding="utf-8")
    RuntimeEnv(**yaml.safe_load(text))
    full = yaml.safe_load(re.sub(r"^# (pip:|  - )", r"\1", text, flags=re.MULTILINE))
    RuntimeEnv(**full)
    pins = (ROOT / "constraints.txt").read_text().lower().splitlines()
    assert [entry for entry in full["pip"] if entry.lower() not in pins] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(name for extra in EXTRAS for name in extras[extra])]
    wanted = {re.split(r"[\[><=]", name)[0].lower() for name in wanted} - {"ray"}
    assert wanted <= {entry.split("==")[0].lower() for entry in full["pip"]}
    assert int(full["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30


@pytest.mark.parametrize(("name", "kind"), [("classify", ClassifyConfig), ("serve", ServeConfig)])
def test_the_settings_of_a_unit_are_those_of_its_job(
    name: str, kind: type[JobConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in (DEPLOY / "systemd" / f"{name}.env").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            variable, _, value = line.partition("=")
            assert variable.startswith(ENV_PREFIX)
            monkeypatch.setenv(variable, value)
    config = kind.from_command_line([], f"{name}.py")
    assert config.log_format == "json"
    unit = (DEPLOY / "systemd" / f"btray-{name}.service").read_text(encoding="utf-8")
    assert f"EnvironmentFile=/etc/btray/{name}.env" in unit
    assert f"jobs/{name}.py" in unit


def test_systemd_finds_the_units_valid(tmp_path: Path) -> None:
    try:
        subprocess.run(["systemd-analyze", "--version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("systemd-analyze ABSENT: the units are NOT checked here")
    for name in ("btray-classify.service", "btray-classify.timer", "btray-serve.service"):
        text = (DEPLOY / "systemd" / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace("/opt/btray/.venv/bin/python", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, tmp_path.iterdir())],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "btray" in line]
    assert (done.returncode, said) == (0, [])


def test_a_wheelhouse_installs_production_without_an_index_and_without_tools_of_development(tmp_path: Path) -> None:
    """`make -n` shows the commands; that they work takes gigabytes, and was run by hand (docs/operations.md)."""
    shown = subprocess.run(["make", "-n", "wheelhouse", f"WHEELHOUSE={tmp_path}"], cwd=ROOT, capture_output=True,
                           text=True, check=True).stdout  # fmt: skip
    assert "-c constraints.txt" in shown
    assert f"'.[{','.join(EXTRAS)}]'" in shown
    assert "dev" not in re.sub("--disable|device|/dev/null", "", shown)
    image = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert "[dev]" not in image
    assert "--no-index --find-links" in (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def test_no_address_of_a_registry_and_no_password_stands_in_what_deploys() -> None:
    for path in [*DEPLOY.rglob("*"), ROOT / "cluster.yaml", ROOT / "runtime-env.yaml"]:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not re.search(
                r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|(?i:password)\s*[:=]\s*['\"]?\w+\d", text
            ), path
            hosts = {urllib.parse.urlsplit(url).hostname for url in re.findall(r"https?://[^\s\"'`)>]+", text)}
            local = {
                "localhost",
                "127.0.0.1",
                "169.254.169.254",
                "pushgateway.btray-monitoring",
                "head",
                "s3.example",
                None,
            }
            assert hosts <= local, (path, hosts)
