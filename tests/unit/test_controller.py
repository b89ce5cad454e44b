"""The whole agent but for its edges, in virtual time: events in, rows in memory out."""

import asyncio
import collections
import collections.abc
import contextlib
import dataclasses
import errno
import ipaddress
import itertools
import logging
import logging.handlers
import threading
import typing

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from lbproxy import abi, controller
from lbproxy.config import config
from lbproxy.core import addresses, events, ledger, model, quarantine, tables
from lbproxy.kernel import fake, maps
from lbproxy.metrics import metrics
from tests import polling, serving, strategies, virtual_time
from tests.unit import test_ledger, test_reconcile

LOCAL = (addresses.parse("192.0.2.1") or b"",)
HALF_AN_HOUR_S = 1800.0
_MANY_LOOKS = 5000 + abi.constant("NO_FRONTENDS_ROWS")  # at its start the agent writes each of these
upsert, service, slice_of, SYNCED = (
    test_reconcile.upsert,
    test_reconcile.service,
    test_reconcile.slice_of,
    test_reconcile.SYNCED,
)


class Clock:
    """The loop's clock; tells an agent that turns without end, as it looks at the clock each time."""

    def __init__(self) -> None:
        self._time = asyncio.get_running_loop().time
        self._last, self._looks = 0.0, 0

    def __call__(self) -> float:
        now_s = self._time()
        self._last, self._looks = now_s, self._looks + 1 if now_s == self._last else 0
        assert self._looks < _MANY_LOOKS, "the agent turns without waiting for anything"
        return now_s


class Kernel(fake.FakeMaps):
    """Maps that are looked at after every write, and that fail when told to."""

    def __init__(self, sizes: typing.Mapping[str, int], clock: collections.abc.Callable[[], float]) -> None:
        super().__init__(sizes)
        self._clock = clock
        self._watched = serving.Watched(fake.FakeMaps(sizes))
        self.unreadable: set[str] = set()
        self.refused: set[str] = set()  # what is written to these tables fails
        self.refused_s: list[float] = []
        self.reads: collections.Counter[str] = collections.Counter()

    def _one(self, write: tables.Write) -> None:
        if write.table in self.refused:
            self.refused_s.append(self._clock())
            raise maps.MapWriteError(f"1 rows of {write.table}: no memory")
        super()._one(write)
        self._watched.apply([write], self._clock())

    def grow(self, **rows: int) -> None:
        super().grow(**rows)
        self._watched.maps.grow(**rows)

    def rows(self, table: str) -> typing.Iterator[tuple[bytes, bytes]]:
        self.reads[table] += 1
        if table in self.unreadable:
            raise OSError(errno.ENOMEM, f"dump map {table}: no memory")
        return super().rows(table)


class Agent:
    """A running controller."""

    def __init__(self, **changed: typing.Any) -> None:
        room = changed.pop("room", {})
        self.clock = Clock()
        self.wall_ahead_s = 0.0
        self.kernel = Kernel(serving.sizes(**room), self.clock)
        self.reported: list[events.Rejected | events.Upsert] = []
        self.telemetry = metrics.Metrics()
        self.control = controller.Controller(
            dataclasses.replace(config.Config(node_name=test_reconcile.NODE), **changed),
            self.kernel,
            serving.capacity(**room),
            self.telemetry,
            self.reported.append,
            clock=self.clock,
            wall_clock=self.wall,
        )

    def wall(self) -> float:
        """The wall's clock."""
        return self.clock() + self.wall_ahead_s

    def successor(self, **changed: typing.Any) -> controller.Controller:
        """A controller that starts on what this one left."""
        return controller.Controller(
            dataclasses.replace(config.Config(node_name=test_reconcile.NODE), **changed),
            self.kernel,
            serving.capacity(),
            self.telemetry,
            clock=self.clock,
            wall_clock=self.clock,
        )

    @contextlib.asynccontextmanager
    async def running(self, *, with_node: bool = True) -> collections.abc.AsyncIterator["Agent"]:
        if with_node:
            self.control.node_changed(LOCAL, 1)
        task = asyncio.create_task(self.control.run())
        try:
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def told(self, *happened: events.Event) -> None:
        self.control.emit(happened)

    def sample(self, name: str, **labels: str) -> float:
        found = self.telemetry.registry.get_sample_value(name, labels)
        assert found is not None, name
        return found

    @property
    def hosts(self) -> set[int]:
        """The last bytes of the backends that web's frontend leads to."""
        return {place[0][-1] for served in serving.view(self.kernel).values() for place in served.slots}


