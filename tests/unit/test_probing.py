"""What is probed and when, and which results make a backend unusable."""

import functools
import itertools
import operator
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.core import (
    addresses,
    events,
    health,
    model,
    plan,
    port_probes,
    probe,
    probing,
    reach,
    state,
    topology,
)
from tests import strategies
from tests.unit import test_health_checks as objects

WEB, IPV4, IPV6 = objects.WEB, objects.IPV4, objects.IPV6
TCP = probe.Probe(probe.Kind.TCP, interval_s=10.0, rise=2, fall=3, jitter=0.5)
OTHER = model.ServiceName("shop", "other")
PASSED, FAILED = probing.Result(passed=True), probing.Result(passed=False, reason="refused")
UDP_PORT = model.SlicePort("dns", model.Protocol.UDP, 5353)
Values = dict[str, object]


def service(asked: probe.Probe | None = TCP, **changes: object) -> model.Service:
    values: Values = {
        "name": WEB,
        "cluster_ips": (objects.packed("10.96.0.1"),),
        "external_ips": (),
        "load_balancer_ips": (),
        "ports": (model.ServicePort("http", model.Protocol.TCP, 80, 0),),
        "affinity_s": 0,
        "internal_local": False,
        "external_local": False,
        "algorithm": None,
        "probes": asked and port_probes.PortProbes(asked),
    }
    return model.Service(**{**values, **changes})  # type: ignore[arg-type]


class Cluster:
    """A Service `shop/web`, whose endpoints and probe change, and what a Probing makes of it.

    `shop/other` has the same endpoints, once it is annotated.
    """

    def __init__(
        self,
        *hosts: str,
        seed: int = 1,
        asked: probe.Probe | None = TCP,
        most: int = 1 << 16,
        **changes: object,
    ) -> None:
        self.state = state.ClusterState(objects.NODE)
        self.probing = probing.Probing(random.Random(seed), most)
        self.now_s = 100.0
        self.told: dict[probing.User, bool] = {}
        self.changes: list[probing.Change] = []
        self.ports = (objects.HTTP, UDP_PORT)
        self.annotate(asked, WEB, **changes)
        self.has(*hosts)

    def annotate(self, asked: probe.Probe | None, name: model.ServiceName = WEB, **changes: object) -> None:
        value = service(asked, name=name, **changes)
        self.state.apply(events.Upsert(events.Kind.SERVICE, events.ObjectName(*name), value))
        self.look()

    def has(self, *hosts: str) -> None:
        for family in model.Family:
            those = [host for host in hosts if (":" in host) == (family is IPV6)]
            endpoints = tuple(map(objects.endpoint, those))
            for owner in (WEB, OTHER):
                name = f"{owner.name}-{family.value}"
                value = model.EndpointSlice("shop", name, owner, family, self.ports, endpoints, 0.0)
                slice_name = events.ObjectName("shop", name)
                self.state.apply(events.Upsert(events.Kind.ENDPOINT_SLICE, slice_name, value))
        self.look()

    def look(self) -> None:
        self.take(self.probing.look(self.state, [WEB, OTHER], self.now_s))

    def take(self, changes: list[probing.Change]) -> None:
        for change in changes:
            # As the book of health does: what it knows is no news.
            if self.told.get(change.user, True) != change.usable:
                self.changes.append(change)
            self.told[change.user] = change.usable

    def wanted(self) -> dict[probing.User, probing.Target]:
        """What is to be asked now, for whom."""
        found: dict[probing.User, probing.Target] = {}
        for name in (WEB, OTHER):
            if (known := self.state.service(name)) is not None:
                found |= probing.users(known, self.state.slices(name), objects.NODE, "").targets
        return found

    def asks(self, most: int = 1000) -> list[probing.Attempt]:
        """Go to when the next is due, and take what is due then."""
        self.now_s = max(self.now_s, self.probing.next_due_s or 0.0)
        return list(self.probing.take(self.now_s, most))

    def results(self, *results: probing.Result) -> None:
        """Answer all that is asked with these results, one after another."""
        for result in results:
            for attempt in self.asks():
                self.take(self.probing.finished(attempt, result, self.now_s))


