"""Unhealthy backends: what is noted of them, and what becomes of it in plans, tables and listings."""

import json
import random
import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbproxy.core import health, inventory, listing, model, plan, probe, restoring, tables, topology
from lbproxy.kernel import inspection
from tests import installing, serving, strategies
from tests.unit import test_explain, test_reconcile, test_show
from tests.unit.test_plan import NODE, ZONE

WEB = model.ServiceName("default", "web")
PORT = model.PortKey(WEB, "http", model.Protocol.TCP, model.Family.IPV4)
ACTIVE, PASSIVE = health.Source.ACTIVE, health.Source.PASSIVE
DEFAULTS = plan.Defaults(model.Algorithm.RANDOM)


def place(host: int, port: int = 8080) -> topology.Place:
    return topology.Place(installing.address(f"10.244.0.{host}"), port)


# --- the book ---

_NOTES = st.lists(
    st.tuples(
        st.builds(
            model.PortKey,
            st.sampled_from([WEB, model.ServiceName("default", "db")]),
            st.sampled_from(["", "http"]),
            st.just(model.Protocol.TCP),
            st.just(model.Family.IPV4),
        ),
        st.builds(place, st.integers(1, 3)),
        st.sampled_from(health.Source),
        st.booleans(),
        st.sampled_from(["", "it is ill"]),
    ),
    max_size=20,
)


@given(_NOTES)
def test_a_book_holds_what_each_source_said_last(notes: list[tuple[typing.Any, ...]]) -> None:
    book = health.HealthBook()
    last: dict[tuple[typing.Any, ...], str] = {}
    for port, where, source, usable, reason in notes:
        before = {s for s in health.Source if (port, where, s) in last}
        if usable:
            last.pop((port, where, source), None)
        else:
            last[port, where, source] = reason
        after = {s for s in health.Source if (port, where, s) in last}
        assert book.note(port, where, source, usable, reason) == (before != after)
    for source in health.Source:
        assert set(book.against(source)) == {(p, w) for p, w, s in last if s is source}
    for port, where, *_ in notes:
        verdict = book.of(port).get(where)
        said = {s: last[port, where, s] for s in health.Source if (port, where, s) in last}
        assert (verdict is None) == (not said)
        if verdict is not None:
            assert (verdict.sources, verdict.reasons) == (sum(said), tuple(said.values()))
        assert (port.service in book) == any(p.service == port.service for p, *_ in last)
    assert len(book) == len({(p, w) for p, w, _ in last})


def test_a_healthy_backend_is_not_kept() -> None:
    book = health.HealthBook()
    assert not book.note(PORT, place(1), ACTIVE, True)
    assert book.of(PORT) == {}
    assert not book


def test_what_is_gone_is_forgotten() -> None:
    book = health.HealthBook()
    other = PORT._replace(port_name="other")
    for port, host in ((PORT, 1), (PORT, 2), (other, 1)):
        book.note(port, place(host), PASSIVE, False, "")
    book.keep(WEB, {PORT: [place(2), place(3)]})
    assert list(book.against(PASSIVE)) == [(PORT, place(2))]
    book.forget(PORT, [place(2), place(9)])
    assert not book


# --- the sets ---

_ENDPOINTS = st.lists(st.tuples(st.sampled_from([0, 1, 2, 3]), st.booleans()), max_size=8)


@given(_ENDPOINTS, st.integers(0, 100))
def test_no_set_is_emptied_and_healthy_endpoints_keep_theirs(
    drawn: list[tuple[int, bool]], percent: int
) -> None:
    sets, down = [bits for bits, _ in drawn], [ill for _, ill in drawn]
    left = health.exclude(sets, down, percent / 100)
    for bit in (topology.CLUSTER, topology.LOCAL):
        before = {n for n, bits in enumerate(sets) if bits & bit}
        after = {n for n, bits in enumerate(left.sets) if bits & bit}
        well = {n for n in before if not down[n]}
        panics = well != before and (not well or 100 * len(well) < percent * len(before))
        assert after == (before if panics else well)
        assert bool(left.spared & bit) == panics


# --- plans ---


