"""The agent's metrics: what others report to it, and what a scrape finds (`scrape`).

Names, labels and texts come from `table` alone.
"""

import asyncio
import typing

import prometheus_client

import lbproxy
from lbproxy.core import events, model, probe, probing
from lbproxy.metrics import scrape, table, text_format

_FAMILIES: typing.Final = tuple(map(scrape.family_label, model.Family))


class Metrics:
    """A registry of its own. One pass writes both families, so both report it, as both do in kube-proxy."""

    def __init__(self) -> None:
        # Without this, each counter would be followed by a series with the time it was made.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = prometheus_client.CollectorRegistry(auto_describe=False)
        self._collector: scrape.Collector | None = None
        self._scraping = asyncio.Lock()
        self._full_pass = True
        prometheus_client.ProcessCollector(registry=self.registry)
        prometheus_client.PlatformCollector(registry=self.registry)

        self._duration = self._histogram(table.SYNC_DURATION)
        self._full_duration = self._histogram(table.SYNC_FULL_DURATION)
        self._partial_duration = self._histogram(table.SYNC_PARTIAL_DURATION)
        self._programming = self._histogram(table.NETWORK_PROGRAMMING)
        self._last = self._gauge(table.SYNC_LAST)
        self._last_queued = self._gauge(table.SYNC_LAST_QUEUED)
        self._changes = {
            events.Kind.SERVICE: self._counter(table.SERVICE_CHANGES),
            events.Kind.ENDPOINT_SLICE: self._counter(table.ENDPOINT_CHANGES),
        }
        self._pending = {
            events.Kind.SERVICE: self._gauge(table.SERVICE_CHANGES_PENDING),
            events.Kind.ENDPOINT_SLICE: self._gauge(table.ENDPOINT_CHANGES_PENDING),
        }
        self._conntrack_duration = self._histogram(table.CONNTRACK_DURATION)
        self._conntrack_deleted = self._counter(table.CONNTRACK_DELETED)
        self._healthz = self._counter(table.HEALTHZ)
        self._livez = self._counter(table.LIVEZ)
        # An alert asks for its increase, and a series that begins with some 503s has none.
        self._livez.labels("503")
        self._requests = self._counter(table.REST_REQUESTS)
        self._request_duration = self._histogram(table.REST_DURATION)
        self._rejected = self._counter(table.REJECTED)
        self._warnings = self._counter(table.WARNINGS)
        self._failures = self._counter(table.SYNC_FAILURES)
        self._put_back = self._counter(table.PUT_BACK)
        self._probes = self._counter(table.PROBES)
        self._ejections = self._counter(table.EJECTIONS)
        self._probe_duration = self._histogram(table.PROBE_DURATION)
        self._sli_registry = prometheus_client.CollectorRegistry(auto_describe=False)
        self._healthcheck = prometheus_client.Gauge(
            "kubernetes_healthcheck",
            "Whether changes reach the kernel in time",
            ("name", "type"),
            registry=self._sli_registry,
        )
        self._healthchecks = prometheus_client.Counter(
            "kubernetes_healthchecks_total",
            "Answers of /healthz and /livez",
            ("name", "type", "status"),
            registry=self._sli_registry,
        )
        self._growths = self._counter(table.MAP_GROWTHS)
        self._build = self._gauge(table.BUILD_INFO)
        self._start = self._gauge(table.DATAPATH_START)

    def attach(
        self,
        *,
        controller: scrape.Agent,
        kernel: scrape.Kernel,
        sources: typing.Sequence[scrape.Source],
        flow_table: scrape.FlowTable,
        prober: scrape.Prober,
        max_series: int,
        fingerprint: str,
        start: str,
    ) -> None:
        """Let scrapes see the agent and the kernel. Once, before the first scrape that is to show them.

        `fingerprint` is that of the programs, `start` the `how` of `Datapath.ensure`.
        """
        self._collector = scrape.Collector(controller, kernel, sources, max_series, flow_table, prober)
        self.registry.register(self._collector)
        self._build.labels(lbproxy.__version__, fingerprint).set(1)
        self._start.labels(start).set(1)

    def grew(self, maps: typing.Iterable[str], fingerprint: str) -> None:
        """Count maps that were made larger; the programs are others since."""
        for name in maps:
            self._growths.labels(name).inc()
        self._build.clear()
        self._build.labels(lbproxy.__version__, fingerprint).set(1)

    # --- what the controller reports ---

    def changed(self, kind: events.Kind, count: int = 1) -> None:
        """Count so many events that changed what is to be served."""
        if kind in self._changes:
            self._changes[kind].inc(count)
            self._pending[kind].inc(count)

    def queued(self, wall_s: float) -> None:
        """Note that a pass is asked for; Unix time."""
        for family in _FAMILIES:
            self._last_queued.labels(family).set(wall_s)

    def synced(self, took_s: float, wall_s: float, ages: typing.Iterable[tuple[model.Family, float]]) -> None:
        """Note that passes succeeded.

        `took_s` and `ages` are in seconds, the latter since each change that caused an event (NPL-2).
        """
        by_extent = self._full_duration if self._full_pass else self._partial_duration
        self._full_pass = False
        for family in _FAMILIES:
            self._duration.labels(family).observe(took_s)
            by_extent.labels(family).observe(took_s)
            self._last.labels(family).set(wall_s)
        for family_of_slice, age_s in ages:
            self._programming.labels(scrape.family_label(family_of_slice)).observe(age_s)
        for pending in self._pending.values():
            pending.set(0)

    def sync_failed(self) -> None:
        """Count passes that failed; the next one plans everything."""
        self._failures.inc()
        self._full_pass = True

    def rejected(self, kind: events.Kind) -> None:
        """Count an object that could not be understood."""
        self._rejected.labels(kind.value).inc()

    def warned(self, kind: events.Kind, warnings: int) -> None:
        """Count what in an object was not understood and is passed over."""
        self._warnings.labels(kind.value).inc(warnings)

    def closed_sockets(self, closed: typing.Mapping[model.Family, int], took_s: float) -> None:
        """Count stale UDP sockets that one search, of so many seconds, has closed."""
        for family in model.Family:
            label = scrape.family_label(family)
            self._conntrack_duration.labels(label).observe(took_s)
            self._conntrack_deleted.labels(label).inc(closed.get(family, 0))

    def put_back(self, programs: int) -> None:
        """Count programs that somebody had taken away."""
        self._put_back.inc(programs)

    def ejected(self) -> None:
        """Count a backend that is left out."""
        self._ejections.inc()

    # --- what the prober reports ---

    def probed(self, kind: probe.Kind, result: probing.Result, took_s: float) -> None:
        """Count a probe, and how many seconds it took."""
        if result.blameless:
            self._probes.labels(kind.value, "not-made").inc()
            return
        self._probes.labels(kind.value, "passed" if result.passed else "failed").inc()
        self._probe_duration.labels(kind.value).observe(took_s)

    # --- what the client of the API server reports ---

    def requested(self, method: str, code: str, host: str, took_s: float) -> None:
        """Count a request, and how long it took until its answer began."""
        self._requests.labels(code, method, host).inc()
        self._request_duration.labels(method, host).observe(took_s)

    # --- what the servers report and ask ---

    def answered_healthz(self, status: int) -> None:
        """Count an answer of /healthz."""
        self._healthz.labels(str(status)).inc()
        self._checked("healthz", status)

    def answered_livez(self, status: int) -> None:
        """Count an answer of /livez."""
        self._livez.labels(str(status)).inc()
        self._checked("livez", status)

    def slis(self, *, healthy: bool) -> bytearray:
        """What /metrics/slis shows: health now, and how often either path was asked and what it said."""
        for kind in ("healthz", "livez"):
            self._healthcheck.labels("proxy", kind).set(healthy)
        return text_format.render(self._sli_registry.collect())

    def _checked(self, kind: str, status: int) -> None:
        self._healthchecks.labels("proxy", kind, "success" if status < 400 else "error").inc()

    async def exposition(self) -> bytearray:
        """Everything in Prometheus's text format; made in a thread, one scrape at a time."""
        async with self._scraping:
            if self._collector is not None:
                self._collector.look()
            text = await asyncio.to_thread(lambda: text_format.render(self.registry.collect()))
            # Not where the scrape was given up: its thread may still be at it.
            if self._collector is not None:
                self._collector.forget()
            return text

    # --- from the table ---

    def _counter(self, definition: table.Definition) -> prometheus_client.Counter:
        return prometheus_client.Counter(
            definition.name, definition.help, definition.labels, registry=self.registry
        )

    def _gauge(self, definition: table.Definition) -> prometheus_client.Gauge:
        return prometheus_client.Gauge(
            definition.name, definition.help, definition.labels, registry=self.registry
        )

    def _histogram(self, definition: table.Definition) -> prometheus_client.Histogram:
        return prometheus_client.Histogram(
            definition.name,
            definition.help,
            definition.labels,
            registry=self.registry,
            buckets=definition.buckets,
        )
