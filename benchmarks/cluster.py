"""The objects of a cluster of any size, as an API server sends them: labels, managed fields and all.

Decoding is a good part of an agent's work, and most of an object is what a proxy
does not read: leaving that out would flatter it. Pure; the same number makes the
same object.
"""

import collections.abc
import dataclasses
import typing

Object = dict[str, typing.Any]

ENDPOINTS = 4
NODES = 100
NAMESPACES = 50
MAX_FILLERS = 1 << 19  # services, before addresses repeat
MEASURED_IP = "10.111.255.254"
MEASURED_PORT = 80
NODE_PORTS = {"local": 30080, "masqueraded": 30081, "remote": 30082, "dsr": 30083}
MEASURED = ("zz-measured", "web")  # the last in a list, which is sorted by namespace and name
# Traffic goes to each of so many in turn, since to some proxies it matters where in a list a service stands.
MEASURED_COPIES = 8
_TIME = "2025-01-01T00:00:00Z"
_TRIGGER = "endpoints.kubernetes.io/last-change-trigger-time"


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a service's endpoints are: addresses, and the node each is on."""

    addresses: tuple[str, ...]
    nodes: tuple[str, ...]


def copies(services: int) -> int:
    """Return how many of so many services are measured."""
    return min(services, MEASURED_COPIES)


def fillers(services: int) -> int:
    """Return how many of so many services get no traffic."""
    return services - copies(services)


def measured_ip(copy: int) -> str:
    """Return the ClusterIP of a measured service (from 0, which is `MEASURED`)."""
    return f"10.111.255.{254 - copy}"


def objects(
    services: int,
    node: str,
    node_ip: str,
    measured: Place,
    port: int,
    more: collections.abc.Iterable[Object] = (),
) -> collections.abc.Iterator[Object]:
    """Yield a cluster: this node, services without traffic, `more`, and the measured ones.

    The measured services have TCP and UDP on `measured_ip`:`MEASURED_PORT`, and answer on `port`.
    """
    if not 1 <= services <= MAX_FILLERS:
        raise ValueError(f"between 1 and {MAX_FILLERS} services, not {services}")
    yield node_object(node, node_ip)
    for number in range(fillers(services)):
        namespace, name = filler_name(number)
        yield service(number, namespace, name, _cluster_ip(number), ("TCP",), 80, 8080)
        yield endpoint_slice(number, namespace, name, filler_place(number), ("TCP",), 8080)
    yield from more
    for copy in reversed(range(copies(services))):
        namespace, name = measured_name(copy)
        number = MAX_FILLERS + copy
        yield service(number, namespace, name, measured_ip(copy), ("TCP", "UDP"), MEASURED_PORT, port)
        yield endpoint_slice(number, namespace, name, measured, ("TCP", "UDP"), port)


def measured_name(copy: int) -> tuple[str, str]:
    """Return namespace and name of a measured service (from 0, which is `MEASURED`)."""
    return ("measured", f"web-{copy}") if copy else MEASURED


def remote_ip(copy: int) -> str:
    """Return the ClusterIP of a service with its endpoints elsewhere (from 0)."""
    return f"10.111.254.{254 - copy}"


def remote_name(copy: int) -> tuple[str, str]:
    """Return namespace and name of that service."""
    return "measured", f"remote-{copy}"


def remote_objects(services: int, place: Place, port: int) -> collections.abc.Iterator[Object]:
    """Yield services with TCP on `remote_ip`:`MEASURED_PORT`, as many as are measured."""
    for copy in range(copies(services)):
        namespace, name = remote_name(copy)
        number = MAX_FILLERS + MEASURED_COPIES + copy
        yield service(number, namespace, name, remote_ip(copy), ("TCP",), MEASURED_PORT, port)
        yield endpoint_slice(number, namespace, name, place, ("TCP",), port)