def user(
    host: str,
    port_name: str = "http",
    protocol: model.Protocol = model.Protocol.TCP,
    service: model.ServiceName = WEB,
) -> probing.User:
    address = objects.packed(host)
    number = objects.HTTP.port if port_name == "http" else UDP_PORT.port
    key = model.PortKey(service, port_name, protocol, addresses.family_of(address))
    return probing.User(key, topology.Place(address, number))


def test_nothing_is_probed_without_an_annotation() -> None:
    cluster = Cluster("10.0.0.1", asked=None)
    assert cluster.probing.next_due_s is None
    assert cluster.probing.down() == {}


def test_a_backend_falls_after_so_many_failures_and_rises_after_so_many_successes() -> None:
    cluster = Cluster("10.0.0.1")
    cluster.results(FAILED, FAILED)
    assert cluster.changes == []
    cluster.results(FAILED)
    assert cluster.changes == [probing.Change(user("10.0.0.1"), usable=False, reason="refused", loud=True)]
    assert cluster.probing.down() == {user("10.0.0.1").port: (1, 1)}
    cluster.results(PASSED)
    assert cluster.told == {user("10.0.0.1"): False}
    cluster.results(PASSED)
    assert cluster.told == {user("10.0.0.1"): True}
    assert cluster.probing.down() == {user("10.0.0.1").port: (0, 1)}


def test_troubles_say_since_when_and_why() -> None:
    cluster = Cluster("10.0.0.1")

    def troubles() -> list[tuple[bool, int, int, str]]:
        found = list(cluster.probing.troubles())
        assert all(one.user == user("10.0.0.1") and one.since_s == began_s for one in found)
        return [(one.up, one.in_a_row, one.needed, one.reason) for one in found]

    assert list(cluster.probing.troubles()) == []
    cluster.results(FAILED)
    began_s = cluster.now_s
    assert troubles() == [(True, 1, 3, "refused")]
    cluster.results(PASSED)
    assert troubles() == []
    cluster.results(FAILED)
    began_s = cluster.now_s
    changes = cluster.probing.changes
    cluster.results(FAILED, FAILED, probing.Result(passed=False, reason="no answer"), PASSED)
    assert troubles() == [(False, 1, 2, "no answer")]
    assert cluster.probing.changes > changes
    cluster.results(PASSED)
    assert troubles() == []
    cluster.results(FAILED)
    cluster.annotate(None)
    assert troubles() == []


def test_only_results_in_a_row_count() -> None:
    cluster = Cluster("10.0.0.1")
    cluster.results(*[FAILED, FAILED, PASSED] * 5)
    assert cluster.changes == []


def test_a_probe_that_could_not_be_made_counts_for_nothing() -> None:
    cluster = Cluster("10.0.0.1")
    not_made = probing.Result(passed=False, reason="no sockets left", blameless=True)
    cluster.results(FAILED, FAILED, *[not_made] * 5)
    assert cluster.changes == []
    cluster.results(FAILED)
    assert cluster.told == {user("10.0.0.1"): False}


def test_a_target_is_asked_once_whatever_leads_to_it() -> None:
    ports = tuple(
        model.ServicePort(name, protocol, number, 0)
        for name, protocol, number in (("http", model.Protocol.TCP, 80), ("dns", model.Protocol.UDP, 53))
    )
    asked = probe.Probe(probe.Kind.HTTP, "/", fall=1, port=9000)
    cluster = Cluster("10.0.0.1", asked=asked, ports=ports)
    (attempt,) = cluster.asks()
    assert attempt.target == (objects.packed("10.0.0.1"), 9000, asked)
    cluster.take(cluster.probing.finished(attempt, FAILED, cluster.now_s))
    both = {user("10.0.0.1"), user("10.0.0.1", "dns", model.Protocol.UDP)}
    assert cluster.told == dict.fromkeys(both, False)


