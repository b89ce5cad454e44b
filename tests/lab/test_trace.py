"""`lbproxy trace` on real sockets and packets: it tells what happens, and changes nothing."""

import collections.abc
import contextlib
import io
import json
import os
import signal
import subprocess
import typing

import pytest

from lbproxy.core import tables
from lbproxy.kernel import device_links, libbpf, observers, programs
from lbproxy.lab import cluster, netns, shell
from tests import polling
from tests.lab import agents, manifests

PODS = ("n1/p2", "n2/p1")
AGENT_FLAGS = ("--cluster-cidr=10.244.0.0/16,fd00:244::/32",)
NODE_PORT = 30080
HTTP = manifests.HTTP
RANGED, LOCAL, EMPTY, DSR = (f"203.0.113.{number}" for number in (1, 3, 4, 6))
# Far more than a machine takes for one connection, far less than a test may take.
LONG = ("--for", "120", "-o", "json")
Told = list[dict[str, typing.Any]]


def balancer(address: str, **spec: typing.Any) -> dict[str, typing.Any]:
    return {"load_balancer": [{"ip": address}], "type": "LoadBalancer", **spec}


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    here, there = (lab[pod] for pod in PODS)
    closed = HTTP._replace(target=9)
    ranges = ["172.18.0.2/32"]
    objects = [
        manifests.node("n1", str(lab["n1"].ipv4), str(lab["n1"].ipv6)),
        manifests.service("web", 1, ports=[HTTP.on_node_port(NODE_PORT), manifests.DNS]),
        *manifests.slices("web", [there]),
        manifests.service("ranged", 2, ports=[HTTP], **balancer(RANGED, loadBalancerSourceRanges=ranges)),
        *manifests.slices("ranged", [here], ports=[HTTP]),
        manifests.service("local", 3, ports=[HTTP], **balancer(LOCAL, externalTrafficPolicy="Local")),
        *manifests.slices("local", [there], ports=[HTTP]),
        manifests.service("empty", 4, ports=manifests.BOTH, **balancer(EMPTY)),
        manifests.service("inside", 5, ports=[HTTP], internalTrafficPolicy="Local"),
        *manifests.slices("inside", [there], ports=[HTTP]),
        manifests.service("dsr", 6, ports=[HTTP], annotations={"lbproxy.io/mode": "dsr"}, **balancer(DSR)),
        *manifests.slices("dsr", [there], ports=[HTTP]),
        manifests.service("closed", 7, ports=[closed]),
        *manifests.slices("closed", [there], ports=[closed]),
    ]
    with agents.Api(lab.netns("n1"), *objects) as running:
        for place in ("outside", "n2"):
            for network in ("10.96.0.0/16", "203.0.113.0/24"):
                via = ["via", str(lab["n1"].ipv4)]
                lab.check_output(place, ["ip", "route", "add", network, *via], cgroup=False)
        yield running


