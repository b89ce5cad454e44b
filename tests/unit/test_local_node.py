"""What the configuration means to the node's rows; tests/unit/test_controller.py: when they are written."""

import ipaddress
import pathlib
import typing

import pytest

from lbproxy import local_node
from lbproxy.config import config
from lbproxy.core import addresses, model, node_rows, tables
from lbproxy.kernel import fake
from tests import serving

Modes = config.DetectLocalMode


def ip(text: str) -> bytes:
    return addresses.packed(ipaddress.ip_address(text))


ETH0 = ip("192.0.2.1")


def settings(**fields: typing.Any) -> config.Config:
    return config.Config(node_name="node-a", **fields)


def networks(*cidrs: str) -> tuple[config.IPNetwork, ...]:
    return tuple(map(ipaddress.ip_network, cidrs))


@pytest.mark.parametrize(
    ("fields", "pod_cidrs", "by_device"),
    [
        ({}, (), False),
        ({"cluster_cidrs": networks("10.244.0.0/16", "fd00::/48")}, ("10.244.0.0/16", "fd00::/48"), False),
        ({"detect_local_mode": Modes.NODE_CIDR}, None, False),
        ({"detect_local_mode": Modes.BRIDGE_INTERFACE, "bridge_interface": "cni0"}, (), True),
        ({"detect_local_mode": Modes.INTERFACE_NAME_PREFIX, "interface_name_prefix": "veth"}, (), True),
    ],
)
def test_how_pods_are_told(
    fields: dict[str, typing.Any], pod_cidrs: tuple[str, ...] | None, by_device: bool
) -> None:
    rules = local_node.packet_rules(settings(**fields))
    assert (rules.pod_cidrs, rules.pods_by_device) == (pod_cidrs, by_device)


def test_the_rest_is_passed_on() -> None:
    timeouts = node_rows.Timeouts(udp_new_s=5)
    rules = local_node.packet_rules(
        settings(masquerade_all=True, keep_client_address=True, flow_timeouts=timeouts)
    )
    assert (rules.masquerade_all, rules.keep_client, rules.timeouts) == (True, True, timeouts)


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("15000\t29999\n", node_rows.Ports(32768, 32768)),
        ("nonsense", node_rows.Ports(1024, 28976)),
        (None, node_rows.Ports(1024, 28976)),
    ],
)
def test_ports_are_what_the_node_leaves_free(
    tmp_path: pathlib.Path, text: str | None, ports: node_rows.Ports
) -> None:
    path = tmp_path / "ip_local_port_range"
    if text is not None:
        path.write_text(text)
    assert local_node.packet_rules(settings(), path).ports == ports
    given = settings(masquerade_ports=(40000, 40009))
    assert local_node.packet_rules(given, path).ports == node_rows.Ports(40000, 10)


def node(*pod_cidrs: str) -> model.Node:
    return model.Node("node-a", (ETH0,), "", pod_cidrs, eligible=True)


def test_the_nodes_pod_cidrs_reach_the_kernel_whenever_they_come() -> None:
    maps = fake.FakeMaps(serving.SIZES)
    local = local_node.LocalNode(settings(detect_local_mode=Modes.NODE_CIDR), maps, lambda: 0.0)
    local.found((ETH0,), 7)
    for pod_cidrs in ((), ("10.244.3.0/24",), ("10.244.4.0/24",)):
        local.write(node(*pod_cidrs), settled=True)
        row = tables.settings(maps.row(tables.Table.SETTINGS, tables.row_key(0)) or b"")
        assert bool(row.flags & tables.Setting.PODS_BY_IPV4) is bool(pod_cidrs)
        assert row.pods4_addr == (ip(pod_cidrs[0].split("/")[0]) if pod_cidrs else tables.NO_ADDRESS)


def test_node_port_addresses_that_match_none_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    given = settings(nodeport_addresses=networks("203.0.113.0/24"))
    local = local_node.LocalNode(given, fake.FakeMaps(serving.SIZES), lambda: 0.0)
    local.found((ETH0,), 7)
    local.write(None, settled=True)
    line = (
        "--nodeport-addresses 203.0.113.0/24: no IPv4 address of this node is in these: "
        "its NodePorts are not served"
    )
    assert (caplog.messages, local.reasons, local.unserved) == ([line], [line], [])
    local.found((ETH0, ip("203.0.113.1")), 7)
    local.write(None, settled=True)
    assert not local.reasons
