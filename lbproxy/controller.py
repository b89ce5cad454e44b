"""Joins the three parts: what `kube` reads goes through `core` into `kernel`.

The only module that knows all of them. One task reads events, one makes passes;
they meet at an asyncio.Event. The kernel serves whatever this process does: when
a write fails, the tables are read back and the whole is planned again.
"""

import asyncio
import collections
import contextlib
import logging
import time
import typing

from lbproxy import gate, local_node, node_watch, rejections, shortfalls
from lbproxy.config import config
from lbproxy.core import (
    events,
    health,
    healthz,
    ledger,
    model,
    node_rows,
    plan,
    quarantine,
    reconcile,
    restoring,
    tables,
    topology,
)
from lbproxy.kernel import maps
from lbproxy.metrics import metrics

_log = logging.getLogger(__name__)

# The first pause is as long as the quarantine that a ledger loses when it is restored.
_RETRY_S: typing.Final = (quarantine.RECYCLE_AFTER_S, 30.0)
_DRIFT_S: typing.Final = 1800.0
_STARVED_RETRY_S: typing.Final = 10.0
_NODE_WAIT_S: typing.Final = 30.0  # NODE-5
_LOG_WRITES: typing.Final = 4


Wrote = typing.Callable[[typing.Sequence[tables.Write]], None]
Passed = typing.Callable[["Controller", list[model.ServiceName]], None]


