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
# ipt_getinfo: name, valid hooks, where each begins, where its policy is, how many entries, their bytes.
_INFO: typing.Final = struct.Struct("=32sI5I5III")
_HEAD: typing.Final = struct.Struct("=32sI4x")  # ipt_get_entries, before the entries
_HOOKS: typing.Final = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
# Of an entry: where its offsets of target and next entry are (ipt_entry, ip6t_entry).
_OFFSETS_AT: typing.Final = {socket.AF_INET: 88, socket.AF_INET6: 140}
_OFFSETS: typing.Final = struct.Struct("=HH")
_VERDICT: typing.Final = struct.Struct("=i")
_STANDARD, _CHAIN = b"", b"ERROR"  # targets: a verdict or a place in the table; the head of a user's chain
_ATTEMPTS: typing.Final = 5
_LIBC: typing.Final = ctypes.CDLL(None, use_errno=True)


def names(family: socket.AddressFamily) -> list[str]:
    """The tables that there are. Asking for another one would load its module."""
    try:
        return _NAMES[family].read_text().split()
    except OSError:
        return []


class Jump(typing.NamedTuple):
    """A rule that leads to another chain; `at` tells it from others of its table."""

    chain: str
    at: int
    target: str


class Table(typing.NamedTuple):
    """What chains there are, whether each is built in, and the rules that lead from one to another."""

    chains: dict[str, bool]
    jumps: list[Jump]


def read(family: socket.AddressFamily, table: str) -> Table:
    """A table, empty where there is none. Raises OSError where that can not be asked (CAP_NET_ADMIN)."""
    if table not in names(family):
        return Table({}, [])
    with socket.socket(family, socket.SOCK_DGRAM) as asked:
        for _ in range(_ATTEMPTS - 1):
            try:
                return _read(asked, family, table)
            except BlockingIOError:  # replaced between the two questions
                continue
        return _read(asked, family, table)


def _read(asked: socket.socket, family: socket.AddressFamily, table: str) -> Table:
    empty = _INFO.pack(table.encode(), *(0,) * 13)
    _, hooks, *rest = _INFO.unpack(_get(asked, _LEVELS[family], _GET_INFO, empty, _INFO.size))
    size = rest[-1]
    head = _HEAD.pack(table.encode(), size)
    answer = _get(asked, _LEVELS[family], _GET_ENTRIES, head, _HEAD.size + size)
    begins = {rest[number]: name for number, name in enumerate(_HOOKS) if hooks >> number & 1}
    return decoded(family, answer[_HEAD.size :], begins)


def decoded(family: socket.AddressFamily, entries: bytes, begins: typing.Mapping[int, str]) -> Table:
    """What a table's entries say; `begins` is where each built-in chain does."""
    chains = dict.fromkeys(begins.values(), True)
    heads: dict[int, str] = {}  # by where the rules of a user's chain begin
    leads: list[tuple[str, int, int]] = []
    chain, at, offsets_at = "", 0, _OFFSETS_AT[family]
    while at + offsets_at + _OFFSETS.size <= len(entries):
        target_at, size = _OFFSETS.unpack_from(entries, at + offsets_at)
        if not size:
            break
        chain = begins.get(at, chain)
        target_at += at
        # The name stands behind the target's size (xt_entry_target), and what it is given behind that.
        name, _, _ = entries[target_at + 2 : target_at + 31].partition(b"\0")
        given = entries[target_at + 32 : at + size]
        at += size
        if name == _CHAIN:
            chain = given[:30].partition(b"\0")[0].decode(errors="surrogateescape")
            chains[chain] = False
            heads[at] = chain
        elif name == _STANDARD:
            (verdict,) = _VERDICT.unpack_from(given)
            if verdict >= 0:
                leads.append((chain, at - size, verdict))
    chains.pop("ERROR", None)  # the end of the table
    jumps = [Jump(chain, where, heads[verdict]) for chain, where, verdict in leads if verdict in heads]
    return Table(chains, jumps)


def _get(asked: socket.socket, level: int, option: int, given: bytes, size: int) -> bytes:
    # Python's own getsockopt() neither passes anything in nor takes more than a kilobyte.
    buffer = ctypes.create_string_buffer(given, size)
    length = ctypes.c_uint(size)
    if _LIBC.getsockopt(asked.fileno(), level, option, buffer, ctypes.byref(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw
