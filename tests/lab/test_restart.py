"""Agents come and go, and connections never notice."""

import collections.abc
import contextlib
import pathlib
import signal
import subprocess

import pytest

from lbproxy import abi
from lbproxy.core import inventory
from lbproxy.lab import cluster, shell
from tests import polling
from tests.lab import agents, manifests

WEB, STICKY = 1, range(10, 22)
PODS = ("n1/p2", "n2/p1")
TCP, UDP = manifests.TCP_PORT, manifests.UDP_PORT


def sticky(number: int) -> str:
    return f"sticky-{number}"


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    everyone = [lab[pod] for pod in PODS]
    objects = [manifests.service("web", WEB), *manifests.slices("web", everyone)]
    for number in STICKY:
        objects.append(manifests.service(sticky(number), number, **manifests.affinity(10800)))
        objects += manifests.slices(sticky(number), everyone)
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


@pytest.fixture(scope="module")
def servers(lab: cluster.Lab) -> None:
    for pod in PODS:
        lab.serve(pod)


@pytest.fixture(scope="module")
def shared(lab: cluster.Lab, api: agents.Api, servers: None) -> collections.abc.Iterator[agents.Agent]:
    # What the tests take away from sockets is not to be made up for by packets being served.
    with agents.Agent(lab, api.source, *agents.SMALL_MAPS, "--packet-path=false") as running:
        yield running


@pytest.fixture
def agent(shared: agents.Agent) -> collections.abc.Iterator[agents.Agent]:
    """The same agent for all; it runs, as it did at first, before and after each test."""
    flags, cgroup = shared.flags, shared.cgroup
    yield shared
    if (shared.flags, shared.cgroup) != (flags, cgroup) and shared.process is not None:
        shared.stop()
    shared.flags, shared.cgroup = flags, cgroup
    if shared.process is None:
        shared.start()


def chosen(agent: agents.Agent) -> list[tuple[str, str]]:
    """Where the pod and the node are remembered, service by service."""
    found = []
    for number in STICKY:
        pod = agent.at("n1/p1").tcp(manifests.cluster_ip(number), TCP)
        node = agent.at("n1").udp(manifests.cluster_ip(number, 6), UDP, connected=False)
        found.append((pod.server, node.server))
    assert all(server for pair in found for server in pair)
    return found


def untouched(agent: agents.Agent, where: str, number: int = WEB) -> bool:
    """Whether the service's address is left alone: nobody has it."""
    answer = agent.at(where).tcp(manifests.cluster_ip(number), TCP, timeout_s=0.2)
    assert answer.error in ("", "ETIMEDOUT")
    return answer.error == "ETIMEDOUT"


def served(agent: agents.Agent, where: str, number: int = WEB) -> bool:
    """Whether somebody answers at the service's address, however late."""
    answer = agent.at(where).tcp(manifests.cluster_ip(number), TCP)
    assert answer.error in ("", "ETIMEDOUT")
    return not answer.error


@contextlib.contextmanager
def held_sockets(agent: agents.Agent, each: int = 10) -> collections.abc.Iterator[None]:
    """Keep sockets of every kind open, and see at the end that none has lost its peer or its backend."""
    with contextlib.ExitStack() as stack:
        held: list[tuple[shell.Socket, tuple[str, int], str]] = []
        unconnected: list[tuple[shell.Socket, tuple[str, int], str]] = []
        for where in ("n1/p1", "n1"):
            sockets = stack.enter_context(agent.lab.shell(where))
            for family in (4, 6):
                address = manifests.cluster_ip(WEB, family)
                for _ in range(each):
                    tcp, udp = sockets.open(address, TCP), sockets.open(address, UDP, udp=True)
                    held.append((tcp, (address, TCP), tcp.ask().server))
                    held.append((udp, (address, UDP), udp.ask().server))
                    free = sockets.socket(family, udp=True)
                    unconnected.append((free, (address, UDP), ask(free, address)))
        yield
        for opened, peer, server in held:
            answer = opened.ask()
            assert (answer.peer, answer.server) == (peer, server)
        for opened, (address, _), server in unconnected:
            assert ask(opened, address) == server


def ask(opened: shell.Socket, address: str) -> str:
    opened.sendto(b"?\n", address, UDP)
    data, sender = opened.recvfrom()
    assert sender == (address, UDP)
    return shell.parse_identity(data)[0]


def test_a_killed_agent_is_not_missed(agent: agents.Agent) -> None:
    programs, before = agent.program_ids(), chosen(agent)
    with agents.storm(agent.lab, WEB), held_sockets(agent, each=2):
        for _ in range(5):
            agent.serves_on("web")
            agent.kill()
            agent.serves_on("web")
            agent.start()
            assert "datapath adopted" in agent.log
            assert agent.program_ids() == programs
        agent.serves_on("web")
    assert chosen(agent) == before
    polling.eventually(lambda: agent.live_sockets() == 0, what="rows given back")


