"""What a kube-proxy on one node knows of a cluster: its service ports with their endpoints. Pure.

Only what the benchmarks' cluster has: ClusterIPs and NodePorts, either traffic policy for both, and
endpoints that are ready. A kube-proxy of two families writes the rules of each by themselves: so there is
one family to a port, and to `Settings`. `ports` reads IPv4, and refuses objects with more than that, rather
than write other rules than kube-proxy would.
"""

import collections.abc
import dataclasses
import typing

Object = dict[str, typing.Any]

_SERVICE_NAME = "kubernetes.io/service-name"
# What changes the rules, and is not modelled.
_REFUSED = ("externalIPs", "loadBalancerSourceRanges", "healthCheckNodePort")


class Endpoint(typing.NamedTuple):
    """A pod that answers: its address, its port, and whether it is on this node."""

    ip: str
    port: int
    is_local: bool

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


@dataclasses.dataclass(frozen=True, slots=True)
class ServicePort:
    """One port of a service. `protocol` is `tcp`, `udp` or `sctp`, `node_port` 0 where there is none."""

    namespace: str
    name: str
    port_name: str
    protocol: str
    cluster_ip: str
    port: int
    node_port: int = 0
    endpoints: tuple[Endpoint, ...] = ()  # as kube-proxy orders them: by `ip:port`, as text
    external_local: bool = False
    internal_local: bool = False

    @property
    def owner(self) -> tuple[str, str]:
        """The service it belongs to: kube-proxy rewrites all of a service's ports when one has changed."""
        return self.namespace, self.name

    @property
    def text(self) -> str:
        """Its name in comments and, in iptables mode, in what chains' names are hashes of."""
        return f"{self.namespace}/{self.name}{':' if self.port_name else ''}{self.port_name}"

    @property
    def local_endpoints(self) -> tuple[Endpoint, ...]:
        """Those of its endpoints that are on this node."""
        return tuple(endpoint for endpoint in self.endpoints if endpoint.is_local)

    @property
    def has_external(self) -> bool:
        """Whether anything outside the cluster may reach it."""
        return self.node_port != 0

    @property
    def uses_cluster(self) -> bool:
        """Whether there is traffic for all endpoints: with policy Local, still that of pods and the node."""
        return bool(self.endpoints) and (not self.internal_local or self.has_external)

    @property
    def uses_local(self) -> bool:
        """Whether there is traffic for this node's endpoints only."""
        return bool(self.local_endpoints) and (
            self.internal_local or (self.external_local and self.has_external)
        )

    @property
    def reachable(self) -> tuple[Endpoint, ...]:
        """The endpoints that this node may send to."""
        return self.endpoints if self.uses_cluster else self.local_endpoints if self.uses_local else ()

    @property
    def answers_inside(self) -> bool:
        """Whether its ClusterIP has endpoints."""
        return bool(self.local_endpoints if self.internal_local else self.endpoints)

    @property
    def answers_outside(self) -> bool:
        """Whether clients outside have endpoints."""
        return bool(self.local_endpoints if self.external_local else self.endpoints)


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How kube-proxy is configured, where it shows in the rules; the defaults are its own."""

    cluster_cidr: str = ""  # how pods are told from others; "": not at all
    node_ip: str = ""  # NodePorts are served there; needed in nftables mode
    service_cidrs: tuple[str, ...] = ("10.96.0.0/12",)  # nftables mode: what else goes there is dropped
    masquerade_bit: int = 14
    family: int = 4  # or 6
    drop_invalid: bool = True  # iptables mode; not where nf_conntrack_tcp_be_liberal is set

    @property
    def mark(self) -> str:
        """The mark of a packet that is to be masqueraded."""
        return f"{1 << self.masquerade_bit:#010x}"


def ports(objects: collections.abc.Iterable[Object], node: str) -> tuple[ServicePort, ...]:
    """Return the service ports of a cluster's objects, as the kube-proxy of this node sees them.

    Objects of other kinds than Service and EndpointSlice are passed over. Raises ValueError
    for a Service that has what is not modelled.
    """
    services: list[Object] = []
    slices: dict[tuple[str, str], list[Object]] = {}
    for each in objects:
        if each["kind"] == "Service":
            services.append(each)
        elif each["kind"] == "EndpointSlice" and each["addressType"] == "IPv4":
            metadata = each["metadata"]
            name = metadata.get("labels", {}).get(_SERVICE_NAME, "")
            slices.setdefault((metadata["namespace"], name), []).append(each)
    found = []
    for service in services:
        metadata, spec = service["metadata"], service["spec"]
        _check(service)
        if spec["clusterIP"] in ("", "None") or spec["type"] == "ExternalName":
            continue
        owner = (metadata["namespace"], metadata["name"])
        for port in spec["ports"]:
            name, protocol = port.get("name", ""), port["protocol"]
            found.append(
                ServicePort(
                    *owner,
                    name,
                    protocol.lower(),
                    spec["clusterIP"],
                    port["port"],
                    port.get("nodePort", 0),
                    _endpoints(slices.get(owner, ()), name, protocol, node),
                    external_local=spec.get("externalTrafficPolicy") == "Local",
                    internal_local=spec.get("internalTrafficPolicy") == "Local",
                )
            )
    return tuple(found)


def _check(service: Object) -> None:
    spec = service["spec"]
    also = [name for name in _REFUSED if spec.get(name)]
    if spec.get("sessionAffinity", "None") != "None":
        also.append("sessionAffinity")
    if service.get("status", {}).get("loadBalancer", {}).get("ingress"):
        also.append("status.loadBalancer")
    if also:
        name = f"{service['metadata']['namespace']}/{service['metadata']['name']}"
        raise ValueError(f"{name}: no rules are known here for {', '.join(also)}")


def _endpoints(
    slices: collections.abc.Iterable[Object], name: str, protocol: str, node: str
) -> tuple[Endpoint, ...]:
    found = set()
    for each in slices:
        served = [(port["port"], port.get("name", ""), port["protocol"]) for port in each["ports"]]
        numbers = [number for number, *rest in served if rest == [name, protocol]]
        for endpoint in each["endpoints"]:
            if not endpoint.get("conditions", {}).get("ready", True):
                continue
            for number in numbers:
                found.add(Endpoint(endpoint["addresses"][0], number, endpoint.get("nodeName") == node))
    return tuple(sorted(found, key=str))


def changed(
    before: collections.abc.Iterable[ServicePort], after: collections.abc.Iterable[ServicePort]
) -> set[tuple[str, str]]:
    """Return the services (namespace, name) that are not the same in both."""
    return {port.owner for port in set(before) ^ set(after)}


def ordered(
    ports: collections.abc.Sequence[ServicePort], order: collections.abc.Sequence[int] | None
) -> collections.abc.Sequence[ServicePort]:
    """Return the ports in this order of their indices, None for as they are.

    kube-proxy walks a Go map, so that each time its rules stand in another order.
    """
    if order is None:
        return ports
    if sorted(order) != list(range(len(ports))):
        raise ValueError("an order has each index once")
    return [ports[index] for index in order]
