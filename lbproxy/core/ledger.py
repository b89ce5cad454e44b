"""What the kernel's tables hold, and the writes that take a service to its plan.

A connection may be opened between any two writes. So what is pointed at is
written first and the pointer last: names, source ranges, backends, slots, the bits that must
no longer say that there is no such frontend, then the frontend row that leads to them, which a
hash map replaces atomically; of a pair the one for clients outside before the one that refers to
it (`writes`). A new choice of backends always goes to a fresh extent of slots. What is no longer
pointed at keeps its row for a while (`quarantine`); only then is it cleared and its id given out again.

The slots that a DSR frontend drew from until its last change stay, for its flows
have no other record on a node that did not see them begin: `earlier_slots` leads
to them.

The ledger assumes that the writes it returned are made. Where one failed, its
owner throws it away and restores a new one from a dump of the kernel.
"""

import typing

from lbproxy.core import absence, claims, installed, model, plan, pools, quarantine, tables, writes

# As plain integers: a flag's operators cost half a microsecond each.
_COUNTED: typing.Final = tables.BackendSet.COUNTED.value


class Capacity(typing.NamedTuple):
    """How many rows each table has."""

    frontends: int
    slots: int
    backends: int
    services: int
    localities: int
    source_ranges: int
    tunnel_ends: int
    earlier_slots: int


class Change(typing.NamedTuple):
    """What one step wants: writes in order, and which service ports had to stay as they were, and why."""

    writes: list[tables.Write]
    refused: dict[model.PortKey, pools.Exhausted]


class Dump(typing.NamedTuple):
    """What restoring needs of the kernel; `slots` reads so many blocks from a first one on."""

    frontends: typing.Mapping[bytes, bytes]
    services: typing.Mapping[bytes, bytes]
    localities: typing.Mapping[bytes, bytes]
    backends: typing.Mapping[int, bytes]  # every row that is not FREE
    slots: typing.Callable[[int, int], bytes]
    source_ranges: typing.Mapping[bytes, bytes]
    tunnel_ends: typing.Mapping[bytes, bytes]
    earlier_slots: typing.Mapping[bytes, bytes]


