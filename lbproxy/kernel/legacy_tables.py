"""Looks into the tables of iptables-legacy, which are no part of nf_tables.

They are read and replaced as a whole through socket options. Reading is done here; replacing is
left to iptables itself: a mistake there would cost a node all of its rules.
"""

import ctypes
import os
import pathlib
import socket
import struct
import typing

_NAMES: typing.Final = {
    socket.AF_INET: pathlib.Path("/proc/net/ip_tables_names"),
    socket.AF_INET6: pathlib.Path("/proc/net/ip6_tables_names"),
}
_LEVELS: typing.Final = {socket.AF_INET: 0, socket.AF_INET6: 41}  # IPPROTO_IP and IPPROTO_IPV6
_GET_INFO, _GET_ENTRIES = 64, 65
_INFO: typing.Final = struct.Struct("=32s44xII")  # ipt_getinfo: name, hooks, how many entries, their bytes
_HEAD: typing.Final = struct.Struct("=32sI4x")  # ipt_get_entries, before the entries
_LIBC: typing.Final = ctypes.CDLL(None, use_errno=True)


def names(family: socket.AddressFamily) -> list[str]:
    """The tables that there are. Asking for another one would load its module."""
    try:
        return _NAMES[family].read_text().split()
    except OSError:
        return []


def has_chain(family: socket.AddressFamily, table: str, chain: str, *, prefix: bool = False) -> bool:
    """Whether a table has a chain, or one whose name begins so.

    Raises OSError where that can not be asked (CAP_NET_ADMIN).
    """
    if table not in names(family):
        return False
    with socket.socket(family, socket.SOCK_DGRAM) as asked:
        info = _get(asked, _LEVELS[family], _GET_INFO, _INFO.pack(table.encode(), 0, 0), _INFO.size)
        size = _INFO.unpack(info)[2]
        head = _HEAD.pack(table.encode(), size)
        entries = _get(asked, _LEVELS[family], _GET_ENTRIES, head, _HEAD.size + size)
    # A chain's name is the argument of the "ERROR" target that it begins with.
    return b"\0" + chain.encode() + (b"" if prefix else b"\0") in entries


def _get(asked: socket.socket, level: int, option: int, given: bytes, size: int) -> bytes:
    # Python's own getsockopt() neither passes anything in nor takes more than a kilobyte.
    buffer = ctypes.create_string_buffer(given, size)
    length = ctypes.c_uint(size)
    if _LIBC.getsockopt(asked.fileno(), level, option, buffer, ctypes.byref(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw
