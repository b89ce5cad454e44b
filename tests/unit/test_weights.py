import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.core import addresses, decode, model, plan, tables, weights

CLUSTER, LOCAL = tables.BackendSet.CLUSTER.value, tables.BackendSet.LOCAL.value


def address(text: str) -> bytes:
    packed = addresses.parse(text)
    assert packed is not None
    return packed


def endpoint(ip: str, node: str = "", zone: str = "") -> model.Endpoint:
    return model.Endpoint(address(ip), True, True, False, model.Location(node, zone))


def parsed(text: str) -> model.Weights:
    said, problems = weights.parse(text)
    assert said is not None
    assert problems == []
    return said


def test_an_address_comes_before_a_node_and_that_before_a_zone() -> None:
    said = parsed("node:worker-1=3, zone:eu-a=2,10.1.2.3=5 , fd00::1 = 0")
    assert weights.of(said, endpoint("10.1.2.3", "worker-1", "eu-a")) == 5
    assert weights.of(said, endpoint("10.1.2.4", "worker-1", "eu-a")) == 3
    assert weights.of(said, endpoint("10.1.2.4", "worker-2", "eu-a")) == 2
    assert weights.of(said, endpoint("10.1.2.4", "worker-2", "eu-b")) == 1
    assert weights.of(said, endpoint("fd00:0::1", "worker-1")) == 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("worker-1=3", "'worker-1=3' names no address, node:NAME or zone:NAME"),
        ("node:=3", "'node:=3' names no address, node:NAME or zone:NAME"),
        ("10.1.2.300=3", "'10.1.2.300=3' names no address, node:NAME or zone:NAME"),
        ("010.1.2.3=3", "'010.1.2.3=3' names no address, node:NAME or zone:NAME"),
        ("10.1.2.3", "'10.1.2.3' names no address, node:NAME or zone:NAME"),
        ("node:a=1001", "'node:a=1001' has no weight of 0 to 1000"),
        ("node:a=-1", "'node:a=-1' has no weight of 0 to 1000"),
        ("node:a=1.5", "'node:a=1.5' has no weight of 0 to 1000"),
        ("node:a=", "'node:a=' has no weight of 0 to 1000"),
        ("node:a=٣", "'node:a=\\u0663' has no weight of 0 to 1000"),
        ("node:a=" + 50 * "9", f"'node:a={33 * '9'}'... has no weight of 0 to 1000"),
    ],
)
def test_what_is_not_understood_is_passed_over(text: str, problem: str) -> None:
    assert weights.parse(text) == (None, [problem])
    said, problems = weights.parse(f"zone:b=2, {text}")
    assert said == parsed("zone:b=2")
    assert problems == [problem]


def test_what_is_said_twice_counts_once() -> None:
    said, problems = weights.parse("fd00::1=1, fd00:0::1=2")
    assert said == parsed("fd00::1=1")
    assert problems == ["'fd00:0::1=2' says it a second time"]


@given(st.text())
def test_no_text_is_too_strange(text: str) -> None:
    said, problems = weights.parse(text)
    assert said is None or any((said.addresses, said.nodes, said.zones))
    assert all(len(problem) < 400 and problem.isascii() for problem in problems)


NAMES = st.text("abc-", min_size=1, max_size=3)
SAID = st.builds(
    model.Weights,
    st.dictionaries(st.binary(min_size=16, max_size=16), st.integers(0, 1000), max_size=3),
    st.dictionaries(NAMES, st.integers(0, 1000), max_size=3),
    st.dictionaries(NAMES, st.integers(0, 1000), min_size=1, max_size=3),
)


@given(SAID)
def test_what_was_written_is_read_again(said: model.Weights) -> None:
    entries = [f"{addresses.text(name)}={weight}" for name, weight in said.addresses.items()]
    entries += [f"node:{name}={weight}" for name, weight in said.nodes.items()]
    entries += [f"zone:{name}={weight}" for name, weight in said.zones.items()]
    assert parsed(", ".join(entries)) == said


