"""The pinned maps: rows in, rows out.

Rows are written in batches. The order of writes is kept: only neighbours of the
same table are joined.
"""

import contextlib
import itertools
import mmap
import os
import typing
import weakref

from lbproxy import abi, errors
from lbproxy.core import ledger, tables
from lbproxy.kernel import grace, libbpf, map_rows


class MapWriteError(errors.AgentError):
    """Some rows could not be written; what the kernel holds must be read again."""


class Maps(typing.Protocol):
    """What the agent wants of the kernel's tables; `FakeMaps` keeps the same contract."""

    def apply(self, writes: typing.Sequence[tables.Write]) -> None:
        """Make the writes in order. Raises MapWriteError; some of them may then have been made."""
        ...

    def dump(self) -> ledger.Dump:
        """What a ledger can be restored from. Raises OSError."""
        ...

    def rows(self, table: str) -> typing.Iterator[tuple[bytes, bytes]]:
        """Every row that is in use: of an array, those that are not all zero. Raises OSError."""
        ...

    def row(self, table: str, key: bytes) -> bytes | None:
        """One row, or None; of a trie the one of the longest prefix within the key's. Raises OSError."""
        ...

    def rows_of(self, table: str) -> int:
        """How many rows a table can hold."""
        ...

    def capacity(self) -> ledger.Capacity:
        """The limits that a ledger has to keep."""
        ...

    def batches(self, table: str, rows: int) -> typing.Iterator[tuple[bytes, bytes]]:
        """The keys and the values of a hash table, joined, about so many rows at a time. Raises OSError."""
        ...

    def put_absent(self, table: str, rows: typing.Mapping[bytes, bytes]) -> int:
        """Write those rows of a hash table that are not there; returns how many. Raises OSError."""
        ...

    def exchange(self, table: str, rows: typing.Mapping[bytes, tuple[bytes, bytes]]) -> int:
        """Replace those rows of a hash table that are still the first of two by the second.

        What a program writes in the microsecond between look and write is lost. Returns how many
        were replaced. Raises OSError.
        """
        ...

    def take(
        self, table: str, keys: typing.Iterable[bytes], unless: typing.Callable[[bytes, bytes], bool]
    ) -> int:
        """Remove rows of a hash table, unless key and row as it is now are worth keeping. Raises OSError.

        Returns how many went. One that a program writes meanwhile is not lost.
        """
        ...

    def column(self, table: str, field: str) -> bytes:
        """A field of each row of an array that can be mapped, joined. Raises OSError."""
        ...

    def set_column(self, table: str, field: str, values: bytes) -> None:
        """Write that field, of 8 bytes, of each row; what programs write beside it stays. Raises OSError."""
        ...

    def wait_for_programs(self) -> None:
        """Return when every program that runs now, on any CPU, has ended. Raises OSError."""
        ...


def dump(kernel: Maps) -> ledger.Dump:
    """What a ledger can be restored from; slots are read when it asks for them."""

    def slots(first: int, count: int) -> bytes:
        keys = (tables.row_key(first + number) for number in range(count))
        return b"".join(kernel.row(tables.Table.SLOTS, key) or b"" for key in keys)

    return ledger.Dump(
        dict(kernel.rows(tables.Table.FRONTENDS)),
        dict(kernel.rows(tables.Table.SERVICES)),
        dict(kernel.rows(tables.Table.LOCALITIES)),
        {int.from_bytes(key, tables.BYTE_ORDER): row for key, row in kernel.rows(tables.Table.BACKENDS)},
        slots,
        dict(kernel.rows(tables.Table.SOURCE_RANGES)),
        dict(kernel.rows(tables.Table.TUNNEL_ENDS)),
        dict(kernel.rows(tables.Table.EARLIER_SLOTS)),
    )


def capacity(rows: typing.Mapping[str, int]) -> ledger.Capacity:
    """The limits that the ledger has to keep, from the sizes of the maps."""
    return ledger.Capacity(**{name: rows[name] for name in ledger.Capacity._fields})


class _Map:
    """A map behind a file descriptor."""

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.fd = fd
        self.info = libbpf.map_info(fd)
        # Closed with the last one who uses it: a thread may be reading when others take its place.
        self.close = weakref.finalize(self, os.close, fd)

    def put(self, keys: list[bytes], values: list[bytes]) -> None:
        if len(keys) == 1:
            map_rows.update(self.fd, keys[0], values[0])
        else:
            map_rows.update_batch(self.fd, b"".join(keys), b"".join(values), len(keys))

    def delete(self, keys: list[bytes]) -> None:
        for key in keys:
            map_rows.delete(self.fd, key)

    def rows(self) -> typing.Iterator[tuple[bytes, bytes]]:
        yield from map_rows.dump(self.fd, self.info)

    def row(self, key: bytes) -> bytes | None:
        return map_rows.lookup(self.fd, key, self.info.value_size)


class _Array(_Map):
    """An array: its rows are never gone, only zero; it is mapped only to be read as a whole."""

    def delete(self, keys: list[bytes]) -> None:
        self.put(keys, [bytes(self.info.value_size)] * len(keys))

    def rows(self) -> typing.Iterator[tuple[bytes, bytes]]:
        yield from map_rows.dump_array(self.fd, self.info)


class _Trie(_Map):
    """A longest-prefix trie, written row by row: not every kernel takes batches."""

    def put(self, keys: list[bytes], values: list[bytes]) -> None:
        for key, value in zip(keys, values, strict=True):
            map_rows.update(self.fd, key, value)