def in_virtual_time(
    test: collections.abc.Callable[[], collections.abc.Coroutine[typing.Any, typing.Any, None]],
) -> collections.abc.Callable[[], None]:
    def run() -> None:
        virtual_time.run(test)

    run.__name__ = test.__name__
    return run


async def settled(agent: Agent) -> None:
    """Let the agent do what it has to do now; a millisecond of its clock passes."""
    await asyncio.sleep(0.001)
    assert not agent.control.reconciler.pending


@in_virtual_time
async def test_it_is_ready_once_the_first_full_state_is_in_the_kernel() -> None:
    async with Agent().running() as agent:
        agent.told(upsert(service()), upsert(slice_of()))
        await settled(agent)
        assert not agent.control.ready.is_set()
        assert agent.control.reasons == ["the first full state is not in the kernel yet"]
        assert not serving.view(agent.kernel)
        agent.told(*SYNCED)
        await agent.control.ready.wait()
        assert agent.hosts == {1, 2}
        assert agent.control.reasons == []
        assert agent.control.health.last_synced_s == agent.clock()


@in_virtual_time
async def test_it_is_not_ready_before_it_knows_the_node() -> None:
    async with Agent().running(with_node=False) as agent:
        agent.told(upsert(service()), upsert(slice_of()), *SYNCED)
        await settled(agent)
        assert agent.hosts == {1, 2}
        assert not agent.control.ready.is_set()
        agent.control.node_changed(LOCAL, 1)
        await agent.control.ready.wait()
        assert {key for key, _ in agent.kernel.rows(tables.Table.NODE_ADDRESSES)} == set(LOCAL)


@in_virtual_time
async def test_a_cluster_without_services_is_ready_too() -> None:
    async with Agent().running() as agent:
        agent.told(*SYNCED)
        await agent.control.ready.wait()


@in_virtual_time
async def test_what_went_is_cleared_when_its_time_has_come_without_any_event() -> None:
    async with Agent().running() as agent:
        agent.told(upsert(service()), upsert(slice_of()), *SYNCED)
        await agent.control.ready.wait()
        agent.told(upsert(slice_of(hosts=(2,))))
        await settled(agent)
        assert len(list(agent.kernel.rows(tables.Table.BACKENDS))) == 2
        await asyncio.sleep(quarantine.RECYCLE_AFTER_S)
        assert len(list(agent.kernel.rows(tables.Table.BACKENDS))) == 1


@in_virtual_time
async def test_a_write_that_fails_is_made_up_for_after_a_pause() -> None:
    async with Agent().running() as agent:
        agent.told(upsert(service()), upsert(slice_of()), *SYNCED)
        await agent.control.ready.wait()
        started_s, agent.kernel.fail_after = agent.clock(), 1
        agent.told(upsert(slice_of(hosts=(3, 4))))
        await asyncio.sleep(quarantine.RECYCLE_AFTER_S / 2)
        assert agent.hosts == {1, 2}
        assert agent.sample("lbproxy_sync_failures_total") == 1
        assert agent.control.health.waiting_s(agent.clock()) == agent.clock() - started_s
        await asyncio.sleep(quarantine.RECYCLE_AFTER_S)
        assert agent.hosts == {3, 4}
        assert agent.control.health.waiting_s(agent.clock()) == 0