class Controller:
    """Takes events, makes passes, and knows how healthy that is."""

    def __init__(
        self,
        settings: config.Config,
        kernel: maps.Maps,
        capacity: ledger.Capacity,
        telemetry: metrics.Metrics,
        report: rejections.Report = lambda _rejected: None,
        passed: Passed = lambda _controller, _names: None,
        wrote: Wrote = lambda _writes: None,
        node_known: local_node.Known = lambda _addresses: None,
        clock: typing.Callable[[], float] = time.monotonic,
        wall_clock: typing.Callable[[], float] = time.time,
        writing: gate.Gate | None = None,
    ) -> None:
        """`writing` is passed whenever the tables are written to."""
        self._settings = settings
        self._kernel = kernel
        self._capacity = capacity
        self._passed = passed
        self._wrote = wrote
        self._telemetry = telemetry
        self._clock = clock
        self._wall_clock = wall_clock
        self._writing = writing or gate.Gate()
        self._started_s = clock()
        self._drift_due_s = clock() + _DRIFT_S
        self._starved_due_s: float | None = None
        self._shortfalls = shortfalls.Shortfalls()
        self.growth_problem = ""  # why tables that are filling up do not grow
        self.datapath_problem = ""  # a hook that is gone and can not be put back
        self.handover_problem = ""  # why no flow is begun yet beside another proxy's
        self.return_notice = ""  # that none is to be begun any more
        # What keeps probes from being made as they are asked for; looked at when it is asked for.
        self.probe_problem: typing.Callable[[], str] = lambda: ""
        # What is not heard of any more; likewise.
        self.source_problems: typing.Callable[[], typing.Iterable[str]] = lambda: ()
        self.migration_problem = ""  # why what the Node says is not carried out
        self.device_problems: typing.Sequence[str] = ()  # what keeps the packet path from devices
        self.devices_unserved: typing.Sequence[str] = ()  # those of them that leave packets unserved
        self._node_due_s: float | None = None
        self._astray = False  # the ledger may no longer be what the kernel holds
        self._wake = asyncio.Event()
        self._node = local_node.LocalNode(settings, kernel, clock, node_known)
        self._rejections = rejections.Rejections(telemetry, report)
        self.ready = asyncio.Event()  # the first full state is in the kernel, and served
        self.complete = asyncio.Event()  # likewise, whether served or not
        self.awaits_devices = False  # whether somebody is still to say `devices_served`
        self.awaits_room = False  # whether tables that refuse somebody are about to grow
        self.health = healthz.ProxyHealth(settings.sync_period_s)
        self.reconciler = reconcile.Reconciler(
            settings.node_name,
            plan.Defaults(settings.algorithm, settings.mode, settings.external_ips),
            self._restored(),
            local_node.identity(settings),
        )

    # --- what comes in ---

    def emit(self, batch: typing.Sequence[events.Event]) -> None:
        """Take events from a source; they are applied with the next pass."""
        # A first list is tens of thousands of events: what can be done once for all of them is.
        changes: collections.Counter[events.Kind] = collections.Counter()
        changed = False
        debugs = _log.isEnabledFor(logging.DEBUG)
        for event in batch:
            self._rejections.take(event)
            if self.reconciler.take(event):
                # Nothing but an Upsert or a Delete touches a service.
                changes[event.kind] += 1
                if debugs:
                    name = getattr(event, "name", "")
                    _log.debug("%s %s %s", type(event).__name__.lower(), event.kind, name)
            elif isinstance(event, events.Synced):
                level = logging.DEBUG if self.ready.is_set() else logging.INFO
                _log.log(level, "list complete kind=%s", event.kind)
                changed = True
        for kind, count in changes.items():
            self._telemetry.changed(kind, count)
        if changed or changes:
            self.health.queued(self._clock())
            self._telemetry.queued(self._wall_clock())
        self._wake.set()

    def node_changed(self, local: tuple[bytes, ...], host_netns: int) -> None:
        """Take this node's own addresses."""
        self._node.found(local, host_netns)
        self._wake.set()

    def note_health(
        self, port: model.PortKey, place: topology.Place, source: health.Source, usable: bool, reason: str
    ) -> bool:
        """Take what a source says of a backend; returns whether its service is planned again for it."""
        changed = self.reconciler.health.note(port, place, source, usable, reason)
        if changed:
            self.reconciler.health_changed(port.service)
            self._wake.set()
        return changed

    def grown(self) -> None:
        """Go on with larger tables that hold the same; whoever writes has to be kept out meanwhile."""
        self._capacity = self._kernel.capacity()
        self.reconciler.ledger.grow(self._capacity)
        self.reconciler.retry_starved()
        self._node.forget()
        self._wake.set()

    # --- what goes out ---

    async def run(self) -> typing.NoReturn:
        """Make passes whenever there is something to do."""
        pause_s = _RETRY_S[0]
        while True:
            try:
                async with self._writing.shared():
                    if self._astray:
                        await self._read_back()
                    self._wait_for_node()
                    self._write_node()
                    names = await self._passes()
            except (maps.MapWriteError, OSError) as error:
                what = "write" if isinstance(error, maps.MapWriteError) else "read the kernel's tables:"
                _log.error("cannot %s %s; all tables are read back in %.1f s", what, error, pause_s)
                self._telemetry.sync_failed()
                self.reconciler.forget_triggers()
                self._astray = True
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _RETRY_S[1])
                continue
            pause_s = _RETRY_S[0]
            self._passed(self, names)
            await self._wait()

    async def _read_back(self) -> None:
        """Go on from what the kernel really holds.

        In a thread: at 10,000 services it takes half a second, in which events keep
        coming. They only fold into the state; the ledger is this task's alone.
        """
        known = await asyncio.to_thread(self._restored)
        self._astray = False
        self._node.forget()
        self.reconciler.start_over(known)

    def _wait_for_node(self) -> None:
        """Bound how long the first pass waits for the Node (NODE-5)."""
        if not self.reconciler.awaits_node:
            self._node_due_s = None
            return
        now_s = self._clock()
        if self._node_due_s is None:
            self._node_due_s = now_s + _NODE_WAIT_S
        elif now_s >= self._node_due_s:
            self._node_due_s = None
            _log.error(
                "Node %s cannot be read: going on without its zone and addresses", self._settings.node_name
            )
            self.reconciler.go_on_without_node()

    async def _passes(self) -> list[model.ServiceName]:
        """Plan and write until nothing is left, giving way to other tasks in between; returns what was."""
        started_s = self._clock()
        names: list[model.ServiceName] = []
        written = 0
        triggers: list[reconcile.Trigger] = []
        if freed := self.reconciler.ledger.expire(started_s):
            self._apply(freed)
            self.reconciler.retry_starved()
        self.reconciler.step_ramps(started_s)
        while self.reconciler.pending:
            done = self.reconciler.next_pass(self._clock())
            self._apply(done.writes)
            names += done.names
            written += len(done.writes)
            triggers += done.triggers
            if not done.complete:
                await asyncio.sleep(0)
        if names or (self.reconciler.listed and not self.ready.is_set()):
            self._finished(started_s, len(names), written, triggers)
        elif self.reconciler.listed:
            # What was queued turned out to change nothing here, as a relist usually does.
            self.health.synced(self._clock())
        return names

    def _finished(
        self, began_s: float, services: int, written: int, triggers: list[reconcile.Trigger]
    ) -> None:
        took_s = self._clock() - began_s
        now_s = self._wall_clock()
        # By the wall's clock as it is now: at the start it may have been years behind, or ahead.
        started_s = now_s - (self._clock() - self._started_s)
        ages = [
            # Its clock is another machine's.
            (trigger.family, max(0.0, now_s - trigger.time_s))
            for trigger in triggers
            if trigger.time_s >= started_s
        ]
        self._telemetry.synced(took_s, now_s, ages)
        # Also where a table is full: a restart would not make it larger, and the others are served.
        self.health.synced(self._clock())
        self._shortfalls.look(self.reconciler, self._clock())
        level = logging.INFO if not self.ready.is_set() else logging.DEBUG
        if services or written:
            _log.log(level, "reconciled services=%d writes=%d took=%.1fms", services, written, took_s * 1e3)
        if not self.ready.is_set():
            # NodePorts are part of the first full state, and the Node may have come in with this pass.
            self._write_node()
            if self._node.written:
                self.complete.set()
            self._be_ready()

    def devices_served(self) -> None:
        """Take note that packets are served too, or can not be: until then nothing is ready."""
        self.awaits_devices = False
        self._be_ready()

    def stays_full(self, problem: str) -> None:
        """Take note that tables can not be made larger, and why: the others are served. Empty: they can."""
        if problem and problem != self.growth_problem:
            _log.error("%s", problem)
        self.growth_problem = problem
        self._be_ready()

    def _be_ready(self) -> None:
        refused = self.awaits_room and not self.growth_problem and self.reconciler.starved
        if self.complete.is_set() and not self.awaits_devices and not refused:
            self.ready.set()

    def _apply(self, writes: typing.Sequence[tables.Write]) -> None:
        if self._settings.log_level >= _LOG_WRITES:
            for write in writes:
                _log.debug("%s %s %s", type(write).__name__.lower(), write.table, write.key.hex())
        self._kernel.apply(writes)
        self._wrote(writes)

    def _write_node(self) -> None:
        self._node.write(self.reconciler.state.node, settled=self.reconciler.listed)

    async def _wait(self) -> None:
        """Sleep until an event arrives, or until something falls due."""
        passed_s = self._clock()
        quarantined_s = self.reconciler.ledger.next_due_s
        if not self.reconciler.starved:
            self._starved_due_s = None
        elif self._starved_due_s is None:
            self._starved_due_s = passed_s + _STARVED_RETRY_S
        # Drift is looked for when nothing is in quarantine: a restored ledger does not know of that.
        rest_s = self._drift_due_s if quarantined_s is None else quarantined_s
        ramps_s = self.reconciler.ramps.next_due_s
        others_s = (self._starved_due_s, self._node_due_s, self._node.due_s, ramps_s)
        due_s = min([rest_s, *(one for one in others_s if one is not None)])
        # Not wait_for: it loses a cancellation that comes together with an event.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, due_s - passed_s)):
                await self._wake.wait()
        self._wake.clear()
        self._look_again()
        if self.ready.is_set():
            # SYNC-2: so long between the end of one pass and the start of the next.
            await asyncio.sleep(max(0.0, passed_s + self._settings.min_sync_period_s - self._clock()))

    def _look_again(self) -> None:
        """Now and then plan again what found no room, and everything against what the kernel really holds."""
        now_s = self._clock()
        if self._starved_due_s is not None and now_s >= self._starved_due_s:
            self._starved_due_s = None
            self.reconciler.retry_starved()
        if now_s >= self._drift_due_s and self.reconciler.ledger.next_due_s is None:
            self._drift_due_s = now_s + _DRIFT_S
            self._astray = True

    def _restored(self) -> ledger.Ledger:
        known = restoring.restore(self._capacity, self._kernel.dump(), self._clock())
        self._kernel.set_column(tables.Table.NO_FRONTENDS, "none", known.absence.begin())
        return known

    # --- what others ask ---

    @property
    def rejected(self) -> dict[rejections.Key, str]:
        """The objects that can not be understood as they are now, and why."""
        return self._rejections.reasons

    @property
    def reasons(self) -> list[str]:
        """What is not as it should be, one line each."""
        reasons = [*self._shortfalls.reasons(self.reconciler), *self._node.reasons]
        problems = (
            self.growth_problem,
            self.handover_problem,
            self.return_notice,
            self.migration_problem,
            self.probe_problem(),
            *self.source_problems(),
        )
        reasons += [one for one in problems if one]
        reasons += self.datapath_problems
        reasons += self._rejections.lines
        if self.reconciler.awaits_node:
            reasons.append(self._node_unread)
        if not self.ready.is_set():
            reasons.append("the first full state is not in the kernel yet")
        return reasons

    @property
    def datapath_problems(self) -> list[str]:
        """What keeps programs from where they belong, one line each."""
        return [*([self.datapath_problem] if self.datapath_problem else []), *self.device_problems]

    @property
    def unserved(self) -> list[str]:
        """Why lbproxy does not serve all that kube-proxy's rules would, one line each."""
        off = "the packet path is off (--packet-path=false): packets from elsewhere are not served"
        found = [] if self._settings.packet_path else [off]
        found += [*self.devices_unserved, *self._shortfalls.unserved(self.reconciler), *self._node.unserved]
        return found + [one for one in (self.datapath_problem, self.handover_problem) if one]

    @property
    def node_facts(self) -> node_rows.NodeFacts | None:
        """What the kernel was told of this node; None where it was not yet."""
        return self._node.facts

    @property
    def node_problem(self) -> str:
        """Why load balancers may not use this node (HZ-2); manifests need not have a Node."""
        state, name = self.reconciler.state, self._settings.node_name
        if state.node is None:
            if self._settings.manifests is not None:
                return ""
            return node_watch.no_such_node(name) if state.without_node else self._node_unread
        if state.node.eligible:
            return ""
        why = "being deleted" if state.node.deleting else "marked for removal by the autoscaler"
        return f"Node {name} is {why}"

    @property
    def _node_unread(self) -> str:
        return f"Node {self._settings.node_name} has not been read yet"

    @property
    def algorithm(self) -> model.Algorithm:
        """How backends are chosen where a Service does not say."""
        return self._settings.algorithm
