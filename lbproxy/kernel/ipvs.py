"""Asks the kernel for IPVS's virtual servers, in the network namespace of the thread that asks.

All is listed that the generic netlink family IPVS has. The family is looked for among those that
there are: asking for it by name would load the module.
"""

import collections
import socket
import sys
import typing
from collections.abc import Iterator

from lbproxy.core import ipvs, leftovers, model
from lbproxy.kernel import netlink

_GENERIC: typing.Final = 16  # NETLINK_GENERIC
_CONTROL: typing.Final = 16  # GENL_ID_CTRL
_GET_FAMILY: typing.Final = bytes([3, 1, 0, 0])  # genlmsghdr: command and version
_FAMILY_ID, _FAMILY_NAME = 1, 2
# Of linux/ip_vs.h.
_NAME: typing.Final = b"IPVS"
_GET_SERVICE, _GET_DESTINATION, _FLUSH = (bytes([command, 1, 0, 0]) for command in (4, 8, 17))
_SERVICE, _DESTINATION = 1, 2
_ADDRESS_FAMILY, _PROTOCOL, _ADDRESS, _PORT, _MARK = 1, 2, 3, 4, 5
_ACTIVE, _INACTIVE = 7, 8
_HEADER_BYTES: typing.Final = 4  # genlmsghdr


class Kernel(typing.Protocol):
    """What answers: `netlink.Netlink`."""

    def dump(self, kind: int, request: bytes, /) -> Iterator[bytes]:
        """What each message of a dump holds. Raises OSError."""
        ...


def in_use() -> bool:
    """Whether kube-proxy's device is there; virtual servers without it are somebody else's."""
    return _device() is not None


def look() -> ipvs.Found | None:
    """What there is of it; None on a node without kube-proxy's device."""
    if not in_use():
        return None
    try:
        with netlink.Netlink(_GENERIC) as kernel:
            return found(kernel)
    except OSError as error:
        return ipvs.Found(problem=error.strerror or str(error))


def found(kernel: Kernel) -> ipvs.Found:
    """The virtual servers and what goes on through them. Raises OSError."""
    family = _family(kernel)
    if family is None:
        return ipvs.Found()
    services = [_attributes(answer, _SERVICE) for answer in kernel.dump(family, _GET_SERVICE)]
    connections: collections.Counter[str] = collections.Counter()
    for service in services:
        proto = int.from_bytes(service.get(_PROTOCOL, b""), sys.byteorder)
        named = {one.value: one.name for one in model.Protocol}
        key = (_ADDRESS_FAMILY, _PROTOCOL, _ADDRESS, _PORT, _MARK)
        same = [netlink.attribute(number, service[number]) for number in key if number in service]
        request = _GET_DESTINATION + netlink.attribute(_SERVICE, same)
        for answer in kernel.dump(family, request):
            destination = _attributes(answer, _DESTINATION)
            # Active is what is established. Of UDP nothing ever is.
            counts = (
                (_ACTIVE,) if proto in (model.Protocol.TCP, model.Protocol.SCTP) else (_ACTIVE, _INACTIVE)
            )
            for number in counts:
                count = int.from_bytes(destination.get(number, b""), sys.byteorder)
                connections[named.get(proto, "other")] += count
    return ipvs.Found(len(services), {name: count for name, count in sorted(connections.items()) if count})


def flush() -> bool:
    """Remove all virtual servers; whether this kernel has IPVS at all. Raises OSError."""
    with netlink.Netlink(_GENERIC) as kernel:
        family = _family(kernel)
        if family is not None:
            kernel.request(family, _FLUSH)
    return family is not None


def _device() -> int | None:
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
