"""Direct server return with an agent on each node: n1 balances, the backends' nodes answer the client."""

import collections
import collections.abc
import contextlib
import errno
import json
import socket

import pytest

from lbproxy.core import outcomes, tables
from lbproxy.lab import cluster
from tests import counting, polling
from tests.lab import agents, manifests
from tests.lab.conftest import LabFactory
from tests.lab.wire import wires
from tests.lab.wire.conftest import CLUSTER_CIDR, no_icmp_rate_limits
from tests.lab.wire.ways import DEAD, TARGET, families
from tests.packets import packets

NODES = ("n1", "n2", "n3")
REMOTE = ("n2/p1", "n3/p1")
PODS = tuple(f"{node}/{pod}" for node in NODES for pod in ("p1", "p2"))
DIRECT, HOME, MASQUERADED, CHANGING = 30080, 30081, 30082, 30083
LATER = 100  # a NodePort further on: the same Service's dead port
ROOM = {4: 1480, 6: 1460}  # within 1500, behind the outer header
TUNNEL = {4: 4, 6: 41}
BULK = 20_000_000
MODE = "lbproxy.io/mode"


def ports(node_port: int, target: int = TARGET) -> list[manifests.Port]:
    return [
        manifests.HTTP._replace(node_port=node_port, target=target),
        manifests.DNS._replace(node_port=node_port, target=target),
        manifests.Port("dead", "TCP", 81, node_port + LATER, DEAD),
        manifests.Port("dead-dns", "UDP", 81, node_port + LATER, DEAD),
    ]


@pytest.fixture(scope="module")
def lab(build_lab: LabFactory) -> collections.abc.Iterator[cluster.Lab]:
    with build_lab(nodes=3, pods=2) as built:
        no_icmp_rate_limits(built)
        yield built


class Cluster:
    """The same objects for all agents."""

    def __init__(self, apis: list[agents.Api], nodes: dict[str, agents.Agent]) -> None:
        self.apis = apis
        self.agents = nodes

    def put(self, *objects: manifests.Object) -> None:
        for api in self.apis:
            api.put(*objects)

    def rows(self, node: str, port: int) -> int:
        """How many flows a node knows of that were dialled at this port."""
        found = self.agents[node].maps
        keys = [key for table in (tables.Table.FLOWS, tables.Table.FLOWS_NEW) for key, _ in found.rows(table)]
        return sum(tables.flow_key(key).dport == port.to_bytes(2, "big") for key in keys)


def service(name: str, number: int, node_port: int, mode: str = "") -> manifests.Object:
    annotations = {MODE: mode} if mode else {}
    return manifests.service(name, number, ports=ports(node_port), annotations=annotations)


def slices(lab: cluster.Lab, name: str, node_port: int, *pods: str) -> list[manifests.Object]:
    return manifests.slices(name, [lab[pod] for pod in pods], ports=ports(node_port))


@pytest.fixture(scope="module")
def nodes(lab: cluster.Lab) -> collections.abc.Iterator[Cluster]:
    objects = [
        *(manifests.node(node, *lab[node].addresses) for node in NODES),
        service("direct", 1, DIRECT),
        *slices(lab, "direct", DIRECT, *REMOTE),
        service("home", 2, HOME),
        *slices(lab, "home", HOME, "n1/p1"),
        service("masqueraded", 3, MASQUERADED, "snat"),
        *slices(lab, "masqueraded", MASQUERADED, *REMOTE),
        manifests.service("changing", 4, ports=[manifests.HTTP._replace(node_port=CHANGING)]),
        *manifests.slices("changing", [lab[pod] for pod in REMOTE]),
    ]
    flags = (*agents.SMALL_MAPS, "--cluster-cidr", CLUSTER_CIDR, "--mode", "dsr")
    with contextlib.ExitStack() as stack:
        apis = [stack.enter_context(agents.Api(lab.netns(node), *objects)) for node in NODES]
        started = {
            node: stack.enter_context(agents.Agent(lab, api.source, *flags, node=node))
            for node, api in zip(NODES, apis, strict=True)
        }
        yield Cluster(apis, started)


