"""Every kind of service address, from pods and from the node, and what the traffic policies make of it."""

import collections.abc
import typing

import pytest

from lbproxy.core import inventory
from lbproxy.lab import cluster
from tests import polling
from tests.lab import agents, manifests

TCP, UDP = manifests.TCP_PORT, manifests.UDP_PORT
NODE_TCP, NODE_UDP = 30080, 30053
PODS = ("n1/p2", "n2/p1")
# Without it, pods are clients outside to externalTrafficPolicy Local (ETP-6).
AGENT_FLAGS = ("--cluster-cidr=10.244.0.0/16,fd00:244::/32",)
LOCAL, REMOTE = PODS
EXTERNAL = {4: "192.0.2.5", 6: "2001:db8::5"}
BALANCER = {4: "192.0.2.6", 6: "2001:db8::6"}
PLAIN_BALANCER = {4: "192.0.2.7", 6: "2001:db8::7"}
BRIDGE = {4: "10.244.1.1", 6: "fd00:244:1::1"}

families = pytest.mark.parametrize("family", [4, 6])
clients = pytest.mark.parametrize("where", ["n1/p1", "n1"])


class Case(typing.NamedTuple):
    """A service, and which backends its ClusterIP leads to."""

    name: str
    members: dict[str, dict[str, typing.Any]]
    spec: dict[str, typing.Any]
    servers: set[str]
    error: str = ""  # what clients see where there are none


LOCAL_ONLY: manifests.Object = {"internalTrafficPolicy": "Local"}
DRAINING: manifests.Object = {"ready": False, "serving": True, "terminating": True}
GONE: manifests.Object = {"ready": False, "serving": False, "terminating": True}
UNREADY: manifests.Object = {"ready": False, "serving": True, "terminating": False}
CASES = [
    Case("everyone", {LOCAL: {}, REMOTE: {}}, {}, {LOCAL, REMOTE}),
    Case("local-policy", {LOCAL: {}, REMOTE: {}}, LOCAL_ONLY, {LOCAL}),
    Case("local-policy-remote", {REMOTE: {}}, LOCAL_ONLY, set(), "ETIMEDOUT"),
    Case("local-policy-none", {}, LOCAL_ONLY, set(), "ECONNREFUSED"),
    Case("local-policy-unready", {LOCAL: UNREADY, REMOTE: {}}, LOCAL_ONLY, set(), "ETIMEDOUT"),
    Case("local-policy-draining", {LOCAL: DRAINING, REMOTE: {}}, LOCAL_ONLY, {LOCAL}),
    Case("unready", {LOCAL: {}, REMOTE: UNREADY}, {}, {LOCAL}),
    Case("all-unready", {LOCAL: UNREADY}, {}, set(), "ECONNREFUSED"),
    Case("ready-first", {LOCAL: DRAINING, REMOTE: {}}, {}, {REMOTE}),
    Case("all-draining", {LOCAL: DRAINING, REMOTE: GONE}, {}, {LOCAL}),
    Case("all-gone", {LOCAL: GONE, REMOTE: GONE}, {}, set(), "ECONNREFUSED"),
    Case("ready-though-terminating", {LOCAL: {"terminating": True}}, {}, {LOCAL}),
    Case("zone-hints", {LOCAL: {"zones": ("b",)}, REMOTE: {"zones": ("a", "c")}}, {}, {REMOTE}),
    Case("zone-hints-of-others", {LOCAL: {"zones": ("b",)}, REMOTE: {"zones": ("c",)}}, {}, {LOCAL, REMOTE}),
    Case("one-without-hint", {LOCAL: {"zones": ("b",)}, REMOTE: {}}, {}, {LOCAL, REMOTE}),
    Case("node-hints", {LOCAL: {"nodes": ("n2",)}, REMOTE: {"nodes": ("n1",)}}, {}, {REMOTE}),
    Case("hints-and-local", {LOCAL: {"zones": ("b",)}, REMOTE: {"zones": ("a",)}}, LOCAL_ONLY, {LOCAL}),
]


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    ports = [manifests.HTTP.on_node_port(NODE_TCP), manifests.DNS.on_node_port(NODE_UDP)]
    proxied = [{"ip": address, "ipMode": "Proxy"} for address in lab["n2"].addresses]
    objects = [
        manifests.node("n1", *lab["n1"].addresses, zone="a"),
        manifests.service("ported", 1, ports=ports),
        *manifests.slices("ported", [lab[pod] for pod in PODS]),
        manifests.service(
            "exposed",
            2,
            type="LoadBalancer",
            externalIPs=list(EXTERNAL.values()),
            load_balancer=[
                *({"ip": address, "ipMode": "VIP"} for address in BALANCER.values()),
                *({"ip": address} for address in PLAIN_BALANCER.values()),
                *proxied,
                *({"ip": address} for address in ("127.0.0.1", "::1", "0.0.0.0", "::")),
                {"hostname": "balancer.example"},
            ],
        ),
        *manifests.slices("exposed", [lab[pod] for pod in PODS]),
        # Only remote endpoints, and both policies Local.
        manifests.service(
            "distant",
            3,
            ports=[manifests.HTTP.on_node_port(30081), manifests.DNS.on_node_port(30054)],
            type="LoadBalancer",
            externalTrafficPolicy="Local",
            internalTrafficPolicy="Local",
            externalIPs=["192.0.2.15", "2001:db8::15"],
            load_balancer=[{"ip": "192.0.2.16"}, {"ip": "2001:db8::16"}],
        ),
        *manifests.slices("distant", [lab[REMOTE]]),
        manifests.service(
            "vacant",
            4,
            ports=[manifests.HTTP.on_node_port(30082)],
            externalIPs=["192.0.2.25", "2001:db8::25"],
        ),
        manifests.service(
            "ipv4-only",
            5,
            ports=[manifests.HTTP.on_node_port(30083)],
            clusterIPs=[manifests.cluster_ip(5)],
            ipFamilies=["IPv4"],
            externalIPs=["192.0.2.35", "2001:db8::35"],
        ),
        *manifests.slices("ipv4-only", [lab[pod] for pod in PODS]),
    ]
    for number, case in enumerate(CASES, 20):
        objects.append(manifests.service(case.name, number, **case.spec))
        members = [manifests.Member(lab[pod])._replace(**how) for pod, how in case.members.items()]
        objects += manifests.slices(case.name, members)
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


