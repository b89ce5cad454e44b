"""Which devices the packet path goes to, by tables of what a node may have."""

import typing

import pytest

from lbproxy.core import addresses, devices, tables
from lbproxy.core.devices import Choice, Link

DEFAULT = Choice()


def packed(text: str) -> bytes:
    found = addresses.parse(text)
    assert found is not None
    return found


def link(ifindex: int, name: str, *texts: str, kind: str = "", master: int = 0) -> Link:
    """A link; an address with a `!` may not be used for new connections."""
    found = tuple(devices.Address(packed(text.strip("!")), not text.startswith("!")) for text in texts)
    return Link(ifindex, name, kind, master, loopback=name == "lo", addresses=found)


LO = link(1, "lo", "127.0.0.1", "::1")
ETH0 = link(2, "eth0", "192.0.2.1", "2001:db8::1")
ETH1 = link(3, "eth1", "198.51.100.1")
CNI0 = link(4, "cni0", "10.0.0.1", kind="bridge")
VETH1 = link(5, "veth1", kind="veth", master=4)
VETH2 = link(6, "veth2", kind="veth")
BR0 = link(7, "br0", "192.0.2.1", kind="bridge")
BOND0 = link(8, "bond0", kind="bond", master=7)
PORT = link(9, "eth2", kind="", master=8)
VRF = link(10, "red", kind="vrf")
IN_VRF = link(11, "eth3", master=10)
NODE = [LO, ETH0, ETH1, CNI0, VETH1, VETH2]


class Case(typing.NamedTuple):
    what: str
    links: list[Link]
    defaults: set[int]
    node: list[str]
    choice: Choice
    want: str  # name=role, in order


CASES = [
    Case(
        "a default route makes an uplink; members of a bridge are left to it",
        NODE, {2}, [], DEFAULT, "eth0=uplink eth1=inside cni0=inside veth2=inside",
    ),
    Case(
        "but for answers where connections are tracked at its ports, and no bond's, nor an uplink's",
        [*NODE, BR0, BOND0, PORT], {2, 7}, [], Choice(ports=True),
        "eth0=uplink br0=uplink eth1=inside cni0=inside veth2=inside veth1=port",
    ),
    Case(
        "so does an address of the node",
        NODE, {2}, ["198.51.100.1"], DEFAULT, "eth0=uplink eth1=uplink cni0=inside veth2=inside",
    ),
    Case(
        "where uplinks are named, those are all",
        NODE, {2}, ["192.0.2.1"], Choice(("eth1",)), "eth1=uplink eth0=inside cni0=inside veth2=inside",
    ),
    Case(
        "devices of pods are named by patterns, members of a bridge too",
        NODE, {2}, [], Choice(pod_patterns=("veth*", "nothing?")),
        "eth0=uplink veth1=pod veth2=pod eth1=inside cni0=inside",
    ),
    Case(
        "an uplink that a pattern also fits stays one",
        NODE, {2}, [], Choice(pod_patterns=("eth0",)), "eth0=uplink eth1=inside cni0=inside veth2=inside",
    ),
    Case(
        "patterns are whole names, and case counts",
        NODE, {2}, [], Choice(pod_patterns=("VETH*", "veth")),
        "eth0=uplink eth1=inside cni0=inside veth2=inside",
    ),
    Case(
        "what holds the address of a bridge's members is the bridge",
        [LO, BR0, BOND0, PORT], set(), ["192.0.2.1"], DEFAULT, "br0=uplink",
    ),
    Case(
        "a member that is named means what it is part of, however deep",
        [LO, BR0, BOND0, PORT], set(), [], Choice(("eth2",)), "br0=uplink",
    ),
    Case(
        "a member of a VRF routes for itself",
        [LO, VRF, IN_VRF], {11}, [], DEFAULT, "eth3=uplink red=inside",
    ),
    Case(
        "the loopback device is never served, whatever it holds",
        [link(1, "lo", "192.0.2.1")], {1}, ["192.0.2.1"], Choice(pod_patterns=("*",)), "",
    ),
    Case(
        "masters in a circle end",
        [link(2, "a", kind="bond", master=3), link(3, "b", kind="bond", master=2)],
        {2}, [], DEFAULT, "b=uplink",
    ),
    Case("a master that can not be seen is none", [VETH1], set(), [], DEFAULT, "veth1=inside"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_roles(case: Case) -> None:
    planned = devices.plan(case.links, case.defaults, [packed(one) for one in case.node], case.choice)
    assert " ".join(f"{device.name}={device.role}" for device in planned) == case.want


@pytest.mark.parametrize(
    ("texts", "v4", "v6"),
    [
        ((), "", ""),
        (("!192.0.2.9", "192.0.2.1", "192.0.2.2"), "192.0.2.1", ""),
        (("!fe80::1", "!2001:db8::9", "2001:db8::1", "2001:db8::2", "192.0.2.1"), "192.0.2.1", "2001:db8::1"),
    ],
)
def test_the_row_has_the_first_usable_address_of_each_family(
    texts: tuple[str, ...], v4: str, v6: str
) -> None:
    [device] = devices.plan([link(2, "eth0", *texts)], (), (), DEFAULT)
    wanted = [packed(one) if one else tables.NO_ADDRESS for one in (v4, v6)]
    assert [device.row.addr4, device.row.addr6] == wanted


@pytest.mark.parametrize(
    ("choice", "pods"),
    [
        (DEFAULT, set()),
        (Choice(bridge="cni0", pod_patterns=("veth*",)), {"cni0", "veth1"}),
        (Choice(bridge="veth2"), {"veth2"}),
        (Choice(prefix="eth", pod_patterns=("veth*",)), {"eth0", "eth1"}),
        (Choice(prefix="cni", pod_patterns=("veth*",)), {"cni0", "veth1"}),
    ],
)
def test_detectors_by_interface_mark_devices_of_pods(choice: Choice, pods: set[str]) -> None:
    planned = devices.plan(NODE, {2}, (), choice)
    assert {device.name for device in planned if device.row.flags & tables.DeviceFlag.PODS} == pods


def test_uplinks_that_are_named_and_not_there_are_told() -> None:
    assert devices.missing(NODE, Choice(("eth0", "eth7", "lo"))) == ["eth7", "lo"]
    assert devices.missing(NODE, DEFAULT) == []


def test_a_device_without_ethernet_headers_is_told_as_such() -> None:
    tunnel = link(9, "tunl0", "10.0.0.9", kind="ipip")._replace(bare=True)
    planned = devices.plan([ETH0, tunnel], {2}, (), devices.Choice(prefix="tun"))
    flags = {device.name: device.row.flags for device in planned}
    assert flags == {"eth0": 0, "tunl0": tables.DeviceFlag.BARE | tables.DeviceFlag.PODS}


def test_only_rows_that_differ_are_written_and_room_is_made_first() -> None:
    planned = devices.plan(NODE, {2}, (), DEFAULT)
    rows = {tables.row_key(device.ifindex): device.row.pack() for device in planned}
    assert devices.writes(planned, rows) == []
    stale = rows | {tables.row_key(77): b"", tables.row_key(2): b"other"}
    assert devices.writes(planned, stale) == [
        tables.Delete(tables.Table.DEVICES, tables.row_key(77)),
        tables.Put(tables.Table.DEVICES, tables.row_key(2), planned[0].row.pack()),
    ]
