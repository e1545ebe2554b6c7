"""Resources for Kubernetes and KubeRay are valid by their own schemas, strict, and do what they claim."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError

from btray.bulk.config import ClassifyConfig
from btray.serving.config import ServiceConfig
from btray.training.config import TrainConfig
from tests.conftest import ROOT
from tests.helpers.deploy_helpers import DEPLOY, documents, pods, resources
from tests.helpers.kuberay_schema import KINDS, ClusterSpec, RayCluster

KUBERNETES = "1.34"


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
    """Runs the CronJob's script with a fake kubectl that answers one state after the other, anew for each RayJob."""
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
    assert (owner["name"], owner["uid"]) == ("btray-nightly-1", "4-5-6"), "deleted with its Job, by the history limits"


def test_a_pod_of_the_endpoint_is_ready_once_serve_answers_there() -> None:
    (service,) = [document for _, document in resources() if document["kind"] == "RayService"]
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        assert container["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}
        assert container["readinessProbe"]["failureThreshold"] == 1, "KubeRay's own value for pods that serve requests"
        assert container["livenessProbe"]["httpGet"]["port"] != 8000, "a pod without a replica is alive"


def test_no_two_clusters_have_one_name() -> None:
    """KubeRay derives service names the same way for a RayCluster and a RayService, and would mix them up."""
    names = [document["metadata"].get("name") for _, document in resources()
             if document["kind"] in ("RayCluster", "RayService", "RayJob", "RayCronJob")]  # fmt: skip
    assert len(set(names)) == len(names)


def test_a_disruption_budget_asks_nothing_that_a_ray_cluster_cannot_say() -> None:
    """Without a scale subresource Kubernetes accepts only a numeric `minAvailable`, else it refuses all evictions."""
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
    assert callable(getattr(importlib.import_module(module), name))
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
