"""The rows of maps: written, read, taken and dumped, one by one or in batches. All may raise OSError."""

import contextlib
import ctypes
import errno
import mmap
import os
import sys
import typing

from lbproxy.kernel import libbpf

ANY: typing.Final = 0
NOEXIST: typing.Final = 1
_BATCH_ROWS = 8192


def update(fd: int, key: bytes, value: bytes, flags: int = ANY) -> None:
    """Write one row."""
    libbpf.check(libbpf.LIB.bpf_map_update_elem(fd, key, value, ctypes.c_uint64(flags)), "update map")


def lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """Read one row, or None where there is none."""
    value = ctypes.create_string_buffer(value_size)
    result = libbpf.LIB.bpf_map_lookup_elem(fd, key, value)
    if result < 0 and ctypes.get_errno() == errno.ENOENT:
        return None
    libbpf.check(result, "look up map")
    return value.raw


def delete(fd: int, key: bytes) -> bool:
    """Delete one row; False where there was none."""
    result = libbpf.LIB.bpf_map_delete_elem(fd, key)
    if result < 0 and ctypes.get_errno() == errno.ENOENT:
        return False
    libbpf.check(result, "delete from map")
    return True


def take(
    fd: int,
    keys: typing.Iterable[bytes],
    value_size: int,
    unless: typing.Callable[[bytes, bytes], bool],
) -> int:
    """Delete rows of a hash map, but those of which `unless` says of key and value that they stay.

    Returns how many went. One that a program writes between the look at it and its
    removal is put back, unless it has been written once more: then that row stands.
    """
    value = ctypes.create_string_buffer(value_size)
    taken = 0
    for key in keys:
        if not _found(libbpf.LIB.bpf_map_lookup_elem(fd, key, value), "look up map"):
            continue
        seen = value.raw
        if unless(key, seen):
            continue
        if not _found(libbpf.LIB.bpf_map_lookup_and_delete_elem(fd, key, value), "take from map"):
            continue
        row = value.raw
        if row != seen and unless(key, row):
            with contextlib.suppress(FileExistsError):
                update(fd, key, row, NOEXIST)
        else:
            taken += 1
    return taken


def _found(result: int, step: str) -> bool:
    if result < 0 and ctypes.get_errno() == errno.ENOENT:
        return False
    libbpf.check(result, step)
    return True


def update_batch(fd: int, keys: bytes, values: bytes, count: int) -> int:
    """Write `count` rows in order; returns how many were written, which is all of them.

    Raises BatchError at the first row that the kernel refuses; those before it are in the map.
    """
    done = ctypes.c_uint32(count)
    result = libbpf.LIB.bpf_map_update_batch(fd, keys, values, ctypes.byref(done), None)
    if result < 0:
        number = ctypes.get_errno() or -result
        raise BatchError(number, done.value if number != errno.EFAULT else 0)
    return done.value


def insert_all(fd: int, keys: bytes, values: bytes, key_size: int) -> list[int]:
    """Write those of these rows whose keys have none; returns which. No batch of the kernel's does that."""
    count = len(keys) // key_size
    if not count:
        return []
    value_size = len(values) // count
    key_at, value_at = (ctypes.cast(ctypes.c_char_p(of), ctypes.c_void_p).value or 0 for of in (keys, values))
    inserted = []
    for row in range(count):
        if _INSERT(fd, key_at + row * key_size, value_at + row * value_size, NOEXIST) == 0:
            inserted.append(row)
        elif ctypes.get_errno() != errno.EEXIST:
            libbpf.check(-1, "insert into map")
    return inserted


# Unlike the others, it is given addresses.
_INSERT: typing.Final = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, use_errno=True
)(("bpf_map_update_elem", libbpf.LIB))


class BatchError(OSError):
    """A batch stopped part way; `rows_written` rows before the failing one are in the map."""

    def __init__(self, number: int, rows_written: int) -> None:
        super().__init__(number, f"update map: {os.strerror(number)}")
        self.rows_written = rows_written


