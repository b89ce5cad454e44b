"""Least connections: who has fewer open gets more, and no count is ever off for long."""

import collections.abc
import contextlib

import pytest

from lbproxy.core import model
from lbproxy.lab import cluster, shell
from tests import polling
from tests.lab import agents, manifests

LEAST, SWITCHED, WEIGHTED, PAIR = 1, 2, 3, 4
NODE_PORT, PAIR_NODE_PORT = 30001, 30002
PODS = ("n1/p1", "n1/p2", "n2/p1", "n2/p2")
# Of two backends each draw is of both: who has fewer open is chosen for certain, and chance has a say
# only where they are even. Of four, two are drawn: whoever has fewest may not be among them.
TWO = (PODS[0], PODS[2])
TCP, UDP = manifests.TCP_PORT, manifests.UDP_PORT
ANNOTATED = {"lbproxy.io/algorithm": "least-connections"}
SHORT = 2000


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    everyone = [lab[pod] for pod in PODS]
    ports = [manifests.HTTP.on_node_port(NODE_PORT), manifests.DNS.on_node_port(NODE_PORT)]
    weights = {"lbproxy.io/weights": f"{lab[PODS[0]].ipv4}=3, {lab[PODS[3]].ipv4}=0"}
    objects = [
        manifests.service("least", LEAST, ports=ports, annotations=ANNOTATED),
        *manifests.slices("least", everyone),
        manifests.service("switched", SWITCHED),
        *manifests.slices("switched", everyone),
        manifests.service("weighted", WEIGHTED, annotations=ANNOTATED | weights),
        *manifests.slices("weighted", everyone),
        manifests.service(
            "pair", PAIR, ports=[manifests.HTTP.on_node_port(PAIR_NODE_PORT)], annotations=ANNOTATED
        ),
        *manifests.slices("pair", [lab[pod] for pod in TWO]),
        manifests.node("n1", lab["n1"].address(4), lab["n1"].address(6)),
    ]
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


def open_to(agent: agents.Agent, name: str = "least", port: str = "http", family: int = 4) -> dict[str, int]:
    found = {}
    for one in agent.port(name, port, family).backends:
        assert one.open is not None
        found[agent.place(one.address)] = one.open
    return found


def nothing_is_open(agent: agents.Agent, name: str = "least", within_s: float = 0.0) -> None:
    """At once, or where the end can not be seen: after the agent's next look."""

    def nothing() -> bool:
        return not any(one.open for port in agent.ports(name).values() for one in port.backends)

    if within_s:
        polling.eventually(nothing, within_s, "nothing open")
    else:
        assert nothing()


def servers(sockets: collections.abc.Iterable[shell.Socket]) -> dict[str, int]:
    asked = [one.ask().server for one in sockets]
    return {pod: asked.count(pod) for pod in PODS}


@pytest.mark.parametrize("family", [4, 6])
def test_the_kernel_knows_what_each_backend_has_open(agent: agents.Agent, family: int) -> None:
    assert agent.port("least", family=family).algorithm is model.Algorithm.LEAST_CONNECTIONS
    address, sockets = manifests.cluster_ip(LEAST, family), agent.at("n1/p3")
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(sockets.open(address, TCP)) for _ in range(40)]
        found = servers(held)
        assert open_to(agent, family=family) == found
        relieved = held[0].ask().server
        for one in held:
            if one.ask().server == relieved:
                one.close()
        assert open_to(agent, family=family) == found | {relieved: 0}
    nothing_is_open(agent)


@pytest.mark.parametrize("family", [4, 6])
def test_who_has_fewer_open_is_chosen(agent: agents.Agent, family: int) -> None:
    address, sockets = manifests.cluster_ip(PAIR, family), agent.at("n1/p3")
    even = dict.fromkeys(PODS, 0) | dict.fromkeys(TWO, 20)
    # Of what packets had open before: they tell of an end a moment later.
    nothing_is_open(agent, "pair", polling.TIMEOUT_S)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(sockets.open(address, TCP)) for _ in range(40)]
        assert servers(held) == even
        relieved = held[0].ask().server
        for one in held:
            if one.ask().server == relieved:
                one.close()
        again = [stack.enter_context(sockets.open(address, TCP)) for _ in range(20)]
        assert servers(again)[relieved] == 20
        assert open_to(agent, "pair", family=family) == {pod: even[pod] for pod in TWO}


def test_udp_sockets_count_once_wherever_they_turn(agent: agents.Agent) -> None:
    address, sockets = manifests.cluster_ip(LEAST), agent.at("n1/p3")
    with sockets.socket(udp=True) as turning, sockets.socket(udp=True) as loose:
        for _ in range(20):
            turning.connect(address, UDP)
            assert sum(open_to(agent, port="dns").values()) == 1
        turning.connect(agent.lab["n2/p3"].ipv4, UDP)
        nothing_is_open(agent)
        for _ in range(20):
            loose.sendto(b"?\n", address, UDP)
        assert sum(open_to(agent, port="dns").values()) == 1
    nothing_is_open(agent)