@pytest.fixture(scope="module")
def agent(lab: cluster.Lab, agent: agents.Agent) -> agents.Agent:
    # What is not balanced is answered by whoever has the address.
    for place in ("n1", "n1/p3", "n2"):
        lab.serve(place, [TCP, UDP, NODE_TCP, NODE_UDP, 30083])
    polling.eventually(lambda: inventory.node_ports(agent.maps).addresses, what="node addresses")
    return agent


def servers(agent: agents.Agent, where: str, address: str, port: int, *, udp: bool = False) -> set[str]:
    """Who answers 30 connections: of two backends, one is missed once in 500 million times."""
    sockets, found = agent.at(where), set()
    for _ in range(30):
        answer = sockets.udp(address, port, connected=False) if udp else sockets.tcp(address, port)
        assert answer.error == ""
        assert answer.peer == (address, port)
        found.add(answer.server)
    return found


# --- NodePorts ---


@families
@clients
def test_node_ports_are_served_on_every_address_of_the_node(
    agent: agents.Agent, where: str, family: int
) -> None:
    for address in (agent.lab["n1"].address(family), BRIDGE[family]):
        assert servers(agent, where, address, NODE_TCP) <= set(PODS)
        assert servers(agent, where, address, NODE_UDP, udp=True) <= set(PODS)
        assert agent.at(where).udp(address, NODE_UDP).server in PODS


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "0.0.0.0"])
def test_node_ports_are_served_on_loopback_to_the_node(agent: agents.Agent, address: str) -> None:
    node = agent.at("n1")
    assert servers(agent, "n1", address, NODE_TCP) <= set(PODS)
    assert servers(agent, "n1", address, NODE_UDP, udp=True) <= set(PODS)
    assert node.tcp(address, NODE_TCP, mapped=True).server in PODS
    assert node.udp(address, NODE_UDP, mapped=True, connected=False).server in PODS


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1"])
def test_a_pods_loopback_is_its_own(agent: agents.Agent, address: str) -> None:
    pod = agent.at("n1/p3")
    assert pod.tcp(address, NODE_TCP).server == "n1/p3"
    assert pod.udp(address, NODE_UDP, connected=False).server == "n1/p3"