@pytest.mark.parametrize(
    ("panic", "ill", "used"),
    [
        (0.0, [1, 2, 3], [4]),
        (0.5, [1], [2, 3, 4]),
        (0.5, [1, 2], [3, 4]),
        (0.5, [1, 2, 3], [1, 2, 3, 4]),
        (1.0, [1], [1, 2, 3, 4]),
        (0.25, [1, 2, 3], [4]),
    ],
)
def test_below_its_panic_share_a_service_uses_all(panic: float, ill: list[int], used: list[int]) -> None:
    kernel = test_show.Pinned()
    for host in ill:
        kernel.installer.health.note(PORT, place(host), ACTIVE, False, "refused")
    asked = probe.Probe(probe.Kind.TCP, panic=panic)
    ends = [installing.endpoint(f"10.244.0.{host}") for host in (1, 2, 3, 4)]
    kernel.installer.node("192.0.2.10", host_netns=1)
    kernel.installer.service("default/web", ["10.96.0.1"], ends, probe=asked)
    found = test_explain.ask("pod", "10.96.0.1:80", cluster=kernel)
    assert [one.ip for one in found.backends] == [f"10.244.0.{host}" for host in used]
    (said,) = (step.result for step in found.steps if step.step == "health")
    panics = "more of this choice are unhealthy than panic= allows: all of them are used"
    assert (said == panics) == (len(used) == 4)


def test_panic_does_not_look_where_hints_do_not_lead() -> None:
    ends = [installing.endpoint(f"10.244.0.{n}", zone_hints=(installing.ZONE,)) for n in (1, 2, 3)]
    ends += [installing.endpoint(f"10.244.0.{n}", zone_hints=("zone-b",)) for n in (4, 5)]

    def used(*ill: int) -> list[int]:
        pinned = test_show.Pinned()
        for host in ill:
            pinned.installer.health.note(PORT, place(host), ACTIVE, False, "refused")
        asked = probe.Probe(probe.Kind.TCP, panic=0.5)
        pinned.installer.service("default/web", ["10.96.0.1"], ends, probe=asked)
        (port,) = inventory.read(pinned).ports
        return sorted(one.address[-1] for one in port.backends if one.sets & topology.CLUSTER)

    assert used(1) == [2, 3]
    assert used(1, 2) == [1, 2, 3]
    # Where hints lead to nobody healthy there is but one set, and two of five are too few for it.
    assert used(1, 2, 3) == [1, 2, 3, 4, 5]


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_health_takes_nothing_but_the_unhealthy_and_never_all(data: st.DataObject) -> None:
    cluster = data.draw(strategies.clusters())
    for service in cluster.services():
        slices = cluster.slices(service.name)
        without = plan.plan_service(service, slices, NODE, ZONE, DEFAULTS)
        book = health.HealthBook()
        notes = [
            (port.key, topology.Place(one.address, one.port), source)
            for port in without
            for one in port.backends
            for source in health.Source
            if data.draw(st.booleans())
        ]
        for key, where, source in notes:
            book.note(key, where, source, False, "ill")
        got = plan.plan_service(service, slices, NODE, ZONE, DEFAULTS, book)
        # It depends on nothing but what was said last of each.
        again = health.HealthBook()
        for key, where, source in random.sample(notes, len(notes)):
            again.note(key, where, source, False, "ill")
        assert plan.plan_service(service, slices, NODE, ZONE, DEFAULTS, again) == got
        for old, new in zip(without, got, strict=True):
            assert new.frontends == old.frontends
            assert [(b.address, b.port, b.state) for b in new.backends] == [
                (b.address, b.port, b.state) for b in old.backends
            ]
            if not book.of(new.key):
                assert new == old
            for bit in (tables.BackendSet.CLUSTER, tables.BackendSet.LOCAL):
                was, now = ({(b.address, b.port) for b in p.backends if b.sets & bit} for p in (old, new))
                unwell = {(b.address, b.port) for b in new.backends if b.health}
                assert bool(was) == bool(now)
                drawn = any(front.set == bit for front in new.frontends)
                assert bool(new.spared & bit) == (drawn and bool(now & unwell))
                if now & unwell:
                    assert now == was <= unwell
                else:
                    # Only where hints led to unhealthy ones alone does it get others.
                    assert now <= was or was <= unwell