@pytest.fixture(scope="module", autouse=True)
def echoes(lab: cluster.Lab, nodes: Cluster) -> collections.abc.Iterator[dict[str, wires.Echo]]:
    with contextlib.ExitStack() as stack:
        yield {pod: stack.enter_context(wires.Echo(lab, pod, TARGET)) for pod in (*REMOTE, "n1/p1")}


def forget_paths(lab: cluster.Lab) -> None:
    for where in ("outside", *NODES, *PODS):
        for family in (4, 6):
            wires.ip(lab, where, f"-{family} route flush cache")


SENDERS = (("outside", "eth0"), *((pod, "eth0") for pod in REMOTE))
LAST_HOPS = (("fabric", "outside"), ("n2", "pod2"), ("n3", "pod2"))
ON_THE_WAY = (*((node, "eth0") for node in NODES),)


@families
@pytest.mark.parametrize(
    "devices", [SENDERS, LAST_HOPS, ON_THE_WAY], ids=["sender", "last hop", "on the way"]
)
def test_the_backends_node_answers(
    lab: cluster.Lab,
    nodes: Cluster,
    echoes: dict[str, wires.Echo],
    set_offload: collections.abc.Callable[..., None],
    devices: tuple[tuple[str, str], ...],
    family: int,
) -> None:
    set_offload(*devices)
    forget_paths(lab)
    client, node = lab["outside"].address(family), lab["n1"].address(family)
    for echo in echoes.values():
        echo.peers.clear()
    with contextlib.ExitStack() as stack:
        taps = {where: stack.enter_context(wires.Tap(lab, where)) for where in ("outside", "n1", *REMOTE)}
        for _ in range(12):
            wires.exchange(lab, "outside", node, DIRECT, 20_000)
            wires.ask(lab, "outside", node, DIRECT, 1200)
        assert all(set(echoes[pod].peers) == {client} for pod in REMOTE)
        mine = [one for one in taps["n1"].seen() if one.proto in (packets.TCP, packets.UDP) and node in one]
        mine = [one for one in mine if DIRECT in (one.sport, one.dport)]
        assert mine
        assert {(one.outgoing, one.dport) for one in mine} == {(False, DIRECT)}
        tunnelled = [one for one in taps["n1"].seen() if one.proto == TUNNEL[family]]
        assert {one.dst for one in tunnelled} == {lab[pod].address(family) for pod in REMOTE}
        assert {(one.outgoing, one.src) for one in tunnelled} == {(True, node)}
        if devices != ON_THE_WAY:
            for where in ("outside", *REMOTE):
                arrived = [one for one in taps[where].seen() if not one.outgoing and one.proto in (6, 17)]
                assert len(arrived) > 20
                assert [packets.wrong_checksums(one.frame) for one in arrived] == [[]] * len(arrived)
    assert nodes.rows("n1", DIRECT) == 0


@families
def test_what_does_not_fit_into_the_tunnel_is_reported(lab: cluster.Lab, family: int) -> None:
    forget_paths(lab)
    node = lab["n1"].address(family)
    with wires.Tap(lab, "outside") as at_client, wires.Tap(lab, "n1") as at_node:
        wires.exchange(lab, "outside", node, DIRECT, BULK)
        error = at_client.until(lambda one: one.icmp() is not None)
        assert max(one.length for one in at_node.seen() if one.proto == TUNNEL[family]) > 10_000
    assert error.icmp() == ((packets.ICMP, 3, 4) if family == 4 else (packets.ICMP6, 2, 0))
    assert int.from_bytes(error.body[4:8], "big") == ROOM[family]
    assert packets.wrong_checksums(error.frame) == []
    quoted = error.quoted()
    assert (quoted.src, quoted.dst, quoted.dport) == (lab["outside"].address(family), node, DIRECT)
    with wires.connect(lab, "outside", node, DIRECT) as later:
        assert wires.path_mtu(later) == ROOM[family]


@families
def test_datagrams_that_must_not_be_cut_are_refused_when_too_big(lab: cluster.Lab, family: int) -> None:
    forget_paths(lab)
    header = 28 if family == 4 else 48
    with wires.connect(lab, "outside", lab["n1"].address(family), DIRECT, socket.SOCK_DGRAM) as asking:
        wires.never_fragment(asking)
        asking.send(bytes(1500 - header))
        with pytest.raises(OSError, match="too long") as caught:
            asking.recv(1)
        assert caught.value.errno == errno.EMSGSIZE
        asking.send(bytes(ROOM[family] - header))
        assert asking.recv(65536) == bytes(ROOM[family] - header)


