"""API objects for labs: Services by number and slices of a lab's own places, in both families.

Service number N has the ClusterIPs 10.96.0.N and fd00:96::N; its ports are `http`
(TCP 80) and `dns` (UDP 53), both at port 8080 of the backends.
"""

import collections.abc
import typing

from lbproxy.lab import topology

Object = dict[str, typing.Any]
FAMILIES = {4: "IPv4", 6: "IPv6"}
TARGET_PORT = 8080
TCP_PORT = 80
UDP_PORT = 53


class Port(typing.NamedTuple):
    """A service port and the port of its backends."""

    name: str = "http"
    protocol: str = "TCP"
    port: int = TCP_PORT
    node_port: int = 0
    target: int = TARGET_PORT

    def on_node_port(self, number: int) -> "Port":
        return self._replace(node_port=number)


HTTP = Port()
DNS = Port("dns", "UDP", UDP_PORT)
BOTH = (HTTP, DNS)


class Member(typing.NamedTuple):
    """An endpoint: a place of the lab, and how it fares."""

    place: topology.Place
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    zones: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()

    def at(self, family: int) -> Object:
        hints = {"forZones": [{"name": zone} for zone in self.zones]} if self.zones else {}
        if self.nodes:
            hints["forNodes"] = [{"name": node} for node in self.nodes]
        return {
            "addresses": [self.place.address(family)],
            "conditions": {"ready": self.ready, "serving": self.serving, "terminating": self.terminating},
            "nodeName": self.place.node,
            **({"hints": hints} if hints else {}),
        }


def cluster_ip(number: int, family: int = 4) -> str:
    """Return the ClusterIP of service number `number` (1 to 9999 in IPv6 digits that are decimal)."""
    return f"10.96.{number // 256}.{number % 256}" if family == 4 else f"fd00:96::{number}"


def service(
    name: str,
    number: int,
    *,
    ports: collections.abc.Sequence[Port] = BOTH,
    annotations: dict[str, str] | None = None,
    load_balancer: collections.abc.Sequence[Object] = (),
    **spec: typing.Any,
) -> Object:
    """Describe a Service; `spec` is added to its spec, `load_balancer` are ingress entries."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default", "annotations": annotations or {}},
        "spec": {
            "type": "NodePort" if any(port.node_port for port in ports) else "ClusterIP",
            "clusterIP": cluster_ip(number),
            "clusterIPs": [cluster_ip(number, family) for family in FAMILIES],
            "ipFamilies": list(FAMILIES.values()),
            "ports": [
                {"name": port.name, "protocol": port.protocol, "port": port.port}
                | ({"nodePort": port.node_port} if port.node_port else {})
                for port in ports
            ],
            **spec,
        },
        "status": {"loadBalancer": {"ingress": list(load_balancer)}},
    }


def affinity(timeout_s: int) -> Object:
    """Return the fields of a spec that ask for session affinity."""
    return {
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": timeout_s}},
    }


def slices(
    service_name: str,
    members: collections.abc.Iterable[topology.Place | Member],
    *,
    ports: collections.abc.Sequence[Port] = BOTH,
) -> list[Object]:
    """Describe one EndpointSlice of each family; a bare place is a ready endpoint."""
    listed = [Member(member) if isinstance(member, topology.Place) else member for member in members]
    return [
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"{service_name}-{family}",
                "namespace": "default",
                "labels": {"kubernetes.io/service-name": service_name},
            },
            "addressType": text,
            "ports": [{"name": port.name, "protocol": port.protocol, "port": port.target} for port in ports],
            "endpoints": [member.at(family) for member in listed],
        }
        for family, text in FAMILIES.items()
    ]


def node(name: str, *addresses: str, zone: str = "") -> Object:
    """Describe a Node."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone} if zone else {}},
        "status": {"addresses": [{"type": "InternalIP", "address": address} for address in addresses]},
    }
