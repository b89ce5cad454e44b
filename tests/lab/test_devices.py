"""The packet path of a real agent: what it is attached to, and what it leaves."""

import collections.abc
import contextlib
import pathlib

import pytest

from lbproxy.commands import status
from lbproxy.kernel import device_links, maps
from lbproxy.lab import cluster, netns
from tests import polling
from tests.lab import agents, manifests

PODS = ("n1/p2", "n2/p1")
NODE_PORT = 30080
DRAWN = 40  # all from one of two: once in 10^11 times


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    objects = [
        manifests.service("web", 1, ports=[manifests.HTTP.on_node_port(NODE_PORT)]),
        *manifests.slices("web", [lab[pod] for pod in PODS]),
    ]
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


def devices(agent: agents.Agent) -> dict[str, tuple[str, str]]:
    """Each device's role, and what is wrong with it."""

    def read() -> dict[str, tuple[str, str]]:
        with contextlib.closing(maps.BpfMaps(str(agent.root / "maps"))) as kernel:
            found = status.read(agent.root, kernel).devices
        return {one.name: (one.role, one.problem) for one in found}

    return netns.inside(agent.lab.netns("n1"), read)


def programs(root: pathlib.Path) -> set[tuple[str, int]]:
    return {
        (held.attachment.pin, held.info.prog_id) for held in device_links.DeviceLinks(root / "links").held()
    }


def test_the_agent_attaches_to_its_node_and_leaves_it_serving(agent: agents.Agent) -> None:
    wanted = {"eth0": ("uplink", ""), "cni0": ("inside", "")}
    polling.eventually(lambda: devices(agent) == wanted, what="devices")
    assert "device eth0: uplink by tc, as --xdp is off" in agent.log
    before = programs(agent.root)
    at = agent.at("n2")  # where there is no agent
    node_ip = str(agent.lab["n1"].ipv4)
    assert {at.tcp(node_ip, NODE_PORT).server for _ in range(DRAWN)} == set(PODS)
    agent.stop()
    assert devices(agent) == wanted
    assert {at.tcp(node_ip, NODE_PORT).server for _ in range(DRAWN)} == set(PODS)
    agent.start()
    assert (devices(agent), programs(agent.root)) == (wanted, before)