@in_virtual_time
async def test_pauses_between_failures_grow_and_end_with_success() -> None:
    async with Agent().running() as agent:
        agent.kernel.refused = {tables.Table.SERVICES}
        agent.told(upsert(service()), upsert(slice_of()), *SYNCED)
        await asyncio.sleep(200)
        pauses = [round(later - sooner) for sooner, later in itertools.pairwise(agent.kernel.refused_s)]
        assert pauses[:6] == [1, 2, 4, 8, 16, 30]
        agent.kernel.refused.clear()
        await asyncio.sleep(30)
        assert agent.hosts == {1, 2}


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_it_converges_whichever_writes_fail(data: st.DataObject) -> None:
    cluster = data.draw(strategies.clusters())
    history = data.draw(strategies.histories(cluster))
    faults = data.draw(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 8)), max_size=4))

    async def run() -> None:
        async with Agent().running() as agent:
            told = iter(history)
            for fail_after, batch in faults:
                agent.kernel.fail_after = fail_after
                agent.told(*itertools.islice(told, batch))
                await asyncio.sleep(0.7)
            agent.told(*told)
            await asyncio.sleep(100)
            expected = test_reconcile.Agent()
            expected.take(*itertools.starmap(events.Upsert, ((*k, v) for k, v in cluster.objects.items())))
            expected.take(*SYNCED)
            expected.settle()
            serving.assert_same(agent.kernel, expected.kernel.maps)

    virtual_time.run(run)


# --- drift, full tables, a busy cluster ---


def lose_the_frontends(agent: Agent) -> None:
    keys = [key for key, _ in agent.kernel.rows(tables.Table.FRONTENDS)]
    agent.kernel.apply([tables.Delete(tables.Table.FRONTENDS, key) for key in keys])
    assert not agent.hosts


@in_virtual_time
async def test_rows_that_someone_removed_are_put_back_within_half_an_hour() -> None:
    async with Agent().running() as agent:
        agent.told(upsert(service()), upsert(slice_of()), *SYNCED)
        await agent.control.ready.wait()
        lose_the_frontends(agent)
        agent.kernel.apply([tables.Delete(tables.Table.NODE_ADDRESSES, LOCAL[0])])
        await asyncio.sleep(HALF_AN_HOUR_S + 1)
        assert agent.hosts == {1, 2}
        assert node_port_addresses(agent) == set(LOCAL)


@in_virtual_time
async def test_a_cluster_that_never_rests_does_not_make_it_turn_without_end() -> None:
    """The look for drift waits for an empty quarantine; it must not be asked for in the meantime."""
    async with Agent().running() as agent:
        agent.told(upsert(service()), *SYNCED)
        await agent.control.ready.wait()
        for host in range(4 * 920):
            agent.told(upsert(slice_of(hosts=(1, 2 + host % 2))))
            await asyncio.sleep(0.5)
        lose_the_frontends(agent)
        await asyncio.sleep(5)
        assert agent.hosts == {1, 3}


@in_virtual_time
async def test_a_full_table_is_told_and_tried_again_though_events_keep_coming() -> None:
    async with Agent(room={"frontends": 1}).running() as agent:
        agent.told(upsert(service("a", 1)), upsert(service("b", 2)), upsert(slice_of("b", (5,))), *SYNCED)
        await agent.control.ready.wait()
        [reason] = agent.control.reasons
        assert reason == (
            "default/b/TCP/IPv4: the frontends table is full (1 rows): raise it with --map-rows frontends=N"
        )
        agent.told(events.Delete(events.Kind.SERVICE, events.ObjectName("default", "a")))
        for number in range(40):
            agent.told(upsert(slice_of("unknown", (number % 250,))))
            await asyncio.sleep(0.3)
        assert agent.hosts == {5}
        assert agent.control.reasons == []


@in_virtual_time
async def test_a_full_table_is_no_reason_to_be_restarted() -> None:
    async with Agent(room={"frontends": 1}).running() as agent:
        agent.told(upsert(service("a", 1)), *SYNCED)
        await agent.control.ready.wait()
        agent.told(upsert(service("b", 2)))
        await asyncio.sleep(1000)
        assert agent.control.reasons
        assert agent.control.health.healthy(agent.clock())


