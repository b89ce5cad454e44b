"""The contract of `Maps`, kept by the kernel's maps and by FakeMaps alike: else the fake proves nothing."""

import collections.abc
import contextlib
import os
import pathlib
import typing

import pytest

from lbproxy import abi, errors, flow_table
from lbproxy.core import tables
from lbproxy.kernel import fake, libbpf, map_rows, maps
from tests import serving
from tests.kernel import conftest

ARRAYS = [table for table in tables.Table if abi.MAPS[table].type == "array"]
HASHES = [table for table in tables.Table if abi.MAPS[table].type == "hash"]
SINGLE = (tables.Table.SETTINGS, tables.Table.UNASSURED)  # arrays of one row
SIZES = serving.sizes(frontends=20_000, backends=20_000, services=4, localities=3)
Make = collections.abc.Callable[..., maps.Maps]


@pytest.fixture(params=["fake", "bpf"])
def make(request: pytest.FixtureRequest) -> collections.abc.Iterator[Make]:
    """A function that makes maps, of SIZES or otherwise."""
    with contextlib.ExitStack() as stack:

        def made(**smaller: int) -> maps.Maps:
            sizes = {**SIZES, **smaller}
            if request.param == "fake":
                return fake.FakeMaps(sizes)
            root = request.getfixturevalue("root")
            conftest.create_maps(root / "maps", sizes)
            opened = maps.BpfMaps(str(root / "maps"))
            stack.callback(opened.close)
            return opened

        yield made


def key(table: str, number: int) -> bytes:
    return number.to_bytes(abi.MAPS[table].key_size, "little")


def value(table: str, number: int) -> bytes:
    return number.to_bytes(4, "little").ljust(abi.MAPS[table].value_size, b"\x07")


def put(table: tables.Table, number: int, worth: int | None = None) -> tables.Put:
    return tables.Put(table, key(table, number), value(table, number if worth is None else worth))


def delete(table: tables.Table, number: int) -> tables.Delete:
    return tables.Delete(table, key(table, number))


def numbers(kernel: maps.Maps, table: str) -> list[int]:
    return sorted(int.from_bytes(found, "little") for found, _ in kernel.rows(table))


@pytest.mark.parametrize("table", tables.Table)
def test_a_row_is_read_as_it_was_written(make: Make, table: tables.Table) -> None:
    kernel = make()
    assert list(kernel.rows(table)) == []
    kernel.apply([put(table, 0, 5), put(table, 0, 6)])
    assert kernel.row(table, key(table, 0)) == value(table, 6)
    assert list(kernel.rows(table)) == [(key(table, 0), value(table, 6))]
    kernel.apply([delete(table, 0)])
    assert list(kernel.rows(table)) == []


@pytest.mark.parametrize("table", HASHES)
def test_a_missing_row_of_a_hash_is_none_and_deleting_it_is_no_error(make: Make, table: tables.Table) -> None:
    kernel = make()
    assert kernel.row(table, key(table, 1)) is None
    kernel.apply([delete(table, 1), put(table, 2), delete(table, 1)])
    assert numbers(kernel, table) == [2]


@pytest.mark.parametrize("table", [table for table in ARRAYS if table not in SINGLE])
def test_an_array_has_all_its_rows_and_shows_those_in_use(make: Make, table: tables.Table) -> None:
    kernel = make()
    empty = bytes(abi.MAPS[table].value_size)
    assert kernel.row(table, key(table, 1)) == empty
    kernel.apply([put(table, 1), put(table, 2), tables.Put(table, key(table, 3), empty)])
    kernel.apply([delete(table, 2)])
    assert numbers(kernel, table) == [1]
    assert kernel.row(table, key(table, 2)) == empty


@pytest.mark.parametrize("table", ARRAYS)
def test_there_is_nothing_beyond_the_end_of_an_array(make: Make, table: tables.Table) -> None:
    kernel = make()
    end = abi.map_rows(abi.MAPS[table], SIZES)
    kernel.apply([put(table, end - 1)])
    assert numbers(kernel, table) == [end - 1]
    assert kernel.row(table, key(table, end)) is None
    with pytest.raises(maps.MapWriteError, match=table):
        kernel.apply([put(table, end)])
    with pytest.raises(maps.MapWriteError, match=table):
        kernel.apply([put(table, end - 1, 77), put(table, end)])
    assert kernel.row(table, key(table, end - 1)) == value(table, 77)


