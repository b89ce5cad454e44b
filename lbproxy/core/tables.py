"""Rows of the kernel's tables as the core sees them, and writes to them.

Keys and values are packed bytes as bpf/abi.h lays them out; the NamedTuples here
carry the same field names, and are checked against the header at import.
"""

import enum
import sys
import typing

from lbproxy import abi


class Table(enum.StrEnum):
    """A map that the agent writes."""

    FRONTENDS = "frontends"
    SLOTS = "slots"
    BACKENDS = "backends"
    BACKEND_STATS = "backend_stats"
    BACKEND_LOAD = "backend_load"
    LOAD_CORRECTIONS = "load_corrections"
    BACKEND_HEALTH = "backend_health"
    SERVICE_STATS = "service_stats"
    SERVICES = "services"
    LOCALITIES = "localities"
    NODE_ADDRESSES = "node_addresses"
    SETTINGS = "settings"
    DEVICES = "devices"
    SOURCE_RANGES = "source_ranges"
    NETNS_ADDRESSES = "netns_addresses"
    EARLIER_SLOTS = "earlier_slots"
    TUNNEL_ENDS = "tunnel_ends"
    NO_FRONTENDS = "no_frontends"
    FLOWS = "flows"
    FLOWS_NEW = "flows_new"
    NO_FLOWS = "no_flows"
    UNASSURED = "unassured"
    HANDOVER = "handover"


class Put(typing.NamedTuple):
    """Write a row, whether it exists or not."""

    table: Table
    key: bytes
    value: bytes


class Delete(typing.NamedTuple):
    """Remove a row of a hash table; no error where there is none."""

    table: Table
    key: bytes


Write = Put | Delete

SCOPE_ADDRESS: typing.Final = abi.constant("SCOPE_ADDRESS")
SCOPE_NODE_PORT: typing.Final = abi.constant("SCOPE_NODE_PORT")
SCOPE_OUTSIDE: typing.Final = abi.constant("SCOPE_OUTSIDE")  # added to one of the others
SLOTS_PER_BLOCK: typing.Final = abi.constant("SLOTS_PER_BLOCK")


class FrontendKind(enum.IntEnum):
    """Which field of the Service a frontend comes from."""

    CLUSTER_IP = abi.constant("KIND_CLUSTER_IP")
    NODE_PORT = abi.constant("KIND_NODE_PORT")
    EXTERNAL_IP = abi.constant("KIND_EXTERNAL_IP")
    LOAD_BALANCER = abi.constant("KIND_LOAD_BALANCER")

    @property
    def label(self) -> str:
        """The name people know it by."""
        return {1: "ClusterIP", 2: "NodePort", 3: "ExternalIP", 4: "LoadBalancer"}[self.value]


class FrontendFlag(enum.IntFlag):
    """frontend.flags."""

    MAGLEV = abi.constant("FRONTEND_MAGLEV")
    DROP = abi.constant("FRONTEND_DROP")
    EXTERNAL_LOCAL = abi.constant("FRONTEND_EXTERNAL_LOCAL")
    SOURCE_RANGES = abi.constant("FRONTEND_SOURCE_RANGES")
    DSR = abi.constant("FRONTEND_DSR")
    LEAST_CONN = abi.constant("FRONTEND_LEAST_CONN")


class BackendSet(enum.IntFlag):
    """The sets a backend is usable in; a frontend draws from one."""

    CLUSTER = abi.constant("SET_CLUSTER")
    LOCAL = abi.constant("SET_LOCAL")
    HERE = abi.constant("SET_HERE")  # no frontend draws from it
    COUNTED = abi.constant("SET_COUNTED")  # nor from this one
    # Nor from these, which say why a backend is in no other.
    NOT_HINTED = abi.constant("SET_NOT_HINTED")  # topology hints give it to others
    ZONE_KEEPS = abi.constant("SET_ZONE_KEEPS")  # this zone's own backends bear all of its flows
    NO_WEIGHT = abi.constant("SET_NO_WEIGHT")


