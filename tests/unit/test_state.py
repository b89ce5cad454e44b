import collections
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import decode as objects
from lbproxy.core import addresses, decode, events, model, plan, state
from tests import strategies

NODE = "node-a"
SERVICE, SLICE, NODE_KIND = events.Kind.SERVICE, events.Kind.ENDPOINT_SLICE, events.Kind.NODE
RANDOM = plan.Defaults(model.Algorithm.RANDOM)
WEB = model.ServiceName("default", "web")
DB = model.ServiceName("default", "db")


def ip(text: str) -> bytes:
    address = addresses.parse(text)
    assert address is not None
    return address


def service(name: model.ServiceName = WEB, port: int = 80) -> events.Upsert:
    value = model.Service(
        name=name,
        cluster_ips=(ip("10.96.0.1"),),
        external_ips=(),
        load_balancer_ips=(),
        ports=(model.ServicePort("", model.Protocol.TCP, port, 0),),
        affinity_s=0,
        internal_local=False,
        external_local=False,
        algorithm=None,
    )
    return events.Upsert(SERVICE, events.ObjectName(*name), value)


def slice_(
    name: str = "web-1",
    owner: model.ServiceName = WEB,
    hosts: tuple[int, ...] = (1,),
    ready: bool = True,
    trigger_time_s: float = 0.0,
) -> events.Upsert:
    value = model.EndpointSlice(
        namespace=owner.namespace,
        name=name,
        service=owner,
        family=model.Family.IPV4,
        ports=(model.SlicePort("", model.Protocol.TCP, 8080),),
        endpoints=tuple(
            model.Endpoint(ip(f"10.244.0.{host}"), ready, ready, False, model.Location("", ""))
            for host in hosts
        ),
        trigger_time_s=trigger_time_s,
    )
    return events.Upsert(SLICE, events.ObjectName(owner.namespace, name), value)


def node(zone: str, name: str = NODE) -> events.Upsert:
    return events.Upsert(NODE_KIND, events.ObjectName("", name), model.Node(name, (), zone, (), True))


def delete(upsert: events.Upsert) -> events.Delete:
    return events.Delete(upsert.kind, upsert.name)


def cluster_of(*history: events.Event) -> state.ClusterState:
    cluster = state.ClusterState(NODE)
    for event in history:
        cluster.apply(event)
    return cluster


def backends(cluster: state.ClusterState, name: model.ServiceName = WEB) -> list[str]:
    return [
        addresses.text(backend.address)
        for port in plan.plan(cluster, name, RANDOM)
        for backend in port.backends
    ]


def test_services_and_slices_may_come_in_either_order() -> None:
    for history in ([service(), slice_()], [slice_(), service()]):
        cluster = cluster_of(*history[:1])
        assert cluster.apply(history[1]) == {WEB}
        assert backends(cluster) == ["10.244.0.1"]


def test_a_slice_of_an_unknown_service_concerns_nobody_and_is_remembered() -> None:
    cluster = cluster_of()
    assert cluster.apply(slice_()) == set()
    assert plan.plan(cluster, WEB, RANDOM) == []
    cluster.apply(service())
    assert cluster.apply(delete(service())) == {WEB}
    assert plan.plan(cluster, WEB, RANDOM) == []
    cluster.apply(service())
    assert backends(cluster) == ["10.244.0.1"]


@pytest.mark.parametrize("event", [service(), slice_(), node("zone-1")], ids=["service", "slice", "node"])
def test_the_same_again_is_nothing_new(event: events.Upsert) -> None:
    cluster = cluster_of(service(), slice_(), node("zone-1"))
    assert event.value is not None
    assert cluster.apply(event._replace(value=strategies.fresh(event.value))) == set()


