"""What a scrape finds out by itself: the state of the agent, and the counters in the kernel's maps.

Done in two steps, since many thousand series take longer than the event loop
may stand still: `look` copies references on the loop, `collect` does the work in
a thread, on frozen values and on rows that are mapped into memory.
"""

import array
import collections
import heapq
import time
import typing

from prometheus_client import metrics_core, samples

from lbproxy import abi
from lbproxy.core import (
    addresses,
    events,
    flows,
    installed,
    listing,
    loads,
    model,
    outcomes,
    reconcile,
    tables,
)
from lbproxy.kube import reflector
from lbproxy.metrics import table

if typing.TYPE_CHECKING:
    from lbproxy.kube import manifests  # with its YAML reader only where manifests are read

COUNT_INTERVAL_S: typing.Final = 15.0

_EVENTS: typing.Final = {
    name.removeprefix("LB_COUNTER_").lower(): number
    for name, number in abi.CONSTANTS.items()
    if name.startswith("LB_COUNTER_")
}
_STATE_AT: typing.Final = abi.LAYOUTS["backend"].offset("state") - tables.BACKEND_SIZE
_SETS_AT: typing.Final = abi.LAYOUTS["backend"].offset("sets") - tables.BACKEND_SIZE
_HEALTH_AT: typing.Final = abi.LAYOUTS["backend"].offset("health") - tables.BACKEND_SIZE
_EJECTED: typing.Final = int(tables.Health.EJECTED)
_POLICIES_AT: typing.Final = abi.LAYOUTS["service_meta"].offset("policies") - abi.LAYOUTS["service_meta"].size
_LOCAL: typing.Final = int(tables.BackendSet.LOCAL)
_CLUSTER: typing.Final = int(tables.BackendSet.CLUSTER)
_PASSING: typing.Final = (tables.BackendState.FREE, tables.BackendState.DRAINING)

Labels = tuple[str, ...]
Value = tuple[Labels, float]
_T = typing.TypeVar("_T")


class Kernel(typing.Protocol):
    """What a scrape reads of the kernel's tables; `BpfMaps` is one."""

    def rows(self, table: str) -> typing.Iterator[tuple[bytes, bytes]]:
        """Every row that is in use."""
        ...

    def row(self, table: str, key: bytes) -> bytes | None:
        """One row, or None."""
        ...

    def rows_of(self, table: str) -> int:
        """How many rows a map can hold."""
        ...

    def bytes_of(self, table: str) -> int:
        """How much kernel memory a map occupies."""
        ...


class Agent(typing.Protocol):
    """What a scrape asks of the controller."""

    @property
    def reconciler(self) -> reconcile.Reconciler:
        """What is wanted, and what the kernel has of it."""
        ...

    @property
    def rejected(self) -> typing.Mapping[tuple[events.Kind, events.ObjectName], str]:
        """The objects that can not be understood as they are now, and why."""
        ...

    @property
    def datapath_problems(self) -> typing.Sequence[str]:
        """What keeps programs from where they belong."""
        ...


class FlowTable(typing.Protocol):
    """Who looks after the flow table."""

    @property
    def counts(self) -> flows.Counts:
        """What the last look found."""
        ...


class Prober(typing.Protocol):
    """Who probes backends."""

    @property
    def targets(self) -> int:
        """How many addresses and ports are probed."""
        ...

    @property
    def late_s(self) -> float:
        """How long the probe that waits longest has been due."""
        ...

    def down(self) -> typing.Mapping[model.PortKey, tuple[int, int]]:
        """Of each probed service port, how many backends are down, and how many are probed."""
        ...


class Probes(typing.NamedTuple):
    """Probes at one moment."""

    targets: int
    late_s: float
    down: typing.Mapping[model.PortKey, tuple[int, int]]


Source = typing.Union[reflector.Reflector, "manifests.Manifests"]