@in_virtual_time
async def test_room_that_the_quarantine_gives_back_is_used_at_once() -> None:
    async with Agent(room={"backends": 3}).running() as agent:
        agent.told(upsert(service()), upsert(slice_of()), *SYNCED)
        await agent.control.ready.wait()
        agent.told(upsert(slice_of(hosts=(3, 4))))
        await settled(agent)
        assert agent.hosts == {1, 2}
        agent.told(upsert(slice_of(hosts=(2,))))
        await settled(agent)
        agent.told(upsert(slice_of(hosts=(2, 3))))
        await settled(agent)
        assert agent.hosts == {2}
        await asyncio.sleep(quarantine.RECYCLE_AFTER_S + 0.01)
        assert agent.hosts == {2, 3}


@in_virtual_time
async def test_passes_keep_their_distance() -> None:
    async with Agent(min_sync_period_s=5.0).running() as agent:
        agent.told(upsert(service()), upsert(slice_of()), *SYNCED)
        await agent.control.ready.wait()
        for host in range(3, 9):
            agent.told(upsert(slice_of(hosts=(host,))))
            await asyncio.sleep(0.5)
        assert agent.hosts == {1, 2}
        await asyncio.sleep(2.5)
        assert agent.hosts == {8}


# --- what others are told ---


@in_virtual_time
async def test_a_rejection_is_reported_once_for_each_reason() -> None:
    async with Agent().running() as agent:
        name = events.ObjectName("default", "broken")
        bad, worse = (events.Rejected(events.Kind.SERVICE, name, reason) for reason in ("bad", "worse"))
        agent.told(bad, bad, worse, bad)
        assert agent.reported == [bad, worse, bad]
        assert agent.control.rejected == {(events.Kind.SERVICE, name): "bad"}
        said = events.rejection("Service", name, "`lbproxy status` says why")
        assert said in agent.control.reasons
        agent.told(events.Upsert(events.Kind.SERVICE, name, None))
        assert not agent.control.rejected
        for mended in (events.Delete(events.Kind.SERVICE, name), events.Accepted(events.Kind.SERVICE, name)):
            agent.told(bad)
            agent.told(mended)
            assert not agent.control.rejected
            assert said not in agent.control.reasons
        assert agent.reported[-2:] == [bad, bad]
        assert agent.sample("lbproxy_rejected_total", kind="Service") == 5


@in_virtual_time
async def test_of_many_that_are_rejected_health_names_a_few() -> None:
    async with Agent().running() as agent:
        names = [events.ObjectName("default", f"broken-{number}") for number in range(13)]
        agent.told(*(events.Rejected(events.Kind.SERVICE, name, "bad") for name in names))
        *named, others = [line for line in agent.control.reasons if "rejected" in line]
        assert len(named) == 10
        assert others.startswith("and 3 more objects are rejected")


@in_virtual_time
async def test_a_warning_is_told_and_counted_when_it_is_new() -> None:
    async with Agent().running() as agent:
        one, both, other = (upsert(service())._replace(warnings=tuple(said)) for said in ("a", "ab", "b"))
        agent.told(one, one, both, other)
        assert agent.reported == [one, both]
        assert agent.sample("lbproxy_warnings_total", kind="Service") == 2
        agent.told(upsert(service()), other)  # mended, and wrong again
        agent.told(events.Delete(other.kind, other.name), other)
        assert agent.reported == [one, both, other, other]
        assert agent.sample("lbproxy_warnings_total", kind="Service") == 4
        assert not agent.control.rejected


@in_virtual_time
async def test_the_age_of_a_change_is_measured_from_its_trigger() -> None:
    async with Agent().running() as agent:
        before_it_started = agent.clock() - 60.0
        agent.told(upsert(service()), upsert(slice_of(at_s=before_it_started)), *SYNCED)
        await agent.control.ready.wait()
        programming = "kubeproxy_network_programming_duration_seconds"
        await asyncio.sleep(10)
        agent.told(upsert(slice_of(hosts=(9,), at_s=agent.clock() - 2.0)))
        await settled(agent)
        assert agent.sample(f"{programming}_count", ip_family="IPv4") == 1
        assert agent.sample(f"{programming}_sum", ip_family="IPv4") == 2.0


