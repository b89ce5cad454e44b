"""`lbproxy preflight`: whether this node can run lbproxy, and what to do about what stands in the way.

It only looks: nothing is attached, pinned, mounted or written, and no table of the
legacy iptables is registered by being listed.
"""

import argparse
import asyncio
import dataclasses
import os
import pathlib
import typing
from collections.abc import Iterator

from lbproxy import cgroup2, errors, leftovers, local_node, packet_path
from lbproxy.commands import render
from lbproxy.config import config
from lbproxy.core import addresses, devices, model
from lbproxy.core.preflight import facts, findings, verdict
from lbproxy.kernel import attached, ipvs, links, probes, surroundings

_AGENT_BYTES: typing.Final = 90 << 20  # with 10,000 services, see docs/benchmarks.md
_COMPILER_BYTES: typing.Final = 250 << 20  # two processes, each about 125 MB
_RULES: typing.Final = ("iptables", "nftables")
_MAY_LOAD: typing.Final = frozenset({"CAP_BPF", "CAP_SYS_ADMIN"})


def main(args: argparse.Namespace) -> int:
    """Look at this node for an agent of `args.config`, print what was found; returns the exit status."""
    report = verdict.judge(gather(args.config))
    render.show(report, args.output, lambda: _present(report))
    return report.exit_status


def gather(settings: config.Config) -> facts.Facts:
    """Look at everything, changing nothing."""
    process = surroundings.process()
    allowed = bool(process.capabilities & _MAY_LOAD) and not process.own_users
    sizes = dataclasses.asdict(settings.map_rows)
    found_cgroup = surroundings.cgroup(settings.cgroup)
    adopted = surroundings.is_adopted(settings.bpffs)
    # Without a trial first: it takes the memory of the maps for a moment.
    programs = probes.programs_of(sizes, adopted=adopted, trial=False)
    compiler = 0 if programs.adopted or programs.kept else _COMPILER_BYTES
    memory = surroundings.memory(probes.map_bytes(sizes), _AGENT_BYTES, compiler)
    kernel = probes.kernel(allowed=allowed)
    lacking = any(one.found is False for one in kernel.features)
    if allowed and not adopted and not lacking and _is_enough(memory):
        programs = probes.programs_of(sizes, adopted=adopted, trial=True)
    cluster, known = _cluster(settings)
    own = attached.own_programs(settings.bpffs)
    return facts.Facts(
        wanted=_wanted(settings),
        kernel=kernel,
        programs=programs,
        process=process,
        cgroup=found_cgroup,
        bpffs=surroundings.pins(settings.bpffs),
        network=_network(settings, known, own),
        listeners=tuple(_listeners(settings)),
        others=_others(settings, found_cgroup, own, process),
        memory=memory,
        cluster=cluster,
    )


def _is_enough(memory: facts.Memory) -> bool:
    rooms = [one for one in (memory.available, memory.limit) if one is not None]
    return all(one > memory.maps + memory.agent for one in rooms)


def _wanted(settings: config.Config) -> facts.Wanted:
    return facts.Wanted(
        node_name=settings.node_name,
        packet_path=settings.packet_path,
        xdp=settings.xdp is not config.Xdp.OFF,
        hard_fail=settings.bind_address_hard_fail,
        cgroup_named=settings.cgroup is not None and settings.cgroup != cgroup2.mount_point(),
        manifests=str(settings.manifests or ""),
        detect_local=settings.detect_local_mode.value,
        cluster_cidrs=tuple(map(str, settings.cluster_cidrs)),
        bridge=settings.bridge_interface,
        prefix=settings.interface_name_prefix,
        masquerade_ports=local_node.packet_rules(settings).ports.size,
        notes=settings.warnings,
    )


def _cluster(settings: config.Config) -> tuple[facts.Cluster, model.Node | None]:
    if settings.manifests is not None:
        return facts.Cluster(node=None), None
    # Not loaded for --manifests, as in the agent.
    from lbproxy.kube import credentials, reach  # noqa: PLC0415

    kubeconfig = str(settings.kubeconfig or "")
    try:
        credentials.check(kubeconfig, settings.master)
    except errors.ConfigError as error:
        return facts.Cluster(url="", problem=str(error), by_service=None, node=None), None
    local = links.every_address()
    return asyncio.run(reach.look(kubeconfig, settings.master, settings.node_name, local))


