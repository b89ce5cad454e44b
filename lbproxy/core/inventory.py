"""What the kernel balances now, read from its tables: service ports, frontends, backends, counters.

An agent may write while these rows are read. Names are written before what
points at them and removed after it, so a row that leads nowhere is one that is
coming or going, and is left out.
"""

import collections
import typing
from collections.abc import Callable

import msgspec

from lbproxy import abi
from lbproxy.core import addresses, installed, loads, model, outcomes, tables


class Rows(typing.Protocol):
    """What can be read of the kernel's tables: `BpfMaps` and `FakeMaps` both."""

    def rows(self, table: str) -> typing.Iterator[tuple[bytes, bytes]]:
        """Every row that is in use: of an array, those that are not all zero."""
        ...

    def row(self, table: str, key: bytes) -> bytes | None:
        """One row, or None."""
        ...


class Frontend(msgspec.Struct, frozen=True, gc=False):
    """An address and port that clients dial; a node port has the zero address of its family.

    What clients outside draw from, where that is another set, is not told apart here.
    """

    address: bytes
    port: int
    kind: tables.FrontendKind
    set: int  # the BackendSet it draws from
    slot_count: int  # 0: no backend that it may use
    drop: bool
    restricted: bool  # only for the service port's source ranges
    dsr: bool


class Backend(msgspec.Struct, frozen=True, gc=False):
    """An address and port that answers for one service port; `sets` are BackendSet bits."""

    id: int
    service: int
    address: bytes
    port: int
    protocol: int
    state: tables.BackendState
    sets: int
    weight: int
    node: str
    zone: str
    connections: int
    health: int = 0  # tables.Health bits: who speaks against it
    open: int | None = None  # its connections and flows of this node now; None where nobody counts them
    fared: outcomes.Fared = outcomes.NOTHING_YET


class ServicePort(msgspec.Struct, frozen=True, gc=False):
    """One service port of one family, with all its frontends and backends in order of address."""

    id: int
    key: model.PortKey
    algorithm: model.Algorithm
    affinity_s: int
    internal_local: bool
    external_local: bool
    connections: int
    refused: int
    frontends: tuple[Frontend, ...]
    backends: tuple[Backend, ...]
    source_ranges: tuple[addresses.Network, ...]  # in order of address


class Inventory(typing.NamedTuple):
    """Service ports by name, and backends that outlive their service port for a moment."""

    ports: tuple[ServicePort, ...]
    orphans: tuple[Backend, ...]


class NodePorts(typing.NamedTuple):
    """Where NodePorts are served: on `addresses`, and for the node itself on 127.0.0.0/8 if `loopback`."""

    addresses: tuple[bytes, ...]
    loopback: bool
    local: frozenset[bytes]  # every address of this node, whether it serves NodePorts or not
    host_netns: int  # the netns cookie of the node's own namespace, 0 where nobody has told


COUNTERS: typing.Final = {
    name.removeprefix("LB_COUNTER_").lower(): number
    for name, number in abi.CONSTANTS.items()
    if name.startswith("LB_COUNTER_")
}
"""The kernel's own counters: what abi.h calls them, and their row."""

_COUNTER_BYTES: typing.Final = abi.MAPS["counters"].value_size
_BACKEND_STATS: typing.Final = abi.LAYOUTS["backend_stats"]
_SERVICE_STATS: typing.Final = abi.LAYOUTS["service_stats"]
_NODE_ADDRESS: typing.Final = abi.LAYOUTS["node_address"]


def read(rows: Rows) -> Inventory:
    """Everything that is balanced, in an order of its own: by name, port, protocol and family."""
    frontends = _frontends(rows)
    backends = _backends(rows)
    ranges = _source_ranges(rows)
    # Whole tables at once: a row by itself costs a system call.
    stats = dict(rows.rows(tables.Table.SERVICE_STATS))
    ports = []
    for key, row in rows.rows(tables.Table.SERVICES):
        number = int.from_bytes(key, tables.BYTE_ORDER)
        port = _port(
            number,
            row,
            stats.get(key),
            frontends.get(number, ()),
            backends.pop(number, ()),
            ranges.get(number, ()),
        )
        if port is not None:
            ports.append(port)
    ports.sort(key=lambda port: port.key)
    orphans = [backend for left in backends.values() for backend in left]
    return Inventory(tuple(ports), tuple(sorted(orphans, key=_place)))


