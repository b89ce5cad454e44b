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
DRAWN = 8000
OFF = 7 * 44  # seven standard deviations of the widest share, 5/8


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    objects = [
        changing(),
        *manifests.slices("changing", [lab[pod] for pod in PODS]),
        manifests.node("n1", lab["n1"].address(4), lab["n1"].address(6), zone="a"),
    ]
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


def changing(**annotations: str) -> manifests.Object:
    named = {f"lbproxy.io/{name.replace('_', '-')}": text for name, text in annotations.items()}
    return manifests.service("changing", CHANGING, annotations=named)


@pytest.fixture(autouse=True)
def _as_at_first(agent: agents.Agent, api: agents.Api) -> None:
    """Tests come in any order, and leave what they have changed."""
    api.put(*manifests.slices("changing", [agent.lab[pod] for pod in PODS]), changing())
    agent.has_backends("changing", set(PODS))
    equal = dict.fromkeys(PODS, 1)
    polling.eventually(lambda: weights_of(agent) == equal, what="equal weights")


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
            # What a Maglev table of 1,021 slots is off is little beside that.
            assert shares[pod] == pytest.approx(DRAWN * wanted[pod] / 8, abs=OFF)
        agent.says("'bad' names no address")
        # All that are left to choose from have the weight 0: they are equal.
        api.put(changing(algorithm=algorithm, weights="node:n1=0, node:n2=0"))
        polling.eventually(lambda: weights_of(agent) == dict.fromkeys(PODS, 1), what="equal weights")
        assert set(drawn(agent, 200)) == set(PODS)
        # No connection was moved, nor cut.
        assert [opened.ask().server for opened in held] == servers


def test_who_is_new_starts_slowly_and_at_once_when_that_is_taken_back(
    agent: agents.Agent, api: agents.Api
) -> None:
    everyone = [agent.lab[pod] for pod in PODS]
    api.put(*manifests.slices("changing", everyone[:3]), changing(slow_start="1h"))
    agent.has_backends("changing", set(PODS[:3]))
    api.put(*manifests.slices("changing", everyone))
    slow = dict.fromkeys(PODS[:3], 10) | {PODS[3]: 1}
    polling.eventually(lambda: weights_of(agent) == slow, what="a tenth of the weight")
    # 258 of 8,000 on average.
    assert drawn(agent)[PODS[3]] < DRAWN / 4 / 2
    api.put(changing())
    polling.eventually(lambda: weights_of(agent) == dict.fromkeys(PODS, 1), what="all of it")


def test_each_step_is_taken_by_itself(agent: agents.Agent, api: agents.Api) -> None:
    everyone = [agent.lab[pod] for pod in PODS]
    api.put(*manifests.slices("changing", everyone[:3]), changing(slow_start="1s"))
    agent.has_backends("changing", set(PODS[:3]))
    api.put(*manifests.slices("changing", everyone))
    agent.has_backends("changing", set(PODS))
    polling.eventually(lambda: weights_of(agent) == dict.fromkeys(PODS, 1), what="the end of the start")
    api.put(changing())


def test_a_zone_keeps_what_it_can_bear_and_the_rest_goes_elsewhere(
    agent: agents.Agent, api: agents.Api
) -> None:
    def put(*ready: bool) -> None:
        members = [manifests.Member(agent.lab[pod], up) for pod, up in zip(PODS, ready, strict=True)]
        listed = manifests.slices("changing", members)
        for slice_ in listed:
            for endpoint, zone in zip(slice_["endpoints"], "aabb", strict=True):
                endpoint["zone"] = zone
        api.put(*listed, changing(zone_spill_over="1.2"))

    put(True, True, True, True)
    agent.has_backends("changing", set(PODS[:2]))
    assert set(drawn(agent, 200)) == set(PODS[:2])
    put(True, False, True, True)
    # Half of the zone is left: it keeps 1.2 times that, and the others share the rest.
    agent.has_backends("changing", {PODS[0], *PODS[2:]})
    shares = drawn(agent)
    assert shares[PODS[0]] == pytest.approx(0.6 * DRAWN, abs=OFF)
    assert shares[PODS[2]] == pytest.approx(0.2 * DRAWN, abs=OFF)
    put(False, False, True, True)
    agent.has_backends("changing", set(PODS[2:]))


def test_no_connection_fails_while_everything_is_changed_again_and_again(
    agent: agents.Agent, api: agents.Api
) -> None:
    first, *_, last = (agent.lab[pod].ipv4 for pod in PODS)
    variants: list[dict[str, str]] = [
        {"algorithm": "maglev"},
        {"algorithm": "least-connections"},
        {"algorithm": "maglev", "weights": f"{first}=3"},
        {"algorithm": "least-connections", "weights": f"{last}=0"},
        {"weights": f"{first}=900, {last}=7"},
        {},
    ]
    with contextlib.ExitStack() as stack:
        # One by the socket, and one whose packets no hook has touched.
        held = [
            stack.enter_context(sockets.open(manifests.cluster_ip(CHANGING), 80))
            for sockets in (agent.at("n1/p3"), stack.enter_context(agent.lab.shell("n1/p3", cgroup=False)))
            for _ in range(4)
        ]
        servers = [opened.ask().server for opened in held]
        clients = [
            agent.lab.client("n1/p3", "short", manifests.cluster_ip(CHANGING), 80, cgroup=hooked)
            for hooked in (True, False)
        ]
        for variant in 3 * variants:
            api.put(changing(**variant))
            wanted = variant.get("algorithm", "random")
            polling.eventually(
                lambda wanted=wanted: agent.port("changing").algorithm.label == wanted,  # type: ignore[misc]
                what=wanted,
            )
        for client in clients:
            result = client.stop()
            assert result.failures == {}
            assert result.count > 0
        assert [opened.ask().server for opened in held] == servers
    assert agent.counter("bad_slot") == agent.counter("unsteady") == 0
