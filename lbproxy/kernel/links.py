"""The devices of this network namespace, their addresses and default routes, and word of when they change.

Read from netlink by hand: of a message about a link or a route a few attributes
matter here. pyroute2 decodes them all, which takes a second of processor time
where a node has 10,000 routes, as one that speaks BGP may.
"""

import asyncio
import pathlib
import socket
import struct
import typing

from lbproxy.core import devices
from lbproxy.kernel import netlink

# A table can hold more routes than one answer has room for; what comes is at most so large.
_BUFFER_BYTES: typing.Final = 1 << 16
_SETTLE_S: typing.Final = 0.05
_GROUPS: typing.Final = 0x1 | 0x10 | 0x40 | 0x100 | 0x400  # links; addresses and routes of both families

_BRIDGES_CALL: typing.Final = tuple(
    pathlib.Path("/proc/sys/net/bridge", name)
    for name in ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables")
)
_TRACKED: typing.Final = pathlib.Path("/proc/sys/net/netfilter/nf_conntrack_count")
_GETLINK, _GETADDR = 18, 22
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26

_LINK = struct.Struct("=BxHiII")  # family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # family, prefix length of target and source, tos, table, …, type, flags
_EVERYTHING: typing.Final = bytes(_LINK.size)  # no part of links, addresses or routes alone
_NEXT_HOP = struct.Struct("=HBBi")  # length, flags, hops, index

_LOOPBACK: typing.Final = 0x8
_ARPHRD_ETHER, _ARPHRD_LOOPBACK = 1, 772
_IFLA_IFNAME, _IFLA_MASTER, _IFLA_LINKINFO = 3, 10, 18
_IFLA_INFO_KIND: typing.Final = 1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_SECONDARY, _DAD_FAILED, _DEPRECATED, _TENTATIVE = 0x1, 0x8, 0x20, 0x40
_SCOPE_UNIVERSE: typing.Final = 0
_SCOPE_LINK: typing.Final = 253
_RTA_OIF, _RTA_MULTIPATH = 4, 9
_UNICAST: typing.Final = 1


class Found(typing.NamedTuple):
    """The links, and the indexes of those that a default route leads to."""

    links: tuple[devices.Link, ...]
    default_routes: frozenset[int]


def ports_are_tracked() -> bool:
    """Whether netfilter's tracker sees the frames that come in at ports of bridges (br_netfilter)."""
    return any(_setting(path) for path in _BRIDGES_CALL) and bool(_setting(_TRACKED))


def _setting(path: pathlib.Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def look() -> Found:
    """Everything there is. Raises OSError."""
    for _ in range(netlink.SEVERAL_TRIES):
        found, torn = _look()
        if not torn:
            return found
    return _look()[0]


def every_address() -> tuple[bytes, ...]:
    """The addresses of all links, each once, 16 bytes each, IPv4 as ::ffff:a.b.c.d. Raises OSError."""
    with netlink.Netlink(socket.NETLINK_ROUTE) as route:
        told = (_address(body)[1] for body in route.dump_again(_GETADDR, _EVERYTHING))
        return tuple(dict.fromkeys(address.packed for address in told if address is not None))


def _look() -> tuple[Found, bool]:
    """Everything there is, and whether there were changes meanwhile: then some of it may be missing."""
    with netlink.Netlink(socket.NETLINK_ROUTE) as route:
        links = [_link(body) for body in route.dump(_GETLINK, _EVERYTHING)]
        torn = route.torn
        found = [_address(body) for body in route.dump(_GETADDR, _EVERYTHING)]
        torn |= route.torn
        defaults = [
            index
            for body in route.dump(_GETROUTE, _EVERYTHING)
            if _is_default_route(body)
            for index in _leads_to(body)
        ]
        torn |= route.torn
    of_link: dict[int, list[devices.Address]] = {}
    for index, address in found:
        if address is not None:
            of_link.setdefault(index, []).append(address)
    return Found(
        tuple(link._replace(addresses=tuple(of_link.get(link.ifindex, ()))) for link in links),
        frozenset(defaults),
    ), torn


def _number(value: bytes | None) -> int:
    return int(struct.unpack("=I", value)[0]) if value else 0


def _text(value: bytes | None) -> str:
    return (value or b"").rstrip(b"\0").decode("utf-8", "surrogateescape")


def _link(body: bytes) -> devices.Link:
    _, kind_of_frames, index, flags, _ = _LINK.unpack_from(body)
    found = netlink.attributes(body[_LINK.size :])
    kind = netlink.attributes(found.get(_IFLA_LINKINFO, b"")).get(_IFLA_INFO_KIND)
    return devices.Link(
        index,
        _text(found.get(_IFLA_IFNAME)),
        _text(kind),
        _number(found.get(_IFLA_MASTER)),
        bool(flags & _LOOPBACK),
        kind_of_frames not in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK),
    )


def _address(body: bytes) -> tuple[int, devices.Address | None]:
    family, _, flags, scope, index = _ADDRESS.unpack_from(body)
    found = netlink.attributes(body[_ADDRESS.size :])
    flags = _number(found.get(_IFA_FLAGS)) or flags
    # On a point-to-point link IFA_ADDRESS is the peer.
    raw = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
    if raw is None or family not in (socket.AF_INET, socket.AF_INET6):
        return index, None
    if family == socket.AF_INET:
        return index, devices.Address(
            bytes(10) + b"\xff\xff" + raw, not flags & _SECONDARY and scope < _SCOPE_LINK
        )
    usable = scope == _SCOPE_UNIVERSE and not flags & (_TENTATIVE | _DEPRECATED | _DAD_FAILED)
    return index, devices.Address(raw, usable)


def _is_default_route(body: bytes) -> bool:
    family, prefix_length, *_, kind, _ = _ROUTE.unpack_from(body)
    # Of whatever table: a device that some traffic leaves by default gets that of its own from outside.
    return family in (socket.AF_INET, socket.AF_INET6) and prefix_length == 0 and kind == _UNICAST


def _leads_to(body: bytes) -> typing.Iterator[int]:
    found = netlink.attributes(body[_ROUTE.size :])
    if _RTA_OIF in found:
        yield _number(found[_RTA_OIF])
    hops = found.get(_RTA_MULTIPATH, b"")
    at = 0
    while at + _NEXT_HOP.size <= len(hops):
        length, _, _, index = _NEXT_HOP.unpack_from(hops, at)
        if length < _NEXT_HOP.size:
            break
        yield index
        at += netlink.aligned(length)


class Notices:
    """Tells when links, addresses or default routes may have changed."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.setblocking(False)
        self._socket.bind((0, _GROUPS))

    def close(self) -> None:
        """Listen no longer."""
        self._socket.close()

    async def changed(self) -> None:
        """Return some time after a change: they come in bursts, and one look is enough for all."""
        loop = asyncio.get_running_loop()
        try:
            while not _matters(await loop.sock_recv(self._socket, _BUFFER_BYTES)):
                pass
            await asyncio.sleep(_SETTLE_S)
            while self._socket.recv(_BUFFER_BYTES):
                pass
        except BlockingIOError:
            return
        except OSError:
            # The kernel had more notices than the socket could hold: look anyway.
            return


def _matters(notice: bytes) -> bool:
    """Whether a notice may change a plan; most routes that come and go are not default ones."""
    return any(
        kind not in (_NEWROUTE, _DELROUTE) or _is_default_route(notice[start:end])
        for kind, start, end, _ in netlink.messages(notice)
    )