_KINDS: typing.Final = {"array": _Array, "lpm_trie": _Trie}


class BpfMaps:
    """The maps pinned in a folder of a bpffs."""

    def __init__(self, folder: str) -> None:
        """Open every pin. Raises AgentError where one is missing or of another shape."""
        self._folder = folder
        self._maps = _opened(folder)

    def reopen(self) -> None:
        """Go on with what is pinned now; whoever is reading does so to the end. Raises AgentError."""
        self._maps = _opened(self._folder)

    def close(self) -> None:
        """Let go of the maps; the pins stay."""
        for opened in self._maps.values():
            opened.close()
        self._maps.clear()

    def capacity(self) -> ledger.Capacity:
        """The limits of these maps."""
        return capacity({name: opened.info.max_entries for name, opened in self._maps.items()})

    def rows_of(self, table: str) -> int:
        """How many rows a map can hold."""
        return self._maps[table].info.max_entries

    def bytes_of(self, table: str) -> int:
        """How much kernel memory a map occupies, as the kernel accounts for it."""
        opened = self._maps[table]
        with open(f"/proc/self/fdinfo/{opened.fd}", encoding="ascii") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("memlock:"))

    def apply(self, writes: typing.Sequence[tables.Write]) -> None:
        """Make the writes in order, neighbours of one table in one batch."""
        for (table, kind), run in itertools.groupby(writes, key=lambda w: (w.table, type(w))):
            opened = self._maps[table]
            rows = list(run)
            try:
                if kind is tables.Put:
                    opened.put([w.key for w in rows], [typing.cast(tables.Put, w).value for w in rows])
                else:
                    opened.delete([w.key for w in rows])
            except OSError as error:
                raise MapWriteError(f"{len(rows)} rows of {table}: {error.strerror}") from error

    def rows(self, table: str) -> typing.Iterator[tuple[bytes, bytes]]:
        """Every row of a map that is in use."""
        return self._maps[table].rows()

    def row(self, table: str, key: bytes) -> bytes | None:
        """One row."""
        return self._maps[table].row(key)

    def batches(self, table: str, rows: int) -> typing.Iterator[tuple[bytes, bytes]]:
        """The keys and the values of a hash map, joined, about so many rows at a time."""
        opened = self._maps[table]
        yield from map_rows.batches(opened.fd, opened.info, rows)

    def put_absent(self, table: str, rows: typing.Mapping[bytes, bytes]) -> int:
        """Write those rows that are not there."""
        opened, made = self._maps[table], 0
        for key, row in rows.items():
            try:
                map_rows.update(opened.fd, key, row, map_rows.NOEXIST)
            except FileExistsError:
                continue
            made += 1
        return made

    def exchange(self, table: str, rows: typing.Mapping[bytes, tuple[bytes, bytes]]) -> int:
        """Replace those rows that are still what they were."""
        opened, made = self._maps[table], 0
        for key, (was, becomes) in rows.items():
            if opened.row(key) == was:
                map_rows.update(opened.fd, key, becomes)
                made += 1
        return made

    def take(
        self, table: str, keys: typing.Iterable[bytes], unless: typing.Callable[[bytes, bytes], bool]
    ) -> int:
        """Remove rows, unless they are worth keeping as they are now."""
        opened = self._maps[table]
        return map_rows.take(opened.fd, keys, opened.info.value_size, unless)

    def column(self, table: str, field: str) -> bytes:
        """A field of each row."""
        with self._words(table, field) as words:
            return words.tobytes()

    def set_column(self, table: str, field: str, values: bytes) -> None:
        """Write that field of each row."""
        with self._words(table, field) as words:
            words[:] = memoryview(values).cast("Q")

    def wait_for_programs(self) -> None:
        """Return when those that run now have ended."""
        grace.wait_for_programs()

    @contextlib.contextmanager
    def _words(self, table: str, field: str) -> typing.Iterator[memoryview]:
        opened = self._maps[table]
        layout = abi.LAYOUTS[abi.MAPS[table].value]
        size = layout.size * opened.info.max_entries
        with (
            mmap.mmap(opened.fd, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE) as memory,
            memoryview(memory) as every,
            every[:size] as rows,
            rows.cast("Q") as words,
            words[layout.offset(field) // 8 :: layout.size // 8] as column,
        ):
            yield column

    def dump(self) -> ledger.Dump:
        """Everything the ledger wants to know. Raises OSError."""
        return dump(self)


def _opened(folder: str) -> dict[str, _Map]:
    maps: dict[str, _Map] = {}
    for spec in abi.MAPS.values():
        try:
            fd = libbpf.obj_get(f"{folder}/{spec.name}")
        except OSError as error:
            what = "a part of the datapath is gone" if os.path.isdir(folder) else "no lbproxy datapath here"
            what = what if isinstance(error, FileNotFoundError) else "cannot open the tables"
            raise errors.AgentError(f"{what}: {error.strerror}") from error
        maps[spec.name] = found = _KINDS.get(spec.type, _Map)(spec.name, fd)
        if (found.info.key_size, found.info.value_size) != (spec.key_size, spec.value_size):
            raise errors.AgentError(
                f"{folder}/{spec.name} has the layout of another lbproxy version: "
                "use that version's command, or let this version's agent take over"
            )
    return maps