def counters(rows: Rows) -> dict[str, int]:
    """The kernel's counters by name."""
    found = {}
    for name, number in COUNTERS.items():
        row = rows.row("counters", tables.row_key(number)) or bytes(_COUNTER_BYTES)
        found[name] = int.from_bytes(row, tables.BYTE_ORDER)
    return found


def node_ports(rows: Rows) -> NodePorts:
    """Where NodePorts are served now."""
    flags_of = {key: _NODE_ADDRESS.unpack(row)[0] for key, row in rows.rows(tables.Table.NODE_ADDRESSES)}
    serves = tables.NodeAddressFlag.NODE_PORTS.value
    serving = sorted(address for address, bits in flags_of.items() if bits & serves)
    found = settings(rows)
    loopback = bool(found.flags & tables.Setting.LOCALHOST_NODE_PORTS.value)
    return NodePorts(tuple(serving), loopback, frozenset(flags_of), found.host_netns)


def settings(rows: Rows) -> tables.Settings:
    """What the programs were told of this node."""
    row = rows.row(tables.Table.SETTINGS, tables.row_key(0))
    return tables.settings(row) if row else tables.NO_SETTINGS


def handover(rows: Rows, what: tables.Handover) -> int:
    """What a row of `handover` says."""
    row = rows.row(tables.Table.HANDOVER, tables.row_key(what))
    return int.from_bytes(row or b"", tables.BYTE_ORDER)


def is_set(rows: Rows, what: tables.Handover) -> bool:
    """Whether a row of `handover` says yes."""
    return handover(rows, what) != 0


def families(rows: Rows) -> frozenset[model.Family]:
    """Those of which any frontend has a backend."""
    found = set[model.Family]()
    for key, row in rows.rows(tables.Table.FRONTENDS):
        if tables.frontend(row).slot_count:
            found.add(addresses.family_of(key[:16]))
            if len(found) == len(model.Family):
                break
    return frozenset(found)


def frontend_at(
    rows: Rows, address: bytes, port: bytes, protocol: int, on_node: Callable[[bytes], bool]
) -> tables.Frontend | None:
    """The frontend that a packet to this address and port, in network order, finds.

    That of its own address first; else the NodePort, where the address is one `on_node`.
    """
    key = tables.FrontendKey(address, port, protocol, tables.SCOPE_ADDRESS)
    row = rows.row(tables.Table.FRONTENDS, key.pack())
    if row is None and on_node(address):
        zero = addresses.IPV4_ZERO if address.startswith(addresses.IPV4_PREFIX) else addresses.IPV6_ZERO
        key = tables.FrontendKey(zero, port, protocol, tables.SCOPE_NODE_PORT)
        row = rows.row(tables.Table.FRONTENDS, key.pack())
    return None if row is None else tables.frontend(row)


def port_key(rows: Rows, service: int) -> model.PortKey | None:
    """What a service port id stands for; None where it is gone or not understood."""
    row = rows.row(tables.Table.SERVICES, tables.row_key(service))
    try:
        return installed.port_key(row) if row is not None else None
    except ValueError:
        return None


def backend(rows: Rows, number: int) -> Backend | None:
    """The backend of this id; None where the row is free or not understood."""
    row = rows.row(tables.Table.BACKENDS, tables.row_key(number))
    if row is None:
        return None
    found = tables.backend(row)
    key = tables.row_key(found.locality)
    locality = rows.row(tables.Table.LOCALITIES, key) if found.locality else None
    stats, load, correction = (
        rows.row(table, tables.row_key(number))
        for table in (tables.Table.BACKEND_STATS, tables.Table.BACKEND_LOAD, tables.Table.LOAD_CORRECTIONS)
    )
    fared = outcomes.of_backend(rows, number)
    return _backend(number, found, _locality(locality), stats, loads.load(load, correction), fared)