@pytest.mark.parametrize(
    ("first", "then"),
    [
        # Smaller: two sockets of the old table may want the same row of the new one.
        (("sockets=4096", "affinity=1024"), ("sockets=64", "affinity=4096", "frontends=300000")),
        (("sockets=64",), ("sockets=4096", "socket_spill=1024", "slots=32768", "affinity=512")),
    ],
    ids=["shrink", "grow"],
)
def test_an_upgrade_carries_everything_over(
    agent: agents.Agent, first: tuple[str, ...], then: tuple[str, ...]
) -> None:
    base = agent.flags
    agent.stop()
    agent.flags = [*base, *rows(first)]
    agent.start()
    programs, before = agent.program_ids(), chosen(agent)
    counted = agent.port("web").connections
    with agents.storm(agent.lab, WEB), held_sockets(agent):
        agent.serves_on("web")
        agent.stop()
        agent.flags = [*base, *rows(first), *rows(then)]
        agent.start()
        assert "datapath replaced" in agent.log
        # The old programs are gone from their hooks, all of them.
        assert not set(programs.values()) & set(agent.program_ids().values())
        for size in then:
            name, _, number = size.partition("=")
            assert agent.maps.rows_of(name) == int(number)
        agent.serves_on("web")
    assert chosen(agent) == before
    assert agent.port("web").connections > counted
    assert agent.counter("bad_slot") == agent.counter("spill_failed") == 0
    polling.eventually(lambda: agent.live_sockets() == 0, what="rows given back")


def rows(sizes: tuple[str, ...]) -> list[str]:
    """The flags for these sizes of maps."""
    return [word for size in sizes for word in ("--map-rows", size)]


def test_an_interrupted_upgrade_is_finished_by_the_next_agent(agent: agents.Agent) -> None:
    with agents.storm(agent.lab, WEB):
        agent.stop()
        base = agent.flags
        # Ended when the first map is pinned, when the compiler starts, and when a program is pinned.
        making, compiling, loading = ("maps", 1), ("maps", len(abi.MAPS)), ("programs", 1)

        def start_and_kill(kind: str, count: int) -> None:
            # What the one before has left behind is no sign of this one.
            left = pins(agent, kind)
            agent.start(wait=False)
            # As long as a start may take: it compiles.
            polling.eventually(lambda: len(pins(agent, kind) - left) >= count, what="the moment to end it")
            agent.kill()

        for attempt, moment in enumerate((making, compiling, loading, compiling)):
            agent.flags = [*base, "--map-rows", f"sockets={128 << attempt}"]
            start_and_kill(*moment)
            agent.serves_on("web")
        # The same sizes again: nothing that the last one left running comes in between.
        agent.start()
        assert "datapath replaced" in agent.log
        assert agent.maps.rows_of("sockets") == 1024
        assert leftovers(agent) == []
        agent.serves_on("web")
        agent.stop()
        # An upgrade that is given up leaves nothing behind either.
        upgraded, agent.flags = agent.flags, base
        start_and_kill(*making)
        agent.flags = upgraded
        agent.start()
        assert "datapath adopted" in agent.log
        assert leftovers(agent) == []
        agent.serves_on("web")


def pins(agent: agents.Agent, kind: str) -> set[tuple[str, int]]:
    """The pinned maps or programs of all generations, by path and inode."""
    found = set()
    # The agent removes some while we look.
    with contextlib.suppress(FileNotFoundError):
        for path in (agent.root / "generations").glob(f"*/{kind}/*"):
            found.add((str(path), path.stat().st_ino))
    return found


def leftovers(agent: agents.Agent) -> list[pathlib.Path]:
    """Pins that are no part of the datapath."""
    current = (agent.root / "current").resolve()
    others = [path for path in (agent.root / "generations").iterdir() if path != current]
    return [*others, *agent.root.glob("**/new_*")]


def test_an_impatient_signal_changes_nothing(agent: agents.Agent) -> None:
    process = agent.process
    assert process is not None
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
    assert agent.wait() == 0
    assert "Traceback" not in agent.log
    agent.start()


def test_ending_an_agent_leaves_the_datapath_serving(agent: agents.Agent) -> None:
    with agents.storm(agent.lab, WEB):
        agent.serves_on("web")
        assert agent.stop() == 0
        assert "the datapath goes on serving" in agent.log
        agent.serves_on("web", more=200)


