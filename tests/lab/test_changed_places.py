"""What an agent stands on is taken away and put back: its uplink, its hooks, its cgroup."""

import collections.abc
import contextlib
import os

import pytest

from lbproxy.kernel import libbpf, programs
from lbproxy.lab import cluster
from tests import polling
from tests.lab import agents, manifests

PODS = ("n1/p2", "n2/p1")
NODE_PORT = 30080
WEB = 1


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    objects = [
        manifests.node("n1", *lab["n1"].addresses),
        manifests.service("web", WEB, ports=[manifests.HTTP.on_node_port(NODE_PORT)]),
        *manifests.slices("web", [lab[pod] for pod in PODS]),
    ]
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


def outside(agent: agents.Agent, family: int = 4) -> set[str]:
    """Who answers at the NodePort from outside; an empty name where nobody does."""
    address = agent.lab["n1"].address(family)
    return {agent.at("outside").tcp(address, NODE_PORT, timeout_s=0.5).server for _ in range(12)}


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
        polling.eventually(lambda family=family: outside(agent, family) == set(PODS), 60, "the NodePort")  # type: ignore[misc]
    pod = agent.at("n1/p1")
    assert {pod.tcp(manifests.cluster_ip(WEB), 80).server for _ in range(12)} == set(PODS)
    assert agent.running
    assert "Traceback" not in agent.log


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
    agent.says("put back hooks that were taken away")
    assert attached(agent) == everything
    pod = agent.at("n1/p1")
    assert {pod.tcp(manifests.cluster_ip(WEB), 80).server for _ in range(12)} == set(PODS)
