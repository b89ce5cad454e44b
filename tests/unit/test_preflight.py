"""What `lbproxy preflight` says of a node, by what is known of it."""

import dataclasses
import typing

import pytest

from lbproxy import errors
from lbproxy.core import devices, ipvs
from lbproxy.core.preflight import facts, owners, verdict
from lbproxy.core.preflight.findings import Level

UPLINK = facts.Device("eth0", devices.Role.UPLINK)
NODE = facts.NodeObject(frozenset({4}), ("10.244.0.0/24",))
# Nothing stands in the way of lbproxy here.
FIT = facts.Facts(
    kernel=facts.Kernel(features=(facts.Feature("links to cgroups", "5.7", True),)),
    listeners=(facts.Listener("healthz", "--healthz-bind-address", "0.0.0.0:10256"),),
    cluster=facts.Cluster(node=NODE),
)
ALL_CAPABILITIES = FIT.process.capabilities


def but(**parts: dict[str, typing.Any]) -> facts.Facts:
    """A node that is fit, but for some fields of some parts."""
    return dataclasses.replace(
        FIT, **{part: dataclasses.replace(getattr(FIT, part), **fields) for part, fields in parts.items()}
    )


def hooked(**fields: typing.Any) -> facts.Facts:
    program = facts.Program("connect4", "theirs", 7, "", "/sys/fs/cgroup")
    return but(others={"hooks": (program._replace(**fields),)})


def on_device(**fields: typing.Any) -> facts.Facts:
    program = facts.Program("tcx ingress", "theirs", 7, "", "eth0")
    return but(network={"programs": (program._replace(**fields),)})


def other_datapath(*, same_cgroup: bool) -> facts.Facts:
    other = facts.OtherDatapath("/bpf/other", True, 41, "/sys/fs/cgroup/x", same_cgroup)
    return but(others={"datapaths": (other,)})


def taken(command: str, *, hard_fail: bool = False) -> facts.Facts:
    listener = FIT.listeners[0]._replace(taken=True, pid=9 if command else None, command=command)
    return dataclasses.replace(but(wanted={"hard_fail": hard_fail}), listeners=(listener,))


def without(*names: str) -> dict[str, typing.Any]:
    return {"capabilities": ALL_CAPABILITIES - set(names)}


def test_a_node_that_lacks_nothing_is_fit() -> None:
    report = verdict.judge(FIT)
    assert [one for one in report.findings if one.level is not Level.OK] == []
    assert (report.fit, report.exit_status, report.warnings, report.blocks) == (True, 0, 0, 0)


class Case(typing.NamedTuple):
    """A node, the check that is to speak up and how, words of what was found and of what to do."""

    known: facts.Facts
    check: str
    level: Level
    found: str
    todo: str


OK, WARNING, BLOCKS = Level.OK, Level.WARNING, Level.BLOCKS
OTHER_USERS = but(process={"own_users": True})
HALF = but(process=without("CAP_SYS_ADMIN", "CAP_BPF"))
FEWER = but(process=without("CAP_SYS_ADMIN", "CAP_PERFMON"))
NO_MOUNTING = but(process=without("CAP_SYS_ADMIN"), bpffs={"mounted": False})
REFUSES_PACKETS = but(programs={"refused": (facts.Refusal("tc_open", "R1 !read_ok", True),)})
REFUSES = but(
    programs={"refused": (facts.Refusal("tc_open", "x", True), facts.Refusal("connect4", "why", False))}
)
NOT_KEPT = {"kept": False, "loaded": 0}
PROXY = facts.Running("kube-proxy", 12)
RULES = ("iptables-nft chains",)
IN_POD = {"in_pod": True, "url": "https://10.96.0.1:443"}
MIB = 1 << 20

