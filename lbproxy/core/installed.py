"""What one service port has in the kernel, kept small: a node holds tens of thousands of these."""

import hashlib
import struct
import typing

import msgspec

from lbproxy import abi
from lbproxy.core import model, plan, pools, tables

_IDENTITY_SIZE = 18  # a backend's address and port, the head of its row
_ID_SIZE = 4
_BACKEND_ENTRY = _ID_SIZE + tables.BACKEND_SIZE
_HEALTH_AT = _ID_SIZE + abi.LAYOUTS["backend"].offset("health")
_FRONTEND_ENTRY = tables.FRONTEND_KEY_SIZE + tables.FRONTEND_SIZE
_FLAGS = struct.Struct("=H")
_FLAGS_AT = tables.FRONTEND_KEY_SIZE + abi.LAYOUTS["frontend"].offset("flags")
# As plain integers: a flag's operators cost half a microsecond each.
_MAGLEV = tables.FrontendFlag.MAGLEV.value
_DROP = tables.FrontendFlag.DROP.value
_SECOND_ROW = tables.FrontendFlag.EXTERNAL_LOCAL.value
_SOURCE_RANGES = tables.FrontendFlag.SOURCE_RANGES.value
_DSR = tables.FrontendFlag.DSR.value
_LEAST_CONN = tables.FrontendFlag.LEAST_CONN.value
_HERE = tables.BackendSet.HERE.value
_INTERNAL_LOCAL = tables.Policy.INTERNAL_LOCAL.value
_EXTERNAL_LOCAL = tables.Policy.EXTERNAL_LOCAL.value
_NAMES_SIZE = 192  # of a service_meta row: the part that its port key decides
_ALGORITHM_AT = abi.LAYOUTS["service_meta"].offset("algorithm") - _NAMES_SIZE


class SlotTable(msgspec.Struct, frozen=True, gc=False):
    """A slot table in the kernel; equal digests mean equal slots."""

    set: int
    start: int
    blocks: int
    slot_count: int
    digest: bytes

    @property
    def extent(self) -> pools.Extent:
        """The blocks it occupies."""
        return pools.Extent(self.start, self.blocks)


class Installed(msgspec.Struct, frozen=True, gc=False):
    """A service port's id and its rows, packed one after the other.

    `earlier` are the tables that DSR frontends drew from before, by set.
    """

    id: int
    traits: bytes
    packed_frontends: bytes
    packed_backends: bytes
    tables: tuple[SlotTable, ...]
    earlier: tuple[SlotTable, ...] = ()
    ranges: tuple[bytes, ...] = ()  # keys of source_ranges

    @property
    def frontends(self) -> dict[bytes, bytes]:
        """Frontend rows by key."""
        packed, at = self.packed_frontends, tables.FRONTEND_KEY_SIZE
        return {
            packed[i : i + at]: packed[i + at : i + _FRONTEND_ENTRY]
            for i in range(0, len(packed), _FRONTEND_ENTRY)
        }

    @property
    def backends(self) -> dict[int, bytes]:
        """Backend rows by id, in the order that slot indexes count."""
        packed = self.packed_backends
        return {
            int.from_bytes(packed[i : i + _ID_SIZE], "little"): packed[i + _ID_SIZE : i + _BACKEND_ENTRY]
            for i in range(0, len(packed), _BACKEND_ENTRY)
        }

    @property
    def backend_ids(self) -> dict[bytes, int]:
        """Backend ids by identity."""
        packed, at = self.packed_backends, _ID_SIZE + _IDENTITY_SIZE
        return {
            packed[i + _ID_SIZE : i + at]: int.from_bytes(packed[i : i + _ID_SIZE], "little")
            for i in range(0, len(packed), _BACKEND_ENTRY)
        }

    @property
    def algorithm(self) -> int:
        """How its backends are chosen, a model.Algorithm."""
        return self.traits[_ALGORITHM_AT] if self.traits else 0

    @property
    def unhealthy(self) -> list[bytes]:
        """The rows of backends that something speaks against."""
        packed = self.packed_backends
        if not any(packed[_HEALTH_AT::_BACKEND_ENTRY]):
            return []
        return [row for row in self.backends.values() if tables.backend(row).health]

    @property
    def backend_count(self) -> int:
        """How many backends it has, usable or not."""
        return len(self.packed_backends) // _BACKEND_ENTRY

    @property
    def extents(self) -> set[pools.Extent]:
        """Every block that must not be used for anything else."""
        return {table.extent for table in (*self.tables, *self.earlier)}

    @property
    def tunnel_ends(self) -> dict[bytes, bytes]:
        """Rows of tunnel_ends by key: its backends of this node, if it has a DSR frontend."""
        packed = self.packed_frontends
        for at in range(_FLAGS_AT, len(packed), _FRONTEND_ENTRY):
            if _FLAGS.unpack_from(packed, at)[0] & _DSR:
                break
        else:
            return {}
        rows = ((number, tables.backend(row)) for number, row in self.backends.items())
        return {
            tables.TunnelEndKey(self.id, row.addr, row.port, row.proto).pack(): tables.row_key(number)
            for number, row in rows
            if row.sets & _HERE
        }

    def table(self, bit: int) -> SlotTable | None:
        """Its table for a set, if that set has any backend."""
        return next((table for table in self.tables if table.set == bit), None)

    def is_dsr(self, bit: int) -> bool:
        """Whether a DSR frontend draws from a set."""
        rows = map(tables.frontend, self.frontends.values())
        return any(row.sets == bit and row.flags & _DSR for row in rows)


