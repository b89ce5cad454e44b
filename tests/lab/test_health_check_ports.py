"""Health check node ports of the real agent, asked from another node."""

import collections.abc
import json
import sys

import pytest

from lbproxy.lab import cluster
from tests import polling
from tests.lab import agents, manifests, test_life


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    with agents.Api(lab.netns("n1")) as running:
        yield running


def test_a_health_check_node_port_answers_for_its_service(lab: cluster.Lab, api: agents.Api) -> None:
    port = 30101
    service = manifests.service(
        "balanced", 2, type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=port
    )
    local, remote = (manifests.slices("balanced", [lab[place]]) for place in ("n1/p2", "n2/p1"))

    def answers() -> tuple[int, int, int]:
        (status4, _), (status6, _) = (
            test_life.get(lab, "n2", f"http://{host}:{port}/")
            for host in (lab["n1"].address(4), f"[{lab['n1'].address(6)}]")
        )
        own, body = test_life.get(lab, "n1", f"http://127.0.0.1:{port}/any/path")
        return status4, status6, json.loads(body)["localEndpoints"] if own else -1

    with agents.Agent(lab, api.source, *agents.SMALL_MAPS):
        api.put(service, *local)
        polling.eventually(lambda: answers() == (200, 200, 1), what="health")
        api.put(*remote)
        polling.eventually(lambda: answers() == (503, 503, 0), what="no health")
        api.delete(service)
        polling.eventually(lambda: answers() == (0, 0, -1), what="nothing")
        api.delete(*remote)


def test_a_health_check_port_in_use_is_an_event_on_its_service(lab: cluster.Lab, api: agents.Api) -> None:
    port = 30102
    hold = f"import socket, time; held = socket.create_server(('0.0.0.0', {port})); time.sleep(300)"
    holder = lab.popen("n1", [sys.executable, "-I", "-S", "-c", hold], cgroup=False)
    try:
        polling.eventually(lambda: "Errno" not in test_life.get(lab, "n1", f"http://127.0.0.1:{port}/")[1])
        with agents.Agent(lab, api.source, *agents.SMALL_MAPS):
            service = manifests.service(
                "taken", 3, type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=port
            )
            api.put(service)
            reason = "FailedToStartServiceHealthcheck"
            polling.eventually(
                lambda: reason in {event["reason"] for event in test_life.events(api)}, what=reason
            )
            holder.kill()
            holder.wait(10)
            # The next pass tries again, whatever it is for.
            api.put(*manifests.slices("taken", [lab["n1/p2"]]))
            polling.eventually(
                lambda: test_life.get(lab, "n1", f"http://127.0.0.1:{port}/")[0] == 200, what="health"
            )
            api.delete(service, *manifests.slices("taken", []))
    finally:
        holder.kill()
        holder.wait(10)