@pytest.mark.parametrize("table", [tables.Table.SERVICES, tables.Table.LOCALITIES])
def test_a_full_hash_takes_no_new_row_but_still_changes_old_ones(make: Make, table: tables.Table) -> None:
    kernel = make()
    rows = abi.map_rows(abi.MAPS[table], SIZES)
    with pytest.raises(maps.MapWriteError, match=f"rows of {table}: .*Argument list too long"):
        kernel.apply([put(table, number) for number in range(rows + 2)])
    assert numbers(kernel, table) == list(range(rows))
    with pytest.raises(maps.MapWriteError):
        kernel.apply([put(table, rows)])
    kernel.apply([put(table, 0, 9), delete(table, 1), put(table, rows)])
    assert numbers(kernel, table) == [0, *range(2, rows + 1)]
    assert kernel.row(table, key(table, 0)) == value(table, 9)


@pytest.mark.parametrize("table", [tables.Table.FRONTENDS, tables.Table.BACKENDS])
def test_the_order_of_writes_is_kept(make: Make, table: tables.Table) -> None:
    kernel = make()
    kernel.apply([put(table, 1, 5), put(table, 2, 5), put(table, 1, 6), delete(table, 2), put(table, 3, 7)])
    kernel.apply([delete(table, 3), put(table, 3, 8), put(table, 4, 9), delete(table, 4)])
    rows = {int.from_bytes(found, "little"): row for found, row in kernel.rows(table)}
    assert rows == {1: value(table, 6), 3: value(table, 8)}


def test_what_follows_a_failed_write_is_not_made(make: Make) -> None:
    kernel = make(services=1)
    backends, services = tables.Table.BACKENDS, tables.Table.SERVICES
    with pytest.raises(maps.MapWriteError):
        kernel.apply([put(backends, 1), put(services, 1), put(services, 2), put(backends, 2)])
    assert (numbers(kernel, backends), numbers(kernel, services)) == ([1], [1])


@pytest.mark.parametrize("table", [tables.Table.FRONTENDS, tables.Table.BACKENDS])
def test_many_rows_come_back_as_they_went_in(make: Make, table: tables.Table) -> None:
    kernel = make()
    count = 18_000  # more than a batch takes
    kernel.apply([put(table, number, number + 1) for number in range(count)])
    assert dict(kernel.rows(table)) == {key(table, n): value(table, n + 1) for n in range(count)}
    kernel.apply([delete(table, number) for number in range(0, count, 2)])
    assert numbers(kernel, table) == list(range(1, count, 2))


def test_a_dump_holds_what_a_ledger_is_restored_from(make: Make) -> None:
    kernel = make()
    kernel.apply([put(table, 2) for table in tables.Table if table not in SINGLE])
    kernel.apply([put(tables.Table.SLOTS, 3), put(tables.Table.BACKENDS, 19_999)])
    dump = kernel.dump()
    assert dump.frontends == {key("frontends", 2): value("frontends", 2)}
    assert dump.services == {key("services", 2): value("services", 2)}
    assert dump.localities == {key("localities", 2): value("localities", 2)}
    assert dump.backends == {2: value("backends", 2), 19_999: value("backends", 19_999)}
    assert dump.slots(2, 3) == value("slots", 2) + value("slots", 3) + bytes(tables.BLOCK_SIZE)


def test_nothing_to_write_is_no_error(make: Make) -> None:
    make().apply([])


# --- tries: keys are prefixes ---


def range_key(bits: int, data: str) -> bytes:
    """The key of a prefix of hexadecimal digits."""
    return tables.SourceRangeKey(bits, *split(bytes.fromhex(data.ljust(40, "0")))).pack()


def split(data: bytes) -> tuple[bytes, bytes]:
    return data[:4], data[4:]


def put_range(bits: int, data: str, worth: int) -> tables.Put:
    return tables.Put(tables.Table.SOURCE_RANGES, range_key(bits, data), worth.to_bytes(4, "little"))


def match(kernel: maps.Maps, data: str, bits: int = 160) -> int | None:
    row = kernel.row(tables.Table.SOURCE_RANGES, range_key(bits, data))
    return None if row is None else int.from_bytes(row, "little")


def test_the_longest_prefix_that_matches_counts(make: Make) -> None:
    kernel = make()
    kernel.apply([put_range(8, "0a", 1), put_range(16, "0a01", 2), put_range(160, "0a01" + "f" * 36, 3)])
    assert [match(kernel, data) for data in ("0a", "0a01", "0a0180", "0a01" + "f" * 36, "0b")] == [
        1,
        2,
        2,
        3,
        None,
    ]
    # What counts of a key that is looked up are its own bits.
    assert [match(kernel, "0a01", bits) for bits in (0, 7, 8, 15, 16)] == [None, None, 1, 1, 2]
    kernel.apply([put_range(0, "", 4)])
    assert (match(kernel, "0b"), match(kernel, "", 0)) == (4, 4)
    assert len(list(kernel.rows(tables.Table.SOURCE_RANGES))) == 4