def node_port_objects(
    here: Place, elsewhere: Place, by_dsr: Place, port: int
) -> collections.abc.Iterator[Object]:
    """Yield the services of `NODE_PORTS`: two of pods here, two of pods of other nodes."""
    places = {"local": here, "masqueraded": here, "remote": elsewhere, "dsr": by_dsr}
    for number, (name, node_port) in enumerate(NODE_PORTS.items(), MAX_FILLERS + 2 * MEASURED_COPIES):
        made = service(number, "node-ports", name, f"10.111.0.{number & 255}", ("TCP",), 80, port)
        made["spec"]["type"] = "NodePort"
        made["spec"]["ports"][0]["nodePort"] = node_port
        made["spec"]["externalTrafficPolicy"] = "Local" if name == "local" else "Cluster"
        if name == "dsr":
            made["metadata"]["annotations"]["lbproxy.io/mode"] = "dsr"
        yield made
        yield endpoint_slice(number, "node-ports", name, places[name], ("TCP",), port)


def filler_name(number: int) -> tuple[str, str]:
    """Return namespace and name of the service with this number (from 0)."""
    return f"team-{number % NAMESPACES:02}", f"service-{number:06}"


def filler_place(number: int, generation: int = 0) -> Place:
    """Return where that service's endpoints are; with each generation one of them has moved."""
    moved = generation % ENDPOINTS
    rounds = generation // ENDPOINTS
    moves = [rounds + (index < moved) for index in range(ENDPOINTS)]
    # 21 bits of place and two of move, in 10.128.0.0/9.
    hosts = [(number * ENDPOINTS + index) | (move & 3) << 21 for index, move in enumerate(moves)]
    return Place(
        tuple(f"10.{128 + (host >> 16)}.{host >> 8 & 255}.{host & 255}" for host in hosts),
        tuple(f"node-{(number + index) % NODES:03}" for index in range(ENDPOINTS)),
    )


def _cluster_ip(number: int) -> str:
    return f"10.{96 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"


def slice_name(service_name: str) -> str:
    """Return the name of a service's one EndpointSlice."""
    return f"{service_name}-x7k2p"


def move_patch(place: Place, generation: int) -> Object:
    """Return the merge patch with which an EndpointSlice controller moves a service's endpoints."""
    return {
        "metadata": {
            "generation": generation + 1,
            # A change of a pod long ago: this clock is not the one that latency is measured with.
            "annotations": {_TRIGGER: _TIME},
        },
        "endpoints": _endpoints("moved", place),
    }


