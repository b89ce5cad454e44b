"""What `lbproxy explain` says, over maps in memory; tests/lab/test_read_side.py asks the kernel itself."""

import argparse
import collections
import ipaddress
import itertools
import json
import pathlib
import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbproxy import abi, errors
from lbproxy.commands import explain
from lbproxy.config import kinds
from lbproxy.core import (
    explanation,
    health,
    inventory,
    model,
    node_rows,
    notes,
    outcomes,
    tables,
    topology,
    walk,
)
from lbproxy.kernel import fake, inspection, maps
from tests import installing
from tests.installing import endpoint

HOOKS = walk.Hooks("/sys/fs/cgroup/test", frozenset(), ("eth0",), ("veth1",))
HOST_NETNS = 0x1_0000_0002  # both halves are needed to find an affinity row
NOW_S = 5000
UNREADY: dict[str, typing.Any] = {"ready": False, "serving": False}


def a_cluster() -> fake.FakeMaps:
    made = fake.FakeMaps(installing.SIZES)
    installer = installing.Installer(made, maps.capacity(installing.SIZES))
    installer.node("192.0.2.10", "2001:db8::10", "127.0.0.1", "::1", host_netns=HOST_NETNS)
    three = [endpoint(f"10.244.0.{n}", f"node-{n}") for n in (1, 2, 3)]
    three.append(endpoint("fd00:1::1"))
    installer.service(
        "default/web", ["10.96.0.1", "fd00::1"], three, node_port=30080, external=["198.51.100.7"]
    )
    installer.service("default/empty", ["10.96.0.2"], [endpoint("10.244.0.9", **UNREADY)])
    installer.service("default/none", ["10.96.0.7"], [])
    installer.service("default/local", ["10.96.0.3"], three[1:3], internal_local=True)
    installer.service("default/sticky", ["10.96.0.4"], three[:3], affinity_s=100)
    installer.service("default/dns", ["10.96.0.5"], three[:1], protocol=model.Protocol.UDP, port=53)
    weighted = [endpoint("10.244.0.1"), endpoint("10.244.0.2", weight=3)]
    installer.service("default/maglev", ["10.96.0.6"], weighted, algorithm=model.Algorithm.MAGLEV)
    installer.service("default/v6", ["fd00::9"], three[3:], node_port=30090)
    installer.service("default/sctp", ["10.96.0.8"], three[:1], protocol=model.Protocol.SCTP)
    # As of the API server: its EndpointSlice names no node.
    installer.service("default/kubernetes", ["10.96.0.20"], [endpoint("172.18.0.2", "")])
    return made


CLUSTER = a_cluster()


@pytest.mark.parametrize(
    ("to", "told"),
    [
        ("10.96.0.5:53", "served are 53/UDP of default/dns"),
        ("10.96.0.1:443", "served are 80/TCP of default/web"),
        ("[fd00::9]:80/UDP", "served are 80/TCP of default/v6"),
        ("192.0.2.10:30080/UDP", "served are NodePort 30080/TCP of default/web"),
        ("198.51.100.1:30080/UDP", ""),
        ("192.0.2.10:30090", ""),
        ("10.96.0.1:80", ""),
        ("8.8.8.8:53", ""),
    ],
)
def test_what_is_served_at_another_port_or_protocol_is_said(to: str, told: str) -> None:
    """DNS is asked by UDP, and a port may be the backends' own."""
    target = walk.Target(*kinds.parse_destination(to))
    found = explanation.with_neighbours(CLUSTER, target, ask("pod", to))
    assert "".join(one.result for one in found.steps if one.step == "else") == told


def ask(
    source: str,
    to: str,
    *,
    cluster: fake.FakeMaps = CLUSTER,
    hooks: walk.Hooks = HOOKS,
    netns: tuple[int, ...] = (),
    port: int = 0,
    noted: notes.Notes = notes.NOTHING,
) -> explanation.Explanation:
    target = walk.Target(*kinds.parse_destination(to))
    return explanation.explain(cluster, hooks, source, target, NOW_S, netns, port, noted)


