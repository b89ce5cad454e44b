"""Which devices of the node the packet path is attached to, and as what.

Uplinks are where clients outside come in: those named, else those with a default
route or an address of the node. Devices of pods are served packet by packet where
a pattern names them. On all others, replies to masqueraded clients come back, and
whatever leaves through any of them is translated.
"""

import enum
import fnmatch
import typing

from lbproxy.core import addresses, model, tables

# Frames that come in on a member of one of these are its own business: it is what routes them.
_SWITCHES: typing.Final = frozenset({"bridge", "bond", "team", "openvswitch"})


class Role(enum.StrEnum):
    """What a device is to the packet path."""

    UPLINK = "uplink"
    POD = "pod"
    INSIDE = "inside"
    PORT = "port"  # of a bridge: what comes in there the bridge's own device serves, but for answers


class Address(typing.NamedTuple):
    """An address of a link; 16 bytes, IPv4 as ::ffff:a.b.c.d.

    `usable` says that new connections may come from it: it is not another's secondary,
    nor tentative or deprecated, and is good beyond the link.
    """

    packed: bytes
    usable: bool


class Link(typing.NamedTuple):
    """A network device; `master` is the index of what it is enslaved to, or 0."""

    ifindex: int
    name: str
    kind: str = ""
    master: int = 0
    loopback: bool = False
    bare: bool = False  # its packets have no Ethernet header, as those of tunnels
    addresses: tuple[Address, ...] = ()


class Choice(typing.NamedTuple):
    """What configuration says of devices; `bridge` and `prefix` tell pods' traffic, where not empty."""

    uplinks: tuple[str, ...] = ()
    pod_patterns: tuple[str, ...] = ()
    bridge: str = ""
    prefix: str = ""
    ports: bool = False  # netfilter tracks connections at ports of bridges, too


class Device(typing.NamedTuple):
    """A device to attach to, and its row in the `devices` table."""

    ifindex: int
    name: str
    role: Role
    row: tables.Device


def plan(
    links: typing.Sequence[Link],
    default_routes: typing.Collection[int],
    node_addresses: typing.Collection[bytes],
    choice: Choice,
) -> list[Device]:
    """Choose the devices, uplinks first; `default_routes` are the indexes of links that have one."""
    by_index = {link.ifindex: link for link in links}
    uplinks = {
        _top(link, by_index).ifindex
        for link in links
        if (
            link.name in choice.uplinks
            if choice.uplinks
            else link.ifindex in default_routes
            or any(address.packed in node_addresses for address in link.addresses)
        )
    }
    devices = []
    for link in links:
        role = _role(link, by_index, uplinks, choice)
        if role is not None:
            devices.append(Device(link.ifindex, link.name, role, _row(link, by_index, choice)))
    return sorted(devices, key=lambda device: (list(Role).index(device.role), device.ifindex))


def missing(links: typing.Iterable[Link], choice: Choice) -> list[str]:
    """The uplinks that were named and are not there."""
    names = {link.name for link in links if not link.loopback}
    return [name for name in choice.uplinks if name not in names]


def _top(link: Link, by_index: typing.Mapping[int, Link]) -> Link:
    """What routes the frames of a link: the bridge or bond that it is part of, or itself."""
    seen = {link.ifindex}
    while (above := _switch(link, by_index)) is not None and above.ifindex not in seen:
        seen.add(above.ifindex)
        link = above
    return link


def _switch(link: Link, by_index: typing.Mapping[int, Link]) -> Link | None:
    master = by_index.get(link.master)
    return master if master is not None and master.kind in _SWITCHES else None


def _role(
    link: Link, by_index: typing.Mapping[int, Link], uplinks: typing.Collection[int], choice: Choice
) -> Role | None:
    if link.loopback:
        return None
    if link.ifindex in uplinks:
        return Role.UPLINK
    if any(fnmatch.fnmatchcase(link.name, pattern) for pattern in choice.pod_patterns):
        return Role.POD
    above = _switch(link, by_index)
    if above is None:
        return Role.INSIDE
    return Role.PORT if choice.ports and above.kind == "bridge" and above.ifindex not in uplinks else None


def _row(link: Link, by_index: typing.Mapping[int, Link], choice: Choice) -> tables.Device:
    usable = [address.packed for address in link.addresses if address.usable]
    # As netfilter and so kube-proxy's detectors see it (DET-3): a bridge's port is the bridge.
    name = _top(link, by_index).name
    pods = bool(choice.bridge) and name == choice.bridge
    pods = pods or (bool(choice.prefix) and name.startswith(choice.prefix))
    flags = tables.DeviceFlag(0)
    if pods:
        flags |= tables.DeviceFlag.PODS
    if link.bare:
        flags |= tables.DeviceFlag.BARE
    return tables.Device(
        next((one for one in usable if _is_ipv4(one)), tables.NO_ADDRESS),
        next((one for one in usable if not _is_ipv4(one)), tables.NO_ADDRESS),
        int(flags),
    )


def _is_ipv4(address: bytes) -> bool:
    return addresses.family_of(address) is model.Family.IPV4


def writes(devices: typing.Iterable[Device], have: typing.Mapping[bytes, bytes]) -> list[tables.Write]:
    """The writes that lead to these devices' rows; `have` is what the table holds. What goes makes room."""
    want = {tables.row_key(device.ifindex): device.row.pack() for device in devices}
    changed: list[tables.Write] = [
        tables.Delete(tables.Table.DEVICES, key) for key in have.keys() - want.keys()
    ]
    changed += [
        tables.Put(tables.Table.DEVICES, key, row) for key, row in want.items() if have.get(key) != row
    ]
    return changed
