"""What tables amount to for clients, and whether anything in them leads nowhere between two writes."""

import array
import collections
import struct
import typing

from lbproxy import abi
from lbproxy.core import absence, ledger, plan, quarantine, tables
from lbproxy.kernel import fake

SIZES: typing.Final = {
    "frontends": 256,
    "slots": 8192,
    "backends": 2048,
    "services": 128,
    "localities": 64,
    "node_addresses": 16,
    "sockets": 64,
    "socket_spill": 64,
    "affinity": 64,
    "flows": 64,
    "flows_new": 64,
    "fragments": 64,
    "devices": 16,
    "source_ranges": 64,
    "netns_addresses": 16,
    "earlier_slots": 64,
    "tunnel_ends": 64,
    "backend_health": 64,
}
_IDS: typing.Final = struct.Struct(f"={tables.SLOTS_PER_BLOCK}I")

Place = tuple[bytes, bytes]  # address and port
Plans = dict[typing.Any, list[plan.PortPlan]]


def sizes(**smaller: int) -> dict[str, int]:
    """SIZES, but for some."""
    return {**SIZES, **smaller}


def capacity(**smaller: int) -> ledger.Capacity:
    """The capacity of tables of these sizes."""
    chosen = sizes(**smaller)
    return ledger.Capacity(**{name: chosen[name] for name in ledger.Capacity._fields})


class Served(typing.NamedTuple):
    """What a frontend amounts to, with ids resolved: the same on every node for the same plan."""

    service: bytes  # its names
    slots: tuple[Place, ...]
    affinity_s: int
    flags: int
    sets: int
    kind: int