@families
def test_fragments_go_to_the_backend_of_the_first(lab: cluster.Lab, family: int) -> None:
    forget_paths(lab)
    node = lab["n1"].address(family)
    # Pieces as long as the way outside are too long for the tunnel: so the client learns.
    with wires.connect(lab, "outside", node, DIRECT, socket.SOCK_DGRAM) as asking:
        asking.send(bytes(8000))
        polling.eventually(lambda: wires.path_mtu(asking) == ROOM[family], what="the path's MTU")
    for _ in range(8):
        wires.ask(lab, "outside", node, DIRECT, 8000)


@families
def test_a_backend_here_sees_its_client_too(
    lab: cluster.Lab, echoes: dict[str, wires.Echo], family: int
) -> None:
    client, node = lab["outside"].address(family), lab["n1"].address(family)
    echoes["n1/p1"].peers.clear()
    wires.exchange(lab, "outside", node, HOME, BULK)
    wires.ask(lab, "outside", node, HOME, 8000)
    assert echoes["n1/p1"].peers == {client: 2}


@families
def test_an_annotation_chooses_for_its_service(
    lab: cluster.Lab, nodes: Cluster, echoes: dict[str, wires.Echo], family: int
) -> None:
    node = lab["n1"].address(family)

    def seen() -> set[str]:
        for pod in REMOTE:
            echoes[pod].peers.clear()
        wires.exchange(lab, "outside", node, MASQUERADED, 1000)
        wires.ask(lab, "outside", node, MASQUERADED, 100)
        return {peer for pod in REMOTE for peer in echoes[pod].peers}

    def become(mode: str, sees: str) -> None:
        nodes.put(service("masqueraded", 3, MASQUERADED, mode))

        def settled() -> bool:
            for pod in REMOTE:
                echoes[pod].peers.clear()
            # Nodes take it up one after the other, and what comes in between may be lost.
            with contextlib.suppress(TimeoutError):
                for _ in range(8):
                    wires.ask(lab, "outside", node, MASQUERADED, 100, patience_s=0.3)
                return {peer for pod in REMOTE for peer in echoes[pod].peers} == {sees}
            return False

        polling.eventually(settled, what=f"{sees} as the client")
        assert seen() == {sees}

    assert seen() == {node}
    try:
        become("dsr", lab["outside"].address(family))
    finally:
        become("snat", node)


@families
def test_errors_reach_the_other_end(lab: cluster.Lab, family: int) -> None:
    client, node = lab["outside"].address(family), lab["n1"].address(family)
    dead = DIRECT + LATER
    for _ in range(4):
        with pytest.raises(ConnectionRefusedError):
            wires.connect(lab, "outside", node, dead)
        with wires.connect(lab, "outside", node, dead, socket.SOCK_DGRAM) as asking:
            asking.send(b"anybody?")
            with pytest.raises(ConnectionRefusedError):
                asking.recv(1)
    # And from a client that has gone: to the service's address, so to a node that has no row.
    with contextlib.ExitStack() as stack:
        listening = [
            stack.enter_context(wires.open_socket(lab, pod, family, socket.SOCK_DGRAM)) for pod in REMOTE
        ]
        for pod, backend in zip(REMOTE, listening, strict=True):
            backend.bind((lab[pod].address(family), DEAD))
        for _ in range(4):
            with wires.connect(lab, "outside", node, dead, socket.SOCK_DGRAM) as asking:
                asking.send(b"anybody?")
                backend, peer = wires.receive_any(listening)
            assert peer[0] == client
            backend.connect(peer)
            backend.send(b"me")
            with pytest.raises(ConnectionRefusedError):
                backend.recv(1)
            wires.disconnect(backend)


Counts = dict[str, collections.Counter[str]]


def fared(nodes: Cluster, family: int) -> Counts:
    """How connections of clients elsewhere to the two backends have ended, by the node that counts them."""
    found: Counts = {node: collections.Counter() for node in NODES}
    for node, agent in nodes.agents.items():
        for port in ("http", "dead"):
            for backend in agent.port("direct", port, family).backends:
                found[node].update(counting.counts_of(backend.fared.elsewhere))
                assert backend.fared.node == outcomes.Outcomes()
    return found


