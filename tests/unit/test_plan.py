import collections
import random
import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbproxy.core import addresses, decode, maglev, model, plan, tables
from tests import strategies

NODE, ZONE = "node-a", "zone-1"
RANDOM, MAGLEV = model.Algorithm.RANDOM, model.Algorithm.MAGLEV
CLUSTER, LOCAL = tables.BackendSet.CLUSTER, tables.BackendSet.LOCAL
Kind, State = tables.FrontendKind, tables.BackendState
Object = dict[str, typing.Any]


def address(text: str) -> bytes:
    packed = addresses.parse(text)
    assert packed is not None
    return packed


def service(**spec: typing.Any) -> model.Service:
    ingress = spec.pop("ingress", [])
    value = decode.service(
        {
            "metadata": {"name": "web"},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}]} | spec,
            "status": {"loadBalancer": {"ingress": [{"ip": ip} for ip in ingress]}},
        }
    ).value
    assert isinstance(value, model.Service)
    return value


def dual_stack(**spec: typing.Any) -> model.Service:
    families = {"clusterIPs": ["10.96.0.1", "2001:db8:96::1"], "ipFamilies": ["IPv4", "IPv6"]}
    return service(**families, **spec)


def endpoint(address: str, conditions: str = "ready", node: str = "node-b") -> Object:
    words = conditions.split("+")
    return {
        "addresses": [address],
        "nodeName": node,
        "zone": "zone-2",
        "conditions": {
            "ready": "ready" in words,
            "serving": "ready" in words or "serving" in words,
            "terminating": "terminating" in words,
        },
    }


def slice_(
    *endpoints: Object, name: str = "web-1", family: str = "IPv4", port: int = 8080
) -> model.EndpointSlice:
    value = decode.endpoint_slice(
        {
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": family,
            "ports": [{"name": "http", "port": port}],
            "endpoints": endpoints,
        }
    ).value
    assert isinstance(value, model.EndpointSlice)
    return value


def planned(
    known: model.Service,
    *slices: model.EndpointSlice,
    default: model.Algorithm = RANDOM,
    mode: model.PacketMode = model.PacketMode.SNAT,
    node_ips: tuple[str, ...] = (),
) -> list[plan.PortPlan]:
    defaults = plan.Defaults(default, mode, node_ips=tuple(map(address, node_ips)))
    return plan.plan_service(known, slices, NODE, ZONE, defaults)


Dialled = tuple[str, int, tables.FrontendKind, tables.BackendSet, bool]


def frontends(port: plan.PortPlan, outside: bool = False) -> set[Dialled]:
    """Where pods and the node dial, or with `outside` what clients outside have instead."""
    listed = [
        (addresses.text(front.address), front.port, front.kind, front.set, front.drop)
        for front in port.frontends
        if front.outside is outside
    ]
    assert len(set(listed)) == len(listed)
    return set(listed)


def test_every_port_and_family_has_its_plan() -> None:
    ports = [{"name": "http", "port": 80, "nodePort": 30080}, {"name": "dns", "port": 53, "protocol": "UDP"}]
    known = dual_stack(
        type="LoadBalancer",
        ports=ports,
        externalIPs=["198.51.100.1", "2001:db8:1::1"],
        ingress=["203.0.113.1"],
    )
    http4, dns4, http6, dns6 = planned(known, slice_(endpoint("10.244.0.1")))
    assert [str(port.key) for port in (http4, dns4, http6, dns6)] == [
        "default/web:http/TCP/IPv4",
        "default/web:dns/UDP/IPv4",
        "default/web:http/TCP/IPv6",
        "default/web:dns/UDP/IPv6",
    ]
    assert frontends(http4) == {
        ("10.96.0.1", 80, Kind.CLUSTER_IP, CLUSTER, False),
        ("198.51.100.1", 80, Kind.EXTERNAL_IP, CLUSTER, False),
        ("203.0.113.1", 80, Kind.LOAD_BALANCER, CLUSTER, False),
        ("0.0.0.0", 30080, Kind.NODE_PORT, CLUSTER, False),
    }
    assert frontends(http6) == {
        ("2001:db8:96::1", 80, Kind.CLUSTER_IP, CLUSTER, False),
        ("2001:db8:1::1", 80, Kind.EXTERNAL_IP, CLUSTER, False),
        ("::", 30080, Kind.NODE_PORT, CLUSTER, False),
    }
    assert {front.protocol for front in dns4.frontends} == {model.Protocol.UDP}
    assert (len(http4.backends), len(http6.backends), len(dns4.backends)) == (1, 0, 0)