def slot_ids(maps: fake.FakeMaps, row: tables.Frontend) -> list[int]:
    """The backend ids in a frontend's slots."""
    ids: list[int] = []
    if not row.slot_count:
        return ids
    for block in range(row.block, row.block + -(-row.slot_count // tables.SLOTS_PER_BLOCK)):
        packed = maps.row(tables.Table.SLOTS, tables.row_key(block))
        assert packed is not None, f"block {block} is beyond the table"
        ids += _IDS.unpack(packed)
    return ids[: row.slot_count]


def dead_ends(
    maps: fake.FakeMaps, frontend: bytes, also_wrong: tables.BackendState = tables.BackendState.FREE
) -> list[str]:
    """What is wrong with where a frontend row leads; `frontend` may be one that is no longer there."""
    row = tables.frontend(frontend)
    wrong = []
    for number in set(slot_ids(maps, row)):
        if number == 0:
            wrong.append("slot without a backend")
            continue
        packed = maps.row(tables.Table.BACKENDS, tables.row_key(number))
        assert packed is not None, f"backend {number} is beyond the table"
        found = tables.backend(packed)
        if found.state in (tables.BackendState.FREE, also_wrong):
            wrong.append(f"backend {number} is {tables.BackendState(found.state).name}")
        elif found.service != row.service:
            wrong.append(f"backend {number} is of service {found.service}, not {row.service}")
    return wrong


def says_none(maps: fake.FakeMaps, frontend: bytes) -> bool:
    """Whether the programs are told that there is no such frontend."""
    places = absence.frontend_places(frontend)
    row = maps.row(tables.Table.NO_FRONTENDS, tables.row_key(places[0] >> 6)) or b""
    return any(int.from_bytes(row, tables.BYTE_ORDER) >> (place & 63) & 1 for place in places)


def begin_absence(known: ledger.Ledger, maps: fake.FakeMaps) -> None:
    """Tell the programs from now on what is no frontend, as the agent does once it has a ledger."""
    maps.set_column(tables.Table.NO_FRONTENDS, "none", known.absence.begin())


def assert_all_absence_said(maps: fake.FakeMaps) -> None:
    """Whatever bit no frontend has says so."""
    keys = [key for key, _ in maps.rows(tables.Table.FRONTENDS)]
    places = {place for key in keys for place in absence.frontend_places(key)}
    words = array.array("Q", maps.column(tables.Table.NO_FRONTENDS, "none"))
    assert sum(64 - word.bit_count() for word in words) == len(places)


def dangling(maps: fake.FakeMaps) -> list[str]:
    """Whatever in the tables leads nowhere, or to something of somebody else."""
    wrong = []
    ranged = collections.Counter(service for service, _, _ in source_ranges(maps))
    for key, packed in maps.rows(tables.Table.FRONTENDS):
        row = tables.frontend(packed)
        wrong += dead_ends(maps, packed, also_wrong=tables.BackendState.DRAINING)
        if says_none(maps, key):
            wrong.append(f"{tables.frontend_key(key)} is said not to be there")
        if maps.row(tables.Table.SERVICES, tables.row_key(row.service)) is None:
            wrong.append(f"service {row.service} has no name")
        if row.flags & tables.FrontendFlag.SOURCE_RANGES and not ranged[row.service]:
            wrong.append(f"service {row.service} has no source ranges")
        if row.flags & tables.FrontendFlag.DSR and not row.flags & tables.FrontendFlag.MAGLEV:
            wrong.append("a DSR frontend without Maglev")
        if row.flags & tables.FrontendFlag.EXTERNAL_LOCAL:
            place = tables.frontend_key(key)
            outside = place._replace(scope=place.scope | tables.SCOPE_OUTSIDE)
            if maps.row(tables.Table.FRONTENDS, outside.pack()) is None:
                wrong.append(f"{place} has nothing for clients outside")
    for service in [*ranged, *(tables.earlier_key(key).service for key, _ in maps.rows("earlier_slots"))]:
        if maps.row(tables.Table.SERVICES, tables.row_key(service)) is None:
            wrong.append(f"rows of service {service}, which has no name")
    wrong += _overlaps(maps)
    for key, packed in maps.rows(tables.Table.BACKENDS):
        locality = tables.backend(packed).locality
        if locality and maps.row(tables.Table.LOCALITIES, tables.row_key(locality)) is None:
            wrong.append(f"backend {key!r} is in locality {locality}, which has no name")
    return wrong


def open_ends(maps: fake.FakeMaps) -> set[bytes]:
    """Keys of tunnel_ends: what DSR may reach from other nodes."""
    return {key for key, _ in maps.rows(tables.Table.TUNNEL_ENDS)}


def needed_ends(maps: fake.FakeMaps, row: tables.Frontend) -> set[bytes]:
    """What must be open for a DSR frontend: the backends of this node that its slots lead to."""
    ends = set()
    for number in slot_ids(maps, row):
        to = tables.backend(maps.row(tables.Table.BACKENDS, tables.row_key(number)) or b"")
        if to.sets & row.sets and to.sets & tables.BackendSet.HERE:
            ends.add(tables.TunnelEndKey(to.service, to.addr, to.port, to.proto).pack())
    return ends


def led_to_before(maps: fake.FakeMaps, row: tables.Frontend) -> tables.Frontend:
    """A DSR frontend with the slots that it drew from until its last change; none if they are not known."""
    packed = maps.row(tables.Table.EARLIER_SLOTS, tables.EarlierKey(row.service, row.sets).pack())
    before = tables.earlier(packed) if packed else tables.Earlier(0, 0)
    return row._replace(block=before.block, slot_count=before.slot_count)


def extents(maps: fake.FakeMaps) -> dict[tuple[int, int], int]:
    """How many blocks each extent has that frontends lead to, or did before; by service and first block."""
    found = {}
    for _, packed in maps.rows(tables.Table.FRONTENDS):
        row = tables.frontend(packed)
        if row.slot_count:
            found[row.service, row.block] = -(-row.slot_count // tables.SLOTS_PER_BLOCK)
    for key, packed in maps.rows(tables.Table.EARLIER_SLOTS):
        row_before = tables.earlier(packed)
        of = tables.earlier_key(key).service, row_before.block
        found[of] = -(-row_before.slot_count // tables.SLOTS_PER_BLOCK)
    return found


def _overlaps(maps: fake.FakeMaps) -> list[str]:
    wrong = []
    occupied: dict[int, tuple[int, int]] = {}  # block -> the extent that it is part of
    for extent, blocks in extents(maps).items():
        if extent[1] == 0:
            wrong.append("block 0 in use")
        for block in range(extent[1], extent[1] + blocks):
            if occupied.setdefault(block, extent) != extent:
                wrong.append(f"block {block} is of {extent} and of {occupied[block]}")
    return wrong


def source_ranges(maps: fake.FakeMaps) -> set[tuple[int, int, bytes]]:
    """Every source range: of which service, how many bits of which address."""
    keys = [tables.source_range_key(key) for key, _ in maps.rows(tables.Table.SOURCE_RANGES)]
    return {(int.from_bytes(key.service, "big"), key.prefix_bits - 32, key.addr) for key in keys}


def view(maps: fake.FakeMaps) -> dict[bytes, Served]:
    """Every frontend, resolved."""
    return {key: served(maps, packed) for key, packed in maps.rows(tables.Table.FRONTENDS)}


def served(maps: fake.FakeMaps, frontend: bytes) -> Served:
    """A frontend row, resolved."""
    row = tables.frontend(frontend)
    backends = {}
    for number in slot_ids(maps, row):
        found = tables.backend(maps.row(tables.Table.BACKENDS, tables.row_key(number)) or b"")
        backends[number] = (found.addr, found.port)
    return Served(
        maps.row(tables.Table.SERVICES, tables.row_key(row.service)) or b"",
        tuple(backends[number] for number in slot_ids(maps, row)),
        row.affinity_s,
        row.flags,
        row.sets,
        row.kind,
    )


def backends(maps: fake.FakeMaps) -> collections.Counter[tuple[typing.Any, ...]]:
    """Every backend row that is neither free nor draining, with ids resolved."""
    found: collections.Counter[tuple[typing.Any, ...]] = collections.Counter()
    for _, packed in maps.rows(tables.Table.BACKENDS):
        row = tables.backend(packed)
        if row.state != tables.BackendState.DRAINING:
            service = maps.row(tables.Table.SERVICES, tables.row_key(row.service))
            locality = maps.row(tables.Table.LOCALITIES, tables.row_key(row.locality))
            found[row._replace(service=0, locality=0), service, locality] += 1
    return found


def assert_counted(known: ledger.Ledger, maps: fake.FakeMaps) -> None:
    """The ledger knows how many rows there are of each kind that it only counts."""
    counted = {
        tables.Table.SOURCE_RANGES: known.range_rows,
        tables.Table.TUNNEL_ENDS: known.end_rows,
        tables.Table.EARLIER_SLOTS: known.earlier_rows,
    }
    assert counted == {table: len(list(maps.rows(table))) for table in counted}


def of_plans(plans: Plans, room: ledger.Capacity | None = None) -> fake.FakeMaps:
    """Tables that a ledger fills which has never known anything but these plans."""
    maps = fake.FakeMaps(SIZES)
    maps.apply(ledger.Ledger(room or capacity()).change(plans, 0.0).writes)
    return maps


def assert_same(maps: fake.FakeMaps, expected: fake.FakeMaps) -> None:
    """Both serve the same."""
    assert view(maps) == view(expected)
    assert backends(maps) == backends(expected)
    assert _allowed(maps) == _allowed(expected)
    assert _reachable(maps) == _reachable(expected)
    assert sorted(row for _, row in maps.rows(tables.Table.SERVICES)) == sorted(
        row for _, row in expected.rows(tables.Table.SERVICES)
    )


def _allowed(maps: fake.FakeMaps) -> set[tuple[typing.Any, ...]]:
    """Source ranges by the names of their services."""
    return {
        (maps.row(tables.Table.SERVICES, tables.row_key(service)), *one)
        for service, *one in source_ranges(maps)
    }


def _reachable(maps: fake.FakeMaps) -> set[tuple[typing.Any, ...]]:
    """What DSR may reach here from other nodes, by the names of its services."""
    found: set[tuple[typing.Any, ...]] = set()
    for key, number in maps.rows(tables.Table.TUNNEL_ENDS):
        end, of = tables.tunnel_end_key(key), tables.backend(maps.row(tables.Table.BACKENDS, number) or b"")
        assert (of.service, of.addr, of.port, of.proto) == end, "an end that is another backend's"
        found.add((maps.row(tables.Table.SERVICES, tables.row_key(end.service)), *end[1:]))
    return found


class Watched:
    """Makes writes one at a time and looks at the tables after each.

    It also stands for the programs that run meanwhile: whatever frontend row was
    there at some time must lead to its backends for RECYCLE_AFTER_S after it went.
    """

    def __init__(self, maps: fake.FakeMaps) -> None:
        self.maps = maps
        self._followed: list[tuple[float, bytes, bytes]] = []  # until when, the row, its service's names

    def apply(self, writes: typing.Iterable[tables.Write], now_s: float) -> None:
        """Make the writes; AssertionError after the first that leaves something dangling."""
        for write in writes:
            before = None
            if write.table is tables.Table.FRONTENDS:
                before = self.maps.row(write.table, write.key)
                self._check_earlier(write, before)
            if write.table is tables.Table.SLOTS:
                block = int.from_bytes(write.key, tables.BYTE_ORDER)
                used = extents(self.maps).items()
                assert not any(first <= block < first + size for (_, first), size in used), "in use"
            self.maps.apply([write])
            self._check_ends(write)
            if before is not None and before != self.maps.row(write.table, write.key):
                names = self._names(tables.frontend(before).service)
                self._followed.append((now_s + quarantine.RECYCLE_AFTER_S, before, names))
            self.check(now_s, f"after {write}")

    def _check_earlier(self, write: tables.Write, before: bytes | None) -> None:
        """What a DSR frontend drew from until this write must be what `earlier_slots` leads to."""
        if before is None or not isinstance(write, tables.Put):
            return
        old, new = tables.frontend(before), tables.frontend(write.value)
        both = old.flags & new.flags & tables.FrontendFlag.DSR
        if (old.service, old.sets) != (new.service, new.sets) or not both or not old.slot_count:
            return
        if old.block != new.block:
            key = tables.EarlierKey(new.service, new.sets).pack()
            row = self.maps.row(tables.Table.EARLIER_SLOTS, key)
            full = len(list(self.maps.rows("earlier_slots"))) >= self.maps.rows_of("earlier_slots")
            assert row == tables.Earlier(old.block, old.slot_count).pack() or (full and row is None)

    def _check_ends(self, write: tables.Write) -> None:
        """Ends are opened before a DSR frontend leads to them, and closed when none does any more.

        What becomes a backend of this node in the change that ends DSR is never opened.
        """
        if write.table is tables.Table.FRONTENDS and isinstance(write, tables.Put):
            row = tables.frontend(write.value)
            if row.flags & tables.FrontendFlag.DSR:
                assert needed_ends(self.maps, row) <= open_ends(self.maps), f"closed: {row}"
        elif write.table is tables.Table.TUNNEL_ENDS and isinstance(write, tables.Delete):
            for _, packed in self.maps.rows(tables.Table.FRONTENDS):
                row = tables.frontend(packed)
                if row.flags & tables.FrontendFlag.DSR:
                    for leads in (row, led_to_before(self.maps, row)):
                        assert write.key not in needed_ends(self.maps, leads), f"closed too early: {row}"

    def check(self, now_s: float, when: str) -> None:
        """AssertionError where something leads nowhere."""
        assert not dangling(self.maps), when
        self._followed = [one for one in self._followed if one[0] > now_s]
        for until_s, row, names in self._followed:
            wrong = dead_ends(self.maps, row)
            if self._names(tables.frontend(row).service) not in (b"", names):
                wrong.append("its service id is of another service now")
            assert not wrong, f"{when}: {until_s - now_s} s too early: {tables.frontend(row)}: {wrong}"

    def _names(self, service: int) -> bytes:
        row = self.maps.row(tables.Table.SERVICES, tables.row_key(service)) or b""
        return row[: abi.LAYOUTS["service_meta"].offset("affinity_s")]

    def forget_programs(self) -> None:
        """Say that a program which ran until now has ended."""
        self._followed.clear()
