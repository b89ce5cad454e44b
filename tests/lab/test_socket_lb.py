"""Sockets that dial service addresses: who answers, and what the application is shown, call by call."""

import collections.abc
import itertools

import pytest

from lbproxy.lab import cluster, shell
from tests import polling
from tests.lab import agents, manifests

WEB, EMPTY, CLOSED, MOVING, ITSELF, ELSEWHERE, FIRST = 1, 2, 3, 4, 5, 6, 20
MANY = 20  # services with one backend port each
FIRST_PORT = 9000
PODS = ("n1/p2", "n2/p1")

families = pytest.mark.parametrize("family", [4, 6])
clients = pytest.mark.parametrize("where", ["n1/p1", "n1"])


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    objects = [
        manifests.service("web", WEB),
        *manifests.slices("web", [lab[pod] for pod in PODS]),
        manifests.service("empty", EMPTY),
        manifests.service("closed", CLOSED),
        *manifests.slices("closed", [lab["n1/p3"]]),
        manifests.service("moving", MOVING),
        *manifests.slices("moving", [lab[pod] for pod in PODS]),
        manifests.service("itself", ITSELF),
        *manifests.slices("itself", [lab["n1/p2"]]),
        # Its addresses are those of a real host, so that what is not balanced has an answer too.
        manifests.service("elsewhere", ELSEWHERE, externalIPs=[*lab["n2"].addresses]),
        *manifests.slices("elsewhere", [lab["n1/p2"]]),
    ]
    for number in range(MANY):
        ports = [manifests.DNS._replace(target=FIRST_PORT + number)]
        objects.append(manifests.service(f"many-{number}", FIRST + number, ports=ports))
        objects += manifests.slices(f"many-{number}", [lab["n2/p1"]], ports=ports)
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


@pytest.fixture(scope="module")
def agent(lab: cluster.Lab, api: agents.Api) -> collections.abc.Iterator[agents.Agent]:
    for pod in PODS:
        lab.serve(pod, [manifests.TARGET_PORT, *range(FIRST_PORT, FIRST_PORT + MANY)])
    lab.serve("n1/p1", [manifests.TARGET_PORT])
    lab.serve("n2", [manifests.TCP_PORT, manifests.UDP_PORT, 81])
    with agents.Agent(lab, api.source, *agents.SMALL_MAPS) as running:
        yield running


def ask(opened: shell.Socket, address: str, port: int) -> tuple[str, shell.Address | None]:
    """Send a datagram from an unconnected socket; who answered, and from what address."""
    opened.sendto(b"?\n", address, port)
    data, sender = opened.recvfrom()
    return shell.parse_identity(data)[0], sender


# --- one connection ---


@families
@clients
def test_tcp_is_answered_by_a_backend_and_shows_the_service_as_peer(
    agent: agents.Agent, where: str, family: int
) -> None:
    address = manifests.cluster_ip(WEB, family)
    answer = agent.at(where).tcp(address, manifests.TCP_PORT)
    assert answer.server in PODS
    assert answer.peer == (address, manifests.TCP_PORT)
    # Nothing on the way has touched the packets.
    assert answer.seen == answer.local
    assert answer.local is not None
    assert answer.local[0] in (
        agent.lab[where].address(family),
        agent.lab["n1"].address(family),
        gateway(family),
    )


def gateway(family: int) -> str:
    """The node's address on its pods' bridge, which it uses towards its own pods."""
    return "10.244.1.1" if family == 4 else "fd00:244:1::1"


@families
@clients
@pytest.mark.parametrize("connected", [True, False], ids=["connected", "unconnected"])
def test_udp_is_answered_by_a_backend_and_shows_the_service_as_sender(
    agent: agents.Agent, where: str, family: int, connected: bool
) -> None:
    address = manifests.cluster_ip(WEB, family)
    answer = agent.at(where).udp(address, manifests.UDP_PORT, connected=connected)
    assert answer.server in PODS
    assert answer.peer == (address, manifests.UDP_PORT)


