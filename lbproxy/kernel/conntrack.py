"""Reads the kernel's connection tracker over netlink, of the network namespace of the thread that asks."""

import errno
import socket
import typing
from collections.abc import Iterable, Iterator

from lbproxy.core import conntrack
from lbproxy.kernel import ipvs, netlink

_NETLINK_NETFILTER: typing.Final = 12
_NEW, _GET = 1 << 8, 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_
_CREATE, _EXCLUSIVE = 0x400, 0x200
# What a kernel says that has no tracker, or no way to ask it.
_NONE: typing.Final = (errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOENT)


def translated() -> Iterator[conntrack.Entry]:
    """Every entry whose destination is translated; none where nothing is tracked. Raises OSError."""
    try:
        tracker = netlink.Netlink(_NETLINK_NETFILTER)
    except OSError as error:
        if error.errno not in _NONE:
            raise
        return
    by_ipvs = ipvs.in_use()
    with tracker:
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                for message in tracker.dump(_GET, conntrack.request(family, ipvs=by_ipvs)):
                    entry = conntrack.decode(message, ipvs=by_ipvs)
                    if entry is not None:
                        yield entry
            except OSError as error:
                if error.errno not in _NONE:
                    raise


def reserve(flows: Iterable[conntrack.Reserved]) -> int:
    """Enter connections that are nobody else's, so that no masquerade of the kernel gets their ports.

    One that is there already stays as it is. Returns how many were made. Raises OSError.
    """
    made = 0
    with netlink.Netlink(_NETLINK_NETFILTER) as tracker:
        for flow in flows:
            try:
                tracker.request(_NEW, conntrack.reservation(flow), _CREATE | _EXCLUSIVE)
            except FileExistsError:
                continue
            made += 1
    return made
