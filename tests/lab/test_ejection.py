"""Backends that fail more than the others, with real ones: out, without a failure from then on, and back."""

import collections.abc
import json
import pathlib
import subprocess
import sys

import pytest

from lbproxy.lab import cluster, topology
from tests import polling
from tests.lab import agents, manifests, test_life, test_probes
from tests.lab.wire import wires

PODS = ("n1/p2", "n1/p3", "n2/p1")
CLIENT, OUTSIDE = "n1/p1", topology.OUTSIDE
# A time out that no test waits for, but where it is to end.
LONG, SHORT = "failures=3,window=5s,base=10m", "failures=3,window=3s,base=1s"
# A Service for each test: what is known of backends is known of each service port by itself.
ASKED = {
    "closed": LONG,
    "resets": LONG,
    "healing": SHORT,
    "half": LONG,
    "alike": LONG,
    "plain": "",
    "outside": f"{LONG},clients=all",
    "denied": LONG,
}
NUMBERS = {name: number for number, name in enumerate(ASKED, 1)}

# Answers as the lab's servers do, or resets whoever says something, or does not listen; and says which.
SERVER = """
import pathlib, socket, struct, sys, threading
name, told, port = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
def answer(one, what):
    with one:
        while one.recv(100):
            if what == "resets":
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            one.send(f"{name}\\n".encode())
listener = said = None
while True:
    what = told.read_text()
    if listener is None and what != "closed":
        both = {"family": socket.AF_INET6, "dualstack_ipv6": True}
        listener = socket.create_server(("::", port), backlog=999, **both)
        listener.settimeout(0.02)
    elif listener is not None and what == "closed":
        listener.close()
        listener = None
    if said != what:
        said = what
        print(said, flush=True)
    try:
        one = listener.accept()[0] if listener else None
    except TimeoutError:
        continue
    if one is None:
        threading.Event().wait(0.02)
    else:
        threading.Thread(target=answer, args=(one, what)).start()
"""


class Backends:
    """Servers that do as they are told."""

    def __init__(self, lab: cluster.Lab, folder: pathlib.Path) -> None:
        self._files = {pod: folder / pod.replace("/", "-") for pod in PODS}
        self._doing = dict.fromkeys(PODS, "closed")
        self._servers: dict[str, subprocess.Popen[str]] = {}
        for pod in PODS:
            self._files[pod].write_text(self._doing[pod])
            argv = [sys.executable, "-I", "-S", "-c", SERVER, pod, self._files[pod], manifests.TARGET_PORT]
            self._servers[pod] = lab.popen(pod, list(map(str, argv)), stdout=subprocess.PIPE)
            self._await(pod)
        self.do("answers", *PODS)

    def do(self, what: str, *pods: str) -> None:
        """Have them do so; returns once they all do: one that is late is no outlier of a test's making."""
        changed = [pod for pod in pods if self._doing[pod] != what]
        for pod in changed:
            self._doing[pod] = what
            draft = self._files[pod].with_suffix(".new")
            draft.write_text(what)
            draft.replace(self._files[pod])
        for pod in changed:
            self._await(pod)

    def _await(self, pod: str) -> None:
        said = self._servers[pod].stdout
        assert said is not None
        assert said.readline() == f"{self._doing[pod]}\n"


def annotated(name: str, text: str) -> manifests.Object:
    annotations = {"lbproxy.io/outlier-ejection": text} if text else {}
    return manifests.service(name, NUMBERS[name], ports=[manifests.HTTP], annotations=annotations)


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    objects: list[manifests.Object] = []
    for name, text in ASKED.items():
        slices = manifests.slices(name, [lab[pod] for pod in PODS], ports=[manifests.HTTP])
        objects += [annotated(name, text), *slices]
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


@pytest.fixture(scope="module")
def servers(lab: cluster.Lab, tmp_path_factory: pytest.TempPathFactory) -> Backends:
    return Backends(lab, tmp_path_factory.mktemp("backends"))


@pytest.fixture
def backends(servers: Backends) -> Backends:
    servers.do("answers", *PODS)
    return servers


@pytest.fixture(scope="module")
def agent(lab: cluster.Lab, api: agents.Api, servers: Backends) -> collections.abc.Iterator[agents.Agent]:
    assert servers
    flags = ("--metrics-bind-address", f"127.0.0.1:{test_probes.METRICS_PORT}")
    with agents.Agent(lab, api.source, *agents.SMALL_MAPS, *flags) as running:
        yield running


def connect(agent: agents.Agent, name: str, count: int, at: str = CLIENT) -> tuple[set[str], dict[str, int]]:
    """Make so many connections, one after another; who answered, and which failures there were."""
    address = manifests.cluster_ip(NUMBERS[name])
    found = agent.lab.client(at, "short", address, manifests.TCP_PORT, count=count).result()
    return set(found.servers), dict(found.failures)