def test_who_comes_to_a_target_that_is_down_hears_of_it_at_once() -> None:
    cluster = Cluster("10.0.0.1")
    cluster.results(FAILED, FAILED, FAILED)
    cluster.changes.clear()
    cluster.annotate(TCP, OTHER)
    (change,) = cluster.changes
    of_other = user("10.0.0.1", service=OTHER)
    assert change == probing.Change(of_other, usable=False, reason="refused", loud=False)
    assert cluster.probing.targets == 1
    assert cluster.probing.down()[change.user.port] == (1, 1)
    # And the first one's end does not end it.
    cluster.annotate(None)
    assert cluster.probing.targets == 1
    assert cluster.probing.is_up(change.user) is False
    # Nobody stays down whom nobody asks.
    cluster.annotate(None, OTHER)
    assert set(cluster.told.values()) == {True}
    assert cluster.probing.targets == 0


def test_panic_does_not_make_another_probe() -> None:
    cluster = Cluster("10.0.0.1")
    cluster.results(FAILED, FAILED)
    cluster.annotate(msgspec.structs.replace(TCP, panic=0.5), OTHER)
    cluster.annotate(msgspec.structs.replace(TCP, panic=0.2))
    assert cluster.probing.targets == 1
    cluster.results(FAILED)
    assert cluster.told == {user("10.0.0.1"): False, user("10.0.0.1", service=OTHER): False}


def test_who_comes_down_to_a_target_that_is_up_is_up() -> None:
    cluster = Cluster("10.0.0.1")
    other_probe = probe.Probe(probe.Kind.HTTP, "/")
    cluster.annotate(other_probe, OTHER)
    while not cluster.told:
        for attempt in cluster.asks():
            result = FAILED if attempt.target.probe == TCP else PASSED
            cluster.take(cluster.probing.finished(attempt, result, cluster.now_s))
    assert cluster.told == {user("10.0.0.1"): False}
    cluster.annotate(other_probe)
    assert cluster.told == {user("10.0.0.1"): True}
    assert sum(down for down, _ in cluster.probing.down().values()) == 0


def test_what_was_forgotten_meanwhile_is_said_again() -> None:
    cluster = Cluster("10.0.0.1")
    cluster.results(FAILED, FAILED, FAILED)
    book = health.HealthBook()
    for change in cluster.probing.look(cluster.state, [WEB], cluster.now_s):
        book.note(change.user.port, change.user.place, health.Source.ACTIVE, change.usable, change.reason)
    assert list(book.against(health.Source.ACTIVE)) == [user("10.0.0.1")]


@pytest.mark.parametrize(
    ("kind", "expected"), [(probe.Kind.GRPC, {8080}), (probe.Kind.TCP, {8080}), (probe.Kind.UDP, {5353})]
)
def test_a_probe_asks_at_ports_of_its_own_protocol(kind: probe.Kind, expected: set[int]) -> None:
    ports = tuple(
        model.ServicePort(name, protocol, number, 0)
        for name, protocol, number in (("http", model.Protocol.TCP, 80), ("dns", model.Protocol.UDP, 53))
    )
    cluster = Cluster("10.0.0.1", asked=probe.Probe(kind, payload=b"x"), ports=ports)
    assert {attempt.target.port for attempt in cluster.asks()} == expected


def test_both_families_are_asked() -> None:
    ips = (objects.packed("10.96.0.1"), objects.packed("fd00::1"))
    cluster = Cluster("10.0.0.1", "fd00:244::1", cluster_ips=ips)
    assert cluster.probing.targets == 2


def test_only_what_this_node_may_use_is_asked() -> None:
    near, far = objects.endpoint("10.0.0.1"), objects.endpoint("10.0.0.2", "node-b")
    unready = objects.endpoint("10.0.0.3", ready=False)
    slice_ = objects.slice_of(near, far, unready).value
    assert isinstance(slice_, model.EndpointSlice)
    listed = [slice_]

    def hosts(**changes: object) -> set[str]:
        asked = probing.users(service(TCP, **changes), listed, objects.NODE, "").targets
        return {addresses.text(target.address) for target in asked.values()}

    assert hosts() == {"10.0.0.1", "10.0.0.2"}
    assert hosts(internal_local=True) == {"10.0.0.1"}
    outside = (objects.packed("203.0.113.1"),)
    assert hosts(internal_local=True, external_ips=outside) == {"10.0.0.1", "10.0.0.2"}
    # Under Local, what shuts down here is used while others are ready elsewhere.
    ending = objects.endpoint("10.0.0.4", ready=False, terminating=True)
    listed[:] = [msgspec.structs.replace(slice_, endpoints=(ending, far))]
    assert hosts(external_ips=outside) == {"10.0.0.2"}
    assert hosts(external_ips=outside, external_local=True) == {"10.0.0.2", "10.0.0.4"}


