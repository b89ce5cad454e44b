"""A run's samples as figures, each beside its target. Pure."""

import dataclasses

from benchmarks import ratios, results, stats, targets

CONTROL = "bare ÷ bare: the control"
_WORDS = {
    "short": "short TCP connections",
    "established": "requests on an open TCP connection",
    "udp-established": "requests on a connected UDP socket",
    "udp-new": "requests from a new UDP socket each",
    "bulk": "throughput",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: a figure beside what it should be."""

    what: str
    services: int
    measured: str
    spread: str
    target: targets.Target | None = None
    missed_by: float = 0.0
    doubt: str = ""  # why the verdict may be another next time

    @property
    def verdict(self) -> str:
        """Say whether the target is met."""
        if self.target is None:
            return ""
        unit = f" {self.target.unit}" if self.target.unit else ""
        verdict = f"missed by {_figure(self.missed_by)}{unit}" if self.missed_by else "met"
        return f"{verdict}, {self.doubt}" if self.doubt else verdict


def rows(found: results.Results) -> list[Row]:
    """Return every figure of a run that has a target, or says how to take the others."""
    listed: list[Row] = []
    for mode in _WORDS:
        traffic = [
            each for each in found.traffic if (each.mode, each.path) == (mode, "pod") and each.services
        ]
        for each in sorted(traffic, key=lambda one: one.services):
            listed += _ratio_rows(each)
    for programming in found.programming:
        listed += _programming_rows(programming)
    listed += [_stand_in_row(each) for each in found.stand_in]
    listed += _start_rows(found)
    listed += [row for each in found.memory for row in _memory_rows(each)]
    listed += [_cpu_row(each) for each in found.cpu]
    return listed


def _ratio_rows(traffic: results.Traffic) -> list[Row]:
    goal = {"short": targets.SHORT, "udp-new": None}.get(traffic.mode, targets.ESTABLISHED)
    what = _WORDS[traffic.mode]
    control = stats.summary(ratios.ratios(traffic.rounds, "bare/again"))
    compared = (
        (f"{what}, through a ClusterIP ÷ bare", "lbproxy/service", goal),
        (
            f"{what}, to a pod address ÷ bare",
            "lbproxy/direct",
            targets.DIRECT if traffic.mode == "short" else None,
        ),
        (f"{what}, {CONTROL}", "bare/again", None),
    )
    listed = []
    for said, variant, target in compared:
        seen = stats.summary(ratios.ratios(traffic.rounds, variant))
        by_cpu = stats.summary(ratios.thrift(traffic.rounds, variant))
        spread = f"{seen.low:.3f} – {seen.high:.3f}; by CPU time {by_cpu.median:.3f}"
        margin = max(seen.margin, control.margin)
        doubt, missed = "", 0.0
        if target is not None:
            missed = target.missed_by(seen.median)
            doubt = f"give or take {margin:.3f}" if abs(seen.median - target.bound) <= margin else ""
        listed.append(Row(said, traffic.services, f"{seen.median:.3f}", spread, target, missed, doubt))
    return listed


def _programming_rows(each: results.Programming) -> list[Row]:
    if not each.latency_ms:
        return [Row("one slice changed → first connection to the new pod", each.services, "never", "")]
    churn = f", {each.churn_per_s:.0f} others changing a second" if each.churn_per_s else ""
    what = f"one slice changed → first connection to the new pod{churn}"
    spread = f"{min(each.latency_ms):.2f} – {max(each.latency_ms):.2f} ms, {len(each.latency_ms)} changes"
    if each.lost:
        spread += f", {each.lost} never seen"
    return [
        _with_target(
            f"{what}, {name}", each.services, stats.percentile(each.latency_ms, share), spread, target
        )
        for name, share, target in (
            ("p50", 0.5, targets.PROGRAMMING_P50),
            ("p99", 0.99, targets.PROGRAMMING_P99),
        )
    ]


def _stand_in_row(each: results.StandIn) -> Row:
    seen = stats.summary(each.event_ms)
    what = "of which the API server stand-in (patch → event at a bare watcher)"
    return Row(what, each.services, f"{seen.median:.2f} ms", _between(seen, "ms"))


def _start_rows(found: results.Results) -> list[Row]:
    listed = []
    words = {
        "fresh": "first start → last service answers",
        "upgraded": "upgrade → a change made meanwhile answers",
        "adopted": "restart → a change made meanwhile answers",
    }
    for how, services in sorted({(each.how, each.services) for each in found.starts}, reverse=True):
        chosen = [each for each in found.starts if (each.how, each.services) == (how, services)]
        synced = stats.summary([each.synced_s for each in chosen])
        cpu = stats.summary([each.cpu_s for each in chosen])
        spread = f"{_between(synced, 's')}, {synced.count} starts"
        target = targets.START.get(services)
        listed += [
            _with_target(words[how], services, synced.median, spread, target, "s"),
            _with_target(
                "CPU of that start, until quiet", services, cpu.median, _between(cpu, "s"), None, "s"
            ),
        ]
        if how != "fresh":
            failed, made = sum(each.failed for each in chosen), sum(each.connections for each in chosen)
            what = "failed connections during those restarts"
            listed.append(_with_target(what, services, failed, f"of {made:,}", targets.FAILED))
    return listed


def _memory_rows(each: results.Memory) -> list[Row]:
    parts = f"{_mb(each.rss_anonymous)} anonymous, {_mb(each.rss_of_maps)} mapped BPF maps"
    peak = "while starting"
    if each.cgroup_peak is not None:
        peak += f"; cgroup peak, with compiler and kernel memory, {_mb(each.cgroup_peak)}"
    maps, programs = sum(each.maps.values()), f"programs {_mb(each.programs)}"
    return [
        _with_target("agent memory (RSS)", each.services, each.rss / 1e6, parts, targets.AGENT_MEMORY),
        Row("agent memory, peak RSS", each.services, _mb(each.rss_peak), peak),
        _with_target("BPF maps", each.services, maps / 1e6, programs, targets.BPF_MEMORY),
    ]


def _cpu_row(each: results.Cpu) -> Row:
    percent = 100 * each.cpu_s / each.seconds
    load = f"{each.changes_per_s:.0f} slice changed a second" if each.changes_per_s else "rest"
    what = f"agent CPU at {load}"
    return _with_target(what, each.services, percent, f"over {each.seconds:.0f} s", targets.CPU)


def _with_target(
    what: str, services: int, value: float, spread: str, target: targets.Target | None, unit: str = ""
) -> Row:
    unit = target.unit if target else unit
    said = f"{_figure(value)} {unit}".rstrip()
    return Row(what, services, said, spread, target, target.missed_by(value) if target else 0.0)


def _figure(value: float) -> str:
    """Write a number with as many digits as it deserves."""
    if value == int(value):
        return f"{value:.0f}"
    if value >= 20:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _between(seen: stats.Summary, unit: str) -> str:
    return f"{seen.low:.2f} – {seen.high:.2f} {unit}"


def failures(found: results.Results) -> int:
    """Count what should not have failed: connections of every kind, and changes that never showed."""
    return (
        sum(run.failed for traffic in found.traffic for each in traffic.rounds for run in each.runs.values())
        + sum(each.failed + each.lost for each in found.programming)
        + sum(each.failed for each in found.starts)
    )
