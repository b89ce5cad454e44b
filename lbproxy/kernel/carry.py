"""Carries the contents of maps over to successors of another size or layout.

Rows are translated field by field, by name: a new field is zero, a gone one is
left out. Rows that are already there are newer and stay. Layouts come from the
identities of both generations, for neither need be this version's: whoever
starts next ends what an earlier version began.
"""

import contextlib
import errno
import itertools
import mmap
import os
import pathlib
import sys
import typing

from lbproxy import abi
from lbproxy.kernel import generation, grace, identity, libbpf, map_rows, moving

_SPILL_PEER: typing.Final = abi.constant("SPILL_PEER")
_SPILL_FORWARD: typing.Final = abi.constant("SPILL_FORWARD")
_MARKED: typing.Final = (1).to_bytes(4, sys.byteorder)
_MMAPABLE: typing.Final = abi.constant("MMAPABLE")

Translate = typing.Callable[[bytes], bytes]
TranslateRow = typing.Callable[[bytes, bytes], bytes]  # of a key and a value
_BATCH_ROWS: typing.Final = 256  # so few that hardly a program writes one of them in between
_FLOWS: typing.Final = ("flows", "flows_new")
# Not to be copied from another layout: zeros say nothing, and the agent finds out anew.
_DERIVED: typing.Final = frozenset({abi.TAILS, "no_flows", "no_frontends"})
Fields = typing.Sequence[identity.FieldOf]
Records = dict[int, bytes]  # by the cookies of their sockets


def translator(old: Fields | None, new: Fields | None, size: int) -> Translate:
    """A function from bytes of one layout to `size` bytes of another; None for what is no struct."""
    if old is None or new is None:
        return lambda row: row[:size].ljust(size, b"\0")
    before = {field.name: field for field in old}
    moves = [
        (before[field.name].offset, field.offset, field.size)
        for field in new
        if field.name in before and before[field.name].size == field.size
    ]

    def translate(row: bytes) -> bytes:
        made = bytearray(size)
        for source, target, length in moves:
            made[target : target + length] = row[source : source + length]
        return bytes(made)

    return translate


def carry(
    name: str,
    old_fd: int,
    new_fd: int,
    before: identity.Identity,
    after: identity.Identity,
    done: set[bytes] | None = None,
) -> None:
    """Copy what is in the old map and not yet in the new one; `sockets` needs `Sockets` instead.

    `done` are keys of a hash map that need not be looked at again; those copied are added.
    """
    key_of, value_of = translators(name, new_fd, before, after)
    if libbpf.map_info(new_fd).type == libbpf.MAP_TYPES["array"]:
        _carry_array(old_fd, new_fd, value_of)
    else:
        flow_of = _flows_of_both_addresses(before, after) if name in _FLOWS else None
        for key, value in map_rows.dump(old_fd, libbpf.map_info(old_fd)):
            if done is not None:
                if key in done:
                    continue
                done.add(key)
            made = flow_of(key, value) if flow_of else value_of(value)
            _put_if_absent(new_fd, key_of(key), made)


def translators(
    name: str, new_fd: int, before: identity.Identity, after: identity.Identity
) -> tuple[Translate, Translate]:
    """What translates a map's keys, and its values."""
    info = libbpf.map_info(new_fd)
    old_key, old_value = before.maps.get(name, ("", ""))
    new_key, new_value = after.maps.get(name, ("", ""))
    return (
        translator(before.structs.get(old_key), after.structs.get(new_key), info.key_size),
        translator(before.structs.get(old_value), after.structs.get(new_value), info.value_size),
    )


def _flows_of_both_addresses(before: identity.Identity, after: identity.Identity) -> TranslateRow | None:
    """What translates flows of ABI 2, which named the address that stays as well; None for other layouts."""
    old_key, old, new = _Struct(before, "flow_key"), _Struct(before, "flow"), _Struct(after, "flow")
    if not old.has("src", "dst") or not new.has("addr"):
        return None

    def translate(key: bytes, row: bytes) -> bytes:
        turned = "src" if old_key.number("stage", key) else "dst"
        numbers = {name: old.number(name, row) for name in ("backend", "seen", "service", "state")}
        ports = {name: row[old.place(name)] for name in ("sport", "dport")}
        return new.pack(addr=row[old.place(turned)], **ports, **numbers)

    return translate


def _put_if_absent(fd: int, key: bytes, value: bytes) -> None:
    try:
        map_rows.update(fd, key, value, map_rows.NOEXIST)
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise


def _carry_array(old_fd: int, new_fd: int, value_of: Translate) -> None:
    info = libbpf.map_info(new_fd)
    there = {key for key, _ in map_rows.dump_array(new_fd, info)}
    rows = map_rows.dump_array(old_fd, libbpf.map_info(old_fd))
    missing = (
        (key, value_of(row))
        for key, row in rows
        if key not in there and int.from_bytes(key, sys.byteorder) < info.max_entries
    )
    while batch := list(itertools.islice(missing, _BATCH_ROWS)):
        keys, values = map(b"".join, zip(*batch, strict=True))
        map_rows.update_batch(new_fd, keys, values, len(batch))


