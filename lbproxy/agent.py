"""`lbproxy run`: sets everything up, runs it as one group of tasks, and leaves the kernel serving.

Whatever ends this process, nothing is taken down: programs, links and maps are
pinned, and the next agent adopts them. `lbproxy cleanup` is what removes them.
"""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import signal
import time
import typing

from lbproxy import (
    absent_flows,
    beside,
    cgroup2,
    controller,
    ejecting,
    errors,
    flow_table,
    gate,
    growing,
    log_lines,
    memory,
    netns_addresses,
    node_watch,
    noting,
    open_connections,
    packet_path,
    stale_sockets,
)
from lbproxy.config import config
from lbproxy.core import events, migration, model, outliers, probing, restoring, tables
from lbproxy.kernel import bpffs, datapath, features, maps, node
from lbproxy.metrics import metrics
from lbproxy.migrate import handover, new_flows, orders
from lbproxy.probes import asking, prober, trust
from lbproxy.web import health_check_ports, servers

if typing.TYPE_CHECKING:
    # kubernetes_asyncio is not loaded for --manifests.
    from lbproxy.kube import client, reports

_log = logging.getLogger(__name__)

_HOOK_CHECK_S: typing.Final = 30.0
_CONFIG_CHECK_S: typing.Final = 1.0
_OOM_SCORE: typing.Final = pathlib.Path("/proc/self/oom_score_adj")
_STOP_SIGNALS: typing.Final = (signal.SIGTERM, signal.SIGINT)


