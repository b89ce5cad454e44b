"""Maps of another size or layout take over what their predecessors hold."""

import collections.abc
import contextlib
import itertools
import os
import struct
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy import abi
from lbproxy.core import tables
from lbproxy.kernel import carry, identity, libbpf, map_rows

THIS = identity.of_this_version("", "", {})
RECORD = abi.LAYOUTS["socket_record"]
SPILL_KEY = abi.LAYOUTS["socket_spill_key"]
PEER = abi.constant("SPILL_PEER")
Create = collections.abc.Callable[..., int]


@pytest.fixture
def create() -> collections.abc.Iterator[Create]:
    """A function that makes a map of the given name and rows, in its layout or another."""
    with contextlib.ExitStack() as stack:

        def created(name: str, rows: int, value_size: int = 0) -> int:
            spec = abi.MAPS[name]
            fd = libbpf.map_create(
                spec.type, name, spec.key_size, value_size or spec.value_size, rows, spec.flags
            )
            stack.callback(os.close, fd)
            return fd

        yield created


def contents(fd: int) -> dict[bytes, bytes]:
    return {key: row for key, row in map_rows.dump(fd, libbpf.map_info(fd)) if any(row)}


def fill(fd: int, rows: typing.Mapping[bytes, bytes]) -> None:
    for key, row in rows.items():
        map_rows.update(fd, key, row)


def some_rows(name: str, count: int) -> dict[bytes, bytes]:
    spec = abi.MAPS[name]
    return {
        number.to_bytes(spec.key_size, "little"): bytes([number + 1]) * spec.value_size
        for number in range(count)
    }


@pytest.mark.parametrize("name", [name for name in abi.MAPS if name != "sockets"])
def test_a_larger_map_takes_every_row(create: Create, name: str) -> None:
    # A map that keeps its rows in a list for each CPU has its whole share of them for this one.
    cpus = abi.possible_cpus()
    old, new = create(name, 4 * cpus), create(name, 64 * cpus)
    rows = some_rows(name, 4)
    fill(old, rows)
    carry.carry(name, old, new, THIS, THIS)
    assert contents(new) == rows


@pytest.mark.parametrize("name", ["frontends", "backends", "affinity"])
def test_a_row_that_is_already_there_is_newer_and_stays(create: Create, name: str) -> None:
    old, new = create(name, 8), create(name, 16)
    rows = some_rows(name, 3)
    fill(old, rows)
    first = next(iter(rows))
    newer = b"\x99" * abi.MAPS[name].value_size
    fill(new, {first: newer})
    carry.carry(name, old, new, THIS, THIS)
    assert contents(new) == rows | {first: newer}


@pytest.mark.parametrize("name", ["flows", "flows_new"])
def test_a_second_copy_of_flows_takes_only_those_that_have_begun_since(create: Create, name: str) -> None:
    old, new = create(name, 8), create(name, 16)
    rows = some_rows(name, 4)
    *early, late = rows
    fill(old, {key: rows[key] for key in early})
    done: set[bytes] = set()
    carry.carry(name, old, new, THIS, THIS, done)
    assert done == set(early)
    map_rows.delete(new, early[0])  # it has ended
    fill(old, {late: rows[late]})
    carry.carry(name, old, new, THIS, THIS, done)
    assert contents(new) == {key: row for key, row in rows.items() if key != early[0]}


def test_an_array_that_shrinks_keeps_what_it_has_room_for(create: Create) -> None:
    old, new = create("service_stats", 8), create("service_stats", 2)
    rows = some_rows("service_stats", 8)
    fill(old, rows)
    carry.carry("service_stats", old, new, THIS, THIS)
    assert contents(new) == dict(list(rows.items())[:2])


def test_an_lru_map_that_shrinks_is_not_an_error(create: Create) -> None:
    old, new = create("affinity", 256), create("affinity", 32)
    fill(old, some_rows("affinity", 100))
    carry.carry("affinity", old, new, THIS, THIS)
    assert 0 < len(contents(new)) <= 100


# --- layouts ---


def test_fields_are_moved_by_name(create: Create) -> None:
    """An earlier version had the fields of a backend in another order, lacked one and had one more."""
    fields = [field for field in abi.LAYOUTS["backend"].fields if field.name not in ("weight", "health")]
    older, at = [identity.FieldOf("gone", 0, 4)], 4
    for field in reversed(fields):
        older.append(identity.FieldOf(field.name, at, field.size))
        at += field.size
    values = {field.name: bytes([number + 1]) * field.size for number, field in enumerate(fields)}
    packed = b"gone" + b"".join(values[field.name] for field in reversed(fields))
    old, new = create("backends", 4, value_size=len(packed)), create("backends", 4)
    fill(old, {bytes(4): packed})
    before = identity.Identity("", "", 0, "", {}, THIS.structs | {"backend": tuple(older)}, THIS.maps)
    carry.carry("backends", old, new, before, THIS)
    [row] = contents(new).values()
    for field in abi.LAYOUTS["backend"].fields:
        expected = values.get(field.name, bytes(field.size))
        assert row[field.offset : field.offset + field.size] == expected, field.name