@pytest.mark.parametrize(
    ("source", "to", "verdict", "service", "steps"),
    [
        ("pod", "10.96.0.1:80", "balanced", "web", "client hook frontend backends slot"),
        ("node", "10.96.0.1:80", "balanced", "web", "client hook frontend backends slot"),
        ("pod", "[fd00::1]:80", "balanced", "web", "client hook frontend backends slot"),
        ("pod", "198.51.100.7:80", "balanced", "web", "client hook frontend backends slot"),
        ("pod", "[::ffff:10.96.0.1]:80", "balanced", "web", "client hook frontend backends slot"),
        ("pod", "10.96.0.5:53/UDP", "balanced", "dns", "client hook frontend backends slot socket"),
        ("pod", "10.96.0.5:53", "untouched", "", "client hook frontend node port"),
        ("pod", "10.96.0.1:81", "untouched", "", "client hook frontend node port"),
        ("pod", "10.244.0.1:8080", "untouched", "", "client hook frontend node port"),
        ("pod", "10.96.0.2:80", "refused", "empty", "client hook frontend backends"),
        ("pod", "10.96.0.7:80", "refused", "none", "client hook frontend backends"),
        ("pod", "10.96.0.3:80", "dropped", "local", "client hook frontend backends"),
        ("node", "10.96.0.8:80/SCTP", "untouched", "", "client hook"),
        ("pod", "10.96.0.8:80/SCTP", "balanced", "sctp", "client hook frontend backends slot masquerade"),
        (
            "pod",
            "192.0.2.10:30080",
            "balanced",
            "web",
            "client hook frontend node port address backends slot",
        ),
        (
            "pod",
            "[2001:db8::10]:30080",
            "balanced",
            "web",
            "client hook frontend node port address backends slot",
        ),
        (
            "node",
            "127.0.0.1:30080",
            "balanced",
            "web",
            "client hook frontend node port address backends slot",
        ),
        (
            "node",
            "127.9.9.9:30080",
            "balanced",
            "web",
            "client hook frontend node port address backends slot",
        ),
        (
            "node",
            "0.0.0.0:30080",
            "balanced",
            "web",
            "client hook frontend node port address backends slot",
        ),
        ("pod", "127.0.0.1:30080", "untouched", "web", "client hook frontend node port address"),
        ("node", "[::1]:30080", "untouched", "web", "client hook frontend node port address"),
        ("node", "[::]:30080", "untouched", "web", "client hook frontend node port address"),
        ("pod", "192.0.2.11:30080", "untouched", "web", "client hook frontend node port address"),
        # A NodePort of a single-family Service exists in that family only (NP-14).
        ("pod", "192.0.2.10:30090", "untouched", "", "client hook frontend node port"),
        (
            "pod",
            "[2001:db8::10]:30090",
            "balanced",
            "v6",
            "client hook frontend node port address backends slot",
        ),
        # The zero address is where NodePorts are stored, not where they are dialled.
        ("pod", "0.0.0.0:30080", "untouched", "web", "client hook frontend node port address"),
        ("outside", "10.96.0.1:80", "balanced", "web", "client hook frontend backends slot masquerade"),
        (
            "outside",
            "192.0.2.10:30080",
            "balanced",
            "web",
            "client hook frontend node port address backends slot masquerade",
        ),
        ("outside", "127.0.0.1:30080", "untouched", "web", "client hook frontend node port address"),
        ("outside", "192.0.2.11:30080", "untouched", "web", "client hook frontend node port address"),
        ("outside", "10.96.0.2:80", "refused", "empty", "client hook frontend backends"),
        ("outside", "10.96.0.3:80", "dropped", "local", "client hook frontend backends"),
    ],
)
def test_the_way_of_a_connection(source: str, to: str, verdict: str, service: str, steps: str) -> None:
    found = ask(source, to)
    assert found.verdict == verdict
    assert " ".join(step.step for step in found.steps) == steps
    assert found.service.startswith(f"default/{service}" if service else "")
    assert bool(found.service) == bool(service)
    assert bool(found.backends) == (verdict == "balanced")


@pytest.mark.parametrize(
    ("source", "is_node", "what"),
    [
        ("192.0.2.10", True, "this node's"),
        ("127.0.0.1", True, "this node's"),
        ("::1", True, "this node's"),
        ("10.244.0.2", False, "a backend (on node-2, says its EndpointSlice)"),
        ("10.250.0.1", False, "not known here"),
    ],
)
def test_an_address_is_the_nodes_or_a_pods(source: str, is_node: bool, what: str) -> None:
    found = ask(source, "127.0.0.1:30080")
    assert what in found.steps[0].result
    assert found.verdict == ("balanced" if is_node else "untouched")


@pytest.mark.parametrize(
    ("source", "steps", "verdict"),
    [
        ("10.244.0.1", "client hook frontend backends slot", "balanced"),
        # One answer for itself, and one for the others.
        ("10.244.0.2", "client hook frontend backends slot masquerade masquerade", "balanced"),
        ("172.18.0.2", "client assumption hook frontend backends slot", "balanced"),
        ("10.244.0.250", "client assumption hook frontend backends slot", "balanced"),
    ],
)
def test_where_an_address_is_decides_who_balances(source: str, steps: str, verdict: str) -> None:
    found = ask(source, "10.96.0.1:80")
    assert " ".join(step.step for step in found.steps) == steps
    assert found.verdict == verdict
    told = [step.result for step in found.steps if step.step == "assumption"]
    assert all(source in text and "--from outside" in text for text in told)


def test_a_node_that_does_not_know_its_name_assumes() -> None:
    cluster = fake.FakeMaps(installing.SIZES)
    installer = installing.Installer(cluster, maps.capacity(installing.SIZES))
    installer.service("default/web", ["10.96.0.1"], [endpoint("10.244.0.2", "node-2")])
    found = ask("10.244.0.2", "10.96.0.1:80", cluster=cluster)
    assert [step.step for step in found.steps][:2] == ["client", "assumption"]
    assert found.verdict == "balanced"


def test_who_cannot_be_is_an_error() -> None:
    with pytest.raises(ValueError, match="'nobody' is not an IP address"):
        ask("nobody", "10.96.0.1:80")


@pytest.mark.parametrize(
    ("broken", "to", "verdict"),
    [
        ("connect4", "10.96.0.1:80", "untouched"),
        ("connect4", "[fd00::1]:80", "balanced"),
        ("connect6", "[fd00::1]:80", "untouched"),
        ("connect6", "[::ffff:10.96.0.1]:80", "untouched"),
        ("sendmsg4", "10.96.0.1:80", "balanced"),
        ("sendmsg4", "10.96.0.5:53/UDP", "untouched"),
    ],
)
def test_a_missing_hook_leaves_the_connection_alone(broken: str, to: str, verdict: str) -> None:
    hooks = walk.Hooks("/sys/fs/cgroup/test", frozenset({broken}))
    assert ask("pod", to, hooks=hooks).verdict == verdict


