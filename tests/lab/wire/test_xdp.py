"""XDP beside tc: what it takes is seen by nothing behind it, and what it leaves is served as ever.

A packet socket at the node's device is behind XDP in both directions, so it tells.
"""

import collections.abc
import os
import socket

import pytest

from lbproxy.kernel import libbpf
from lbproxy.lab import cluster, netns
from tests.lab import agents
from tests.lab.wire import wires
from tests.lab.wire.ways import ENDS, LAST_HOPS, WAYS
from tests.packets import packets

ATTACH_XDP, NATIVE = 37, 1 << 2
PASS = bytes.fromhex("b700000002000000 9500000000000000")  # return XDP_PASS
AGENT_FLAGS = ("--xdp", "generic")

pytestmark = pytest.mark.usefixtures("echoes")


@pytest.fixture(scope="module", autouse=True)
def far_end(lab: cluster.Lab) -> collections.abc.Iterator[None]:
    """A veth hands over what XDP sends only where its other end has a program of its own."""

    def attach() -> int:
        return libbpf.link_create(program, socket.if_nametoindex("node1"), ATTACH_XDP, NATIVE)

    program = libbpf.prog_load(libbpf.PROG_TYPE_XDP, "pass", PASS, ATTACH_XDP)
    link = netns.inside(lab.netns("fabric"), attach)
    yield
    os.close(link)
    os.close(program)


@pytest.fixture(params=["generic", "native"])
def mode(request: pytest.FixtureRequest, lab: cluster.Lab, agent: agents.Agent) -> str:
    """The agent, attached so."""
    if agent.flags[-1] != request.param:
        agent.stop()
        agent.flags = [*agent.flags[:-1], request.param]
        agent.start()
        agent.says(f"device eth0: uplink by tc and {request.param} XDP")
    chosen: str = request.param
    return chosen


def talk(lab: cluster.Lab, address: str, port: int) -> None:
    """A stream, and datagrams of one flow."""
    wires.exchange(lab, "outside", address, port, 100_000)
    with wires.connect(lab, "outside", address, port, socket.SOCK_DGRAM) as asking:
        for size in range(40):
            asking.send(bytes(size))
            assert asking.recv(100) == bytes(size)


@pytest.mark.parametrize("devices", [ENDS, LAST_HOPS], ids=["sums made", "sums left"])
def test_established_flows_to_other_nodes_do_not_reach_the_kernel(
    lab: cluster.Lab,
    set_offload: collections.abc.Callable[..., None],
    mode: str,
    devices: tuple[tuple[str, str], ...],
) -> None:
    set_offload(*devices)
    for way in WAYS:
        # Sums that are left to the device are for tc; a backend of this node is for the kernel.
        by_xdp = way.name == "far" and devices == ENDS
        for family in (4, 6):
            with (
                wires.Tap(lab, "n1") as at_node,
                wires.Tap(lab, "outside") as at_client,
                wires.Tap(lab, way.backend) as at_backend,
            ):
                talk(lab, lab["n1"].address(family), way.node_port)
                for tap in (at_client, at_backend):
                    arrived = [one for one in tap.seen() if not one.outgoing and is_payload(one)]
                    assert len(arrived) > 40
                    assert [packets.wrong_checksums(one.frame) for one in arrived] == [[]] * len(arrived)
                behind = [one for one in at_node.seen() if is_payload(one)]
            # A few, until the flows have rows and the neighbours are known.
            assert (len(behind) < 20) == by_xdp


def is_payload(one: wires.Seen) -> bool:
    return one.proto in (packets.TCP, packets.UDP) and 6443 not in (one.sport, one.dport)
