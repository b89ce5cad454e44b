"""What the kernel has to know of the node: addresses, who is a pod, how flows are masqueraded and kept."""

import typing

from lbproxy import abi
from lbproxy.core import addresses, model, tables

_NODE_ADDRESS: typing.Final = abi.LAYOUTS["node_address"]
TICK_S: typing.Final = (1 << abi.constant("TICK_SHIFT")) / 1e9
_LONGEST_TICKS: typing.Final = 2**31 - 1  # differences of ticks are signed
_STRANGERS_FACTOR: typing.Final = abi.constant("STRANGERS_FACTOR")
_STRANGERS_SHIFT: typing.Final = abi.constant("STRANGERS_SHIFT")
_FIRST_PORT, _LAST_PORT = 1024, 65535
NODE_PORTS: typing.Final = (30000, 32767)


class Identity(typing.NamedTuple):
    """Which addresses the node was configured to have: these come before those of the Node object."""

    bind_address: bytes | None = None
    node_ips: tuple[bytes, ...] = ()

    def addresses(self, node: model.Node | None) -> tuple[bytes, ...]:
        """Return the node's addresses, of which the first of each family is its primary one (NODE-2, NODE-3).

        `node_ips` replace what the Node says.
        """
        first = () if self.bind_address is None else (self.bind_address,)
        return (*first, *(self.node_ips or (node.addresses if node else ())))


FROM_NODE: typing.Final = Identity()


class NodeFacts(typing.NamedTuple):
    """What is known of this node; addresses are 16 bytes, `host_netns` a netns cookie."""

    local: tuple[bytes, ...]
    node_addresses: tuple[bytes, ...]
    host_netns: int
    pod_cidrs: tuple[str, ...] = ()  # the Node's


class Ports(typing.NamedTuple):
    """Consecutive ports, `size` of them."""

    first: int
    size: int


class Timeouts(typing.NamedTuple):
    """How long flows may be idle, in seconds."""

    tcp_new_s: float = 60.0
    tcp_established_s: float = 86400.0
    tcp_half_closed_s: float = 3600.0  # one FIN seen
    tcp_closed_s: float = 10.0
    udp_new_s: float = 30.0
    udp_stream_s: float = 120.0
    sctp_new_s: float = 30.0
    sctp_established_s: float = 210.0


DEFAULT_TIMEOUTS: typing.Final = Timeouts()


class PacketRules(typing.NamedTuple):
    """How the packet path tells pods from others, whom it masquerades and how long flows are kept.

    Pods are those whose address is in `pod_cidrs`, of which the first of each family
    counts (DET-1); with None in the Node's own podCIDRs (DET-2); with `pods_by_device`
    those that come in through certain devices, of either family (DET-3).
    """

    masquerade_all: bool = False
    keep_client: bool = False
    pod_cidrs: tuple[str, ...] | None = ()
    pods_by_device: bool = False
    ports: Ports = Ports(0, 0)
    timeouts: Timeouts = DEFAULT_TIMEOUTS


NO_RULES: typing.Final = PacketRules()


class NodeRows(typing.NamedTuple):
    """What the tables should hold; `dropped` local addresses found no room.

    `unserved` are families of which the node has addresses, but none for NodePorts.
    """

    settings: bytes
    addresses: dict[bytes, bytes]
    dropped: int
    unserved: tuple[model.Family, ...] = ()


def node_rows(
    facts: NodeFacts,
    cidrs: typing.Sequence[str],
    localhost_node_ports: bool,
    room: int,
    rules: PacketRules = NO_RULES,
) -> NodeRows:
    """Plan the node's rows; `cidrs` is kube-proxy's nodePortAddresses (NP-3 to NP-7).

    A node may have more addresses than there is room for, since kube-proxy's IPVS
    mode makes every ClusterIP a local one. Those that serve NodePorts come first,
    the Node's own before the others.
    """
    chosen = addresses.nodeport_addresses(cidrs, facts.local, facts.node_addresses)
    serving, own = set(chosen.addresses), set(facts.node_addresses)
    ranked = sorted(dict.fromkeys(facts.local), key=lambda one: (one not in serving, one not in own))
    rows = {
        address: _NODE_ADDRESS.pack(tables.NodeAddressFlag.NODE_PORTS if address in serving else 0)
        for address in ranked[:room]
    }
    settings = _settings(facts, rules, localhost_node_ports and chosen.loopback)
    settings = settings._replace(strangers=strangers(rows))
    unserved = _unserved(facts, chosen, localhost_node_ports)
    return NodeRows(settings.pack(), rows, max(0, len(ranked) - room), unserved)


def _unserved(
    facts: NodeFacts, chosen: addresses.NodePortAddresses, localhost_node_ports: bool
) -> tuple[model.Family, ...]:
    useful = (one for one in facts.local if not addresses.is_loopback(one) and not _is_link_local(one))
    served = {addresses.family_of(address) for address in chosen.addresses}
    if chosen.loopback and localhost_node_ports:
        served.add(model.Family.IPV4)
    return tuple(sorted({addresses.family_of(address) for address in useful} - served))


def node_writes(want: NodeRows, have: typing.Mapping[bytes, bytes]) -> list[tables.Write]:
    """The writes that lead to what is wanted; `have` are the rows of the node_addresses table."""
    writes: list[tables.Write] = [tables.Put(tables.Table.SETTINGS, tables.row_key(0), want.settings)]
    # Nothing points at these rows, so what goes may make room for what comes.
    writes += [
        tables.Delete(tables.Table.NODE_ADDRESSES, address) for address in have.keys() - want.addresses.keys()
    ]
    writes += [
        tables.Put(tables.Table.NODE_ADDRESSES, address, row)
        for address, row in want.addresses.items()
        if have.get(address) != row
    ]
    return writes


def strangers(own: typing.Iterable[bytes]) -> bytes:
    """The bits that tell most addresses from these without a look-up (see bpf/abi.h)."""
    bits = bytearray(b"\xff" * len(tables.NO_SETTINGS.strangers))
    for address in own:
        word = int.from_bytes(address[-4:], tables.BYTE_ORDER) * _STRANGERS_FACTOR & 0xFFFFFFFF
        place = word >> _STRANGERS_SHIFT
        bits[place >> 3] &= ~(1 << (place & 7))
    return bytes(bits)


def masquerade_ports(local_range: tuple[int, int], node_ports: tuple[int, int] = NODE_PORTS) -> Ports:
    """The most ports in a row that are neither handed out to local sockets nor NodePorts.

    61000 to 65535, as Linux has it by default, where nothing is left.
    """
    free: list[Ports] = []
    at = _FIRST_PORT
    for first, last in (*sorted((local_range, node_ports)), (_LAST_PORT + 1, _LAST_PORT + 1)):
        if first > at:
            free.append(Ports(at, min(first, _LAST_PORT + 1) - at))
        at = max(at, last + 1)
    return max(free, key=lambda ports: ports.size, default=Ports(61000, 4536))


def ticks(duration_s: float) -> int:
    """A time in ticks of the programs' clock: at least so long, and at least one."""
    return min(max(1, -int(-duration_s // TICK_S)), _LONGEST_TICKS)


def _settings(facts: NodeFacts, rules: PacketRules, localhost_node_ports: bool) -> tables.Settings:
    flags = tables.Setting(0)
    if localhost_node_ports:
        flags |= tables.Setting.LOCALHOST_NODE_PORTS
    if rules.masquerade_all:
        flags |= tables.Setting.MASQUERADE_ALL
    if rules.keep_client:
        flags |= tables.Setting.KEEP_CLIENT
    if rules.pods_by_device:
        flags |= tables.Setting.PODS_BY_DEVICE
    pods = _pod_networks(facts, rules)
    if model.Family.IPV4 in pods:
        flags |= tables.Setting.PODS_BY_IPV4
    if model.Family.IPV6 in pods:
        flags |= tables.Setting.PODS_BY_IPV6
    own = _masquerade_addresses(facts)
    return tables.Settings(
        facts.host_netns,
        flags,
        rules.ports.first,
        rules.ports.size,
        tables.NO_SETTINGS.strangers,
        *_addr_and_mask(pods.get(model.Family.IPV4)),
        *_addr_and_mask(pods.get(model.Family.IPV6)),
        own.get(model.Family.IPV4, tables.NO_ADDRESS),
        own.get(model.Family.IPV6, tables.NO_ADDRESS),
        *map(ticks, rules.timeouts),
    )


def _pod_networks(facts: NodeFacts, rules: PacketRules) -> dict[model.Family, addresses.Network]:
    """The network of each family whose addresses are pods' (DET-1, DET-2); none where devices tell."""
    if rules.pods_by_device:
        return {}
    found: dict[model.Family, addresses.Network] = {}
    for cidr in facts.pod_cidrs if rules.pod_cidrs is None else rules.pod_cidrs:
        network = addresses.parse_cidr(cidr)
        if network is not None:
            found.setdefault(network.family, network)
    return found


def _masquerade_addresses(facts: NodeFacts) -> dict[model.Family, bytes]:
    """An address of each family that answers come back to: so it must be on a device of this node."""
    local = set(facts.local)
    on_devices = [address for address in facts.node_addresses if address in local]
    usable = [address for address in facts.local if not _is_link_local(address)]
    return {
        addresses.family_of(address): address
        for address in addresses.primary_addresses((*on_devices, *usable))
    }


def _is_link_local(address: bytes) -> bool:
    return address in _LINK_LOCAL_IPV4 or address in _LINK_LOCAL_IPV6


_LINK_LOCAL_IPV4: typing.Final = addresses.Network(
    addresses.IPV4_PREFIX + bytes([169, 254, 0, 0]), 112, model.Family.IPV4
)
_LINK_LOCAL_IPV6: typing.Final = addresses.Network(b"\xfe\x80" + bytes(14), 10, model.Family.IPV6)


def _addr_and_mask(network: addresses.Network | None) -> tuple[bytes, bytes]:
    if network is None:
        return tables.NO_ADDRESS, tables.NO_ADDRESS
    host_bits = 128 - network.prefix_length
    mask = ((1 << 128) - 1) >> host_bits << host_bits
    return network.base, mask.to_bytes(16, "big")
