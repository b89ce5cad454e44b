"""Judges who else balances on this node: kube-proxy, Cilium, Calico, another lbproxy, unknown programs."""

from collections.abc import Iterator, Sequence

from lbproxy.core import ipvs, leftovers
from lbproxy.core.preflight import facts, findings, owners
from lbproxy.core.preflight.network import named

_KUBE_PROXY = "kube-proxy"
_CILIUM = "cilium-agent"


def judge(known: facts.Facts) -> Iterator[findings.Finding]:
    """Say what is to be said of them."""
    others = known.others
    yield _kube_proxy(others, processes_seen=known.process.host_processes)
    if others.ipvs_mode is not None:
        yield _ipvs_mode(others.ipvs_mode)
    yield from _agents(others)
    if others.hooks_problem:
        yield findings.warning("cgroup hooks", others.hooks_problem, "run this as root")
    elif not others.hooks:
        yield findings.ok("cgroup hooks", f"no other programs at {known.cgroup.path}")
    for group in _grouped(others.hooks):
        yield _hook(group, known.cgroup.path)
    for one in others.datapaths:
        yield _datapath(one)


def _kube_proxy(others: facts.Others, *, processes_seen: bool) -> findings.Finding:
    running = [one for one in others.processes if one.command == _KUBE_PROXY]
    rules = ", ".join(others.leftovers)
    stays = (
        f". Then {leftovers.stays(others.without_tool)}: {leftovers.BY_HAND}" if others.without_tool else ""
    )
    if running:
        return findings.warning(
            _KUBE_PROXY,
            f"runs (pid {', '.join(str(one.pid) for one in running)})" + (f": {rules}" if rules else ""),
            "it may stay: its rules see what lbproxy leaves alone, and what it has begun goes on. To replace "
            f"it, once lbproxy serves: {leftovers.HOW_TO_STOP}. Where it is no DaemonSet: stop it, then "
            f"lbproxy migrate take-over{stays}",
        )
    if rules:
        return findings.warning(
            _KUBE_PROXY,
            f"does not run here, but its rules are in force: {rules}",
            f"once lbproxy serves: lbproxy migrate take-over{stays}",
        )
    running_at_all = "does not run here" if processes_seen else "is not seen"
    if others.unseen:
        return findings.warning(
            _KUBE_PROXY,
            f"{running_at_all}; rules that it may have left in {' and '.join(others.unseen)} could not be "
            "looked for",
            "run this as root, or with CAP_NET_ADMIN",
        )
    return findings.ok(_KUBE_PROXY, f"{running_at_all}, and has left no rules")


def _ipvs_mode(found: ipvs.Found) -> findings.Finding:
    check, how = "kube-proxy's IPVS mode", ipvs.described(found)
    if not found.in_use:
        return findings.warning(check, how, f"where kube-proxy still runs in that mode, {ipvs.FIRST}")
    return findings.warning(
        check,
        f"{how}. lbproxy leaves that alone, and it breaks when the virtual servers are removed",
        f"{ipvs.FIRST}. Until then lbproxy migrate take-over refuses",
    )


def _agents(others: facts.Others) -> Iterator[findings.Finding]:
    pids = [str(one.pid) for one in others.processes if one.command == _CILIUM]
    if pids and not any(one.owner == owners.CILIUM for one in others.hooks):
        yield findings.warning(
            "Cilium",
            f"runs (pid {', '.join(pids)}), without programs at the hooks of sockets",
            "leave its kube-proxy replacement and socket load balancer off",
        )


def _grouped(programs: Sequence[facts.Program]) -> list[list[facts.Program]]:
    """Those of one owner in one place; unknown ones by their name."""
    groups: dict[tuple[str, ...], list[facts.Program]] = {}
    for one in programs:
        whose = one.owner or one.name
        groups.setdefault((whose, one.place, str(one.alone), str(one.yields)), []).append(one)
    return list(groups.values())


def _hook(group: Sequence[facts.Program], cgroup: str) -> findings.Finding:
    one = group[0]
    name = one.name or f"program {one.id}"
    check = f"cgroup hooks: {one.owner or name}"
    hooks = named([each.hook for each in group])
    where = f"at {hooks} of {one.place}"
    if one.alone:
        return findings.blocks(
            check,
            f"{where}, attached so that no other program may be: lbproxy's would be refused",
            "attach it with BPF_F_ALLOW_MULTI or through a link",
        )
    if one.owner == owners.LBPROXY:
        return findings.blocks(
            check,
            f"another lbproxy's programs {where}: both would balance the same sockets",
            "stop that one and remove it with lbproxy cleanup --bpffs PATH",
        )
    if one.owner in (owners.CILIUM, owners.CALICO):
        off = (
            "kubeProxyReplacement: false and socketLB.enabled: false"
            if one.owner == owners.CILIUM
            else "linuxDataplane: Iptables or Nftables, which takes its bpfConnectTimeLoadBalancing away"
        )
        return findings.blocks(
            check, f"its socket load balancer is {where}: both would translate", f"switch it off ({off})"
        )
    if one.yields:
        return findings.warning(
            check,
            f"{where}, attached with BPF_F_ALLOW_OVERRIDE: it would not run any more for {cgroup}",
            "attach it with BPF_F_ALLOW_MULTI or through a link",
        )
    return findings.warning(
        check,
        f"{where}: it runs beside lbproxy's",
        "nothing, unless it changes the addresses of services too, or refuses them: what one has changed "
        "the next one sees",
    )


def _datapath(one: facts.OtherDatapath) -> findings.Finding:
    check = f"lbproxy at {one.path}"
    state = "an agent runs" if one.running else "no agent runs"
    if one.running and one.pid:
        state += f" (pid {one.pid})"
    if one.same_cgroup:
        return findings.blocks(
            check,
            f"another lbproxy serves {one.cgroup}; {state}",
            f"stop it, then lbproxy cleanup --bpffs {one.path}; or take it over with --bpffs {one.path}",
        )
    return findings.ok(check, f"another lbproxy, for the cgroup {one.cgroup}; {state}")