def _port(
    number: int,
    row: bytes,
    stats: bytes | None,
    frontends: typing.Iterable[Frontend],
    backends: typing.Iterable[Backend],
    ranges: typing.Iterable[addresses.Network],
) -> ServicePort | None:
    try:
        key = installed.port_key(row)
        meta = tables.service_meta(row)
        algorithm = model.Algorithm(meta.algorithm)
    except ValueError:
        return None
    connections, refused = _SERVICE_STATS.unpack(stats) if stats else (0, 0)
    return ServicePort(
        number,
        key,
        algorithm,
        meta.affinity_s,
        bool(meta.policies & tables.Policy.INTERNAL_LOCAL.value),
        bool(meta.policies & tables.Policy.EXTERNAL_LOCAL.value),
        connections,
        refused,
        tuple(sorted(frontends, key=lambda f: (f.kind, f.address, f.port))),
        tuple(sorted(backends, key=_place)),
        tuple(sorted(ranges)),
    )


def _place(backend: Backend) -> tuple[bytes, int, int]:
    return backend.address, backend.port, backend.id


def _frontends(rows: Rows) -> dict[int, list[Frontend]]:
    found: dict[int, list[Frontend]] = collections.defaultdict(list)
    kinds = {kind.value: kind for kind in tables.FrontendKind}
    flags = tables.FrontendFlag
    for packed, row in rows.rows(tables.Table.FRONTENDS):
        key, value = tables.frontend_key(packed), tables.frontend(row)
        kind = kinds.get(value.kind)
        if kind is None or key.scope & tables.SCOPE_OUTSIDE:
            continue
        port = int.from_bytes(key.port, "big")
        found[value.service].append(
            Frontend(
                key.addr,
                port,
                kind,
                value.sets,
                value.slot_count,
                drop=bool(value.flags & flags.DROP.value),
                restricted=bool(value.flags & flags.SOURCE_RANGES.value),
                dsr=bool(value.flags & flags.DSR.value),
            )
        )
    return found


def _source_ranges(rows: Rows) -> dict[int, list[addresses.Network]]:
    found: dict[int, list[addresses.Network]] = collections.defaultdict(list)
    for packed, _ in rows.rows(tables.Table.SOURCE_RANGES):
        key = tables.source_range_key(packed)
        network = addresses.Network(key.addr, key.prefix_bits - 32, addresses.family_of(key.addr))
        found[int.from_bytes(key.service, "big")].append(network)
    return found


def _backends(rows: Rows) -> dict[int, list[Backend]]:
    found: dict[int, list[Backend]] = collections.defaultdict(list)
    stats = dict(rows.rows(tables.Table.BACKEND_STATS))
    opened = dict(rows.rows(tables.Table.BACKEND_LOAD))
    corrected = dict(rows.rows(tables.Table.LOAD_CORRECTIONS))
    fared = outcomes.every(rows)
    localities = {
        int.from_bytes(key, tables.BYTE_ORDER): _locality(row)
        for key, row in rows.rows(tables.Table.LOCALITIES)
    }
    for key, row in rows.rows(tables.Table.BACKENDS):
        value = tables.backend(row)
        locality = localities.get(value.locality, _NOWHERE)
        load = loads.load(opened.get(key), corrected.get(key))
        number = int.from_bytes(key, tables.BYTE_ORDER)
        told = fared.get(number, outcomes.NOTHING_YET)
        known = _backend(number, value, locality, stats.get(key), load, told)
        if known is not None:
            found[known.service].append(known)
    return found


_STATES: typing.Final = {
    state.value: state for state in tables.BackendState if state is not tables.BackendState.FREE
}
_NOWHERE: typing.Final = ("", "")


def _backend(
    number: int,
    value: tables.Backend,
    locality: tuple[str, str],
    stats: bytes | None,
    load: loads.Load,
    fared: outcomes.Fared,
) -> Backend | None:
    state = _STATES.get(value.state)
    if state is None:
        return None
    return Backend(
        number,
        value.service,
        value.addr,
        int.from_bytes(value.port, "big"),
        value.proto,
        state,
        value.sets,
        value.weight,
        *locality,
        _BACKEND_STATS.unpack(stats)[0] if stats else 0,
        value.health,
        max(0, load.open) if value.sets & tables.BackendSet.COUNTED.value else None,
        fared,
    )


def _locality(row: bytes | None) -> tuple[str, str]:
    if row is None:
        return _NOWHERE
    names = tables.locality(row)
    return tables.text(names.node), tables.text(names.zone)