class Transfer:
    """What the maps of one generation hand over to those of the next.

    `begin` comes before any hook is switched, `end` after all of them are. Between
    the two the process may be killed: `end` then is for the next one.
    """

    def __init__(self, old: generation.Generation, new: generation.Generation) -> None:
        """Open the maps that are not the same in both. Raises OSError."""
        self._snapshot = new.folder / generation.CARRIED
        self._stack = contextlib.ExitStack()
        before, after = old.identity(), new.identity()
        assert before is not None
        assert after is not None
        self._before, self._after = before, after
        self._flows: dict[str, set[bytes]] = {name: set() for name in _FLOWS}
        with contextlib.ExitStack() as stack:
            old_ids, new_ids = old.map_ids(), new.map_ids()
            self._maps = {
                name: (
                    stack.enter_context(generation.opened(old.maps_dir / name)),
                    stack.enter_context(generation.opened(new.maps_dir / name)),
                )
                for name, number in old_ids.items()
                if new_ids.get(name, number) != number and name not in _DERIVED
            }
            self._moving = self._open_moving(old_ids, new, stack)
            self._sockets = self._open_sockets(new, stack)
            self._stack = stack.pop_all()

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self) -> None:
        """Copy everything, and pin a note of which sockets' records that were."""
        if self._moving is not None:
            self._moving.begin()
        self._carry_tables()
        if self._sockets is not None:
            _pin_records(self._snapshot, self._sockets.copy())
        # Flows that have begun meanwhile: until `end` the new programs would not know those.
        self._carry_flows()

    def end(self) -> None:
        """Make up for what the old programs did between the copy and the switch."""
        if self._moving is not None:
            self._moving.end()
        else:
            grace.wait_for_programs()
        self._carry_tables()
        if self._sockets is not None:
            self._sockets.settle(_pinned_records(self._snapshot, self._after))

    def _carry_tables(self) -> None:
        self._carry_flows()
        for name, (old_fd, new_fd) in self._maps.items():
            if name != "sockets" and name not in self._flows:
                carry(name, old_fd, new_fd, self._before, self._after)

    def _carry_flows(self) -> None:
        for name, done in self._flows.items():
            if name in self._maps:
                carry(name, *self._maps[name], self._before, self._after, done)

    def _open_moving(
        self, old_ids: typing.Mapping[str, int], new: generation.Generation, stack: contextlib.ExitStack
    ) -> moving.Moving | None:
        """Whether the new programs know the old table of flows: then its rows need not be copied."""
        if new.map_ids().get(abi.FLOWS_BEFORE, 0) != old_ids.get("flows"):
            return None
        handover_fd = stack.enter_context(generation.opened(new.maps_dir / "handover"))
        return moving.Moving(*self._maps.pop("flows"), handover_fd)

    def _open_sockets(self, new: generation.Generation, stack: contextlib.ExitStack) -> "Sockets | None":
        if "sockets" not in self._maps or not Sockets.knows(self._after):
            return None
        old_fd, new_fd = self._maps["sockets"]
        _, value_of = translators("sockets", new_fd, self._before, self._after)
        spill_fd = stack.enter_context(generation.opened(new.maps_dir / "socket_spill"))
        sockets = Sockets(old_fd, new_fd, value_of, spill_fd, self._after)
        stack.callback(sockets.close)
        return sockets


def _pin_records(path: pathlib.Path, records: Records) -> None:
    if not records:
        return
    size = len(next(iter(records.values())))
    fd = libbpf.map_create("array", path.name, 4, size, len(records), _MMAPABLE)
    try:
        keys = b"".join(number.to_bytes(4, sys.byteorder) for number in range(len(records)))
        map_rows.update_batch(fd, keys, b"".join(records.values()), len(records))
        libbpf.obj_pin(fd, str(path))
    finally:
        os.close(fd)


def _pinned_records(path: pathlib.Path, made_by: identity.Identity) -> Records:
    record = _Struct(made_by, "socket_record")
    try:
        with generation.opened(path) as fd:
            rows = [row for _, row in map_rows.dump_array(fd, libbpf.map_info(fd))]
    except FileNotFoundError:
        return {}
    return {record.number("cookie", row): row for row in rows}