class Seen(typing.NamedTuple):
    """The agent at one moment. `used` are the rows of those maps whose use the ledger knows."""

    installed: dict[model.PortKey, installed.Installed]
    services: int
    frontends: int
    used: dict[str, int]
    starved: int
    spared: int
    problems: int  # of the datapath
    counted: typing.Sequence[model.PortKey]  # whose backends' open connections are counted
    rejected: typing.Mapping[events.Kind, int]


def _seen(agent: Agent) -> Seen:
    ledger = agent.reconciler.ledger
    backends, services = ledger.backend_ids.used, ledger.service_ids.used
    used = {
        "frontends": len(ledger.claims),
        "slots": ledger.extents.used,
        "backends": backends,
        "backend_stats": backends,
        "backend_load": backends,
        "load_corrections": backends,
        "services": services,
        "service_stats": services,
        "localities": ledger.locality_ids.used,
        "settings": 1,
        "source_ranges": ledger.range_rows,
        "earlier_slots": ledger.earlier_rows,
        "counters": len(_EVENTS),
    }
    return Seen(
        ledger.installed.copy(),
        len(ledger.services()),
        ledger.claims.places,
        used,
        len(agent.reconciler.starved),
        len(agent.reconciler.spared),
        len(agent.datapath_problems),
        list(ledger.counted),
        collections.Counter(kind for kind, _ in agent.rejected),
    )