class _Stop(Exception):  # noqa: N818 - how a task group is told to end
    """The agent is to end, with this exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def run(settings: config.Config) -> int:
    """Serve this node until told to stop; returns the exit status."""
    memory.spare()
    # First of all: a start that fails must leave nothing, not even a mount.
    trusted = _trust(settings.probe_ca_file)
    if settings.manifests is None:
        from lbproxy.kube import credentials  # noqa: PLC0415 - not loaded for --manifests

        credentials.check(str(settings.kubeconfig or ""), settings.master)
    with _alone(settings) as cgroup:
        if trusted.problem:
            _log.warning("--probe-ca-file: %s", trusted.problem)
        return asyncio.run(_serve(settings, cgroup, trusted))


def init_only(settings: config.Config) -> int:
    """Mount, load and attach what `run` needs, and leave it to an agent with fewer rights; returns 0.

    An agent that finds it only opens it: mounting a bpffs needs CAP_SYS_ADMIN, which it then does
    without. Until it fills the tables every socket is left alone.
    """
    with _alone(settings) as cgroup:
        path = datapath.Datapath(settings.bpffs)
        outcome = _set_up(path, settings, cgroup)
        if outcome.how == "created":
            with contextlib.closing(maps.BpfMaps(str(path.maps_dir))) as kernel:
                handover.HandOver(kernel).begin(sockets=True)
        if outcome.identity.refused:
            _log.warning("%s", packet_path.refusal(outcome.identity.refused))
    return 0


@contextlib.contextmanager
def _alone(settings: config.Config) -> typing.Iterator[pathlib.Path]:
    """Check what is needed and keep other agents off; yields the cgroup to attach to."""
    log_lines.to_stderr(settings)
    for line in (*settings.warnings, *settings.ignored):
        _log.warning("%s", line)
    features.check_capabilities()
    features.check()
    cgroup = bpffs.cgroup(settings.cgroup)
    bpffs.ensure(settings.bpffs)
    lock = bpffs.lock(settings.bpffs)
    try:
        # After all that can end the start: where it ends, one line says why.
        _set_oom_score(settings.oom_score_adj)
        yield cgroup
    finally:
        os.close(lock)


def _trust(ca_file: pathlib.Path | None) -> trust.Trust:
    try:
        return trust.Trust(ca_file)
    except OSError as error:
        raise errors.ConfigError(f"--probe-ca-file: {ca_file}: {trust.describe(error)}") from error


def _set_oom_score(score: int) -> None:
    """Say how soon the kernel may end this process for want of memory (CO-8)."""
    try:
        _OOM_SCORE.write_text(str(score))
    except OSError as error:
        _log.info("cannot set oom_score_adj to %d: %s", score, error.strerror)


def _set_up(path: datapath.Datapath, settings: config.Config, cgroup: pathlib.Path) -> datapath.Outcome:
    started_s = time.monotonic()
    outcome = path.ensure(cgroup, dataclasses.asdict(settings.map_rows))
    for note in outcome.notes:
        _log.warning("%s", note)
    if outcome.larger:
        # As they have grown, or a --map-rows was lowered: nothing that anybody has to see to.
        _log.info(
            "tables keep more rows than --map-rows asks for, as they are in use: %s; `lbproxy cleanup` gives "
            "them up, and interrupts service",
            ", ".join(outcome.larger),
        )
    _log.info(
        "datapath %s fingerprint=%s cgroup=%s took=%.0fms",
        outcome.how,
        outcome.identity.fingerprint,
        cgroup,
        (time.monotonic() - started_s) * 1e3,
    )
    return outcome


async def _serve(settings: config.Config, cgroup: pathlib.Path, trusted: trust.Trust) -> int:
    agent = _Agent(settings, cgroup, trusted)
    try:
        async with asyncio.TaskGroup() as tasks:
            await agent.start(tasks)
    except BaseExceptionGroup as group:
        # Whatever is neither a stop nor an expected failure is a bug: it shows as it is.
        if (stop := _first(group, _Stop)) is not None:
            return stop.status
        if (failure := _first(group, errors.LbproxyError)) is not None:
            raise failure from None
        raise
    return 0


_Kind = typing.TypeVar("_Kind", bound=BaseException)


def _first(group: BaseExceptionGroup[typing.Any], kind: type[_Kind]) -> _Kind | None:
    """The first failure of a kind; None where the group also holds another."""
    wanted, others = group.split(kind)
    found: BaseException | None = wanted if others is None else None
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return typing.cast(_Kind | None, found)


class _Agent:
    """The parts, and the tasks that join them."""

    def __init__(self, settings: config.Config, cgroup: pathlib.Path, trusted: trust.Trust) -> None:
        self._settings = settings
        self._datapath = datapath.Datapath(settings.bpffs)
        self._cgroup = cgroup2.Cgroup(cgroup, self._datapath.lost_cgroup)
        self._telemetry = metrics.Metrics()
        self._writing = gate.Gate()
        self._health_checks = health_check_ports.HealthChecks(settings, self._health_check_failed)
        self._node_watch = node_watch.NodeWatch(settings, both_families=node_watch.has_both_families())
        self._ejecting = ejecting.Ejecting(self._ejection_says)
        self._orders = orders.Orders(settings, self._carried_out)
        self._trusted = trusted
        self._prober = prober.Prober(
            settings.probe_concurrency,
            self._telemetry.probed,
            self._probes_say,
            functools.partial(asking.ask, trusted=trusted),
        )
        self._controller: controller.Controller | None = None
        self._backlog: list[typing.Sequence[events.Event]] = []
        self._reports: reports.Reports | None = None

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Start every task. The sources begin to list while the programs are being compiled."""
        loop = asyncio.get_running_loop()
        self._listen_for_signals(tasks, loop)
        started_s = time.monotonic()
        tasks.create_task(self._node_watch.run())
        sources = await self._sources(tasks)
        outcome = await asyncio.to_thread(_set_up, self._datapath, self._settings, self._cgroup.path)
        kernel = maps.BpfMaps(str(self._datapath.maps_dir))
        sockets = stale_sockets.StaleSockets(kernel, self._telemetry)
        spaces = netns_addresses.NetnsAddresses(kernel, writing=self._writing)
        absent = absent_flows.AbsentFlows(kernel)
        hand_over = handover.HandOver(
            kernel,
            writing=self._writing,
            changed=spaces.wanted,
            prepare=lambda: spaces.look(heard=False),
            absent=absent,
        )
        left = new_flows.leave_if_needed(hand_over, self._settings, self._datapath, outcome)
        packets = packet_path.PacketPath(
            self._settings,
            self._datapath,
            kernel,
            self._devices_report,
            outcome.identity.refused,
            self._writing,
            lambda: new_flows.look_again(hand_over, loop),
            self._telemetry.put_back,
        )

        def wrote(writes: typing.Sequence[tables.Write]) -> None:
            sockets.wrote(writes)
            spaces.wrote(writes)

        try:
            self._controller = control = controller.Controller(
                self._settings,
                kernel,
                kernel.capacity(),
                self._telemetry,
                self._report,
                self._passed,
                wrote,
                packets.node_known,
                writing=self._writing,
            )
        except OSError as error:
            raise errors.AgentError(f"cannot read the datapath's tables: {error}") from error
        flows = flow_table.FlowTable(
            kernel, counted=open_connections.OfLedger(control), writing=self._writing, absent=absent
        )
        self._telemetry.attach(
            controller=control,
            kernel=kernel,
            sources=sources,
            flow_table=flows,
            prober=self._prober,
            fingerprint=outcome.identity.fingerprint,
            start=outcome.how,
            max_series=self._settings.metrics_max_series,
        )
        control.awaits_devices = True
        control.probe_problem = self._probe_problem
        control.source_problems = lambda: [one.problem for one in sources]
        known = restoring.unhealthy(control.reconciler.ledger, tables.Health.PROBE_FAILED)
        self._prober.take_over(control.note_health, known)
        ejected = restoring.unhealthy(control.reconciler.ledger, tables.Health.EJECTED)
        self._ejecting.take_over(control.note_health, ejected)
        for batch in self._backlog:
            control.emit(batch)
        self._backlog.clear()
        begun = new_flows.NewFlows(hand_over, control, self._writing)
        cookie = node.netns_cookie()
        tasks.create_task(node.watch_addresses(lambda found: control.node_changed(found, cookie)))
        for running in (
            control.run(),
            self._health_checks.run(),
            self._prober.run(),
            noting.Noting(self._settings.bpffs, self._prober, control).run(),
            self._ejecting.run(kernel),
            flows.run(),
            sockets.run(control.ready),
            spaces.run(control.ready),
            self._watch_hooks(),
            packets.run(),
            begun.begin(packets.settled, left=left),
            begun.watch_return(),
            self._orders.run(kernel, self._writing, control, hand_over),
        ):
            tasks.create_task(running)
        tasks.create_task(self._announce(control, started_s))
        grew = self._reports.grew if self._reports is not None else lambda _what: None
        larger = growing.Growing(
            self._settings,
            self._cgroup,
            self._datapath,
            kernel,
            control,
            self._telemetry,
            self._writing,
            lambda: flows.counts.rows,
            grew,
        )
        tasks.create_task(larger.run())
        fatal = self._reports.cannot_serve if self._reports is not None else None
        tasks.create_task(servers.serve(self._settings, control, self._telemetry, fatal))
        if self._settings.config_file is not None:
            tasks.create_task(self._watch_config(self._settings.config_file))

    def _listen_for_signals(self, tasks: asyncio.TaskGroup, loop: asyncio.AbstractEventLoop) -> None:
        told = asyncio.Event()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, told.set)
        tasks.create_task(self._stop_when(told))

    async def _sources(self, tasks: asyncio.TaskGroup) -> list[typing.Any]:
        """Start whatever tells us of the cluster."""
        if self._settings.manifests is not None:
            from lbproxy.kube import manifests  # noqa: PLC0415 - YAML is loaded only where it is read

            files = manifests.Manifests(self._settings.manifests, self._emit)
            tasks.create_task(files.run())
            return [files]
        from lbproxy.kube import client, reflector, reports  # noqa: PLC0415 - see above

        kubeconfig = self._settings.kubeconfig
        connected = await client.connect(
            str(kubeconfig) if kubeconfig else "", self._settings.master, observed=self._telemetry.requested
        )
        _log.info("API server %s", connected.host)
        if self._settings.events:
            self._reports = reports.Reports(connected, self._settings.node_name)
            self._reports.started()
            tasks.create_task(self._reports.run())
        watched = [
            reflector.services(),
            reflector.endpoint_slices(),
            reflector.node(self._settings.node_name),
        ]
        reflectors = [reflector.Reflector(connected, one, self._emit) for one in watched]
        for one in reflectors:
            tasks.create_task(one.run())
        tasks.create_task(_closing(connected))
        return reflectors

    def _emit(self, batch: typing.Sequence[events.Event]) -> None:
        self._node_watch.take(batch)
        self._orders.take(batch)
        if self._controller is None:
            self._backlog.append(batch)
        else:
            self._controller.emit(batch)

    def _report(self, event: events.Rejected | events.Upsert) -> None:
        if self._reports is None:
            return
        if isinstance(event, events.Rejected):
            self._reports.rejected(event)
        else:
            self._reports.warned(event)

    def _passed(self, control: controller.Controller, names: list[model.ServiceName]) -> None:
        state = control.reconciler.state
        facts = control.node_facts
        self._health_checks.passed(state, names, facts, control.health)
        self._prober.passed(state, names, frozenset(facts.local) if facts is not None else frozenset())
        self._ejecting.passed(control.reconciler, names)

    def _carried_out(self, report: migration.Report) -> None:
        if self._reports is not None:
            self._reports.migration(report)
        if report.removed:
            # All of a large cluster's rules have been read for that.
            memory.settle()

    def _health_check_failed(self, service: model.ServiceName, port: int, why: str) -> None:
        if self._reports is not None:
            self._reports.health_check_failed(service, port, why)

    def _probe_problem(self) -> str:
        problem = self._trusted.problem
        return f"--probe-ca-file: {problem}" if problem else ""

    def _probes_say(self, change: probing.Change) -> None:
        if self._reports is not None:
            self._reports.backend_changed(
                change.user.port.service, healthy=change.usable, action="Probe", note=prober.describe(change)
            )

    def _ejection_says(self, port: model.PortKey, change: outliers.Change, line: str) -> None:
        if change.ejected:
            self._telemetry.ejected()
        if self._reports is not None:
            self._reports.backend_changed(
                port.service, healthy=not change.ejected, action="EjectOutlier", note=line
            )

    def _devices_report(self, reasons: typing.Sequence[str], unserved: typing.Sequence[str]) -> None:
        if self._controller is not None:
            self._controller.device_problems, self._controller.devices_unserved = reasons, unserved

    async def _announce(self, control: controller.Controller, started_s: float) -> None:
        await control.ready.wait()
        _log.info(
            "ready: services=%d frontends=%d after=%.0fms",
            len(control.reconciler.ledger.services()),
            control.reconciler.ledger.claims.places,
            (time.monotonic() - started_s) * 1e3,
        )
        await asyncio.to_thread(beside.tell_leftovers)
        await asyncio.to_thread(beside.tell_another, self._settings.bpffs, self._cgroup.path)
        memory.settle()

    async def _watch_hooks(self) -> None:
        """Put back hooks that something else has taken away (SYNC-5).

        Raises AgentError where what they would run is gone too: the next start makes it anew.
        """
        while True:
            await asyncio.sleep(_HOOK_CHECK_S)
            problem = ""
            try:
                async with self._writing.shared():
                    _find_cgroup(self._cgroup, self._datapath)
                    lost = self._datapath.verify(self._cgroup.path, self._cgroup.id)
            except OSError as error:
                problem = self._datapath.problem or f"cannot verify the hooks: {error}"
                _log.error("%s", problem)
            else:
                if lost:
                    _log.error("put back hooks that were taken away: %s", ", ".join(lost))
                    self._telemetry.put_back(len(lost))
            if self._controller is not None:
                hidden = f"no cgroup2 mount shows the cgroup {self._cgroup.path}"
                problem = problem or self._datapath.problem
                self._controller.datapath_problem = problem or ("" if self._cgroup.visible else hidden)

    async def _watch_config(self, path: pathlib.Path) -> None:
        """End when the configuration changes, to be started again with the new one (CLI-2)."""
        first = _stamp(path)
        while True:
            await asyncio.sleep(_CONFIG_CHECK_S)
            if _stamp(path) != first:
                _log.warning("%s has changed: ending, to be started again with it", path)
                await self._stop(1)

    async def _stop_when(self, told: asyncio.Event) -> typing.NoReturn:
        await told.wait()
        # The loop gives its handlers back when it is closed: a second signal would then kill what is ending.
        for number in _STOP_SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        await self._stop(0)

    async def _stop(self, status: int) -> typing.NoReturn:
        _log.info("stopping; the datapath goes on serving")
        raise _Stop(status)


def _find_cgroup(cgroup: cgroup2.Cgroup, path: datapath.Datapath) -> None:
    """See where the cgroup is mounted now, and note it down. Raises OSError, AgentError."""
    if said := cgroup.look():
        _log.warning("%s", said)
    if cgroup.visible:
        path.moved(cgroup.path)


async def _closing(connected: "client.Client") -> None:
    """Close the connections when the group ends."""
    try:
        await asyncio.Event().wait()
    finally:
        with contextlib.suppress(Exception):
            await connected.close()


def _stamp(path: pathlib.Path) -> tuple[int, int, int] | None:
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns, status.st_size
    return None