@st.composite
def planned(draw: st.DrawFn) -> tuple[model.Service, list[model.EndpointSlice]]:
    known = msgspec.structs.replace(
        draw(strategies.services()),
        probes=port_probes.PortProbes(probe.Probe(draw(st.sampled_from(list(probe.Kind))), payload=b"x")),
        zone_spill_over=draw(st.sampled_from([0.0, 1.5])),
    )
    slices = draw(st.lists(strategies.slices(known.name), max_size=4, unique_by=lambda one: one.name))
    ports = tuple(model.SlicePort(port.name, port.protocol, 8080) for port in known.ports)
    return known, [msgspec.structs.replace(one, ports=ports) for one in slices]


@given(planned(), st.sampled_from(["", *strategies.NODES]), st.sampled_from(["", *strategies.ZONES]))
def test_what_is_asked_is_what_the_plan_draws_from(
    known: tuple[model.Service, list[model.EndpointSlice]], node_name: str, zone: str
) -> None:
    named, slices = known
    assert named.probes is not None
    assert named.probes.others is not None
    asked = set(probing.users(named, slices, node_name, zone).targets)
    drawn = set()
    for port in plan.plan_service(named, slices, node_name, zone, plan.Defaults(model.Algorithm.RANDOM)):
        bits = functools.reduce(operator.or_, (frontend.set.value for frontend in port.frontends))
        udp = port.key.protocol is model.Protocol.UDP
        if port.key.protocol is model.Protocol.SCTP or udp != (named.probes.others.kind is probe.Kind.UDP):
            continue
        drawn |= {
            probing.User(port.key, topology.Place(backend.address, backend.port))
            for backend in port.backends
            if backend.sets & bits
        }
    # More where flows may spill over: how many do is for the plan to say.
    assert asked >= drawn if named.zone_spill_over else asked == drawn


@pytest.mark.parametrize(
    "host",
    [
        *["127.0.0.1", "0.0.0.1", "169.254.169.254", "224.0.0.1", "::1", "::", "fe80::1", "ff02::1"],
        *["192.0.0.192", "100.100.100.200", "168.63.129.16", "fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254"],
        *["64:ff9b::169.254.169.254", "64:ff9b::127.0.0.1"],
    ],
)
def test_what_listens_on_the_node_alone_is_never_asked(host: str) -> None:
    assert reach.forbids(objects.packed(host)) == reach.NEVER
    ips = (objects.packed("10.96.0.1"), objects.packed("fd00::1"))
    cluster = Cluster(host, cluster_ips=ips)
    assert cluster.probing.targets == 0
    assert list(cluster.probing.spared()) == [(user(host), reach.NEVER)]
    cluster.has()
    assert list(cluster.probing.spared()) == []


@pytest.mark.parametrize(
    "host",
    [
        *["10.0.0.1", "240.0.0.1", "192.168.1.1", "2001:db8::1", "fd00::1"],
        *["168.63.129.17", "100.100.100.199", "192.0.2.1", "fd00:ec3::254", "64:ff9b::10.0.0.1", "::10"],
    ],
)
def test_other_addresses_may_be_asked(host: str) -> None:
    assert reach.forbids(objects.packed(host)) == ""


def test_a_nodes_own_addresses_are_asked_for_its_own_pods_alone() -> None:
    cluster = Cluster()
    here, elsewhere, nowhere = (
        objects.endpoint(f"10.0.0.{n}", node) for n, node in enumerate((objects.NODE, "node-b", ""), 1)
    )
    cluster.state.apply(objects.slice_of(here, elsewhere, nowhere))
    own = frozenset(map(objects.packed, ("10.0.0.1", "10.0.0.2", "10.0.0.3")))

    def probed(names: list[model.ServiceName], own: frozenset[bytes]) -> list[bool]:
        cluster.take(cluster.probing.look(cluster.state, names, cluster.now_s, own))
        return [cluster.probing.is_up(user(f"10.0.0.{n}")) is not None for n in (1, 2, 3)]

    assert probed([WEB], own) == [True, False, False]
    assert list(cluster.probing.spared()) == [(user(f"10.0.0.{n}"), reach.OWN) for n in (2, 3)]
    # Addresses come and go, without a word of the Service.
    assert probed([], frozenset()) == [True, True, True]
    assert list(cluster.probing.spared()) == []
    assert probed([], own) == [True, False, False]
    cluster.state.node_name = ""
    assert probed([WEB], own) == [False, False, False]