class Collector:
    """Yields the metrics whose values lie elsewhere: `look` comes before each scrape, `forget` after it."""

    def __init__(
        self,
        agent: Agent,
        kernel: Kernel,
        sources: typing.Sequence[Source],
        max_series: int,
        flow_table: FlowTable,
        prober: Prober,
    ) -> None:
        self._agent = agent
        self._flow_table = flow_table
        self._prober = prober
        self._probes = Probes(0, 0.0, {})
        self._kernel = kernel
        self._sources = sources
        self._max_series = max_series
        self._omitted = 0  # series of this scrape
        self._counted: dict[str, int] = {}
        self._counted_s = -COUNT_INTERVAL_S
        self._seen: Seen | None = None

    def look(self) -> None:
        """Take note of the agent's state; on the event loop, where nothing changes it meanwhile."""
        self._seen = _seen(self._agent)
        self._probes = Probes(self._prober.targets, self._prober.late_s, self._prober.down())

    def forget(self) -> None:
        """Let go of that: else what has changed since would stay in memory until the next scrape."""
        self._seen = None

    @property
    def _now(self) -> Seen:
        if self._seen is None:
            raise RuntimeError("a scrape begins with a look")
        return self._seen

    def describe(self) -> typing.Iterable[metrics_core.Metric]:
        """Nothing: registering does not have to collect everything once."""
        return ()

    def collect(self) -> typing.Iterator[metrics_core.Metric]:
        """Every metric, in the order of the table; bulky ones make their samples as they are read."""
        self._omitted = 0
        yield from self._balanced()
        yield from self._probed()
        yield from self._connections()
        yield self._flows()
        yield _family(table.HELD_FLOWS, [((), self._flow_table.counts.held)])
        yield from self._maps()
        yield from self._watches()
        rejected = self._now.rejected
        yield _family(table.REJECTED_OBJECTS, [((kind,), rejected.get(kind, 0)) for kind in events.Kind])
        yield _one(table.DATAPATH_PROBLEMS, self._now.problems)

    def _balanced(self) -> typing.Iterator[metrics_core.Metric]:
        now = self._now
        ports = collections.Counter(key.family for key in now.installed)
        yield _one(table.SERVICES, now.services)
        yield _family(table.SERVICE_PORTS, [((family_label(f),), ports[f]) for f in model.Family])
        yield _one(table.FRONTENDS, now.frontends)
        states = b"".join(_column(port, _STATE_AT) for port in now.installed.values())
        counts = {state.name.lower(): states.count(state) for state in tables.BackendState if state}
        counts["draining"] += now.used["backends"] - len(states)
        ill = {key: rows for key, port in now.installed.items() if (rows := port.unhealthy)}
        active = tables.BackendState.ACTIVE
        counts[listing.UNHEALTHY] = sum(row[_STATE_AT] == active for rows in ill.values() for row in rows)
        counts["active"] -= counts[listing.UNHEALTHY]
        yield _family(table.BACKENDS, [((state,), count) for state, count in counts.items()])
        yield _one(table.STARVED, now.starved)
        yield _one(table.ALL_UNHEALTHY, now.spared)
        out = {key: sum(row[_HEALTH_AT] & _EJECTED != 0 for row in rows) for key, rows in ill.items()}
        ejected: list[Value] = [
            ((*_names(key), family_label(key.family)), count) for key, count in out.items() if count
        ]
        yield _family(table.EJECTED, self._shown(ejected))
        without = no_local_endpoints(now.installed)
        yield _family(
            table.NO_LOCAL_ENDPOINTS,
            [((p, family_label(f)), without[p, f]) for p in ("internal", "external") for f in model.Family],
        )

    def _probed(self) -> typing.Iterator[metrics_core.Metric]:
        yield _one(table.PROBE_TARGETS, self._probes.targets)
        yield _one(table.PROBE_LATE, self._probes.late_s)
        ports = self._probes.down.items()
        if len(ports) > self._max_series:
            self._omitted += len(ports) - self._max_series
            ports = dict(heapq.nlargest(self._max_series, ports, key=lambda port: port[1])).items()
        yield _family(
            table.PROBE_DOWN, [((*_names(key), family_label(key.family)), down) for key, (down, _) in ports]
        )

    def _connections(self) -> typing.Iterator[metrics_core.Metric]:
        keys = {port.id: key for key, port in self._now.installed.items()}
        stats = self._rows_of_numbers(tables.Table.SERVICE_STATS)
        ids, connections, refused = stats[0::3], stats[1::3], stats[2::3]
        yield _family(table.SERVICE_CONNECTIONS, _by_service(zip(ids, connections, strict=True), keys))
        yield _family(table.SERVICE_REFUSED, _by_service(zip(ids, refused, strict=True), keys))

        stats = self._rows_of_numbers(tables.Table.BACKEND_STATS)
        ids, connections = stats[0::2], stats[1::2]
        chosen: typing.Collection[int] = range(len(ids))
        if len(ids) > self._max_series:
            self._omitted += len(ids) - self._max_series
            chosen = heapq.nlargest(self._max_series, chosen, key=connections.__getitem__)
        counts = ((ids[place], connections[place]) for place in chosen)
        yield _family(table.BACKEND_CONNECTIONS, self._by_backend(counts, keys))
        yield _family(table.BACKEND_OPEN, self._by_backend(self._open(), keys))
        yield from self._fared(keys)
        yield _one(table.SERIES_OMITTED, self._omitted)
        rows = {name: self._kernel.row("counters", tables.row_key(n)) for name, n in _EVENTS.items()}
        yield _family(
            table.DATAPATH_EVENTS,
            [((name,), int.from_bytes(row or b"", tables.BYTE_ORDER)) for name, row in rows.items()],
        )

    def _open(self) -> list[tuple[int, int]]:
        """What counted backends have open, those with the most."""
        counted = self._now.counted
        if not counted:
            return []
        rows = dict(self._kernel.rows(tables.Table.BACKEND_LOAD))
        corrections = dict(self._kernel.rows(tables.Table.LOAD_CORRECTIONS))
        found = []
        for port in map(self._now.installed.get, counted):
            for number in port.backends if port else ():
                key = tables.row_key(number)
                found.append((number, max(0, loads.load(rows.get(key), corrections.get(key)).open)))
        return self._shown(sorted(found, key=lambda each: each[1], reverse=True))

    def _shown(self, found: list[_T]) -> list[_T]:
        """The first ones, as many as there may be series; the others are counted."""
        self._omitted += max(0, len(found) - self._max_series)
        return found[: self._max_series]

    def _fared(self, keys: typing.Mapping[int, model.PortKey]) -> typing.Iterator[metrics_core.Metric]:
        """How connections to backends fare: of those with the most connections where there are too many."""
        found = outcomes.every(self._kernel)
        chosen = list(found)
        if len(found) > self._max_series:
            chosen = heapq.nlargest(
                self._max_series, chosen, key=lambda number: found[number].everyone.attempts
            )
            left_out = found.keys() - set(chosen)
            self._omitted += sum(_series_of(one) for number in left_out for _, one in _told_of(found[number]))
        labels = {int(number): names for names, number in self._by_backend(((n, n) for n in chosen), keys)}
        fared = [
            ((*labels[number], clients), one)
            for number in chosen
            if number in labels
            for clients, one in _told_of(found[number])
        ]
        yield _family(table.BACKEND_HANDSHAKES, [(names, one.established) for names, one in fared])
        seconds = [(names, one.handshake_us / 1e6) for names, one in fared]
        yield _family(table.BACKEND_HANDSHAKE_SECONDS, seconds)
        failures = [
            ((*names, reason), count)
            for names, one in fared
            for reason in outcomes.REASONS
            if (count := getattr(one, reason))
        ]
        yield _family(table.BACKEND_FAILURES, failures)
        yield _family(table.BACKEND_RTT, [(names, one.srtt_us / 1e6) for names, one in fared if one.srtt_us])

    def _rows_of_numbers(self, name: tables.Table) -> "array.array[int]":
        """Row number and 64-bit fields of each row in use, one after another: there may be 100,000 rows."""
        numbers = array.array("Q")
        for row_key, row in self._kernel.rows(name):
            numbers.append(int.from_bytes(row_key, tables.BYTE_ORDER))
            numbers.frombytes(row)
        return numbers

    def _by_backend(
        self, counts: typing.Iterable[tuple[int, int]], keys: typing.Mapping[int, model.PortKey]
    ) -> typing.Iterator[Value]:
        """Counts by names, read as the lines are written."""
        for number, count in counts:
            row = tables.backend(
                self._kernel.row(tables.Table.BACKENDS, tables.row_key(number)) or tables.NO_BACKEND
            )
            key = keys.get(row.service)
            # A draining row is about to go, and the same backend may be back already in another row.
            if row.state in _PASSING or key is None:
                continue
            host, port = addresses.text(row.addr), int.from_bytes(row.port, "big")
            yield (*_names(key), f"[{host}]:{port}" if ":" in host else f"{host}:{port}"), count

    def _flows(self) -> metrics_core.Metric:
        counted = self._flow_table.counts.flows
        kinds = [flows.Flows(proto, assured) for proto in model.Protocol for assured in (True, False)]
        named = [
            ((model.Protocol(kind.proto).name, str(kind.assured).lower()), counted[kind]) for kind in kinds
        ]
        return _family(table.FLOWS, named)

    def _maps(self) -> typing.Iterator[metrics_core.Metric]:
        used = {**self._now.used, **self._count(), "flows": self._flow_table.counts.rows}
        yield _family(table.MAP_ROWS, [((name,), used[name]) for name in abi.MAPS])
        yield _family(table.MAP_CAPACITY, [((name,), self._kernel.rows_of(name)) for name in abi.MAPS])
        yield _family(table.MAP_BYTES, [((name,), self._kernel.bytes_of(name)) for name in abi.MAPS])

    def _count(self) -> dict[str, int]:
        """Rows of the maps that programs fill, counted now and then."""
        if time.monotonic() - self._counted_s >= COUNT_INTERVAL_S:
            names = abi.MAPS.keys() - self._now.used.keys() - {"flows"}
            self._counted = {name: sum(1 for _ in self._kernel.rows(name)) for name in names}
            self._counted_s = time.monotonic()
        return self._counted

    def _watches(self) -> typing.Iterator[metrics_core.Metric]:
        connected: list[Value] = []
        last: list[Value] = []
        relists: list[Value] = []
        failures: list[Value] = []
        for source in self._sources:
            if isinstance(source, reflector.Reflector):
                kind = (str(source.watched.kind),)
                connected.append((kind, source.state.connected))
                last.append((kind, source.state.last_heard_s))
                relists.append((kind, max(0, source.state.lists - 1)))
                failures.append((kind, source.state.failures))
            else:
                kind = (str(events.Kind.MANIFEST),)
                connected.append((kind, source.state.synced and not source.state.last_error))
                last.append((kind, source.state.last_change_s))
        yield _family(table.WATCH_CONNECTED, connected)
        yield _family(table.WATCH_LAST_EVENT, last)
        yield _family(table.WATCH_RELISTS, relists)
        yield _family(table.WATCH_FAILURES, failures)