def test_bits_beyond_the_prefix_do_not_make_another_row(make: Make) -> None:
    kernel, table = make(), tables.Table.SOURCE_RANGES
    kernel.apply([put_range(8, "0a01", 1), put_range(8, "0a02", 2)])
    assert list(kernel.rows(table)) == [(range_key(8, "0a02"), (2).to_bytes(4, "little"))]
    kernel.apply([tables.Delete(table, range_key(9, "0a")), tables.Delete(table, range_key(7, "0a"))])
    assert match(kernel, "0a") == 2
    kernel.apply([tables.Delete(table, range_key(8, "0aff")), tables.Delete(table, range_key(8, "0a"))])
    assert list(kernel.rows(table)) == []


def test_a_full_trie_takes_no_new_row(make: Make) -> None:
    kernel, table = make(source_ranges=3), tables.Table.SOURCE_RANGES
    with pytest.raises(maps.MapWriteError, match=r"rows of source_ranges: .*No space left on device"):
        kernel.apply([put_range(16, f"{number:04x}", number) for number in range(5)])
    assert len(list(kernel.rows(table))) == 3
    kernel.apply([tables.Delete(table, range_key(16, "0001")), put_range(16, "0009", 9)])
    assert [match(kernel, f"{number:04x}") for number in (0, 1, 2, 9)] == [0, None, 2, 9]


def test_a_prefix_longer_than_the_key_is_no_row(make: Make) -> None:
    kernel = make()
    with pytest.raises(maps.MapWriteError, match="Invalid argument"):
        kernel.apply([put_range(161, "0a", 1)])
    assert list(kernel.rows(tables.Table.SOURCE_RANGES)) == []


def test_many_rows_of_a_trie_come_back_as_they_went_in(make: Make) -> None:
    kernel, table = make(source_ranges=2000), tables.Table.SOURCE_RANGES
    wanted = {}
    for number in range(1000):
        row = put_range(100 + number % 61, f"{number * 2654435761 % 2**32:08x}" * 5, number)
        wanted[row.key] = row.value
        kernel.apply([row])
    assert dict(kernel.rows(table)) == wanted
    kernel.apply([tables.Delete(table, one) for one in list(wanted)[::2]])
    assert dict(kernel.rows(table)) == dict(list(wanted.items())[1::2])


# --- the real ones alone ---


@pytest.fixture
def pinned(root: pathlib.Path) -> pathlib.Path:
    conftest.create_maps(root / "maps", SIZES)
    return root / "maps"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_maps_know_their_sizes(pinned: pathlib.Path) -> None:
    kernel = maps.BpfMaps(str(pinned))
    with contextlib.closing(kernel):
        assert kernel.capacity() == serving.capacity(
            frontends=20_000, backends=20_000, services=4, localities=3
        )
        assert kernel.rows_of("backend_stats") == 20_000
        assert kernel.bytes_of("backends") >= 20_000 * tables.BACKEND_SIZE


def test_maps_that_are_not_there_are_told_in_a_sentence(root: pathlib.Path) -> None:
    before = descriptors()
    with pytest.raises(errors.AgentError, match="no lbproxy datapath here"):
        maps.BpfMaps(str(root / "maps"))
    conftest.create_maps(root / "maps", SIZES)
    (root / "maps" / "affinity").unlink()
    with pytest.raises(errors.AgentError, match=r"a part of the datapath is gone: open .*/maps/affinity"):
        maps.BpfMaps(str(root / "maps"))
    assert descriptors() == before


def test_a_map_of_another_layout_is_not_opened(pinned: pathlib.Path) -> None:
    (pinned / "services").unlink()
    fd = libbpf.map_create("hash", "services", 4, 8, 4, 1)
    libbpf.obj_pin(fd, str(pinned / "services"))
    os.close(fd)
    before = descriptors()
    with pytest.raises(errors.AgentError, match="layout of another lbproxy version"):
        maps.BpfMaps(str(pinned))
    assert descriptors() == before


def test_a_second_opener_sees_the_same_rows(pinned: pathlib.Path) -> None:
    one, other = maps.BpfMaps(str(pinned)), maps.BpfMaps(str(pinned))
    with contextlib.closing(one), contextlib.closing(other):
        one.apply([put(table, 0, 1) for table in tables.Table])
        for table in tables.Table:
            assert list(other.rows(table)) == [(key(table, 0), value(table, 1))]