def test_why_there_is_no_backend() -> None:
    assert "1 unready" in ask("pod", "10.96.0.2:80").steps[-1].result
    assert "the service has none" in ask("pod", "10.96.0.7:80").steps[-1].result
    assert "on this node (Local)" in ask("pod", "10.96.0.3:80").steps[-1].result


def test_shares_follow_the_slots() -> None:
    shares = {choice.ip: choice.percent for choice in ask("pod", "10.96.0.1:80").backends}
    assert shares == {"10.244.0.1": 33.33, "10.244.0.2": 33.33, "10.244.0.3": 33.33}
    heavy, light = ask("pod", "10.96.0.6:80").backends
    assert (heavy.ip, light.ip) == ("10.244.0.2", "10.244.0.1")
    assert heavy.percent == pytest.approx(75, abs=2)
    assert "hash of the socket" in ask("pod", "10.96.0.6:80").steps[-1].result


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.integers(1, 254), st.integers(1, 5), min_size=1, max_size=40),
    st.sampled_from(model.Algorithm),
)
def test_all_shares_are_one(weights: dict[int, int], algorithm: model.Algorithm) -> None:
    made = fake.FakeMaps({**installing.SIZES, "slots": 8192})
    installer = installing.Installer(made, maps.capacity({**installing.SIZES, "slots": 8192}))
    endpoints = [endpoint(f"10.244.0.{n}", weight=weight) for n, weight in weights.items()]
    installer.service("default/web", ["10.96.0.1"], endpoints, algorithm=algorithm)
    choices = ask("pod", "10.96.0.1:80", cluster=made).backends
    assert {int(choice.ip.split(".")[3]) for choice in choices} == weights.keys()
    assert sum(choice.percent for choice in choices) == pytest.approx(100, abs=0.01 * len(choices))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6)), min_size=1, max_size=6))
def test_shares_of_two_are_those_of_every_pair_of_slots(found: list[tuple[int, int]]) -> None:
    made = fake.FakeMaps(installing.SIZES)
    installer = installing.Installer(made, maps.capacity(installing.SIZES))
    endpoints = [endpoint(f"10.244.0.{n}", weight=weight) for n, (weight, _) in enumerate(found)]
    least = model.Algorithm.LEAST_CONNECTIONS
    installer.service("default/web", ["10.96.0.1"], endpoints, algorithm=least)
    loads = {}
    for number, place in installer.ledger.counted_backends().items():
        weight, opened = found[place[15]]
        loads[number] = (opened, weight)
        row = abi.LAYOUTS["backend_load"].pack(opened, 0)
        made.apply([tables.Put(tables.Table.BACKEND_LOAD, tables.row_key(number), row)])
    explained = ask("pod", "10.96.0.1:80", cluster=made)
    (said,) = [step.result for step in explained.steps if step.step == "slot"]
    assert "fewer open" in said
    slots = [
        int.from_bytes(block[at : at + 4], tables.BYTE_ORDER)
        for _, block in sorted(made.rows(tables.Table.SLOTS))
        for at in range(0, len(block), 4)
    ]
    drawn: collections.Counter[str] = collections.Counter()
    for one, other in itertools.permutations([number for number in slots if number], 2):
        # As bpf/load.h compares them.
        less = loads[other][0] * loads[one][1] < loads[one][0] * loads[other][1]
        drawn[inventory.backend(made, other if less else one).address[15]] += 1  # type: ignore[union-attr,index]
    shares = {int(choice.ip.split(".")[3]): choice.percent for choice in explained.backends}
    if len(found) > 1:
        for host in range(len(found)):
            assert shares[host] == pytest.approx(100 * drawn[host] / drawn.total(), abs=0.01)  # type: ignore[index]


# --- session affinity ---


def remember(cluster: fake.FakeMaps, ip: str, started_s: int, client: int = HOST_NETNS) -> None:
    """Write the row that bpf/select.h would write for the node."""
    (sticky,) = (p for p in inventory.read(cluster).ports if p.key.service.name == "sticky")
    (backend,) = (b for b in sticky.backends if str(ipaddress.ip_address(b.address[12:])) == ip)
    halves = (client & 0xFFFFFFFF, client >> 32)
    packed = b"".join(half.to_bytes(4, tables.BYTE_ORDER) for half in halves)
    key = abi.LAYOUTS["affinity_key"].pack(packed + bytes(8), sticky.id, 1)
    cluster._rows["affinity"][key] = abi.LAYOUTS["affinity"].pack(backend.id, started_s)


@pytest.mark.parametrize(
    ("age_s", "client", "says", "only"),
    [
        (99, HOST_NETNS, "for another 1 s", True),
        (100, HOST_NETNS, "expired", False),
        (0, HOST_NETNS & 0xFFFFFFFF, "has not connected here before", False),
    ],
)
def test_the_node_is_remembered(age_s: int, client: int, says: str, only: bool) -> None:
    cluster = a_cluster()
    remember(cluster, "10.244.0.2", NOW_S - age_s, client)
    found = ask("node", "10.96.0.4:80", cluster=cluster)
    assert says in next(step.result for step in found.steps if step.step == "affinity")
    assert ([choice.ip for choice in found.backends] == ["10.244.0.2"]) == only
    assert len(found.backends) == (1 if only else 3)


