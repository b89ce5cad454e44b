"""A small cluster as data: which namespaces there are, their addresses, and the `ip` commands that join them.

Pure: nothing here touches the system. A *place* is one network namespace: a
node (`n1`), a pod (`n1/p1`), the `outside` client, or the `fabric` that joins
nodes as one Ethernet segment.
"""

import collections.abc
import dataclasses

FABRIC = "fabric"
OUTSIDE = "outside"
MAX_NODES = 99
MAX_PODS = 200


@dataclasses.dataclass(frozen=True, slots=True)
class NodeSpec:
    """A node to build, with the names of its pods."""

    name: str
    pods: collections.abc.Sequence[str] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A network namespace of the lab; an address is "" where the lab lacks that family."""

    name: str
    node: str  # the node it is or is on; "" for outside and fabric
    ipv4: str
    ipv6: str

    @property
    def is_pod(self) -> bool:
        """Tell whether this is a pod."""
        return "/" in self.name

    def address(self, family: int) -> str:
        """Return its address of family 4 or 6."""
        return self.ipv4 if family == 4 else self.ipv6

    @property
    def addresses(self) -> tuple[str, ...]:
        """List its addresses, IPv4 first."""
        return tuple(address for address in (self.ipv4, self.ipv6) if address)


@dataclasses.dataclass(frozen=True, slots=True)
class Subnet:
    """A network of one family: the nodes' segment, or the pods of one node."""

    family: int
    stem: str
    prefix: int

    def host(self, number: int) -> str:
        """Return the address of host `number`."""
        return f"{self.stem}{number}" if self.family == 4 else f"{self.stem}{number:x}"

    @property
    def cidr(self) -> str:
        """Return the network in prefix notation."""
        return f"{self.host(0) if self.family == 4 else self.stem}/{self.prefix}"


SEGMENT = {4: Subnet(4, "172.18.0.", 24), 6: Subnet(6, "fd00:172:18::", 64)}
OUTSIDE_HOST = 100
FABRIC_HOST = 254
EVERYWHERE = {4: "0.0.0.0/0", 6: "::/0"}


def pod_subnet(family: int, node_number: int) -> Subnet:
    """Return the pod network of the node with this number (from 1)."""
    if family == 4:
        return Subnet(4, f"10.244.{node_number}.", 24)
    return Subnet(6, f"fd00:244:{node_number:x}::", 64)


def uniform(nodes: int = 2, pods: int = 3) -> tuple[NodeSpec, ...]:
    """Describe `nodes` nodes named n1, n2, … with `pods` pods each, named p1, p2, …."""
    names = tuple(f"p{number}" for number in range(1, pods + 1))
    return tuple(NodeSpec(f"n{number}", names) for number in range(1, nodes + 1))


