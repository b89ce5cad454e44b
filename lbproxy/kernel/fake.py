"""Maps in memory, with the same contract as the real ones; for tests and for trying things out.

It is no more lenient than the kernel: a row beyond an array's end, a full hash
map or a row of the wrong size is an error here too.
"""

import itertools
import typing

from lbproxy import abi
from lbproxy.core import ledger, tables
from lbproxy.kernel import maps


class FakeMaps:
    """Tables as dicts. `fail_after` makes the n-th write from now on fail, once."""

    def __init__(self, sizes: typing.Mapping[str, int]) -> None:
        self._sizes = {spec.name: abi.map_rows(spec, sizes) for spec in abi.MAPS.values()}
        self._rows: dict[str, dict[bytes, bytes]] = {name: {} for name in abi.MAPS}
        self.log: list[tables.Write] = []
        self.fail_after: int | None = None

    def apply(self, writes: typing.Sequence[tables.Write]) -> None:
        """Make the writes in order."""
        for write in writes:
            if self.fail_after is not None:
                self.fail_after -= 1
                if self.fail_after < 0:
                    self.fail_after = None
                    raise maps.MapWriteError(f"1 rows of {write.table}: injected")
            self._one(write)
            self.log.append(write)

    def _one(self, write: tables.Write) -> None:
        spec, rows = abi.MAPS[write.table], self._rows[write.table]
        size = self._sizes[write.table]
        if len(write.key) != spec.key_size:
            raise ValueError(f"{write.table}: key of {len(write.key)} bytes, not {spec.key_size}")
        if spec.type == "array" and int.from_bytes(write.key, tables.BYTE_ORDER) >= size:
            raise maps.MapWriteError(f"1 rows of {write.table}: beyond the end")
        if spec.type == "lpm_trie":
            self._one_of_trie(write, rows, size)
            return
        if isinstance(write, tables.Delete):
            rows.pop(write.key, None)
            return
        if len(write.value) != spec.value_size:
            raise ValueError(f"{write.table}: row of {len(write.value)} bytes, not {spec.value_size}")
        if write.key not in rows and len(rows) >= size:
            raise maps.MapWriteError(f"1 rows of {write.table}: Argument list too long")
        if spec.type == "array" and not any(write.value):
            rows.pop(write.key, None)  # as if it had never been written
        else:
            rows[write.key] = write.value

    def _one_of_trie(self, write: tables.Write, rows: dict[bytes, bytes], size: int) -> None:
        """As Linux before 6.13 does it: there even a row that is replaced needs room for another."""
        bits, data = _prefix(write.key)
        if bits > 8 * len(data):
            raise maps.MapWriteError(f"1 rows of {write.table}: Invalid argument")
        same = [key for key in rows if _prefix(key)[0] == bits and _within(data, key)]
        if isinstance(write, tables.Put):
            spec = abi.MAPS[write.table]
            if len(write.value) != spec.value_size:
                raise ValueError(f"{write.table}: row of {len(write.value)} bytes, not {spec.value_size}")
            if len(rows) >= size:
                raise maps.MapWriteError(f"1 rows of {write.table}: No space left on device")
        for key in same:
            del rows[key]
        if isinstance(write, tables.Put):
            rows[write.key] = write.value

    def rows(self, table: str) -> typing.Iterator[tuple[bytes, bytes]]:
        """Every row that is in use."""
        yield from list(self._rows[table].items())

    def row(self, table: str, key: bytes) -> bytes | None:
        """One row; a row of an array that was never written is zero."""
        spec = abi.MAPS[table]
        if spec.type == "lpm_trie":
            bits, data = _prefix(key)
            matches = [one for one in self._rows[table] if _prefix(one)[0] <= bits and _within(data, one)]
            return self._rows[table][max(matches, key=_prefix)] if matches else None
        if spec.type != "array":
            return self._rows[table].get(key)
        if int.from_bytes(key, tables.BYTE_ORDER) >= self._sizes[table]:
            return None
        return self._rows[table].get(key, bytes(spec.value_size))

    def rows_of(self, table: str) -> int:
        """How many rows a table can hold."""
        return self._sizes[table]

    def batches(self, table: str, rows: int) -> typing.Iterator[tuple[bytes, bytes]]:
        """The keys and the values of a hash table, joined, so many rows at a time."""
        left = iter(list(self._rows[table].items()))
        while batch := list(itertools.islice(left, rows)):
            yield b"".join(key for key, _ in batch), b"".join(row for _, row in batch)

    def put_absent(self, table: str, rows: typing.Mapping[bytes, bytes]) -> int:
        """Write those rows that are not there."""
        here = self._rows[table]
        absent = [tables.Put(tables.Table(table), *row) for row in rows.items() if row[0] not in here]
        self.apply(absent)
        return len(absent)

    def exchange(self, table: str, rows: typing.Mapping[bytes, tuple[bytes, bytes]]) -> int:
        """Replace those rows that are still what they were."""
        here = self._rows[table]
        same = [
            tables.Put(tables.Table(table), key, becomes)
            for key, (was, becomes) in rows.items()
            if here.get(key) == was
        ]
        self.apply(same)
        return len(same)

    def take(
        self, table: str, keys: typing.Iterable[bytes], unless: typing.Callable[[bytes, bytes], bool]
    ) -> int:
        """Remove rows, unless they are worth keeping as they are now."""
        rows = self._rows[table]
        gone = [key for key in keys if key in rows and not unless(key, rows[key])]
        for key in gone:
            del rows[key]
        return len(gone)

    def column(self, table: str, field: str) -> bytes:
        """A field of each row."""
        place = _place(table, field)
        values = bytearray(8 * self._sizes[table])
        for key, row in self._rows[table].items():
            at = 8 * int.from_bytes(key, tables.BYTE_ORDER)
            values[at : at + 8] = row[place]
        return bytes(values)

    def set_column(self, table: str, field: str, values: bytes) -> None:
        """Write that field of each row."""
        place = _place(table, field)
        for number in range(self._sizes[table]):
            key = tables.row_key(number)
            row, value = bytearray(self.row(table, key) or b""), values[8 * number : 8 * number + 8]
            if row[place] != value:
                row[place] = value
                self._one(tables.Put(tables.Table(table), key, bytes(row)))

    def wait_for_programs(self) -> None:
        """Nobody's programs run on these."""

    def capacity(self) -> ledger.Capacity:
        """The limits of these tables."""
        return maps.capacity(self._sizes)

    def grow(self, **rows: int) -> None:
        """Make these tables larger."""
        self._sizes |= rows

    def dump(self) -> ledger.Dump:
        """What a ledger can be restored from."""
        return maps.dump(self)


def _place(table: str, field: str) -> slice:
    offset = abi.LAYOUTS[abi.MAPS[table].value].offset(field)
    return slice(offset, offset + 8)


def _prefix(key: bytes) -> tuple[int, bytes]:
    """A trie's key: how many bits count, and the bytes that they are the first of."""
    return int.from_bytes(key[:4], tables.BYTE_ORDER), key[4:]


def _within(data: bytes, key: bytes) -> bool:
    """Whether data begins with the bits of a key."""
    bits, prefix = _prefix(key)
    shift = 8 * len(prefix) - bits
    return shift >= 0 and int.from_bytes(data, "big") >> shift == int.from_bytes(prefix, "big") >> shift