@families
def test_a_connected_udp_socket_also_receives_from_the_service(agent: agents.Agent, family: int) -> None:
    address = manifests.cluster_ip(WEB, family)
    with agent.at("n1/p1").open(address, manifests.UDP_PORT, udp=True) as opened:
        opened.send(b"?\n")
        _, sender = opened.recvfrom()
    assert sender == (address, manifests.UDP_PORT)


@clients
@pytest.mark.parametrize("protocol", ["tcp", "udp", "unconnected"])
def test_a_dual_stack_socket_dials_the_ipv4_service_in_mapped_form(
    agent: agents.Agent, where: str, protocol: str
) -> None:
    address, sockets = manifests.cluster_ip(WEB), agent.at(where)
    if protocol == "tcp":
        answer, port = sockets.tcp(address, manifests.TCP_PORT, mapped=True), manifests.TCP_PORT
    else:
        port = manifests.UDP_PORT
        answer = sockets.udp(address, port, mapped=True, connected=protocol == "udp")
    assert answer.server in PODS
    assert answer.peer == (shell.as_mapped(address), port)


@families
def test_a_nonblocking_connect_reaches_a_backend(agent: agents.Agent, family: int) -> None:
    address = manifests.cluster_ip(WEB, family)
    answer = agent.at("n1/p1").tcp(address, manifests.TCP_PORT, nonblocking=True)
    assert (answer.server in PODS, answer.peer) == (True, (address, manifests.TCP_PORT))


@families
def test_a_pod_may_reach_itself_through_its_service(agent: agents.Agent, family: int) -> None:
    address = manifests.cluster_ip(ITSELF, family)
    sockets = agent.at("n1/p2")
    assert sockets.tcp(address, manifests.TCP_PORT).server == "n1/p2"
    assert sockets.udp(address, manifests.UDP_PORT, connected=False).server == "n1/p2"


FAST_OPEN = """
import json, socket, sys
address, family = sys.argv[1], socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.socket(family, socket.SOCK_STREAM) as sent:
    sent.sendto(b"?\\n", socket.MSG_FASTOPEN, (address, 80))
    answers = [[sent.recv(100).decode().split()[0], *sent.getpeername()[:2]]]
with socket.socket(family, socket.SOCK_STREAM) as deferred:
    deferred.setsockopt(socket.IPPROTO_TCP, 30, 1)  # TCP_FASTOPEN_CONNECT
    deferred.connect((address, 80))
    deferred.send(b"?\\n")
    answers.append([deferred.recv(100).decode().split()[0], *deferred.getpeername()[:2]])
print(json.dumps(answers))
"""


@families
def test_tcp_fast_open_reaches_a_backend(agent: agents.Agent, family: int) -> None:
    address = manifests.cluster_ip(WEB, family)
    answers = agents.run_script(agent.lab, "n1/p1", FAST_OPEN, address)
    assert [answer[0] in PODS for answer in answers] == [True, True]
    assert [answer[1:] for answer in answers] == [[address, manifests.TCP_PORT]] * 2


SHARED = """
import json, os, socket, sys
address, family = sys.argv[1], socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
first = socket.create_connection((address, 80))
second = first.dup()
first.close()
child = os.fork()
if not child:
    second.close()
    os._exit(0)
os.waitpid(child, 0)
child = os.fork()
if not child:
    os._exit(0 if second.getpeername()[0] == address else 1)
_, status = os.waitpid(child, 0)
second.send(b"?\\n")
print(json.dumps([status, second.recv(100).decode().split()[0], second.getpeername()[0]]))
"""


@families
def test_a_socket_is_remembered_until_its_last_holder_closes_it(agent: agents.Agent, family: int) -> None:
    address = manifests.cluster_ip(WEB, family)
    status, server, peer = agents.run_script(agent.lab, "n1/p1", SHARED, address)
    assert (status, server in PODS, peer) == (0, True, address)
    polling.eventually(lambda: agent.live_sockets() == 0, what="rows given back")


