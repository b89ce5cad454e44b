"""How a service's annotations share new connections out, changed while it is being used."""

import collections
import collections.abc
import contextlib

import pytest

from lbproxy.lab import cluster
from tests import polling
from tests.lab import agents, manifests

CHANGING = 1
PODS = ("n1/p1", "n1/p2", "n2/p1", "n2/p2")
DRAWN = 2000


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    objects = [changing(), *manifests.slices("changing", [lab[pod] for pod in PODS])]
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


def changing(**annotations: str) -> manifests.Object:
    named = {f"lbproxy.io/{name.replace('_', '-')}": text for name, text in annotations.items()}
    return manifests.service("changing", CHANGING, annotations=named)


def weights_of(agent: agents.Agent) -> dict[str, int]:
    return {agent.place(one.address): one.weight for one in agent.port("changing").backends}


def drawn(agent: agents.Agent, count: int = DRAWN) -> collections.Counter[str]:
    """Who answered so many short connections."""
    client = agent.lab.client("n1/p3", "short", manifests.cluster_ip(CHANGING), 80, count=count)
    result = client.result()
    assert result.failures == {}
    return collections.Counter(result.servers)


@pytest.mark.parametrize("algorithm", ["random", "maglev"])
def test_weights_share_connections_out_and_change_live(
    agent: agents.Agent, api: agents.Api, algorithm: str
) -> None:
    first, second, third, fourth = PODS
    address = {pod: agent.lab[pod].ipv4 for pod in PODS}
    with contextlib.ExitStack() as stack:
        sockets = agent.at("n1/p3")
        held = [stack.enter_context(sockets.open(manifests.cluster_ip(CHANGING), 80)) for _ in range(12)]
        servers = [opened.ask().server for opened in held]
        text = f"node:n1=2, {address[first]}=5, {address[fourth]}=0, bad"
        api.put(changing(algorithm=algorithm, weights=text))
        wanted = {first: 5, second: 2, third: 1, fourth: 0}
        polling.eventually(lambda: weights_of(agent) == wanted, what="the weights")
        shares = drawn(agent)
        assert shares[fourth] == 0
        for pod in (first, second, third):
            # Five standard deviations, and what a Maglev table of 1,021 slots is off.
            assert shares[pod] == pytest.approx(DRAWN * wanted[pod] / 8, abs=5 * 22)
        agent.says("'bad' names no address")
        # All that are left to choose from have the weight 0: they are equal.
        api.put(changing(algorithm=algorithm, weights="node:n1=0, node:n2=0"))
        polling.eventually(lambda: weights_of(agent) == dict.fromkeys(PODS, 1), what="equal weights")
        assert set(drawn(agent, 200)) == set(PODS)
        # No connection was moved, nor cut.
        assert [opened.ask().server for opened in held] == servers
