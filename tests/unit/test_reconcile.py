import itertools
import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbproxy.core import events, health, ledger, model, plan, reconcile, state
from lbproxy.kernel import fake
from tests import serving, strategies
from tests.unit import test_ledger

NODE = "node-a"
SYNCED = [events.Synced(kind) for kind in events.Kind]


class Agent:
    """A reconciler on maps in memory, watched between any two writes."""

    def __init__(self, room: dict[str, int] | None = None) -> None:
        self.capacity = serving.capacity(**(room or {}))
        self.kernel = serving.Watched(fake.FakeMaps(serving.sizes(**(room or {}))))
        self.reconciler = reconcile.Reconciler(
            NODE, plan.Defaults(model.Algorithm.RANDOM), ledger.Ledger(self.capacity)
        )

    def take(self, *happened: events.Event) -> None:
        for event in happened:
            self.reconciler.take(event)

    def settle(self, now_s: float = 0.0) -> list[reconcile.Pass]:
        passes = []
        while self.reconciler.pending:
            passes.append(self.reconciler.next_pass(now_s))
            self.kernel.apply(passes[-1].writes, now_s)
            serving.assert_counted(self.reconciler.ledger, self.kernel.maps)
        return passes


def service(name: str = "web", host: int = 1) -> model.Service:
    return model.Service(
        name=model.ServiceName("default", name),
        cluster_ips=(test_ledger.address(host, 96),),
        external_ips=(),
        load_balancer_ips=(),
        ports=(model.ServicePort("", model.Protocol.TCP, 80, 0),),
        affinity_s=0,
        internal_local=False,
        external_local=False,
        algorithm=None,
    )


def slice_of(
    service_name: str = "web", hosts: tuple[int, ...] = (1, 2), at_s: float = 0.0
) -> model.EndpointSlice:
    return model.EndpointSlice(
        namespace="default",
        name=f"{service_name}-1",
        service=model.ServiceName("default", service_name),
        family=model.Family.IPV4,
        ports=(model.SlicePort("", model.Protocol.TCP, 8080),),
        endpoints=tuple(
            model.Endpoint(test_ledger.address(host), True, True, False, model.Location(NODE, ""))
            for host in hosts
        ),
        trigger_time_s=at_s,
    )


def upsert(value: strategies.Value) -> events.Upsert:
    kind, name = strategies.key_of(value)
    return events.Upsert(kind, name, value)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_any_interleaving_of_events_and_passes_ends_with_the_same_tables(data: st.DataObject) -> None:
    cluster = data.draw(strategies.clusters())
    agent, now_s = Agent(), 0.0
    for event in data.draw(strategies.histories(cluster)):
        agent.take(event)
        if not agent.reconciler.listed:
            assert agent.reconciler.next_pass(now_s).writes == []
        if data.draw(st.booleans()):
            agent.settle(now_s)
            now_s += 0.4
            agent.kernel.apply(agent.reconciler.ledger.expire(now_s), now_s)
    agent.settle(now_s)
    assert not agent.reconciler.starved

    # The same, told once and planned once.
    told = Agent()
    told.take(*itertools.starmap(_told, cluster.objects.items()), *SYNCED)
    told.settle()
    serving.assert_same(agent.kernel.maps, told.kernel.maps)


@pytest.mark.parametrize("left", [(), (2,)])
def test_a_dsr_backend_that_goes_is_marked_before_its_end_is_closed(left: tuple[int, ...]) -> None:
    """Every write is looked at by `serving.Watched`."""
    known = msgspec.structs.replace(
        service(), mode=model.PacketMode.DSR, external_ips=(test_ledger.address(9, 203),)
    )
    agent = Agent()
    agent.take(*SYNCED, upsert(known), upsert(slice_of(hosts=(1, 2))))
    agent.settle()
    assert len(list(agent.kernel.maps.rows("tunnel_ends"))) == 2
    agent.take(upsert(slice_of(hosts=left)))
    agent.settle()
    assert len(list(agent.kernel.maps.rows("tunnel_ends"))) == len(left)


def _told(key: strategies.Key, value: strategies.Value) -> events.Event:
    return events.Upsert(*key, value)


_KINDS: typing.Final = (events.Kind.SERVICE, events.Kind.ENDPOINT_SLICE, events.Kind.NODE)


@pytest.mark.parametrize("order", [_KINDS, _KINDS[::-1]], ids=["the Node last", "the Node first"])
def test_nothing_is_planned_before_the_first_complete_lists(order: tuple[events.Kind, ...]) -> None:
    agent = Agent()
    agent.take(upsert(service()), upsert(slice_of()))
    for kind in order:
        assert not agent.reconciler.pending
        assert agent.reconciler.next_pass(0.0) == reconcile.Pass([], [], [], complete=True)
        agent.take(events.Synced(kind))
    assert agent.reconciler.pending
    assert [len(done.names) for done in agent.settle()] == [1]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[model.ServiceName]:
    """Names of the services that have been planned."""
    names: list[model.ServiceName] = []
    original = plan.plan

    def counted(
        cluster: state.ClusterState,
        name: model.ServiceName,
        defaults: plan.Defaults,
        book: health.HealthBook | None = None,
    ) -> list[plan.PortPlan]:
        names.append(name)
        return original(cluster, name, defaults, book)

    monkeypatch.setattr(plan, "plan", counted)
    return names


