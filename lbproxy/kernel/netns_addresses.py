"""Who a network namespace is, and word of addresses that appear in any of them."""

import contextlib
import socket
import struct
import typing

from lbproxy.core import addresses, netns_rows
from lbproxy.kernel import namespaces, netlink, node

_RTM_GETADDR: typing.Final = 22
_MESSAGE: typing.Final = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, device
_IFA_ADDRESS: typing.Final = 1
_IFA_LOCAL: typing.Final = 2
_IFA_FLAGS: typing.Final = 8
_GROUPS: typing.Final = 0x1 | 0x10 | 0x100  # links, IPv4 and IPv6 addresses
_SOL_NETLINK: typing.Final = 270
_LISTEN_ALL_NSID: typing.Final = 8


def here() -> netns_rows.Namespace:
    """The caller's namespace. Raises OSError."""
    with netlink.Netlink(socket.NETLINK_ROUTE) as route:
        told = route.dump_again(_RTM_GETADDR, bytes(_MESSAGE.size))
    # An address that was told of twice, with the time that is left to it.
    return netns_rows.Namespace(node.netns_cookie(), tuple(dict.fromkeys(_addresses(told))))


def _addresses(messages: typing.Iterable[bytes]) -> typing.Iterator[netns_rows.Address]:
    for message in messages:
        _, _, flags, scope, device = _MESSAGE.unpack_from(message)
        told = netlink.attributes(message[_MESSAGE.size :])
        # On a point-to-point link IFA_ADDRESS is the peer.
        packed = told.get(_IFA_LOCAL) or told.get(_IFA_ADDRESS) or b""
        if len(packed) not in (4, 16):
            continue
        if _IFA_FLAGS in told:
            (flags,) = struct.unpack("=I", told[_IFA_FLAGS])
        address = packed if len(packed) == 16 else addresses.IPV4_PREFIX + packed
        yield netns_rows.Address(address, device, scope, flags)


def having(address: bytes) -> tuple[int, ...]:
    """The cookies of the namespaces that have an address (16 bytes), of those that can be entered."""
    visited, _ = namespaces.visit(namespaces.every(), here)
    return tuple(
        space.cookie for space in visited.values() if any(one.address == address for one in space.addresses)
    )


def notices() -> socket.socket:
    """A socket on which something arrives when a device or an address comes or goes.

    Here, and in the namespaces that have been told apart from here, as one is whose end
    of a veth pair has its other end here. Raises OSError.
    """
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    try:
        # Without the right to: what happens to this end of the pair has to do.
        with contextlib.suppress(PermissionError):
            opened.setsockopt(_SOL_NETLINK, _LISTEN_ALL_NSID, 1)
        opened.setblocking(False)
        opened.bind((0, _GROUPS))
    except BaseException:
        opened.close()
        raise
    return opened
