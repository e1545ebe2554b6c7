"""Kustomize renders resources that are valid by their own schemas, strict, and do what they claim."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from jsonschema import ValidationError as SchemaError
from kubernetes_validate.utils import schema_contents
from pydantic import ValidationError
from ray._private import ray_constants, services
from ray._private import utils as ray_utils
from ray._private.node import Node
from ray._private.parameter import RayParams
from referencing import Registry, Resource

from btray.bulk.config import ClassifyConfig
from btray.core.config import ENV_PREFIX, JobConfig
from btray.serving.config import ReplicasConfig, ServiceConfig
from btray.serving.ray_serve_private import haproxy_environment, serve_environment
from btray.training.config import TrainConfig
from tests.conftest import ROOT
from tests.helpers import kuberay_schema, operator_schemas
from tests.helpers.deploy_helpers import (
    DEPLOY,
    EXAMPLE,
    KUSTOMIZE,
    Document,
    bytes_of,
    cluster_of,
    cores_of,
    kubectl,
    name_of,
    of_kind,
    one_of,
    pods,
    rendered,
)

KUBERNETES = "1.34"
SCHEMAS = f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict"
NAMESPACES = ("btray-serve", "btray-classify", "btray-train")
CUSTOM = kuberay_schema.KINDS | operator_schemas.KINDS


@cache
def _definitions() -> Registry:
    """The schemas of Kubernetes, which the package kubernetes_validate brings and would read anew for each resource."""
    return Resource.from_contents(schema_contents(f"{SCHEMAS}/_definitions.json", KUBERNETES)) @ Registry()


@cache
def _schema(name: str) -> Draft202012Validator:
    schema = schema_contents(f"{SCHEMAS}/{name}.json", KUBERNETES)
    return Draft202012Validator(schema, registry=Resource.from_contents(schema) @ _definitions())


def kubernetes_schema(document: Document) -> Draft202012Validator:
    """The strict schema of a resource of Kubernetes itself."""
    version = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", document["apiVersion"])
    return _schema(f"{document['kind'].lower()}-{version}")


def settings_of(namespace: str) -> dict[str, str]:
    (found,) = [one["data"] for one in of_kind("ConfigMap")
                if one["metadata"]["name"] == "settings" and one["metadata"]["namespace"] == namespace]  # fmt: skip
    return found


def validate(document: Document) -> None:
    """Raise ValidationError of pydantic or SchemaError unless the resource fits its schema, strictly."""
    if document["kind"] in CUSTOM:
        CUSTOM[document["kind"]].model_validate(document)
    else:
        kubernetes_schema(document).validate(document)


# ---- valid


@pytest.mark.parametrize("folder", [EXAMPLE, "base/cluster"])
def test_every_rendered_resource_fits_its_schema(folder: str) -> None:
    for document in rendered(folder):
        try:
            validate(document)
        except (ValidationError, SchemaError) as error:
            raise AssertionError(f"{name_of(document)}: {error}") from error
    for name, template in pods(folder):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {**template.get("metadata", {}), "name": "x"},
               "spec": template["spec"]}  # fmt: skip
        try:
            validate(pod)
        except SchemaError as error:
            raise AssertionError(f"{name} {list(error.path)}: {error.message}") from error


def test_the_example_has_all_that_is_promised_and_a_file_beside_it_fits_its_schema_too() -> None:
    kinds = {document["kind"] for document in rendered()}
    assert kinds >= {
        "RayService", "RayJob", "CronJob", "NetworkPolicy", "PodDisruptionBudget", "ServiceAccount", "ResourceQuota",
        "StatefulSet", "HTTPRoute", "Gateway", "PodMonitor", "ServiceMonitor", "PrometheusRule", "Namespace",
    }  # fmt: skip
    assert "RayCluster" not in kinds, "the common shape is copied, not applied"
    validate(yaml.safe_load((KUSTOMIZE / "components" / "route" / "nginx-body-size.yaml").read_text()))


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
    (document,) = of_kind("RayCluster", "base/cluster")
    with pytest.raises(ValidationError):
        kuberay_schema.ClusterSpec.model_validate({**document["spec"], **change})
    (_, template), *_ = pods("base/cluster")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {**template["spec"], "grace": 3}}
    with pytest.raises(SchemaError):
        validate(pod)


def test_the_walk_through_says_how_much_there_is() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert f"grep -c ^kind:      # prints {len(rendered())}\n" in text


def test_what_a_site_changes_stands_in_the_overlay_and_nowhere_else() -> None:
    for path in sorted(KUSTOMIZE.rglob("*")):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if "overlays" in path.parts:
            for line in text.splitlines():
                placeholder = re.search(r"EXAMPLE-BUCKET|192\.0\.2\.|198\.51\.100\.|sha256:0{60}", line)
                assert not placeholder or "CHANGE" in text, (path, line)
        else:
            assert not re.search(r"\bCHANGE\b|EXAMPLE|namespace: \S", text), path


# ---- safe


def test_pod_security_restricted_admits_every_pod_with_the_containers_that_kuberay_adds() -> None:
    """The rules of Kubernetes 1.34, https://kubernetes.io/docs/concepts/security/pod-security-standards/."""
    found = 0
    for name, template in pods():
        spec = template["spec"]
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert context.get("runAsUser", 1) != 0, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & spec.keys(), name
        kinds = {kind for volume in spec.get("volumes", []) for kind in volume.keys() - {"name"}}
        assert kinds <= {"configMap", "emptyDir", "secret", "persistentVolumeClaim", "projected"}, name
        for container in spec["containers"] + spec.get("initContainers", []):
            where = f"{name}: {container['name']}"
            found += 1
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, where
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, where
            assert not {"privileged", "procMount", "runAsUser"} & container["securityContext"].keys(), where
            assert not [port for port in container.get("ports", []) if "hostPort" in port], where
    assert found > 15
    enforced = [one["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] for one in of_kind("Namespace")]
    assert enforced == ["restricted"] * 4


def test_every_container_is_limited_probed_and_pinned_and_holds_no_secret() -> None:
    for name, template in pods():
        for container in template["spec"]["containers"] + template["spec"].get("initContainers", []):
            where = f"{name}: {container['name']}"
            assert container["resources"].keys() == {"requests", "limits"}, where
            assert re.fullmatch(r"registry\.example/[a-z0-9/]+@sha256:[0-9a-f]{64}", container["image"]), where
            for variable in container.get("env", []):
                assert "valueFrom" in variable or not re.search("KEY|TOKEN|SECRET|PASSWORD", variable["name"]), where
        lasting = template["spec"].get("restartPolicy", "Always") == "Always" and "cleanup" not in name
        assert not lasting or {"readinessProbe", "livenessProbe"} <= template["spec"]["containers"][0].keys(), name
    assert not of_kind("Secret")


def test_each_job_is_an_identity_of_its_own_and_workers_get_no_token() -> None:
    accounts = {(one["metadata"]["namespace"], one["metadata"]["name"]): one for one in of_kind("ServiceAccount")}
    assert {namespace for namespace, name in accounts if name == "btray"} == set(NAMESPACES)
    assert all(account["automountServiceAccountToken"] is False for account in accounts.values())
    for document in rendered():
        cluster = cluster_of(document)
        if cluster is None:
            continue
        for template in (
            cluster["headGroupSpec"]["template"],
            *(one["template"] for one in cluster["workerGroupSpecs"]),
        ):
            assert (document["metadata"]["namespace"], template["spec"]["serviceAccountName"]) in accounts
        assert all(not one["template"]["spec"]["automountServiceAccountToken"] for one in cluster["workerGroupSpecs"])
        submitter = document["spec"].get("submitterPodTemplate", {}).get("spec", {})
        assert not submitter.get("automountServiceAccountToken", False)
    pullers = [one for one in accounts.values() if one["imagePullSecrets"]]
    assert len(pullers) == len(accounts), "the submitter's pods pull from the registry too"
    for name, template in pods():
        assert {"serviceAccountName", "imagePullSecrets"} & template["spec"].keys(), name
    for role in of_kind("Role"):
        assert role["rules"] == [
            {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "list", "watch"]}
        ]
    keys = [name for name, template in pods() if "'secretName': 'keys'" in str(template)]
    assert keys
    assert all("btray-serve" in name for name in keys)


def test_nothing_leaves_or_enters_a_namespace_but_what_a_policy_names() -> None:
    policies = of_kind("NetworkPolicy")
    for namespace in (*NAMESPACES, "btray-monitoring"):
        own = [one["spec"] for one in policies if one["metadata"]["namespace"] == namespace]
        assert any(one["podSelector"] == {} and set(one["policyTypes"]) == {"Ingress", "Egress"} for one in own)
        for policy in own:
            assert all(rule.get("from") for rule in policy.get("ingress", [])), "a rule without `from` is open to all"
            assert all(rule.get("to") for rule in policy.get("egress", [])), "a rule without `to` is open to all"
    blocks = {peer["ipBlock"]["cidr"] for one in policies for rule in one["spec"].get("egress", [])
              for peer in rule["to"] if "ipBlock" in peer}  # fmt: skip
    assert all(block.startswith(("192.0.2.", "198.51.100.")) for block in blocks), "placeholders alone"
    allowed = {name for name, template in pods()
               if template.get("metadata", {}).get("labels", {}).get("api-server") == "allowed"}  # fmt: skip
    assert {name.split()[-1] for name in allowed} <= {
        "head",
        "redis-cleanup",
        "btray-classify/btray",
        "btray-train/btray",
    }
    assert len([name for name in allowed if name.endswith(" head")]) == 3, (
        "each autoscaler asks the API server for pods"
    )


# ---- sizes


def test_the_object_store_lies_in_memory_by_rays_own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = 0
    for document in rendered():
        cluster = cluster_of(document) or {"workerGroupSpecs": []}
        for group in [
            *cluster["workerGroupSpecs"],
            *([cluster["headGroupSpec"]] if "headGroupSpec" in cluster else []),
        ]:
            spec = group["template"]["spec"]
            (volume,) = [one["emptyDir"] for one in spec["volumes"] if one["name"] == "shm"]
            size, memory = (
                bytes_of(volume["sizeLimit"]),
                bytes_of(spec["containers"][0]["resources"]["limits"]["memory"]),
            )
            asked = int(group["rayStartParams"]["object-store-memory"])
            monkeypatch.setattr(ray_utils, "get_shared_memory_bytes", lambda size=size: size)
            monkeypatch.setattr("ray._common.utils.get_system_memory", lambda memory=memory: memory)
            place, _, given = services.determine_plasma_store_config(asked, "/tmp")
            assert (place, given) == ("/dev/shm", asked), (name_of(document), group.get("groupName"))
            assert asked < size < memory, "it counts towards the memory limit"
            own = ray_utils.resolve_object_store_memory(memory)
            if own < ray_constants.REQUIRE_SHM_SIZE_THRESHOLD:
                assert services.determine_plasma_store_config(own, "/tmp")[0] == "/tmp", (
                    "Ray's own choice lands on disk"
                )
            checked += 1
    assert checked == 7


def test_the_quota_of_the_endpoint_holds_two_clusters_at_their_largest_and_no_third() -> None:
    service, quota = one_of("RayService", "btray-serve"), one_of("ResourceQuota", "btray-serve")
    cluster = cluster_of(service)
    assert cluster
    (group,) = cluster["workerGroupSpecs"]
    requests = [group["template"]["spec"]["containers"][0]["resources"]["requests"]] * group["maxReplicas"]
    requests += [cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["requests"]]
    requests += [cluster["autoscalerOptions"]["resources"]["requests"]]
    redis = one_of("StatefulSet", "btray-serve")["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]
    for resource, number in (("cpu", cores_of), ("memory", bytes_of)):
        most = sum(number(request[resource]) for request in requests)
        limit = number(quota["spec"]["hard"][f"requests.{resource}"])
        assert 2 * most + number(redis[resource]) <= limit < 3 * most


def test_gpu_nodes_are_named_by_label_taint_and_runtime_class_and_the_job_uses_them() -> None:
    cluster = cluster_of(one_of("RayJob", "btray-train"))
    assert cluster
    cpu, gpu = cluster["workerGroupSpecs"]
    spec = gpu["template"]["spec"]
    assert spec["runtimeClassName"] == "nvidia"
    assert spec["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert [one["key"] for one in spec["tolerations"]] == ["nvidia.com/gpu"]
    assert spec["containers"][0]["image"] != cpu["template"]["spec"]["containers"][0]["image"]
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    settings = settings_of("btray-train")
    assert settings["BTRAY_USE_GPU"] == "true"
    assert "BTRAY_DATA" in settings, "the component adds to the settings of the site"


# ---- jobs


def test_the_settings_of_each_namespace_are_those_of_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: dict[str, tuple[type[JobConfig], dict[str, str]]] = {
        "btray-classify": (ClassifyConfig, {}),
        "btray-train": (TrainConfig, {"BTRAY_OUT": "s3://EXAMPLE-BUCKET/runs/spring-2027"}),  # by submit.sh
    }
    for namespace, (config, added) in jobs.items():
        job = one_of("RayJob", namespace)
        interpreter, script = job["spec"]["entrypoint"].split()
        assert interpreter == "python"
        assert (ROOT / script.removeprefix("/opt/btray/")).is_file()
        with monkeypatch.context() as patch:
            for name, value in (settings_of(namespace) | added).items():
                if name.startswith(ENV_PREFIX):
                    patch.setenv(name, value)
            assert config.from_command_line([], script).log_format == "json"


FAILED, LOGS = "Job entrypoint command failed with exit code", ", last available logs (truncated to 20,000 chars):\n"
"""What Ray says of a job, as KubeRay passes it on."""
NIGHTS = {
    "done": (["Complete SUCCEEDED"], "", 0, 1),
    "the API server is away for a moment": (["error", " ", "Running RUNNING", "Complete SUCCEEDED"], "", 0, 1),
    "deleted": ([""], "", 1, 1),
    "stopped by a person": (["Complete STOPPED"], "", 1, 1),
    "refused by KubeRay": (["ValidationFailed "], "The RayJob spec is invalid: ...", 2, 1),
    "failed, and again, and again": (["Running RUNNING", "Failed FAILED"], f"{FAILED} 1{LOGS}", 1, 3),
    "wrong use": (["Complete FAILED"], f"{FAILED} 2{LOGS}", 2, 1),
    "a crossed threshold": (["Failed FAILED"], f"{FAILED} 3. No logs available.", 3, 1),
    "some other code": (["Failed FAILED"], f"{FAILED} 25{LOGS}", 1, 3),
    "a log that speaks of another code": (["Failed FAILED"], f"{FAILED} 1{LOGS}a tool ended with exit code 2", 1, 3),
}


@pytest.mark.parametrize(("states", "message", "code", "made"), NIGHTS.values(), ids=NIGHTS)
def test_who_waits_for_a_job_knows_how_it_ended_and_whether_to_try_again(
    tmp_path: Path, states: list[str], message: str, code: int, made: int
) -> None:
    """Runs the CronJob's script with a server that answers one state after the other, and the real kubectl's patch."""
    job = submitted(tmp_path, one_of("RayJob", "btray-classify"), states, message=message, code=code)
    assert len((tmp_path / "made").read_text().split()) == made
    del job["status"]  # which the API server takes from nobody
    kuberay_schema.RayJob.model_validate(job)
    assert job["spec"]["suspend"] is False
    assert job["metadata"].keys() == {"generateName", "labels", "ownerReferences"}
    (owner,) = job["metadata"]["ownerReferences"]
    assert (owner["name"], owner["uid"]) == ("night-1", "4-5-6"), "deleted with its Job, by the history limits"
    assert "BTRAY_OUT" not in json.dumps(job)


def test_ray_still_says_how_a_job_ended_in_the_words_that_are_looked_for() -> None:
    source = importlib.util.find_spec("ray.dashboard.modules.job.job_supervisor")
    assert source is not None
    assert source.origin is not None
    text = re.sub(r'"\s+f?"', "", Path(source.origin).read_text())
    assert f'"{FAILED} {{return_code}}{LOGS}"'.replace("\n", "\\n") in text
    assert f'"{FAILED} {{return_code}}. No logs available."' in text


def test_a_job_is_waited_for_as_long_as_its_attempts_may_take_and_only_who_waits_repeats_it() -> None:
    """Or else a RayJob would run on without anybody who tells how it ended, or repeat what no repetition can mend."""
    script = (KUSTOMIZE / "base" / "jobs" / "submit.sh").read_text()
    (attempts,) = re.findall(r"^for attempt in ([\d ]+);", script, re.MULTILINE)
    for namespace in ("btray-classify", "btray-train"):
        job = one_of("RayJob", namespace)["spec"]
        waits = one_of("CronJob", namespace)["spec"]["jobTemplate"]["spec"]
        assert (job["backoffLimit"], waits["backoffLimit"]) == (0, 0)
        assert waits["activeDeadlineSeconds"] >= len(attempts.split()) * job["activeDeadlineSeconds"]


@pytest.mark.parametrize("name", ["2027-spring", "a" * 42, "spring.2027"])
def test_a_name_that_kuberay_would_never_start_is_refused_at_once(tmp_path: Path, name: str) -> None:
    """KubeRay 1.5: a RayJob's name is a DNS-1035 label of at most 47 characters, six of which generateName adds."""
    ended = submit(tmp_path, JOB_NAME=name)
    assert (ended.returncode, ended.stdout.count("\n"), ended.stderr) == (2, 1, "")
    assert name in ended.stdout


def test_every_training_has_a_name_and_a_folder_of_its_own(tmp_path: Path) -> None:
    template = one_of("RayJob", "btray-train")
    job = submitted(tmp_path, template, ["Complete SUCCEEDED"], RUNS="s3://EXAMPLE-BUCKET/runs")
    environment = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "BTRAY_OUT", "value": "s3://EXAMPLE-BUCKET/runs/night-1"} in environment
    assert job["metadata"]["generateName"] == "night-1-"
    assert one_of("CronJob", "btray-train")["spec"]["suspend"] is True, "it runs when it is told to"


def submitted(
    folder: Path, template: Document, states: list[str], *, message: str = "", code: int = 0, **settings: str
) -> Document:
    """Run submit.sh to its end and return the RayJob that it created last."""
    cron = one_of("CronJob", template["metadata"]["namespace"])
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["sh", "/submit/submit.sh"]
    (folder / "server.json").write_text(json.dumps(template | {"status": {"jobStatus": ""}}))
    (folder / "states").write_text("".join(f"{state}\n" for state in states))
    (folder / "kubectl").write_text(f"""#!/bin/sh
        cd {folder}
        case "$*" in
          patch*) exec {kubectl()} "$@" ;;
          create*) cp rayjob.json given; cp states left; echo made >> made; echo rayjob.ray.io/btray-nightly-x ;;
          "get rayjob btray -o json") cat server.json ;;
          *status.message*) printf %s {shlex.quote(message)} ;;
          *) state=$(head -n 1 left); sed -i 1d left; [ "$state" != error ] || exit 1; printf %s "$state" ;;
        esac
    """)
    (folder / "sleep").write_text("#!/bin/sh\n")
    for name in ("kubectl", "sleep"):
        (folder / name).chmod(0o755)
    assert JOB.keys() == {one["name"] for one in container["env"]} - {"HOME", "RUNS"}
    done = submit(folder, **settings)
    assert (done.returncode, done.stderr) == (code, "")
    job: Document = json.loads((folder / "given").read_text())
    return job


JOB = {"JOB_NAME": "night-1", "JOB_UID": "4-5-6"}


def submit(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run submit.sh; its /tmp is `folder`, where a kubectl may be."""
    script = (KUSTOMIZE / "base" / "jobs" / "submit.sh").read_text().replace("/tmp/", f"{folder}/")
    environment = JOB | {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder)} | settings
    return subprocess.run(
        ["sh", "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


# ---- the endpoint


def test_a_pod_of_the_endpoint_is_ready_once_serve_answers_there() -> None:
    cluster = cluster_of(one_of("RayService", "btray-serve"))
    assert cluster
    for group in cluster["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        assert container["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}
        assert container["readinessProbe"]["failureThreshold"] == 1, "KubeRay's own value for pods that serve requests"
        assert container["livenessProbe"]["httpGet"]["port"] != 8000, "a pod without a replica is alive"


def test_all_pods_of_the_endpoint_have_haproxy_as_btray_mends_it_and_others_reach_its_port_alone() -> None:
    (variables,) = (one["data"] for one in of_kind("ConfigMap") if one["metadata"]["name"] == "haproxy")
    binary = Path("/usr/local/bin/btray-haproxy")
    expected = serve_environment() | haproxy_environment(Path("/tmp"), binary)
    assert variables == {name: value for name, value in expected.items() if not value.startswith("/tmp")}
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts[binary.name].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    cluster = cluster_of(one_of("RayService", "btray-serve"))
    assert cluster
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert {"configMapRef": {"name": "haproxy"}} in container["envFrom"]
    policies = [one["spec"] for one in of_kind("NetworkPolicy") if one["metadata"]["namespace"] == "btray-serve"]
    rules = [rule for policy in policies for rule in policy.get("ingress", [])]
    others = [rule for rule in rules if rule["from"] != [{"podSelector": {}}]]
    assert {port["port"] for rule in others for port in rule["ports"]} == {8000, 8080, 8265}


def test_replicas_leave_a_pod_a_cpu_and_the_largest_cluster_has_room_for_all() -> None:
    service = one_of("RayService", "btray-serve")
    cluster = cluster_of(service)
    assert cluster
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    (group,) = cluster["workerGroupSpecs"]
    replicas = int(group["rayStartParams"]["num-cpus"]) / ReplicasConfig(**application["args"]).cpus
    (container,) = group["template"]["spec"]["containers"]
    assert cores_of(container["resources"]["requests"]["cpu"]) == replicas + 1
    most = application["deployments"][0]["autoscaling_config"]["max_replicas"]
    assert replicas * group["maxReplicas"] >= most


def test_replicas_log_to_their_pods_by_rays_own_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = cluster_of(one_of("RayService", "btray-serve"))
    assert cluster
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        environment = {one["name"]: one["value"] for one in group["template"]["spec"]["containers"][0]["env"]}
        monkeypatch.delenv(ray_constants.LOGGING_REDIRECT_STDERR_ENVIRONMENT_VARIABLE, raising=False)
        node = object.__new__(Node)
        node._ray_params = RayParams()
        assert node.should_redirect_logs(), "to files below /tmp/ray, where no log store looks"
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert not node.should_redirect_logs()


def test_no_label_that_kuberay_selects_by_is_replaced() -> None:
    """It finds the head of a RayService by `app.kubernetes.io/name: kuberay`, whatever a template says."""
    for name, template in ray_pods():
        labels = template["metadata"]["labels"]
        assert not [label for label in labels if label.startswith("ray.io/")], name
        assert not {"app.kubernetes.io/name", "app.kubernetes.io/created-by"} & labels.keys(), name


def ray_pods() -> list[tuple[str, Document]]:
    """Return the templates of all heads and workers."""
    return [(name, one) for name, one in pods() if name.startswith("Ray") and "submitterPodTemplate" not in name]


def test_a_disruption_budget_counts_serving_workers_and_asks_nothing_that_a_ray_cluster_cannot_say() -> None:
    """Without a scale subresource Kubernetes accepts only a numeric `minAvailable`, else it refuses all evictions."""
    budget = one_of("PodDisruptionBudget", "btray-serve")["spec"]
    assert budget.keys() == {"minAvailable", "selector"}
    assert isinstance(budget["minAvailable"], int)
    chosen = budget["selector"]["matchLabels"]
    assert chosen["ray.io/node-type"] == "worker"
    assert {"app.kubernetes.io/part-of": "btray"}.items() <= chosen.items()
    service = one_of("RayService", "btray-serve")
    assert service["spec"]["excludeHeadPodFromServeSvc"] is True
    cluster = cluster_of(service)
    assert cluster
    (spread,) = cluster["workerGroupSpecs"][0]["template"]["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"].items() <= chosen.items(), "those that are counted lie apart"


def test_the_service_is_the_one_of_serve_yaml_with_the_model_of_its_settings() -> None:
    (here,) = yaml.safe_load((ROOT / "serve.yaml").read_text(encoding="utf-8"))["applications"]
    (there,) = yaml.safe_load(one_of("RayService", "btray-serve")["spec"]["serveConfigV2"])["applications"]
    assert there["import_path"] == here["import_path"]
    module, _, name = there["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    for application in (here, there):
        (deployment,) = application["deployments"]
        assert deployment["name"] == here["deployments"][0]["name"]
        ServiceConfig.model_validate(deployment["user_config"])
        assert deployment["autoscaling_config"].keys() == here["deployments"][0]["autoscaling_config"].keys()
    settings = (KUSTOMIZE / EXAMPLE / "serve" / "serve.env").read_text()
    (model,) = re.findall("^BTRAY_MODEL=(.+)$", settings, re.MULTILINE)
    assert there["deployments"][0]["user_config"]["model"] == model


def test_the_way_in_ends_tls_and_waits_longer_than_the_service() -> None:
    (gateway,), (route,) = of_kind("Gateway"), of_kind("HTTPRoute")
    (listener,) = gateway["spec"]["listeners"]
    assert (listener["protocol"], listener["tls"]["mode"]) == ("HTTPS", "Terminate")
    assert [listener["hostname"]] == route["spec"]["hostnames"]
    (rule,) = route["spec"]["rules"]
    limits = ServiceConfig().limits
    assert int(rule["timeouts"]["request"].removesuffix("s")) > 2 * limits.timeout
    nginx = yaml.safe_load((KUSTOMIZE / "components" / "route" / "nginx-body-size.yaml").read_text())
    assert nginx["spec"]["body"]["maxSize"] == f"{limits.max_body_mb:.0f}m"
    service = one_of("RayService", "btray-serve")["metadata"]["name"]
    assert rule["backendRefs"] == [{"name": f"{service}-serve-svc", "port": 8000}]


# ---- monitoring


def test_what_alerts_call_ray_is_what_both_ways_of_scraping_call_it() -> None:
    asked = set(re.findall(r'job="(\w+)"', (DEPLOY / "prometheus" / "alerts.yaml").read_text()))
    (monitor,) = of_kind("PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    named = [rule["replacement"] for rule in endpoint["relabelings"] if rule["targetLabel"] == "job"]
    scraped = {
        entry["job_name"]
        for entry in yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    }
    assert asked == set(named) == {"ray"}
    assert asked <= scraped
    scraped_pods = monitor["spec"]["selector"]["matchLabels"].items()
    for name, template in ray_pods():
        assert scraped_pods <= template["metadata"]["labels"].items(), name
        assert any(port["name"] == "metrics" for port in template["spec"]["containers"][0]["ports"]), name


def test_alerts_and_dashboard_are_those_of_the_files_and_the_pushgateway_is_scraped_and_kept() -> None:
    (rules,) = of_kind("PrometheusRule")
    for document in (rules, *of_kind("PodMonitor"), *of_kind("ServiceMonitor")):
        assert document["metadata"]["labels"]["release"], "the operator's chart selects by it, and is silent of others"
    assert rules["spec"] == yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())
    (dashboard,) = [one for one in of_kind("ConfigMap") if one["metadata"]["name"] == "btray-dashboard"]
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(dashboard["data"]["btray.json"]) == json.loads((DEPLOY / "grafana" / "btray.json").read_text())
    (monitor,), (gateway,) = of_kind("ServiceMonitor"), of_kind("Deployment")
    (service,) = [one for one in of_kind("Service") if one["metadata"]["name"] == "pushgateway"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["honorLabels"] is True
    (container,) = gateway["spec"]["template"]["spec"]["containers"]
    assert any(word.startswith("--persistence.file") for word in container["args"])
    settings = (KUSTOMIZE / EXAMPLE / "classify" / "classify.env").read_text()
    assert f"http://pushgateway.{service['metadata']['namespace']}:9091" in settings