class BackendState(enum.IntEnum):
    """backend.state."""

    FREE = abi.constant("BACKEND_FREE")
    ACTIVE = abi.constant("BACKEND_ACTIVE")
    TERMINATING = abi.constant("BACKEND_TERMINATING")
    UNREADY = abi.constant("BACKEND_UNREADY")
    DRAINING = abi.constant("BACKEND_DRAINING")
    SERVING = abi.constant("BACKEND_SERVING")


class Health(enum.IntFlag):
    """backend.health: who speaks against a backend."""

    PROBE_FAILED = abi.constant("HEALTH_PROBE_FAILED")
    EJECTED = abi.constant("HEALTH_EJECTED")


class Policy(enum.IntFlag):
    """service_meta.policies."""

    INTERNAL_LOCAL = abi.constant("POLICY_INTERNAL_LOCAL")
    EXTERNAL_LOCAL = abi.constant("POLICY_EXTERNAL_LOCAL")


class NodeAddressFlag(enum.IntFlag):
    """node_address.flags."""

    NODE_PORTS = abi.constant("NODE_ADDRESS_NODE_PORTS")


class Setting(enum.IntFlag):
    """settings.flags."""

    LOCALHOST_NODE_PORTS = abi.constant("SETTING_LOCALHOST_NODE_PORTS")
    MASQUERADE_ALL = abi.constant("SETTING_MASQUERADE_ALL")
    PODS_BY_IPV4 = abi.constant("SETTING_PODS_BY_IPV4")
    PODS_BY_IPV6 = abi.constant("SETTING_PODS_BY_IPV6")
    PODS_BY_DEVICE = abi.constant("SETTING_PODS_BY_DEVICE")
    KEEP_CLIENT = abi.constant("SETTING_KEEP_CLIENT")


class Handover(enum.IntEnum):
    """A row of `handover`: what it says, any other value than 0 for yes."""

    LEARN = abi.constant("HANDOVER_LEARN")
    HELD_UDP = abi.constant("HANDOVER_HELD_UDP")
    RETURN = abi.constant("HANDOVER_RETURN")


class Return(enum.IntEnum):
    """What the row RETURN says; to the programs every value but NO is the same."""

    NO = 0
    YES = 1
    ENDS = 2  # somebody at the node asks the agent to end it


class DeviceFlag(enum.IntFlag):
    """device.flags."""

    PODS = abi.constant("DEVICE_PODS")
    BARE = abi.constant("DEVICE_BARE")


class FlowState(enum.IntFlag):
    """flow.state."""

    ORIGINAL = abi.constant("FLOW_ORIGINAL")
    REPLIED = abi.constant("FLOW_REPLIED")
    ASSURED = abi.constant("FLOW_ASSURED")
    FIN = abi.constant("FLOW_FIN")
    PEER_FIN = abi.constant("FLOW_PEER_FIN")
    RESET = abi.constant("FLOW_RESET")
    TUNNEL = abi.constant("FLOW_TUNNEL")
    MASQUERADED = abi.constant("FLOW_MASQUERADED")
    HELD = abi.constant("FLOW_HELD")  # both of these


class FrontendKey(typing.NamedTuple):
    """Where clients dial; `addr` 16 bytes, `port` 2 bytes in network order."""

    addr: bytes
    port: bytes
    proto: int
    scope: int

    def pack(self) -> bytes:
        """The bytes of the key."""
        return _FRONTEND_KEY.pack(*self)


class Frontend(typing.NamedTuple):
    """What a frontend leads to."""

    service: int
    block: int
    slot_count: int
    affinity_s: int
    flags: int
    sets: int
    kind: int

    def pack(self) -> bytes:
        """The bytes of the row."""
        return _FRONTEND.pack(*self)


class Backend(typing.NamedTuple):
    """One address that answers for one service port; `addr` and `port` in network order."""

    addr: bytes
    port: bytes
    proto: int
    state: int
    service: int
    locality: int
    weight: int
    sets: int
    health: int = 0

    def pack(self) -> bytes:
        """The bytes of the row."""
        return _BACKEND.pack(*self)


class ServiceMeta(typing.NamedTuple):
    """The names of a service port, zero-padded UTF-8, so that tools can show them without an agent."""

    namespace: bytes
    name: bytes
    port_name: bytes
    affinity_s: int
    proto: int
    algorithm: int
    family: int
    policies: int

    def pack(self) -> bytes:
        """The bytes of the row."""
        return _SERVICE_META.pack(*self)