@dataclasses.dataclass(frozen=True, slots=True)
class Topology:
    """What a lab consists of."""

    nodes: tuple[NodeSpec, ...]
    families: tuple[int, ...] = (4, 6)
    outside: bool = True

    def __post_init__(self) -> None:
        names = [node.name for node in self.nodes]
        if len(names) > MAX_NODES or any(len(node.pods) > MAX_PODS for node in self.nodes):
            raise ValueError(f"a lab has at most {MAX_NODES} nodes of {MAX_PODS} pods")
        for group in (names, *(list(node.pods) for node in self.nodes)):
            if len(set(group)) != len(group) or any("/" in name or not name for name in group):
                raise ValueError(f"names must be unique, not empty and without a slash: {group}")
        if {FABRIC, OUTSIDE} & set(names):
            raise ValueError(f"{FABRIC} and {OUTSIDE} are not names for nodes")
        if not self.families or not set(self.families) <= {4, 6}:
            raise ValueError("families are 4, 6 or both")

    def places(self) -> dict[str, Place]:
        """Return every namespace by its name, the fabric first and pods after their node."""
        found = [self._place(FABRIC, "", SEGMENT, FABRIC_HOST)]
        for number, node in enumerate(self.nodes, 1):
            found.append(self._place(node.name, node.name, SEGMENT, number))
            subnets = {family: pod_subnet(family, number) for family in (4, 6)}
            for host, pod in enumerate(node.pods, 2):
                found.append(self._place(f"{node.name}/{pod}", node.name, subnets, host))
        if self.outside:
            found.append(self._place(OUTSIDE, "", SEGMENT, OUTSIDE_HOST))
        return {place.name: place for place in found}

    def _place(self, name: str, node: str, subnets: dict[int, Subnet], host: int) -> Place:
        ipv4, ipv6 = (subnets[family].host(host) if family in self.families else "" for family in (4, 6))
        return Place(name, node, ipv4, ipv6)

    def commands(self, netns: dict[str, str]) -> list[tuple[str, list[str]]]:
        """Return (place, lines for `ip -batch` in it), in the order to run them.

        `netns` gives the name of each place's namespace. A link's far end is made in
        its final namespace, so nothing ever shows in the one the lab is built from.
        """
        batches = [(FABRIC, self._fabric(netns))]
        for number, node in enumerate(self.nodes, 1):
            batches.append((node.name, self._node(number, node, netns)))
            for host, pod in enumerate(node.pods, 2):
                batches.append((f"{node.name}/{pod}", self._pod(number, host)))
        if self.outside:
            batches.append((OUTSIDE, self._on_segment(OUTSIDE_HOST)))
        return batches

    def _fabric(self, netns: dict[str, str]) -> list[str]:
        lines = ["link set lo up", *_bridge("br0")]
        for number, node in enumerate(self.nodes, 1):
            lines += _port(f"node{number}", "br0", netns[node.name])
        if self.outside:
            lines += _port(OUTSIDE, "br0", netns[OUTSIDE])
        # Silence from both families: without a route, only IPv6 would send an error back.
        lines += [f"route add blackhole {EVERYWHERE[family]}" for family in self.families]
        return lines + self._addresses("br0", SEGMENT, FABRIC_HOST)

    def _node(self, number: int, node: NodeSpec, netns: dict[str, str]) -> list[str]:
        lines = [*self._on_segment(number), *_bridge("cni0")]
        for host, pod in enumerate(node.pods, 2):
            lines += _port(f"pod{host}", "cni0", netns[f"{node.name}/{pod}"])
        for family in self.families:
            lines += self._addresses("cni0", {family: pod_subnet(family, number)}, 1)
            lines += [
                f"route add {pod_subnet(family, other).cidr} via {SEGMENT[family].host(other)} dev eth0"
                for other in range(1, len(self.nodes) + 1)
                if other != number
            ]
        return lines

    def _pod(self, number: int, host: int) -> list[str]:
        lines = ["link set lo up", "link set eth0 up"]
        for family in self.families:
            subnet = pod_subnet(family, number)
            lines += self._addresses("eth0", {family: subnet}, host)
            lines.append(f"route add {EVERYWHERE[family]} via {subnet.host(1)} dev eth0")
        return lines

    def _on_segment(self, host: int) -> list[str]:
        # The default route leads to the fabric, which forwards nothing: a connect to a
        # service address needs a route to exist, even though no packet may take it.
        lines = ["link set lo up", "link set eth0 up", *self._addresses("eth0", SEGMENT, host)]
        for family in self.families:
            lines.append(f"route add {EVERYWHERE[family]} via {SEGMENT[family].host(FABRIC_HOST)} dev eth0")
        return lines

    def _addresses(self, device: str, subnets: dict[int, Subnet], host: int) -> list[str]:
        return [
            f"address add {subnet.host(host)}/{subnet.prefix} dev {device}{' nodad' if family == 6 else ''}"
            for family, subnet in subnets.items()
            if family in self.families
        ]


def _bridge(name: str) -> list[str]:
    # With multicast snooping a bridge may swallow neighbour solicitations until it has heard a listener.
    return [
        f"link add {name} type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
        f"link set {name} up",
    ]


def _port(name: str, bridge: str, peer_netns: str) -> list[str]:
    return [
        f"link add {name} type veth peer name eth0 netns {peer_netns}",
        f"link set {name} master {bridge} up",
    ]