def test_a_remembered_backend_that_is_gone_does_not_count() -> None:
    cluster = a_cluster()
    remember(cluster, "10.244.0.2", NOW_S)
    ((key, _),) = cluster._rows["affinity"].items()
    # An id that now belongs to another service.
    (web, *_) = (p for p in inventory.read(cluster).ports if p.key.service.name == "web")
    cluster._rows["affinity"][key] = abi.LAYOUTS["affinity"].pack(web.backends[0].id, NOW_S)
    assert len(ask("node", "10.96.0.4:80", cluster=cluster).backends) == 3


def test_which_pod_is_remembered_cannot_be_told() -> None:
    found = ask("pod", "10.96.0.4:80")
    assert "cannot be told" in next(step.result for step in found.steps if step.step == "affinity")
    assert len(found.backends) == 3


@pytest.mark.parametrize(("known", "only"), [((5, 77), True), ((77,), True), ((5,), False), ((), False)])
def test_a_pod_is_remembered_by_its_namespace(known: tuple[int, ...], only: bool) -> None:
    cluster = a_cluster()
    remember(cluster, "10.244.0.2", NOW_S, client=77)
    found = ask("10.244.0.9", "10.96.0.4:80", cluster=cluster, netns=known)
    assert ([choice.ip for choice in found.backends] == ["10.244.0.2"]) == only
    told = next(step.result for step in found.steps if step.step == "affinity")
    assert ("cannot be told" in told) == (not known)


def test_a_slot_without_a_backend_is_told() -> None:
    cluster = a_cluster()
    web = next(p for p in inventory.read(cluster).ports if p.key.service.name == "web")
    cluster.apply(
        [
            tables.Put(tables.Table.BACKENDS, tables.row_key(backend.id), tables.NO_BACKEND)
            for backend in web.backends[:1]
        ]
    )
    found = ask("pod", "10.96.0.1:80", cluster=cluster)
    assert "1 of 3 slots lead to no backend" in found.steps[-1].result
    assert [choice.percent for choice in found.backends] == [33.33, 33.33]


# --- packets from elsewhere ---

PODS = node_rows.PacketRules(pod_cidrs=("10.244.0.0/16", "fd00:1::/64"))


def a_gateway(rules: node_rows.PacketRules = PODS, **fields: typing.Any) -> fake.FakeMaps:
    """A node with one service that is reached from outside in every way."""
    made = fake.FakeMaps({**installing.SIZES, "slots": 4096})
    installer = installing.Installer(made, maps.capacity({**installing.SIZES, "slots": 4096}))
    installer.node("192.0.2.10", host_netns=HOST_NETNS, rules=rules)
    here, there = endpoint("10.244.0.1"), endpoint("10.244.1.2", "node-2")
    installer.service(
        "default/web",
        ["10.96.0.1"],
        fields.pop("endpoints", [here, there, endpoint("192.0.2.10")]),
        node_port=30080,
        external=["198.51.100.7"],
        load_balancer=["203.0.113.9"],
        **fields,
    )
    return made


def answers(found: explanation.Explanation, step: str) -> list[str]:
    return [one.result for one in found.steps if one.step == step]


def masqueraded(found: explanation.Explanation) -> dict[str, bool]:
    """Which backends see this node's address."""
    seen = {}
    for answer in answers(found, "masquerade"):
        places, colon, verdict = answer.removeprefix("to ").rpartition(": ")
        for choice in found.backends:
            if not colon or f"{choice.ip}:{choice.port}" in places.split(", "):
                seen[choice.ip] = verdict.startswith("yes")
    return seen


CLIENT, POD_HERE, POD_THERE = "198.51.100.99", "10.244.0.1", "10.244.1.2"
ETP_LOCAL: dict[str, typing.Any] = {"external_local": True}
ALL = node_rows.PacketRules(masquerade_all=True, pod_cidrs=PODS.pod_cidrs)
KEEP = node_rows.PacketRules(keep_client=True, pod_cidrs=PODS.pod_cidrs)
NOTHING = node_rows.NO_RULES
YES, NO, NODE_NO = True, False, {"192.0.2.10": False}


@pytest.mark.parametrize(
    ("rules", "fields", "source", "to", "seen"),
    [
        pytest.param(PODS, {}, CLIENT, "10.96.0.1:80", {POD_HERE: YES, POD_THERE: YES}, id="MASQ-2"),
        pytest.param(PODS, {}, POD_THERE, "10.96.0.1:80", {POD_HERE: NO, POD_THERE: YES}, id="MASQ-5"),
        pytest.param(NOTHING, {}, "outside", "10.96.0.1:80", {POD_HERE: NO, POD_THERE: NO}, id="no detector"),
        pytest.param(ALL, {}, POD_THERE, "10.96.0.1:80", {POD_HERE: YES, POD_THERE: YES}, id="MASQ-1"),
        pytest.param(PODS, {}, CLIENT, "192.0.2.10:30080", {POD_HERE: YES, POD_THERE: YES}, id="MASQ-3"),
        pytest.param(PODS, {}, POD_THERE, "203.0.113.9:80", {POD_HERE: YES, POD_THERE: YES}, id="ETP-2"),
        pytest.param(PODS, ETP_LOCAL, CLIENT, "203.0.113.9:80", {POD_HERE: NO}, id="ETP-3"),
        pytest.param(
            ALL, ETP_LOCAL, POD_THERE, "198.51.100.7:80", {POD_HERE: NO, POD_THERE: YES}, id="ETP-4"
        ),
        pytest.param(NOTHING, ETP_LOCAL, POD_THERE, "198.51.100.7:80", {POD_HERE: NO}, id="ETP-6"),
        pytest.param(KEEP, {}, CLIENT, "198.51.100.7:80", {POD_HERE: NO, POD_THERE: YES}, id="keep client"),
    ],
)
def test_who_is_masqueraded(
    rules: node_rows.PacketRules,
    fields: dict[str, typing.Any],
    source: str,
    to: str,
    seen: dict[str, bool],
) -> None:
    found = ask(source, to, cluster=a_gateway(rules, **fields))
    assert found.verdict == "balanced"
    # The node's own endpoint never sees the node in the client's place (MASQ-8).
    assert masqueraded(found) == seen | NODE_NO