class _Struct:
    """A struct as the identity of some version describes it."""

    def __init__(self, made_by: identity.Identity, name: str) -> None:
        fields = made_by.structs.get(name, ())
        self._places = {field.name: slice(field.offset, field.offset + field.size) for field in fields}
        self.size = max((place.stop for place in self._places.values()), default=0)

    def has(self, *fields: str) -> bool:
        return self._places.keys() >= set(fields)

    def place(self, field: str) -> slice:
        return self._places[field]

    def number(self, field: str, row: bytes) -> int:
        return int.from_bytes(row[self.place(field)], sys.byteorder)

    def without(self, field: str, row: bytes) -> bytes:
        place = self.place(field)
        return row[: place.start] + row[place.stop :]

    def pack(self, **values: bytes | int) -> bytes:
        made = bytearray(self.size)
        for field, value in values.items():
            place = self.place(field)
            size = place.stop - place.start
            made[place] = value if isinstance(value, bytes) else value.to_bytes(size, sys.byteorder)
        return bytes(made)


class Sockets:
    """Carries socket records over: `copy` before the programs are switched, `settle` after.

    No record of a live socket may be lost or overwritten, and none of a dead one may
    stay, for its row would never be given back. So rows are only written while no
    program claims any; later on a record goes to the spill map, which forgets what
    nobody asks for. Both rest on `sock_release` being switched first.
    """

    def __init__(
        self, old_fd: int, new_fd: int, value_of: Translate, spill_fd: int, after: identity.Identity
    ) -> None:
        """Take descriptors of the tables and of the new spill map, which has its contents already."""
        self._old_fd = old_fd
        self._value_of = value_of
        self._spill_fd = spill_fd
        self._record = _Struct(after, "socket_record")
        self._spill_key = _Struct(after, "socket_spill_key")
        info = libbpf.map_info(new_fd)
        self._size = info.value_size
        self._mask = info.max_entries - 1
        length = -(-self._size * info.max_entries // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(new_fd, length)

    @staticmethod
    def knows(after: identity.Identity) -> bool:
        """Whether that version's records have what is needed here."""
        record, key = _Struct(after, "socket_record"), _Struct(after, "socket_spill_key")
        return record.has("cookie", "frontend_addr", "frontend_port", "backend", "spilled") and key.has(
            "cookie", "addr", "port", "kind"
        )

    def copy(self) -> Records:
        """Give each record the row that its cookie now falls on, or a place in the spill map."""
        records = self._records()
        for cookie, record in records.items():
            start = self._start(cookie)
            if self._owner(cookie):
                self._spill(cookie, record)
            else:
                self._memory[start : start + self._size] = record
        self._mark_spilled()
        return records

    def settle(self, copied: Records) -> None:
        """Forget what was released since it was copied, and take what was recorded since."""
        records = self._records()
        for cookie in copied.keys() - records.keys():
            self._forget(cookie, copied[cookie])
        for cookie in records.keys() - copied.keys():
            # One that has connected again since has a newer record.
            if self._owner(cookie) != cookie:
                self._spill(cookie, records[cookie])
        self._mark_spilled()

    def close(self) -> None:
        """Let go of the new table."""
        self._memory.close()

    def _records(self) -> Records:
        rows = map_rows.dump_array(self._old_fd, libbpf.map_info(self._old_fd))
        records = {
            self._record.number("cookie", row): row for row in (self._value_of(row) for _, row in rows)
        }
        records.pop(0, None)
        return records

    def _start(self, cookie: int) -> int:
        return (cookie & self._mask) * self._size

    def _row(self, cookie: int) -> bytes:
        start = self._start(cookie)
        return self._memory[start : start + self._size]

    def _owner(self, cookie: int) -> int:
        return self._record.number("cookie", self._row(cookie))

    def _store(self, field: str, cookie: int, value: bytes) -> None:
        # Nothing but the field: programs write the rest of the row at the same time.
        start = self._start(cookie) + self._record.place(field).start
        self._memory[start : start + len(value)] = value

    def _forget(self, cookie: int, copied: bytes) -> None:
        """Give back what a record was copied to, unless its socket has a newer record there."""
        row = self._row(cookie)
        if self._record.without("spilled", row) == self._record.without("spilled", copied):
            # In this order, as the programs do: a row that is free has no backend.
            self._store("backend", cookie, bytes(4))
            self._store("cookie", cookie, bytes(8))
        key = self._spill_key.pack(cookie=cookie, kind=_SPILL_PEER)
        if map_rows.lookup(self._spill_fd, key, self._size) == copied:
            map_rows.delete(self._spill_fd, key)

    def _spill(self, cookie: int, record: bytes) -> None:
        # A record does not tell whether its socket is connected: it can be found either way.
        addr, port = (record[self._record.place(field)] for field in ("frontend_addr", "frontend_port"))
        peer = self._spill_key.pack(cookie=cookie, kind=_SPILL_PEER)
        forward = self._spill_key.pack(cookie=cookie, addr=addr, port=port, kind=_SPILL_FORWARD)
        for key in (peer, forward):
            _put_if_absent(self._spill_fd, key, record)

    def _mark_spilled(self) -> None:
        """Say in their rows which sockets have records in the spill map: it is looked at only then."""
        for key, _ in map_rows.dump(self._spill_fd, libbpf.map_info(self._spill_fd)):
            self._store("spilled", self._spill_key.number("cookie", key), _MARKED)