@in_virtual_time
async def test_a_wall_clock_that_jumps_spoils_no_measurement() -> None:
    for jump_s in (-86_400.0, 86_400.0):
        agent = Agent()
        async with agent.running():
            agent.told(upsert(service()), upsert(slice_of()), *SYNCED)
            await agent.control.ready.wait()
            await asyncio.sleep(10)
            agent.wall_ahead_s = jump_s
            programming = "kubeproxy_network_programming_duration_seconds"
            # Of before the start; of a clock that is ahead of this one; and one as it should be.
            for host, at_s in ((9, agent.wall() - 3600.0), (8, agent.wall() + 3600.0), (7, agent.wall())):
                agent.told(upsert(slice_of(hosts=(host,), at_s=at_s)))
                await settled(agent)
            assert agent.sample(f"{programming}_count", ip_family="IPv4") == 2
            assert 0.0 <= agent.sample(f"{programming}_sum", ip_family="IPv4") < 1.0
            assert agent.control.health.waiting_s(agent.clock()) == 0


@in_virtual_time
async def test_what_a_failed_pass_was_to_bring_is_not_measured() -> None:
    async with Agent().running() as agent:
        agent.told(upsert(service()), upsert(slice_of()), *SYNCED)
        await agent.control.ready.wait()
        agent.kernel.fail_after = 1
        agent.told(upsert(slice_of(hosts=(9,), at_s=agent.clock())))
        await asyncio.sleep(10)
        assert agent.hosts == {9}
        programming = "kubeproxy_network_programming_duration_seconds_count"
        assert agent.telemetry.registry.get_sample_value(programming, {"ip_family": "IPv4"}) is None
        agent.told(upsert(slice_of(hosts=(8,), at_s=agent.clock())))
        await settled(agent)
        assert agent.sample(programming, ip_family="IPv4") == 1


@in_virtual_time
async def test_an_event_that_changes_nothing_leaves_it_healthy() -> None:
    async with Agent().running() as agent:
        agent.told(upsert(service()), upsert(slice_of()), *SYNCED)
        await agent.control.ready.wait()
        agent.told(*SYNCED)
        await asyncio.sleep(100)
        assert agent.control.health.waiting_s(agent.clock()) == 0


@in_virtual_time
async def test_it_takes_over_what_another_agent_left() -> None:
    agent = Agent()
    left = ledger.Ledger(serving.capacity())
    serving.begin_absence(left, agent.kernel)
    agent.kernel.apply(left.change({test_ledger.WEB: [test_ledger.port()]}, 0.0).writes)
    agent.kernel.log.clear()
    agent.control = successor = agent.successor()
    async with agent.running():
        await asyncio.sleep(5)
        assert {write.table for write in agent.kernel.log} <= {
            tables.Table.SETTINGS,
            tables.Table.NODE_ADDRESSES,
        }
        assert agent.hosts == {1, 2}
        name: typing.Final = model.ServiceName("default", "web")
        assert name in successor.reconciler.ledger.services()
        agent.told(*SYNCED)
        await settled(agent)
        assert not agent.hosts


@in_virtual_time
async def test_passes_that_did_nothing_are_not_logged() -> None:
    lines = logging.handlers.BufferingHandler(100)
    logger = logging.getLogger(controller.__name__)
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        agent = Agent()
        agent.control.awaits_devices = True
        async with agent.running():
            agent.told(*SYNCED)
            await settled(agent)
            agent.told(upsert(service()), upsert(slice_of()))
            await settled(agent)
    finally:
        logger.setLevel(logging.NOTSET)
        logger.removeHandler(lines)
    said = [record.getMessage() for record in lines.buffer if "reconciled" in record.msg]
    assert len(said) == 1
    assert said[0].startswith("reconciled services=1 writes=")


# --- this node ---

OTHER = addresses.parse("198.51.100.1") or b""
NODE: typing.Final = model.Node(test_reconcile.NODE, LOCAL, "zone-1", (), eligible=True)
TWO_LISTS = [events.Synced(events.Kind.SERVICE), events.Synced(events.Kind.ENDPOINT_SLICE)]