def test_who_has_no_weight_is_in_no_set_that_has_another() -> None:
    everyone = [endpoint("10.0.0.1", "here"), endpoint("10.0.0.2", "here"), endpoint("10.0.0.3", "there")]
    sets = (CLUSTER | LOCAL, CLUSTER | LOCAL, CLUSTER)
    said = parsed("10.0.0.1=0")
    assert weights.shares(said, everyone, sets) == ([0, CLUSTER | LOCAL, CLUSTER], [0, 1, 1])
    # No set is ever emptied.
    assert weights.shares(parsed("node:here=0"), everyone, sets) == ([LOCAL, LOCAL, CLUSTER], [1, 1, 1])
    assert weights.shares(parsed("10.0.0.1=0, 10.0.0.2=0, 10.0.0.3=0"), everyone, sets) == (
        list(sets),
        [1, 1, 1],
    )
    assert weights.shares(None, everyone, sets) == (sets, [1, 1, 1])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6))
def test_no_set_is_emptied_and_every_member_has_a_weight(found: list[tuple[int, int]]) -> None:
    endpoints = [endpoint(f"10.0.0.{number}") for number in range(len(found))]
    said = model.Weights({one.address: w for one, (_, w) in zip(endpoints, found, strict=True)}, {}, {})
    sets, each = weights.shares(said, endpoints, tuple(bits for bits, _ in found))
    for bit in (CLUSTER, LOCAL):
        before = [weight for bits, weight in found if bits & bit]
        after = [weight for bits, weight in zip(sets, each, strict=True) if bits & bit]
        assert len(after) == (sum(map(bool, before)) or len(before))
        assert all(after)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=8))
def test_reduced_weights_keep_their_proportions(some: list[int]) -> None:
    small = weights.reduced(some)
    assert max(small) <= weights.LARGEST_PRODUCT
    assert [weight == 0 for weight in small] == [weight == 0 for weight in some]
    assert weights.reduced(small) == small or max(some) > weights.LARGEST_PRODUCT
    for one, other in itertools.pairwise(zip(some, small, strict=True)):
        # Within what rounding to ten thousand steps leaves, and the step that nobody is lost below.
        assert abs(one[0] * other[1] - other[0] * one[1]) <= 2 * max(some)


def test_the_annotation_reaches_the_plan() -> None:
    upsert = decode.service(
        {
            "metadata": {"name": "web", "annotations": {"lbproxy.io/weights": "10.0.0.1=0, zone:b=4, x=1"}},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}]},
        }
    )
    assert upsert.warnings == (
        "metadata.annotations[lbproxy.io/weights]: "
        "'x=1' names no address, node:NAME or zone:NAME: passed over",
    )
    slice_ = model.EndpointSlice(
        "default",
        "web-1",
        model.ServiceName("default", "web"),
        model.Family.IPV4,
        (model.SlicePort("http", model.Protocol.TCP, 8080),),
        (endpoint("10.0.0.1"), endpoint("10.0.0.2"), endpoint("10.0.0.3", zone="b")),
        0.0,
    )
    assert isinstance(upsert.value, model.Service)
    (port,) = plan.plan_service(
        upsert.value, [slice_], "node-a", "zone-1", plan.Defaults(model.Algorithm.RANDOM)
    )
    assert [(backend.sets, backend.weight) for backend in port.backends] == [(0, 0), (1, 1), (1, 4)]
    assert list(plan.slots(port, tables.BackendSet.CLUSTER)) == [1, 2, 2, 2, 2]
    agreed = msgspec.structs.replace(port, algorithm=model.Algorithm.MAGLEV)
    slots = list(plan.slots(agreed, tables.BackendSet.CLUSTER))
    assert slots.count(2) == pytest.approx(4 * slots.count(1), abs=4)
    assert slots.count(0) == 0


def test_an_annotation_that_is_no_text_is_one_warning() -> None:
    upsert = decode.service(
        {
            "metadata": {"name": "web", "annotations": {"lbproxy.io/weights": 3}},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]},
        }
    )
    assert isinstance(upsert.value, model.Service)
    assert upsert.value.weights is None
    assert upsert.warnings == (
        "metadata.annotations[lbproxy.io/weights]: 3 is not a text: put it in quotes: all weights are equal",
    )