@pytest.mark.parametrize(
    ("endpoints", "pod", "outside"),
    [
        ([endpoint("10.244.1.2", "node-2")], "balanced", "dropped"),
        ([endpoint("10.244.0.1")], "balanced", "balanced"),
        ([], "refused", "refused"),
    ],
)
def test_a_local_policy_keeps_clients_outside_to_this_node(
    endpoints: list[model.Endpoint], pod: str, outside: str
) -> None:
    cluster = a_gateway(external_local=True, endpoints=endpoints)
    for to in ("203.0.113.9:80", "198.51.100.7:80", "192.0.2.10:30080"):
        assert ask(CLIENT, to, cluster=cluster).verdict == outside
        for source in ("pod", "node"):
            assert ask(source, to, cluster=cluster).verdict == pod
    # A pod that no detector tells is one more client outside (ETP-6).
    cluster = a_gateway(NOTHING, external_local=True, endpoints=endpoints)
    assert ask("pod", "203.0.113.9:80", cluster=cluster).verdict == outside
    assert ask("node", "203.0.113.9:80", cluster=cluster).verdict == pod


@pytest.mark.parametrize(
    ("source", "to", "verdict"),
    [
        ("198.51.100.99", "203.0.113.9:80", "balanced"),
        ("198.51.101.99", "203.0.113.9:80", "dropped"),
        ("10.244.0.77", "203.0.113.9:80", "dropped"),
        ("outside", "203.0.113.9:80", "balanced"),
        ("pod", "203.0.113.9:80", "balanced"),
        ("198.51.101.99", "198.51.100.7:80", "balanced"),
        ("198.51.101.99", "192.0.2.10:30080", "balanced"),
        ("198.51.101.99", "10.96.0.1:80", "balanced"),
        ("192.0.2.10", "203.0.113.9:80", "dropped"),
    ],
)
def test_source_ranges_hold_for_load_balancer_ips(source: str, to: str, verdict: str) -> None:
    found = ask(source, to, cluster=a_gateway(source_ranges=["198.51.100.0/24"]))
    assert found.verdict == verdict
    if source in ("outside", "pod"):
        assert "only for 198.51.100.0/24" in answers(found, "source ranges")[0]
    # Without any endpoint everyone is told so (SR-10).
    cluster = a_gateway(source_ranges=["198.51.100.0/24"], endpoints=[])
    assert ask(source, to, cluster=cluster).verdict == "refused"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("10.244.9.9", "in 10.244.0.0/16, where pods are: taken for a process in a pod on this node"),
        ("10.244.1.2", "counts as a pod"),
        ("192.0.2.10", "this node's"),
        ("198.51.100.99", "not in 10.244.0.0/16, where pods are: a sender outside this node"),
        ("fd00:1::7", "in fd00:1::/64, where pods are"),
        ("2001:db8::7", "not in fd00:1::/64, where pods are: a sender outside this node"),
    ],
)
def test_an_address_says_who_it_is(source: str, says: str) -> None:
    assert says in answers(ask(source, "10.96.0.1:80", cluster=a_gateway()), "client")[0]


def test_dsr_is_for_backends_elsewhere() -> None:
    found = ask(CLIENT, "203.0.113.9:80", cluster=a_gateway(mode=model.PacketMode.DSR))
    assert answers(found, "dsr") == [
        "10.244.1.2:8080: inside another packet, to answer the client without this node, "
        "which does not see how that fares"
    ]
    assert masqueraded(found) == {POD_HERE: NO} | NODE_NO
    assert "to 10.244.0.1:8080: no, since backends of a DSR service see their client" in answers(
        found, "masquerade"
    )
    assert found.reason == "the packet goes to a backend, which sees the client's address"
    assert "hash of the flow's addresses" in answers(found, "slot")[0]
    assert not answers(ask(CLIENT, "10.96.0.1:80", cluster=a_gateway(mode=model.PacketMode.DSR)), "dsr")


def test_a_client_outside_is_remembered_by_its_address() -> None:
    cluster = a_gateway(affinity_s=100)
    (web,) = inventory.read(cluster).ports
    address = installing.address(CLIENT)
    key = abi.LAYOUTS["affinity_key"].pack(address, web.id, 0)
    cluster._rows["affinity"][key] = abi.LAYOUTS["affinity"].pack(web.backends[1].id, NOW_S - 10)
    assert [one.ip for one in ask(CLIENT, "10.96.0.1:80", cluster=cluster).backends] == ["10.244.1.2"]
    assert len(ask("198.51.100.98", "10.96.0.1:80", cluster=cluster).backends) == 3
    assert "cannot be told" in answers(ask("outside", "10.96.0.1:80", cluster=cluster), "affinity")[0]