# --- one socket, several connections ---


@families
@pytest.mark.parametrize("udp", [False, True], ids=["tcp", "udp"])
def test_a_socket_connects_after_it_was_refused(agent: agents.Agent, family: int, udp: bool) -> None:
    port = manifests.UDP_PORT if udp else manifests.TCP_PORT
    address = manifests.cluster_ip(WEB, family)
    with agent.at("n1/p1").socket(family, udp=udp) as opened:
        with pytest.raises(ConnectionRefusedError):
            opened.connect(manifests.cluster_ip(EMPTY, family), port)
        opened.connect(address, port)
        answer = opened.ask()
    assert (answer.server in PODS, answer.peer) == (True, (address, port))


@families
def test_a_socket_connects_elsewhere_after_a_backend_refused_it(agent: agents.Agent, family: int) -> None:
    pod = agent.lab["n1/p3"].address(family)
    with agent.at("n1/p1").socket(family) as opened:
        with pytest.raises(ConnectionRefusedError):
            opened.connect(manifests.cluster_ip(CLOSED, family), manifests.TCP_PORT)
        server = agent.lab.serve("n1/p3", [manifests.TARGET_PORT])
        # The very backend that was chosen before, but dialled by its own name.
        opened.connect(pod, manifests.TARGET_PORT)
        answer = opened.ask()
    server.stop()
    assert (answer.server, answer.peer) == ("n1/p3", (pod, manifests.TARGET_PORT))


@families
def test_a_udp_socket_reconnected_to_a_pod_is_shown_the_pod(agent: agents.Agent, family: int) -> None:
    service, pod = manifests.cluster_ip(ITSELF, family), agent.lab["n1/p2"].address(family)
    with agent.at("n1/p1").socket(family, udp=True) as opened:
        for address, port in ((service, manifests.UDP_PORT), (pod, manifests.TARGET_PORT)) * 2:
            opened.connect(address, port)
            answer = opened.ask()
            assert (answer.server, answer.peer) == ("n1/p2", (address, port))


@families
def test_one_udp_socket_talks_to_two_services_and_a_pod_by_turns(agent: agents.Agent, family: int) -> None:
    services = [(manifests.cluster_ip(number, family), manifests.UDP_PORT) for number in (WEB, FIRST)]
    pod = (agent.lab["n1/p1"].address(family), manifests.TARGET_PORT)
    with agent.at("n1/p1").socket(family, udp=True) as opened:
        seen = [(target, ask(opened, *target)) for target in [*services, pod] * 4]
    assert all(sender == target for target, (_, sender) in seen)
    servers = {target: {server for to, (server, _) in seen if to == target} for target, _ in seen}
    assert servers[pod] == {"n1/p1"}
    assert servers[services[1]] == {"n2/p1"}
    # It stays with the backend that it was given first.
    assert len(servers[services[0]]) == 1


@families
def test_one_udp_socket_talks_to_many_services_by_turns(agent: agents.Agent, family: int) -> None:
    targets = [(manifests.cluster_ip(FIRST + n, family), manifests.UDP_PORT) for n in range(MANY)]
    with agent.at("n1/p1").socket(family, udp=True) as opened:
        for target in targets * 3:
            assert ask(opened, *target) == ("n2/p1", target)
        # Answers that come back out of order are told apart as well.
        for target in targets:
            opened.sendto(b"?\n", *target)
        senders = {opened.recvfrom()[1] for _ in targets}
    assert senders == set(targets)


@families
def test_a_connected_udp_socket_may_still_send_to_other_services(agent: agents.Agent, family: int) -> None:
    web = (manifests.cluster_ip(ITSELF, family), manifests.UDP_PORT)
    with agent.at("n1/p1").open(*web, udp=True) as opened:
        other = manifests.cluster_ip(FIRST, family)
        # The kernel delivers only from the connected peer, so only what is sent can be looked at.
        opened.sendto(b"?\n", other, manifests.UDP_PORT)
        answer = opened.ask()
    assert (answer.server, answer.peer) == ("n1/p2", web)