def test_a_later_trigger_time_alone_is_nothing_new_but_is_kept() -> None:
    cluster = cluster_of(service(), slice_())
    assert cluster.apply(slice_(trigger_time_s=5.0)) == set()
    assert [kept.trigger_time_s for kept in cluster.slices(WEB)] == [5.0]
    assert [kept.trigger_time_s for kept in cluster.endpoint_slices()] == [5.0]


def test_an_object_to_ignore_is_as_good_as_gone() -> None:
    cluster = cluster_of(service(), slice_())
    assert cluster.apply(slice_()._replace(value=None)) == {WEB}
    assert backends(cluster) == []
    assert cluster.apply(service()._replace(value=None)) == {WEB}
    assert plan.plan(cluster, WEB, RANDOM) == []


def test_removing_what_is_not_there_is_nothing_new() -> None:
    cluster = cluster_of()
    for upsert in (service(), slice_(), node("zone-1")):
        assert cluster.apply(delete(upsert)) == set()


def test_a_rejected_object_keeps_its_last_good_version() -> None:
    cluster = cluster_of(service(), slice_())
    for upsert in (service(), slice_()):
        assert cluster.apply(events.Rejected(upsert.kind, upsert.name, "broken")) == set()
    assert backends(cluster) == ["10.244.0.1"]


def test_a_slice_that_changes_hands_concerns_both_services() -> None:
    cluster = cluster_of(service(), service(DB), slice_(), slice_("other", hosts=(2,)))
    assert cluster.apply(slice_(owner=DB)) == {WEB, DB}
    assert backends(cluster) == ["10.244.0.2"]
    assert backends(cluster, DB) == ["10.244.0.1"]
    assert cluster.apply(delete(slice_())) == {DB}
    assert backends(cluster, DB) == []


@pytest.mark.parametrize("removed_first", [True, False])
def test_an_endpoint_may_move_between_slices(removed_first: bool) -> None:
    moves = [slice_("one", hosts=()), slice_("two", hosts=(1,))]
    cluster = cluster_of(service(), slice_("one", hosts=(1,)), *(moves if removed_first else moves[::-1]))
    assert backends(cluster) == ["10.244.0.1"]


def test_only_our_own_nodes_zone_concerns_everything() -> None:
    cluster = cluster_of(service(), service(DB))
    assert cluster.apply(node("zone-2", "node-b")) == set()
    assert cluster.node is None
    assert cluster.apply(node("zone-1")) == {WEB, DB}
    assert cluster.zone == "zone-1"
    assert cluster.apply(node("zone-2")) == {WEB, DB}
    # A Node that is gone is still where it was: it is a restart away, not moving.
    assert cluster.apply(delete(node("zone-2"))) == set()
    assert cluster.zone == "zone-2"


def test_the_nodes_addresses_concern_services_with_source_ranges() -> None:
    known = service(DB)
    assert isinstance(known.value, model.Service)
    ranged = msgspec.structs.replace(known.value, source_ranges=(model.SourceRange(bytes(16), 64),))
    cluster = cluster_of(service(), known._replace(value=ranged))
    moved = model.Node(NODE, (bytes(16),), "", (), True)
    upsert = events.Upsert(NODE_KIND, events.ObjectName("", NODE), moved)
    assert cluster.apply(upsert) == {DB}
    assert cluster.apply(upsert) == set()
    assert cluster.apply(node("")) == {DB}


def test_synced_needs_services_and_slices() -> None:
    cluster = cluster_of()
    for kind, synced in ((SERVICE, False), (NODE_KIND, False), (SLICE, True)):
        assert cluster.apply(events.Synced(kind)) == set()
        assert cluster.synced is synced