def together(after: Counts, before: Counts) -> dict[str, int]:
    """What all nodes have counted meanwhile: those of the backends alone."""
    new = {node: after[node] - before[node] for node in NODES}
    assert not new["n1"]
    return dict(sum(new.values(), collections.Counter()))


@families
def test_the_backends_nodes_count_how_connections_fare(
    lab: cluster.Lab, nodes: Cluster, echoes: dict[str, wires.Echo], family: int
) -> None:
    client, node = lab["outside"].address(family), lab["n1"].address(family)
    before = fared(nodes, family)
    for _ in range(6):
        wires.exchange(lab, "outside", node, DIRECT, 20_000)
        with pytest.raises(ConnectionRefusedError):
            wires.connect(lab, "outside", node, DIRECT + LATER)
    answered = fared(nodes, family)
    assert together(answered, before) == {"established": 6, "refused": 6}
    # Nobody answers: the client asks again after a second, and counts once.
    for pod in REMOTE:
        wires.ip(lab, pod, f"route add blackhole {client}")
    try:
        with wires.open_socket(lab, "outside", family, socket.SOCK_STREAM) as waiting:
            waiting.setblocking(False)
            assert waiting.connect_ex((node, DIRECT)) == errno.EINPROGRESS
            polling.eventually(lambda: together(fared(nodes, family), answered), what="a second SYN")
            assert together(fared(nodes, family), answered) == {"unanswered": 1}
    finally:
        for pod in REMOTE:
            wires.ip(lab, pod, f"route delete blackhole {client}")


def test_what_the_node_that_balances_does_not_see_is_said_there(nodes: Cluster) -> None:
    of_service = ("backends", "direct", "-o", "json")
    not_seen = {
        node: {
            (one["node"], one["protocol"], *one["not_seen"]) for one in json.loads(agent.lbproxy(*of_service))
        }
        for node, agent in nodes.agents.items()
    }
    elsewhere = {node: {(node, "TCP", "dsr"), (node, "UDP")} for node in ("n2", "n3")}
    here = {node: {(node, "TCP"), (node, "UDP")} for node in ("n2", "n3")}
    assert not_seen == {
        "n1": elsewhere["n2"] | elsewhere["n3"],
        "n2": here["n2"] | elsewhere["n3"],
        "n3": elsewhere["n2"] | here["n3"],
    }
    assert "not seen: how connections by DSR to" in nodes.agents["n1"].lbproxy("backends", "direct")


def test_connections_keep_their_backend_while_others_come_and_go(lab: cluster.Lab, nodes: Cluster) -> None:
    port = manifests.HTTP._replace(node_port=CHANGING)
    for pod in PODS:
        lab.serve(pod)

    def become(*pods: str) -> None:
        nodes.put(*manifests.slices("changing", [lab[pod] for pod in pods]))
        for agent in nodes.agents.values():
            agent.has_backends("changing", set(pods), [("http", 4), ("http", 6)])

    become(*REMOTE)
    with lab.shell("outside") as client:
        held = [
            client.open(lab["n1"].address(family), port.node_port) for family in (4, 6) for _ in range(30)
        ]
        answers = [one.ask() for one in held]
        assert {answer.seen for answer in answers} == {answer.local for answer in answers}
        first = [answer.server for answer in answers]
        assert set(first) == set(REMOTE)
        assert nodes.rows("n1", CHANGING) == 0
        become(*PODS)
        assert [one.ask().server for one in held] == first
        assert nodes.rows("n1", CHANGING) > 0
        # Each change is survived without a record, if only a packet comes by before the next.
        become(*REMOTE, "n1/p1", "n2/p2")
        assert [one.ask().server for one in held] == first
        become(*REMOTE)
        assert [one.ask().server for one in held] == first
        # One leaves: those of the other stay where they are.
        become("n3/p1", "n3/p2")
        stayed = [one for one, server in zip(held, first, strict=True) if server == "n3/p1"]
        assert {one.ask().server for one in stayed} == {"n3/p1"}
        # That 40 new ones are all one's happens once in 10^11 times.
        assert {client.tcp(lab["n1"].ipv4, CHANGING).server for _ in range(40)} == {"n3/p1", "n3/p2"}