def test_keys_are_translated_too(create: Create) -> None:
    older = tuple(
        identity.FieldOf(name, offset, size)
        for name, offset, size in (("scope", 0, 1), ("proto", 1, 1), ("port", 2, 2), ("addr", 4, 16))
    )
    old, new = create("frontends", 4), create("frontends", 4)
    row = b"\x05" * abi.MAPS["frontends"].value_size
    fill(old, {b"\x01\x06\x00\x50" + bytes(range(16)): row})
    before = identity.Identity("", "", 0, "", {}, THIS.structs | {"frontend_key": older}, THIS.maps)
    carry.carry("frontends", old, new, before, THIS)
    assert contents(new) == {bytes(range(16)) + b"\x00\x50\x06\x01": row}


def test_flows_that_named_both_addresses_keep_the_one_that_changes(create: Create) -> None:
    fields = (("src", 16), ("dst", 16), ("sport", 2), ("dport", 2), *((name, 4) for name in ("backend",
              "service", "seen", "state")))  # fmt: skip
    ends = itertools.accumulate((size for _, size in fields), initial=0)
    older = tuple(identity.FieldOf(name, at, size) for (name, size), at in zip(fields, ends, strict=False))
    before = identity.Identity("", "", 2, "", {}, THIS.structs | {"flow": older}, THIS.maps)
    client, service, pod = (bytes([number]) * 16 for number in range(3))
    into = tables.FlowKey(client, service, b"\0\1", b"\0\2", 6, 0)
    away = tables.FlowKey(pod, client, b"\0\3", b"\0\1", 6, 1)
    numbers = struct.pack("4I", 7, 0x030201, 99, 0x42)
    old, new = create("flows", 4, value_size=52), create("flows", 4)
    fill(
        old,
        {
            into.pack(): client + pod + b"\0\1\0\3" + numbers,
            away.pack(): service + client + b"\0\2\0\1" + numbers,
        },
    )
    carry.carry("flows", old, new, before, THIS)
    assert {tables.flow_key(key): tables.flow(row) for key, row in contents(new).items()} == {
        into: tables.Flow(pod, b"\0\1", b"\0\3", 7, 99, b"\1\2\3", 0x42),
        away: tables.Flow(service, b"\0\2", b"\0\1", 7, 99, b"\1\2\3", 0x42),
    }


@given(st.sampled_from(sorted(abi.LAYOUTS)), st.data())
def test_an_unchanged_layout_translates_to_itself(name: str, data: st.DataObject) -> None:
    row = data.draw(st.binary(min_size=abi.LAYOUTS[name].size, max_size=abi.LAYOUTS[name].size))
    assert carry.translator(THIS.structs[name], THIS.structs[name], len(row))(row) == row


def test_a_field_of_another_size_starts_from_zero() -> None:
    older = [identity.FieldOf("backend", 0, 8), identity.FieldOf("started_s", 8, 4)]
    translate = carry.translator(older, THIS.structs["affinity"], abi.LAYOUTS["affinity"].size)
    assert translate(b"\x01" * 8 + b"\x02" * 4) == bytes(4) + b"\x02" * 4


def test_scalars_and_unknown_structs_stay_as_they_are() -> None:
    assert carry.translator(None, None, 4)(b"abcd") == b"abcd"
    assert carry.translator(None, THIS.structs["affinity"], 8)(b"abcdefgh") == b"abcdefgh"
    # Never fewer bytes than the kernel reads.
    assert carry.translator(None, None, 8)(b"abcd") == b"abcd" + bytes(4)
    assert carry.translator(None, None, 2)(b"abcd") == b"ab"


# --- sockets ---


def record(cookie: int, backend: int = 7, spilled: int = 0, *, empty: bool = False) -> bytes:
    if empty:
        return RECORD.pack(cookie, bytes(16), bytes(16), bytes(2), bytes(2), backend, spilled)
    return RECORD.pack(cookie, bytes(16), b"\x0a" * 16, b"\x00\x50", b"\x1f\x90", backend, spilled)


def row_of(cookie: int, rows: int) -> bytes:
    return (cookie & (rows - 1)).to_bytes(4, "little")


def spilled_key(cookie: int) -> bytes:
    return SPILL_KEY.pack(cookie, bytes(16), bytes(2), PEER)


def spilled_flag(row: bytes) -> int:
    return int(RECORD.unpack(row)[-1])