def _told_of(fared: outcomes.Fared) -> list[tuple[str, outcomes.Outcomes]]:
    """How a backend fared with each kind of clients that it has had, and what these are called."""
    return [(clients, one) for clients, one in zip(fared._fields, fared, strict=True) if any(one)]


def _series_of(fared: outcomes.Outcomes) -> int:
    """How many series one kind of clients of a backend has: two always, others where there is something."""
    return 2 + bool(fared.srtt_us) + sum(bool(getattr(fared, reason)) for reason in outcomes.REASONS)


def family_label(family: model.Family) -> str:
    """The name of a family as kube-proxy's labels have it."""
    return f"IPv{family.value}"


def no_local_endpoints(
    ports: typing.Mapping[model.PortKey, installed.Installed],
) -> typing.Counter[tuple[str, model.Family]]:
    """Count service ports by policy and family whose Local policy finds endpoints, but none here (MET-4)."""
    found: typing.Counter[tuple[str, model.Family]] = collections.Counter()
    for key, port in ports.items():
        policies = port.traits[_POLICIES_AT]
        if not policies:
            continue
        sets = _column(port, _SETS_AT)
        if any(bits & _LOCAL for bits in sets) or not any(bits & _CLUSTER for bits in sets):
            continue
        if policies & tables.Policy.INTERNAL_LOCAL:
            found["internal", key.family] += 1
        if policies & tables.Policy.EXTERNAL_LOCAL:
            found["external", key.family] += 1
    return found