@families
@pytest.mark.parametrize("removed", ["deleted", "unready"])
def test_a_udp_socket_stays_on_its_backend_until_that_goes(
    agent: agents.Agent, api: agents.Api, family: int, removed: str
) -> None:
    everyone = [agent.lab[pod] for pod in PODS]
    api.put(*manifests.slices("moving", everyone))
    agent.has_backends("moving", set(PODS))
    target = (manifests.cluster_ip(MOVING, family), manifests.UDP_PORT)
    with agent.at("n1/p1").socket(family, udp=True) as opened:
        first = {ask(opened, *target)[0] for _ in range(20)}
        assert len(first) == 1
        (left,) = [place for place in everyone if place.name not in first]
        gone = [
            manifests.Member(place, ready=False, serving=False) for place in everyone if place.name in first
        ]
        api.put(*manifests.slices("moving", [left, *gone] if removed == "unready" else [left]))
        agent.has_backends("moving", {left.name})
        assert {ask(opened, *target) for _ in range(20)} == {(left.name, target)}
        # Back again, it is not missed.
        api.put(*manifests.slices("moving", everyone))
        agent.has_backends("moving", set(PODS))
        assert {ask(opened, *target)[0] for _ in range(20)} == {left.name}


# --- no backend ---


@families
@clients
def test_a_service_without_endpoints_refuses_at_once(agent: agents.Agent, where: str, family: int) -> None:
    address, sockets = manifests.cluster_ip(EMPTY, family), agent.at(where)
    before, port_before = agent.counter("refused"), agent.port("empty", "dns", family).refused
    answers = [
        sockets.tcp(address, manifests.TCP_PORT),
        sockets.tcp(address, manifests.TCP_PORT, nonblocking=True),
        sockets.udp(address, manifests.UDP_PORT),
        sockets.udp(address, manifests.UDP_PORT, connected=False),
    ]
    assert [answer.error for answer in answers] == ["ECONNREFUSED"] * 4
    assert agent.counter("refused") == before + 4
    assert agent.port("empty", "dns", family).refused == port_before + 2


def test_connections_are_counted_by_service_and_backend(agent: agents.Agent) -> None:
    before = agent.port("itself")
    for _ in range(5):
        assert agent.at("n1/p1").tcp(manifests.cluster_ip(ITSELF), manifests.TCP_PORT).server == "n1/p2"
    after = agent.port("itself")
    assert after.connections == before.connections + 5
    assert after.backends[0].connections == before.backends[0].connections + 5


# --- what is left alone ---


@families
@clients
def test_what_is_no_service_port_is_left_alone(agent: agents.Agent, where: str, family: int) -> None:
    host, sockets = agent.lab["n2"].address(family), agent.at(where)
    tcp, udp = manifests.TCP_PORT, manifests.UDP_PORT
    assert sockets.tcp(host, tcp).server == "n1/p2"
    assert sockets.udp(host, udp, connected=False).server == "n1/p2"
    untouched = {
        "another TCP port": (sockets.tcp(host, 81), 81),
        "another UDP port": (sockets.udp(host, 81), 81),
        "the UDP port by TCP": (sockets.tcp(host, udp), udp),
        "the TCP port by UDP": (sockets.udp(host, tcp), tcp),
        "the TCP port by unconnected UDP": (sockets.udp(host, tcp, connected=False), tcp),
    }
    for what, (answer, port) in untouched.items():
        assert (answer.server, answer.peer) == ("n2", (host, port)), what


@families
@clients
def test_pods_are_reached_by_their_own_addresses(agent: agents.Agent, where: str, family: int) -> None:
    before = agent.live_sockets()
    for pod in PODS:
        address, port = agent.lab[pod].address(family), manifests.TARGET_PORT
        for answer in (
            agent.at(where).tcp(address, port),
            agent.at(where).udp(address, port),
            agent.at(where).udp(address, port, connected=False),
        ):
            assert (answer.server, answer.peer) == (pod, (address, port))
    assert agent.live_sockets() == before


