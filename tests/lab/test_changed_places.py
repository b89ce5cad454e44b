"""What an agent stands on is taken away, put back or another one: uplink, address, hooks, mounts, clock."""

import collections.abc
import contextlib
import os
import pathlib
import subprocess

import pytest

from lbproxy import cgroup2
from lbproxy.kernel import libbpf, programs
from lbproxy.lab import cluster
from tests import polling
from tests.lab import agents, manifests, test_flow_table

PODS = ("n1/p2", "n2/p1")
NODE_PORT = 30080
WEB = 1
DRAWN = 40  # all from one of two: once in 10^11 times


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    objects = [
        manifests.node("n1", *lab["n1"].addresses),
        manifests.service("web", WEB, ports=[manifests.HTTP.on_node_port(NODE_PORT)]),
        *manifests.slices("web", [lab[pod] for pod in PODS]),
    ]
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


def answering(agent: agents.Agent, address: str, within_s: float = 3.0) -> set[str]:
    """Who answers at the NodePort from outside, until nobody does: that is an empty name."""
    found: set[str] = set()
    for _ in range(DRAWN):
        found.add(agent.at("outside").tcp(address, NODE_PORT, timeout_s=within_s).server)
        if "" in found:
            break
    return found


def outside(agent: agents.Agent, family: int = 4) -> set[str]:
    return answering(agent, str(agent.lab["n1"].address(family)))


def inside(agent: agents.Agent) -> set[str]:
    """Who answers to a pod at the ClusterIP."""
    pod = agent.at("n1/p1")
    return {pod.tcp(manifests.cluster_ip(WEB), 80).server for _ in range(DRAWN)}


def ip(lab: cluster.Lab, where: str, *lines: str) -> None:
    for line in lines:
        lab.check_output(where, ["ip", *line.split()], cgroup=False)


def configured(lab: cluster.Lab) -> tuple[str, ...]:
    """How n1's uplink is set up."""
    node, fabric = lab["n1"], lab["fabric"]
    return (
        f"address add {node.ipv4}/24 dev eth0",
        f"address add {node.ipv6}/64 dev eth0 nodad",
        "link set eth0 up",
        *(f"route add {route} dev eth0" for route in (
            f"0.0.0.0/0 via {fabric.ipv4}",
            f"::/0 via {fabric.ipv6}",
            f"10.244.2.0/24 via {lab['n2'].ipv4}",
            f"fd00:244:2::/64 via {lab['n2'].ipv6}",
        )),
    )  # fmt: skip


def again(lab: cluster.Lab) -> None:
    """The uplink is deleted and made anew under its name."""
    ip(lab, "n1", "link del eth0")
    peer = netns_name(lab, "n1")
    ip(lab, "fabric", f"link add node1 type veth peer name eth0 netns {peer}", "link set node1 master br0 up")


def away_and_back(lab: cluster.Lab) -> None:
    """It moves to another namespace and back, as when a container is given it for a while."""
    ip(lab, "n1", f"link set eth0 netns {netns_name(lab, 'n1/p3')} name moved0")
    ip(lab, "n1/p3", f"link set moved0 netns {netns_name(lab, 'n1')} name eth0")


def netns_name(lab: cluster.Lab, where: str) -> str:
    return lab.netns(where).name


@pytest.mark.parametrize("change", [again, away_and_back], ids=lambda one: one.__name__)
def test_an_uplink_that_goes_and_comes_back_serves_again(
    agent: agents.Agent, change: collections.abc.Callable[[cluster.Lab], None]
) -> None:
    lab = agent.lab
    assert outside(agent) == outside(agent, 6) == set(PODS)
    change(lab)
    ip(lab, "n1", *configured(lab))
    for other in ("outside", "n2"):
        ip(lab, other, "neigh flush dev eth0")  # it may have another hardware address
    for family in (4, 6):
        polling.eventually(lambda family=family: outside(agent, family) == set(PODS), what="the NodePort")  # type: ignore[misc]
    assert inside(agent) == set(PODS)
    assert agent.running
    assert "Traceback" not in agent.log


