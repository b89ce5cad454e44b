"""The node's own addresses and network namespace, and word of when they change."""

import asyncio
import importlib
import ipaddress
import socket
import struct
import sys
import typing

from lbproxy import late

_RTM_NEWADDR: typing.Final = 20
_RTM_GETADDR: typing.Final = 22
_NLM_F_REQUEST_DUMP: typing.Final = 0x301
_RTMGRP_IPV4_IFADDR: typing.Final = 0x10
_RTMGRP_IPV6_IFADDR: typing.Final = 0x100
_SO_NETNS_COOKIE: typing.Final = 71
_SETTLE_S: typing.Final = 0.05


def netns_cookie() -> int:
    """The cookie of the network namespace that this process is in."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return int(struct.unpack("=Q", probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0])


def local_addresses() -> tuple[bytes, ...]:
    """Every address of every link, 16 bytes each, IPv4 as ::ffff:a.b.c.d."""
    socket_type, message_type = _netlink()
    found: dict[bytes, None] = {}
    with socket_type(family=socket.NETLINK_ROUTE) as route:
        route.register_policy({_RTM_NEWADDR: message_type})
        route.bind()
        for message in route.nlm_request(message_type(), _RTM_GETADDR, _NLM_F_REQUEST_DUMP):
            # On a point-to-point link IFA_ADDRESS is the peer.
            text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            if text:
                found[_packed(text)] = None
    return tuple(found)


def _netlink() -> tuple[typing.Any, typing.Any]:
    """pyroute2's netlink socket and its address message.

    The whole of pyroute2 occupies 10 MB, these two parts one.
    """
    if "pyroute2" not in sys.modules:
        late.install({"pyroute2": {}})
    sockets = importlib.import_module("pyroute2.netlink.nlsocket")
    addresses = importlib.import_module("pyroute2.netlink.rtnl.ifaddrmsg")
    return sockets.NetlinkSocket, addresses.ifaddrmsg


def _packed(text: str) -> bytes:
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv4Address):
        return bytes(10) + b"\xff\xff" + address.packed
    return address.packed


async def watch_addresses(changed: typing.Callable[[tuple[bytes, ...]], None]) -> typing.NoReturn:
    """Call `changed` with all addresses now, and whenever one comes or goes."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as notices:
        notices.setblocking(False)
        notices.bind((0, _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR))
        loop = asyncio.get_running_loop()
        last: tuple[bytes, ...] | None = None
        while True:
            now = await asyncio.to_thread(local_addresses)
            if now != last:
                changed(now)
                last = now
            try:
                await loop.sock_recv(notices, 65536)
                # Addresses come in bursts: one look for all of them.
                await asyncio.sleep(_SETTLE_S)
                while notices.recv(65536):
                    pass
            except BlockingIOError:
                continue
            except OSError:
                # The kernel had more notices than the socket could hold: look again anyway.
                continue
