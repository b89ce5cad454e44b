"""Connections from outside go on, and new ones succeed, whatever happens beside them."""

import pytest

from lbproxy.lab import cluster, traffic
from tests import polling
from tests.lab import agents, manifests
from tests.lab.wire.held import connections, results
from tests.lab.wire.ways import BACKENDS, TARGET, WAYS

AGENT_FLAGS = ("--map-rows", "flows=65536")


@pytest.fixture(scope="module", autouse=True)
def servers(lab: cluster.Lab) -> dict[str, traffic.Server]:
    return {pod: lab.serve(pod, ports=[TARGET]) for pod in (*BACKENDS, "n2/p2")}


def assert_none_failed(clients: list[traffic.Client]) -> None:
    found = results(clients)
    assert [result.failures for result in found] == [{}] * len(found)
    assert all(result.count > 20 for result in found)


def test_a_killed_agent_is_not_missed(lab: cluster.Lab, agent: agents.Agent) -> None:
    with connections(lab) as fresh:
        for _ in range(2):
            agent.serves_on("near", "far", "kept")
            agent.kill()
            agent.serves_on("near", "far", "kept")
            agent.start()
            assert "datapath adopted" in agent.log
        agent.serves_on("near", "far", "kept")
        assert_none_failed(fresh)


def test_an_upgrade_is_not_noticed(lab: cluster.Lab, agent: agents.Agent) -> None:
    with connections(lab) as fresh:
        agent.serves_on("near", "far", "kept")
        agent.stop()
        # A table in use is not made smaller: the tests after this one have these.
        agent.flags += ["--map-rows", "flows=69632", "--map-rows", "flows_new=16384"]
        agent.start(wait=False)
        polling.eventually(lambda: " ready: " in agent.log, 90, "readiness")
        assert "datapath replaced" in agent.log
        agent.serves_on("near", "far", "kept")
        assert_none_failed(fresh)


def test_backends_come_and_go_beside_them(lab: cluster.Lab, agent: agents.Agent, api: agents.Api) -> None:
    with connections(lab) as fresh:
        for pods in (("n1/p2", "n2/p1", "n2/p2"), ("n2/p2",), (), ("n2/p1", "n1/p2")):
            for way in WAYS[:2]:
                api.put(*manifests.slices(way.name, [lab[pod] for pod in pods], ports=way.ports))
                agent.has_backends(way.name, set(pods))
            if pods:
                agent.serves_on("near", "far")
        for way in WAYS[:2]:
            api.put(*way.objects(lab))
        found = results(fresh)
    # While there was no backend, connections were refused: at once, and for no other reason.
    assert all(set(result.failures) <= {"ECONNREFUSED"} for result in found)
    assert [result.failures for result in found[4:]] == [{}, {}]