@pytest.mark.parametrize("mode", ["short", "udp-new"])
def test_after_thousands_nothing_is_open(agent: agents.Agent, mode: str) -> None:
    port = TCP if mode == "short" else UDP
    address = manifests.cluster_ip(LEAST)
    result = agent.lab.client("n1/p3", mode, address, port, count=SHORT).result()  # type: ignore[arg-type]
    assert result.failures == {}
    assert set(result.servers) == set(PODS)
    nothing_is_open(agent)


def test_nor_after_clients_were_killed(agent: agents.Agent) -> None:
    address = manifests.cluster_ip(LEAST)
    for _ in range(3):
        client = agent.lab.client("n1/p3", "hold", address, TCP, connections=200, seconds=60)
        polling.eventually(lambda: sum(open_to(agent).values()) == 200, what="all open")
        client.process.kill()
        client.process.wait()
        polling.eventually(lambda: sum(open_to(agent).values()) == 0, what="none open")
    nothing_is_open(agent)


@pytest.mark.parametrize("where", ["outside", "n1/p3"])
def test_packets_count_as_sockets_do(agent: agents.Agent, where: str) -> None:
    # In no cgroup that a hook sees: its packets are what is balanced.
    to = (agent.lab["n1"].ipv4, NODE_PORT) if where == "outside" else (manifests.cluster_ip(LEAST), TCP)
    with agent.lab.shell(where, cgroup=False) as sockets, contextlib.ExitStack() as stack:
        held = [stack.enter_context(sockets.open(*to)) for _ in range(40)]
        assert open_to(agent) == servers(held)
    nothing_is_open(agent, within_s=polling.TIMEOUT_S)
    result = agent.lab.client(where, "short", *to, count=SHORT, cgroup=False).result()
    assert result.failures == {}
    nothing_is_open(agent, within_s=polling.TIMEOUT_S)


@pytest.mark.parametrize("where", ["outside", "n1/p3"])
def test_packets_go_to_who_has_fewer_open(agent: agents.Agent, where: str) -> None:
    to = (agent.lab["n1"].ipv4, PAIR_NODE_PORT) if where == "outside" else (manifests.cluster_ip(PAIR), TCP)
    with agent.lab.shell(where, cgroup=False) as sockets, contextlib.ExitStack() as stack:
        nothing_is_open(agent, "pair", polling.TIMEOUT_S)
        held = [stack.enter_context(sockets.open(*to)) for _ in range(40)]
        assert servers(held) == dict.fromkeys(PODS, 0) | dict.fromkeys(TWO, 20)


def test_a_flow_whose_end_nobody_sees_is_forgotten_in_time(agent: agents.Agent) -> None:
    with agent.lab.shell("outside") as sockets:
        assert sockets.udp(agent.lab["n1"].ipv4, NODE_PORT).server in PODS
        assert sum(open_to(agent, port="dns").values()) == 1
    # --conntrack-udp-timeout, two ticks of margin, and a look: every 10 s, on a busy machine later.
    nothing_is_open(agent, within_s=90.0)


def test_weights_count_as_well(agent: agents.Agent) -> None:
    sockets = agent.at("n1/p3")
    with contextlib.ExitStack() as stack:
        address = manifests.cluster_ip(WEIGHTED)
        held = [stack.enter_context(sockets.open(address, TCP)) for _ in range(200)]
        found = servers(held)
        assert open_to(agent, "weighted") == found
    assert found[PODS[3]] == 0
    # It has three slots of five, and all are even whenever it has three fifths. That it strays by ten
    # within 200 draws of two slots happens once in 10^10 runs: 3.9e-11, added up over all that can come.
    assert found[PODS[0]] == pytest.approx(120, abs=9)


def test_a_service_that_is_switched_knows_what_was_open_before(agent: agents.Agent, api: agents.Api) -> None:
    address, sockets = manifests.cluster_ip(SWITCHED), agent.at("n1/p3")
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(sockets.open(address, TCP)) for _ in range(20)]
        found = servers(held)
        api.put(manifests.service("switched", SWITCHED, annotations=ANNOTATED))
        least = model.Algorithm.LEAST_CONNECTIONS
        polling.eventually(lambda: agent.port("switched").algorithm is least, what="the new algorithm")
        polling.eventually(lambda: open_to(agent, "switched") == found, 30.0, "what is open")
        assert servers(held) == found
        agent.kill()
        agent.start()
        polling.eventually(lambda: open_to(agent, "switched") == found, 30.0, "the same after a restart")
        held.pop().close()
        assert sum(open_to(agent, "switched").values()) == 19
    assert sum(open_to(agent, "switched").values()) == 0
    api.put(manifests.service("switched", SWITCHED))
    polling.eventually(lambda: agent.port("switched").backends[0].open is None, what="no count")


AGENT_FLAGS = ("--conntrack-udp-timeout", "2s")
