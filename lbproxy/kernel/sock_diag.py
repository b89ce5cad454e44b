"""Connected UDP sockets of a network namespace, closed from outside.

The kernel compares the cookie again before it destroys a socket, so one that has
just taken over the addresses of one that is gone is safe.
"""

import collections.abc
import contextlib
import errno
import socket
import struct
import typing

from lbproxy.kernel import netlink

_NETLINK_SOCK_DIAG: typing.Final = 4
_BY_FAMILY: typing.Final = 20
_DESTROY: typing.Final = 21
_ESTABLISHED: typing.Final = 1  # of a UDP socket: connected

_REQUEST: typing.Final = struct.Struct("=BBBxI48s")  # inet_diag_req_v2
_ID: typing.Final = slice(4, 52)  # the inet_diag_sockid in an inet_diag_msg
_DPORT: typing.Final = slice(2, 4)  # of an inet_diag_sockid, and so are these
_DST_AT: typing.Final = 20
_COOKIE: typing.Final = struct.Struct("=40xII")  # its lower half first, whatever the byte order
_NO_ID: typing.Final = bytes(48)
_IPV4_PREFIX: typing.Final = bytes(10) + b"\xff\xff"


class Peer(typing.NamedTuple):
    """Where a socket is connected to: 16 bytes, IPv4 as ::ffff:a.b.c.d, and 2 in network order."""

    address: bytes
    port: bytes


def close_udp(wanted: collections.abc.Mapping[int, Peer]) -> set[int]:
    """Close sockets of the caller's namespace, by cookie, that are connected to these peers.

    Returns the cookies of those that were closed. Whoever waits on such a socket is
    woken with ECONNABORTED, and it is connected no longer. Raises OSError.
    """
    closed: set[int] = set()
    with netlink.Netlink(_NETLINK_SOCK_DIAG) as diag:
        for family in (socket.AF_INET, socket.AF_INET6):
            for cookie, identity in _connected(diag, family, wanted):
                if _peer(family, identity) == wanted[cookie] and _destroy(diag, family, identity):
                    closed.add(cookie)
    return closed


@contextlib.contextmanager
def _explained(number: int, what: str) -> collections.abc.Iterator[None]:
    """Say what this kernel lacks where its own word for it is of no help."""
    try:
        yield
    except OSError as error:
        if error.errno != number:
            raise
        raise OSError(number, what) from error


def _connected(
    diag: netlink.Netlink, family: int, cookies: collections.abc.Container[int]
) -> list[tuple[int, bytes]]:
    """Cookie and id of those connected UDP sockets that have one of these cookies."""
    found: list[tuple[int, bytes]] = []
    with _explained(errno.ENOENT, "this kernel cannot list UDP sockets (udp_diag)"):
        for message in diag.dump(_BY_FAMILY, _request(family, _NO_ID)):
            identity = message[_ID]
            low, high = _COOKIE.unpack(identity)
            cookie = high << 32 | low
            if cookie in cookies:
                found.append((cookie, identity))
    return found


def _peer(family: int, identity: bytes) -> Peer:
    if family == socket.AF_INET6:
        return Peer(identity[_DST_AT : _DST_AT + 16], identity[_DPORT])
    return Peer(_IPV4_PREFIX + identity[_DST_AT : _DST_AT + 4], identity[_DPORT])


def _destroy(diag: netlink.Netlink, family: int, identity: bytes) -> bool:
    """Close one socket; False where it is gone."""
    lacks = _explained(errno.EOPNOTSUPP, "this kernel cannot close sockets (CONFIG_INET_DIAG_DESTROY)")
    with contextlib.suppress(FileNotFoundError), lacks:
        diag.request(_DESTROY, _request(family, identity))
        return True
    return False


def _request(family: int, identity: bytes) -> bytes:
    return _REQUEST.pack(family, socket.IPPROTO_UDP, 0, 1 << _ESTABLISHED, identity)
