"""`lbproxy preflight` on a node of a lab, with the real things in its way."""

import collections.abc
import contextlib
import errno
import json
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import typing

import pyroute2
import pytest

from lbproxy.kernel import libbpf
from lbproxy.lab import cluster, netns
from tests import polling
from tests.kube import certificates
from tests.lab import agents, manifests
from tests.lab.conftest import LabFactory

CONNECT4 = 10
SERVICE_IP = "10.96.0.1"
CLUSTER = "10.244.0.0/16"
Findings = dict[str, dict[str, typing.Any]]


@pytest.fixture(scope="module")
def lab(build_lab: LabFactory) -> collections.abc.Iterator[cluster.Lab]:
    with build_lab(nodes=1, pods=1, families=(4,)) as built:
        yield built


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    objects = [
        manifests.node("n1", lab["n1"].ipv4),
        manifests.service("kubernetes", 1, cluster_ips=[SERVICE_IP]),
        *manifests.slices("kubernetes", [lab["n1"]]),
    ]
    with agents.Api(lab.netns("n1"), *objects, host="0.0.0.0") as running:
        yield running


class Looked(typing.NamedTuple):
    """The exit status of a look, and its findings by name."""

    status: int
    findings: Findings

    def level(self, check: str) -> str:
        return str(self.findings[check]["level"])

    @property
    def in_the_way(self) -> set[str]:
        return {name for name, one in self.findings.items() if one["level"] == "blocks"}


