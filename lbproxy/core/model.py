"""The cluster as lbproxy sees it: small frozen values, decoded once from API objects.

Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d; ports are host
integers. Values are `msgspec.Struct`s without garbage-collector tracking, since
100,000 endpoints of them are kept and none can be part of a cycle.
"""

import enum
import typing

import msgspec

from lbproxy.core import ejection as ejection_
from lbproxy.core import port_probes
from lbproxy.core import probe as probe_


class Family(enum.IntEnum):
    """An IP family, by its version number."""

    IPV4 = 4
    IPV6 = 6


class Protocol(enum.IntEnum):
    """A balanced transport protocol, by its IP protocol number."""

    TCP = 6
    UDP = 17
    SCTP = 132


class Algorithm(enum.IntEnum):
    """How a backend is chosen for a new flow."""

    RANDOM = 0
    MAGLEV = 1
    LEAST_CONNECTIONS = 2  # of two that are drawn, the one with fewer

    @property
    def label(self) -> str:
        """The name people know it by."""
        return self.name.lower().replace("_", "-")


class PacketMode(enum.StrEnum):
    """How packets reach a backend on another node: masqueraded, or answered directly to the client."""

    SNAT = "snat"
    DSR = "dsr"


class SourceRange(typing.NamedTuple):
    """Addresses that share their first bits; `prefix_length` counts from the start of the 16 bytes."""

    base: bytes
    prefix_length: int


class ObjectName(typing.NamedTuple):
    """An object's place in the API; `namespace` is empty for a Node."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


class ServiceName(ObjectName):
    """What names a Service: the unit of change."""

    __slots__ = ()


class PortKey(typing.NamedTuple):
    """What names one service port of one family: the unit of balancing (SEL-8, DS-3)."""

    service: ServiceName
    port_name: str
    protocol: Protocol
    family: Family

    def __str__(self) -> str:
        port = f":{self.port_name}" if self.port_name else ""
        return f"{self.service}{port}/{self.protocol.name}/IPv{self.family.value}"


class Weights(msgspec.Struct, frozen=True, gc=False):
    """How much of a service's new flows endpoints get, 0 to 1000, by address, node name and zone."""

    addresses: dict[bytes, int]
    nodes: dict[str, int]
    zones: dict[str, int]


class ServicePort(msgspec.Struct, frozen=True, gc=False):
    """One port of a Service; `node_port` is 0 where there is none."""

    name: str
    protocol: Protocol
    port: int
    node_port: int


class Service(msgspec.Struct, frozen=True, gc=False):
    """A Service that is to be balanced; addresses of families it has no ClusterIP of are gone (SEL-9)."""

    name: ServiceName
    cluster_ips: tuple[bytes, ...]
    external_ips: tuple[bytes, ...]
    load_balancer_ips: tuple[bytes, ...]
    ports: tuple[ServicePort, ...]
    affinity_s: int
    internal_local: bool
    external_local: bool
    algorithm: Algorithm | None  # None: the agent's default
    source_ranges: tuple[SourceRange, ...] = ()  # of the families it has; none of a family: no restriction
    health_check_node_port: int = 0  # 0: none is to be served (HC-1)
    mode: PacketMode | None = None  # None: the agent's default
    weights: Weights | None = None  # None: all are equal
    slow_start_s: float = 0.0  # 0: new backends get all at once
    zone_spill_over: float = 0.0  # 0: hints say which zone is preferred
    probes: port_probes.PortProbes | None = None
    probe_mistake: str = ""  # why annotations about probes are not understood, and nothing is probed
    ejection: ejection_.Ejection | None = None  # None: no backend is left out for failing

    def probe_of(self, port_name: str) -> probe_.Probe | None:
        """The probe of a port, whatever its protocol is; None where none is asked for."""
        return self.probes.of(port_name) if self.probes is not None else None


class Location(msgspec.Struct, frozen=True, gc=False):
    """Where an endpoint is and for whom: of many endpoints the same, so that they share one."""

    node_name: str
    zone: str
    zone_hints: tuple[str, ...] = ()
    node_hints: tuple[str, ...] = ()


class Endpoint(msgspec.Struct, frozen=True, gc=False):
    """One address of an EndpointSlice with its conditions resolved to their defaults (EP-1)."""

    address: bytes
    ready: bool
    serving: bool
    terminating: bool
    location: Location
    weight: int = 1


class SlicePort(typing.NamedTuple):
    """A port of an EndpointSlice: matched to service ports by name and protocol (ES-3)."""

    name: str
    protocol: Protocol
    port: int


class EndpointSlice(msgspec.Struct, frozen=True, gc=False):
    """An EndpointSlice of one family, filed under the Service that its label names."""

    namespace: str
    name: str
    service: ServiceName
    family: Family
    ports: tuple[SlicePort, ...]
    endpoints: tuple[Endpoint, ...]
    trigger_time_s: float  # Unix time of the change that caused it; 0 where unknown (NPL-1)


class Node(msgspec.Struct, frozen=True, gc=False):
    """A Node: who it is, where it is and whether load balancers may use it (HZ-2)."""

    name: str
    addresses: tuple[bytes, ...]  # InternalIPs, then ExternalIPs
    zone: str
    pod_cidrs: tuple[str, ...]
    eligible: bool
    deleting: bool = False  # one of the two reasons not to be eligible
    migrate: str = ""  # what its agent is told to do (core/migration.py)
    proxy: str = ""  # who is to run there