class Tracing:
    """`lbproxy trace` beside an agent, from when it watches."""

    def __init__(self, agent: agents.Agent, *arguments: str) -> None:
        argv = [*agents.LBPROXY, "trace", "--bpffs", str(agent.root), *LONG, *arguments]
        self.process = agent.lab.popen(agent.node, argv, cgroup=False, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.told: Told = [json.loads(self.process.stdout.readline())]
        assert self.told[0]["event"] == "begin"

    def until(self, event: str, count: int = 1) -> Told:
        """Read until so many such lines have come."""
        assert self.process.stdout is not None
        while sum(line["event"] == event for line in self.told) < count:
            line = self.process.stdout.readline()
            assert line, self.told
            self.told.append(json.loads(line))
        return self.told

    def leave(self) -> None:
        """Wait until it has ended, whatever it still says: a killed one may end within a letter."""
        typing.cast("io.TextIOWrapper", self.process.stdout).buffer.read()
        self.process.wait(polling.TIMEOUT_S)

    def end(self) -> Told:
        """End it, and read the rest."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.stdout is not None
        self.told += [json.loads(line) for line in self.process.stdout]
        assert self.process.wait(polling.TIMEOUT_S) == 0
        return self.told


@contextlib.contextmanager
def tracing(agent: agents.Agent, *arguments: str) -> collections.abc.Iterator[Tracing]:
    running = Tracing(agent, *arguments)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()
        assert running.process.stdout is not None
        running.process.stdout.close()


def verdicts(told: Told) -> Told:
    return [line for line in told if line["event"] == "verdict"]


def attached(lab: cluster.Lab, agent: agents.Agent) -> dict[str, int]:
    """How many programs are at each hook that trace uses."""

    def devices() -> dict[str, int]:
        held = device_links.DeviceLinks(agent.root / "links").held()
        return {
            f"{one.attachment.ifindex} {way}": len(libbpf.attached(one.attachment.ifindex, way)[1])
            for one in held
            for way in (libbpf.TCX_INGRESS, libbpf.TCX_EGRESS)
        }

    found = netns.inside(lab.netns(agent.node), devices)
    fd = os.open(agent.cgroup, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for program in observers.SOCKET:
            found[program.name] = len(libbpf.attached(fd, program.attach_type)[1])
    finally:
        os.close(fd)
    return found


def patience_s(verdict: str) -> float:
    """How long to wait for an answer: for one that never comes, not long."""
    return 0.5 if verdict == "dropped" else shell.TIMEOUT_S


# --- what it tells ---


def test_sockets_are_told_of_from_connect_to_close(lab: cluster.Lab, agent: agents.Agent) -> None:
    client, server = str(lab["n1/p1"].ipv4), f"{lab['n2/p1'].ipv4}:8080"
    with tracing(agent, "--service", "default/web") as trace:
        assert agent.at("n1/p1").tcp("10.96.0.1", 80).server == "n2/p1"
        trace.until("closing")
        told = trace.end()
    mine = [line for line in told if line.get("where") == "socket"]
    # The application is told, and may go on, before the others are.
    assert [line["event"] for line in mine] == ["chosen", "syn", "established", "release", "closing"]
    assert (mine[0]["destination"], mine[0]["new_destination"]) == ("10.96.0.1:80", server)
    assert mine[0]["service"] == "default/web:http"
    assert mine[0]["process"].startswith("python")
    assert mine[1]["source"].startswith(f"{client}:")
    assert mine[4]["sent_bytes"] == 3
    seen = {(line["where"], line["destination"]) for line in told if line["event"] == "packet"}
    assert {("cni0 in", server), ("eth0 out", server)} <= seen
    (outcome,) = verdicts(told)
    assert (outcome["verdict"], outcome["backend"]) == ("balanced", server)
    assert told[-1] == {"event": "end", "lines": len(told) - 3, "lost": 0, "full": False}


@pytest.mark.parametrize(
    ("address", "port", "udp", "verdict", "words"),
    [
        ("10.96.0.4", 80, False, "refused", "no backend is usable"),
        ("10.96.0.4", 53, True, "refused", "no backend is usable"),
        ("10.96.0.5", 80, False, "dropped", "none that the traffic policy allows"),
        ("10.96.0.7", 80, False, "refused", ""),
        ("10.96.0.1", 53, True, "balanced", ""),
        ("fd00:96::1", 80, False, "balanced", ""),
        ("10.244.2.2", 8080, False, "untouched", "not a service address"),
    ],
)
def test_what_becomes_of_a_pods_connection(
    agent: agents.Agent, address: str, port: int, udp: bool, verdict: str, words: str
) -> None:
    with tracing(agent, "--to", address) as trace:
        at = agent.at("n1/p1")
        ask = at.udp if udp else at.tcp
        answer = ask(address, port, timeout_s=patience_s(verdict))
        trace.until("release")
        (outcome,) = verdicts(trace.end())
    assert outcome["verdict"] == verdict, outcome
    assert bool(answer.server) == (verdict in ("balanced", "untouched")), answer
    assert words in outcome.get("reason", ""), outcome
    if address == "10.96.0.7":
        assert outcome["text"].endswith("refused by 10.244.2.2:9 itself")


def test_why_nothing_is_begun_while_the_node_is_given_back(agent: agents.Agent) -> None:
    agent.maps.apply([tables.handover(tables.Handover.RETURN, 1)])
    try:
        with tracing(agent, "--to", "10.96.0.1") as trace:
            # Nobody else is here to have it.
            assert not agent.at("n1/p1").udp("10.96.0.1", 53, timeout_s=0.2).server
            trace.until("untouched")
            outcome, *_ = verdicts(trace.end())
    finally:
        agent.maps.apply([tables.handover(tables.Handover.RETURN, 0)])
    assert outcome["text"].startswith("left as it is, for the node is given back (`lbproxy migrate return`)")
    assert (outcome["verdict"], outcome["reason"]) == ("untouched", "it is left to the proxy that comes next")


@pytest.mark.parametrize(
    ("address", "port", "udp", "verdict", "words"),
    [
        ("172.18.0.1", NODE_PORT, False, "balanced", ""),
        (EMPTY, 80, False, "refused", "told so with a TCP RST"),
        (EMPTY, 53, True, "refused", "told so with ICMP"),
        (RANGED, 80, False, "dropped", "loadBalancerSourceRanges"),
        (LOCAL, 80, False, "dropped", "none that the traffic policy allows"),
        (DSR, 80, False, "balanced", ""),
    ],
)
def test_what_becomes_of_packets_from_outside(
    lab: cluster.Lab, agent: agents.Agent, address: str, port: int, udp: bool, verdict: str, words: str
) -> None:
    source = str(lab["outside"].ipv4)
    with tracing(agent, "--to", f"{address}:{port}", "--from", source) as trace:
        with lab.shell("outside", cgroup=False) as at:
            ask = at.udp if udp else at.tcp
            answer = ask(address, port, timeout_s=patience_s(verdict))
        # What does not come out is told of a moment later, and there is no more to wait for.
        first = {"refused": "answered", "dropped": "not-passed-on"}.get(verdict, "packet")
        told = trace.until(first)
        told = trace.end()
    (outcome,) = verdicts(told)
    assert outcome["verdict"] == verdict, (outcome, answer)
    assert words in outcome.get("reason", ""), outcome
    assert outcome["source"].startswith(f"{source}:")
    if address == "172.18.0.1":
        seen_as, seen_port = answer.seen or ("", 0)
        assert outcome["masqueraded_as"] == f"{seen_as}:{seen_port}"
        assert outcome["backend"] == f"{lab['n2/p1'].ipv4}:8080"
        assert "masqueraded" in outcome["flow"]
        assert outcome["text"].count("established") == 1
    if address == DSR:
        assert f"inside another packet to {lab['n2/p1'].ipv4}" in told[1]["text"]


def test_only_what_was_asked_for_is_followed(lab: cluster.Lab, agent: agents.Agent) -> None:
    pod = str(lab["n1/p1"].ipv4)
    with (
        tracing(agent, "--service", "default/web:http", "--from", pod) as of_pod,
        tracing(agent, "--from", "node") as of_node,
        tracing(agent, "--count", "1") as of_all,
    ):
        assert of_pod.told[0]["scope"] == f"to default/web:http from {pod}"
        for where in ("n1/p1", "n1/p2", "n1"):
            agent.at(where).tcp("10.96.0.1", 80)
            agent.at(where).udp("10.96.0.1", 53)
        agent.at("n1/p1").tcp("10.96.0.7", 80)
        of_pod.until("closing")
        of_node.until("release", 2)
        of_all.until("end")
        assert of_all.process.wait(polling.TIMEOUT_S) == 0
        assert (of_all.told[-1]["lines"], of_all.told[-1]["full"]) == (1, True)
        (outcome,) = verdicts(of_pod.end())
        assert outcome["source"].startswith(f"{pod}:")
        outcomes = verdicts(of_node.end())
    assert [one["protocol"] for one in outcomes] == ["TCP", "UDP"]
    assert {line["text"].split("]")[1].split()[1] for line in of_node.told if line["event"] == "chosen"} == {
        "the"
    }


def test_what_is_too_much_is_counted_and_not_told(agent: agents.Agent) -> None:
    with contextlib.ExitStack() as stack:
        # Open for as long as it goes on: the end of one whose beginning is not told is told of in no line.
        asking = [stack.enter_context(agent.at("n1/p1").socket()) for _ in range(50)]
        with tracing(agent, "--rate", "1", "--to", "10.96.0.4:80") as trace:
            for one in asking:
                with pytest.raises(ConnectionRefusedError):
                    one.connect("10.96.0.4", 80)
            trace.until("refused")
            told = trace.end()
    assert told[-1]["lost"] > 0
    assert told[-1]["lost"] + told[-1]["lines"] == len(asking)


# --- what it leaves alone ---


def test_traffic_does_not_notice_however_tracing_ends(lab: cluster.Lab, agent: agents.Agent) -> None:
    before = attached(lab, agent)
    assert all(count >= 1 for name, count in before.items() if " " in name)
    address = manifests.cluster_ip(1)
    clients = [
        lab.client("n1/p1", "short", address, 80, timeout_s=5, pause_s=agents.STORM_PAUSE_S),
        lab.client("n1", "udp-new", address, 53, timeout_s=5, pause_s=agents.STORM_PAUSE_S),
        lab.client(
            *("outside", "short", str(lab["n1"].ipv4), NODE_PORT),
            cgroup=False,
            timeout_s=5,
            pause_s=agents.STORM_PAUSE_S,
        ),
    ]
    try:
        for number in range(4):
            with tracing(agent, "--count", "1000000", "--rate", "200") as trace:
                trace.until("packet", 20)
                assert attached(lab, agent) == {name: count + _added(name) for name, count in before.items()}
                if number % 2:
                    trace.process.send_signal(signal.SIGTERM)
                else:
                    trace.process.kill()
                trace.leave()
            polling.eventually(lambda: attached(lab, agent) == before, what="observers gone")
    finally:
        results = [client.stop() for client in clients]
    assert [result.failures for result in results] == [{}] * len(clients)
    assert all(result.count > 100 for result in results)


def _added(hook: str) -> int:
    return 2 if " " in hook else 1


def test_a_service_that_is_not_there_is_an_error(agent: agents.Agent) -> None:
    argv = [*agents.LBPROXY, "trace", "--bpffs", str(agent.root), "--service", "default/nothing"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no ports of a Service default/nothing here" in done.stderr


def test_no_hook_of_the_datapath_is_an_observers(agent: agents.Agent) -> None:
    names = {program.name for program in programs.PROGRAMS}
    assert not names & {program.name for program in observers.all_programs()}