def test_the_node_gets_another_address(agent: agents.Agent, api: agents.Api) -> None:
    """NodePorts are where it is now, and its masqueraded clients are known by that."""
    lab, other = agent.lab, "172.18.0.77"
    node = lab["n1"]

    def become(address: str, before: str) -> None:
        ip(lab, "n1", f"address del {before}/24 dev eth0")
        ip(lab, "n1", f"address add {address}/24 dev eth0")
        ip(lab, "n1", *(line for line in configured(lab) if "route add" in line and "::" not in line))
        api.put(manifests.node("n1", address, str(node.ipv6)))

    try:
        become(other, str(node.ipv4))
        polling.eventually(lambda: answering(agent, other) == set(PODS), what="the NodePort")
        assert [answering(agent, str(node.ipv4), 0.5) for _ in range(12)] == [{""}] * 12
        assert outside(agent, 6) == set(PODS)
    finally:
        become(str(node.ipv4), other)
    polling.eventually(lambda: outside(agent) == set(PODS), what="the NodePort at the old address")
    assert "Traceback" not in agent.log


# --- other namespaces ---

AHEAD_S = 1_000_000


@contextlib.contextmanager
def elsewhere(agent: agents.Agent, mount: pathlib.Path) -> collections.abc.Iterator[pathlib.Path]:
    """Have the agent run with another clock, and where cgroup2 is on `mount`, too; yields its cgroup."""
    hierarchy = cgroup2.mount_point()
    assert hierarchy is not None
    place = mount / agent.cgroup.relative_to(hierarchy)
    mount.mkdir()
    ordinary = agent.command
    apart = [
        "unshare", "--time", "--monotonic", str(AHEAD_S), "--mount", "--propagation", "private",
        "sh", "-c", 'mount -t cgroup2 none "$0" && exec "$@"', str(mount),
    ]  # fmt: skip
    agent.stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "command", lambda: [*apart, *ordinary("--cgroup", str(place))])
        agent.start()
        yield place
        agent.stop()
    agent.start()


def assured(lab: cluster.Lab) -> float:
    """How many assured flows the last look at the table has found."""
    return sum(count for name, count in test_flow_table.flows(lab).items() if 'assured="true"' in name)


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/timens_offsets").exists(), reason="a kernel without time namespaces"
)
def test_an_agent_with_another_clock_and_another_mount(agent: agents.Agent, lab: cluster.Lab) -> None:
    before = attached(agent)
    with agent.at("outside").open(lab["n1"].ipv4, NODE_PORT) as held:
        server = held.ask().server
        assert server in PODS
        held.ask()
        with elsewhere(agent, lab.workdir / "elsewhere") as place:
            assert "datapath adopted" in agent.log
            assert f"the cgroup that was at {agent.cgroup} is at {place} now" in agent.log
            # By this clock it has been idle for eleven days.
            polling.eventually(lambda: assured(lab) >= 1, what="a look at the flows")
            assert held.ask().server == server
            assert attached(agent) == before
            assert outside(agent) == set(PODS)
        assert f"the cgroup that was at {place} is at {agent.cgroup} now" in agent.log
        assert held.ask().server == server


@pytest.mark.skipif(not os.environ.get("LBPROXY_MARATHON"), reason="half a minute: make marathon")
def test_a_mount_that_goes_under_a_running_agent(agent: agents.Agent, lab: cluster.Lab) -> None:
    mount = lab.workdir / "elsewhere-again"
    with elsewhere(agent, mount) as place:
        assert agent.process is not None
        inside = f"--mount=/proc/{agent.process.pid}/ns/mnt"
        subprocess.run(["nsenter", inside, "umount", "-l", mount], check=True)
        said = f"the cgroup at {place} is now at {agent.cgroup}"
        polling.eventually(lambda: said in agent.log, what="a look at the hooks")
        assert "put back" not in agent.log
        assert outside(agent) == set(PODS)


def attached(agent: agents.Agent) -> set[str]:
    """The programs that are at their hooks of the cgroup."""
    found = set()
    for program in programs.SOCKET:
        with contextlib.suppress(FileNotFoundError):
            fd = libbpf.obj_get(str(agent.root / "links" / program.name))
            try:
                if libbpf.link_info(fd).cgroup_id == agent.cgroup.stat().st_ino:
                    found.add(program.name)
            finally:
                os.close(fd)
    return found


@pytest.mark.skipif(not os.environ.get("LBPROXY_MARATHON"), reason="half a minute: make marathon")
def test_links_that_somebody_detached_are_put_back(agent: agents.Agent) -> None:
    everything = {program.name for program in programs.SOCKET}
    assert attached(agent) == everything
    # Not unpinned, but detached under the agent's feet: the pins are still there.
    for name in everything:
        path = agent.root / "links" / name
        if path.exists():
            fd = libbpf.obj_get(str(path))
            libbpf.link_detach(fd)
            os.close(fd)
    assert attached(agent) == set()
    said = "put back hooks that were taken away"
    polling.eventually(lambda: said in agent.log, what="a look at the hooks")
    assert attached(agent) == everything
    assert inside(agent) == set(PODS)