def test_a_packet_that_no_program_sees_is_left_alone() -> None:
    hooks = walk.Hooks("/cg", frozenset())
    assert ask("outside", "10.96.0.1:80", hooks=hooks).verdict == "untouched"
    assert ask("pod", "10.96.0.1:80", hooks=hooks).verdict == "balanced"
    assert ask("pod", "10.96.0.8:80/SCTP", hooks=hooks).verdict == "untouched"


def test_devices_inside_serve_what_begins_a_flow_where_there_is_no_uplink() -> None:
    hooks = walk.Hooks("/cg", frozenset(), (), ("veth1", "veth2"))
    found = ask("outside", "10.96.0.1:80", hooks=hooks)
    assert found.verdict == "balanced"
    (hook,) = answers(found, "hook")
    assert hook.startswith("no uplink is attached, but veth1, veth2 serve what begins a flow")


# --- the command ---


def test_the_command_prints_steps_and_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = a_cluster()
    monkeypatch.setattr(cluster, "close", lambda: None, raising=False)
    monkeypatch.setattr(inspection, "open_maps", lambda _root: cluster)
    monkeypatch.setattr(inspection, "pinned", lambda _root: argparse.Namespace(cgroup="/cg"))
    monkeypatch.setattr(inspection, "attached_devices", lambda _root, _netns: [])
    monkeypatch.setattr(inspection, "hooks", lambda _root, _identity: [inspection.Hook("connect6", "gone")])
    args = argparse.Namespace(
        bpffs=pathlib.Path("/nowhere"),
        output="json",
        source="pod",
        destination=kinds.parse_destination("10.96.0.1:80"),
    )
    assert explain.main(args) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == ["from", "to", "verdict", "reason", "service", "steps", "backends", "left_out"]
    assert (printed["from"], printed["to"], printed["verdict"]) == ("pod", "10.96.0.1:80/TCP", "balanced")
    assert printed["service"] == "default/web:http/TCP/IPv4"
    assert printed["steps"][1] == {"step": "hook", "result": "connect4 attached to /cg"}
    assert list(printed["backends"][0]) == ["ip", "port", "node", "zone", "state", "percent"]
    args.output = "table"
    assert explain.main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["STEP", "QUESTION", "ANSWER"]
    assert any(line.startswith("=     balanced") for line in lines)
    assert any(line.split()[:2] == ["10.244.0.1:8080", "33.33%"] for line in lines)


@pytest.mark.parametrize(
    ("source", "to", "why_not"),
    [
        ("fd00::1", "10.96.0.80:80", "--from fd00::1 is IPv6 and --to 10.96.0.80:80/TCP is IPv4"),
        ("10.244.0.1:4000", "[fd00:96::80]:80", "--from 10.244.0.1 is IPv4 and --to"),
        ("0.0.0.0", "10.96.0.80:80", "nobody connects from 0.0.0.0"),
        ("::", "[fd00:96::80]:80", "nobody connects from ::"),
    ],
)
def test_what_can_be_no_connection_is_wrong_usage(source: str, to: str, why_not: str) -> None:
    destination = kinds.parse_destination(to)
    args = argparse.Namespace(bpffs=pathlib.Path("/nowhere"), source=source, destination=destination)
    with pytest.raises(errors.ConfigError) as caught:
        explain.main(args)
    assert str(caught.value).removeprefix("--from: ").startswith(why_not)


# --- who is left out, and why ---


def why(found: explanation.Explanation) -> dict[str, str]:
    assert not {one.ip for one in found.left_out} & {one.ip for one in found.backends}
    return {one.ip: one.why for one in found.left_out}


def a_service_of(*endpoints: model.Endpoint, **options: typing.Any) -> fake.FakeMaps:
    made = fake.FakeMaps(installing.SIZES)
    installer = installing.Installer(made, maps.capacity(installing.SIZES))
    installer.node("192.0.2.10", host_netns=HOST_NETNS)
    installer.service("default/web", ["10.96.0.1"], endpoints, **options)
    return made


READY = endpoint("10.244.0.1")


@pytest.mark.parametrize(
    ("other", "because"),
    [
        (endpoint("10.244.0.2", **UNREADY), "its endpoint is not ready"),
        (endpoint("10.244.0.2", ready=False), "its endpoint is not ready; what it has it keeps"),
        (endpoint("10.244.0.2", ready=False, terminating=True), "it is ending, and others are ready"),
    ],
)
def test_why_a_backend_is_left_out_by_its_state(other: model.Endpoint, because: str) -> None:
    found = ask("pod", "10.96.0.1:80", cluster=a_service_of(READY, other))
    assert [choice.ip for choice in found.backends] == ["10.244.0.1"]
    assert why(found) == {"10.244.0.2": because}


def test_a_backend_on_another_node_is_left_out_under_a_local_policy() -> None:
    there = endpoint("10.244.0.2", "node-2")
    found = ask("pod", "10.96.0.1:80", cluster=a_service_of(READY, there, internal_local=True))
    assert why(found) == {"10.244.0.2": "it is on another node, and the policy is Local"}
    nobody = ask("pod", "10.96.0.1:80", cluster=a_service_of(there, internal_local=True))
    assert nobody.verdict == "dropped"
    assert why(nobody) == why(found)