def until_used(agent: agents.Agent, name: str, *pods: str, at: str = CLIENT) -> None:
    """Go on making connections until a service uses exactly these."""

    def used() -> bool:
        connect(agent, name, 30, at)
        return agent.backends(name) == set(pods)

    polling.eventually(used, what=f"{name} with {pods}")


def ejections(agent: agents.Agent, name: str) -> int:
    return sum(f"default/{name}:" in line and "is ejected" in line for line in agent.log.splitlines())


@pytest.mark.parametrize("what", ["closed", "resets"])
def test_who_fails_is_out_and_nothing_fails_any_more(
    agent: agents.Agent, api: agents.Api, backends: Backends, what: str
) -> None:
    bad, *good = PODS
    until_used(agent, what, *PODS)
    backends.do(what, bad)
    until_used(agent, what, *good)
    assert connect(agent, what, 300) == (set(good), {})
    assert "is ejected for 600 s: " in agent.says(f"default/{what}:")
    (row,) = (one for one in json.loads(agent.lbproxy("backends", what, "-o", "json")) if one["health"])
    assert (row["state"], row["health"]) == ("unhealthy", ["ejected"])
    metrics = test_probes.scraped(agent.lab)
    assert test_probes.values(metrics, "lbproxy_ejected_backends", f'service="{what}"') == [1]
    (total,) = test_probes.values(metrics, "lbproxy_ejections_total")
    assert total >= 1
    polling.eventually(
        lambda: any(one["action"] == "EjectOutlier" for one in test_life.events(api)), what="an Event"
    )
    # Nobody else has asked for it.
    assert agent.backends("plain") == set(PODS)

    # It survives the agent, and is gone with the annotation.
    agent.stop()
    agent.start()
    assert agent.backends(what) == set(good)
    api.put(annotated(what, ""))
    polling.eventually(lambda: agent.backends(what) == set(PODS), what="everyone")


def test_clients_elsewhere_find_out_as_well(
    agent: agents.Agent, lab: cluster.Lab, api: agents.Api, backends: Backends
) -> None:
    """By the packets that answer them: none of this node's sockets has connected to this Service."""
    bad, good, _ = PODS
    agent.says(": uplink by")
    # Those of this node, as nobody is masqueraded here: others would answer past it.
    for name in ("outside", "denied"):
        api.put(*manifests.slices(name, [lab[bad], lab[good]], ports=[manifests.HTTP]))
        agent.has_backends(name, {bad, good}, [("http", 4), ("http", 6)])
        address = manifests.cluster_ip(NUMBERS[name])
        wires.ip(lab, OUTSIDE, f"-4 route replace {address}/32 via {lab['n1'].address(4)}")
    until_used(agent, "outside", bad, good, at=OUTSIDE)
    backends.do("closed", bad)
    # Unless it is asked for they take no backend from this node's own clients: a policy may forbid them all.
    polling.eventually(lambda: sum(connect(agent, "denied", 60, OUTSIDE)[1].values()) >= 10, what="failures")
    until_used(agent, "outside", good, at=OUTSIDE)
    assert connect(agent, "outside", 300, OUTSIDE) == ({good}, {})
    # Both were judged at each look since.
    assert agent.backends("denied") == {bad, good}
    (row,) = (
        one
        for one in json.loads(agent.lbproxy("backends", "denied", "-o", "json"))
        if one["tcp_elsewhere"]["refused"]
    )
    assert (row["tcp"]["refused"], row["health"]) == (0, [])


def test_who_has_healed_is_back_after_its_time(agent: agents.Agent, backends: Backends) -> None:
    backends.do("closed", PODS[0])
    until_used(agent, "healing", *PODS[1:])
    backends.do("answers", PODS[0])
    until_used(agent, "healing", *PODS)
    assert "is back: its time is over" in agent.log
    assert connect(agent, "healing", 300) == (set(PODS), {})


def test_no_more_than_the_share_is_out(agent: agents.Agent, backends: Backends) -> None:
    backends.do("closed", *PODS[:2])
    polling.eventually(
        lambda: connect(agent, "half", 30) and ejections(agent, "half"), 30, what="an ejection"
    )
    for _ in range(3):
        connect(agent, "half", 60)
        assert len(agent.backends("half")) == 2
    assert ejections(agent, "half") == 1
    assert PODS[2] in agent.backends("half")


def test_where_all_fail_alike_nobody_is_out(agent: agents.Agent, backends: Backends) -> None:
    until_used(agent, "alike", *PODS)
    backends.do("closed", *PODS)
    before = agent.port("alike").connections
    polling.eventually(
        lambda: connect(agent, "alike", 60) and agent.port("alike").connections > before + 600,
        30,
        what="failures",
    )
    assert ejections(agent, "alike") == 0
    assert agent.backends("alike") == set(PODS)