def test_where_all_hinted_backends_are_down_the_others_are_asked_too() -> None:
    zones = {"10.0.0.1": "near", "10.0.0.2": "far"}
    cluster = Cluster()
    node = model.Node(objects.NODE, (), "near", (), eligible=True)
    cluster.state.apply(events.Upsert(events.Kind.NODE, events.ObjectName("", objects.NODE), node))
    hinted = [
        msgspec.structs.replace(objects.endpoint(host), location=model.Location(objects.NODE, zone, (zone,)))
        for host, zone in zones.items()
    ]
    cluster.state.apply(objects.slice_of(*hinted))
    cluster.look()
    assert (cluster.probing.is_up(user("10.0.0.1")), cluster.probing.is_up(user("10.0.0.2"))) == (True, None)
    # What spills over goes there at any time.
    cluster.annotate(TCP, zone_spill_over=1.5)
    assert (cluster.probing.is_up(user("10.0.0.1")), cluster.probing.is_up(user("10.0.0.2"))) == (True, True)
    cluster.annotate(TCP)
    cluster.results(FAILED, FAILED, FAILED)
    cluster.look()
    assert (cluster.probing.is_up(user("10.0.0.1")), cluster.probing.is_up(user("10.0.0.2"))) == (False, True)
    cluster.results(*[PASSED] * 6)
    cluster.look()
    assert (cluster.probing.is_up(user("10.0.0.1")), cluster.probing.is_up(user("10.0.0.2"))) == (True, None)


def test_what_is_removed_is_forgotten() -> None:
    cluster = Cluster("10.0.0.1", "10.0.0.2")
    cluster.results(*[FAILED] * 20)
    assert cluster.told == {user("10.0.0.1"): False, user("10.0.0.2"): False}
    cluster.has("10.0.0.2")
    assert cluster.told == {user("10.0.0.1"): True, user("10.0.0.2"): False}
    # Back as somebody new, who counts as usable.
    cluster.has("10.0.0.1", "10.0.0.2")
    assert cluster.probing.is_up(user("10.0.0.1"))
    assert not cluster.probing.is_up(user("10.0.0.2"))


def test_without_its_annotation_a_backend_that_was_down_is_used() -> None:
    cluster = Cluster("10.0.0.1")
    cluster.results(FAILED, FAILED, FAILED)
    cluster.annotate(None)
    assert cluster.told == {user("10.0.0.1"): True}
    assert cluster.probing.targets == 0
    assert cluster.probing.next_due_s is None


def test_another_probe_has_to_see_a_backend_rise_that_was_down() -> None:
    cluster = Cluster("10.0.0.1", "10.0.0.2")
    cluster.results(*[FAILED] * 20)
    other = probe.Probe(probe.Kind.HTTP, "/", rise=2)
    cluster.changes.clear()
    cluster.annotate(other)
    assert cluster.changes == []
    cluster.results(*[PASSED] * 6)
    assert set(cluster.told.values()) == {True}


def test_a_restart_keeps_what_was_down() -> None:
    known = Cluster("10.0.0.1", "10.0.0.2", asked=None)
    known.probing.was_down(user("10.0.0.1"), "before")
    known.probing.was_down(user("10.0.0.9"), "before")
    known.annotate(TCP)
    assert known.told == {user("10.0.0.9"): True, user("10.0.0.1"): False}
    assert known.probing.is_up(user("10.0.0.1")) is False
    assert known.probing.is_up(user("10.0.0.2")) is True


def test_a_seed_of_a_service_without_a_probe_is_usable_at_once() -> None:
    cluster = Cluster("10.0.0.1", asked=None)
    cluster.probing.was_down(user("10.0.0.1"), "before")
    cluster.look()
    assert cluster.told == {user("10.0.0.1"): True}


