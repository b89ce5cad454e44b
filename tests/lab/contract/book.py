"""The cluster that the scenarios are played in, and how one is written down.

Three nodes: the agent under test runs on n1. Clients are on n1, n2 and outside,
remote backends on n3, whose answers are routed through n1: whoever answers a
connection that n1 has translated must do so by way of n1.

Scenario number N has ClusterIPs, external IPs, balancer IPs and a NodePort of its
own (see `Addresses`), so that all of them are one cluster, and one start of the
agent serves every probe.
"""

import collections.abc
import dataclasses
import typing

from lbproxy.lab import topology

Object = dict[str, typing.Any]
NODES = (
    topology.NodeSpec("n1", ("p1", "p2", "p3", "p4")),
    topology.NodeSpec("n2", ("p1",)),
    topology.NodeSpec("n3", ("p1", "p2")),
)
PLACES = topology.Topology(NODES).places()
FAMILIES = {4: "IPv4", 6: "IPv6"}
BRIDGE = {4: "10.244.1.1", 6: "fd00:244:1::1"}
LOCAL, LOCAL_TOO, REMOTE, REMOTE_TOO = "n1/p2", "n1/p3", "n3/p1", "n3/p2"
SERVERS = (*PLACES.keys() - {"fabric", "n2"},)
TARGET, OTHER_TARGET = 8080, 9090
TCP_PORT, UDP_PORT = 80, 53


class Client(typing.NamedTuple):
    """Where a probe comes from, and how this node's netfilter would see it."""

    place: str
    device: str  # that its packets come in on; empty: they begin on the node
    socket: bool = False  # seen by the socket hook
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.place


POD = Client("n1/p1", "cni0", socket=True)
NODE = Client("n1", "", socket=True)
PACKET_POD = Client("n1/p4", "cni0", name="n1/p4 (packets)")
OTHER_POD = Client("n2/p1", "eth0")
OTHER_NODE = Client("n2", "eth0")
OUTSIDE = Client("outside", "eth0")
CLIENTS = (POD, NODE, PACKET_POD, OTHER_POD, OTHER_NODE, OUTSIDE)
INSIDE = (POD, NODE, PACKET_POD)
SOCKETS = (POD, NODE)


class Port(typing.NamedTuple):
    """A port of a Service and of its backends."""

    name: str = "http"
    protocol: str = "TCP"
    port: int = TCP_PORT
    target: int = TARGET
    node_port: int | None = None  # None: the scenario's own; 0: none

    def on(self, node_port: int) -> "Port":
        return self._replace(node_port=node_port)


HTTP = Port()
DNS = Port("dns", "UDP", UDP_PORT)
BOTH = (HTTP, DNS)


class Endpoint(typing.NamedTuple):
    """An endpoint at a place of the lab; None leaves a condition unsaid."""

    place: str
    ready: bool | None = True
    serving: bool | None = True
    terminating: bool | None = False
    zones: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    node_name: str | None = None  # None: the place's own; "": none

    def at(self, family: int) -> Object:
        """Write it as the API server does."""
        conditions = {"ready": self.ready, "serving": self.serving, "terminating": self.terminating}
        hints: Object = {"forZones": [{"name": zone} for zone in self.zones]} if self.zones else {}
        if self.nodes:
            hints["forNodes"] = [{"name": node} for node in self.nodes]
        node = PLACES[self.place].node if self.node_name is None else self.node_name
        return {
            "addresses": [PLACES[self.place].address(family)],
            "conditions": {name: value for name, value in conditions.items() if value is not None},
            **({"nodeName": node} if node else {}),
            **({"hints": hints} if hints else {}),
        }


class Slice(typing.NamedTuple):
    """An EndpointSlice, once for each family it names."""

    endpoints: collections.abc.Sequence[Endpoint | Object]
    ports: collections.abc.Sequence[Port | Object] = BOTH
    families: tuple[int, ...] = (4, 6)
    labels: dict[str, str] | None = None  # None: those of its service
    namespace: str = "default"
    address_type: str = ""

    def objects(self, service: str, serial: int) -> list[Object]:
        """Write its objects."""
        return [
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": f"{service}-{serial}-{family}",
                    "namespace": self.namespace,
                    "labels": {"kubernetes.io/service-name": service} if self.labels is None else self.labels,
                },
                "addressType": self.address_type or FAMILIES[family],
                "ports": [
                    one
                    if isinstance(one, dict)
                    else {"name": one.name, "protocol": one.protocol, "port": one.target}
                    for one in self.ports
                ],
                "endpoints": [one if isinstance(one, dict) else one.at(family) for one in self.endpoints],
            }
            for family in self.families
        ]