class Move:
    """A table of sockets on its way into one of another size."""

    def __init__(self, create: Create, old_rows: int, new_rows: int) -> None:
        self.old_rows, self.new_rows = old_rows, new_rows
        self.old, self.fresh = create("sockets", old_rows), create("sockets", new_rows)
        self.spill = create("socket_spill", 64)
        self.sockets = carry.Sockets(self.old, self.fresh, lambda row: row, self.spill, THIS)

    def connected(self, *cookies: int) -> None:
        fill(self.old, {row_of(cookie, self.old_rows): record(cookie, backend=cookie) for cookie in cookies})

    def released(self, cookie: int) -> None:
        fill(self.old, {row_of(cookie, self.old_rows): record(0, backend=cookie)})

    def found(self) -> set[int]:
        """The cookies whose peer a program would find now."""
        table, spilled = contents(self.fresh), contents(self.spill)
        cookies = {int(RECORD.unpack(row)[0]) for row in table.values()} - {0}
        for cookie in {int(SPILL_KEY.unpack(key)[0]) for key in spilled if key == spilled_key_of(key)}:
            if spilled_flag(table.get(row_of(cookie, self.new_rows), bytes(RECORD.size))):
                cookies.add(cookie)
        return cookies


def spilled_key_of(key: bytes) -> bytes:
    return spilled_key(int(SPILL_KEY.unpack(key)[0]))


@pytest.fixture
def move(create: Create) -> collections.abc.Iterator[collections.abc.Callable[[int, int], Move]]:
    """A function that begins to move a table from so many rows to so many others."""
    with contextlib.ExitStack() as stack:

        def begun(old_rows: int, new_rows: int) -> Move:
            made = Move(create, old_rows, new_rows)
            stack.callback(made.sockets.close)
            return made

        yield begun


Begin = collections.abc.Callable[[int, int], Move]


def test_records_go_to_the_rows_that_their_cookies_now_fall_on(move: Begin) -> None:
    moving = move(8, 32)
    cookies = [1, 10, 19, 0x1_0000_0004]
    moving.connected(*(cookie for cookie in cookies if cookie < 100))
    fill(moving.old, {row_of(cookies[-1], 8): record(cookies[-1])})
    moving.sockets.copy()
    assert contents(moving.fresh) == {
        **{row_of(cookie, 32): record(cookie, backend=cookie) for cookie in cookies[:-1]},
        row_of(cookies[-1], 32): record(cookies[-1]),
    }
    assert not contents(moving.spill)


def test_a_record_whose_row_is_taken_is_spilled_and_the_row_says_so(move: Begin) -> None:
    moving = move(8, 4)
    moving.connected(2, 6)
    moving.sockets.copy()
    [row] = contents(moving.fresh).values()
    owner = int(RECORD.unpack(row)[0])
    other = {2: 6, 6: 2}[owner]
    assert row == record(owner, backend=owner, spilled=1)
    assert contents(moving.spill)[spilled_key(other)] == record(other, backend=other)
    assert moving.found() == {2, 6}


def test_a_free_row_is_not_carried(move: Begin) -> None:
    moving = move(8, 16)
    moving.released(3)
    moving.sockets.copy()
    assert not contents(moving.fresh)


def test_what_was_spilled_before_is_found_again(move: Begin) -> None:
    """A row tells whether the spill map is to be asked: without that word nothing in there exists."""
    moving = move(8, 16)
    moving.connected(1)
    fill(moving.spill, {spilled_key(9): record(9), spilled_key(17): record(17)})
    moving.sockets.copy()
    assert moving.found() == {1, 9, 17}
    assert contents(moving.fresh) == {
        row_of(1, 16): record(1, backend=1, spilled=1),
        row_of(9, 16): record(0, 0, spilled=1, empty=True),
    }


@pytest.mark.parametrize("new_rows", [4, 8, 64])
def test_what_happens_between_copy_and_switch_is_made_up_for(move: Begin, new_rows: int) -> None:
    moving = move(16, new_rows)
    moving.connected(1, 2, 3, 5, 6)
    copied = moving.sockets.copy()
    assert moving.found() == copied.keys() == {1, 2, 3, 5, 6}
    moving.released(2)
    moving.released(5)
    moving.connected(9, 14)
    # A second time, as after a crash, there is nothing more to do.
    for _ in range(2):
        moving.sockets.settle(copied)
        assert moving.found() == {1, 3, 6, 9, 14}


def test_a_row_that_is_given_back_has_no_backend(move: Begin) -> None:
    """An unconnected socket that claims a row takes one with a backend for its own, of another frontend."""
    moving = move(8, 16)
    moving.connected(2)
    copied = moving.sockets.copy()
    moving.released(2)
    moving.sockets.settle(copied)
    cookie, _, _, _, _, backend, _ = RECORD.unpack(contents(moving.fresh)[row_of(2, 16)])
    assert (cookie, backend) == (0, 0)


def test_a_socket_that_was_released_and_has_connected_again_keeps_its_newer_record(move: Begin) -> None:
    moving = move(8, 16)
    moving.connected(1, 2)
    copied = moving.sockets.copy()
    moving.released(1)
    fill(moving.fresh, {row_of(1, 16): record(1, backend=99)})
    moving.sockets.settle(copied)
    assert moving.found() == {1, 2}
    assert contents(moving.fresh)[row_of(1, 16)] == record(1, backend=99)