def test_a_slice_that_changes_plans_its_service_alone(planned: list[model.ServiceName]) -> None:
    agent = Agent()
    names = ["a", "b", "c"]
    agent.take(*(upsert(service(name, host)) for host, name in enumerate(names, 1)), *SYNCED)
    agent.settle()
    assert len(planned) == 3
    planned.clear()
    agent.take(upsert(slice_of("b")), upsert(slice_of("b", (1, 2, 3))))
    agent.settle()
    assert planned == [model.ServiceName("default", "b")]


def test_an_event_that_changes_nothing_plans_nothing(planned: list[model.ServiceName]) -> None:
    agent = Agent()
    agent.take(upsert(service()), upsert(slice_of()), *SYNCED)
    agent.settle()
    planned.clear()
    assert not agent.reconciler.take(upsert(slice_of(at_s=5.0)))
    assert not agent.reconciler.take(upsert(service()))
    assert not agent.reconciler.pending
    assert agent.settle() == []
    assert planned == []


def test_a_pass_is_bounded_and_says_whether_it_was_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "_PASS_SERVICES", 2)
    agent = Agent()
    for host, name in enumerate("abcde", 1):
        agent.take(upsert(service(name, host)), upsert(slice_of(name, at_s=float(host))))
    agent.take(*SYNCED)
    passes = agent.settle()
    assert [(len(done.names), done.complete) for done in passes] == [(2, False), (2, False), (1, True)]
    assert [[trigger.time_s for trigger in done.triggers] for done in passes] == [
        [],
        [],
        [1.0, 2.0, 3.0, 4.0, 5.0],
    ]


def test_a_deletion_takes_back_what_its_service_was_waited_for() -> None:
    agent = Agent()
    agent.take(upsert(service()), upsert(service("other", 2)), *SYNCED)
    agent.settle()
    agent.take(upsert(slice_of("other", at_s=6.0)), upsert(slice_of(at_s=7.0)))
    agent.take(events.Delete(*strategies.key_of(slice_of())))
    [done] = agent.settle()
    assert done.triggers == [reconcile.Trigger(model.Family.IPV4, 6.0)]


def test_what_the_kernel_has_and_the_cluster_lacks_goes_with_the_first_pass() -> None:
    known = ledger.Ledger(serving.capacity())
    maps = fake.FakeMaps(serving.SIZES)
    maps.apply(known.change({test_ledger.WEB: [test_ledger.port()]}, 0.0).writes)
    reconciler = reconcile.Reconciler(NODE, plan.Defaults(model.Algorithm.RANDOM), known)
    assert not reconciler.pending
    for event in SYNCED:
        reconciler.take(event)
    maps.apply(reconciler.next_pass(0.0).writes)
    assert not serving.view(maps)


def test_a_starved_port_is_planned_again_and_forgotten_when_it_fits() -> None:
    agent = Agent({"frontends": 1})
    agent.take(upsert(service("a", 1)), upsert(service("b", 2)), *SYNCED)
    agent.settle()
    [starved] = agent.reconciler.starved
    assert starved.service.name == "b"
    agent.reconciler.retry_starved()
    agent.settle()
    assert set(agent.reconciler.starved) == {starved}

    agent.take(events.Delete(events.Kind.SERVICE, events.ObjectName("default", "a")))
    agent.settle()
    agent.reconciler.retry_starved()
    agent.settle()
    assert not agent.reconciler.starved
    assert {row.service[64:65] for row in serving.view(agent.kernel.maps).values()} == {b"b"}


def test_a_starved_service_that_goes_is_no_longer_starved() -> None:
    agent = Agent({"frontends": 1})
    agent.take(upsert(service("a", 1)), upsert(service("b", 2)), *SYNCED)
    agent.settle()
    agent.take(events.Delete(events.Kind.SERVICE, events.ObjectName("default", "b")))
    agent.settle()
    assert not agent.reconciler.starved


def test_starting_over_plans_everything_again(planned: list[model.ServiceName]) -> None:
    agent = Agent()
    agent.take(upsert(service("a", 1)), upsert(service("b", 2)), *SYNCED)
    agent.settle()
    planned.clear()
    agent.reconciler.start_over(ledger.Ledger(agent.capacity))
    assert agent.reconciler.pending
    agent.settle()
    assert sorted(name.name for name in planned) == ["a", "b"]


def test_a_change_of_our_zone_concerns_every_service(planned: list[model.ServiceName]) -> None:
    agent = Agent()
    agent.take(upsert(service("a", 1)), upsert(service("b", 2)), *SYNCED)
    agent.settle()
    planned.clear()
    node: typing.Final = model.Node(NODE, (), "zone-1", (), eligible=True)
    agent.take(upsert(node))
    agent.settle()
    assert len(planned) == 2
    agent.take(upsert(msgspec.structs.replace(node, eligible=False)))
    assert not agent.reconciler.pending