def test_a_family_without_a_cluster_ip_has_nothing() -> None:
    known = service(type="NodePort", ports=[{"name": "http", "port": 80, "nodePort": 30080}])
    (port,) = planned(known, slice_(endpoint("2001:db8::1"), family="IPv6"))
    assert port.key.family is model.Family.IPV4
    assert port.backends == ()


def test_an_address_that_is_external_and_load_balancer_ip_is_one_frontend() -> None:
    known = service(type="LoadBalancer", externalIPs=["203.0.113.1", "10.96.0.1"], ingress=["203.0.113.1"])
    (port,) = planned(known)
    assert frontends(port) == {
        ("10.96.0.1", 80, Kind.CLUSTER_IP, CLUSTER, False),
        ("203.0.113.1", 80, Kind.EXTERNAL_IP, CLUSTER, False),
    }


HERE, THERE = endpoint("10.244.0.1", node=NODE), endpoint("10.244.0.2", node="node-b")
LEAVING_HERE = endpoint("10.244.0.3", "serving+terminating", NODE)


@pytest.mark.parametrize(
    ("endpoints", "local", "cluster_slots", "local_slots", "drop", "outside_drop"),
    [
        pytest.param([HERE, THERE], True, 2, 1, False, False, id="a local endpoint"),
        pytest.param([THERE], True, 1, 0, True, True, id="none here, some elsewhere: drop (ITP-2)"),
        pytest.param([], True, 0, 0, False, False, id="none anywhere: refuse (REJ-1)"),
        pytest.param([], False, 0, 0, False, False, id="none anywhere, Cluster policy"),
        pytest.param(
            [endpoint("10.244.0.1", "none")], True, 0, 0, False, False, id="none that serves: refuse"
        ),
        pytest.param(
            [LEAVING_HERE, THERE], True, 1, 1, False, False, id="the last local one is leaving (EP-9)"
        ),
        pytest.param([THERE], False, 1, 0, False, True, id="Cluster policy"),
    ],
)
def test_internal_policy_governs_the_cluster_ip_and_external_policy_clients_outside(
    endpoints: list[Object],
    local: bool,
    cluster_slots: int,
    local_slots: int,
    drop: bool,
    outside_drop: bool,
) -> None:
    known = service(
        type="NodePort",
        ports=[{"name": "http", "port": 80, "nodePort": 30080}],
        internalTrafficPolicy="Local" if local else "Cluster",
        externalTrafficPolicy="Local",
    )
    (port,) = planned(known, slice_(*endpoints))
    assert frontends(port) == {
        ("10.96.0.1", 80, Kind.CLUSTER_IP, LOCAL if local else CLUSTER, drop),
        # Clients on this node are short-circuited to all endpoints (ETP-4, ETP-5).
        ("0.0.0.0", 30080, Kind.NODE_PORT, CLUSTER, False),
    }
    assert frontends(port, outside=True) == {("0.0.0.0", 30080, Kind.NODE_PORT, LOCAL, outside_drop)}
    assert [front.external_local for front in port.frontends] == [False, True, False]
    assert len(plan.slots(port, CLUSTER)) == cluster_slots
    assert len(plan.slots(port, LOCAL)) == local_slots
    assert (port.internal_local, port.external_local) == (local, True)


def test_all_known_endpoints_are_backends_in_order() -> None:
    (port,) = planned(
        service(),
        slice_(endpoint("10.244.0.9"), endpoint("10.244.0.3", "serving+terminating"), name="a"),
        slice_(endpoint("10.244.0.3"), endpoint("10.244.0.4", "none"), name="b", port=9090),
    )
    listed = [
        (addresses.text(backend.address), backend.port, backend.state, backend.sets)
        for backend in port.backends
    ]
    assert listed == [
        ("10.244.0.3", 8080, State.TERMINATING, 0),
        ("10.244.0.3", 9090, State.ACTIVE, CLUSTER),
        ("10.244.0.4", 9090, State.UNREADY, 0),
        ("10.244.0.9", 8080, State.ACTIVE, CLUSTER),
    ]
    assert {(backend.node_name, backend.zone, backend.weight) for backend in port.backends} == {
        ("node-b", "zone-2", 1)
    }


