"""What the agent makes of changes of its own Node (NODE-6, NODE-7, DS-4)."""

import asyncio
import ipaddress
import logging
import pathlib
from typing import Any

import pytest

from lbproxy import errors, node_watch
from lbproxy.config import config
from lbproxy.core import addresses, events, model
from tests import virtual_time
from tests.unit import test_controller

NODE_CIDR = config.DetectLocalMode.NODE_CIDR


def node(*pod_cidrs: str, ips: tuple[str, ...] = ("192.0.2.1",), name: str = "node-a") -> events.Upsert:
    packed = tuple(address for ip in ips if (address := addresses.parse(ip)))
    value = model.Node(name, packed, "zone-a", pod_cidrs, True)
    return events.Upsert(events.Kind.NODE, events.ObjectName("", name), value)


def watch(*, both_families: bool = True, **settings: Any) -> node_watch.NodeWatch:
    return node_watch.NodeWatch(config.Config(node_name="node-a", **settings), both_families=both_families)


async def ends(watched: node_watch.NodeWatch, *happened: events.Event) -> None:
    """Let each event happen after the other, then wait."""
    task = asyncio.create_task(watched.run())
    for event in happened:
        watched.take([event])
        await asyncio.sleep(1)
    await task


@test_controller.in_virtual_time
async def test_other_modes_need_no_pod_cidrs() -> None:
    await ends(watch(), node())


@test_controller.in_virtual_time
async def test_pod_cidrs_are_waited_for_and_a_change_of_them_ends_the_agent() -> None:
    watched = watch(detect_local_mode=NODE_CIDR)
    with pytest.raises(errors.AgentError, match=r"from 10.1.0.0/24 to 10.2.0.0/24") as caught:
        await ends(watched, node(), node("10.1.0.0/24"), node("10.1.0.0/24"), node("10.2.0.0/24"))
    assert caught.value.exit_status == 1


@test_controller.in_virtual_time
async def test_without_pod_cidrs_the_agent_ends_after_five_minutes() -> None:
    for happened in ((), (node(),)):
        started_s = asyncio.get_running_loop().time()
        with pytest.raises(errors.AgentError, match="has had no podCIDRs for 300 s"):
            await ends(watch(detect_local_mode=NODE_CIDR), *happened)
        assert asyncio.get_running_loop().time() - started_s == pytest.approx(300, abs=1)


@test_controller.in_virtual_time
async def test_another_node_does_not_matter() -> None:
    with pytest.raises(errors.AgentError, match="no podCIDRs"):
        await ends(watch(detect_local_mode=NODE_CIDR), node(), node("10.1.0.0/24", name="node-b"))


@pytest.mark.parametrize(
    ("cidrs", "fits"),
    [((), True), (("10.0.0.0/8",), True), (("fd00::/64",), False), (("fd00::/64", "10.0.0.0/8"), True)],
)
def test_a_cluster_cidr_of_the_other_family_alone_is_fatal_on_a_single_stack_host(
    cidrs: tuple[str, ...], fits: bool
) -> None:
    networks = tuple(map(ipaddress.ip_network, cidrs))
    if fits:
        asyncio.run(ends(watch(both_families=False, cluster_cidrs=networks), node()))
    else:
        with pytest.raises(errors.AgentError, match="clusterCIDR has no IPv4 CIDR"):
            asyncio.run(ends(watch(both_families=False, cluster_cidrs=networks), node()))
        asyncio.run(ends(watch(both_families=True, cluster_cidrs=networks), node()))


@test_controller.in_virtual_time
async def test_pod_cidrs_of_the_other_family_alone_are_fatal_too() -> None:
    with pytest.raises(errors.AgentError, match="podCIDRs has no IPv4 CIDR"):
        await ends(watch(both_families=False, detect_local_mode=NODE_CIDR), node("fd00::/64"))


@test_controller.in_virtual_time
async def test_a_bind_address_decides_the_family() -> None:
    bind = ipaddress.ip_address("2001:db8::1")
    networks = (ipaddress.ip_network("fd00::/64"),)
    await ends(watch(both_families=False, bind_address=bind, cluster_cidrs=networks), node())


def test_changed_addresses_and_a_deletion_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    watched = watch()
    watched.take([node(), node(), node(ips=("192.0.2.9",)), node(ips=("192.0.2.9",))])
    watched.take([events.Delete(events.Kind.NODE, events.ObjectName("", "node-a"))])
    assert [record.message for record in caplog.records] == [
        "the addresses of Node node-a have changed from 192.0.2.1 to 192.0.2.9",
        "Node node-a was deleted: going on with what was known of it",
    ]


def test_a_node_that_does_not_exist_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    synced = events.Synced(events.Kind.NODE)
    watched = watch()
    watched.take([synced, synced])
    assert [record.message for record in caplog.records] == ['no Node is called "node-a": see --node-name']
    caplog.clear()
    watched = watch()
    watched.take([node(), synced])
    # Manifests need not have a Node.
    watch(manifests=pathlib.Path("/m")).take([synced])
    assert not caplog.records


@pytest.mark.parametrize(
    ("cidrs", "ips", "says"),
    [
        ((), ("192.0.2.1",), "ClusterCIDR mode, but no --cluster-cidr"),
        (("10.0.0.0/8",), ("192.0.2.1", "2001:db8::1"), "clusterCIDR has no IPv6 CIDR: IPv6 pods can not"),
        (("10.0.0.0/8",), ("192.0.2.1",), ""),
        (("10.0.0.0/8", "fd00::/64"), ("192.0.2.1", "2001:db8::1"), ""),
    ],
)
def test_pods_that_nothing_tells_are_warned_of(
    cidrs: tuple[str, ...], ips: tuple[str, ...], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    virtual_time.run(
        lambda: ends(watch(cluster_cidrs=tuple(map(ipaddress.ip_network, cidrs))), node(ips=ips))
    )
    told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == bool(says)
    assert all(line.startswith(says) for line in told)


def test_ipv6_is_there_unless_it_is_missing_or_switched_off(tmp_path: pathlib.Path) -> None:
    assert not node_watch.has_both_families(tmp_path)
    switch = tmp_path / "sys/net/ipv6/conf/all/disable_ipv6"
    switch.parent.mkdir(parents=True)
    (tmp_path / "net").mkdir()
    (tmp_path / "net/if_inet6").touch()
    switch.write_text("0\n")
    assert node_watch.has_both_families(tmp_path)
    switch.write_text("1\n")
    assert not node_watch.has_both_families(tmp_path)
