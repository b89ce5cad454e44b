"""Maps that fill up grow while connections are made, and none of those fails."""

import collections.abc
import contextlib

import pytest

from lbproxy.lab import cluster
from tests import polling
from tests.lab import agents, checking, manifests, test_life

WEB, MANY, NODE_PORT = 1, range(10, 60), 30080
PODS = ("n1/p2", "n2/p1")
# Room for little more than three Services of four ports (two protocols, two families) of two backends each.
SMALL = {"frontends": 20, "slots": 20, "backends": 32, "services": 16, "localities": 4, "node_addresses": 16}
ROWS = [word for name, rows in SMALL.items() for word in ("--map-rows", f"{name}={rows}")]


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    node = manifests.node("n1", *lab["n1"].addresses)
    for pod in PODS:
        lab.serve(pod)
    with agents.Api(lab.netns("n1"), node, *web(lab)) as running:
        yield running


def web(lab: cluster.Lab) -> list[manifests.Object]:
    ports = [manifests.HTTP.on_node_port(NODE_PORT), manifests.DNS]
    return [
        manifests.service("web", WEB, ports=ports),
        *manifests.slices("web", [lab[pod] for pod in PODS]),
    ]


@contextlib.contextmanager
def storms(lab: cluster.Lab, pause_s: float = 0.002) -> collections.abc.Iterator[None]:
    """New connections by socket and, from outside, packet by packet; and some that last. None may fail."""
    node = lab["n1"].ipv4
    clients = [
        lab.client("outside", "short", node, NODE_PORT, timeout_s=5, pause_s=pause_s),
        lab.client("outside", "established", node, NODE_PORT, connections=50, interval_s=0.02, timeout_s=5),
        lab.client(
            "n1/p1",
            "established",
            manifests.cluster_ip(WEB),
            80,
            connections=50,
            interval_s=0.02,
            timeout_s=5,
        ),
    ]
    with agents.storm(lab, WEB):
        yield
        results = [client.stop() for client in clients]
    assert [result.failures for result in results] == [{}] * len(clients)
    assert [result.open for result in results[1:]] == [50, 50]


def many(lab: cluster.Lab) -> list[manifests.Object]:
    found = []
    for number in MANY:
        found.append(manifests.service(f"many-{number}", number))
        found += manifests.slices(f"many-{number}", [lab[pod] for pod in PODS])
    return found


def test_room_for_three_services_becomes_room_for_fifty(lab: cluster.Lab, api: agents.Api) -> None:
    objects = many(lab)
    names = {"web", *(f"many-{number}" for number in MANY)}
    with agents.Agent(lab, api.source, *ROWS) as agent:
        agent.has_backends("web", set(PODS))
        first = agent.identity()
        with storms(lab):
            agent.serves_on("web")
            api.put(*objects)

            def all_served() -> bool:
                agent.reopen()
                return agent.services() == names

            polling.eventually(all_served, what="room for all")
            agent.reopen()
            agent.serves_on("web")
            polling.eventually(lambda: checking.differences(agent, *web(lab), *objects) == [])
        for number in (MANY[0], MANY[-1]):
            for where, family in (("n1/p1", 4), ("n1", 6)):
                assert agent.at(where).tcp(manifests.cluster_ip(number, family), 80).server in PODS
        grown = agent.identity()
        assert grown.sizes["frontends"] > first.sizes["frontends"]
        assert grown.sizes["flows"] == first.sizes["flows"]
        assert agent.log.count("datapath created") == 1
        line = agent.says("tables have grown: ")
        assert "changes waited=" in line
        status, metrics = test_life.get(lab, "n1", "http://127.0.0.1:10249/metrics")
        assert status == 200
        assert 'lbproxy_map_growths_total{map="frontends"}' in metrics
        assert f'fingerprint="{grown.fingerprint}"' in metrics
        assert "lbproxy_starved_service_ports 0" in metrics
        polling.eventually(lambda: "MapsGrown" in {event["reason"] for event in test_life.events(api)})
        # What has grown stays so, and is nothing to compile for.
        agent.stop()
        agent.start()
        assert "datapath adopted" in agent.log
        assert agent.identity() == grown
        api.delete(*objects)


def test_flows_grow_while_they_begin_go_on_and_end(lab: cluster.Lab, api: agents.Api) -> None:
    """Those that last take 200 rows or so, the others as many a second, each for ten seconds or more."""
    with agents.Agent(lab, api.source, "--map-rows", "flows=512") as agent:
        agent.has_backends("web", set(PODS))
        with storms(lab, pause_s=0.02):
            polling.eventually(lambda: agent.identity().sizes["flows"] >= 2048, 90, "room for flows")
            agent.says(" to 2048 rows ")
        status, metrics = test_life.get(lab, "n1", "http://127.0.0.1:10249/metrics")
        assert status == 200
        assert 'lbproxy_map_growths_total{map="flows"}' in metrics
        agent.stop()
        grown = agent.identity()
        agent.start()
        assert "datapath adopted" in agent.log
        assert agent.identity() == grown


def test_flows_are_given_room_by_a_start_without_losing_any(lab: cluster.Lab, api: agents.Api) -> None:
    with agents.Agent(lab, api.source, "--map-rows", "flows=512") as agent:
        agent.has_backends("web", set(PODS))
        with storms(lab):
            agent.stop()
            agent.flags[-1] = "flows=4096"
            agent.start()
            assert "datapath replaced" in agent.log
            assert agent.identity().sizes["flows"] == 4096


def test_what_may_not_grow_is_told_and_serves_what_it_can(lab: cluster.Lab, api: agents.Api) -> None:
    objects = many(lab)
    with agents.Agent(lab, api.source, *ROWS, "--map-growth-limit=2") as agent:
        api.put(*objects)
        agent.says("no room to grow")
        agent.reopen()
        served = agent.services()
        assert "web" in served
        assert 3 < len(served) < len(MANY)
        # Never a half of a service port: whatever is there leads to its own backends.
        assert checking.dangling(agent) == []
        status, body = test_life.get(lab, "n1", "http://127.0.0.1:10256/healthz")
        assert (status, "no room to grow" in body, "table is full" in body) == (200, True, True)
        api.delete(*objects[3:])
        polling.eventually(lambda: agent.services() <= {"web", f"many-{MANY[0]}"})
        agent.has_backends(f"many-{MANY[0]}", set(PODS))
        api.delete(*objects[:3])


def test_nothing_grows_where_that_is_switched_off(lab: cluster.Lab, api: agents.Api) -> None:
    objects = many(lab)[:30]
    with agents.Agent(lab, api.source, *ROWS, "--map-growth-limit=1") as agent:
        before = agent.identity()
        api.put(*objects)
        agent.says("not served as planned")
        api.delete(*objects)
        polling.eventually(lambda: agent.services() == {"web"})
        assert agent.identity() == before
        assert "grow" not in agent.log