class Ledger:
    """Ids, extents and rows in use; the module's docstring says which order it keeps."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.service_ids = pools.IdPool(tables.Table.SERVICES, capacity.services)
        self.backend_ids = pools.IdPool(tables.Table.BACKENDS, capacity.backends)
        self.locality_ids = pools.IdPool(tables.Table.LOCALITIES, capacity.localities)
        self.extents = pools.ExtentPool(tables.Table.SLOTS, capacity.slots)
        self.installed: dict[model.PortKey, installed.Installed] = {}
        # Those with least-connections, a set that keeps its order; and how often one was added.
        self.counted: dict[model.PortKey, None] = {}
        self.counted_anew = 0
        # Most have one: as in the state, no tuple around each of these.
        self._ports: dict[model.ServiceName, model.PortKey | tuple[model.PortKey, ...]] = {}
        self._localities: dict[tuple[str, str], int] = {}
        self.claims = claims.Claims()
        self.absence = absence.Frontends()
        self.range_rows = 0
        self.end_rows = 0
        self.earlier_rows = 0
        self._unwritten: list[tables.Write] = []
        self._of_nobody: list[installed.Installed] = []
        self._quarantine = quarantine.Quarantine()

    def used(self) -> dict[str, int]:
        """How many rows of each table are in use, or wait to be used again."""
        return {
            tables.Table.FRONTENDS: len(self.claims),
            tables.Table.SLOTS: self.extents.used,
            tables.Table.BACKENDS: self.backend_ids.used,
            tables.Table.SERVICES: self.service_ids.used,
            tables.Table.LOCALITIES: self.locality_ids.used,
            tables.Table.SOURCE_RANGES: self.range_rows,
            tables.Table.TUNNEL_ENDS: self.end_rows,
            tables.Table.EARLIER_SLOTS: self.earlier_rows,
        }

    def grow(self, capacity: Capacity) -> None:
        """Go on with tables of other sizes, none of them smaller; their rows are what they were."""
        self.capacity = capacity
        self.service_ids.rows = capacity.services
        self.backend_ids.rows = capacity.backends
        self.locality_ids.rows = capacity.localities
        self.extents.rows = capacity.slots

    @property
    def next_due_s(self) -> float | None:
        """When `expire` next has something to do."""
        return self._quarantine.next_due_s

    def services(self) -> typing.KeysView[model.ServiceName]:
        """The Services that have something in the kernel."""
        return self._ports.keys()

    def ports(self, name: model.ServiceName) -> tuple[model.PortKey, ...]:
        """What of a Service is in the kernel."""
        known = self._ports.get(name, ())
        return (known,) if isinstance(known, model.PortKey) else known

    def change(
        self, wanted: typing.Mapping[model.ServiceName, typing.Sequence[plan.PortPlan]], now_s: float
    ) -> Change:
        """The writes that take these services to their plans; an empty plan removes a service.

        A service port for which a table has no room left keeps what it has.
        """
        out = writes.Writes()
        refused: dict[model.PortKey, pools.Exhausted] = {}
        for found in self._of_nobody:
            out.frontends_gone.update(dict.fromkeys(found.frontends))
            for frontend in found.frontends:
                self.absence.goes(frontend)
            self._discard(found, out, now_s)
        self._of_nobody = []
        for name, ports in wanted.items():
            keep = {port.key for port in ports}
            for key in self.ports(name):
                if key not in keep:
                    self._remove(key, out, now_s)
        for name, ports in wanted.items():
            for port in ports:
                try:
                    self._install(port, out, now_s)
                except pools.Exhausted as full:
                    refused[port.key] = full
            kept = tuple(port.key for port in ports if port.key in self.installed)
            self._ports.pop(name, None)
            self._set_ports(name, kept)
        out.names += self._unwritten
        self._unwritten = []
        # Only now: what goes with this change keeps its row until what comes has been written.
        self.range_rows -= len(out.ranges_gone)
        self.end_rows -= len(out.ends_gone)
        self.earlier_rows -= len(out.earlier_gone)
        out.absence_gone, out.absence = self.absence.taken(), self.absence.freed()
        return Change(out.in_order(), refused)

    def expire(self, now_s: float) -> list[tables.Write]:
        """Clear and free what has been in quarantine long enough."""
        return self._quarantine.expire(now_s, self.service_ids, self.backend_ids, self.extents)

    def counted_backends(self) -> dict[int, bytes]:
        """Address and port of each backend whose open connections are counted, by id.

        May be asked in another thread: what changes meanwhile is there or not.
        """
        found = [self.installed.get(key) for key in list(self.counted)]
        return {number: row for port in found if port for row, number in port.backend_ids.items()}

    def compact(self) -> None:
        """Make room: dicts whose every key went and came back are twice as large as they need be."""
        self.installed, self._ports = dict(self.installed), dict(self._ports)

    # --- one service port ---

    def _install(self, port: plan.PortPlan, out: writes.Writes, now_s: float) -> None:
        have = self.installed.get(port.key)
        taken = pools.Taken(self.service_ids, self.backend_ids, self.extents)
        meta = installed.meta(port)
        try:
            number = have.id if have else taken.service()
            rows = self._backend_rows(port, number, have, taken)
            slot_tables, slot_writes = self._slot_tables(port, list(rows), have, taken)
            frontends = installed.frontend_rows(port, number, slot_tables)
            ranges = [installed.range_key(number, one) for one in port.source_ranges]
            earlier = self._earlier(port, have, slot_tables)
            traits = installed.traits(meta)
            want = installed.make(number, traits, frontends, rows, slot_tables.values(), earlier, ranges)
            if have is not None and have == want:
                # As nearly always after a restart.
                self._put_installed(port.key, have)
                for frontend in frontends:
                    self.claims.claim(frontend, port.key)
                return
            new_ranges = [key for key in ranges if have is None or key not in have.ranges]
            had_ends = have.tunnel_ends if have else {}
            new_ends = want.tunnel_ends.items() - had_ends.items()
            more_ends = len(want.tunnel_ends.keys() - had_ends.keys())
            self._check_room(frontends, out)
            self._check_range_room(len(new_ranges))
            self._check_end_room(more_ends)
        except pools.Exhausted:
            taken.undo()
            raise

        if have is None or have.traits != want.traits:
            out.names.append(tables.Put(tables.Table.SERVICES, tables.row_key(number), meta))
        out.ranges += [tables.Put(tables.Table.SOURCE_RANGES, key, tables.ALLOWED) for key in new_ranges]
        self.range_rows += len(new_ranges)
        out.ranges += [tables.Put(tables.Table.TUNNEL_ENDS, *row) for row in sorted(new_ends)]
        self.end_rows += more_ends
        old_rows = have.backends if have else {}
        out.backends += [
            tables.Put(tables.Table.BACKENDS, tables.row_key(n), row)
            for n, row in rows.items()
            if old_rows.get(n) != row
        ]
        out.slots += slot_writes
        self._write_earlier(have, want, out)
        self._put_installed(port.key, want)
        self._write_frontends(port.key, frontends, have.frontends if have else {}, out)
        if have is not None:
            self._retire(have, want, out, now_s)

    def _set_ports(self, name: model.ServiceName, ports: tuple[model.PortKey, ...]) -> None:
        if ports:
            self._ports[name] = ports if len(ports) > 1 else ports[0]

    def _put_installed(self, key: model.PortKey, want: installed.Installed) -> None:
        # Anew, not in place: a key that was restored is a copy of what the state holds anyway. So are
        # those that claims hold.
        self.installed.pop(key, None)
        self.installed[key] = want
        self._note_counted(key, want)

    def _note_counted(self, key: model.PortKey, want: installed.Installed) -> None:
        if want.algorithm != model.Algorithm.LEAST_CONNECTIONS:
            self.counted.pop(key, None)
        elif key not in self.counted:
            self.counted[key] = None
            self.counted_anew += 1

    def _backend_rows(
        self, port: plan.PortPlan, service: int, have: installed.Installed | None, taken: pools.Taken
    ) -> dict[int, bytes]:
        ids = have.backend_ids if have else {}
        rows: dict[int, bytes] = {}
        protocol = port.key.protocol
        counted = _COUNTED if port.algorithm is model.Algorithm.LEAST_CONNECTIONS else 0
        for backend in port.backends:
            port_be = backend.port.to_bytes(2, "big")
            number = ids.get(backend.address + port_be) or taken.backend()
            rows[number] = tables.pack_backend(
                backend.address,
                port_be,
                protocol,
                backend.state,
                service,
                self._locality(backend.node_name, backend.zone),
                backend.weight,
                backend.sets | backend.left_out | counted,
                backend.health,
            )
        return rows

    def _slot_tables(
        self, port: plan.PortPlan, ids: list[int], have: installed.Installed | None, taken: pools.Taken
    ) -> tuple[dict[int, installed.SlotTable], list[tables.Write]]:
        """A table for each set that a frontend draws from and that has backends; the writes for new ones."""
        made: dict[int, installed.SlotTable] = {}
        writes: list[tables.Write] = []
        sets = {int(frontend.set): frontend.set for frontend in port.frontends}
        for bit in sorted(sets):
            chosen = [ids[index] for index in plan.slots(port, sets[bit])]
            if not chosen:
                continue
            packed = installed.blocks(chosen)
            digest = installed.digest(packed, len(chosen))
            old = have.table(bit) if have else None
            if old is not None and (old.digest, old.slot_count) == (digest, len(chosen)):
                made[bit] = old
                continue
            extent = taken.extent(len(packed) // tables.BLOCK_SIZE)
            made[bit] = installed.SlotTable(bit, extent.start, extent.blocks, len(chosen), digest)
            for block in range(extent.blocks):
                row = packed[block * tables.BLOCK_SIZE : (block + 1) * tables.BLOCK_SIZE]
                writes.append(tables.Put(tables.Table.SLOTS, tables.row_key(extent.start + block), row))
        return made, writes

    def _check_room(self, frontends: typing.Iterable[bytes], out: writes.Writes) -> None:
        more = sum(1 for key in frontends if key not in self.claims and key not in out.frontends_gone)
        # What goes with this change keeps its row until what comes has been written.
        if more and len(self.claims) + len(out.frontends_gone) + more > self.capacity.frontends:
            raise pools.Exhausted(tables.Table.FRONTENDS, self.capacity.frontends)

    def _check_range_room(self, more: int) -> None:
        # Here too: what goes with this change goes last.
        if more and self.range_rows + more > self.capacity.source_ranges:
            raise pools.Exhausted(tables.Table.SOURCE_RANGES, self.capacity.source_ranges)

    def _check_end_room(self, more: int) -> None:
        if more and self.end_rows + more > self.capacity.tunnel_ends:
            raise pools.Exhausted(tables.Table.TUNNEL_ENDS, self.capacity.tunnel_ends)

    # --- what DSR frontends drew from before ---

    def _earlier(
        self,
        port: plan.PortPlan,
        have: installed.Installed | None,
        made: dict[int, installed.SlotTable],
    ) -> list[installed.SlotTable]:
        """The table before the last change of each set that DSR frontends draw from.

        Where the table has no room for another row there is none: it only matters to
        flows that come to another node than before.
        """
        if have is None:
            return []
        room = self.capacity.earlier_slots - self.earlier_rows
        kept = []
        for bit in sorted({int(frontend.set) for frontend in port.frontends if frontend.dsr}):
            known = next((table for table in have.earlier if table.set == bit), None)
            before = have.table(bit)
            if before is None or before == made.get(bit) or not have.is_dsr(bit):
                before = known
            if before is None or before == made.get(bit):
                continue
            if known is None:
                if room < 1:
                    continue
                room -= 1
            kept.append(before)
        return kept

    def _write_earlier(
        self, have: installed.Installed | None, want: installed.Installed, out: writes.Writes
    ) -> None:
        known = {table.set: table for table in have.earlier} if have else {}
        for table in want.earlier:
            if known.get(table.set) != table:
                key = tables.EarlierKey(want.id, table.set).pack()
                row = tables.Earlier(table.start, table.slot_count).pack()
                out.earlier.append(tables.Put(tables.Table.EARLIER_SLOTS, key, row))
                self.earlier_rows += table.set not in known

    # --- frontends: two services may claim the same one ---

    def _write_frontends(
        self, port: model.PortKey, want: dict[bytes, bytes], have: dict[bytes, bytes], out: writes.Writes
    ) -> None:
        for key, row in want.items():
            owner = self.claims.owner(key)
            had = owner == port
            if owner is None:
                self.absence.comes(key)
            out.frontends_gone.pop(key, None)
            if self.claims.claim(key, port) and not (had and have.get(key) == row):
                out.frontends[key] = row
        for key in have.keys() - want.keys():
            self._release(key, port, out)

    def _release(self, key: bytes, port: model.PortKey, out: writes.Writes) -> None:
        """Give up a frontend to the next one that claims it; without one it goes."""
        had, heir = self.claims.release(key, port)
        if had and heir is not None:
            out.frontends[key] = self.installed[heir].frontends[key]
        elif had:
            out.remove_frontend(key)
            self.absence.goes(key)

    # --- going ---

    def _retire(
        self, have: installed.Installed, want: installed.Installed, out: writes.Writes, now_s: float
    ) -> None:
        """Mark what the new version no longer uses; its rows stay readable for now."""
        kept = want.backends
        for number, row in have.backends.items():
            if number in kept:
                continue
            out.retired.append(_draining(number, row))
            counted = bool(tables.backend(row).sets & _COUNTED)
            self._quarantine.add(now_s, backend=number, counted=counted)
        for extent in sorted(have.extents - want.extents):
            self._quarantine.add(now_s, extent=extent)
        out.ranges_gone += [
            tables.Delete(tables.Table.SOURCE_RANGES, key) for key in have.ranges if key not in want.ranges
        ]
        # Behind the marks of their backends: nobody draws what other nodes may not send here.
        ends_gone = sorted(have.tunnel_ends.keys() - want.tunnel_ends.keys())
        out.ends_gone += [tables.Delete(tables.Table.TUNNEL_ENDS, key) for key in ends_gone]
        sets = {table.set for table in want.earlier}
        out.earlier_gone += [
            tables.Delete(tables.Table.EARLIER_SLOTS, tables.EarlierKey(have.id, table.set).pack())
            for table in have.earlier
            if table.set not in sets
        ]

    def _remove(self, key: model.PortKey, out: writes.Writes, now_s: float) -> None:
        have = self.installed.pop(key)
        self.counted.pop(key, None)
        for frontend in have.frontends:
            self._release(frontend, key, out)
        self._discard(have, out, now_s)

    def _discard(self, have: installed.Installed, out: writes.Writes, now_s: float) -> None:
        """Retire everything that a service port had but its frontends."""
        self._retire(have, installed.make(have.id, b"", {}, {}, ()), out, now_s)
        out.names_gone.append(tables.Delete(tables.Table.SERVICES, tables.row_key(have.id)))
        self._quarantine.add(now_s, service=have.id)

    # --- localities ---

    def _locality(self, node: str, zone: str) -> int:
        """The id that stands for a node and zone.

        Where the table is full they stay unnamed: the names only serve people's eyes.
        """
        if not node and not zone:
            return 0
        number = self._localities.get((node, zone), 0)
        if number:
            return number
        try:
            number = self.locality_ids.take()
        except pools.Exhausted:
            return 0
        self._localities[node, zone] = number
        row = tables.Locality(node.encode(), zone.encode()).pack()
        self._unwritten.append(tables.Put(tables.Table.LOCALITIES, tables.row_key(number), row))
        return number

    # --- starting over from what the kernel holds ---

    def adopt(self, key: model.PortKey, found: installed.Installed) -> None:
        """Take a service port as the kernel has it."""
        self.installed[key] = found
        self._note_counted(key, found)
        self._set_ports(key.service, (*self.ports(key.service), key))
        for frontend in found.frontends:
            self.claims.claim(frontend, key)
            self.absence.comes(frontend)
        self._count(found)

    def adopt_locality(self, number: int, node: str, zone: str) -> None:
        """Take a named locality as the kernel has it."""
        self._localities[node, zone] = number

    def adopt_of_nobody(self, found: installed.Installed) -> None:
        """Take what no service port has a claim to: it stays as it is until the next change removes it."""
        self._of_nobody.append(found)
        for frontend in found.frontends:
            self.absence.comes(frontend)
        self._count(found)

    def adopt_unused(self, table: tables.Table, keys: typing.Iterable[bytes]) -> None:
        """Remove these rows with the next change, before their ids are given out again."""
        self._unwritten += [tables.Delete(table, key) for key in keys]

    def adopt_missing(self, table: tables.Table, rows: typing.Mapping[bytes, bytes]) -> None:
        """Write these rows with the next change: whoever was killed did not come to it."""
        self._unwritten += [tables.Put(table, key, row) for key, row in rows.items()]

    def adopt_draining(self, number: int, now_s: float) -> None:
        """Take a backend row that nothing leads to any more; it is cleared in due time."""
        self._quarantine.add(now_s, backend=number, counted=True)

    def _count(self, found: installed.Installed) -> None:
        self.range_rows += len(found.ranges)
        self.end_rows += len(found.tunnel_ends)
        self.earlier_rows += len(found.earlier)


def _draining(number: int, row: bytes) -> tables.Write:
    marked = tables.backend(row)._replace(state=tables.BackendState.DRAINING, sets=0).pack()
    return tables.Put(tables.Table.BACKENDS, tables.row_key(number), marked)
