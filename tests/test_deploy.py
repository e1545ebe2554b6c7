"""What deploys btray is valid by the judges that will judge it, as strict as it says, and names only what is there."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
import urllib.parse
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError

from btray.config import ENV_PREFIX
from btray.settings import TrainConfig
from btray.settings_bulk import ClassifyConfig
from btray.settings_serve import ServiceConfig
from tests.conftest import ROOT
from tests.kuberay_schema import KINDS, ClusterSpec, RayCluster
from tests.path_server import PathServer

DEPLOY = ROOT / "deploy"
KUBERNETES = "1.34"
EXTRAS = ("serve", "tune")
"""Of btray, which the jobs and the endpoint on a cluster need."""
OF_RAY = sorted((DEPLOY / "kuberay").glob("*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    """All of a file's resources, and those that its ConfigMaps hold as text."""
    found = [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]
    inner = [yaml.safe_load(text) for document in found if document["kind"] == "ConfigMap"
             for name, text in document["data"].items() if name.endswith(".yaml")]  # fmt: skip
    return found + inner


def resources() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in OF_RAY:
        for document in documents(path):
            yield path.name, document


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template, wherever it stands."""

    def within(value: Any) -> Iterator[dict[str, Any]]:
        if isinstance(value, dict):
            if "template" in value and "spec" in value["template"]:
                yield value["template"]
            for inner in value.values():
                yield from within(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from within(inner)

    for name, document in resources():
        for template in within(document):
            yield name, template


# ---- Kubernetes


def test_resources_of_kuberay_have_only_fields_that_it_knows() -> None:
    seen = set()
    for name, document in resources():
        if document["apiVersion"] == "ray.io/v1":
            seen.add(document["kind"])
            try:
                KINDS[document["kind"]].model_validate(document)
            except ValidationError as error:
                raise AssertionError(f"{name}: {error}") from error
    assert seen == {"RayCluster", "RayJob", "RayCronJob", "RayService"}


@pytest.mark.parametrize(
    "change",
    [
        {"workerGroupSpec": []},
        {"authOptions": {"mode": "none"}},
        {"rayVersion": 2.6},
        {"autoscalerOptions": {"idleTimeoutSeconds": "5", "upscalingMode": "Default", "resources": {}}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_misspelt_or_mistyped_field_is_found(change: dict[str, Any]) -> None:
    (document,) = documents(DEPLOY / "kuberay" / "raycluster.yaml")
    RayCluster.model_validate(document)
    with pytest.raises(ValidationError):
        ClusterSpec.model_validate({**document["spec"], **change})


def test_kubernetes_own_resources_and_every_pod_template_are_valid_and_strictly_so() -> None:
    own = [(name, document) for name, document in resources()
           if document["apiVersion"].split("/")[0] not in ("ray.io", "monitoring.coreos.com")]  # fmt: skip
    templates = [(name, {"apiVersion": "v1", "kind": "Pod", "metadata": {**template["metadata"], "name": "x"},
                         "spec": template["spec"]}) for name, template in pods()]  # fmt: skip
    assert {document["kind"] for _, document in own} >= {
        "CronJob", "ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "Role", "RoleBinding", "ServiceAccount",
    }  # fmt: skip
    assert len(templates) > 8
    for name, document in own + templates:
        try:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            raise AssertionError(f"{name} {document['kind']} {error.path}: {error.message}") from error
    broken = {**templates[0][1], "spec": {**templates[0][1]["spec"], "terminationGracePeriod": 3}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


def test_every_pod_is_limited_unprivileged_and_probed_and_holds_no_secret() -> None:
    for name, template in pods():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"].keys() == {"requests", "limits"}, name
            assert ":" in container["image"], f"{name}: {container['image']} has no tag"
            assert not container["image"].endswith(":latest")
            assert "command" in container or {"readinessProbe", "livenessProbe"} <= container.keys(), name
            for variable in container.get("env", []):
                assert "valueFrom" in variable or not re.search("KEY|TOKEN|SECRET|PASSWORD", variable["name"]), name
    assert not [document for _, document in resources() if document["kind"] == "Secret"]


def test_the_nightly_run_never_overlaps_and_is_the_same_in_both_variants() -> None:
    cron, job = (
        next(
            document for document in documents(DEPLOY / "kuberay" / "nightly-classify.yaml") if document["kind"] == kind
        )
        for kind in ("CronJob", "RayJob")
    )
    (variant,) = documents(DEPLOY / "kuberay" / "raycronjob-classify.yaml")
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert variant["spec"] == {"schedule": cron["spec"]["schedule"], "jobTemplate": job["spec"]}
    assert cron["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"] > job["spec"]["activeDeadlineSeconds"]


NIGHTS = {
    "done": (["Complete SUCCEEDED"], "", 0, 1),
    "the API server is away for a moment": (["error", " ", "Running RUNNING", "Complete SUCCEEDED"], "", 0, 1),
    "deleted": ([""], "", 1, 1),
    "failed, and again, and again": (["Running RUNNING", "Failed FAILED"], "failed with exit code 1", 1, 3),
    "wrong use": (["Complete FAILED"], "Job entrypoint command failed with exit code 2, last logs: ...", 1, 1),
    "a crossed threshold": (["Failed FAILED"], "Job entrypoint command failed with exit code 3", 1, 1),
    "some other code": (["Failed FAILED"], "Job entrypoint command failed with exit code 25", 1, 3),
}


@pytest.mark.parametrize(("states", "message", "code", "made"), NIGHTS.values(), ids=NIGHTS)
def test_who_waits_for_the_nightly_run_knows_how_it_ended_and_whether_to_try_again(
    tmp_path: Path, states: list[str], message: str, code: int, made: int
) -> None:
    """The script of the CronJob, with a kubectl that answers one state after the other, and again for each RayJob."""
    (cron,) = [one for one in documents(DEPLOY / "kuberay" / "nightly-classify.yaml") if one["kind"] == "CronJob"]
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    (script,) = [word.replace("/rayjob/", f"{tmp_path}/") for word in container["command"] if "\n" in word]
    (tmp_path / "rayjob.yaml").write_text(
        next(one for one in yaml.safe_load_all((DEPLOY / "kuberay" / "nightly-classify.yaml").read_text())
             if one["kind"] == "ConfigMap")["data"]["rayjob.yaml"]
    )  # fmt: skip
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    (tmp_path / "kubectl").write_text(f"""#!/bin/sh
        cd {tmp_path}
        case "$*" in
          create*) cat > given; cp states left; echo made >> made; echo rayjob.ray.io/btray-nightly-x ;;
          *status.message*) printf %s {shlex.quote(message)} ;;
          *) state=$(head -n 1 left); sed -i 1d left; [ "$state" != error ] || exit 1; printf %s "$state" ;;
        esac
    """)
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for name in ("kubectl", "sleep"):
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "JOB_NAME": "btray-nightly-1", "JOB_UID": "4-5-6"}
    assert environment.keys() == {"PATH", *(variable["name"] for variable in container["env"])}
    done = subprocess.run(
        [*container["command"][:-1], script], env=environment, capture_output=True, text=True, check=False, timeout=20
    )
    assert (done.returncode, done.stderr) == (code, "")
    assert len((tmp_path / "made").read_text().split()) == made
    (owner,) = yaml.safe_load((tmp_path / "given").read_text())["metadata"]["ownerReferences"]
    assert (owner["name"], owner["uid"]) == ("btray-nightly-1", "4-5-6"), "it goes with its Job, by the history limits"


def test_a_pod_of_the_endpoint_is_ready_once_serve_answers_there() -> None:
    (service,) = [document for _, document in resources() if document["kind"] == "RayService"]
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        assert container["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}
        assert container["readinessProbe"]["failureThreshold"] == 1, "KubeRay's own, for pods that take requests"
        assert container["livenessProbe"]["httpGet"]["port"] != 8000, "a pod without a replica is well"


def test_no_two_clusters_have_one_name() -> None:
    """KubeRay names the services of a RayCluster and of a RayService alike, and would give one's to the other."""
    names = [document["metadata"].get("name") for _, document in resources()
             if document["kind"] in ("RayCluster", "RayService", "RayJob", "RayCronJob")]  # fmt: skip
    assert len(set(names)) == len(names)