def service(
    number: int,
    namespace: str,
    name: str,
    cluster_ip: str,
    protocols: collections.abc.Sequence[str],
    port: int,
    target_port: int,
) -> Object:
    """Return a ClusterIP Service that was applied with kubectl."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"00000000-0000-4000-8000-{number:012}",
            "creationTimestamp": _TIME,
            "labels": _labels(name),
            "annotations": {"meta.helm.sh/release-name": name, "meta.helm.sh/release-namespace": namespace},
            "managedFields": _managed_fields("helm", "v1", _FIELDS_OF_SERVICE),
        },
        "spec": {
            "ports": [
                {
                    "name": f"{protocol.lower()}-{port}", "protocol": protocol, "port": port,
                    "targetPort": target_port,
                }
                for protocol in protocols
            ],
            "selector": {"app.kubernetes.io/name": name},
            "clusterIP": cluster_ip,
            "clusterIPs": [cluster_ip],
            "type": "ClusterIP",
            "sessionAffinity": "None",
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster",
        },
        "status": {"loadBalancer": {}},
    }  # fmt: skip


def endpoint_slice(
    number: int, namespace: str, name: str, place: Place, protocols: collections.abc.Sequence[str], port: int
) -> Object:
    """Return the EndpointSlice of that Service, as its controller writes it."""
    service_uid = f"00000000-0000-4000-8000-{number:012}"
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": slice_name(name),
            "generateName": f"{name}-",
            "namespace": namespace,
            "uid": f"00000000-0000-4000-9000-{number:012}",
            "generation": 1,
            "creationTimestamp": _TIME,
            "labels": {
                **_labels(name),
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                "kubernetes.io/service-name": name,
            },
            "annotations": {_TRIGGER: _TIME},
            "ownerReferences": [
                {
                    "apiVersion": "v1", "kind": "Service", "name": name, "uid": service_uid,
                    "controller": True, "blockOwnerDeletion": True,
                }
            ],
            "managedFields": _managed_fields(
                "kube-controller-manager", "discovery.k8s.io/v1", _FIELDS_OF_SLICE
            ),
        },
        "addressType": "IPv4",
        "endpoints": _endpoints(name, place),
        "ports": [
            {"name": f"{protocol.lower()}-80", "protocol": protocol, "port": port} for protocol in protocols
        ],
    }  # fmt: skip


def node_object(name: str, ip: str) -> Object:
    """Return this node, with the conditions and images that make real ones long."""
    conditions = ("MemoryPressure", "DiskPressure", "PIDPressure", "Ready")
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "uid": "00000000-0000-4000-a000-000000000000",
            "creationTimestamp": _TIME,
            "labels": {
                "kubernetes.io/hostname": name,
                "topology.kubernetes.io/zone": "zone-0",
                "kubernetes.io/os": "linux",
            },
        },
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]},
        "status": {
            "addresses": [
                {"type": "InternalIP", "address": ip}, {"type": "Hostname", "address": name}
            ],
            "conditions": [
                {
                    "type": kind, "status": str(kind == "Ready"),
                    "lastHeartbeatTime": _TIME, "lastTransitionTime": _TIME,
                }
                for kind in conditions
            ],
            "images": [
                {"names": [f"registry.example/team/image-{index}:1.0"], "sizeBytes": 100_000_000}
                for index in range(50)
            ],
        },
    }  # fmt: skip


def _endpoints(name: str, place: Place) -> list[Object]:
    return [
        {
            "addresses": [address],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "nodeName": node,
            "zone": f"zone-{index % 3}",
            "targetRef": {
                "kind": "Pod",
                "name": f"{name}-6d4cf56db6-{index:05}",
                "namespace": "default",
                "uid": f"00000000-0000-4000-b000-{index:012}",
            },
        }
        for index, (address, node) in enumerate(zip(place.addresses, place.nodes, strict=True))
    ]


def _labels(name: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": name,
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/part-of": "shop",
        "app.kubernetes.io/managed-by": "Helm",
    }


_LABEL_FIELDS: Object = {
    "f:labels": {
        ".": {},
        "f:app.kubernetes.io/instance": {},
        "f:app.kubernetes.io/managed-by": {},
        "f:app.kubernetes.io/name": {},
        "f:app.kubernetes.io/part-of": {},
    }
}
_FIELDS_OF_SERVICE: Object = {
    "f:metadata": {"f:annotations": {".": {}, "f:meta.helm.sh/release-name": {}}, **_LABEL_FIELDS},
    "f:spec": {
        "f:internalTrafficPolicy": {},
        "f:ports": {
            ".": {},
            'k:{"port":80,"protocol":"TCP"}': {
                ".": {}, "f:name": {}, "f:port": {}, "f:protocol": {}, "f:targetPort": {},
            },
        },
        "f:selector": {}, "f:sessionAffinity": {}, "f:type": {},
    },
}  # fmt: skip
_FIELDS_OF_SLICE: Object = {
    "f:addressType": {},
    "f:endpoints": {},
    "f:metadata": {
        "f:annotations": {".": {}, f"f:{_TRIGGER}": {}},
        "f:generateName": {},
        **_LABEL_FIELDS,
        "f:ownerReferences": {".": {}, 'k:{"uid":"00000000-0000-4000-8000-000000000000"}': {}},
    },
    "f:ports": {},
}


def _managed_fields(manager: str, api_version: str, fields: Object) -> list[Object]:
    return [
        {
            "manager": manager,
            "operation": "Update",
            "apiVersion": api_version,
            "time": _TIME,
            "fieldsType": "FieldsV1",
            "fieldsV1": fields,
        }
    ]
