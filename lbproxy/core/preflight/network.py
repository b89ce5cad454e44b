"""Judges the devices that the packet path would use, what is on them, and the kernel's network settings."""

import typing
from collections.abc import Iterator, Sequence

from lbproxy.core import devices, wording
from lbproxy.core.preflight import facts, findings, owners

_FEW = 6  # devices that are named
_FEW_PORTS = 1000
_TCX: typing.Final = "tcx"


def judge(known: facts.Facts) -> Iterator[findings.Finding]:
    """Say what is to be said of them."""
    if known.wanted.packet_path:
        yield from _devices(known)
    else:
        yield findings.ok("devices", "none is used: --packet-path=false")
    yield from _settings(known)


def _devices(known: facts.Facts) -> Iterator[findings.Finding]:
    network = known.network
    if network.problem:
        yield findings.warning("devices", network.problem, "run this with the rights of the agent")
        return
    uplinks = [one.name for one in network.devices if one.role is devices.Role.UPLINK]
    others = [one.name for one in network.devices if one.role is not devices.Role.UPLINK]
    for name in network.missing:
        yield findings.warning(
            f"device {name}",
            "named with --device, and not there",
            f"there are {named(network.names)}",
        )
    if uplinks:
        yield findings.ok(
            "devices",
            f"clients outside come in at {named(uplinks)}"
            + (f"; answers and pods at {named(others)}" if others else ""),
        )
    elif not network.missing:
        yield findings.warning(
            "devices",
            "no uplink: no device has a default route or an address of this node",
            f"name it with --device; there are {named(network.names)}",
        )
    for group in _grouped(network.programs):
        yield _program(group, known.wanted)


def _grouped(programs: Sequence[facts.Program]) -> list[list[facts.Program]]:
    """Those that differ in their device only: a CNI has one on that of each pod."""
    groups: dict[tuple[str, str, str], list[facts.Program]] = {}
    for one in programs:
        groups.setdefault((one.hook, one.name, one.owner), []).append(one)
    return list(groups.values())


def _program(group: Sequence[facts.Program], wanted: facts.Wanted) -> findings.Finding:
    one = group[0]
    check = f"{one.hook}: {one.name or f'program {one.id}'}"
    places = f"on {named([each.place for each in group])}"
    if one.owner == owners.LBPROXY:
        return findings.blocks(
            check,
            f"another lbproxy's, {places}",
            "stop that one and remove it with lbproxy cleanup --bpffs PATH",
        )
    if one.owner == owners.CALICO:
        return findings.blocks(
            check,
            f"{one.owner}'s, {places}: it takes kube-proxy's place itself",
            "switch it to another dataplane (linuxDataplane: Iptables or Nftables), or stay with it",
        )
    whose = f"{one.owner}'s" if one.owner else "somebody's"
    if one.owner == owners.CILIUM:
        return findings.warning(
            check,
            f"{whose}, {places}: Cilium balances what pods send to a ClusterIP itself",
            "see docs/preflight.md: lbproxy beside Cilium is not tried",
        )
    if one.hook == "XDP":
        todo = "take care that it passes on what is for services"
        if wanted.xdp:
            todo += "; a device takes one XDP program, so lbproxy would do it in tc alone"
        return findings.warning(check, f"{whose}, {places}: it has packets before lbproxy", todo)
    if one.hook.startswith(_TCX):
        return findings.warning(
            check,
            f"{whose}, {places}: it runs before lbproxy's, which sees only what it answers with TCX_NEXT",
            "have it end with TCX_NEXT, attach it after lbproxy, or leave this device out with --device",
        )
    return findings.warning(
        check,
        f"{whose}, {places}: it runs after lbproxy's, and sees backends' addresses in the place of services'",
        "take care that it expects none of services",
    )


def named(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return wording.few(names, _FEW) or "none"


def _settings(known: facts.Facts) -> Iterator[findings.Finding]:
    network, wanted = known.network, known.wanted
    if network.has_ipv4 and network.ip_forward is False:
        yield findings.warning(
            "net.ipv4.ip_forward", "0: packets to pods are not forwarded", "sysctl net.ipv4.ip_forward=1"
        )
    elif network.ip_forward:
        yield findings.ok("net.ipv4.ip_forward", "1")
    if network.has_ipv6 and network.ipv6_forwarding is False:
        yield findings.warning(
            "net.ipv6.conf.all.forwarding",
            "0: IPv6 packets to pods are not forwarded",
            "sysctl net.ipv6.conf.all.forwarding=1, if the cluster has IPv6",
        )
    uplinks = sum(1 for one in network.devices if one.role is devices.Role.UPLINK)
    if network.strict and uplinks > 1:
        yield findings.warning(
            "rp_filter",
            f"strict on {named(network.strict)}, of {uplinks} uplinks: packets that come in at one and would "
            "be answered by another are dropped",
            "sysctl net.ipv4.conf.DEVICE.rp_filter=2, if clients may come that way",
        )
    elif network.strict:
        yield findings.ok("rp_filter", f"strict on {named(network.strict)}: answers leave as packets come in")
    else:
        yield findings.ok("rp_filter", "not strict")
    if network.route_localnet:
        yield findings.ok(
            "route_localnet",
            "1, as kube-proxy sets it: lbproxy does without",
            "once kube-proxy is gone: sysctl net.ipv4.conf.all.route_localnet=0",
        )
    if wanted.packet_path and wanted.masquerade_ports < _FEW_PORTS:
        yield findings.warning(
            "masquerading",
            f"{wanted.masquerade_ports} ports: that many flows at once to each backend",
            "a smaller net.ipv4.ip_local_port_range, or --masquerade-ports",
        )
    elif wanted.packet_path:
        yield findings.ok("masquerading", f"{wanted.masquerade_ports} ports for flows to each backend")
