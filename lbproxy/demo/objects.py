"""The demo's Kubernetes objects as plain mappings, and the files they are written to."""

import collections.abc
import pathlib
import typing

import yaml

Object = dict[str, typing.Any]
Port = tuple[str, str, int]  # name, protocol, number

NAMESPACE = "demo"
_FAMILIES = {4: "IPv4", 6: "IPv6"}


def node(name: str, addresses: collections.abc.Iterable[str]) -> Object:
    """Return a Node with these InternalIPs."""
    status = {"addresses": [{"type": "InternalIP", "address": address} for address in addresses]}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": status}


def service(
    name: str,
    cluster_ips: collections.abc.Mapping[int, str],
    ports: collections.abc.Iterable[Port],
    node_port: int | None = None,
) -> Object:
    """Return a Service with one ClusterIP a family, and a NodePort on every port if one is given."""
    opened = [
        {"name": port_name, "protocol": protocol, "port": number}
        | ({} if node_port is None else {"nodePort": node_port})
        for port_name, protocol, number in ports
    ]
    spec = {
        "type": "ClusterIP" if node_port is None else "NodePort",
        "clusterIP": next(iter(cluster_ips.values())),
        "clusterIPs": list(cluster_ips.values()),
        "ipFamilies": [_FAMILIES[family] for family in cluster_ips],
        "ports": opened,
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(name), "spec": spec}


def endpoint_slice(
    service_name: str,
    family: int,
    ports: collections.abc.Iterable[Port],
    endpoints: collections.abc.Iterable[tuple[str, str]],
) -> Object:
    """Return a slice of one family with (address, node) as its ready endpoints."""
    kind = _FAMILIES[family]
    metadata = _metadata(f"{service_name}-{kind.lower()}")
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": metadata | {"labels": {"kubernetes.io/service-name": service_name}},
        "addressType": kind,
        "ports": [
            {"name": port_name, "protocol": protocol, "port": number} for port_name, protocol, number in ports
        ],
        "endpoints": [
            {"addresses": [address], "nodeName": node_name, "conditions": {"ready": True}}
            for address, node_name in endpoints
        ],
    }


def write(path: pathlib.Path, objects: collections.abc.Iterable[Object]) -> None:
    """Put these objects into a file at once, whatever it held before."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(yaml.safe_dump_all(objects, sort_keys=False), encoding="utf-8")
    draft.replace(path)


def _metadata(name: str) -> Object:
    return {"name": name, "namespace": NAMESPACE}