def node_port_addresses(agent: Agent) -> set[bytes]:
    serving_row = abi.LAYOUTS["node_address"].pack(tables.NodeAddressFlag.NODE_PORTS)
    return {key for key, row in agent.kernel.rows(tables.Table.NODE_ADDRESSES) if row == serving_row}


def hinted_slice() -> model.EndpointSlice:
    """Two endpoints, each for a zone of its own."""
    plain = slice_of()
    return msgspec.structs.replace(
        plain,
        endpoints=tuple(
            msgspec.structs.replace(
                endpoint, location=model.Location("node-b", endpoint.location.zone, (f"zone-{number}",))
            )
            for number, endpoint in enumerate(plain.endpoints, 1)
        ),
    )


@in_virtual_time
async def test_more_addresses_than_there_is_room_for_stop_no_service() -> None:
    async with Agent(room={"node_addresses": 1}).running() as agent:
        agent.control.node_changed((OTHER, *LOCAL), 1)
        agent.told(upsert(NODE), upsert(service()), upsert(slice_of()), *SYNCED)
        await agent.control.ready.wait()
        assert agent.hosts == {1, 2}
        assert node_port_addresses(agent) == set(LOCAL)
        [reason] = agent.control.reasons
        assert reason == (
            "the node_addresses table is full (1 rows): raise it with --map-rows node_addresses=N"
        )
        assert agent.control.unserved == [reason]
        agent.control.node_changed(LOCAL, 1)
        await settled(agent)
        assert agent.control.reasons == []


@in_virtual_time
async def test_node_addresses_that_can_not_be_written_stop_no_service() -> None:
    async with Agent().running() as agent:
        agent.kernel.refused = {tables.Table.NODE_ADDRESSES}
        agent.told(upsert(service()), upsert(slice_of()), *SYNCED)
        await settled(agent)
        assert agent.hosts == {1, 2}
        assert not agent.control.ready.is_set()
        assert "cannot write this node's addresses: 1 rows of node_addresses" in agent.control.reasons[0]
        agent.kernel.refused.clear()
        await asyncio.sleep(10)
        assert agent.control.ready.is_set()
        assert agent.control.reasons == []


@in_virtual_time
async def test_node_addresses_are_only_looked_at_when_they_may_have_changed() -> None:
    async with Agent().running() as agent:
        agent.told(upsert(service()), upsert(slice_of()), *SYNCED)
        await agent.control.ready.wait()
        looks = agent.kernel.reads[tables.Table.NODE_ADDRESSES]
        agent.told(upsert(slice_of(hosts=(3,))))
        await settled(agent)
        assert agent.kernel.reads[tables.Table.NODE_ADDRESSES] == looks
        agent.control.node_changed((*LOCAL, OTHER), 1)
        await settled(agent)
        assert node_port_addresses(agent) == {*LOCAL, OTHER}


@in_virtual_time
async def test_a_restart_before_the_node_is_known_changes_nothing() -> None:
    async with Agent(nodeport_primary=True).running() as agent:
        agent.control.node_changed((*LOCAL, OTHER), 1)
        agent.told(upsert(NODE), upsert(service()), upsert(hinted_slice()), *SYNCED)
        await agent.control.ready.wait()
        assert agent.hosts == {1}
        assert node_port_addresses(agent) == set(LOCAL)
    agent.control = agent.successor(nodeport_primary=True)
    agent.kernel.log.clear()
    async with agent.running():
        agent.control.node_changed((*LOCAL, OTHER), 1)
        agent.told(upsert(service()), upsert(hinted_slice()), *TWO_LISTS)
        await asyncio.sleep(29)
        assert agent.kernel.log == []
        assert "Node node-a has not been read yet" in agent.control.reasons
        assert agent.control.node_problem == "Node node-a has not been read yet"
        agent.told(upsert(NODE), events.Synced(events.Kind.NODE))
        await agent.control.ready.wait()
        assert {write.table for write in agent.kernel.log} == {tables.Table.SETTINGS}