def test_a_disruption_budget_asks_nothing_that_a_ray_cluster_cannot_say() -> None:
    """Without a scale subresource Kubernetes takes `minAvailable`, as a number, and refuses all evictions otherwise."""
    budgets = [document for _, document in resources() if document["kind"] == "PodDisruptionBudget"]
    assert budgets
    for budget in budgets:
        assert budget["spec"].keys() == {"minAvailable", "selector"}
        assert isinstance(budget["spec"]["minAvailable"], int)


def test_what_alerts_call_ray_is_what_both_ways_of_scraping_call_it() -> None:
    asked = set(re.findall(r'job="(\w+)"', (DEPLOY / "prometheus" / "alerts.yaml").read_text()))
    (monitor,) = documents(DEPLOY / "kuberay" / "pod-monitor.yaml")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    named = [rule["replacement"] for rule in endpoint["relabelings"] if rule["targetLabel"] == "job"]
    scraped = {
        entry["job_name"]
        for entry in yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    }
    assert asked == set(named) == {"ray"}
    assert asked <= scraped


def test_entry_points_are_jobs_of_this_checkout_with_flags_that_they_take() -> None:
    for name, document in resources():
        for entrypoint in re.findall(r'"entrypoint": "(.*?)"', json.dumps(document)):
            words = entrypoint.split()
            assert words[0] == "python"
            script = words[1].removeprefix("/opt/btray/")
            assert (ROOT / script).is_file(), f"{name}: {script}"
            job = {"train": TrainConfig, "classify": ClassifyConfig}[Path(script).stem]
            job.from_command_line(words[2:], Path(script).name)


