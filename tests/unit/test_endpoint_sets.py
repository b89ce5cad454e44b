"""Which endpoints each policy may use on node-a in zone-1: core.topology."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.core import addresses, model, topology
from tests import strategies

NODE, ZONE = "node-a", "zone-1"
BOTH = topology.CLUSTER | topology.LOCAL
C, L = topology.CLUSTER, topology.LOCAL


def ip(text: str) -> bytes:
    address = addresses.parse(text)
    assert address is not None
    return address


def endpoint(
    conditions: str = "ready",
    node: str = "node-b",
    zones: str = "",
    nodes: str = "",
    address: str = "10.0.0.1",
) -> model.Endpoint:
    words = set(conditions.split("+"))
    return model.Endpoint(
        address=ip(address),
        ready="ready" in words,
        serving=bool(words & {"ready", "serving"}),
        terminating="terminating" in words,
        location=model.Location(node, "", tuple(zones.split()), tuple(nodes.split())),
    )


HERE, THERE = "node-a", "node-b"

CASES = {
    "ready endpoints are used, here also for Local": (
        [endpoint(node=HERE), endpoint(node=THERE)],
        [BOTH, C],
        True,
    ),
    "an endpoint without a node is never local (ETP-10)": ([endpoint(node="")], [C], True),
    "unready endpoints are not used (EP-5)": ([endpoint("serving", HERE), endpoint("none")], [0, 0], False),
    "none": ([], [], False),
    "terminating and serving steps in for nothing ready (EP-3)": (
        [endpoint("serving+terminating", HERE), endpoint("serving+terminating", THERE)],
        [BOTH, C],
        True,
    ),
    "the fallback of Local is its own (EP-4, EP-9)": (
        [endpoint("serving+terminating", HERE), endpoint("ready", THERE)],
        [L, C],
        True,
    ),
    "no local endpoint": ([endpoint(node=THERE)], [C], True),
    "terminating without serving is not used (EP-6)": ([endpoint("terminating", HERE)], [0], False),
    "ready beats terminating (EP-7)": (
        [endpoint("ready+terminating", HERE), endpoint("serving+terminating", HERE)],
        [BOTH, 0],
        True,
    ),
    "zone hints narrow Cluster (TOP-3)": (
        [endpoint(zones="zone-1"), endpoint(zones="zone-2"), endpoint(zones="zone-2 zone-1")],
        [C, 0, C],
        True,
    ),
    "zone hints never narrow Local (TOP-7)": (
        [endpoint(node=HERE, zones="zone-2"), endpoint(zones="zone-1")],
        [L, C],
        True,
    ),
    "one ready endpoint without a hint disables the level (TOP-4)": (
        [endpoint(zones="zone-1"), endpoint()],
        [C, C],
        True,
    ),
    "unready endpoints without a hint do not (TOP-4)": (
        [endpoint(zones="zone-1"), endpoint(zones="zone-2"), endpoint("none")],
        [C, 0, 0],
        True,
    ),
    "no hint for this zone: all are used": (
        [endpoint(zones="zone-2"), endpoint(zones="zone-3")],
        [C, C],
        True,
    ),
    "node hints come before zone hints (TOP-2)": (
        [endpoint(zones="zone-1", nodes="node-b"), endpoint(zones="zone-2", nodes="node-a")],
        [0, C],
        True,
    ),
    "no node hint for this node: the zone decides": (
        [endpoint(zones="zone-1", nodes="node-b"), endpoint(zones="zone-2", nodes="node-c")],
        [C, 0],
        True,
    ),
    "one ready endpoint without a node hint disables that level, too (TOP-4)": (
        [endpoint(nodes="node-a"), endpoint()],
        [C, C],
        True,
    ),
    "the terminating fallback ignores hints (TOP-8)": (
        [endpoint("serving+terminating", zones="zone-2"), endpoint("serving+terminating", zones="zone-1")],
        [C, C],
        True,
    ),
}


@pytest.mark.parametrize(("endpoints", "sets", "has_any"), CASES.values(), ids=CASES)
def test_usable(endpoints: list[model.Endpoint], sets: list[int], has_any: bool) -> None:
    assert topology.usable(endpoints, NODE, ZONE)[:2] == (tuple(sets), has_any)


def test_a_node_without_a_zone_matches_no_zone_hint() -> None:
    hinted = [endpoint(zones="zone-1"), endpoint(zones="zone-2")]
    assert topology.usable(hinted, NODE, "").sets == (C, C)
    by_node = [endpoint(nodes="node-a"), endpoint(nodes="node-b")]
    assert topology.usable(by_node, NODE, "").sets == (C, 0)


def test_a_proxy_without_a_node_name_has_no_local_endpoints() -> None:
    assert topology.usable([endpoint(node="")], "", ZONE).sets == (C,)


@given(st.lists(strategies.endpoints(model.Family.IPV4)))
def test_the_sets_keep_their_promises(endpoints: list[model.Endpoint]) -> None:
    usable = topology.usable(endpoints, NODE, ZONE)
    chosen = {
        bit: [e for e, sets in zip(endpoints, usable.sets, strict=True) if sets & bit] for bit in (C, L)
    }
    assert usable.has_any is bool(chosen[C])
    for bit in (C, L):
        # All ready or all draining, never a mixture, never an endpoint that serves nobody.
        assert all(e.ready for e in chosen[bit]) or all(topology.is_draining(e) for e in chosen[bit])
    assert all(e.location.node_name == NODE for e in chosen[L])
    if any(e.ready for e in endpoints):
        assert all(e.ready for e in chosen[C])
    here = [e for e in endpoints if e.location.node_name == NODE]
    assert bool(chosen[L]) is any(e.ready or topology.is_draining(e) for e in here)


def slice_(
    name: str, *endpoints: model.Endpoint, ports: tuple[tuple[str, model.Protocol, int], ...]
) -> model.EndpointSlice:
    return model.EndpointSlice(
        namespace="default",
        name=name,
        service=model.ServiceName("default", "web"),
        family=model.Family.IPV4,
        ports=tuple(model.SlicePort(*port) for port in ports),
        endpoints=endpoints,
        trigger_time_s=0.0,
    )


TCP, UDP = model.Protocol.TCP, model.Protocol.UDP
HTTP = (("http", TCP, 8080),)


def merged(*slices: model.EndpointSlice, name: str = "http") -> dict[tuple[bytes, int], model.Endpoint]:
    return dict(topology.merge(slices, name, TCP, model.Family.IPV4).items())


def test_ports_match_by_name_and_protocol_and_carry_the_slices_number() -> None:
    a, b, c, d = (endpoint(address=f"10.0.0.{n}") for n in range(1, 5))
    assert merged(
        slice_("1", a, ports=HTTP),
        slice_("2", b, ports=(("http", TCP, 9090),)),
        slice_("3", c, ports=(("http", UDP, 8080), ("", TCP, 8080))),
        slice_("4", d, ports=()),
    ) == {(a.address, 8080): a, (b.address, 9090): b}


def test_another_family_is_left_out() -> None:
    assert topology.merge([slice_("1", endpoint(), ports=HTTP)], "http", TCP, model.Family.IPV6) == {}


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [
        ("ready", "serving+terminating", "ready"),
        ("serving+terminating", "ready", "ready"),
        ("serving+terminating", "terminating", "serving+terminating"),
        ("terminating", "serving+terminating", "terminating"),
        ("none", "ready", "ready"),
        ("ready", "none", "none"),
    ],
)
def test_of_duplicates_a_live_entry_beats_a_terminating_one(first: str, second: str, winner: str) -> None:
    two = merged(slice_("1", endpoint(first), ports=HTTP), slice_("2", endpoint(second), ports=HTTP))
    assert list(two.values()) == [endpoint(winner)]
    within = merged(slice_("1", endpoint(first), endpoint(second), ports=HTTP))
    assert list(within.values()) == [endpoint(winner)]


def test_conflicting_ports_of_one_name_both_answer() -> None:
    assert len(merged(slice_("1", endpoint(), ports=(("http", TCP, 8080), ("http", TCP, 8081))))) == 2