def test_counts() -> None:
    draining = slice_("draining", hosts=(7,))
    assert isinstance(draining.value, model.EndpointSlice)
    endpoint = model.Endpoint(ip("10.244.0.7"), False, True, True, model.Location("", ""))
    history = [
        service(),
        slice_(hosts=(1, 2)),
        slice_("unready", DB, (3,), ready=False),
        draining._replace(
            value=model.EndpointSlice(
                "default", "draining", WEB, model.Family.IPV4, draining.value.ports, (endpoint,), 0.0
            )
        ),
    ]
    assert cluster_of(*history).counts() == state.Counts(1, 3, ready=2, terminating=1, unready=1)
    assert cluster_of(*history, *map(delete, history)).counts() == state.Counts(0, 0, 0, 0, 0)


def plans(cluster: state.ClusterState) -> dict[model.ServiceName, list[plan.PortPlan]]:
    return {known.name: plan.plan(cluster, known.name, RANDOM) for known in cluster.services()}


@given(st.data())
def test_any_history_of_the_same_cluster_plans_the_same(data: st.DataObject) -> None:
    target = data.draw(strategies.clusters())
    history = data.draw(strategies.histories(target))
    cluster = state.ClusterState(NODE)
    live: dict[model.ServiceName, list[plan.PortPlan]] = {}
    for event in history:
        before = plans(cluster)
        dirty = cluster.apply(event)
        # Replanning what an event concerns is as good as replanning everything.
        for name in dirty:
            live[name] = plan.plan(cluster, name, RANDOM)
            if not live[name]:
                del live[name]
        after = plans(cluster)
        assert live == {name: planned for name, planned in after.items() if planned}
        assert dirty <= before.keys() | after.keys()

    expected = {
        known.name: plan.plan_service(
            known, target.slices(known.name), NODE, target.zone(NODE), defaults=RANDOM
        )
        for known in target.services()
    }
    assert plans(cluster) == expected
    assert cluster.synced
    slices = [value for value in target.objects.values() if isinstance(value, model.EndpointSlice)]
    counts = cluster.counts()
    assert (counts.services, counts.slices) == (len(expected), len(slices))
    assert counts.ready + counts.terminating + counts.unready == sum(len(s.endpoints) for s in slices)


@given(st.data())
def test_a_relist_is_nothing_new(data: st.DataObject) -> None:
    target = data.draw(strategies.clusters())
    cluster = cluster_of(*data.draw(strategies.histories(target)))
    for (kind, name), value in target.objects.items():
        assert cluster.apply(events.Upsert(kind, name, strategies.fresh(value))) == set()


@given(st.data())
def test_nothing_remains_of_what_is_deleted(data: st.DataObject) -> None:
    target = data.draw(strategies.clusters())
    cluster = cluster_of(*data.draw(strategies.histories(target)))
    for kind, name in data.draw(st.permutations(list(target.objects))):
        cluster.apply(events.Delete(kind, name))
    assert cluster.counts() == state.Counts(0, 0, 0, 0, 0)
    assert not any(cluster.slices(known.name) for known in target.services())


def test_one_event_costs_its_own_service_and_not_the_cluster() -> None:
    """Counted in the comparisons of names made, so that no clock decides."""
    cluster = state.ClusterState(NODE)
    for number in range(300):
        cluster.apply(decode.service(objects.service(number)))
        cluster.apply(decode.endpoint_slice(objects.endpoint_slice(number)))
    compared: collections.Counter[str] = collections.Counter()

    class Counted(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            compared["=="] += 1
            return str.__eq__(self, other)

    upsert = decode.endpoint_slice(objects.endpoint_slice(7))
    name = events.ObjectName(upsert.name.namespace, Counted(upsert.name.name))
    cluster.apply(upsert._replace(name=name))
    assert compared.total() < 10


def test_ten_thousand_services_fit_in_fifteen_megabytes() -> None:
    """In a process of its own, where nothing else is allocated meanwhile."""
    code = "from benchmarks import decode; print(decode.occupied_bytes(10_000))"
    root = Path(__file__).parents[2]
    printed = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True).stdout
    # Plus a megabyte: the interpreter's table of interned strings doubles now and then.
    assert 5_000_000 < int(printed) < 16_000_000