@pytest.mark.parametrize("default", [RANDOM, MAGLEV])
@pytest.mark.parametrize("own", [None, RANDOM, MAGLEV])
def test_a_services_own_algorithm_comes_first(default: model.Algorithm, own: model.Algorithm | None) -> None:
    known = msgspec.structs.replace(service(sessionAffinity="ClientIP"), algorithm=own)
    (port,) = planned(known, default=default)
    assert port.algorithm is (default if own is None else own)
    assert port.affinity_s == 10800


def test_random_slots_are_the_usable_backends_once_each() -> None:
    (port,) = planned(service(), slice_(HERE, THERE, endpoint("10.244.0.4", "none")))
    assert list(plan.slots(port, CLUSTER)) == [0, 1]
    assert list(plan.slots(port, LOCAL)) == [0]


@pytest.mark.parametrize(("weights", "slots"), [((1, 3), (1, 3)), ((4, 6), (2, 3)), ((7, 7), (1, 1))])
def test_weights_are_as_many_random_slots(weights: tuple[int, int], slots: tuple[int, int]) -> None:
    assert slots_of(weights) == dict(enumerate(slots))


def test_weights_that_no_small_table_shows_have_their_share_of_one() -> None:
    slots = slots_of((1, 999))
    assert (slots[0], slots.total()) == (1, maglev.SIZES[0])
    slots = slots_of((500, 999))
    assert slots.total() == maglev.SIZES[0]
    assert slots[1] == pytest.approx(2 * slots[0], abs=4)


def slots_of(weights: tuple[int, int]) -> collections.Counter[int]:
    (port,) = planned(service(), slice_(HERE, THERE))
    pairs = zip(port.backends, weights, strict=True)
    weighted = tuple(msgspec.structs.replace(backend, weight=weight) for backend, weight in pairs)
    return collections.Counter(plan.slots(msgspec.structs.replace(port, backends=weighted), CLUSTER))


def test_maglev_slots_hold_what_another_node_holds_too() -> None:
    endpoints = [endpoint(f"10.244.0.{host}", node=f"node-{host % 3}") for host in range(1, 30)]
    shuffled = list(endpoints)
    random.Random(1).shuffle(shuffled)
    one, other = (
        plan.plan_service(service(), [slice_(*listed)], node, zone, plan.Defaults(MAGLEV))[0]
        for listed, node, zone in ((endpoints, "node-1", "zone-1"), (shuffled, "node-2", ""))
    )
    tables_ = [[port.backends[index].address for index in plan.slots(port, CLUSTER)] for port in (one, other)]
    assert tables_[0] == tables_[1]
    assert len(tables_[0]) == maglev.size(29)


def test_ten_thousand_endpoints_in_one_service() -> None:
    slices = [
        slice_(*(endpoint(f"10.{part}.{host >> 8}.{host & 255}") for host in range(1000)), name=f"web-{part}")
        for part in range(10)
    ]
    (port,) = planned(service(), *slices)
    assert list(plan.slots(port, CLUSTER)) == list(range(10_000))
    hashed = msgspec.structs.replace(port, algorithm=MAGLEV)
    assert len(set(plan.slots(hashed, CLUSTER))) == 10_000


@st.composite
def cases(draw: st.DrawFn) -> tuple[model.Service, list[model.EndpointSlice]]:
    known = draw(strategies.services())
    slices = draw(st.lists(strategies.slices(known.name), max_size=4, unique_by=lambda slice_: slice_.name))
    return known, slices


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_slices_does_not_matter(
    case: tuple[model.Service, list[model.EndpointSlice]], shuffling: random.Random
) -> None:
    known, slices = case
    shuffled = list(slices)
    shuffling.shuffle(shuffled)
    assert planned(known, *shuffled) == planned(known, *slices)