def test_other_cgroups_are_left_alone(agent: agents.Agent) -> None:
    address = manifests.cluster_ip(WEB)
    with agent.lab.shell("n1", cgroup=False) as beside:
        assert beside.tcp(address, manifests.TCP_PORT, timeout_s=0.2).error == "ETIMEDOUT"
    # A pod's packets are served where they come into the node; its socket is not.
    with agent.lab.shell("n1/p1", cgroup=False) as beside:
        held = beside.open(address, manifests.TCP_PORT)
        assert held.ask().server in PODS
        assert agent.live_sockets() == 0
        held.close()
    assert agent.at("n2/p2").tcp(address, manifests.TCP_PORT, timeout_s=0.2).error == "ETIMEDOUT"


# --- rows and the spill ---


MANY_SOCKETS = """
import collections, json, socket, sys
address, count, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
family = socket.AF_INET6 if ":" in address else socket.AF_INET
peers = collections.Counter()
opened = []
for _ in range(count):
    one = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    one.settimeout(10)
    opened.append(one)
    if kind != "unconnected":
        one.connect((address, 80 if kind == "tcp" else 53))
for one in opened:
    if kind == "unconnected":
        one.sendto(b"?\\n", (address, 53))
        peers[one.recvfrom(100)[1][:2]] += 1
    else:
        peers[one.getpeername()[:2]] += 1
        one.send(b"?\\n")
        assert one.recv(100)
for one in opened[::2]:
    one.close()
# Those whose neighbours have gone are still remembered.
if kind != "unconnected":
    for one in opened[1::2]:
        peers[one.getpeername()[:2]] += 1
print(json.dumps(sorted([*peer, times] for peer, times in peers.items())))
"""


@pytest.fixture(scope="module")
def tiny(build_lab: collections.abc.Callable[..., cluster.Lab]) -> collections.abc.Iterator[agents.Agent]:
    """An agent whose sockets table has fewer rows than sockets are open."""
    with build_lab(nodes=1, pods=2) as lab:
        lab.serve("n1/p2")
        folder = agents.Folder(lab.workdir / "manifests")
        folder.write("web.json", [manifests.service("web", WEB), *manifests.slices("web", [lab["n1/p2"]])])
        with agents.Agent(lab, folder.source, *agents.SMALL_MAPS, "--map-rows", "sockets=64") as running:
            yield running


@families
@pytest.mark.parametrize("kind", ["tcp", "udp", "unconnected"])
def test_more_sockets_than_rows_keep_their_peers(tiny: agents.Agent, kind: str, family: int) -> None:
    address, count = manifests.cluster_ip(WEB, family), 300
    spilled = tiny.counter("spilled")
    peers = agents.run_script(tiny.lab, "n1/p1", MANY_SOCKETS, address, count, kind)
    port = manifests.TCP_PORT if kind == "tcp" else manifests.UDP_PORT
    assert peers == [[address, port, count if kind == "unconnected" else count + count // 2]]
    assert tiny.counter("spilled") - spilled >= count - 64
    assert tiny.counter("spill_failed") == 0
    polling.eventually(lambda: tiny.live_sockets() == 0, what="rows given back")
    connected_kind = 1
    polling.eventually(
        lambda: not any(key[26] == connected_kind for key, _ in tiny.maps.rows("socket_spill")),
        what="spilled rows of connected sockets given back",
    )


def test_rows_are_given_back_whatever_sockets_did(agent: agents.Agent) -> None:
    with agent.lab.shell("n1/p1") as sockets:
        held = []
        for family, udp in itertools.product((4, 6), (False, True)):
            port = manifests.UDP_PORT if udp else manifests.TCP_PORT
            held.append(sockets.open(manifests.cluster_ip(WEB, family), port, udp=udp))
        assert agent.live_sockets() == len(held)
    # The process ended without closing them.
    polling.eventually(lambda: agent.live_sockets() == 0, what="rows given back")