@in_virtual_time
async def test_why_load_balancers_may_not_use_the_node() -> None:
    async with Agent().running() as agent:
        agent.told(*SYNCED)
        await agent.control.ready.wait()
        assert agent.control.node_problem == 'no Node is called "node-a": see --node-name'
        for changes, problem in (
            ({}, ""),
            ({"eligible": False}, "Node node-a is marked for removal by the autoscaler"),
            ({"eligible": False, "deleting": True}, "Node node-a is being deleted"),
        ):
            agent.told(upsert(msgspec.structs.replace(NODE, **changes)))
            await settled(agent)
            assert agent.control.node_problem == problem
    async with Agent(manifests="/m").running() as agent:
        assert agent.control.node_problem == ""


@in_virtual_time
async def test_a_node_that_can_not_be_read_is_waited_for_half_a_minute() -> None:
    async with Agent(nodeport_primary=True).running() as agent:
        agent.told(upsert(service()), upsert(hinted_slice()))
        await asyncio.sleep(60)
        agent.told(*TWO_LISTS)
        await asyncio.sleep(29.9)
        assert not agent.hosts
        assert not node_port_addresses(agent)
        await asyncio.sleep(0.2)
        assert agent.hosts == {1, 2}
        assert node_port_addresses(agent) == set(LOCAL)
        assert agent.control.ready.is_set()


@in_virtual_time
async def test_configured_addresses_are_primary() -> None:
    for changed, primary in (
        ({"node_ips": (ipaddress.ip_address("198.51.100.1"),)}, {OTHER}),
        ({"bind_address": ipaddress.ip_address("198.51.100.1")}, {OTHER}),
        ({"bind_address": ipaddress.ip_address("2001:db8::1")}, {*LOCAL}),
    ):
        async with Agent(nodeport_primary=True, **changed).running() as agent:
            agent.control.node_changed((*LOCAL, OTHER), 1)
            agent.told(upsert(NODE), *SYNCED)
            await agent.control.ready.wait()
            assert node_port_addresses(agent) == primary


@in_virtual_time
async def test_external_ips_are_not_served_where_the_feature_gate_says_so() -> None:
    for external_ips in (True, False):
        async with Agent(external_ips=external_ips).running() as agent:
            agent.told(upsert(msgspec.structs.replace(service(), external_ips=(OTHER,))), *SYNCED)
            await agent.control.ready.wait()
            assert len(serving.view(agent.kernel)) == 1 + external_ips


# --- reading back ---


@in_virtual_time
async def test_tables_that_can_not_be_read_back_are_read_again() -> None:
    async with Agent().running() as agent:
        agent.told(upsert(service()), upsert(slice_of()), *SYNCED)
        await agent.control.ready.wait()
        agent.kernel.unreadable = {tables.Table.BACKENDS}
        lose_the_frontends(agent)
        await asyncio.sleep(HALF_AN_HOUR_S + 1)
        assert agent.sample("lbproxy_sync_failures_total") >= 1
        agent.kernel.unreadable.clear()
        await asyncio.sleep(30)
        assert agent.hosts == {1, 2}


def test_events_are_taken_while_the_tables_are_read_back() -> None:
    """In real time: reading ends only once the loop has done something else."""

    async def run() -> None:
        agent = Agent()
        beside = threading.Event()
        reading = asyncio.Event()
        loop, dump = asyncio.get_running_loop(), agent.kernel.dump

        def slow() -> ledger.Dump:
            loop.call_soon_threadsafe(reading.set)
            assert beside.wait(30), "the loop stands still"
            return dump()

        async with agent.running():
            agent.told(upsert(service()), upsert(slice_of()), *SYNCED)
            await agent.control.ready.wait()
            agent.kernel.dump = slow  # type: ignore[method-assign]
            agent.kernel.fail_after = 0
            agent.told(upsert(slice_of(hosts=(3,))))
            async with asyncio.timeout(30):
                await reading.wait()
                agent.told(upsert(slice_of(hosts=(4,))))
                beside.set()
            await asyncio.to_thread(polling.eventually, lambda: agent.hosts == {4}, what="the last slice")

    asyncio.run(run())