CASES = {
    # rights and namespaces
    "users": Case(OTHER_USERS, "capabilities", BLOCKS, "user namespace", "hostUsers"),
    "no rights": Case(HALF, "capabilities", BLOCKS, "lacks CAP_BPF", "run as root"),
    "fewer rights": Case(FEWER, "capabilities", WARNING, "lacks CAP_PERFMON and CAP_SYS_ADMIN", "UDP"),
    "pids": Case(but(process={"host_processes": False}), "namespaces", WARNING, "not seen", "hostPID"),
    "network": Case(but(process={"host_network": False}), "namespaces", WARNING, "not the node's", "hostNet"),
    "network?": Case(but(process={"host_network": None}), "namespaces", OK, "not told", ""),
    # kernel
    "feature": Case(
        but(kernel={"features": (facts.Feature("links to cgroups", "5.7", False),)}),
        "kernel: links to cgroups",
        BLOCKS,
        "exists since Linux 5.7",
        "Linux 6.6",
    ),
    "feature?": Case(
        but(kernel={"features": (facts.Feature("links to cgroups", "5.7", None),)}),
        "kernel features",
        WARNING,
        "1 could not be asked",
        "rights",
    ),
    "tcx": Case(
        but(kernel={"tcx": False}),
        "kernel: TCX, for packets from outside",
        WARNING,
        "since Linux 6.6",
        "keep kube-proxy",
    ),
    "tcx, unused": Case(
        but(kernel={"tcx": False}, wanted={"packet_path": False}),
        "kernel: TCX, for packets from outside",
        OK,
        "not needed",
        "",
    ),
    "jit": Case(but(kernel={"jit": False}), "kernel: BPF JIT", WARNING, "interpreted", "bpf_jit_enable"),
    # programs
    "refused": Case(REFUSES, "programs", BLOCKS, "refuses connect4: why", "newer"),
    "packets refused": Case(REFUSES_PACKETS, "programs", WARNING, "refuses tc_open: R1 !read_ok", "newer"),
    "no compiler": Case(
        but(programs={**NOT_KEPT, "lacks": ("libbcc",)}), "programs", BLOCKS, "no libbcc", "python3-bpfcc"
    ),
    "compiler": Case(but(programs=NOT_KEPT), "programs", OK, "to be compiled", ""),
    "adopted": Case(
        but(programs={**NOT_KEPT, "adopted": True, "lacks": ("x",)}), "programs", OK, "adopted", ""
    ),
    # cgroup, bpffs, memory, ports
    "no cgroup": Case(but(cgroup={"problem": "not mounted"}), "cgroup v2", BLOCKS, "not mounted", "mount -t"),
    "a container's": Case(
        but(cgroup={"is_root": False}), "cgroup v2", BLOCKS, "container's part", "hostPath"
    ),
    "a child": Case(
        but(cgroup={"is_root": False}, wanted={"cgroup_named": True}),
        "cgroup v2",
        OK,
        "only the processes",
        "",
    ),
    "hybrid": Case(but(cgroup={"hybrid": True}), "cgroup v2", OK, "does not matter", ""),
    "bpffs": Case(but(bpffs={"mounted": False}), "bpffs", OK, "first start mounts one", ""),
    "bpffs in a container": Case(
        but(bpffs={"mounted": False}, process={"container": True}),
        "bpffs",
        WARNING,
        "end with it",
        "hostPath",
    ),
    "bpffs without rights": Case(NO_MOUNTING, "bpffs", BLOCKS, "needs CAP_SYS_ADMIN", "--init-only"),
    "bad bpffs": Case(but(bpffs={"problem": "no folder"}), "bpffs", BLOCKS, "no folder", "--bpffs"),
    "agent": Case(
        but(bpffs={"version": "0.1", "agent_running": True, "agent_pid": 5}),
        "lbproxy here",
        BLOCKS,
        "(pid 5) runs",
        "lbproxy status",
    ),
    "earlier": Case(but(bpffs={"version": "0.1"}), "lbproxy here", OK, "takes it over", ""),
    "memory": Case(
        but(memory={"available": 99 * MIB}), "memory", BLOCKS, "the node has 99 MiB", "--map-rows"
    ),
    "limit": Case(but(memory={"limit": 99 * MIB}), "memory", BLOCKS, "leaves 99 MiB", "--map-rows"),
    "compiler's": Case(
        but(memory={"available": 140 * MIB, "compiler": 250 * MIB}), "memory", BLOCKS, "250 MiB more", "give"
    ),
    "memory?": Case(but(memory={"available": None}), "memory", WARNING, "could not be found", "free -m"),
    "files": Case(but(process={"open_files": 256}), "open files", WARNING, "256", "ulimit"),
    "port": Case(taken("nginx"), "port: healthz", WARNING, "by nginx (pid 9)", "--healthz-bind-address"),
    "kube-proxy's port": Case(taken("kube-proxy"), "port: healthz", WARNING, "by kube-proxy", "is gone"),
    "somebody's port": Case(taken(""), "port: healthz", WARNING, "by another process", "another address"),
    "hard": Case(taken("x", hard_fail=True), "port: healthz", BLOCKS, "agent would end", "--healthz"),
    "note": Case(but(wanted={"notes": ("a: unknown field",)}), "configuration", WARNING, "unknown", "docs"),
    # devices
    "no uplink": Case(but(network={"devices": ()}), "devices", WARNING, "no uplink", "there are lo, eth0"),
    "no device": Case(but(network={"missing": ("eth9",)}), "device eth9", WARNING, "not there", "eth0"),
    "unused devices": Case(but(wanted={"packet_path": False}), "devices", OK, "none is used", ""),
    "unseen devices": Case(but(network={"problem": "EPERM"}), "devices", WARNING, "EPERM", "rights"),
    "tcx program": Case(on_device(), "tcx ingress: theirs", WARNING, "on eth0: it runs before", "TCX_NEXT"),
    "nameless": Case(on_device(name=""), "tcx ingress: program 7", WARNING, "somebody's", "TCX_NEXT"),
    "tc program": Case(on_device(hook="tc egress"), "tc egress: theirs", WARNING, "runs after", "none of"),
    "xdp program": Case(on_device(hook="XDP"), "XDP: theirs", WARNING, "before lbproxy", "passes on"),
    "cilium's": Case(on_device(owner=owners.CILIUM), "tcx ingress: theirs", WARNING, "Cilium's", "preflight"),
    "calico's": Case(on_device(owner=owners.CALICO), "tcx ingress: theirs", BLOCKS, "Calico", "linuxData"),
    "lbproxy's": Case(on_device(owner=owners.LBPROXY), "tcx ingress: theirs", BLOCKS, "another", "cleanup"),
    # settings
    "forward": Case(but(network={"ip_forward": False}), "net.ipv4.ip_forward", WARNING, "0", "sysctl"),
    "forward6": Case(
        but(network={"ipv6_forwarding": False, "has_ipv6": True}),
        "net.ipv6.conf.all.forwarding",
        WARNING,
        "0",
        "if the cluster has IPv6",
    ),
    "strict": Case(but(network={"strict": ("eth0",)}), "rp_filter", OK, "strict on eth0", ""),
    "strict, two ways": Case(
        but(network={"strict": ("eth0",), "devices": (UPLINK, facts.Device("eth1", devices.Role.UPLINK))}),
        "rp_filter",
        WARNING,
        "of 2 uplinks",
        "rp_filter=2",
    ),
    "localnet": Case(but(network={"route_localnet": True}), "route_localnet", OK, "does without", "=0"),
    "ports": Case(but(wanted={"masquerade_ports": 10}), "masquerading", WARNING, "10 ports", "--masq"),
    # others
    "kube-proxy": Case(but(others={"processes": (PROXY,)}), "kube-proxy", WARNING, "pid 12", "--node NODE"),
    "kube-proxy's rules": Case(
        but(others={"leftovers": RULES}), "kube-proxy", WARNING, "in force: iptables-nft", "migrate take-over"
    ),
    "both": Case(
        but(others={"processes": (PROXY,), "leftovers": RULES}),
        "kube-proxy",
        WARNING,
        "(pid 12): iptables-nft chains",
        "DaemonSet",
    ),
    "rules of old": Case(
        but(others={"leftovers": RULES, "without_tool": ("iptables-legacy", "ip6tables-legacy")}),
        "kube-proxy",
        WARNING,
        "its rules are in force",
        "iptables-legacy-restore and ip6tables-legacy-restore can not be found here: reboot the node, or",
    ),
    "unseen rules": Case(
        but(others={"unseen": ("iptables", "nftables")}),
        "kube-proxy",
        WARNING,
        "does not run here; rules that it may have left in iptables and nftables",
        "CAP_NET_ADMIN",
    ),
    "IPVS mode": Case(
        but(others={"ipvs_mode": ipvs.Found(12, {"TCP": 3})}),
        "kube-proxy's IPVS mode",
        WARNING,
        "12 virtual servers; going on through them: 3 TCP. lbproxy leaves that alone, and it breaks when",
        "mode: iptables",
    ),
    "IPVS mode, idle": Case(
        but(others={"ipvs_mode": ipvs.Found(12)}),
        "kube-proxy's IPVS mode",
        WARNING,
        "12 virtual servers; going on through them: none",
        "where kube-proxy still runs in that mode, have kube-proxy run in iptables mode",
    ),
    "IPVS mode, unseen": Case(
        but(others={"ipvs_mode": ipvs.Found(problem="Operation not permitted")}),
        "kube-proxy's IPVS mode",
        WARNING,
        "could not be asked for: Operation not permitted",
        "drain this node",
    ),
    "cilium": Case(
        but(others={"processes": (facts.Running("cilium-agent", 3),)}), "Cilium", WARNING, "pid 3", "off"
    ),
    "hook": Case(hooked(), "cgroup hooks: theirs", WARNING, "runs beside", "addresses of services"),
    "only one": Case(hooked(alone=True), "cgroup hooks: theirs", BLOCKS, "refused", "ALLOW_MULTI"),
    "yields": Case(hooked(yields=True), "cgroup hooks: theirs", WARNING, "not run any more", "ALLOW_MULTI"),
    "cilium's hook": Case(
        hooked(owner=owners.CILIUM), "cgroup hooks: Cilium", BLOCKS, "socket load balancer", "socketLB"
    ),
    "calico's hook": Case(
        hooked(owner=owners.CALICO), "cgroup hooks: Calico eBPF", BLOCKS, "at connect4 of", "linuxDataplane"
    ),
    "second lbproxy": Case(
        hooked(owner=owners.LBPROXY), "cgroup hooks: lbproxy", BLOCKS, "same sockets", "cleanup --bpffs"
    ),
    "hooks?": Case(but(others={"hooks_problem": "EPERM"}), "cgroup hooks", WARNING, "EPERM", "root"),
    "its pins": Case(
        other_datapath(same_cgroup=True),
        "lbproxy at /bpf/other",
        BLOCKS,
        "(pid 41)",
        "cleanup --bpffs /bpf/other",
    ),
    "elsewhere": Case(other_datapath(same_cgroup=False), "lbproxy at /bpf/other", OK, "for the cgroup", ""),
    # cluster
    "no answer": Case(
        but(cluster={"problem": "https://x: connection refused", "node": None}),
        "API server",
        BLOCKS,
        "connection refused",
        "--kubeconfig or --master",
    ),
    "trap": Case(
        but(cluster={**IN_POD, "by_service": True, "servers": ("192.0.2.7:6443",)}),
        "API server",
        BLOCKS,
        "after a reboot",
        "KUBERNETES_SERVICE_HOST",
    ),
    "trap by kubeconfig": Case(
        but(cluster={"by_service": True, "servers": ("192.0.2.7:6443",)}),
        "API server",
        BLOCKS,
        "after a reboot",
        "for example 192.0.2.7:6443",
    ),
    "trap?": Case(
        but(cluster={**IN_POD, "by_service": None}),
        "API server",
        WARNING,
        "environment",
        "KUBERNETES_SERVICE",
    ),
    "rights": Case(but(cluster={"forbidden": ("nodes",)}), "API rights", BLOCKS, "nodes", "list and watch"),
    "no Node": Case(but(cluster={"node": None}), "Node", BLOCKS, "none called node-1", "--node-name"),
    "other Node": Case(
        but(cluster={"node": None, "similar": "ip-1"}), "Node", BLOCKS, "none called", "--node-name ip-1"
    ),
    "manifests": Case(but(wanted={"manifests": "/m"}), "API server", OK, "read from /m", ""),
    # who is a pod
    "no pods": Case(but(wanted={"cluster_cidrs": ()}), "pods", WARNING, "count as outside", "10.244.0.0/24"),
    "one family": Case(
        but(cluster={"node": NODE._replace(pod_cidrs=("10.244.0.0/24", "fd00::/64"))}),
        "pods",
        WARNING,
        "no IPv6",
        "fd00::/64",
    ),
    "node cidr": Case(
        but(wanted={"detect_local": "NodeCIDR"}, cluster={"node": NODE._replace(pod_cidrs=())}),
        "pods",
        WARNING,
        "no podCIDRs",
        "--allocate-node-cidrs",
    ),
    "node cidr, told": Case(but(wanted={"detect_local": "NodeCIDR"}), "pods", OK, "NodeCIDR", ""),
    "no bridge": Case(
        but(wanted={"detect_local": "BridgeInterface", "bridge": "br9"}, network={"bridges": ("cni0",)}),
        "pods",
        WARNING,
        "br9: no such device",
        "cni0",
    ),
    "not a bridge": Case(
        but(wanted={"detect_local": "BridgeInterface", "bridge": "eth0"}),
        "pods",
        WARNING,
        "no bridge",
        "none",
    ),
    "bridge": Case(
        but(
            wanted={"detect_local": "BridgeInterface", "bridge": "cni0"},
            network={"bridges": ("cni0",), "names": ("cni0",)},
        ),
        "pods",
        OK,
        "BridgeInterface",
        "",
    ),
    "no prefix": Case(
        but(wanted={"detect_local": "InterfaceNamePrefix", "prefix": "cali"}),
        "pods",
        WARNING,
        "no device is called cali",
        "eth0",
    ),
    "prefix": Case(
        but(wanted={"detect_local": "InterfaceNamePrefix", "prefix": "et"}), "pods", OK, "told", ""
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_found_and_what_to_do(case: Case) -> None:
    report = verdict.judge(case.known)
    (one,) = [finding for finding in report.findings if finding.check == case.check]
    assert (one.level, case.found in one.found, case.todo in one.todo) == (case.level, True, True), one
    # What stands in the way says what to do, and nothing else on this node speaks up.
    assert bool(one.todo) or one.level is OK
    others = [other for other in report.findings if other is not one and other.level is not OK]
    assert others == [] or case.known in (NO_MOUNTING,)
    assert (report.blocks, report.fit) == (int(one.level is BLOCKS), one.level is not BLOCKS)


def test_a_kernel_that_lacks_something_has_a_status_of_its_own() -> None:
    assert verdict.judge(CASES["feature"].known).exit_status == errors.UnsupportedKernel.exit_status
    assert verdict.judge(CASES["tcx"].known).exit_status == 0
    assert verdict.judge(CASES["trap"].known).exit_status == 1
    both = but(kernel={"features": (facts.Feature("x", "5.7", False),)}, cgroup={"problem": "not mounted"})
    assert verdict.judge(both).exit_status == 3


def test_a_node_without_ipv4_needs_not_forward_it() -> None:
    assert verdict.judge(but(network={"ip_forward": False, "has_ipv4": False})).warnings == 0


def test_one_program_on_many_devices_is_one_finding() -> None:
    programs = tuple(facts.Program("tcx ingress", "theirs", at, "", f"veth{at}") for at in range(9))
    report = verdict.judge(but(network={"programs": programs}))
    (one,) = [finding for finding in report.findings if finding.check.startswith("tcx")]
    assert "veth0, veth1, veth2, veth3, veth4, veth5 and 3 more" in one.found


def test_findings_are_in_the_order_of_looking() -> None:
    checks = [one.check for one in verdict.judge(FIT).findings]
    assert checks[0] == "capabilities"
    assert checks[-1] == "pods"
    assert len(checks) == len(set(checks))


@pytest.mark.parametrize(
    ("name", "maps", "whose"),
    [
        ("cil_sock4_conne", (), owners.CILIUM),
        ("sock4_connect", ("cilium_lb4_serv",), owners.CILIUM),
        ("cali_tc_preambl", (), owners.CALICO),
        ("calico_connect_", (), owners.CALICO),
        ("conntrack_clean", ("cali_v4_ct3",), owners.CALICO),
        ("connect4", ("slots", "frontends", "backends", "sockets"), owners.LBPROXY),
        ("tc_to_any", ("flows", "ticks", "tails"), owners.LBPROXY),
        ("connect4", ("frontends",), ""),
        ("sd_fw_ingress", (), owners.SYSTEMD),
        ("", (), ""),
    ],
)
def test_programs_are_told_by_names_and_maps(name: str, maps: tuple[str, ...], whose: str) -> None:
    assert owners.owner(name, maps) == whose