def look(
    lab: cluster.Lab,
    source: collections.abc.Sequence[str],
    *flags: str,
    cgroup: pathlib.Path | None = None,
    first: collections.abc.Sequence[str] = (),
) -> Looked:
    """Run the command in the node's network namespace; `first` is what runs it."""
    argv = [
        *(*first, *agents.LBPROXY, "preflight", "-o", "json", "--node-name", "n1"),
        *("--cgroup", str(cgroup or lab.cgroup("n1")), "--bpffs", str(lab.workdir / "none" / "bpf")),
        *("--cluster-cidr", CLUSTER, *agents.SMALL_MAPS, *source, *flags),
    ]
    done = subprocess.run(
        lab.command("n1", argv, cgroup=False), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["exit_status"] == done.returncode
    findings = report["findings"]
    assert len({one["check"] for one in findings}) == len(findings)
    return Looked(done.returncode, {one["check"]: one for one in findings})


def in_node(lab: cluster.Lab, *argv: str) -> str:
    return lab.check_output("n1", argv, cgroup=False)


@contextlib.contextmanager
def program(kind: int, name: str, attach_type: int, verdict: int) -> collections.abc.Iterator[int]:
    code = struct.pack("=BBhi", 0xB7, 0, 0, verdict) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    with closing(libbpf.prog_load(kind, name, code, attach_type)) as fd:
        yield fd


@contextlib.contextmanager
def closing(fd: int) -> collections.abc.Iterator[int]:
    assert fd >= 0
    try:
        yield fd
    finally:
        os.close(fd)


def test_a_node_that_nothing_is_in_the_way_of_is_only_looked_at(lab: cluster.Lab, api: agents.Api) -> None:
    def state() -> tuple[str, ...]:
        with closing(os.open(lab.cgroup("n1"), os.O_RDONLY)) as fd:
            hooked = libbpf.attached(fd, CONNECT4)
        seen = [in_node(lab, "cat", "/proc/net/ip_tables_names"), in_node(lab, "tc", "qdisc")]
        seen += [line for line in in_node(lab, "ip", "link").splitlines() if "xdp" in line]
        if shutil.which("nft"):
            seen.append(in_node(lab, "nft", "list", "ruleset"))
        mounts = [
            line for line in in_node(lab, "cat", "/proc/self/mountinfo").splitlines() if lab.run in line
        ]
        return (*seen, *mounts, str(hooked), str(sorted(lab.workdir.rglob("*"))))

    before = state()
    looked = look(lab, api.source)
    assert (looked.status, looked.in_the_way) == (0, set())
    assert looked.level("kernel: TCX, for packets from outside") == "ok"
    assert "clients outside come in at eth0; answers and pods at cni0" in looked.findings["devices"]["found"]
    assert looked.findings["cgroup v2"]["found"].startswith(str(lab.cgroup("n1")))
    assert looked.level("Node") == looked.level("API server") == looked.level("API rights") == "ok"
    assert looked.findings["pods"]["found"] == f"told by {CLUSTER}"
    assert state() == before


def test_programs_of_others_on_a_device(lab: cluster.Lab, api: agents.Api) -> None:
    def attach(stack: contextlib.ExitStack) -> None:
        index = socket.if_nametoindex("eth0")
        tcx = stack.enter_context(program(libbpf.PROG_TYPE_SCHED_CLS, "cil_from_netdev", 0, -1))
        stack.enter_context(closing(libbpf.link_create(tcx, index, libbpf.TCX_INGRESS)))
        xdp = stack.enter_context(program(libbpf.PROG_TYPE_XDP, "shield", libbpf.XDP, 2))
        stack.enter_context(closing(libbpf.link_create(xdp, index, libbpf.XDP, 1 << 1)))
        old = stack.enter_context(program(libbpf.PROG_TYPE_SCHED_CLS, "old_way", 0, -1))
        with pyroute2.IPRoute() as route:
            route.tc("add", "clsact", index)
            route.tc(
                "add-filter", "bpf", index, 1, fd=old, name="old_way", parent="ffff:fff3", classid=1,
                direct_action=True, prio=10, protocol=3,
            )  # fmt: skip

    def detach() -> None:
        with pyroute2.IPRoute() as route:
            route.tc("del", "clsact", socket.if_nametoindex("eth0"))

    with contextlib.ExitStack() as stack:
        netns.inside(lab.netns("n1"), lambda: attach(stack))
        stack.callback(netns.inside, lab.netns("n1"), detach)
        looked = look(lab, api.source, "--xdp", "generic")
        assert looked.status == 0
        assert "Cilium's, on eth0" in looked.findings["tcx ingress: cil_from_netdev"]["found"]
        assert "one XDP program" in looked.findings["XDP: shield"]["todo"]
        assert "runs after lbproxy's" in looked.findings["tc egress: old_way"]["found"]
    gone = polling.eventually(lambda: look(lab, api.source), what="nothing")
    assert gone is not None
    assert not [name for name in gone.findings if name.startswith(("tc", "XDP"))]


def test_programs_of_others_at_the_cgroup(lab: cluster.Lab, api: agents.Api) -> None:
    addr = libbpf.PROG_TYPE_CGROUP_SOCK_ADDR
    cgroup = lab.cgroup("n1/p1")
    with (
        program(addr, "guard", CONNECT4, 1) as guard,
        program(addr, "cil_sock4_connect", CONNECT4, 1) as cilium,
        closing(os.open(cgroup.parent, os.O_RDONLY)) as above,
        closing(os.open(cgroup, os.O_RDONLY)) as here,
        closing(libbpf.link_create(guard, above, CONNECT4)),
        closing(libbpf.link_create(cilium, here, CONNECT4)),
    ):
        looked = look(lab, api.source, cgroup=cgroup)
        assert (looked.status, looked.in_the_way) == (1, {"cgroup hooks: Cilium"})
        assert f"connect4 of {cgroup.parent}" in looked.findings["cgroup hooks: guard"]["found"]
    assert look(lab, api.source, cgroup=cgroup).status == 0


@pytest.mark.parametrize(
    ("flags", "where", "level", "refused"),
    [
        (0, "here", "blocks", True),
        (1, "here", "blocks", True),
        (2, "here", "warning", False),
        (0, "above", "blocks", True),
        (1, "above", "warning", False),
        (2, "above", "warning", False),
    ],
)
def test_what_keeps_others_out_is_what_the_kernel_says(
    lab: cluster.Lab, api: agents.Api, flags: int, where: str, level: str, refused: bool
) -> None:
    cgroup = lab.cgroup("n1/p1")
    with (
        program(libbpf.PROG_TYPE_CGROUP_SOCK_ADDR, "single", CONNECT4, 1) as fd,
        closing(os.open(cgroup if where == "here" else cgroup.parent, os.O_RDONLY)) as place,
        closing(os.open(cgroup, os.O_RDONLY)) as here,
    ):
        assert libbpf.LIB.bpf_prog_attach(fd, place, CONNECT4, flags) == 0
        try:
            assert look(lab, api.source, cgroup=cgroup).level("cgroup hooks: single") == level
            # What lbproxy would do.
            if refused:
                with pytest.raises(OSError, match="attach program") as raised:
                    libbpf.link_create(fd, here, CONNECT4)
                assert raised.value.errno == errno.EPERM
            else:
                os.close(libbpf.link_create(fd, here, CONNECT4))
        finally:
            libbpf.LIB.bpf_prog_detach2(fd, place, CONNECT4)


def test_a_second_lbproxy(lab: cluster.Lab, api: agents.Api) -> None:
    with agents.Agent(lab, api.source, *agents.SMALL_MAPS) as agent:
        looked = look(lab, api.source)
        assert looked.status == 1
        assert looked.in_the_way >= {"cgroup hooks: lbproxy", f"lbproxy at {agent.root}"}
        assert {name for name in looked.in_the_way if name.startswith("tcx")} == {
            "tcx egress: tc_to_any",
            "tcx ingress: tc_from_inside",
            "tcx ingress: tc_from_outside",
        }
        assert agent.process is not None
        assert f"pid {agent.process.pid})" in looked.findings[f"lbproxy at {agent.root}"]["found"]
        assert f"(pid {agent.process.pid})" in looked.findings["port: healthz"]["found"]
        # The programs that it has compiled are shown to the kernel.
        assert "the kernel took all" in looked.findings["programs"]["found"]
        # One that starts nevertheless says so.
        ports = ("--healthz-bind-address", "127.0.0.1:9991", "--metrics-bind-address", "127.0.0.1:9992")
        with agents.Agent(lab, api.source, *agents.SMALL_MAPS, *ports) as second:
            polling.eventually(lambda: "another lbproxy's programs are at" in second.log)
            # Of the first one's log that is too late.
            for one in (agent, second):
                assert "another lbproxy's programs are at connect4, " in one.lbproxy("status")
        assert "another lbproxy" not in agent.lbproxy("status")
        # On its own pins nothing is anybody else's.
        own = look(lab, api.source, "--bpffs", str(agent.root))
        assert (own.status, own.in_the_way) == (1, {"lbproxy here"})
        assert "adopted" in own.findings["programs"]["found"]
        agent.stop()
        assert look(lab, api.source, "--bpffs", str(agent.root)).status == 0


def test_without_the_rights(lab: cluster.Lab, api: agents.Api) -> None:
    looked = look(lab, api.source, first=("setpriv", "--bounding-set=-all,+net_admin,+dac_override"))
    assert looked.status == 1
    assert looked.in_the_way == {"capabilities", "bpffs"}
    assert looked.findings["capabilities"]["found"] == "lacks CAP_BPF"
    # What could not be asked is not lacking.
    assert looked.level("kernel features") == "warning"
    assert "kernel: links to cgroups" not in looked.findings


def test_the_address_of_a_service_is_a_trap(lab: cluster.Lab, api: agents.Api) -> None:
    with address(lab, SERVICE_IP):
        looked = look(lab, ("--master", f"http://{SERVICE_IP}:{agents.API_PORT}"))
    assert (looked.status, looked.in_the_way) == (1, {"API server"})
    assert f"for example {lab['n1'].ipv4}:" in looked.findings["API server"]["todo"]


@contextlib.contextmanager
def address(lab: cluster.Lab, ip: str) -> collections.abc.Iterator[None]:
    in_node(lab, "ip", "address", "add", f"{ip}/32", "dev", "lo")
    try:
        yield
    finally:
        in_node(lab, "ip", "address", "del", f"{ip}/32", "dev", "lo")


def test_what_a_pod_is_told_is_the_same_trap(lab: cluster.Lab, tmp_path: pathlib.Path) -> None:
    """As in the DaemonSet: the environment, the token and the certificates of a service account."""
    authority = certificates.Authority(tmp_path)
    port = agents.API_PORT + 1
    objects = [
        manifests.node("n1", lab["n1"].ipv4),
        manifests.service("kubernetes", 1, cluster_ips=[SERVICE_IP]),
        *manifests.slices("kubernetes", [lab["n1"]]),
    ]
    account = tmp_path / "account"
    account.mkdir()
    shutil.copy(authority.certificate, account / "ca.crt")
    (account / "token").write_text("good")
    # A mount namespace of its own: nobody else sees this /run.
    in_pod = (
        "mount -t tmpfs none /run && mkdir -p /run/secrets/kubernetes.io && "
        'cp -r "$0" /run/secrets/kubernetes.io/serviceaccount && exec "$@"'
    )

    def as_pod(host: str) -> Looked:
        told = (f"KUBERNETES_SERVICE_HOST={host}", f"KUBERNETES_SERVICE_PORT={port}")
        return look(lab, (), first=("env", *told, "unshare", "--mount", "sh", "-c", in_pod, str(account)))

    for host, status in ((SERVICE_IP, 1), (lab["n1"].ipv4, 0)):
        context = authority.server_context(authority.pair("server", host))
        with (
            address(lab, SERVICE_IP),
            agents.Api(lab.netns("n1"), *objects, host="0.0.0.0", port=port, tls=context, tokens=["good"]),
        ):
            looked = as_pod(host)
        api_server = looked.findings["API server"]
        assert (looked.status, looked.in_the_way) == (status, {"API server"} if status else set()), api_server
        assert ("KUBERNETES_SERVICE_HOST" in api_server["todo"]) == bool(status)


def test_no_such_node(lab: cluster.Lab, api: agents.Api) -> None:
    looked = look(lab, api.source, "--node-name", "other")
    assert (looked.status, looked.in_the_way) == (1, {"Node"})
    assert looked.findings["Node"]["todo"].startswith("--node-name n1: ")


def test_no_api_server(lab: cluster.Lab) -> None:
    looked = look(lab, ("--master", "http://127.0.0.1:1"))
    assert (looked.status, looked.in_the_way) == (1, {"API server"})
    assert "connection refused" in looked.findings["API server"]["found"]


@pytest.mark.skipif(not shutil.which("iptables-nft"), reason="needs iptables-nft")
def test_a_kube_proxy_and_its_rules(lab: cluster.Lab, api: agents.Api) -> None:
    binary = lab.workdir / "kube-proxy"
    shutil.copy(shutil.which("sleep") or "", binary)
    in_node(lab, "iptables-nft", "-t", "mangle", "-N", "KUBE-PROXY-CANARY")
    process = lab.popen("n1", [str(binary), "60"], cgroup=False)
    try:
        comm = pathlib.Path(f"/proc/{process.pid}/comm")
        polling.eventually(lambda: comm.read_text() == "kube-proxy\n", what="kube-proxy")
        looked = look(lab, api.source)
        found = looked.findings["kube-proxy"]["found"]
        assert (looked.status, found) == (0, f"runs (pid {process.pid}): iptables-nft chains")
    finally:
        process.terminate()
        process.wait()
    assert (
        look(lab, api.source).findings["kube-proxy"]["found"].startswith("does not run here, but its rules")
    )
    in_node(lab, "iptables-nft", "-t", "mangle", "-X", "KUBE-PROXY-CANARY")
    assert look(lab, api.source).level("kube-proxy") == "ok"