def cases() -> typing.Iterator[typing.Any]:
    there = "node-b"
    leaving: dict[str, typing.Any] = {"ready": False, "serving": True, "terminating": True}
    e = installing.endpoint
    yield pytest.param([e("10.244.0.1"), e("10.244.0.2", there)], [2], {1: "CL"}, 0, id="one of two")
    yield pytest.param([e("10.244.0.1"), e("10.244.0.2", there)], [1], {1: "L", 2: "C"}, 2, id="all here")
    yield pytest.param([e("10.244.0.1"), e("10.244.0.2", there)], [1, 2], {1: "CL", 2: "C"}, 3, id="all")
    yield pytest.param(
        # Ready ones beat those that shut down, ill or not: the fallback is for what the API says.
        [e("10.244.0.1"), e("10.244.0.2", **leaving)],
        [1],
        {1: "CL"},
        3,
        id="no fallback to terminating",
    )
    yield pytest.param(
        [e("10.244.0.1", **leaving), e("10.244.0.2", **leaving)], [1], {2: "CL"}, 0, id="terminating ones"
    )
    near: dict[str, typing.Any] = {"zone_hints": (installing.ZONE,)}
    far: dict[str, typing.Any] = {"zone_hints": ("zone-b",)}
    yield pytest.param(
        [e("10.244.0.1", there, **near), e("10.244.0.2", there, **near), e("10.244.0.3", there, **far)],
        [1],
        {2: "C"},
        0,
        id="hints hold while one of theirs is well",
    )
    yield pytest.param(
        [e("10.244.0.1", there, **near), e("10.244.0.3", there, **far)],
        [1],
        {3: "C"},
        0,
        id="hints that lead to ill ones only do not count",
    )
    yield pytest.param(
        [e("10.244.0.1", there, **near), e("10.244.0.3", there, **far)],
        [1, 3],
        {1: "C"},
        1,
        id="where all are ill hints hold",
    )


@pytest.mark.parametrize(("endpoints", "hosts", "used", "spared"), tuple(cases()))
def test_what_is_used(
    endpoints: list[model.Endpoint], hosts: list[int], used: dict[int, str], spared: int
) -> None:
    pinned = test_show.Pinned()
    installer = pinned.installer
    for host in hosts:
        installer.health.note(PORT, place(host), PASSIVE, False, "ill")
    installer.service("default/web", ["10.96.0.1"], endpoints, external=["203.0.113.1"], external_local=True)
    found = inventory.read(pinned)
    (port,) = found.ports
    letters = {1: "C", 2: "L", 3: "CL"}
    assert {one.address[-1]: letters[one.sets & 3] for one in port.backends if one.sets & 3} == used
    (listed,) = listing.services(found, inventory.node_ports(pinned))
    assert listed.all_unhealthy == bool(spared & topology.CLUSTER)
    assert {one.address[-1] for one in port.backends if one.health == PASSIVE} == set(hosts)


# --- passes ---


def test_a_verdict_costs_a_pass_of_its_service_alone() -> None:
    agent = test_reconcile.Agent()
    for name, host in (("web", 1), ("db", 2)):
        agent.take(
            test_reconcile.upsert(test_reconcile.service(name, host)),
            test_reconcile.upsert(test_reconcile.slice_of(name, (host, host + 10))),
        )
    agent.take(*test_reconcile.SYNCED)
    agent.settle()
    port = model.PortKey(WEB, "", model.Protocol.TCP, model.Family.IPV4)
    backends = agent.reconciler.ledger.installed[port].backends
    first = tables.backend(next(iter(backends.values())))
    where = topology.Place(first.addr, 8080)
    assert agent.reconciler.health.note(port, where, ACTIVE, False, "refused")
    agent.reconciler.health_changed(WEB)
    (done,) = agent.settle(1.0)
    assert done.names == [WEB]
    assert [write.table for write in done.writes] == ["backends", "slots", "frontends"]
    assert agent.reconciler.spared == {}
    restored = restoring.restore(agent.capacity, agent.kernel.maps.dump(), 1.0)
    assert list(restoring.unhealthy(restored, tables.Health.PROBE_FAILED)) == [(port, where)]
    assert list(restoring.unhealthy(restored, tables.Health.EJECTED)) == []

    for row in backends.values():
        everywhere = topology.Place(tables.backend(row).addr, 8080)
        agent.reconciler.health.note(port, everywhere, PASSIVE, False, "resets")
    agent.reconciler.health_changed(WEB)
    agent.settle(2.0)
    assert agent.reconciler.spared == {port: 1}

    agent.take(test_reconcile.upsert(test_reconcile.slice_of("web", (5,))))
    agent.settle(3.0)
    assert agent.reconciler.spared == {}
    assert not agent.reconciler.health
    agent.reconciler.health_changed(model.ServiceName("default", "nobody"))
    assert not agent.reconciler.pending