@clients
@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "0.0.0.0", "::"])
def test_no_load_balancer_takes_anybodys_loopback(agent: agents.Agent, where: str, address: str) -> None:
    # Where nobody listens, nobody answers.
    assert agent.at(where).tcp(address, TCP).server not in PODS
    assert "status.loadBalancer.ingress" in agent.log


def test_node_ports_are_never_served_on_ipv6_loopback(agent: agents.Agent) -> None:
    node = agent.at("n1")
    for address in ("::1", "::"):
        assert node.tcp(address, NODE_TCP).server == "n1"
        assert node.udp(address, NODE_UDP, connected=False).server == "n1"


@families
@clients
def test_other_addresses_have_no_node_ports(agent: agents.Agent, where: str, family: int) -> None:
    for place in ("n2", "n1/p3"):
        address = agent.lab[place].address(family)
        assert servers(agent, where, address, NODE_TCP) == {place}
        assert servers(agent, where, address, NODE_UDP, udp=True) == {place}


@families
@clients
def test_a_node_has_node_ports_and_no_others(agent: agents.Agent, where: str, family: int) -> None:
    address, sockets = agent.lab["n1"].address(family), agent.at(where)
    assert sockets.tcp(address, TCP).server == "n1"
    assert sockets.udp(address, UDP).server == "n1"
    assert sockets.tcp(address, NODE_UDP).server == "n1"
    assert sockets.udp(address, NODE_TCP, connected=False).server == "n1"


def test_a_single_family_service_has_that_familys_node_port(agent: agents.Agent) -> None:
    node, pod = agent.lab["n1"], agent.at("n1/p1")
    assert pod.tcp(node.ipv4, 30083).server in PODS
    assert pod.tcp(node.ipv6, 30083).server == "n1"
    assert pod.tcp("192.0.2.35", TCP).server in PODS
    assert pod.tcp("2001:db8::35", TCP, timeout_s=0.2).error == "ETIMEDOUT"


@pytest.mark.parametrize("address", ["172.18.0.77", "fd00:172:18::77"])
def test_node_ports_follow_the_nodes_addresses(agent: agents.Agent, address: str) -> None:
    prefix = 128 if ":" in address else 32
    change = ["ip", "address", "{}", f"{address}/{prefix}", "dev", "eth0"]
    if ":" in address:
        change.append("nodad")

    def server() -> str:
        return agent.at("n1").tcp(address, NODE_TCP, timeout_s=0.2).server

    assert server() == ""
    for _ in range(2):
        agent.lab.check_output("n1", [word.format("add") for word in change])
        polling.eventually(lambda: server() in PODS, what=f"NodePorts on {address}")
        agent.lab.check_output("n1", [word.format("del") for word in change if word != "nodad"])
        polling.eventually(lambda: server() == "", what=f"no NodePorts on {address}")


# --- external and load balancer addresses ---


@families
@clients
def test_external_and_balancer_addresses_are_served_inside(
    agent: agents.Agent, where: str, family: int
) -> None:
    for address in (EXTERNAL[family], BALANCER[family], PLAIN_BALANCER[family]):
        assert servers(agent, where, address, TCP) <= set(PODS)
        assert servers(agent, where, address, UDP, udp=True) <= set(PODS)
        assert agent.at(where).udp(address, UDP).server in PODS