def test_of_slices_that_disagree_about_an_endpoint_the_same_one_always_wins() -> None:
    ready, unready = slice_(HERE, name="a"), slice_(endpoint("10.244.0.1", "none"), name="b")
    states = {
        port.backends[0].state
        for slices in ((ready, unready), (unready, ready))
        for port in planned(service(), *slices)
    }
    assert states == {State.UNREADY}


PAIR = ("outside", "external_local")


@given(cases())
def test_a_plan_keeps_its_promises(case: tuple[model.Service, list[model.EndpointSlice]]) -> None:
    known, slices = case
    plans = planned(known, *slices)
    assert len({port.key for port in plans}) == len(plans) == len(known.ports) * len(known.cluster_ips)
    dialled = [
        (front.address, front.port, front.protocol, front.kind is Kind.NODE_PORT, front.outside)
        for port in plans
        for front in port.frontends
    ]
    assert len(set(dialled)) == len(dialled), "no two frontends of a service are the same"
    for port in plans:
        places = [(backend.address, backend.port) for backend in port.backends]
        assert places == sorted(set(places))
        assert all(addresses.family_of(address) is port.key.family for address, _ in places)
        assert all(addresses.family_of(front.address) is port.key.family for front in port.frontends)
        usable = any(backend.sets & (CLUSTER | LOCAL) for backend in port.backends)
        for backend in port.backends:
            assert backend.state not in (State.UNREADY, State.SERVING) or not backend.sets & (CLUSTER | LOCAL)
        for front in port.frontends:
            slots = plan.slots(port, front.set)
            assert all(port.backends[index].sets & front.set for index in slots)
            assert set(slots) == {i for i, backend in enumerate(port.backends) if backend.sets & front.set}
            assert front.drop is (usable and not slots)
            of_cluster_ip = front.kind is Kind.CLUSTER_IP and known.internal_local
            assert front.set is CLUSTER or of_cluster_ip or front.outside
            assert front.restricted is (bool(port.source_ranges) and front.kind is Kind.LOAD_BALANCER)
        pairs = [{(f.address, f.kind) for f in port.frontends if getattr(f, which)} for which in PAIR]
        assert pairs[0] == pairs[1]
        outer = {(f.address, f.kind) for f in port.frontends if f.kind is not Kind.CLUSTER_IP}
        assert pairs[0] == (outer if known.external_local else set())


@given(st.lists(strategies.endpoints(model.Family.IPV4, heaviest=9), max_size=6))
@settings(max_examples=50)
def test_slots_of_weighted_backends_hold_each_usable_one(endpoints: list[model.Endpoint]) -> None:
    slices = msgspec.structs.replace(slice_(), endpoints=tuple(endpoints))
    (port,) = planned(service(), slices)
    for backend_set in (CLUSTER, LOCAL):
        expected = {i for i, backend in enumerate(port.backends) if backend.sets & backend_set}
        assert set(plan.slots(port, backend_set)) == expected


def test_only_a_service_that_is_reached_from_outside_has_rows_for_it() -> None:
    known = service(externalTrafficPolicy="Local", externalIPs=["198.51.100.1"])
    (port,) = planned(known, slice_(HERE, THERE))
    assert frontends(port, outside=True) == {("198.51.100.1", 80, Kind.EXTERNAL_IP, LOCAL, False)}
    (port,) = planned(service(externalTrafficPolicy="Local", ingress=["203.0.113.1"]))
    assert frontends(port, outside=True) == set()  # ETP-1: type ClusterIP without externalIPs


@pytest.mark.parametrize(
    ("conditions", "state"),
    [
        ("ready", State.ACTIVE),
        ("ready+terminating", State.ACTIVE),
        ("serving+terminating", State.TERMINATING),
        ("serving", State.SERVING),
        ("terminating", State.UNREADY),
        ("none", State.UNREADY),
    ],
)
def test_conditions_make_the_state(conditions: str, state: tables.BackendState) -> None:
    (port,) = planned(service(), slice_(endpoint("10.244.0.1", conditions)))
    assert port.backends[0].state is state


# --- who may use load balancer IPs ---