def make(
    number: int,
    traits: bytes,
    frontends: typing.Mapping[bytes, bytes],
    backends: typing.Mapping[int, bytes],
    slot_tables: typing.Iterable[SlotTable],
    earlier: typing.Iterable[SlotTable] = (),
    ranges: typing.Iterable[bytes] = (),
) -> Installed:
    """Pack the rows of a service port."""
    return Installed(
        number,
        traits,
        # In an order that does not depend on who tells of them: equal ones are to be equal.
        b"".join([key + frontends[key] for key in sorted(frontends)]),
        b"".join([n.to_bytes(_ID_SIZE, "little") + row for n, row in backends.items()]),
        tuple(slot_tables),
        tuple(earlier),
        tuple(ranges),
    )


def frontend_rows(
    port: plan.PortPlan, service: int, made: typing.Mapping[int, SlotTable]
) -> dict[bytes, bytes]:
    """The rows of its frontends by key; `made` are its slot tables by set."""
    rows: dict[bytes, bytes] = {}
    for frontend in port.frontends:
        table = made.get(int(frontend.set))
        flags = 0
        if port.algorithm is model.Algorithm.MAGLEV:
            flags |= _MAGLEV
        if frontend.drop:
            flags |= _DROP
        if frontend.external_local:
            flags |= _SECOND_ROW
        if frontend.restricted:
            flags |= _SOURCE_RANGES
        if frontend.dsr:
            flags |= _DSR | _MAGLEV
        elif port.algorithm is model.Algorithm.LEAST_CONNECTIONS:
            flags |= _LEAST_CONN
        node_port = frontend.kind is tables.FrontendKind.NODE_PORT
        scope = tables.SCOPE_NODE_PORT if node_port else tables.SCOPE_ADDRESS
        key = tables.pack_frontend_key(
            frontend.address,
            frontend.port.to_bytes(2, "big"),
            port.key.protocol,
            scope | tables.SCOPE_OUTSIDE if frontend.outside else scope,
        )
        row = tables.pack_frontend(
            service,
            table.start if table else 0,
            table.slot_count if table else 0,
            port.affinity_s,
            flags,
            frontend.set,
            frontend.kind,
        )
        # One address may be external and load balancer IP at once: the first kind stands for both.
        rows.setdefault(key, row)
    return rows


def range_key(service: int, one: model.SourceRange) -> bytes:
    """The key of a source range; the trie compares all of it from the first bit on."""
    return tables.SourceRangeKey(32 + one.prefix_length, service.to_bytes(4, "big"), one.base).pack()


def identity(row: bytes) -> bytes:
    """What makes a backend the same one within its service port: address and port."""
    return row[:_IDENTITY_SIZE]


def blocks(ids: typing.Sequence[int]) -> bytes:
    """Backend ids as whole slot blocks; unused slots of the last one are 0."""
    packed = b"".join(map(tables.row_key, ids))
    return packed + bytes(-len(packed) % tables.BLOCK_SIZE)


def digest(packed: bytes, slot_count: int) -> bytes:
    """What two equal slot tables have in common."""
    return hashlib.blake2b(packed[: slot_count * _ID_SIZE], digest_size=8).digest()


def meta(port: plan.PortPlan) -> bytes:
    """The row that names a service port."""
    policies = _INTERNAL_LOCAL if port.internal_local else 0
    if port.external_local:
        policies |= _EXTERNAL_LOCAL
    key = port.key
    return tables.ServiceMeta(
        key.service.namespace.encode(),
        key.service.name.encode(),
        key.port_name.encode(),
        port.affinity_s,
        key.protocol,
        port.algorithm,
        key.family,
        policies,
    ).pack()


def traits(meta_row: bytes) -> bytes:
    """The part of that row which can change."""
    return meta_row[_NAMES_SIZE:]


def port_key(meta_row: bytes) -> model.PortKey:
    """The service port that a row names. Raises ValueError where it names none."""
    row = tables.service_meta(meta_row)
    return model.PortKey(
        model.ServiceName(tables.text(row.namespace), tables.text(row.name)),
        tables.text(row.port_name),
        model.Protocol(row.proto),
        model.Family(row.family),
    )
