"""The schemas of the Gateway API (v1) and the Prometheus operator, as far as deploy/kubernetes uses them; strict."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr

from tests.helpers.kuberay_schema import Metadata, Name, Strict, Text

Duration = Annotated[str, Field(pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}$")]
Host = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]


class Resource(Strict):
    metadata: Metadata


# ---- gateway.networking.k8s.io/v1


class LocalName(Strict):
    name: Name


class Tls(Strict):
    mode: Literal["Terminate", "Passthrough"]
    certificateRefs: list[LocalName]


class AllowedNamespaces(Strict):
    from_: Literal["All", "Selector", "Same"] = Field(alias="from")


class AllowedRoutes(Strict):
    namespaces: AllowedNamespaces


class Listener(Strict):
    name: Name
    port: StrictInt = Field(ge=1, le=65535)
    protocol: Literal["HTTP", "HTTPS", "TLS", "TCP", "UDP"]
    hostname: Host
    tls: Tls
    allowedRoutes: AllowedRoutes


class GatewaySpec(Strict):
    gatewayClassName: Name
    listeners: list[Listener] = Field(min_length=1)


class Gateway(Resource):
    apiVersion: Literal["gateway.networking.k8s.io/v1"]
    kind: Literal["Gateway"]
    spec: GatewaySpec


class ParentRef(Strict):
    name: Name
    sectionName: Name


class PathMatch(Strict):
    type: Literal["Exact", "PathPrefix", "RegularExpression"]
    value: Annotated[str, Field(pattern="^/")]


class RouteMatch(Strict):
    path: PathMatch


class Timeouts(Strict):
    request: Duration
    backendRequest: Duration


class BackendRef(Strict):
    name: Name
    port: StrictInt


class Rule(Strict):
    matches: list[RouteMatch]
    timeouts: Timeouts
    backendRefs: list[BackendRef]


class RouteSpec(Strict):
    parentRefs: list[ParentRef]
    hostnames: list[Host]
    rules: list[Rule]


class HTTPRoute(Resource):
    apiVersion: Literal["gateway.networking.k8s.io/v1"]
    kind: Literal["HTTPRoute"]
    spec: RouteSpec


# ---- gateway.nginx.org/v1alpha1


class TargetRef(Strict):
    group: Literal["gateway.networking.k8s.io"]
    kind: Literal["Gateway", "HTTPRoute", "GRPCRoute"]
    name: Name


class Body(Strict):
    maxSize: Annotated[str, Field(pattern=r"^\d{1,4}(k|m|g)?$")]
    timeout: Annotated[str, Field(pattern=r"^[0-9]{1,4}(ms|s|m|h)?$")]


class ClientSettings(Strict):
    targetRef: TargetRef
    body: Body


class ClientSettingsPolicy(Resource):
    apiVersion: Literal["gateway.nginx.org/v1alpha1"]
    kind: Literal["ClientSettingsPolicy"]
    spec: ClientSettings


# ---- monitoring.coreos.com/v1


class Relabeling(Strict):
    sourceLabels: list[StrictStr] = []
    regex: StrictStr | None = None
    targetLabel: StrictStr
    replacement: StrictStr


class Endpoint(Strict):
    port: StrictStr
    interval: Duration | None = None
    honorLabels: StrictBool = False
    relabelings: list[Relabeling] = []
    metricRelabelings: list[Relabeling] = []


class Selector(Strict):
    matchLabels: Text


class AnyNamespace(Strict):
    any: StrictBool


class PodMonitorSpec(Strict):
    namespaceSelector: AnyNamespace
    selector: Selector
    podMetricsEndpoints: list[Endpoint]


class PodMonitor(Resource):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    spec: PodMonitorSpec


class ServiceMonitorSpec(Strict):
    selector: Selector
    endpoints: list[Endpoint]


class ServiceMonitor(Resource):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["ServiceMonitor"]
    spec: ServiceMonitorSpec


class Alert(Strict):
    alert: StrictStr
    expr: StrictStr
    for_: Duration = Field(alias="for")
    labels: Text
    annotations: Text


class AlertGroup(Strict):
    name: StrictStr
    rules: list[Alert]


class RuleSpec(Strict):
    groups: list[AlertGroup]


class PrometheusRule(Resource):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PrometheusRule"]
    spec: RuleSpec


KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (Gateway, HTTPRoute, ClientSettingsPolicy, PodMonitor, ServiceMonitor, PrometheusRule)
}