def test_the_result_of_a_removed_target_counts_for_nothing() -> None:
    asked = probe.Probe(probe.Kind.TCP, fall=1)
    cluster = Cluster("10.0.0.1", asked=asked)
    (attempt,) = cluster.asks()
    cluster.has()
    cluster.has("10.0.0.1")
    assert cluster.probing.finished(attempt, FAILED, cluster.now_s) == []
    assert cluster.probing.is_up(user("10.0.0.1"))


def test_a_target_is_asked_by_one_at_a_time() -> None:
    cluster = Cluster("10.0.0.1")
    (attempt,) = cluster.asks()
    cluster.now_s += 1000
    assert cluster.asks() == []
    cluster.probing.finished(attempt, PASSED, cluster.now_s)
    # What was missed is not made up for, and nobody was late who was being asked.
    assert cluster.probing.late_s(cluster.now_s) == 0
    assert len(cluster.asks()) == 1
    assert cluster.asks() == []


def test_a_service_leaves_free_what_it_has_under_way() -> None:
    cluster = Cluster(*(f"10.0.0.{n}" for n in range(1, 65)), most=16)
    cluster.now_s += 100
    hanging = cluster.asks()
    assert len(hanging) == 8
    assert cluster.asks() == []
    # Nothing to wake up for until one ends; and they are late all the same.
    assert (cluster.probing.next_due_s, cluster.probing.holds_back) == (None, True)
    assert cluster.probing.late_s(cluster.now_s) >= 90
    cluster.annotate(msgspec.structs.replace(TCP, port=9000), OTHER)
    cluster.now_s += 100
    assert [attempt.payer for attempt in cluster.asks()] == [OTHER] * 4
    cluster.probing.finished(hanging[0], PASSED, cluster.now_s)
    assert [attempt.payer for attempt in cluster.asks()] == [OTHER]
    # What is held back is forgotten with its Service.
    cluster.annotate(None)
    cluster.annotate(None, OTHER)
    cluster.has()
    assert cluster.asks() == []
    assert not cluster.probing.holds_back


def test_a_target_of_two_services_is_charged_to_the_one_with_less_under_way() -> None:
    cluster = Cluster(*(f"10.0.0.{n}" for n in range(1, 5)))
    cluster.annotate(TCP, OTHER)
    cluster.now_s += 100
    charged = [attempt.payer for attempt in cluster.asks()]
    assert sorted(charged) == [OTHER, OTHER, WEB, WEB]


def test_probes_are_late_by_what_they_waited() -> None:
    cluster = Cluster("10.0.0.1", "10.0.0.2")
    due_s = cluster.probing.next_due_s
    assert due_s is not None
    assert cluster.probing.late_s(due_s - 1) == 0
    assert cluster.probing.late_s(due_s + 3) == 3
    cluster.now_s = due_s + 20
    first, second = cluster.asks(1), cluster.asks(1)
    assert first[0].late_s == 20
    assert 10 <= second[0].late_s <= 20
    assert cluster.probing.late_s(cluster.now_s) == 0


def test_people_are_told_of_a_few_changes_and_then_of_one_now_and_then() -> None:
    asked = probe.Probe(probe.Kind.TCP, rise=1, fall=1, interval_s=1.0, jitter=0.0)
    cluster = Cluster("10.0.0.1", asked=asked)
    cluster.results(*[FAILED, PASSED] * 10)
    assert [change.loud for change in cluster.changes] == [True] * 4 + [False] * 16
    cluster.now_s += 1000
    cluster.results(FAILED)
    assert cluster.changes[-1].loud


def test_new_targets_are_asked_all_over_their_interval() -> None:
    cluster = Cluster(*(f"10.0.{n // 200}.{n % 200 + 1}" for n in range(1000)))
    first = [attempt.taken_s - 100.0 for attempt in iter(lambda: next(iter(cluster.asks(1)), None), None)]
    assert len(first) == 1000
    assert max(first) <= TCP.interval_s
    per_second = [sum(1 for at_s in first if second <= at_s < second + 1) for second in range(10)]
    assert min(per_second) > 50