def test_a_backend_of_another_zone_is_left_out_by_hints() -> None:
    here = endpoint("10.244.0.1", zone_hints=(installing.ZONE,))
    there = endpoint("10.244.0.2", zone_hints=("zone-b",))
    found = ask("pod", "10.96.0.1:80", cluster=a_service_of(here, there))
    assert why(found) == {"10.244.0.2": "topology hints give it to others"}


@pytest.mark.parametrize(
    ("hints", "options", "because"),
    [
        (((installing.ZONE,), ("zone-b",)), {}, "topology hints give it to others"),
        (((), ()), {"zone_spill_over": 10.0}, "zone-a keeps its own flows: lbproxy.io/zone-spill-over"),
        # Hints are for those who do not spill over.
        (
            ((installing.ZONE,), ("zone-b",)),
            {"zone_spill_over": 10.0},
            "zone-a keeps its own flows: lbproxy.io/zone-spill-over",
        ),
        (
            ((), ()),
            {"weights": model.Weights({installing.address("10.244.0.2"): 0}, {}, {})},
            "its weight is 0",
        ),
        (
            ((), ()),
            {
                "weights": model.Weights({installing.address("10.244.0.2"): 0}, {}, {}),
                "zone_spill_over": 10.0,
            },
            "its weight is 0",
        ),
    ],
)
def test_what_leaves_a_backend_of_another_zone_out(
    hints: tuple[tuple[str, ...], tuple[str, ...]], options: dict[str, typing.Any], because: str
) -> None:
    here = endpoint("10.244.0.1", zone_hints=hints[0])
    there = endpoint("10.244.0.2", "node-2")
    there = msgspec.structs.replace(there, location=model.Location("node-2", "zone-b", hints[1]))
    cluster = a_service_of(here, there, **options)
    assert why(ask("pod", "10.96.0.1:80", cluster=cluster)) == {"10.244.0.2": because}
    earlier = ~(tables.BackendSet.NOT_HINTED | tables.BackendSet.ZONE_KEEPS | tables.BackendSet.NO_WEIGHT)
    for key, row in list(cluster.rows(tables.Table.BACKENDS)):
        backend = tables.backend(row)
        cluster.apply(
            [tables.Put(tables.Table.BACKENDS, key, backend._replace(sets=backend.sets & earlier).pack())]
        )
    (said,) = why(ask("pod", "10.96.0.1:80", cluster=cluster)).values()
    assert "its weight is 0, lbproxy.io/zone-spill-over keeps" in said


def test_weight_0_among_local_ones_that_all_have_0_is_said() -> None:
    weights = model.Weights({installing.address("10.244.0.1"): 0}, {}, {})
    cluster = a_service_of(READY, endpoint("10.244.0.2", "node-2"), weights=weights, external_local=True)
    found = ask("pod", "10.96.0.1:80", cluster=cluster)
    assert [choice.ip for choice in found.backends] == ["10.244.0.2"]
    assert why(found)["10.244.0.1"] == "its weight is 0"


def test_hints_that_lead_to_unhealthy_ones_alone_leave_nobody_out() -> None:
    made = fake.FakeMaps(installing.SIZES)
    installer = installing.Installer(made, maps.capacity(installing.SIZES))
    port = model.PortKey(model.ServiceName("default", "web"), "http", model.Protocol.TCP, model.Family.IPV4)
    ill = topology.Place(installing.address("10.244.0.1"), 8080)
    installer.health.note(port, ill, health.Source.ACTIVE, usable=False)
    here = endpoint("10.244.0.1", zone_hints=(installing.ZONE,))
    others = [endpoint(f"10.244.0.{number}", zone_hints=("zone-b",)) for number in (2, 3)]
    weights = model.Weights({installing.address("10.244.0.3"): 0}, {}, {})
    installer.service("default/web", ["10.96.0.1"], [here, *others], weights=weights)
    assert why(ask("pod", "10.96.0.1:80", cluster=made)) == {
        "10.244.0.1": "it is unhealthy: probe-failed",
        "10.244.0.3": "its weight is 0",
    }


def test_backends_of_weight_0_and_unhealthy_ones_are_left_out() -> None:
    made = fake.FakeMaps(installing.SIZES)
    installer = installing.Installer(made, maps.capacity(installing.SIZES))
    name = model.ServiceName("default", "web")
    port = model.PortKey(name, "http", model.Protocol.TCP, model.Family.IPV4)
    ill = topology.Place(installing.address("10.244.0.3"), 8080)
    installer.health.note(port, ill, health.Source.ACTIVE, usable=False)
    weights = model.Weights({installing.address("10.244.0.2"): 0}, {}, {})
    three = [endpoint(f"10.244.0.{number}") for number in (1, 2, 3)]
    installer.service("default/web", ["10.96.0.1"], three, weights=weights)
    assert why(ask("pod", "10.96.0.1:80", cluster=made)) == {
        "10.244.0.2": "its weight is 0",
        "10.244.0.3": "it is unhealthy: probe-failed",
    }
    failed = notes.Trouble("default", "web", "http", 6, "10.244.0.3", 8080, False, 0, 2, "refused", 60)
    told = ask("pod", "10.96.0.1:80", cluster=made, noted=notes.Notes(troubles=(failed,)))
    [said] = [one.result for one in told.steps if one.step == "health"]
    assert said.endswith("10.244.0.3:8080 (probe-failed: refused, since 1970-01-01T00:01:00Z)")


