"""A ledger out of what the kernel holds: after a restart, or when a write has failed.

Ids are restored before anything is planned: a new id for an old backend would
break affinity and what sockets remember. What belongs to nobody (left by an agent
that was killed between two writes) is cleared.
"""

import collections
import typing

from lbproxy.core import installed, ledger, model, pools, tables, topology


def restore(capacity: ledger.Capacity, dump: ledger.Dump, now_s: float) -> ledger.Ledger:
    """The ledger that a dump amounts to. Its first change also removes what belongs to nobody."""
    fresh = ledger.Ledger(capacity)
    frontends = _frontends_by_service(dump)
    ports = _ports(dump, frontends)
    of_nobody = {int.from_bytes(key, tables.BYTE_ORDER) for key in dump.services} | frontends.keys()
    of_nobody -= ports.keys()
    backends: dict[int, dict[int, bytes]] = collections.defaultdict(dict)
    localities: set[int] = set()  # that backends are in
    for number, row in dump.backends.items():
        found = tables.backend(row)
        localities.add(found.locality)
        known = found.service in ports or found.service in of_nobody
        if known and found.state != tables.BackendState.DRAINING:
            backends[found.service][number] = row
        else:
            fresh.adopt_draining(number, now_s)

    ranges, earlier = _source_ranges(dump), _earlier(dump)
    extents: set[pools.Extent] = set()
    ends: dict[bytes, bytes] = {}
    for service in (*ports, *of_nobody):
        rows = frontends.get(service, {})
        traits = installed.traits(dump.services.get(tables.row_key(service), b""))
        held = installed.make(
            service,
            traits,
            rows,
            backends[service],
            _slot_tables(rows, dump),
            earlier.pop(service, ()),
            ranges.pop(service, ()),
        )
        extents |= held.extents
        ends |= held.tunnel_ends
        if service in ports:
            fresh.adopt(ports[service], held)
        else:
            fresh.adopt_of_nobody(held)

    fresh.adopt_unused(tables.Table.TUNNEL_ENDS, dump.tunnel_ends.keys() - ends.keys())
    fresh.adopt_missing(tables.Table.TUNNEL_ENDS, dict(sorted(ends.items() - dump.tunnel_ends.items())))
    fresh.adopt_unused(tables.Table.SOURCE_RANGES, (key for keys in ranges.values() for key in keys))
    unled = ((number, table.set) for number, left in earlier.items() for table in left)
    fresh.adopt_unused(tables.Table.EARLIER_SLOTS, (tables.EarlierKey(*one).pack() for one in unled))
    fresh.service_ids.restore(ports.keys() | of_nobody)
    fresh.backend_ids.restore(dump.backends.keys())
    fresh.locality_ids.restore(_localities(fresh, dump, localities))
    fresh.extents.restore(extents)
    return fresh


def unhealthy(
    known: ledger.Ledger, source: tables.Health
) -> typing.Iterator[tuple[model.PortKey, topology.Place]]:
    """The backends that the kernel's rows say this source speaks against: what an earlier agent knew.

    Whoever takes them over has to speak for them again some day: nobody else does.
    """
    for port, held in known.installed.items():
        for backend in map(tables.backend, held.unhealthy):
            if backend.health & source:
                yield port, topology.Place(backend.addr, int.from_bytes(backend.port, "big"))


def _frontends_by_service(dump: ledger.Dump) -> dict[int, dict[bytes, bytes]]:
    grouped: dict[int, dict[bytes, bytes]] = collections.defaultdict(dict)
    for key, row in dump.frontends.items():
        grouped[tables.frontend(row).service][key] = row
    return grouped


def _ports(
    dump: ledger.Dump, frontends: typing.Mapping[int, typing.Mapping[bytes, bytes]]
) -> dict[int, model.PortKey]:
    """Service ids and what they name. Of two ids with one name the one with more frontends stays."""
    chosen: dict[model.PortKey, int] = {}
    for key, row in dump.services.items():
        number = int.from_bytes(key, tables.BYTE_ORDER)
        try:
            port = installed.port_key(row)
        except ValueError:
            continue
        rival = chosen.get(port)
        if rival is None or len(frontends.get(number, ())) > len(frontends.get(rival, ())):
            chosen[port] = number
    return {number: port for port, number in chosen.items()}


def _slot_tables(frontends: typing.Mapping[bytes, bytes], dump: ledger.Dump) -> list[installed.SlotTable]:
    """The tables that these frontends lead to.

    An agent that was killed half way through its frontend rows leaves two tables
    for one set; both are kept until the next plan settles on one.
    """
    found: dict[tuple[int, int], installed.SlotTable] = {}
    for row in map(tables.frontend, frontends.values()):
        if row.slot_count and (row.sets, row.block) not in found:
            found[row.sets, row.block] = _slot_table(row.sets, row.block, row.slot_count, dump)
    return list(found.values())


def _slot_table(bit: int, block: int, slot_count: int, dump: ledger.Dump) -> installed.SlotTable:
    blocks = -(-slot_count // tables.SLOTS_PER_BLOCK)
    digest = installed.digest(dump.slots(block, blocks), slot_count)
    return installed.SlotTable(bit, block, blocks, slot_count, digest)


def _earlier(dump: ledger.Dump) -> dict[int, list[installed.SlotTable]]:
    """What DSR frontends drew from before, by service."""
    found: dict[int, list[installed.SlotTable]] = collections.defaultdict(list)
    for key, row in dump.earlier_slots.items():
        service, bit = tables.earlier_key(key)
        found[service].append(_slot_table(bit, *tables.earlier(row), dump))
    return found


def _source_ranges(dump: ledger.Dump) -> dict[int, list[bytes]]:
    """Keys of source ranges by service."""
    found: dict[int, list[bytes]] = collections.defaultdict(list)
    for key in dump.source_ranges:
        found[int.from_bytes(tables.source_range_key(key).service, "big")].append(key)
    return found


def _localities(
    fresh: ledger.Ledger, dump: ledger.Dump, used: typing.Collection[int]
) -> typing.Collection[int]:
    held: set[int] = set()
    unused: list[bytes] = []
    for key, row in dump.localities.items():
        number = int.from_bytes(key, tables.BYTE_ORDER)
        if number not in used:
            unused.append(key)
            continue
        names = tables.locality(row)
        fresh.adopt_locality(number, tables.text(names.node), tables.text(names.zone))
        held.add(number)
    fresh.adopt_unused(tables.Table.LOCALITIES, unused)
    return held