def _network(settings: config.Config, known: model.Node | None, own: frozenset[int]) -> facts.Network:
    choice = packet_path.choice(settings)
    try:
        found = links.look()
        node_addresses = local_node.identity(settings).addresses(known)
        planned = devices.plan(found.links, found.default_routes, node_addresses, choice)
        programs = attached.at_devices({one.ifindex: one.name for one in planned}, own)
        problem = ""
    except OSError as error:
        return facts.Network(devices=(), problem=f"cannot look at devices: {error.strerror or error}")
    uplinks = [one.name for one in planned if one.role is devices.Role.UPLINK]
    usable = [
        one.packed for link in found.links for one in link.addresses if one.usable and not link.loopback
    ]
    return facts.Network(
        devices=tuple(facts.Device(one.name, one.role) for one in planned),
        missing=tuple(devices.missing(found.links, choice)),
        programs=tuple(programs),
        problem=problem,
        names=tuple(link.name for link in found.links if not link.loopback),
        bridges=tuple(link.name for link in found.links if link.kind == "bridge"),
        strict=tuple(name for name in uplinks if _rp_filter(name) == 1),
        ip_forward=_is_on("ipv4/ip_forward"),
        ipv6_forwarding=_is_on("ipv6/conf/all/forwarding"),
        has_ipv4=any(addresses.family_of(one) is model.Family.IPV4 for one in usable),
        has_ipv6=any(addresses.family_of(one) is model.Family.IPV6 for one in usable),
        route_localnet=bool(_is_on("ipv4/conf/all/route_localnet")),
    )


def _is_on(name: str) -> bool | None:
    value = surroundings.sysctl(name)
    return None if value is None else value != "0"


def _rp_filter(device: str) -> int:
    """The stricter of the two settings counts, and 2 is the looser way of looking."""
    values = (surroundings.sysctl(f"ipv4/conf/{name}/rp_filter") for name in ("all", device))
    return max(int(value) for value in (*values, "0") if value is not None)


def _listeners(settings: config.Config) -> Iterator[facts.Listener]:
    for what, address in (
        ("healthz", settings.healthz_bind_address),
        ("metrics", settings.metrics_bind_address),
    ):
        if address is not None:
            yield surroundings.listener(what, f"--{what}-bind-address", address.host, address.port)


def _others(
    settings: config.Config, cgroup: facts.Cgroup, own: frozenset[int], process: facts.Process
) -> facts.Others:
    hooks: list[facts.Program] = []
    problem = ""
    if not cgroup.problem:
        mount = cgroup2.mount_point() or pathlib.Path(cgroup.path)
        try:
            hooks = attached.at_cgroup(pathlib.Path(cgroup.path), mount, own)
        except OSError as error:
            problem = f"what is attached to {cgroup.path} may not be asked: {os.strerror(error.errno or 0)}"
    rules = leftovers.present()
    return facts.Others(
        processes=tuple(surroundings.neighbours()),
        leftovers=tuple(rules),
        without_tool=tuple(leftovers.without_tool(rules)),
        # The tools fail without it, and then there seems to be nothing.
        ipvs_mode=ipvs.look(),
        unseen=tuple(leftovers.unseen()) if "CAP_NET_ADMIN" in process.capabilities else _RULES,
        hooks=tuple(hooks),
        hooks_problem=problem,
        datapaths=tuple(surroundings.other_datapaths(settings.bpffs, pathlib.Path(cgroup.path))),
    )


_COLORS: typing.Final = {
    findings.Level.OK: render.Color.GOOD,
    findings.Level.WARNING: render.Color.WARNING,
    findings.Level.BLOCKS: render.Color.BAD,
}


def _present(report: findings.Report) -> Iterator[render.Table | str]:
    rows: list[render.Row] = [
        (one.check, render.Cell(one.level.value, _COLORS[one.level]), _text(one)) for one in report.findings
    ]
    yield render.Table(("CHECK", "RESULT", "FOUND → WHAT TO DO"), rows, prose=True)
    yield ""
    yield _verdict(report)


def _text(one: findings.Finding) -> str:
    return f"{one.found} → {one.todo}" if one.todo else one.found


def _verdict(report: findings.Report) -> str:
    warnings = f"{report.warnings} warning{'' if report.warnings == 1 else 's'}"
    if report.exit_status == findings.UNSUPPORTED:
        return f"not fit: this kernel can not run lbproxy; {report.blocks} in the way, {warnings}"
    if not report.fit:
        return f"not fit: {report.blocks} in the way, {warnings}"
    return f"fit to run lbproxy: {warnings}"
