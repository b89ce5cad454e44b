"""One pass after another: what has changed, planned and turned into writes.

An event only folds into the state and names the services it concerns; each pass
plans those as a whole. So a hundred events for one service cost one plan, and one
event never costs more than its own service.
"""

import itertools
import typing

from lbproxy.core import (
    addresses,
    events,
    health,
    ledger,
    model,
    node_rows,
    plan,
    pools,
    ramp,
    state,
    tables,
    topology,
)

# Nothing else runs meanwhile: with four endpoints each, planning and writing them takes 10 to 14 ms.
_PASS_SERVICES: typing.Final = 200


class Trigger(typing.NamedTuple):
    """A slice that changed something, and the Unix time of the change that caused it (NPL-1)."""

    family: model.Family
    time_s: float


class Pass(typing.NamedTuple):
    """What one pass wants written. `complete` says that nothing is left to plan."""

    writes: list[tables.Write]
    names: list[model.ServiceName]  # of the services that were planned
    triggers: list[Trigger]
    complete: bool


class Reconciler:
    """The cluster's state, what the kernel has of it, and what is still to be done."""

    def __init__(
        self,
        node_name: str,
        defaults: plan.Defaults,
        known: ledger.Ledger,
        identity: node_rows.Identity = node_rows.FROM_NODE,
    ) -> None:
        self.state = state.ClusterState(node_name)
        self.ledger = known
        # Service ports that a full table kept from being served as planned.
        self.starved: dict[model.PortKey, pools.Exhausted] = {}
        self.health = health.HealthBook()
        # Service ports with a set whose every backend is unhealthy, and the BackendSet bits of these.
        self.spared: dict[model.PortKey, int] = {}
        self.ramps = ramp.Ramps()
        self._defaults = defaults
        self._identity = identity
        self._node_listed = False
        self._dirty: dict[model.ServiceName, None] = {}  # a set that keeps its order
        self._triggers: dict[model.ServiceName, list[Trigger]] = {}
        self._everything = True
        self._whole = False  # everything is being planned, pass by pass

    @property
    def awaits_node(self) -> bool:
        """Whether only the Node is missing of what has to be known before the first pass (NODE-5).

        Without it every zone would be another's, and a restart change what is served.
        """
        return self.state.synced and not self._node_listed

    @property
    def listed(self) -> bool:
        """Whether the first complete lists have arrived (SYNC-1), or the Node's is not waited for."""
        return self.state.synced and self._node_listed

    @property
    def pending(self) -> bool:
        """Whether a pass would have something to do."""
        return self.listed and (self._everything or bool(self._dirty))

    def go_on_without_node(self) -> None:
        """Wait no longer for the Node to be listed."""
        self._node_listed = True

    def take(self, event: events.Event) -> bool:
        """Fold an event in; returns whether it changed what is to be served."""
        touched = self.state.apply(event)
        self._dirty.update(dict.fromkeys(touched))
        match event:
            case events.Upsert(events.Kind.ENDPOINT_SLICE, _, model.EndpointSlice() as slice_):
                if touched and slice_.trigger_time_s:
                    trigger = Trigger(slice_.family, slice_.trigger_time_s)
                    self._triggers.setdefault(slice_.service, []).append(trigger)
            case events.Synced(events.Kind.NODE):
                self._node_listed = True
            case events.Delete(events.Kind.ENDPOINT_SLICE, _):
                # Nobody waits for a deletion, nor any longer for what it undoes (NPL-3).
                for name in touched:
                    self._triggers.pop(name, None)
        return bool(touched)

    def health_changed(self, name: model.ServiceName) -> None:
        """Plan a service again: something that counts is known of its backends' health."""
        if self.state.service(name) is not None:
            self._dirty[name] = None

    def start_over(self, known: ledger.Ledger) -> None:
        """Go on from another ledger, after a write has failed: everything is planned again."""
        self.ledger = known
        self._everything = True

    def forget_triggers(self) -> None:
        """Measure nothing of what waits: a pass has failed, and its changes come late for that (NPL-4)."""
        self._triggers.clear()

    def retry_starved(self) -> None:
        """Plan again what a full table refused."""
        self._dirty.update(dict.fromkeys(key.service for key in self.starved))

    def step_ramps(self, now_s: float) -> None:
        """Plan again what is starting slowly and due for its next step."""
        self._dirty.update(dict.fromkeys(self.ramps.due(now_s)))

    def next_pass(self, now_s: float) -> Pass:
        """Plan what has changed, up to a bound; nothing before the first complete lists."""
        if not self.listed:
            return Pass([], [], [], complete=True)
        if self._everything:
            self._everything, self._whole = False, True
            gone = (name for name in self.ledger.services() if self.state.service(name) is None)
            known = (service.name for service in self.state.services())
            self._dirty.update(dict.fromkeys(itertools.chain(gone, known)))
        names = list(itertools.islice(self._dirty, _PASS_SERVICES))
        for name in names:
            del self._dirty[name]
        if not self._dirty:
            # Else its memory would remain as large as it ever was.
            self._dirty.clear()
        node_ips = addresses.primary_addresses(self._identity.addresses(self.state.node))
        defaults = self._defaults._replace(node_ips=node_ips)
        wanted = {name: self._ramped(name, now_s, defaults) for name in names}
        self._look_at_health(wanted)
        change = self.ledger.change(wanted, now_s)
        chosen = set(names)
        for key in [key for key in self.starved if key.service in chosen]:
            del self.starved[key]
        self.starved.update(change.refused)
        complete = not self._dirty
        if complete and self._whole:
            self._whole = False
            self.ledger.compact()
        triggers: list[Trigger] = []
        if complete:
            triggers = list(itertools.chain.from_iterable(self._triggers.values()))
            self._triggers.clear()
        return Pass(change.writes, names, triggers, complete)

    def _ramped(self, name: model.ServiceName, now_s: float, defaults: plan.Defaults) -> list[plan.PortPlan]:
        planned = plan.plan(self.state, name, defaults, self.health)
        service = self.state.service(name)
        return self.ramps.apply(name, service.slow_start_s if service else 0.0, planned, now_s)

    def _look_at_health(
        self, planned: typing.Mapping[model.ServiceName, typing.Sequence[plan.PortPlan]]
    ) -> None:
        """Note which sets are used although all of them are ill, and forget the backends that are gone."""
        for key in [key for key in self.spared if key.service in planned]:
            del self.spared[key]
        if not self.health:
            return
        for name, ports in planned.items():
            if name not in self.health:
                continue
            self.spared.update((port.key, port.spared) for port in ports if port.spared)
            known = {
                port.key: [topology.Place(one.address, one.port) for one in port.backends] for port in ports
            }
            self.health.keep(name, known)