@dataclasses.dataclass(frozen=True)
class Addresses:
    """The addresses of scenario `number`."""

    number: int

    def cluster(self, family: int) -> str:
        return self._address(family, "10.96", "fd00:96")

    def external(self, family: int) -> str:
        return self._address(family, "198.18", "2001:db8:18")

    def balancer(self, family: int) -> str:
        return self._address(family, "198.19", "2001:db8:19")

    def spare(self, family: int) -> str:
        """Return an address that nothing has unless the scenario says so."""
        return self._address(family, "203.0", "2001:db8:20")

    @property
    def node_port(self) -> int:
        return 30000 + self.number

    def both(self, which: str) -> list[str]:
        """Return the addresses of one kind in both families."""
        return [getattr(self, which)(family) for family in FAMILIES]

    def _address(self, family: int, four: str, six: str) -> str:
        if family == 4:
            return f"{four}.{self.number // 250}.{self.number % 250 + 1}"
        return f"{six}::{self.number:x}"


class Target(typing.NamedTuple):
    """What a client dials."""

    label: str
    address: str
    port: int
    protocol: str

    @property
    def family(self) -> int:
        return 6 if ":" in self.address else 4

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.family == 6 else self.address
        return f"{self.label} {host}:{self.port}/{self.protocol}"


@dataclasses.dataclass
class Scenario:
    """Some objects and what is to be dialled; what must come of it is for the oracle to say."""

    name: str
    ids: tuple[str, ...]  # items of the contract
    objects: list[Object]
    targets: list[Target]
    clients: tuple[Client, ...] = CLIENTS
    variants: frozenset[str] = frozenset()  # of the agent's configuration, beside the plain one


class Book:
    """Scenarios, numbered as they are added."""

    def __init__(self) -> None:
        self.scenarios: list[Scenario] = []

    def addresses(self) -> Addresses:
        """Return those of the scenario to be added next."""
        return Addresses(len(self.scenarios) + 1)

    def add(
        self,
        name: str,
        ids: str,
        endpoints: collections.abc.Sequence[Endpoint] = (),
        *,
        slices: collections.abc.Sequence[Slice] | None = None,
        ports: collections.abc.Sequence[Port] = BOTH,
        exposed: bool = True,
        spec: Object | None = None,
        labels: dict[str, str] | None = None,
        ingress: collections.abc.Sequence[Object] | None = None,
        families: tuple[int, ...] = (4, 6),
        more: collections.abc.Sequence[Target] = (),
        targets: collections.abc.Sequence[Target] | None = None,
        thin: bool = True,
        clients: tuple[Client, ...] = CLIENTS,
        variants: str = "",
        extra: collections.abc.Sequence[Object] = (),
    ) -> Scenario:
        """Add a Service with these endpoints; `exposed` ones have addresses of every kind.

        A thin scenario probes each address with one protocol in each family.
        """
        own = self.addresses()
        service = _service(name, own, ports, exposed, families, ingress)
        service["spec"] |= spec or {}
        service["metadata"]["labels"] = labels or {}
        if slices is None:
            slices = [Slice(endpoints, ports, families)] if endpoints else []
        objects = [service, *extra]
        for serial, one in enumerate(slices):
            objects += one.objects(name, serial)
        if targets is None:
            targets = _targets(own, ports, exposed, thin)
        scenario = Scenario(
            name, tuple(ids.split()), objects, [*targets, *more], clients, frozenset(variants.split())
        )
        assert all(one.name != name for one in self.scenarios), name
        self.scenarios.append(scenario)
        return scenario


def _service(
    name: str,
    own: Addresses,
    ports: collections.abc.Sequence[Port],
    exposed: bool,
    families: tuple[int, ...],
    ingress: collections.abc.Sequence[Object] | None,
) -> Object:
    if ingress is None:
        ingress = [{"ip": address, "ipMode": "VIP"} for address in own.both("balancer")] if exposed else []
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "type": "LoadBalancer" if exposed else "ClusterIP",
            "clusterIP": own.cluster(families[0]),
            "clusterIPs": [own.cluster(family) for family in families],
            "ipFamilies": [FAMILIES[family] for family in families],
            "ports": [_service_port(port, own.node_port if exposed else 0) for port in ports],
            **({"externalIPs": own.both("external")} if exposed else {}),
        },
        "status": {"loadBalancer": {"ingress": list(ingress)}},
    }


def _service_port(port: Port, node_port: int) -> Object:
    number = node_port if port.node_port is None else port.node_port
    return {"name": port.name, "protocol": port.protocol, "port": port.port} | (
        {"nodePort": number} if number else {}
    )


def _targets(
    own: Addresses, ports: collections.abc.Sequence[Port], exposed: bool, thin: bool
) -> list[Target]:
    found = []
    for family in FAMILIES:
        for index, port in enumerate(ports):
            if thin and (index + family // 2 + own.number) % len(ports):
                continue
            found.append(Target("ClusterIP", own.cluster(family), port.port, port.protocol))
            if not exposed:
                continue
            number = own.node_port if port.node_port is None else port.node_port
            if number:
                found.append(Target("NodePort", PLACES["n1"].address(family), number, port.protocol))
            found.append(Target("ExternalIP", own.external(family), port.port, port.protocol))
            found.append(Target("LoadBalancer", own.balancer(family), port.port, port.protocol))
    return found