def test_who_is_back_starts_slowly_where_its_service_asks_for_that() -> None:
    agent = test_reconcile.Agent()
    service = msgspec.structs.replace(test_reconcile.service(), slow_start_s=10.0)
    agent.take(test_reconcile.upsert(service), test_reconcile.upsert(test_reconcile.slice_of()))
    agent.take(*test_reconcile.SYNCED)
    agent.settle(100.0)
    port = model.PortKey(WEB, "", model.Protocol.TCP, model.Family.IPV4)

    def weights() -> list[int]:
        rows = agent.reconciler.ledger.installed[port].backends.values()
        return [tables.backend(row).weight for row in rows]

    first = tables.backend(next(iter(agent.reconciler.ledger.installed[port].backends.values())))
    assert weights() == [1, 1]
    for usable in (False, True):
        agent.reconciler.health.note(port, topology.Place(first.addr, 8080), PASSIVE, usable, "ill")
        agent.reconciler.health_changed(WEB)
        agent.settle(110.0)
    ramping, other = weights()
    assert 0 < ramping < other


@given(strategies.clusters(), st.data())
@settings(deadline=None, max_examples=30)
def test_verdicts_in_any_order_end_with_the_same_tables(
    cluster: strategies.Cluster, data: st.DataObject
) -> None:
    first, second = test_reconcile.Agent(), test_reconcile.Agent()
    told = [test_reconcile._told(*one) for one in cluster.objects.items()]
    for agent in (first, second):
        agent.take(*told, *test_reconcile.SYNCED)
        agent.settle()
    known = [
        (key, topology.Place(tables.backend(row).addr, int.from_bytes(tables.backend(row).port, "big")))
        for key, held in first.reconciler.ledger.installed.items()
        for row in held.backends.values()
    ]
    notes = (
        data.draw(st.lists(st.tuples(st.sampled_from(known), st.sampled_from(health.Source))))
        if known
        else []
    )
    for now_s, ((key, where), source) in enumerate(notes, 1):
        first.reconciler.health.note(key, where, source, False, "ill")
        first.reconciler.health_changed(key.service)
        first.settle(float(now_s))
    for (key, where), source in reversed(notes):
        second.reconciler.health.note(key, where, source, False, "ill")
        second.reconciler.health_changed(key.service)
    second.settle(1.0)
    serving.assert_same(first.kernel.maps, second.kernel.maps)


# --- what people see ---


def unwell(*hosts: int) -> test_show.Pinned:
    """A service with two backends, of which these are unhealthy."""
    made = test_show.Pinned()
    for host in hosts:
        made.installer.health.note(PORT, place(host), ACTIVE, False, "refused")
        made.installer.health.note(PORT, place(host), PASSIVE, False, "resets")
    made.installer.node("192.0.2.10", host_netns=1)
    ends = [installing.endpoint(f"10.244.0.{host}") for host in (1, 2)]
    made.installer.service("default/web", ["10.96.0.1"], ends)
    return made


def test_listings_say_what_is_unhealthy_and_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspection, "open_maps", lambda _root: unwell(2))
    shown = json.loads(test_show.run(capsys, "backends", "json"))
    assert [(one["ip"], one["state"], one["sets"], one["health"]) for one in shown] == [
        ("10.244.0.1", "active", ["Cluster", "Local"], []),
        ("10.244.0.2", "unhealthy", [], ["probe-failed", "ejected"]),
    ]
    (service,) = json.loads(test_show.run(capsys, "services", "json"))
    assert [(one["usable"], one["health"]) for one in service["backends"]] == [
        (True, []),
        (False, ["probe-failed", "ejected"]),
    ]
    assert service["all_unhealthy"] is False
    assert test_show.run(capsys, "backends").splitlines()[-1].split()[-2] == "probe-failed,ejected"


def test_listings_say_when_all_are_unhealthy_and_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspection, "open_maps", lambda _root: unwell(1, 2))
    (service,) = json.loads(test_show.run(capsys, "services", "json"))
    assert service["all_unhealthy"] is True
    assert [one["usable"] for one in service["backends"]] == [True, True]
    assert "2/2,all-unhealthy" in test_show.run(capsys, "services")


@pytest.mark.parametrize(
    ("hosts", "says", "ends"),
    [
        ((), [], ["10.244.0.1", "10.244.0.2"]),
        ((2,), ["left out as unhealthy: 10.244.0.2:8080 (probe-failed,ejected)"], ["10.244.0.1"]),
        (
            (1, 2),
            ["every backend of this choice is unhealthy: all of them are used"],
            ["10.244.0.1", "10.244.0.2"],
        ),
    ],
)
def test_explain_says_who_is_left_out(hosts: tuple[int, ...], says: list[str], ends: list[str]) -> None:
    found = test_explain.ask("pod", "10.96.0.1:80", cluster=unwell(*hosts))
    assert [step.result for step in found.steps if step.step == "health"] == says
    assert [one.ip for one in found.backends] == ends