def _column(port: installed.Installed, at: int) -> bytes:
    """One byte of each backend row, counted from the row's end: no row has to be unpacked for it."""
    packed, count = port.packed_backends, port.backend_count
    if not count:
        return b""
    size = len(packed) // count
    return packed[size + at :: size]


def _by_service(
    counts: typing.Iterable[tuple[int, int]], keys: typing.Mapping[int, model.PortKey]
) -> typing.Iterator[Value]:
    for number, count in counts:
        key = keys.get(number)
        if count and key is not None:
            yield (*_names(key), family_label(key.family)), count


def _names(key: model.PortKey) -> tuple[str, str, str, str]:
    return key.service.namespace, key.service.name, key.port_name, key.protocol.name


def _one(definition: table.Definition, value: float) -> metrics_core.Metric:
    return _family(definition, [((), value)])


def _family(definition: table.Definition, values: typing.Iterable[Value]) -> metrics_core.Metric:
    name, labels = definition.name, definition.labels
    metric = metrics_core.Metric(name.removesuffix("_total"), definition.help, definition.type)
    if definition.type is not table.Type.COUNTER:
        metric.name = name
    made = (samples.Sample(name, dict(zip(labels, of, strict=True)), value) for of, value in values)
    # Read once, line by line: as a list the samples of 10,000 series would take several megabytes.
    metric.samples = typing.cast(list[samples.Sample], made)
    return metric
