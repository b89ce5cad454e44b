"""Which address the sockets of each network namespace have, for load balancer IPs that are restricted.

A socket that dials such an IP has no source address yet: the kernel chooses one
when it knows the backend. So the programs are told beforehand whom a namespace is.
"""

import typing

from lbproxy import abi
from lbproxy.core import addresses, model, tables

_KEY: typing.Final = abi.LAYOUTS["netns_key"]
_LOOPBACK_DEVICE: typing.Final = 1
_GLOBAL: typing.Final = 0  # rt_scope_t
_SECONDARY: typing.Final = 0x01  # of IPv6: a temporary one
_FAILED: typing.Final = 0x08
_DEPRECATED: typing.Final = 0x20
_TENTATIVE: typing.Final = 0x40
_NOT_CHOSEN: typing.Final = _SECONDARY | _FAILED | _DEPRECATED | _TENTATIVE


class Address(typing.NamedTuple):
    """An address of a device: 16 bytes, the device's number, and scope and flags as the kernel has them."""

    address: bytes
    device: int
    scope: int
    flags: int


class Namespace(typing.NamedTuple):
    """What was found in a network namespace."""

    cookie: int
    addresses: tuple[Address, ...]


Own = typing.Mapping[model.Family, bytes]


def primary(found: typing.Iterable[Address]) -> dict[model.Family, bytes]:
    """The primary global address of each family: the first one of the first device that has any."""
    usable = [one for one in found if one.scope == _GLOBAL and not one.flags & _NOT_CHOSEN]
    # What stands on the loopback device is a service's address rather than the pod's.
    usable.sort(key=lambda one: (one.device == _LOOPBACK_DEVICE, one.device))
    chosen: dict[model.Family, bytes] = {}
    for one in usable:
        chosen.setdefault(addresses.family_of(one.address), one.address)
    return chosen


def rows(found: typing.Iterable[Namespace], host_netns: int, own: Own) -> dict[bytes, bytes]:
    """The rows that these namespaces amount to.

    The node's own has the node's primary addresses, if those are known.
    """
    wanted: dict[bytes, bytes] = {}
    for namespace in found:
        chosen = primary(namespace.addresses)
        if namespace.cookie == host_netns:
            chosen |= own
        for family, address in chosen.items():
            wanted[_KEY.pack(namespace.cookie, family.value)] = address
    return wanted


def writes(want: typing.Mapping[bytes, bytes], have: typing.Mapping[bytes, bytes]) -> list[tables.Write]:
    """The writes that lead to what is wanted; those that go make room first."""
    gone = [tables.Delete(tables.Table.NETNS_ADDRESSES, key) for key in have.keys() - want.keys()]
    changed = [
        tables.Put(tables.Table.NETNS_ADDRESSES, key, row)
        for key, row in want.items()
        if have.get(key) != row
    ]
    return [*gone, *changed]


def own_addresses(settings: tables.Settings) -> dict[model.Family, bytes]:
    """The node's primary addresses, as the kernel has been told."""
    told = {model.Family.IPV4: settings.node4_addr, model.Family.IPV6: settings.node6_addr}
    return {family: address for family, address in told.items() if address != tables.NO_ADDRESS}