def test_probes_that_are_asked_for_and_not_made_are_named() -> None:
    off = notes.Notes(
        probes_off="--probe-concurrency is 0", asked=(notes.Asked("default", "web", "http", "tcp every 5s"),)
    )
    wrong = notes.Notes(mistakes=(notes.Mistake("default", "web", "lbproxy.io/probe: 'tpc'"),))
    for noted, to, said in (
        (off, "10.96.0.1:80", ["tcp every 5s is asked for, and not made: --probe-concurrency is 0"]),
        (off, "10.96.0.4:80", []),
        (wrong, "10.96.0.1:80", ["none is made: lbproxy.io/probe: 'tpc'"]),
    ):
        told = ask("pod", to, noted=noted)
        assert [one.result for one in told.steps if one.step == "probes"] == said


def test_nobody_is_left_out_where_a_client_is_remembered() -> None:
    cluster = a_cluster()
    remember(cluster, "10.244.0.2", NOW_S)
    assert ask("node", "10.96.0.4:80", cluster=cluster).left_out == ()


# --- flows that are known, and another proxy's ---

OUTSIDE, FLOW_PORT = "203.0.113.7", 40000
TO = "198.51.100.7:80"


def with_flow(state: tables.FlowState, *, idle_s: int = 0, mark: int = 0) -> fake.FakeMaps:
    """A flow of a client outside to an external IP, as bpf/open.h would have written its first row."""
    cluster = a_cluster()
    backend = next(
        backend
        for one in inventory.read(cluster).ports
        if one.key.service.name == "web" and one.key.family is model.Family.IPV4
        for backend in one.backends
    )
    eighty, port = (80).to_bytes(2, "big"), FLOW_PORT.to_bytes(2, "big")
    source, dialled = installing.address(OUTSIDE), installing.address("198.51.100.7")
    key = tables.FlowKey(source, dialled, port, eighty, model.Protocol.TCP, 0)
    seen = (NOW_S - idle_s) * 10**9 >> 30
    to = (8080).to_bytes(2, "big")
    bits = int(state | tables.FlowState.ORIGINAL)
    row = tables.Flow(backend.address, port, to, backend.id | mark, seen, bytes(3), bits)
    timeouts = tables.NO_SETTINGS._replace(tcp_established_ticks=100, tcp_new_ticks=10)
    cluster.apply(
        [
            tables.Put(tables.Table.FLOWS, key.pack(), row.pack()),
            tables.Put(tables.Table.SETTINGS, tables.row_key(0), timeouts.pack()),
        ]
    )
    return cluster


def test_a_flow_that_is_known_stays_with_its_backend() -> None:
    state = tables.FlowState.REPLIED | tables.FlowState.ASSURED | tables.FlowState.MASQUERADED
    found = ask(OUTSIDE, TO, cluster=with_flow(state), port=FLOW_PORT)
    assert found.verdict == "balanced"
    assert [(one.ip, one.percent) for one in found.backends] == [("10.244.0.1", 100.0)]
    (step,) = (step.result for step in found.steps if step.step == "flow")
    assert step.startswith("to 10.244.0.1:8080, masqueraded, open; forgotten when it is idle for 100 s")
    # Another port is another flow.
    other = ask(OUTSIDE, TO, cluster=with_flow(state), port=FLOW_PORT + 1)
    assert len(other.backends) == 3


def test_a_flow_by_dsr_stays_with_its_backend_where_it_ends() -> None:
    cluster = with_flow(tables.FlowState.REPLIED, mark=outcomes.ELSEWHERE)
    found = ask(OUTSIDE, TO, cluster=cluster, port=FLOW_PORT)
    assert [(one.ip, one.percent) for one in found.backends] == [("10.244.0.1", 100.0)]


def test_a_flow_that_was_idle_for_too_long_is_a_new_one() -> None:
    # A tick is a little longer than a second.
    for idle_s, known in ((9, True), (13, False)):
        found = ask(OUTSIDE, TO, cluster=with_flow(tables.FlowState.REPLIED, idle_s=idle_s), port=FLOW_PORT)
        assert (len(found.backends) == 1) == known


def test_a_flow_that_is_held_is_another_proxys() -> None:
    found = ask(OUTSIDE, TO, cluster=with_flow(tables.FlowState.HELD), port=FLOW_PORT)
    assert (found.verdict, found.backends) == ("untouched", ())
    assert "proxy that has begun it" in found.reason
    assert found.steps[-1].result.startswith("held: another proxy")


@pytest.mark.parametrize(
    ("row", "source", "to", "verdict"),
    [
        ("HANDOVER_LEARN", "outside", TO, "untouched"),
        ("HANDOVER_LEARN", "pod", "10.96.0.1:80", "balanced"),
        ("HANDOVER_LEARN", "pod", "10.96.0.5:53/UDP", "balanced"),
        ("HANDOVER_RETURN", "outside", TO, "untouched"),
        ("HANDOVER_RETURN", "pod", "10.96.0.1:80", "untouched"),
    ],
)
def test_what_begins_during_a_handover(row: str, source: str, to: str, verdict: str) -> None:
    cluster = a_cluster()
    key = tables.row_key(abi.constant(row))
    cluster.apply([tables.Put(tables.Table.HANDOVER, key, (1).to_bytes(8, tables.BYTE_ORDER))])
    found = ask(source, to, cluster=cluster)
    assert found.verdict == verdict
    told = [step.step for step in found.steps]
    assert ("handover" in told) == (verdict == "untouched" or to.endswith("UDP"))
