"""Programs that load at once and do nothing, and what the real ones would do with socket records.

They stand where the real ones would, on real links and maps, so that an upgrade can
be interrupted after each of its steps without compiling every time.
"""

import collections.abc
import contextlib
import ctypes
import functools
import os
import pathlib
import re
import struct
import typing

import pytest

from lbproxy import abi
from lbproxy.kernel import libbpf, loader, map_rows, programs, source

_LIB = libbpf.LIB
_PINNED = re.compile(r'^#define LB_PIN_(\w+) "(.*)"$', re.MULTILINE)
PASS = {libbpf.PROG_TYPE_SCHED_CLS: -1, libbpf.PROG_TYPE_XDP: 2}
RECORD = abi.LAYOUTS["socket_record"]
SPILL_KEY = abi.LAYOUTS["socket_spill_key"]
SPILL_PEER = abi.constant("SPILL_PEER")

# Whoever tests patches these; here nothing may be counted as a step.
_update, _lookup, _delete, _pin = map_rows.update, map_rows.lookup, map_rows.delete, libbpf.obj_pin


class _LoadOpts(ctypes.Structure):
    _fields_ = [
        ("sz", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_uint32),
    ]


# The sources stay as they are, and reading them takes a third of such a start.
_flatten = functools.cache(source.flatten)


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """Have these load instead of the real ones."""
    patch.setattr(loader, "compile_and_pin", compile_and_pin)
    patch.setattr(source, "flatten", _flatten)


def compile_and_pin(
    text: str, pins: dict[str, str], may_lack: collections.abc.Iterable[programs.Program] = ()
) -> str:
    """Stand in for the loader: every program mentions every map, and allows everything.

    But for the array of tail calls: programs of one type only may mention that.
    """
    with contextlib.ExitStack() as stack:
        maps = [
            stack.enter_context(_closing(libbpf.obj_get(path)))
            for name, path in _PINNED.findall(text)
            if name != abi.TAILS
        ]
        for program in programs.of_this_kernel():
            with _closing(_load(program, maps)) as fd:
                _pin(fd, pins[program.name])
    return ""


def _load(program: programs.Program, maps: list[int]) -> int:
    # r1 = map (two slots each), r0 = verdict, exit
    code = b"".join(struct.pack("=BBhiBBhi", 0x18, 0x11, 0, fd, 0, 0, 0, 0) for fd in maps)
    code += struct.pack("=BBhi", 0xB7, 0, 0, PASS.get(program.type, 1)) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    opts = _LoadOpts(sz=ctypes.sizeof(_LoadOpts), expected_attach_type=program.attach_type)
    fd = _LIB.bpf_prog_load(
        program.type, program.name.encode(), b"GPL", code, ctypes.c_size_t(len(code) // 8), ctypes.byref(opts)
    )
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return int(fd)


@contextlib.contextmanager
def _closing(fd: int) -> collections.abc.Iterator[int]:
    assert fd >= 0, os.strerror(ctypes.get_errno())
    try:
        yield fd
    finally:
        os.close(fd)


@functools.cache
def _map_name(number: int) -> str:
    with _closing(_LIB.bpf_map_get_fd_by_id(number)) as fd:
        return libbpf.map_info(fd).name


@functools.cache
def _maps_of(number: int) -> dict[str, int]:
    """The ids of the maps of a program, by name: ids are not given twice."""
    with _closing(_LIB.bpf_prog_get_fd_by_id(number)) as program:
        return {_map_name(one): one for one in libbpf.prog_info(program).map_ids}


class Traffic:
    """Sockets that come and go, recorded in the maps of whatever program each hook runs at that moment."""

    def __init__(self, links: pathlib.Path) -> None:
        self._links = links

    @contextlib.contextmanager
    def _tables(self, hook: str) -> collections.abc.Iterator["_Tables"]:
        with _closing(libbpf.obj_get(str(self._links / hook))) as link:
            number = libbpf.link_info(link).prog_id
        ids = _maps_of(number)
        with (
            _closing(_LIB.bpf_map_get_fd_by_id(ids["sockets"])) as rows,
            _closing(_LIB.bpf_map_get_fd_by_id(ids["socket_spill"])) as spill,
        ):
            yield _Tables(rows, spill)

    def connect(self, cookie: int) -> None:
        """As record_connected() in bpf/socket_record.h."""
        with self._tables("connect4") as tables:
            owner, spilled = tables.row(cookie)
            if owner in (0, cookie):
                tables.write(cookie, record(cookie, spilled))
                return
            tables.write(cookie, record(owner, 1))
            _update(tables.spill, _peer(cookie), record(cookie, 0))

    def release(self, cookie: int) -> None:
        """As record_forget()."""
        with self._tables("sock_release") as tables:
            owner, spilled = tables.row(cookie)
            if owner == cookie:
                tables.write(cookie, record(0, spilled))
            if spilled:
                _delete(tables.spill, _peer(cookie))

    def shows(self, cookie: int) -> bool:
        """As record_of_backend(): whether the socket is shown the service."""
        with self._tables("getpeername4") as tables:
            owner, spilled = tables.row(cookie)
            if owner == cookie:
                return True
            found = _lookup(tables.spill, _peer(cookie), RECORD.size) if spilled else None
            return found is not None and RECORD.unpack(found)[0] == cookie

    def owners(self) -> set[int]:
        """The sockets that own a row."""
        with self._tables("sock_release") as tables:
            rows = map_rows.dump(tables.rows, libbpf.map_info(tables.rows))
            return {int(RECORD.unpack(row)[0]) for _, row in rows} - {0}


class _Tables(typing.NamedTuple):
    rows: int
    spill: int

    def _key(self, cookie: int) -> bytes:
        return (cookie & (libbpf.map_info(self.rows).max_entries - 1)).to_bytes(4, "little")

    def row(self, cookie: int) -> tuple[int, int]:
        """The owner of a cookie's row, and whether it says that something was spilled."""
        found = RECORD.unpack(_lookup(self.rows, self._key(cookie), RECORD.size) or b"")
        return int(found[0]), int(found[-1])

    def write(self, cookie: int, row: bytes) -> None:
        _update(self.rows, self._key(cookie), row)


def record(cookie: int, spilled: int) -> bytes:
    return RECORD.pack(cookie, bytes(16), b"\x0a" * 16, b"\x00\x50", b"\x1f\x90", cookie, spilled)


def _peer(cookie: int) -> bytes:
    return SPILL_KEY.pack(cookie, bytes(16), bytes(2), SPILL_PEER)