class Locality(typing.NamedTuple):
    """The node and zone that backends are in, zero-padded UTF-8."""

    node: bytes
    zone: bytes

    def pack(self) -> bytes:
        """The bytes of the row."""
        return _LOCALITY.pack(*self)


class Settings(typing.NamedTuple):
    """What the programs must know of this node; addresses are 16 bytes, zero where there is none."""

    host_netns: int
    flags: int
    ports_first: int
    ports_count: int
    strangers: bytes  # tells others' addresses from the node's; zero where they are not known
    pods4_addr: bytes
    pods4_mask: bytes
    pods6_addr: bytes
    pods6_mask: bytes
    node4_addr: bytes
    node6_addr: bytes
    tcp_new_ticks: int
    tcp_established_ticks: int
    tcp_half_closed_ticks: int
    tcp_closed_ticks: int
    udp_new_ticks: int
    udp_stream_ticks: int
    sctp_new_ticks: int
    sctp_established_ticks: int

    def pack(self) -> bytes:
        """The bytes of the row."""
        return _SETTINGS.pack(*self)


class Device(typing.NamedTuple):
    """Whom flows that leave through a device are masqueraded as; 16 bytes each, zero for none."""

    addr4: bytes
    addr6: bytes
    flags: int

    def pack(self) -> bytes:
        """The bytes of the row."""
        return _DEVICE.pack(*self)


class SourceRangeKey(typing.NamedTuple):
    """Sources that may use a service port's restricted frontends; `service` 4 bytes in network order."""

    prefix_bits: int  # 32, and those of the 16 bytes of the address
    service: bytes
    addr: bytes

    def pack(self) -> bytes:
        """The bytes of the key."""
        return _SOURCE_RANGE_KEY.pack(*self)


class EarlierKey(typing.NamedTuple):
    """A set that a service port's DSR frontends draw from."""

    service: int
    set: int

    def pack(self) -> bytes:
        """The bytes of the key."""
        return _EARLIER_KEY.pack(*self)


class Earlier(typing.NamedTuple):
    """The slots that these frontends drew from before their last change."""

    block: int
    slot_count: int

    def pack(self) -> bytes:
        """The bytes of the row."""
        return _EARLIER.pack(*self)


class TunnelEndKey(typing.NamedTuple):
    """A backend of this node that other nodes may send packets to; as in its own row."""

    service: int
    addr: bytes
    port: bytes
    proto: int

    def pack(self) -> bytes:
        """The bytes of the key."""
        return _TUNNEL_END_KEY.pack(*self)


class FlowKey(typing.NamedTuple):
    """A packet as the packet path sees it at a stage; addresses and ports in network order."""

    src: bytes
    dst: bytes
    sport: bytes
    dport: bytes
    proto: int
    stage: int

    def pack(self) -> bytes:
        """The bytes of the key."""
        return _FLOW_KEY.pack(*self)

    def becomes(self, row: "Flow") -> "FlowKey":
        """Return what its row turns the packet into."""
        turned = self._replace(sport=row.sport, dport=row.dport)
        return turned._replace(src=row.addr) if self.stage else turned._replace(dst=row.addr)


class Flow(typing.NamedTuple):
    """What that packet is turned into: `addr` is its destination where it comes in, its source elsewhere."""

    addr: bytes
    sport: bytes
    dport: bytes
    backend: int
    seen: int
    service: bytes  # 3 of them, the lowest first
    state: int

    def pack(self) -> bytes:
        """The bytes of the row."""
        return _FLOW.pack(*self)


def _layout(name: str, row: typing.Any) -> abi.Layout:
    layout = abi.LAYOUTS[name]
    if row._fields != layout.names:
        raise TypeError(f"{row.__name__} has fields {row._fields}, bpf/abi.h says {layout.names}")
    return layout


_FRONTEND_KEY = _layout("frontend_key", FrontendKey)
_FRONTEND = _layout("frontend", Frontend)
_BACKEND = _layout("backend", Backend)
_SERVICE_META = _layout("service_meta", ServiceMeta)
_LOCALITY = _layout("locality", Locality)
_SETTINGS = _layout("settings", Settings)
_DEVICE = _layout("device", Device)
_SOURCE_RANGE_KEY = _layout("source_range_key", SourceRangeKey)
_EARLIER_KEY = _layout("earlier_key", EarlierKey)
_EARLIER = _layout("earlier", Earlier)
_TUNNEL_END_KEY = _layout("tunnel_end_key", TunnelEndKey)
_FLOW_KEY = _layout("flow_key", FlowKey)
_FLOW = _layout("flow", Flow)

# Of values in the order of the NamedTuple's fields, without making one: so in what a start does most.
pack_frontend_key: typing.Final = _FRONTEND_KEY.pack
pack_frontend: typing.Final = _FRONTEND.pack
pack_backend: typing.Final = _BACKEND.pack

FRONTEND_KEY_SIZE: typing.Final = _FRONTEND_KEY.size
FRONTEND_SIZE: typing.Final = _FRONTEND.size
BACKEND_SIZE: typing.Final = _BACKEND.size
BLOCK_SIZE: typing.Final = abi.LAYOUTS["slot_block"].size
BYTE_ORDER: typing.Final = sys.byteorder
NO_BACKEND: typing.Final = bytes(BACKEND_SIZE)
NO_ADDRESS: typing.Final = bytes(16)
SOURCE_RANGE_KEY_SIZE: typing.Final = _SOURCE_RANGE_KEY.size
ALLOWED: typing.Final = abi.LAYOUTS["source_range"].pack(1)
NO_SETTINGS: typing.Final = Settings(*_SETTINGS.unpack(bytes(_SETTINGS.size)))


def frontend_key(row: bytes) -> FrontendKey:
    """Unpack the key of a frontend."""
    return FrontendKey(*_FRONTEND_KEY.unpack(row))


def frontend(row: bytes) -> Frontend:
    """Unpack a frontend."""
    return Frontend(*_FRONTEND.unpack(row))


def backend(row: bytes | memoryview) -> Backend:
    """Unpack a backend."""
    return Backend(*_BACKEND.unpack(row))


def service_meta(row: bytes) -> ServiceMeta:
    """Unpack the names of a service port."""
    return ServiceMeta(*_SERVICE_META.unpack(row))


def locality(row: bytes) -> Locality:
    """Unpack a locality."""
    return Locality(*_LOCALITY.unpack(row))


def settings(row: bytes) -> Settings:
    """Unpack the settings."""
    return Settings(*_SETTINGS.unpack(row))


def device(row: bytes) -> Device:
    """Unpack a device."""
    return Device(*_DEVICE.unpack(row))


def source_range_key(row: bytes) -> SourceRangeKey:
    """Unpack the key of a source range."""
    return SourceRangeKey(*_SOURCE_RANGE_KEY.unpack(row))


def earlier_key(row: bytes) -> EarlierKey:
    """Unpack the key of an earlier slot table."""
    return EarlierKey(*_EARLIER_KEY.unpack(row))


def earlier(row: bytes) -> Earlier:
    """Unpack an earlier slot table."""
    return Earlier(*_EARLIER.unpack(row))


def tunnel_end_key(row: bytes) -> TunnelEndKey:
    """Unpack the key of a tunnel's end."""
    return TunnelEndKey(*_TUNNEL_END_KEY.unpack(row))


def flow_key(row: bytes) -> FlowKey:
    """Unpack the key of a flow."""
    return FlowKey(*_FLOW_KEY.unpack(row))


def flow(row: bytes) -> Flow:
    """Unpack a flow."""
    return Flow(*_FLOW.unpack(row))


def row_key(number: int) -> bytes:
    """The key of a row that is named by a number."""
    return number.to_bytes(4, BYTE_ORDER)


def handover(row: Handover, value: int) -> Put:
    """What says it."""
    return Put(Table.HANDOVER, row_key(row), value.to_bytes(8, BYTE_ORDER))


def text(padded: bytes) -> str:
    """A zero-padded name as text."""
    return padded.rstrip(b"\0").decode("utf-8", "replace")