@families
@clients
def test_a_balancer_that_proxies_is_left_alone(agent: agents.Agent, where: str, family: int) -> None:
    address = agent.lab["n2"].address(family)
    assert servers(agent, where, address, TCP) == {"n2"}
    assert servers(agent, where, address, UDP, udp=True) == {"n2"}


@families
@clients
def test_external_addresses_without_endpoints_refuse(agent: agents.Agent, where: str, family: int) -> None:
    sockets = agent.at(where)
    external = "192.0.2.25" if family == 4 else "2001:db8::25"
    assert sockets.tcp(external, TCP).error == "ECONNREFUSED"
    assert sockets.tcp(agent.lab["n1"].address(family), 30082).error == "ECONNREFUSED"


@families
@clients
def test_pods_and_the_node_reach_remote_endpoints_in_spite_of_local_policies(
    agent: agents.Agent, where: str, family: int
) -> None:
    suffixes = ("192.0.2.15", "192.0.2.16") if family == 4 else ("2001:db8::15", "2001:db8::16")
    for address, port in ((suffixes[0], TCP), (suffixes[1], TCP), (agent.lab["n1"].address(family), 30081)):
        assert servers(agent, where, address, port) == {REMOTE}
    sockets, cluster_ip = agent.at(where), manifests.cluster_ip(3, family)
    assert sockets.tcp(cluster_ip, TCP, timeout_s=0.2).error == "ETIMEDOUT"


# --- which backends ---


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@families
def test_policies_conditions_and_hints_choose_the_backends(
    agent: agents.Agent, case: Case, family: int
) -> None:
    address = manifests.cluster_ip(20 + CASES.index(case), family)
    if case.servers:
        assert servers(agent, "n1/p1", address, TCP) == case.servers
        assert servers(agent, "n1", address, UDP, udp=True) == case.servers
        return
    dropped, refused = agent.counter("dropped"), agent.counter("refused")
    for where in ("n1/p1", "n1"):
        sockets = agent.at(where)
        for answer in (
            sockets.tcp(address, TCP, timeout_s=0.1),
            sockets.udp(address, UDP, timeout_s=0.1),
            sockets.udp(address, UDP, connected=False, timeout_s=0.1),
        ):
            assert answer.error == case.error
    if case.error == "ETIMEDOUT":
        # What a socket sends all the same is dropped, and counted, as a packet, once it has got there:
        # retransmissions too.
        polling.eventually(lambda: agent.counter("dropped") - dropped >= 6, what="six drops")
        assert agent.counter("refused") == refused
    else:
        assert (agent.counter("dropped"), agent.counter("refused")) == (dropped, refused + 6)


def test_a_nodes_zone_decides_as_soon_as_it_is_told(agent: agents.Agent, api: agents.Api) -> None:
    address = manifests.cluster_ip(20 + [case.name for case in CASES].index("zone-hints"))
    addresses = agent.lab["n1"].addresses
    try:
        for zone, expected in (("b", LOCAL), ("c", REMOTE), ("a", REMOTE)):
            api.put(manifests.node("n1", *addresses, zone=zone))
            agent.has_backends("zone-hints", {expected})
            assert servers(agent, "n1/p1", address, TCP) == {expected}
    finally:
        api.put(manifests.node("n1", *addresses, zone="a"))
        agent.has_backends("zone-hints", {REMOTE})


# --- changes of services ---


