"""The node's own addresses and network namespace, and word of when they change."""

import asyncio
import logging
import socket
import struct
import typing

from lbproxy.kernel import links

_RTMGRP_IPV4_IFADDR: typing.Final = 0x10
_RTMGRP_IPV6_IFADDR: typing.Final = 0x100
_SO_NETNS_COOKIE: typing.Final = 71
_SETTLE_S: typing.Final = 0.05
_RETRY_S: typing.Final = 1.0
_log = logging.getLogger(__name__)


def netns_cookie() -> int:
    """The cookie of the network namespace that this process is in."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return int(struct.unpack("=Q", probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0])


async def watch_addresses(changed: typing.Callable[[tuple[bytes, ...]], None]) -> typing.NoReturn:
    """Call `changed` with all addresses now, and whenever one comes or goes."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as notices:
        notices.setblocking(False)
        notices.bind((0, _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR))
        loop = asyncio.get_running_loop()
        last: tuple[bytes, ...] | None = None
        failure = ""
        while True:
            try:
                now = await asyncio.to_thread(links.every_address)
            except OSError as error:
                # For want of a file descriptor, say. What was known stays.
                if str(error) != failure:
                    _log.error("cannot look at the node's addresses: %s", error)
                failure = str(error)
                await asyncio.sleep(_RETRY_S)
                continue
            failure = ""
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