def restricted(*ranges: str, **spec: typing.Any) -> model.Service:
    spec = {"type": "LoadBalancer", "ingress": ["203.0.113.1", "2001:db8:2::1"]} | spec
    return dual_stack(loadBalancerSourceRanges=list(ranges), **spec)


def ranges_of(port: plan.PortPlan) -> set[str]:
    offset = 96 if port.key.family is model.Family.IPV4 else 0
    return {f"{addresses.text(base)}/{length - offset}" for base, length in port.source_ranges}


@pytest.mark.parametrize(
    ("ranges", "node_ips", "of_ipv4", "of_ipv6"),
    [
        pytest.param(["192.0.2.0/24"], [], {"192.0.2.0/24"}, set(), id="no entry of IPv6: open (SR-7)"),
        pytest.param([" 192.0.2.9/24 ", "192.0.2.0/24"], [], {"192.0.2.0/24"}, set(), id="SR-6: trimmed"),
        pytest.param(["nonsense", "", "2001:db8::/32"], [], set(), {"2001:db8::/32"}, id="SR-6: skipped"),
        pytest.param(["192.0.2.0/24", "0.0.0.0/0", "2001:db8::/32"], [], set(), {"2001:db8::/32"}, id="/0"),
        pytest.param(["::/0", "192.0.2.1/32"], [], {"192.0.2.1/32"}, set(), id="/0 of the other family"),
        pytest.param(["nonsense"], [], set(), set(), id="nothing that can be read"),
        pytest.param(
            ["192.0.2.0/24", "2001:db8::/64"],
            ["192.0.2.7", "2001:db8:1::7"],
            {"192.0.2.0/24", "203.0.113.1/32"},
            {"2001:db8::/64"},
            id="the node is in a range (SR-5)",
        ),
        pytest.param(
            ["10.0.0.0/8", "2001:db8::/32"],
            ["192.0.2.7", "2001:db8:1::7"],
            {"10.0.0.0/8"},
            {"2001:db8::/32", "2001:db8:2::1/128"},
            id="the node is in a range of IPv6",
        ),
    ],
)
def test_source_ranges_restrict_a_family(
    ranges: list[str], node_ips: list[str], of_ipv4: set[str], of_ipv6: set[str]
) -> None:
    one, other = planned(restricted(*ranges), node_ips=tuple(node_ips))
    assert (ranges_of(one), ranges_of(other)) == (of_ipv4, of_ipv6)
    for port in (one, other):
        kinds = {front.kind for front in port.frontends if front.restricted}
        assert kinds == ({Kind.LOAD_BALANCER} if port.source_ranges else set())


def test_only_load_balancer_ips_are_restricted_and_both_of_their_rows() -> None:
    known = restricted(
        "192.0.2.0/24",
        externalTrafficPolicy="Local",
        externalIPs=["198.51.100.1"],
        ports=[{"name": "http", "port": 80, "nodePort": 30080}],
    )
    port, _ = planned(known)
    assert [(front.kind, front.outside) for front in port.frontends if front.restricted] == [
        (Kind.LOAD_BALANCER, False),
        (Kind.LOAD_BALANCER, True),
    ]


def test_a_service_without_load_balancer_ips_has_nothing_to_restrict() -> None:
    assert planned(restricted("192.0.2.0/24", ingress=[]))[0].source_ranges == ()


# --- DSR ---


@pytest.mark.parametrize("default", model.PacketMode)
@pytest.mark.parametrize("own", [None, *model.PacketMode])
def test_a_services_own_mode_comes_first(default: model.PacketMode, own: model.PacketMode | None) -> None:
    known = service(
        type="NodePort", ports=[{"name": "http", "port": 80, "nodePort": 30080}], externalIPs=["198.51.100.1"]
    )
    (port,) = planned(msgspec.structs.replace(known, mode=own), slice_(HERE, THERE), mode=default)
    dsr = (own or default) is model.PacketMode.DSR
    assert [front.dsr for front in port.frontends] == [False, dsr, dsr]
    # Nodes have to agree on a backend, whatever the algorithm.
    assert len(plan.slots(port, CLUSTER)) == (maglev.SIZES[0] if dsr else 2)
    assert port.algorithm is RANDOM
