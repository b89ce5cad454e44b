"""The parts of Kubernetes API objects that lbproxy reads, as they are on the wire.

Everything else is skipped while parsing and never becomes a Python object. What
Go may write as null is optional here.
"""

import typing

import msgspec

_Any = typing.Any


class _Wire(msgspec.Struct, gc=False, rename="camel"):
    pass


class ServiceLabels(_Wire):
    """The label that hands a Service to another proxy, with any value (SEL-4)."""

    proxy_name: _Any = msgspec.field(default=msgspec.UNSET, name="service.kubernetes.io/service-proxy-name")


class ServiceAnnotations(_Wire):
    """The annotations of a Service that lbproxy obeys."""

    algorithm: _Any = msgspec.field(default=msgspec.UNSET, name="lbproxy.io/algorithm")
    mode: _Any = msgspec.field(default=msgspec.UNSET, name="lbproxy.io/mode")
    weights: _Any = msgspec.field(default=msgspec.UNSET, name="lbproxy.io/weights")
    slow_start: _Any = msgspec.field(default=msgspec.UNSET, name="lbproxy.io/slow-start")
    zone_spill_over: _Any = msgspec.field(default=msgspec.UNSET, name="lbproxy.io/zone-spill-over")
    probe: _Any = msgspec.field(default=msgspec.UNSET, name="lbproxy.io/probe")
    outlier_ejection: _Any = msgspec.field(default=msgspec.UNSET, name="lbproxy.io/outlier-ejection")
    probe_settings: _Any = msgspec.field(default=msgspec.UNSET, name="lbproxy.io/probe-settings")


class ServiceMetadata(_Wire):
    """A Service's metadata."""

    name: str
    namespace: str | None = None
    labels: ServiceLabels | None = None
    annotations: ServiceAnnotations | None = None


class ServicePort(_Wire):
    """An entry of a Service's spec.ports."""

    port: int
    name: str | None = None
    protocol: str | None = None
    node_port: int | None = None


class ClientIpConfig(_Wire):
    """sessionAffinityConfig.clientIP."""

    timeout_seconds: int | None = None


class AffinityConfig(_Wire):
    """sessionAffinityConfig."""

    client_ip: ClientIpConfig | None = msgspec.field(default=None, name="clientIP")


class ServiceSpec(_Wire):
    """A Service's spec."""

    type: str | None = None
    cluster_ip: str | None = msgspec.field(default=None, name="clusterIP")
    cluster_ips: list[str] | None = msgspec.field(default=None, name="clusterIPs")
    ip_families: list[str] | None = None
    external_ips: list[str | None] | None = msgspec.field(default=None, name="externalIPs")
    ports: list[ServicePort] | None = None
    session_affinity: str | None = None
    session_affinity_config: AffinityConfig | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str | None = None
    load_balancer_source_ranges: list[str | None] | None = None
    health_check_node_port: int | None = None


class Ingress(_Wire):
    """An entry of status.loadBalancer.ingress."""

    ip: str | None = None
    ip_mode: str | None = None


class LoadBalancer(_Wire):
    """status.loadBalancer."""

    ingress: list[Ingress] | None = None


class ServiceStatus(_Wire):
    """A Service's status."""

    load_balancer: LoadBalancer | None = None


class Service(_Wire):
    """A v1 Service."""

    metadata: ServiceMetadata
    api_version: str | None = None
    kind: str | None = None
    spec: ServiceSpec | None = None
    status: ServiceStatus | None = None


class SliceLabels(_Wire):
    """The labels that file an EndpointSlice (ES-1) or exclude it, with any value (SEL-5)."""

    service_name: str | None = msgspec.field(default=None, name="kubernetes.io/service-name")
    headless: _Any = msgspec.field(default=msgspec.UNSET, name="service.kubernetes.io/headless")


class SliceAnnotations(_Wire):
    """The annotation that says when the change behind a slice happened (NPL-1)."""

    trigger_time: _Any = msgspec.field(default=None, name="endpoints.kubernetes.io/last-change-trigger-time")


class SliceMetadata(_Wire):
    """An EndpointSlice's metadata."""

    name: str
    namespace: str | None = None
    labels: SliceLabels | None = None
    annotations: SliceAnnotations | None = None


class SlicePort(_Wire):
    """An entry of an EndpointSlice's ports."""

    name: str | None = None
    protocol: str | None = None
    port: int | None = None


class Conditions(_Wire):
    """endpoints[].conditions."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Hint(_Wire):
    """A zone or a node that an endpoint is meant for."""

    name: str


class Hints(_Wire):
    """endpoints[].hints."""

    for_zones: list[Hint] | None = None
    for_nodes: list[Hint] | None = None


class Endpoint(_Wire):
    """An entry of an EndpointSlice's endpoints."""

    addresses: list[str] | None = None
    conditions: Conditions | None = None
    node_name: str | None = None
    zone: str | None = None
    hints: Hints | None = None


class EndpointSlice(_Wire):
    """A discovery.k8s.io/v1 EndpointSlice."""

    metadata: SliceMetadata
    api_version: str | None = None
    kind: str | None = None
    address_type: str | None = None
    ports: list[SlicePort] | None = None
    endpoints: list[Endpoint] | None = None


class NodeLabels(_Wire):
    """The labels that say where a Node is, and who is to run there (core/migration.py)."""

    zone: str | None = msgspec.field(default=None, name="topology.kubernetes.io/zone")
    proxy: _Any = msgspec.field(default="", name="lbproxy.io/proxy")


class NodeAnnotations(_Wire):
    """The annotation that tells a Node's agent something (core/migration.py)."""

    migrate: _Any = msgspec.field(default="", name="lbproxy.io/migrate")


class NodeMetadata(_Wire):
    """A Node's metadata."""

    name: str
    labels: NodeLabels | None = None
    annotations: NodeAnnotations | None = None
    deletion_timestamp: _Any = None


class Taint(_Wire):
    """An entry of a Node's spec.taints."""

    key: str | None = None


class NodeSpec(_Wire):
    """A Node's spec."""

    pod_cidr: str | None = msgspec.field(default=None, name="podCIDR")
    pod_cidrs: list[str] | None = msgspec.field(default=None, name="podCIDRs")
    taints: list[Taint] | None = None


class NodeAddress(_Wire):
    """An entry of a Node's status.addresses."""

    type: str | None = None
    address: str | None = None


class NodeStatus(_Wire):
    """A Node's status."""

    addresses: list[NodeAddress] | None = None


class Node(_Wire):
    """A v1 Node."""

    metadata: NodeMetadata
    api_version: str | None = None
    kind: str | None = None
    spec: NodeSpec | None = None
    status: NodeStatus | None = None


class ObjectMeta(_Wire):
    """What names any object, and which version of it this is."""

    name: _Any = None
    namespace: _Any = None
    uid: _Any = None
    resource_version: _Any = None


class Object(_Wire):
    """The head of any object."""

    api_version: _Any = None
    kind: _Any = None
    metadata: ObjectMeta | None = None