def test_the_service_is_the_one_of_serve_yaml_with_settings_that_it_takes() -> None:
    kubernetes = next(document for document in documents(DEPLOY / "kuberay" / "rayservice.yaml")
                      if document["kind"] == "RayService")  # fmt: skip
    (here,) = yaml.safe_load((ROOT / "serve.yaml").read_text(encoding="utf-8"))["applications"]
    (there,) = yaml.safe_load(kubernetes["spec"]["serveConfigV2"])["applications"]
    assert there["import_path"] == here["import_path"]
    module, _, name = there["import_path"].partition(":")
    assert re.search(rf"^(def {name}\(|{name} =)", (ROOT / f"{module.replace('.', '/')}.py").read_text(), re.MULTILINE)
    for application in (here, there):
        (deployment,) = application["deployments"]
        assert deployment["name"] == here["deployments"][0]["name"]
        ServiceConfig.model_validate(deployment["user_config"])
        assert deployment["autoscaling_config"].keys() == here["deployments"][0]["autoscaling_config"].keys()


def test_network_policy_opens_no_port_to_everyone() -> None:
    (policy,) = documents(DEPLOY / "kuberay" / "network-policy.yaml")
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    for rule in policy["spec"]["ingress"]:
        assert rule.get("from"), "an ingress rule without `from` is open to the world"
    dashboard = [rule for rule in policy["spec"]["ingress"]
                 if any(port["port"] == 8265 for port in rule.get("ports", []))]  # fmt: skip
    assert len(dashboard) == 2


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
    """Ray opens SSH to the world in any group that it fills, whatever the file says, and its own image is of 2018."""
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
    assert "0.0.0.0/0" in Path(source.origin).read_text(), "if Ray has learnt better, say so in the file"


def test_the_head_may_do_what_workers_may_since_drivers_run_there() -> None:
    head, worker = (json.loads((DEPLOY / "aws" / f"{kind}-policy.json").read_text())["Statement"]
                    for kind in ("head", "worker"))  # fmt: skip
    assert [statement for statement in worker if statement not in head] == []


@pytest.mark.parametrize("name", ["head-policy", "worker-policy"])
def test_a_role_may_do_what_it_needs_and_no_more(name: str) -> None:
    policy = json.loads((DEPLOY / "aws" / f"{name}.json").read_text(encoding="utf-8"))
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        for action in statement["Action"]:
            assert "*" not in action
            harmless = action.split(":")[1].startswith("Describe") or action == "ecr:GetAuthorizationToken"
            limited = "*" not in statement["Resource"] or "Condition" in statement
            assert harmless or limited, f"{action} on everything"
            assert not action.startswith("s3:") or all("EXAMPLE-BUCKET" in where for where in statement["Resource"])
            on_instances = any(where.endswith(":instance/*") for where in statement["Resource"])
            assert not on_instances or re.search("ray-cluster-name|CreateAction", json.dumps(statement["Condition"]))
    text = json.dumps(policy)
    assert ("ec2:RunInstances" in text) == (name == "head-policy")
    assert ("s3:DeleteBucket" in text) is False


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
            server.until(lambda: server.count("/latest/meta-data/spot/instance-action") >= 2)
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
    assert re.search(r"^USER (?!root)\w+$", text, re.MULTILINE)
    assert f"'.[{','.join(EXTRAS)}]'" in text
    arguments = set(re.findall(r"^ARG (\w+)", text, re.MULTILINE))
    assert arguments == {"BASE", "TORCH_INDEX", "GPUS"}
    assert all(re.search(rf"\$\{{{name}[:}}]", text) for name in arguments)
    assert "NVIDIA_VISIBLE_DEVICES=${GPUS:-all}" in text, "the CUDA image's containers see the GPUs"
    ray = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert ray
    versions = {document["spec"]["rayVersion"] for _, document in resources() if document["kind"] == "RayCluster"}
    assert versions == {ray[1]}, "an image's Ray and the operator's idea of it must be the same"


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


def test_the_settings_of_the_nightly_unit_are_those_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in (DEPLOY / "systemd" / "classify.env").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition("=")
            assert name.startswith(ENV_PREFIX)
            monkeypatch.setenv(name, value)
    config = ClassifyConfig.from_command_line([], "classify.py")
    assert config.metrics_to is not None
    assert config.log_format == "json"


def test_systemd_finds_the_units_valid(tmp_path: Path) -> None:
    try:
        subprocess.run(["systemd-analyze", "--version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("systemd-analyze ABSENT: whether the units are valid is NOT shown here")
    for name in ("btray-classify.service", "btray-classify.timer"):
        text = (DEPLOY / "systemd" / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace("/opt/btray/.venv/bin/python", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, tmp_path.iterdir())],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "btray" in line]
    assert (done.returncode, said) == (0, [])


def test_no_address_of_a_registry_and_no_password_stands_in_what_deploys() -> None:
    for path in [*DEPLOY.rglob("*"), ROOT / "cluster.yaml", ROOT / "runtime-env.yaml"]:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not re.search(
                r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|(?i:password)\s*[:=]\s*['\"]?\w+\d", text
            ), path
            hosts = {urllib.parse.urlsplit(url).hostname for url in re.findall(r"https?://[^\s\"'`)>]+", text)}
            assert hosts <= {"localhost", "169.254.169.254", "pushgateway", "head", None}, (path, hosts)