def test_a_batch_that_stops_says_how_far_it_came(pinned: pathlib.Path) -> None:
    fd = libbpf.obj_get(str(pinned / "localities"))
    rows: typing.Final = 6
    keys = b"".join(key("localities", number) for number in range(rows))
    values = b"".join(value("localities", number) for number in range(rows))
    with pytest.raises(map_rows.BatchError) as stopped:
        map_rows.update_batch(fd, keys, values, rows)
    assert stopped.value.rows_written == 3
    os.close(fd)


# --- rows that programs write ---


def test_a_column_is_written_and_what_is_beside_it_stays(make: Make) -> None:
    kernel, count = make(), abi.constant("NO_FLOWS_ROWS")
    numbered = b"".join(number.to_bytes(8, "little") for number in range(count))
    kernel.set_column(tables.Table.NO_FLOWS, "none", numbered)
    assert kernel.column(tables.Table.NO_FLOWS, "none") == numbered
    assert not any(kernel.column(tables.Table.NO_FLOWS, "begun"))
    kernel.set_column(tables.Table.NO_FLOWS, "begun", b"\x05" * 8 * count)
    kernel.set_column(tables.Table.NO_FLOWS, "none", bytes(8 * count))
    assert kernel.column(tables.Table.NO_FLOWS, "begun") == b"\x05" * 8 * count
    assert kernel.row(tables.Table.NO_FLOWS, tables.row_key(count - 1)) == bytes(8) + b"\x05" * 8


@pytest.mark.parametrize("rows", [1, 7, 4096])
def test_batches_hold_every_row_once(make: Make, rows: int) -> None:
    kernel, table = make(), tables.Table.FLOWS
    size, row_size = abi.MAPS[table].key_size, abi.MAPS[table].value_size
    kernel.apply([put(table, number) for number in range(50)])
    found = {}
    for keys, values in kernel.batches(table, rows):
        assert len(keys) // size == len(values) // row_size
        for at in range(len(keys) // size):
            found[keys[at * size : (at + 1) * size]] = values[at * row_size : (at + 1) * row_size]
    assert found == dict(kernel.rows(table))
    assert len(found) == 50


def test_a_row_is_taken_unless_it_is_worth_keeping(make: Make) -> None:
    kernel, table = make(), tables.Table.FLOWS
    kernel.apply([put(table, 1), put(table, 2)])
    asked = [key(table, number) for number in (1, 2, 3)]
    assert kernel.take(table, asked, lambda at, row: (at, row) == (asked[0], value(table, 1))) == 1
    assert numbers(kernel, table) == [1]
    assert kernel.take(table, asked, lambda _key, _row: False) == 1
    assert numbers(kernel, table) == []


def test_a_row_that_changes_while_it_is_being_taken_is_put_back(root: pathlib.Path) -> None:
    conftest.create_maps(root / "maps", SIZES)
    kernel, table = maps.BpfMaps(str(root / "maps")), tables.Table.FLOWS
    kernel.apply([put(table, 1, 5), put(table, 2, 5)])

    def unless(at: bytes, row: bytes) -> bool:
        fresh = row == value(table, 6)
        if at == key(table, 1):
            kernel.apply([put(table, 1, 6)])  # as a program would, between the look and the taking
        return fresh

    assert kernel.take(table, [key(table, 1), key(table, 2)], unless) == 1
    assert list(kernel.rows(table)) == [(key(table, 1), value(table, 6))]
    kernel.close()


def test_the_flow_table_is_tidied_in_the_kernel(root: pathlib.Path) -> None:
    conftest.create_maps(root / "maps", serving.sizes(flows=20_000))
    kernel, table = maps.BpfMaps(str(root / "maps")), tables.Table.FLOWS
    settings = tables.NO_SETTINGS._replace(udp_new_ticks=30, udp_stream_ticks=120)
    kernel.apply([tables.Put(tables.Table.SETTINGS, tables.row_key(0), settings.pack())])
    now, nowhere = flow_table.tick(), bytes(16)
    writes = []
    for number in range(15_000):
        port = number.to_bytes(2, "big")
        state = tables.FlowState.ASSURED if number % 3 == 0 else tables.FlowState(0)
        flow = tables.Flow(nowhere, port, port, 1, now + 10 - 60 * (number % 2), bytes(3), state)
        flow_key = tables.FlowKey(nowhere, nowhere, port, port, 17, number % 2)
        writes.append(tables.Put(table, flow_key.pack(), flow.pack()))
    kernel.apply(writes)
    tidied = flow_table.FlowTable(kernel)
    assert tidied.look() == 5_000
    assert tidied.counts.rows == sum(1 for _ in kernel.rows(table)) == 10_000
    assert kernel.row("unassured", tables.row_key(0)) == (5_000).to_bytes(8, tables.BYTE_ORDER)
    kernel.close()