@in_virtual_time
async def test_an_address_that_two_services_claim_is_told_while_they_do() -> None:
    async with Agent().running() as agent:
        agent.told(upsert(service("first", 1)), upsert(service("second", 1)), *SYNCED)
        await settled(agent)
        assert agent.control.reasons == [
            "10.96.0.1:80 is claimed by default/first/TCP/IPv4, which has it, and by default/second/TCP/IPv4"
        ]
        agent.told(events.Delete(events.Kind.SERVICE, events.ObjectName("default", "first")))
        await settled(agent)
        assert agent.control.reasons == []


@in_virtual_time
async def test_a_hook_that_can_not_be_put_back_is_a_reason() -> None:
    async with Agent().running() as agent:
        agent.told(*SYNCED)
        await settled(agent)
        agent.control.datapath_problem = "connect4 can not be put back"
        assert agent.control.reasons == ["connect4 can not be put back"]
        # As it is when it is asked for.
        problems = ["probes count for nothing", ""]
        agent.control.probe_problem = lambda: problems.pop(0)
        agent.control.datapath_problem = ""
        agent.control.source_problems = lambda: ["", "nothing is heard"]
        assert agent.control.reasons == ["probes count for nothing", "nothing is heard"]
        assert agent.control.reasons == ["nothing is heard"]


@in_virtual_time
async def test_what_of_the_reasons_means_that_another_proxys_rules_may_be_needed() -> None:
    async with Agent(room={"services": 2}, packet_path=False).running() as agent:
        control = agent.control
        agent.told(upsert(service()), upsert(slice_of()), upsert(service("more", 2)), *SYNCED)
        await settled(agent)
        off, full = control.unserved
        assert "--packet-path=false" in off
        assert "the services table is full (2 rows)" in full
        agent.told(events.Delete(events.Kind.SERVICE, events.ObjectName("default", "more")))
        await settled(agent)
        assert control.unserved == [off]
        control.device_problems, control.devices_unserved = ["eth7 is not there", "no uplink"], ["no uplink"]
        control.datapath_problem, control.handover_problem = "connect4 is gone", "the tracker is mute"
        control.return_notice = control.migration_problem = control.growth_problem = "not this"
        assert control.unserved == [off, "no uplink", "connect4 is gone", "the tracker is mute"]
    async with Agent().running() as agent:
        agent.told(upsert(service("first", 1)), upsert(service("second", 1)), *SYNCED)
        await settled(agent)
        assert agent.control.reasons
        assert agent.control.unserved == []


@in_virtual_time
async def test_it_is_not_ready_while_tables_are_about_to_grow() -> None:
    for grows in (True, False):
        agent = Agent(room={"services": 2})
        agent.control.awaits_room = True
        async with agent.running():
            agent.told(upsert(service()), upsert(slice_of()))
            agent.told(upsert(service("other", 2)), upsert(slice_of("other", (5,))), *SYNCED)
            await asyncio.sleep(30)
            assert not agent.control.ready.is_set()
            if grows:
                agent.kernel.grow(services=8)
                agent.control.grown()
            else:
                agent.control.stays_full("there is no memory")
            await settled(agent)
            assert agent.control.ready.is_set()
            assert (agent.control.reasons == []) is grows


@in_virtual_time
async def test_larger_tables_serve_at_once_what_found_no_room() -> None:
    agent = Agent(room={"services": 2})
    async with agent.running():
        agent.told(upsert(service()), upsert(slice_of()))
        agent.told(upsert(service("other", 2)), upsert(slice_of("other", (5,))), *SYNCED)
        await settled(agent)
        assert len(agent.control.reconciler.starved) == 1
        before_s = agent.clock()
        agent.kernel.grow(services=8)
        agent.control.grown()
        await settled(agent)
        assert agent.clock() - before_s < 0.1
        assert not agent.control.reconciler.starved
        assert agent.control.reasons == []
        assert agent.control.node_facts is not None
