"""Session affinity ClientIP: a client stays on its backend, and only as long as it should."""

import collections.abc
import json
import time
import typing

import pytest

from lbproxy import abi
from lbproxy.lab import cluster
from tests import polling
from tests.lab import agents, manifests

# Two clients on four backends agree on all of these services once in 16 million times.
SERVICES = 12
EXPOSED = 3  # this one of them has external addresses
CHANGING, SWITCHED = 51, 52
PODS = ("n1/p2", "n1/p3", "n2/p1", "n2/p2")
CLIENTS = ("n1/p1", "n1/p2", "n1")
EXTERNAL = {4: "192.0.2.5", 6: "2001:db8::5"}
TCP, UDP = manifests.TCP_PORT, manifests.UDP_PORT
_ROW = abi.LAYOUTS["affinity"]

families = pytest.mark.parametrize("family", [4, 6])


def changing(timeout_s: int = 10800) -> manifests.Object:
    return manifests.service("changing", CHANGING, **manifests.affinity(timeout_s))


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    everyone = [lab[pod] for pod in PODS]
    objects = [
        changing(),
        *manifests.slices("changing", everyone),
        manifests.service("switched", SWITCHED),
        *manifests.slices("switched", everyone),
    ]
    for number in range(1, SERVICES + 1):
        name, ports = f"sticky-{number}", [manifests.HTTP.on_node_port(30000 + number), manifests.DNS]
        external = list(EXTERNAL.values()) if number == EXPOSED else []
        sticky = manifests.affinity(10800)
        objects.append(manifests.service(name, number, ports=ports, externalIPs=external, **sticky))
        objects += manifests.slices(name, everyone)
        name = f"brief-{number}"
        objects.append(manifests.service(name, 100 + number, **manifests.affinity(1)))
        objects += manifests.slices(name, everyone)
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


def chosen(agent: agents.Agent, where: str, number: int, family: int = 4) -> str:
    """Who answers at a service's TCP port."""
    server = agent.at(where).tcp(manifests.cluster_ip(number, family), TCP).server
    assert server in PODS
    return server


def vector(agent: agents.Agent, where: str, family: int = 4, *, first: int = 1) -> list[str]:
    """Who answers at each of the services of the same kind."""
    return [chosen(agent, where, number, family) for number in range(first, first + SERVICES)]


def rows(agent: agents.Agent, name: str, family: int = 4) -> list[tuple[typing.Any, ...]]:
    """The (backend, start) rows that remember clients of a Service's TCP port."""
    service = agent.port(name, family=family).id.to_bytes(4, "little")
    return [_ROW.unpack(value) for key, value in agent.maps.rows("affinity") if key[16:20] == service]


@families
@pytest.mark.parametrize("where", CLIENTS)
def test_a_client_stays_on_its_backend(agent: agents.Agent, where: str, family: int) -> None:
    sockets, address = agent.at(where), manifests.cluster_ip(1, family)
    assert len({chosen(agent, where, 1, family) for _ in range(30)}) == 1
    unconnected = [sockets.udp(address, UDP, connected=False).server for _ in range(15)]
    connected = [sockets.udp(address, UDP).server for _ in range(15)]
    assert len({*unconnected, *connected}) == 1


@pytest.mark.parametrize("where", CLIENTS)
def test_explain_knows_where_a_client_stays(agent: agents.Agent, where: str) -> None:
    stays_on = chosen(agent, where, 1, 4)
    client = str(agent.lab[where].ipv4)
    to = f"{manifests.cluster_ip(1)}:{TCP}"
    told = json.loads(agent.lbproxy("explain", "--from", client, "--to", to, "-o", "json"))
    assert [(one["ip"], one["percent"]) for one in told["backends"]] == [(agent.lab[stays_on].ipv4, 100.0)]


@families
def test_each_pod_and_the_node_is_a_client_of_its_own(agent: agents.Agent, family: int) -> None:
    vectors = [vector(agent, where, family) for where in CLIENTS]
    assert vectors[0] != vectors[1] != vectors[2] != vectors[0]


def test_each_port_and_family_is_remembered_by_itself(agent: agents.Agent) -> None:
    sockets = agent.at("n1/p1")
    numbers = range(1, SERVICES + 1)
    udp = [sockets.udp(manifests.cluster_ip(number), UDP).server for number in numbers]
    assert vector(agent, "n1/p1", 4) != udp
    assert vector(agent, "n1/p1", 4) != vector(agent, "n1/p1", 6)


@families
def test_all_addresses_of_a_service_port_share_the_memory(agent: agents.Agent, family: int) -> None:
    sockets, node = agent.at("n1/p1"), agent.lab["n1"].address(family)
    for number in range(1, SERVICES + 1):
        assert sockets.tcp(node, 30000 + number).server == chosen(agent, "n1/p1", number, family)
    exposed = [sockets.tcp(EXTERNAL[family], TCP).server for _ in range(20)]
    assert set(exposed) == {chosen(agent, "n1/p1", EXPOSED, family)}