@pytest.mark.usefixtures("spare_cache")
def test_cleanup_leaves_no_trace(agent: agents.Agent) -> None:
    with agent.at("n1/p1").open(manifests.cluster_ip(WEB), TCP) as held:
        running = subprocess.run(
            agent.lab.command("n1", [*agents.LBPROXY, "cleanup", "--bpffs", str(agent.root)], cgroup=False),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (running.returncode, len(running.stderr.splitlines())) == (1, 1)
        assert served(agent, "n1/p1")
        agent.stop()
        agent.reopen()
        assert "removed" in agent.lbproxy("cleanup")
        assert not agent.root.exists()
        for where in ("n1/p1", "n1"):
            polling.eventually(lambda where=where: untouched(agent, where), what="no hooks")  # type: ignore[misc]
        # What was connected stays so.
        held.send(b"?\n")
        assert held.recv()
    assert "nothing to remove" in agent.lbproxy("cleanup")
    agent.start()
    assert "datapath created" in agent.log
    assert served(agent, "n1/p1")


def test_the_hooks_move_to_another_cgroup(agent: agents.Agent) -> None:
    whole, pods = agent.cgroup, agent.lab.cgroup("n1/p1")
    client = agent.lab.client("n1/p1", "short", manifests.cluster_ip(WEB), TCP)
    for group, node_is_left_alone in ((pods, True), (whole, False)):
        agent.serves_on("web")
        agent.stop()
        agent.cgroup = group
        agent.start()
        assert "datapath relinked" in agent.log
        assert served(agent, "n1") != node_is_left_alone
        assert served(agent, "n1/p1")
    assert client.stop().failures == {}


def test_a_hook_that_was_taken_away_is_put_back_at_start(agent: agents.Agent) -> None:
    agent.stop()
    for name in agent.program_ids():
        if name.endswith("connect4"):
            (agent.root / "links" / name).unlink()
    polling.eventually(lambda: untouched(agent, "n1/p1"), what="no hook")
    agent.start()
    assert "datapath relinked" in agent.log
    assert served(agent, "n1/p1")


def test_a_backend_goes_and_comes_back_unnoticed(agent: agents.Agent, api: agents.Api) -> None:
    lab = agent.lab
    remote = lab.serve("n2/p2")
    try:
        trio = [lab[place] for place in (*PODS, "n2/p2")]
        with agents.storm(lab, WEB):
            for _ in range(3):
                api.put(*manifests.slices("web", trio))
                agent.has_backends("web", {place.name for place in trio})
                agent.serves_on("web", more=200)
                api.put(*manifests.slices("web", trio[:2]))
                agent.has_backends("web", set(PODS))
                agent.has_seen_off("web")
                remote.stop()
                agent.serves_on("web", more=200)
                remote = lab.serve("n2/p2")
    finally:
        remote.stop()
        api.put(*manifests.slices("web", [lab[pod] for pod in PODS]))


def test_a_started_agent_catches_up(agent: agents.Agent, api: agents.Api) -> None:
    leaving = manifests.service("leaving", 30)
    slices = manifests.slices("leaving", [agent.lab["n1/p2"]])
    coming, moved = manifests.service("coming", 31), manifests.slices("web", [agent.lab["n2/p1"]])
    api.put(leaving, *slices)
    agent.has_backends("leaving", {"n1/p2"})
    agent.stop()
    try:
        api.delete(leaving, *slices)
        api.put(coming, *manifests.slices("coming", [agent.lab["n1/p2"]]), *moved)
        assert served(agent, "n1/p1", 30)
        # While nothing can be listed, nothing is taken away either.
        api.do(lambda server: setattr(server.faults, "fail", 1000))
        agent.start(wait=False)
        agent.says("500")
        assert served(agent, "n1/p1", 30)
        api.do(lambda server: setattr(server.faults, "fail", 0))
        agent.wait_ready()
        agent.has_backends("web", {"n2/p1"})
        agent.has_backends("coming", {"n1/p2"})
        assert agent.ports("leaving") == {}
        assert untouched(agent, "n1/p1", 30)
        assert {agent.at("n1").tcp(manifests.cluster_ip(WEB), TCP).server for _ in range(20)} == {"n2/p1"}
        assert agent.at("n1/p1").tcp(manifests.cluster_ip(31), TCP).server == "n1/p2"
        polling.eventually(lambda: not inventory.read(agent.maps).orphans, what="no orphans")
    finally:
        api.do(lambda server: setattr(server.faults, "fail", 0))
        api.delete(coming, *manifests.slices("coming", []))
        api.put(*manifests.slices("web", [agent.lab[pod] for pod in PODS]))


def test_an_api_server_that_goes_away_is_waited_for(lab: cluster.Lab, servers: None) -> None:
    objects = [manifests.service("web", WEB), *manifests.slices("web", [lab["n1/p2"]])]
    with contextlib.ExitStack() as stack:
        api = agents.Api(lab.netns("n2"), *objects, port=7443)
        with api:
            agent = stack.enter_context(agents.Agent(lab, api.source, *agents.SMALL_MAPS, node="n2"))
        agent.says("next attempt")
        assert {agent.at("n2/p2").tcp(manifests.cluster_ip(WEB), TCP).server for _ in range(5)} == {"n1/p2"}
        # When it is back, something has changed, and versions have gone on.
        objects[1:] = manifests.slices("web", [lab["n2/p1"]])
        with agents.Api(lab.netns("n2"), *objects * 10, port=7443):
            agent.has_backends("web", {"n2/p1"})
            assert agent.at("n2/p2").tcp(manifests.cluster_ip(WEB), TCP).server == "n2/p1"


def test_a_second_agent_on_the_same_pins_says_so_and_ends(agent: agents.Agent) -> None:
    second = subprocess.run(
        agent.lab.command("n1", agent.command("--healthz-bind-address", ""), cgroup=False),
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert second.returncode == 1
    (line,) = second.stderr.splitlines()
    assert "another lbproxy agent" in line
    assert str(agent.root) in line
    assert agent.running
    assert served(agent, "n1/p1")