hosts = st.lists(st.sampled_from([f"10.0.0.{n}" for n in range(1, 6)]), max_size=5, unique=True)
settings = st.builds(
    probe.Probe,
    kind=st.just(probe.Kind.TCP),
    interval_s=st.sampled_from([1.0, 7.0]),
    jitter=st.sampled_from([0.0, 1.0]),
    rise=st.integers(1, 3),
    fall=st.integers(1, 3),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("has"), hosts),
        st.tuples(st.just("annotate"), st.one_of(st.none(), settings), st.sampled_from([WEB, OTHER])),
        st.tuples(st.just("take"), st.integers(1, 3)),
        st.tuples(st.just("finish"), st.integers(0, 4), st.booleans()),
        st.tuples(st.just("wait"), st.integers(0, 20)),
    ),
    max_size=60,
)


@given(st.integers(0, 3), st.integers(1, 12), steps)
def test_verdicts_follow_results_in_a_row(seed: int, most: int, steps: list[tuple[object, ...]]) -> None:
    cluster = Cluster(seed=seed, most=most)
    running: list[probing.Attempt] = []
    down: dict[probing.User, bool] = {}
    rows: dict[probing.Target, list[bool]] = {}  # results in a row, of those that live
    for step in steps:
        before = len(cluster.changes)
        match step:
            case ("has", list() as those):
                cluster.has(*those)
            case ("annotate", asked, name):
                cluster.annotate(asked, name)  # type: ignore[arg-type]
            case ("take", int() as begin):
                taken = list(cluster.probing.take(cluster.now_s, begin))
                running += taken
                # Whoever waits has more under way than are free, or there is no room.
                if cluster.probing.free and len(taken) < begin and cluster.probing.late_s(cluster.now_s):
                    assert cluster.probing.holds_back
            case ("wait", int() as seconds):
                cluster.now_s += seconds
            case ("finish", int() as which, bool() as passed) if which < len(running):
                attempt = running.pop(which)
                result = PASSED if passed else FAILED
                changes = cluster.probing.finished(attempt, result, cluster.now_s)
                cluster.take(changes)
                row = rows.setdefault(attempt.target, [])
                row.append(passed)
                needed = attempt.target.probe.rise if passed else attempt.target.probe.fall
                if changes:
                    assert row[-needed:] == [passed] * needed
                    assert all(change.usable is passed for change in changes)
        wanted = cluster.wanted()
        targets = set(wanted.values())
        rows = {target: row for target, row in rows.items() if target in targets}
        # Each change is one: nobody is told what was said before.
        for change in cluster.changes[before:]:
            assert down.get(change.user, False) == change.usable
            down[change.user] = not change.usable
        # Bounded: by what there is now, not by what there was.
        assert cluster.probing.targets == len(targets) <= 10
        assert cluster.probing.queued <= 2 * len(targets) + 65 + len(running)
        assert {one for one, is_down in down.items() if is_down} == {
            one for one in wanted if not cluster.probing.is_up(one)
        }
        assert sum(of_port[0] for of_port in cluster.probing.down().values()) == sum(down.values())
        assert cluster.probing.free == most - len(running) >= 0
    cluster.annotate(None)
    cluster.annotate(None, OTHER)
    assert not any(down[one] and not cluster.told[one] for one in down)
    assert (cluster.probing.targets, cluster.probing.next_due_s) == (0, None)


@given(st.integers(0, 100), st.floats(0, 1), st.integers(1, 30))
def test_pauses_are_within_their_jitter(seed: int, jitter: float, rounds: int) -> None:
    cluster = Cluster(
        "10.0.0.1", seed=seed, asked=probe.Probe(probe.Kind.TCP, interval_s=10.0, jitter=jitter)
    )
    taken = []
    for _ in range(rounds + 1):
        (attempt,) = cluster.asks()
        taken.append(attempt.taken_s)
        cluster.probing.finished(attempt, PASSED, cluster.now_s)
    pauses = [later - earlier for earlier, later in itertools.pairwise(taken)]
    assert all(10.0 - 1e-6 <= pause <= 10.0 * (1 + jitter) + 1e-6 for pause in pauses)
