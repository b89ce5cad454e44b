"""A pinned map of one row: a text beside the pins, on a file system that has no plain files."""

import os
import typing

from lbproxy.kernel import libbpf, map_rows

_KEY: typing.Final = bytes(4)


def read(path: str) -> bytes | None:
    """The row, padded with zeros; None where nothing is pinned. Raises OSError."""
    try:
        fd = libbpf.obj_get(path)
    except FileNotFoundError:
        return None
    try:
        return map_rows.lookup(fd, _KEY, libbpf.map_info(fd).value_size) or b""
    finally:
        os.close(fd)


def write(path: str, name: str, size_bytes: int, content: bytes) -> None:
    """Put content into the row of a map that is made if need be. Raises OSError.

    Whoever reads meanwhile may see half of it.
    """
    pinned = os.path.exists(path)
    fd = libbpf.obj_get(path) if pinned else libbpf.map_create("array", name, 4, size_bytes, 1, 0)
    try:
        map_rows.update(fd, _KEY, content.ljust(size_bytes, b"\0"))
        if not pinned:
            libbpf.obj_pin(fd, path)
    finally:
        os.close(fd)