def test_the_node_shares_its_memory_between_its_loopback_and_the_cluster_ip(agent: agents.Agent) -> None:
    node = agent.at("n1")
    through_loopback = [node.tcp("127.0.0.1", 30000 + number).server for number in range(1, SERVICES + 1)]
    assert through_loopback == vector(agent, "n1")


@families
def test_a_client_that_was_away_too_long_is_forgotten(agent: agents.Agent, family: int) -> None:
    before = vector(agent, "n1/p1", family, first=101)
    started_s = max(start for n in range(1, SERVICES + 1) for _, start in rows(agent, f"brief-{n}", family))
    polling.eventually(lambda: kernel_clock_s() >= started_s + 2, what="the end of the timeout")
    assert vector(agent, "n1/p1", family, first=101) != before


def kernel_clock_s() -> float:
    """The clock that the kernel programs read."""
    return time.clock_gettime(6)  # CLOCK_MONOTONIC_COARSE


def test_each_connection_starts_the_timeout_anew(agent: agents.Agent, api: agents.Api) -> None:
    first = chosen(agent, "n1/p1", CHANGING)
    ((_, started_s),) = rows(agent, "changing")

    def restarted() -> bool:
        assert chosen(agent, "n1/p1", CHANGING) == first
        ((_, now_s),) = rows(agent, "changing")
        return bool(now_s > started_s)

    polling.eventually(restarted, what="a later start")
    # An open connection that talks is not a new one.
    with agent.at("n1/p1").open(manifests.cluster_ip(CHANGING), TCP) as held:
        ((_, started_s),) = rows(agent, "changing")
        polling.eventually(lambda: held.ask() and kernel_clock_s() >= started_s + 1, what="the next second")
        assert [start for _, start in rows(agent, "changing")] == [started_s]


def test_memory_survives_more_endpoints_and_other_changes(agent: agents.Agent, api: agents.Api) -> None:
    few, everyone = [agent.lab[pod] for pod in PODS[:2]], [agent.lab[pod] for pod in PODS]
    api.put(*manifests.slices("changing", few))
    agent.has_backends("changing", set(PODS[:2]))
    first = chosen(agent, "n1/p1", CHANGING)
    api.put(*manifests.slices("changing", everyone))
    agent.has_backends("changing", set(PODS))
    assert {chosen(agent, "n1/p1", CHANGING) for _ in range(20)} == {first}
    # Slices in another order, another timeout, one more port.
    api.put(*manifests.slices("changing", everyone[::-1]), changing(7200))
    polling.eventually(lambda: agent.port("changing").affinity_s == 7200, what="the timeout")
    assert {chosen(agent, "n1/p1", CHANGING) for _ in range(20)} == {first}


@families
@pytest.mark.parametrize("how", ["deleted", "unready"])
def test_a_client_moves_when_its_backend_goes_and_then_stays(
    agent: agents.Agent, api: agents.Api, family: int, how: str
) -> None:
    everyone = [agent.lab[pod] for pod in PODS]
    api.put(*manifests.slices("changing", everyone))
    agent.has_backends("changing", set(PODS))
    first = chosen(agent, "n1/p1", CHANGING, family)
    left = [place for place in everyone if place.name != first]
    gone = [manifests.Member(agent.lab[first], ready=False)] if how == "unready" else []
    api.put(*manifests.slices("changing", [*left, *gone]))
    agent.has_backends("changing", {place.name for place in left})
    second = chosen(agent, "n1/p1", CHANGING, family)
    assert second != first
    assert {chosen(agent, "n1/p1", CHANGING, family) for _ in range(20)} == {second}
    api.put(*manifests.slices("changing", everyone))
    agent.has_backends("changing", set(PODS))
    assert {chosen(agent, "n1/p1", CHANGING, family) for _ in range(20)} == {second}


def test_affinity_can_be_turned_on_and_off(agent: agents.Agent, api: agents.Api) -> None:
    def seen() -> set[str]:
        return {chosen(agent, "n1/p1", SWITCHED) for _ in range(30)}

    assert len(seen()) > 1
    api.put(manifests.service("switched", SWITCHED, **manifests.affinity(600)))
    polling.eventually(lambda: agent.port("switched").affinity_s == 600, what="affinity")
    polling.eventually(lambda: len(seen()) == 1, what="one backend")
    api.put(manifests.service("switched", SWITCHED))
    polling.eventually(lambda: agent.port("switched").affinity_s == 0, what="no affinity")
    polling.eventually(lambda: len(seen()) > 1, what="several backends")


def test_memory_survives_the_agent(agent: agents.Agent, api: agents.Api) -> None:
    before = [vector(agent, where, family) for where in CLIENTS for family in (4, 6)]
    agent.kill()
    assert [vector(agent, where, family) for where in CLIENTS for family in (4, 6)] == before
    agent.start()
    assert [vector(agent, where, family) for where in CLIENTS for family in (4, 6)] == before
    agent.stop()
    agent.start()
    assert [vector(agent, where, family) for where in CLIENTS for family in (4, 6)] == before
