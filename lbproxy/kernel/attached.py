"""Whose programs are at the hooks that lbproxy would attach to; found without changing anything."""

import contextlib
import functools
import os
import pathlib
import socket
import struct
import sys
import typing

from lbproxy.core.preflight import facts, owners
from lbproxy.kernel import generation, hooks, libbpf, netlink, programs

_MULTI: typing.Final = 2  # BPF_F_ALLOW_MULTI
_OVERRIDE: typing.Final = 1
_TCX: typing.Final = (("tcx ingress", libbpf.TCX_INGRESS), ("tcx egress", libbpf.TCX_EGRESS))
_CLSACT: typing.Final = (("tc ingress", 0xFFFFFFF2), ("tc egress", 0xFFFFFFF3), ("tc ingress", 0xFFFF0000))
_LINK: typing.Final = struct.Struct("=BxHiII")  # struct ifinfomsg
_TRAFFIC: typing.Final = struct.Struct("=B3xiIII")  # struct tcmsg
_NUMBER: typing.Final = 0x3FFF  # of an attribute; what is above are flags
_GETLINK: typing.Final = 18
_GETQDISC: typing.Final = 38
_GETFILTER: typing.Final = 46
_IFLA_XDP: typing.Final = 43
_XDP_PROGRAMS: typing.Final = (4, 5, 6, 7)  # IFLA_XDP_PROG_ID, that of the driver, of the kernel, of the NIC
_TCA_KIND: typing.Final = 1
_TCA_OPTIONS: typing.Final = 2
_TCA_BPF_NAME: typing.Final = 7
_TCA_BPF_ID: typing.Final = 11


def own_programs(root: pathlib.Path) -> frozenset[int]:
    """The ids of the programs that are pinned in a folder or held by its links."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        found |= {info.id for info in generation.Generation(root).programs().values()}
    with contextlib.suppress(OSError):
        found |= hooks.Hooks(root / "links").running()
    return frozenset(found)


def at_cgroup(cgroup: pathlib.Path, mount: pathlib.Path, own: frozenset[int]) -> list[facts.Program]:
    """Others' programs at the hooks of a cgroup and of those that it is in. Raises OSError."""
    found = []
    for folder in (cgroup, *(one for one in cgroup.parents if one.is_relative_to(mount))):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for program in programs.SOCKET:
                flags, ids = libbpf.attached(fd, program.attach_type)
                # What lets others in further down still keeps them out beside itself.
                single = not flags & _MULTI
                yields = bool(flags & _OVERRIDE) and folder != cgroup
                found += [
                    _program(program.name, number, str(folder))._replace(
                        alone=single and not yields, yields=single and yields
                    )
                    for number in ids
                    if number not in own
                ]
        finally:
            os.close(fd)
    return found


def at_devices(names: typing.Mapping[int, str], own: frozenset[int]) -> list[facts.Program]:
    """Others' programs at these devices, by XDP, by TCX and by tc filters. Raises OSError."""
    found = []
    with netlink.Netlink(socket.NETLINK_ROUTE) as route:
        xdp = dict(_xdp(route))
        with_filters = set(_with_filters(route))
        for index, name in names.items():
            found += [_program("XDP", number, name) for number in xdp.get(index, ())]
            found += [_program(hook, number, name) for hook, number in _tcx(index)]
            if index in with_filters:
                # It may have gone this moment.
                with contextlib.suppress(OSError):
                    found += _filters(route, index, name)
    return [one for one in found if one.id not in own]


def _xdp(route: netlink.Netlink) -> typing.Iterator[tuple[int, tuple[int, ...]]]:
    """Devices by number, and the programs that they have."""
    for message in route.dump(_GETLINK, bytes(_LINK.size)):
        _, _, index, _, _ = _LINK.unpack_from(message)
        told = _attributes(_attributes(message[_LINK.size :]).get(_IFLA_XDP, b""))
        # Attached in one way only, its id is there twice.
        yield index, tuple(dict.fromkeys(_number(told[kind]) for kind in _XDP_PROGRAMS if kind in told))


def _tcx(index: int) -> typing.Iterator[tuple[str, int]]:
    for hook, attach_type in _TCX:
        # Without TCX, or once the device has gone, there is nothing.
        with contextlib.suppress(OSError):
            for number in libbpf.attached(index, attach_type)[1]:
                yield hook, number


def _with_filters(route: netlink.Netlink) -> typing.Iterator[int]:
    """The devices whose packets filters see before anybody else does."""
    for message in route.dump(_GETQDISC, bytes(_TRAFFIC.size)):
        kind = _attributes(message[_TRAFFIC.size :]).get(_TCA_KIND, b"").rstrip(b"\0")
        if kind in (b"clsact", b"ingress"):
            yield _TRAFFIC.unpack_from(message)[1]


def _filters(route: netlink.Netlink, index: int, name: str) -> typing.Iterator[facts.Program]:
    seen = set()
    for hook, parent in _CLSACT:
        for message in route.dump(_GETFILTER, _TRAFFIC.pack(0, index, 0, parent, 0)):
            told = _attributes(message[_TRAFFIC.size :])
            options = _attributes(told.get(_TCA_OPTIONS, b""))
            if _TCA_BPF_ID in options and (hook, options[_TCA_BPF_ID]) not in seen:
                seen.add((hook, options[_TCA_BPF_ID]))
                program = _program(hook, _number(options[_TCA_BPF_ID]), name)
                given = options.get(_TCA_BPF_NAME, b"").rstrip(b"\0").decode(errors="replace")
                yield program if program.name else program._replace(name=given)


def _attributes(packed: bytes) -> dict[int, bytes]:
    return {number & _NUMBER: value for number, value in netlink.attributes(packed).items()}


def _number(value: bytes) -> int:
    return int.from_bytes(value, sys.byteorder)


def _program(hook: str, number: int, place: str) -> facts.Program:
    name, whose = _identity(number)
    return facts.Program(hook, name, number, whose, place)


@functools.cache
def _identity(number: int) -> tuple[str, str]:
    """A program's name and its owner's; looking at others' programs takes CAP_SYS_ADMIN."""
    try:
        with _closing(libbpf.prog_by_id(number)) as fd:
            info = libbpf.prog_info(fd)
    except OSError:
        return "", ""
    return info.name, owners.owner(info.name, list(_map_names(info.map_ids)))


def _map_names(numbers: typing.Iterable[int]) -> typing.Iterator[str]:
    for number in numbers:
        with contextlib.suppress(OSError), _closing(libbpf.map_by_id(number)) as fd:
            yield libbpf.map_info(fd).name


@contextlib.contextmanager
def _closing(fd: int) -> typing.Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)
