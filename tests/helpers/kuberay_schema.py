"""The schema of KubeRay (1.5 and newer), as far as deploy/kubernetes uses it; unknown fields are errors.

Follows the types of ray-operator/apis/ray/v1. Pod templates are checked by the schema of Kubernetes itself.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Text = dict[str, StrictStr]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Owner(Strict):
    apiVersion: str
    kind: str
    name: str
    uid: str


class Metadata(Strict):
    name: Name | None = None
    namespace: Name | None = None
    ownerReferences: list[Owner] = []
    generateName: str | None = None
    labels: Text = {}
    annotations: Text = {}


class HeadGroup(Strict):
    rayStartParams: Text
    template: dict[str, Any]


class WorkerGroup(Strict):
    groupName: Name
    replicas: StrictInt = Field(ge=0)
    minReplicas: StrictInt = Field(ge=0)
    maxReplicas: StrictInt = Field(ge=1)
    numOfHosts: StrictInt = 1
    rayStartParams: Text
    template: dict[str, Any]

    @model_validator(mode="after")
    def _in_order(self) -> WorkerGroup:
        assert self.minReplicas <= self.replicas <= self.maxReplicas
        return self


class AutoscalerOptions(Strict):
    idleTimeoutSeconds: StrictInt
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]
    resources: dict[str, Text]
    securityContext: dict[str, Any]


class SecretRef(Strict):
    valueFrom: dict[Literal["secretKeyRef"], dict[Literal["name", "key"], str]]


class FaultTolerance(Strict):
    redisAddress: str
    redisPassword: SecretRef
    externalStorageNamespace: str | None = None


class AuthOptions(Strict):
    mode: Literal["token"]


class ClusterSpec(Strict):
    rayVersion: StrictStr
    authOptions: AuthOptions
    enableInTreeAutoscaling: StrictBool
    autoscalerOptions: AutoscalerOptions
    gcsFaultToleranceOptions: FaultTolerance | None = None
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class JobSpec(Strict):
    suspend: StrictBool
    entrypoint: StrictStr
    backoffLimit: StrictInt = Field(ge=0)
    activeDeadlineSeconds: StrictInt = Field(gt=0)
    shutdownAfterJobFinishes: StrictBool
    ttlSecondsAfterFinished: StrictInt
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    submitterPodTemplate: dict[str, Any]
    rayClusterSpec: ClusterSpec


class UpgradeStrategy(Strict):
    type: Literal["NewCluster", "None", "NewClusterWithIncrementalUpgrade"]


class ServiceSpec(Strict):
    serveConfigV2: StrictStr
    upgradeStrategy: UpgradeStrategy
    excludeHeadPodFromServeSvc: StrictBool
    rayClusterConfig: ClusterSpec


class Resource(Strict):
    apiVersion: Literal["ray.io/v1"]
    metadata: Metadata


class RayCluster(Resource):
    kind: Literal["RayCluster"]
    spec: ClusterSpec


class RayJob(Resource):
    kind: Literal["RayJob"]
    spec: JobSpec


class RayService(Resource):
    kind: Literal["RayService"]
    spec: ServiceSpec


KINDS: dict[str, type[Resource]] = {kind.__name__: kind for kind in (RayCluster, RayJob, RayService)}
