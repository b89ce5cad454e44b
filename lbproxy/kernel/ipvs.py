"""Asks the kernel for IPVS's virtual servers, and removes kube-proxy's, in the thread's network namespace.

Whose one is no field says. kube-proxy has the addresses of its virtual servers on the device kube-ipvs0,
but for NodePorts, which it serves on addresses of the node. The family is looked for among those that
there are: asking for it by name would load the module.
"""

import collections
import contextlib
import socket
import sys
import typing
from collections.abc import Iterator

from lbproxy.core import addresses, ipvs, leftovers, model
from lbproxy.kernel import netlink, netns_addresses

_GENERIC: typing.Final = 16  # NETLINK_GENERIC
_CONTROL: typing.Final = 16  # GENL_ID_CTRL
_GET_FAMILY: typing.Final = bytes([3, 1, 0, 0])  # genlmsghdr: command and version
_FAMILY_ID, _FAMILY_NAME = 1, 2
# Of linux/ip_vs.h.
_NAME: typing.Final = b"IPVS"
_DELETE_SERVICE, _GET_SERVICE, _GET_DESTINATION = (bytes([command, 1, 0, 0]) for command in (3, 4, 8))
_SERVICE, _DESTINATION = 1, 2
_ADDRESS_FAMILY, _PROTOCOL, _ADDRESS, _PORT, _MARK = 1, 2, 3, 4, 5
_KEY: typing.Final = (_ADDRESS_FAMILY, _PROTOCOL, _ADDRESS, _PORT, _MARK)
_ACTIVE, _INACTIVE = 7, 8
_HEADER_BYTES: typing.Final = 4  # genlmsghdr


class Kernel(typing.Protocol):
    """What answers: `netlink.Netlink`."""

    def dump(self, kind: int, request: bytes, /) -> Iterator[bytes]:
        """What each message of a dump holds. Raises OSError."""
        ...

    def request(self, kind: int, request: bytes, /) -> None:
        """Have something done. Raises OSError."""
        ...


class Places(typing.NamedTuple):
    """Addresses (16 bytes) that kube-proxy's virtual servers are known by: of its device, of the node."""

    on_device: frozenset[bytes]
    on_node: frozenset[bytes]


class _Held(typing.NamedTuple):
    """A virtual server, and the attributes that name it to the kernel."""

    server: ipvs.Server
    key: bytes


def in_use() -> bool:
    """Whether kube-proxy's device is there; virtual servers without it are somebody else's."""
    return device() is not None


def look() -> ipvs.Found | None:
    """What there is of it; None on a node without kube-proxy's device."""
    if not in_use():
        return None
    try:
        with netlink.Netlink(_GENERIC) as kernel:
            return found(kernel, _places())
    except OSError as error:
        return ipvs.Found(problem=error.strerror or str(error))


def families() -> frozenset[model.Family]:
    """Of which families kube-proxy has virtual servers. Raises OSError."""
    if not in_use():
        return frozenset()
    with netlink.Netlink(_GENERIC) as kernel:
        _, own, _ = _told(kernel, _places())
    return frozenset(addresses.family_of(one.server.address) for one in own)


def found(kernel: Kernel, places: Places) -> ipvs.Found:
    """kube-proxy's virtual servers and what goes on through them. Raises OSError."""
    family, own, others = _told(kernel, places)
    connections: collections.Counter[str] = collections.Counter()
    for one in own:
        proto = one.server.proto
        # Active is what is established. Of UDP nothing ever is.
        lasting = proto in (model.Protocol.TCP, model.Protocol.SCTP)
        name = model.Protocol(proto).name if proto in tuple(model.Protocol) else "other"
        for answer in kernel.dump(family, _GET_DESTINATION + one.key):
            destination = _attributes(answer, _DESTINATION)
            for number in (_ACTIVE,) if lasting else (_ACTIVE, _INACTIVE):
                connections[name] += int.from_bytes(destination.get(number, b""), sys.byteorder)
    return ipvs.Found(
        len(own), {name: count for name, count in sorted(connections.items()) if count}, others=others
    )


def remove() -> tuple[int, tuple[str, ...]]:
    """Remove kube-proxy's virtual servers: how many, and which others stay. Raises OSError."""
    with netlink.Netlink(_GENERIC) as kernel:
        return removed(kernel, _places())


def removed(kernel: Kernel, places: Places) -> tuple[int, tuple[str, ...]]:
    """Remove them one by one, since flushing takes others' too. Raises OSError."""
    family, own, others = _told(kernel, places)
    for one in own:
        with contextlib.suppress(ProcessLookupError):  # gone already
            kernel.request(family, _DELETE_SERVICE + one.key)
    return len(own), others


def _told(kernel: Kernel, places: Places) -> tuple[int, list[_Held], tuple[str, ...]]:
    """The netlink family (0 where there is none), kube-proxy's virtual servers, and whose else there are."""
    family = _family(kernel)
    if family is None:
        return 0, [], ()
    own, others = list[_Held](), list[str]()
    for answer in kernel.dump(family, _GET_SERVICE):
        told = _attributes(answer, _SERVICE)
        server = _server(told)
        if server.is_kube_proxys(*places):
            same = [netlink.attribute(number, told[number]) for number in _KEY if number in told]
            own.append(_Held(server, netlink.attribute(_SERVICE, same)))
        else:
            others.append(str(server))
    return family, own, tuple(others)


def _server(told: dict[int, bytes]) -> ipvs.Server:
    family, proto, mark = (
        int.from_bytes(told.get(number, b""), sys.byteorder) for number in (_ADDRESS_FAMILY, _PROTOCOL, _MARK)
    )
    address = told.get(_ADDRESS, b"").ljust(16, b"\0")
    if family == socket.AF_INET:
        address = addresses.IPV4_PREFIX + address[:4]
    return ipvs.Server(proto, address, int.from_bytes(told.get(_PORT, b""), "big"), mark)


def _places() -> Places:
    own_device = device()
    on_device, on_node = set[bytes](), set[bytes]()
    for one in netns_addresses.here().addresses:
        (on_device if one.device == own_device else on_node).add(one.address)
    return Places(frozenset(on_device), frozenset(on_node))


def device() -> int | None:
    """The number of kube-proxy's device; None where there is none."""
    try:
        return socket.if_nametoindex(leftovers.IPVS_DEVICE)
    except OSError:
        return None


def _family(kernel: Kernel) -> int | None:
    number = None
    for answer in kernel.dump(_CONTROL, _GET_FAMILY):
        one = netlink.attributes(answer[_HEADER_BYTES:])
        if one.get(_FAMILY_NAME, b"").rstrip(b"\0") == _NAME:
            number = int.from_bytes(one[_FAMILY_ID], sys.byteorder)
    return number


def _attributes(answer: bytes, number: int) -> dict[int, bytes]:
    """What the one nested attribute holds that an answer is made of."""
    return netlink.attributes(netlink.attributes(answer[_HEADER_BYTES:]).get(number, b""))
