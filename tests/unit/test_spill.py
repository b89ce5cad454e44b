import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.core import decode, model, plan, spill, tables

CLUSTER, LOCAL = tables.BackendSet.CLUSTER.value, tables.BackendSet.LOCAL.value


def endpoint(zone: str, *, ready: bool = True, going: bool = False, host: int = 1) -> model.Endpoint:
    return model.Endpoint(bytes([host] * 16), ready, ready, going, model.Location("", zone))


def share_of(zone: str, factor: float, *found: tuple[str, bool]) -> float:
    """How much of what zone `zone` sends stays in it, by what is drawn from."""
    endpoints = [endpoint(where, ready=ready) for where, ready in found]
    sets = [CLUSTER if ready else 0 for _, ready in found]
    left, weights = spill.shares(factor, zone, endpoints, sets, [1] * len(found), None)
    drawn = [w if bits & CLUSTER else 0 for bits, w in zip(left, weights, strict=True)]
    inside = sum(w for w, one in zip(drawn, endpoints, strict=True) if one.location.zone == zone)
    return inside / sum(drawn)


UP, DOWN = True, False


@pytest.mark.parametrize(
    ("found", "stays"),
    [
        # As many in each zone: all stays.
        ([("a", UP), ("a", UP), ("b", UP), ("b", UP)], 1.0),
        # Three of four are enough with 1.4, two of four are not.
        ([*[("a", UP)] * 3, ("a", DOWN), *[("b", UP)] * 4], 1.0),
        ([*[("a", UP)] * 2, *[("a", DOWN)] * 2, *[("b", UP)] * 4], 0.7),
        # One against nine, five on average: a fifth, and 1.4 times that.
        ([("a", UP), *[("b", UP)] * 9], 0.28),
        # Nobody here, or nobody elsewhere.
        ([("a", DOWN), ("b", UP)], 0.0),
        ([("a", UP), ("a", DOWN), ("b", DOWN)], 1.0),
        # Three zones, of which one has nobody left.
        ([*[("a", UP)] * 2, *[("b", UP)] * 2, ("c", DOWN)], 1.0),
    ],
)
def test_what_stays_in_the_zone(found: list[tuple[str, bool]], stays: float) -> None:
    assert share_of("a", 1.4, *found) == pytest.approx(stays, abs=0.002)


def test_a_node_of_no_zone_prefers_none() -> None:
    endpoints = [endpoint(""), endpoint("b")]
    assert spill.shares(1.4, "", endpoints, [CLUSTER] * 2, [1, 1], None) == ([CLUSTER] * 2, [1, 1])


def test_who_is_shutting_down_is_not_missed() -> None:
    endpoints = [endpoint("a"), endpoint("a", ready=False, going=True), endpoint("b")]
    left, _ = spill.shares(1.0, "a", endpoints, [CLUSTER, 0, CLUSTER], [1, 1, 1], None)
    assert left == [CLUSTER, 0, 0]


def test_the_sets_of_local_policies_stay_as_they_are() -> None:
    endpoints = [endpoint("a"), endpoint("a"), endpoint("b")]
    sets = [CLUSTER | LOCAL, CLUSTER | LOCAL, CLUSTER]
    left, given = spill.shares(1.4, "a", endpoints, sets, [1, 3, 1], None)
    assert left == [CLUSTER | LOCAL, CLUSTER | LOCAL, 0]
    assert given == [1, 3, 1]
    # Half of the zone's weight is missing: proportions within it stay.
    more = [*endpoints, endpoint("a", ready=False)]
    left, given = spill.shares(1.0, "a", more, [*sets, 0], [1, 3, 4, 0], None)
    assert left == [*sets, 0]
    assert given[1] == 3 * given[0]
    assert 0 < given[2] < sum(given[:2])


ZONES = st.sampled_from("ab")
ENDPOINTS = st.lists(st.tuples(ZONES, st.booleans(), st.integers(1, 1000)), min_size=1, max_size=12)


@given(ENDPOINTS, st.floats(1, 10))
def test_no_set_is_emptied_no_weight_lost_and_no_zone_overloaded(
    found: list[tuple[str, bool, int]], factor: float
) -> None:
    endpoints = [endpoint(zone, ready=ready, host=n) for n, (zone, ready, _) in enumerate(found)]
    said = model.Weights({one.address: w for one, (_, _, w) in zip(endpoints, found, strict=True)}, {}, {})
    sets = [CLUSTER if ready else 0 for _, ready, _ in found]
    given = [weight for _, _, weight in found]
    left, weights = spill.shares(factor, "a", endpoints, sets, given, said)
    drawn = [w if bits & CLUSTER else 0 for bits, w in zip(left, weights, strict=True)]
    assert bool(sum(drawn)) is any(sets)
    assert all(w <= 10_000 for w in drawn)
    mine = [one.location.zone == "a" for one in endpoints]
    usable = sum(w for w, bits, here in zip(given, sets, mine, strict=True) if bits and here)
    everyone = sum(w for w, bits in zip(given, sets, strict=True) if bits)
    if usable and usable < everyone:
        inside = sum(w for w, here in zip(drawn, mine, strict=True) if here) / sum(drawn)
        assert inside <= factor * usable / (everyone / 2) + 0.02


@pytest.mark.parametrize("text", ["0.9", "11", "x", "", "1.4.1", "nan", "1e0"])
def test_what_is_no_factor_is_one_warning_and_hints_hold(text: str) -> None:
    upsert = decode.service(
        {
            "metadata": {"name": "web", "annotations": {"lbproxy.io/zone-spill-over": text}},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]},
        }
    )
    assert isinstance(upsert.value, model.Service)
    assert upsert.value.zone_spill_over == 0
    assert upsert.warnings == (
        f"metadata.annotations[lbproxy.io/zone-spill-over]: {text!a} is no number from 1 to 10: passed over",
    )


@pytest.mark.parametrize("mode", ["snat", "dsr"])
def test_with_the_annotation_zones_count_and_hints_do_not(mode: str) -> None:
    annotations = {"lbproxy.io/zone-spill-over": "1.4", "lbproxy.io/mode": mode}
    service = decode.service(
        {
            "metadata": {"name": "web", "annotations": annotations},
            "spec": {
                "type": "NodePort",
                "clusterIP": "10.96.0.1",
                "ports": [{"port": 80, "nodePort": 30080}],
            },
        }
    ).value
    slice_ = decode.endpoint_slice(
        {
            "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "ports": [{"name": "", "port": 80}],
            "endpoints": [
                {"addresses": [f"10.0.0.{host}"], "zone": zone, "hints": {"forZones": [{"name": "b"}]}}
                for host, zone in enumerate("aabb")
            ],
        }
    ).value
    assert isinstance(service, model.Service)
    assert isinstance(slice_, model.EndpointSlice)
    defaults = plan.Defaults(model.Algorithm.RANDOM)
    for zone, wanted in (("a", [1, 1, 0, 0]), ("b", [0, 0, 1, 1]), ("c", [1, 1, 1, 1])):
        (port,) = plan.plan_service(service, [slice_], "node", zone, defaults)
        # With DSR hints hold: for all in zone b, for nobody elsewhere.
        assert [one.sets & CLUSTER for one in port.backends] == (wanted if mode == "snat" else [1] * 4)
