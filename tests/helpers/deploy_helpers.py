"""The Kubernetes resources of deploy/kubernetes as Kustomize renders them, and the pods that run because of them."""

from __future__ import annotations

import copy
import subprocess
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
KUSTOMIZE = DEPLOY / "kubernetes"
EXAMPLE = "overlays/example"
Document = dict[str, Any]


def kubectl() -> str:
    """Return the program of the development install: Debian 12 has one of 2020, without components and replacements."""
    path = Path(sysconfig.get_path("scripts")) / "kubectl"
    if not path.exists():
        pytest.skip("KUBECTL ABSENT: there is no wheel of it for this machine; Kubernetes' resources are NOT checked")
    return str(path)


@cache
def rendered(folder: str = EXAMPLE) -> list[Document]:
    """Return all resources of a Kustomize folder."""
    done = subprocess.run(
        [kubectl(), "kustomize", str(KUSTOMIZE / folder)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [document for document in yaml.load_all(done.stdout, yaml.CSafeLoader) if document]


def of_kind(kind: str, folder: str = EXAMPLE) -> list[Document]:
    return [document for document in rendered(folder) if document["kind"] == kind]


def one_of(kind: str, namespace: str) -> Document:
    (document,) = [one for one in of_kind(kind) if one["metadata"]["namespace"] == namespace]
    return document


def name_of(document: Document) -> str:
    metadata = document["metadata"]
    return f"{document['kind']} {metadata.get('namespace', '-')}/{metadata['name']}"


def cluster_of(document: Document) -> Document | None:
    """Return the part of a resource of KubeRay that describes a cluster; None if it has none."""
    spec = document.get("spec", {})
    kinds = {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec"), "RayService": spec.get("rayClusterConfig")}
    return kinds.get(document["kind"])


def pods(folder: str = EXAMPLE) -> Iterator[tuple[str, Document]]:
    """Yield the template of every pod that will run, with the containers that KubeRay adds to it (ray-operator 1.5).

    It adds the autoscaler to a head, a container that waits for the head to workers, a pod that submits a job, and one
    that clears Redis, which is the head's without the autoscaler.
    """
    for document in rendered(folder):
        name, cluster = name_of(document), cluster_of(document)
        if cluster is not None:
            options = cluster["autoscalerOptions"]
            head = copy.deepcopy(cluster["headGroupSpec"]["template"])
            ray = head["spec"]["containers"][0]
            if "gcsFaultToleranceOptions" in cluster:
                yield f"{name} redis-cleanup", copy.deepcopy(head)
            added = {"name": "autoscaler", "image": ray["image"], "resources": options["resources"]}
            if "securityContext" in options:
                added["securityContext"] = options["securityContext"]
            head["spec"]["containers"].append(added)
            yield f"{name} head", head
            for group in cluster["workerGroupSpecs"]:
                worker = copy.deepcopy(group["template"])
                ray = worker["spec"]["containers"][0]
                size = {"cpu": "200m", "memory": "256Mi"}
                waits = {
                    "name": "wait-gcs-ready",
                    "image": ray["image"],
                    "resources": {"requests": size, "limits": size},
                }
                if "securityContext" in ray:
                    waits["securityContext"] = ray["securityContext"]
                worker["spec"]["initContainers"] = [waits]
                yield f"{name} {group['groupName']}", worker
        spec = document.get("spec", {})
        for key in ("submitterPodTemplate", "template"):
            if key in spec:
                yield f"{name} {key}", spec[key]
        if document["kind"] == "CronJob":
            yield name, spec["jobTemplate"]["spec"]["template"]


def bytes_of(quantity: str) -> int:
    """Return a quantity of memory of Kubernetes in bytes."""
    units = {"Mi": 2**20, "Gi": 2**30}
    return int(quantity[:-2]) * units[quantity[-2:]]


def cores_of(quantity: str) -> float:
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)