def dump(fd: int, info: libbpf.MapInfo) -> typing.Iterator[tuple[bytes, bytes]]:
    """Every row of a hash map or trie as (key, value); rows that come or go meanwhile may be missed."""
    if info.type == libbpf.MAP_TYPES["lpm_trie"]:
        yield from _dump_trie(fd, info)
        return
    key_size, value_size = info.key_size, info.value_size
    for keys, values in batches(fd, info):
        for row in range(len(keys) // key_size):
            yield (
                keys[row * key_size : (row + 1) * key_size],
                values[row * value_size : (row + 1) * value_size],
            )


def _dump_trie(fd: int, info: libbpf.MapInfo) -> typing.Iterator[tuple[bytes, bytes]]:
    """Row by row: not every kernel reads tries in batches."""
    seen: set[bytes] = set()
    key = None
    while (key := _next_key(fd, key, info.key_size)) is not None:
        if key in seen:
            # The row before was removed meanwhile, and the kernel has begun anew.
            return
        seen.add(key)
        # The longest match of a row's own key is that row, or once that is gone a shorter one.
        value = lookup(fd, key, info.value_size)
        if value is not None:
            yield key, value


def _next_key(fd: int, key: bytes | None, key_size: int) -> bytes | None:
    following = ctypes.create_string_buffer(key_size)
    result = libbpf.LIB.bpf_map_get_next_key(fd, key, following)
    if result < 0 and ctypes.get_errno() == errno.ENOENT:
        return None
    libbpf.check(result, "walk map")
    return following.raw


class Batch(typing.NamedTuple):
    """Some rows of a hash map: keys and values, each joined in the same order, and where the next begin."""

    keys: bytes
    values: bytes
    position: bytes | None  # None: there are no more


def batch(fd: int, info: libbpf.MapInfo, rows: int = _BATCH_ROWS, position: bytes | None = None) -> Batch:
    """About so many rows of a hash map, from the beginning or from where others ended."""
    rows = min(rows, info.max_entries)
    while True:
        keys = ctypes.create_string_buffer(info.key_size * rows)
        values = ctypes.create_string_buffer(info.value_size * rows)
        # The position is a bucket number, whatever the key's size.
        following = ctypes.create_string_buffer(max(info.key_size, 8))
        count = ctypes.c_uint32(rows)
        result = libbpf.LIB.bpf_map_lookup_batch(
            fd, position, following, keys, values, ctypes.byref(count), None
        )
        number = ctypes.get_errno() if result < 0 else 0
        if number == errno.ENOSPC and rows < info.max_entries:
            # One bucket holds more rows than the buffers: once more with larger ones.
            rows = min(rows * 4, info.max_entries)
            continue
        if number not in (0, errno.ENOENT):
            raise OSError(number, f"dump map {info.name}: {os.strerror(number)}")
        return Batch(
            ctypes.string_at(keys, count.value * info.key_size),
            ctypes.string_at(values, count.value * info.value_size),
            None if number == errno.ENOENT else following.raw,
        )


def batches(fd: int, info: libbpf.MapInfo, rows: int = _BATCH_ROWS) -> typing.Iterator[tuple[bytes, bytes]]:
    """The keys and values of a hash map, each joined in the same order, about so many rows at a time."""
    position: bytes | None = None
    while True:
        keys, values, position = batch(fd, info, rows, position)
        yield keys, values
        if position is None:
            return


def dump_array(fd: int, info: libbpf.MapInfo) -> typing.Iterator[tuple[bytes, bytes]]:
    """Every row of a mmapable array that is not all zero, as (key, value).

    Mapped only for as long as it is read: the kernel counts every page of a mapping
    to the process, but looking the rows up, even in batches, takes seven times as long.
    """
    size = info.value_size
    stride = -(-size // 8) * 8
    length = -(-stride * info.max_entries // mmap.PAGESIZE) * mmap.PAGESIZE
    empty = bytes(size)
    with mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
        for first in range(0, info.max_entries, _BATCH_ROWS):
            last = min(first + _BATCH_ROWS, info.max_entries)
            piece = memory[first * stride : last * stride]
            if piece.count(0) == len(piece):
                continue
            for number in range(first, last):
                start = (number - first) * stride
                row = piece[start : start + size]
                if row != empty:
                    yield number.to_bytes(4, sys.byteorder), row