def test_addresses_come_and_go_with_the_service(agent: agents.Agent, api: agents.Api) -> None:
    extra = [{"ip": "192.0.2.99"}, {"ip": "2001:db8::99"}]
    ports = [manifests.HTTP.on_node_port(30090)]
    first = manifests.service("changing", 90, ports=ports)
    api.put(first, *manifests.slices("changing", [agent.lab[LOCAL]]))
    pod, node = agent.at("n1/p1"), agent.lab["n1"].ipv6

    def answers() -> list[str]:
        targets = [(manifests.cluster_ip(90), TCP), (node, 30090), (node, 30091), ("2001:db8::99", TCP)]
        return [pod.tcp(*target, timeout_s=0.1).server for target in targets]

    polling.eventually(lambda: answers() == [LOCAL, LOCAL, "", ""], what="the service")
    ports = [manifests.HTTP.on_node_port(30091)]
    api.put(manifests.service("changing", 90, ports=ports, type="LoadBalancer", load_balancer=extra))
    polling.eventually(lambda: answers() == [LOCAL, "", LOCAL, LOCAL], what="another NodePort, and an IP")
    api.put(first)
    polling.eventually(lambda: answers() == [LOCAL, LOCAL, "", ""], what="the first service again")
    api.delete(first)
    polling.eventually(lambda: answers() == ["", "", "", ""], what="no service")


# --- where NodePorts are served, by flags ---

ADDRESSES = ("172.18.0.1", "10.244.1.1", "127.0.0.1", "127.9.9.9", "fd00:172:18::1", "fd00:244:1::1", "::1")
FLAGS: list[tuple[list[str], set[str]]] = [
    ([], set(ADDRESSES) - {"::1"}),
    (["--iptables-localhost-nodeports=false"], set(ADDRESSES) - {"::1", "127.0.0.1", "127.9.9.9"}),
    (["--nodeport-addresses", "172.18.0.0/24"], {"172.18.0.1", "fd00:172:18::1", "fd00:244:1::1"}),
    (
        ["--nodeport-addresses", "172.18.0.0/24,fd00:244::/32"],
        {"172.18.0.1", "fd00:244:1::1"},
    ),
    (
        ["--nodeport-addresses", "127.0.0.0/8,fd00:172:18::/64"],
        {"127.0.0.1", "127.9.9.9", "fd00:172:18::1"},
    ),
    (["--nodeport-addresses", "primary"], {"172.18.0.1", "fd00:172:18::1"}),
    (["--proxy-mode", "nftables"], {"172.18.0.1", "fd00:172:18::1"}),
]


@pytest.fixture(scope="module")
def flagged(build_lab: collections.abc.Callable[..., cluster.Lab]) -> collections.abc.Iterator[agents.Agent]:
    """An agent to be started again with other flags; the node itself listens on the NodePort too."""
    with build_lab(nodes=1, pods=2) as lab:
        lab.serve("n1/p2")
        lab.serve("n1", [NODE_TCP])
        folder = agents.Folder(lab.workdir / "manifests")
        ports = [manifests.HTTP.on_node_port(NODE_TCP)]
        service = manifests.service("ported", 1, ports=ports)
        node = manifests.node("n1", *lab["n1"].addresses)
        folder.write("ported.json", [node, service, *manifests.slices("ported", [lab["n1/p2"]], ports=ports)])
        with agents.Agent(lab, folder.source, *agents.SMALL_MAPS) as running:
            yield running


@pytest.mark.parametrize(("flags", "served"), FLAGS, ids=[" ".join(flags) or "default" for flags, _ in FLAGS])
def test_flags_say_where_node_ports_are_served(
    flagged: agents.Agent, flags: list[str], served: set[str]
) -> None:
    base = flagged.flags
    flagged.stop()
    flagged.flags = [*base, *flags]
    try:
        flagged.start()
    finally:
        flagged.flags = base
    node, pod = flagged.at("n1"), flagged.at("n1/p1")

    def found(sockets: typing.Any, addresses: collections.abc.Iterable[str]) -> set[str]:
        answers = {address: sockets.tcp(address, NODE_TCP).server for address in addresses}
        assert set(answers.values()) <= {"n1", "n1/p2"}
        return {address for address, server in answers.items() if server == "n1/p2"}

    assert found(node, ADDRESSES) == served
    seen_by_pods = [address for address in ADDRESSES if not address.startswith(("127.", "::"))]
    assert found(pod, seen_by_pods) == served & set(seen_by_pods)
