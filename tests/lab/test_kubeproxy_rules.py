"""The rules that the benchmarks write in kube-proxy's place serve real connections, from every backend.

A node each for iptables-legacy, iptables on nf_tables, and nftables; the fourth has pods only.
"""

import collections.abc
import dataclasses

import pytest

from benchmarks.kubeproxy import load, model
from lbproxy.lab import cluster, shell
from tests.lab.conftest import LabFactory

BACKENDS = {"n1": load.Backend.LEGACY, "n2": load.Backend.NF_TABLES, "n3": load.Backend.NATIVE}
NODES = tuple(BACKENDS)
ELSEWHERE = "n4/p1"
WEB, NEAR, FAR, NONE, INSIDE = (f"10.96.0.{host}" for host in range(1, 6))
DNS_PORT = 53
TRIES = 40  # that many draws from two leave one out once in a million million times
WAIT_S = 0.5  # for an answer that must not come

every_node = pytest.mark.parametrize("node", NODES)


def _ports(lab: cluster.Lab, node: str) -> tuple[model.ServicePort, ...]:
    here = model.Endpoint(lab[f"{node}/p1"].ipv4, 8080, True)
    there = model.Endpoint(lab[ELSEWHERE].ipv4, 8080, False)

    def port(name: str, address: str, node_port: int, *endpoints: model.Endpoint) -> model.ServicePort:
        found = tuple(sorted(endpoints, key=str))
        return model.ServicePort("shop", name, "http", "tcp", address, 80, node_port, found)

    web = port("web", WEB, 30080, here, there)
    return (
        web,
        dataclasses.replace(web, port_name="dns", protocol="udp", port=DNS_PORT, node_port=30053),
        dataclasses.replace(port("near", NEAR, 30081, here, there), external_local=True),
        dataclasses.replace(port("far", FAR, 30082, there), external_local=True),
        # By datagram: the error comes while a connect still holds its socket, and TCP then asks again first.
        dataclasses.replace(port("none", NONE, 30083), protocol="udp"),
        dataclasses.replace(port("inside", INSIDE, 0, here, there), internal_local=True),
    )


@pytest.fixture(scope="module")
def lab(build_lab: LabFactory) -> collections.abc.Iterator[cluster.Lab]:
    with build_lab(nodes=4, pods=2, families=(4,)) as built:
        for node in (*NODES, "n4"):
            built.serve(f"{node}/p1")
        yield built


@pytest.fixture(scope="module")
def rules(lab: cluster.Lab) -> dict[str, load.Rules]:
    loaded = {}
    for node, backend in BACKENDS.items():
        settings = model.Settings(cluster_cidr="10.244.0.0/16", node_ip=lab[node].ipv4)

        def command(argv: collections.abc.Sequence[str], node: str = node) -> list[str]:
            return lab.command(node, argv)

        loaded[node] = load.Rules(command, backend, settings)
        ports = _ports(lab, node)
        loaded[node].start(ports, range(len(ports))[::-1])
    return loaded


@pytest.fixture(autouse=True)
def _loaded(rules: dict[str, load.Rules]) -> None:
    """Every test has them."""


def servers(
    lab: cluster.Lab, where: str, address: str, port: int, *, udp: bool = False
) -> tuple[set[str], set[str]]:
    """Connect until two servers have answered, but `TRIES` times at most: who answered, and whom they saw."""
    found, seen = set(), set()
    with lab.shell(where) as client:
        for _ in range(TRIES):
            answer = client.udp(address, port) if udp else client.tcp(address, port)
            assert not answer.error
            assert answer.seen
            found.add(answer.server)
            seen.add(answer.seen[0])
            if len(found) == 2:
                break
    return found, seen


def errors(client: shell.Shell, address: str, port: int) -> list[str]:
    """Ask by datagram, three times since the kernel need not answer each, what becomes of it."""
    return [client.udp(address, port, timeout_s=1.0).error for _ in range(3)]


@every_node
@pytest.mark.parametrize("client", ["p2", ""])
@pytest.mark.parametrize("udp", [False, True], ids=["tcp", "udp"])
def test_a_cluster_ip_leads_to_every_endpoint(lab: cluster.Lab, node: str, client: str, udp: bool) -> None:
    where = f"{node}/{client}".rstrip("/")
    found, seen = servers(lab, where, WEB, DNS_PORT if udp else 80, udp=udp)
    assert found == {f"{node}/p1", ELSEWHERE}
    if client:
        assert seen == {lab[where].ipv4}


@every_node
@pytest.mark.parametrize("client", ["p2", "outside"])
def test_a_node_port_of_policy_cluster_leads_to_every_endpoint_and_is_masqueraded(
    lab: cluster.Lab, node: str, client: str
) -> None:
    where = client if client == "outside" else f"{node}/{client}"
    found, seen = servers(lab, where, lab[node].ipv4, 30080)
    assert found == {f"{node}/p1", ELSEWHERE}
    assert lab[where].ipv4 not in seen


@every_node
def test_a_node_port_of_policy_local_leads_to_this_nodes_endpoint_and_shows_it_the_client(
    lab: cluster.Lab, node: str
) -> None:
    assert servers(lab, "outside", lab[node].ipv4, 30081) == ({f"{node}/p1"}, {lab["outside"].ipv4})


@every_node
def test_policy_local_treats_pods_and_the_node_as_cluster_does(lab: cluster.Lab, node: str) -> None:
    for client in (f"{node}/p2", node):
        assert servers(lab, client, lab[node].ipv4, 30081)[0] == {f"{node}/p1", ELSEWHERE}


@every_node
def test_an_internal_policy_of_local_keeps_to_the_node(lab: cluster.Lab, node: str) -> None:
    assert servers(lab, f"{node}/p2", INSIDE, 80)[0] == {f"{node}/p1"}


@every_node
def test_without_endpoints_clients_are_refused_and_without_local_ones_ignored(
    lab: cluster.Lab, node: str
) -> None:
    with lab.shell(f"{node}/p2") as pod:
        assert "ECONNREFUSED" in errors(pod, NONE, 80)
    with lab.shell("outside") as outside:
        assert "ECONNREFUSED" in errors(outside, lab[node].ipv4, 30083)
        assert outside.tcp(lab[node].ipv4, 30082, timeout_s=WAIT_S).error == "ETIMEDOUT"


@every_node
def test_a_change_is_there_when_the_command_has_ended(
    lab: cluster.Lab, rules: dict[str, load.Rules], node: str
) -> None:
    before = _ports(lab, node)
    web = before[0]
    moved = (dataclasses.replace(web, endpoints=web.endpoints[:1]), *before[1:])
    assert all(map(rules[node].holds, before))
    try:
        assert rules[node].read_back(before) > 0
        assert rules[node].change(before, moved) > 0
        kept = {f"{node}/p1"} if web.endpoints[0].is_local else {ELSEWHERE}
        assert servers(lab, f"{node}/p2", WEB, 80)[0] == kept
        assert rules[node].holds(moved[0])
        assert not rules[node].holds(web)
    finally:
        rules[node].change(moved, before)
    assert servers(lab, f"{node}/p2", WEB, 80)[0] == {f"{node}/p1", ELSEWHERE}
    assert rules[node].holds(web)
