"""A run's samples as figures, each beside its target. Pure."""

import collections.abc
import itertools
import math
import typing

from benchmarks import packet_rows, ratios, results, stats, targets
from benchmarks.figure import CONTROL, LBPROXY, Figure, Group, Place, single, summed

MODES = {
    "short": "short TCP connections",
    "established": "requests on an open TCP connection",
    "udp-established": "requests on a connected UDP socket",
    "udp-new": "requests from a new UDP socket each",
    "bulk": "throughput of one TCP connection",
}
PATHS = {
    "pod": "pod → pod of the same node",
    "remote": "pod → pod of another node",
    "node": "node → pod of the same node",
    "outside": "outside → NodePort",
}
WAYS = {
    "service": "through a ClusterIP",
    "direct": "to the pod's own address",
    "local": "policy Local",
    "masqueraded": "masqueraded",
    "remote": "masqueraded, to another node",
    "dsr": "to another node by DSR",
    "": "bare",
    "again": "bare again",
    "elsewhere": "bare, to another node",
}
STARTS = {
    "fresh": "first start",
    "compiled": "first start, compiled before",
    "adopted": "restart",
    "upgraded": "upgrade",
}
CHANGED = "one slice changed → first connection"
FIRST = ("fresh", "compiled")  # before them nobody served
SERVING = "until it serves what is now so"
KERNEL_MEMORY = "in the kernel: maps, or rules"
RESIDENT = "agent, resident (RSS)"
CGROUP = "lbproxy's cgroup, greatest"
# kube-proxy has no DSR: it masquerades where lbproxy can have the pod answer by itself.
_INSTEAD = {"dsr": "remote"}


def figures(found: results.Results) -> list[Figure]:
    """Return every figure of a run that stands beside those of other contestants or beside a target."""
    listed: list[Figure] = []
    for each in found.traffic:
        if each.rounds:
            listed += _outside(each) if each.path == "outside" else _in_cluster(each)
    for programming in found.programming:
        listed += _programming(programming)
    for stand_in in found.stand_in:
        listed += _times(stand_in.services, CONTROL, "quiet", stand_in.event_ms)
    listed += _starts(found)
    for memory in found.memory:
        listed += _memory(memory)
    listed += (_cpu(each) for each in found.cpu if each.seconds > 0)
    order = list(Group)
    return sorted(listed, key=lambda one: (order.index(one.group), one.services))


def absolutes(found: results.Results) -> list[Figure]:
    """Return the figures that mean something on one machine only: rates, latencies, single packets."""
    listed = [figure for each in found.traffic for figure in _rates(each)]
    for line in packet_rows.lines(found):
        for (family, protocol), seen in line.found.items():
            what = f"{line.what}, {packet_rows.flows(line) or 'floor'}, IPv{family} {protocol}"
            place = Place(Group.PACKETS, line.program, what, 0, LBPROXY)
            listed.append(summed(place, seen, unit="ns", more_is_better=False, travels=False))
    return listed


def failures(found: results.Results) -> list[Figure]:
    """Return what failed of each kind of traffic and change: what another run is to be held against."""
    listed = [
        single(
            Place(Group.FAILURES, topic(traffic), measure(way, "failed"), traffic.services, name),
            sum(run.failed for run in runs(traffic, variant)),
            "failed",
        )
        for traffic in found.traffic
        for variant in variants(traffic)
        for name, _, way in [variant.partition("/")]
    ]
    for each in found.programming:
        while_quiet = quiet(each)
        for what, number in (("changes never seen", each.lost), ("connections failed", each.failed)):
            place = Place(Group.FAILURES, CHANGED, f"{while_quiet}, {what}", each.services, each.contestant)
            listed.append(single(place, number, "failed"))
    return listed


def variants(traffic: results.Traffic) -> list[str]:
    """Return the variants that any round has, those of one contestant together."""
    there = {variant for each in traffic.rounds for variant in each.runs}
    ways = list(WAYS)

    def place(variant: str) -> tuple[bool, str, int]:
        name, _, way = variant.partition("/")
        return name != "bare", "" if name == LBPROXY else name, ways.index(way) if way in ways else len(ways)

    return sorted(there, key=place)


def runs(traffic: results.Traffic, variant: str) -> list[results.Run]:
    """Return a variant's runs, of the rounds that have it."""
    return [each.runs[variant] for each in traffic.rounds if variant in each.runs]


def latencies(of: collections.abc.Iterable[results.Run], share: str) -> list[float]:
    """Return the "p50" or "p99" of runs, in µs: infinite where nothing was answered."""
    return [getattr(run, f"{share}_us") if run.count else math.inf for run in of]


def topic(traffic: results.Traffic) -> str:
    """Say what kind of traffic it is."""
    return f"{MODES.get(traffic.mode, traffic.mode)}, {PATHS.get(traffic.path, traffic.path)}"


def rate_unit(traffic: results.Traffic) -> str:
    """Return the unit of a rate."""
    return "MB/s" if traffic.mode == "bulk" else "/s"


def _in_cluster(traffic: results.Traffic) -> collections.abc.Iterator[Figure]:
    group = Group.OTHERS
    if not traffic.services:
        group = Group.ALIKE
    elif traffic.mode == "short":
        group = Group.SHORT if traffic.path == "pod" else Group.PATHS
    listed = variants(traffic)
    noise = _noise(traffic, listed)
    for variant in listed:
        name, _, way = variant.partition("/")
        if variant == "bare":
            continue
        found = ratios.ratios(traffic.rounds, variant)
        if not found:
            continue
        seen = stats.summary(found)
        if name == "bare":
            column, way = CONTROL, "service" if traffic.services else "direct"
        else:
            column = name
        place = Place(group, topic(traffic), WAYS.get(way, way), traffic.services, column)
        judged = column == LBPROXY and traffic.services > 0
        target = _ratio_target(traffic.mode, way) if judged else None
        note, warning = _by_cpu(traffic, variant), _failed(traffic, variant)
        yield summed(place, seen, noise, target=target, note=note, warning=warning)


def _noise(traffic: results.Traffic, listed: list[str]) -> float:
    found = ratios.ratios(traffic.rounds, "bare/again") if "bare/again" in listed else []
    return stats.summary(found).margin if found else 0.0


def _by_cpu(traffic: results.Traffic, variant: str) -> str:
    # Of a stream, CPU time is not by byte.
    found = ratios.thrift(traffic.rounds, variant) if traffic.mode != "bulk" else []
    return f"by CPU time {stats.summary(found).median:.3f}" if found else ""


def _failed(traffic: results.Traffic, variant: str) -> str:
    def failed(listed: collections.abc.Iterable[str]) -> int:
        return sum(run.failed for each in listed for run in runs(traffic, each))

    # What is divided by something that failed is worth no more.
    of_bare = failed(each for each in variants(traffic) if each.startswith("bare") and each != variant)
    counted = ((failed([variant]), "failed"), (of_bare, "of bare failed"))
    return ", ".join(f"{number:,} {what}" for number, what in counted if number)


def _ratio_target(mode: str, way: str) -> targets.Target | None:
    if way == "direct":
        return targets.DIRECT
    return {"short": targets.SHORT, "udp-new": None}.get(mode, targets.ESTABLISHED)


def _outside(traffic: results.Traffic) -> collections.abc.Iterator[Figure]:
    listed = variants(traffic)
    noise = _noise(traffic, listed)
    others = sorted({variant.partition("/")[0] for variant in listed} - {"bare", LBPROXY})
    for variant in listed:
        name, _, way = variant.partition("/")
        if variant in ("bare", "bare/elsewhere"):
            continue
        found = ratios.ratios(traffic.rounds, variant)
        note, warning = _by_cpu(traffic, variant), _failed(traffic, variant)
        column, way = (CONTROL, "local") if name == "bare" else (name, way)
        place = Place(Group.OUTSIDE, topic(traffic), WAYS.get(way, way), traffic.services, column)
        if found:
            yield summed(place, stats.summary(found), noise, note=note, warning=warning)
        for other in others if name == LBPROXY else ():
            against = f"{other}/{_INSTEAD.get(way, way)}"
            found = ratios.against(traffic.rounds, variant, against)
            if not found:
                continue
            seen = stats.summary(found)
            target = targets.node_port(traffic.services) if other == "iptables" else None
            of_other = place._replace(group=Group.VERSUS, column=other)
            yield summed(of_other, seen, noise * seen.median, target=target, warning=warning)
            limit = ratios.against(traffic.rounds, ratios.bare_of(way), against) if target else []
            if limit:
                # A target above it can not be met on this machine, by anybody.
                most = stats.summary(limit)
                yield summed(of_other._replace(column=CONTROL), most, noise * most.median)


def _programming(each: results.Programming) -> list[Figure]:
    # A change that was never seen took longer than any other.
    ms = [*each.latency_ms, *[math.inf] * each.lost]
    note = f"{len(ms)} changes"
    if each.churn_per_s:
        note += f", {each.churn_per_s:.1f} others a second"
    failed = ((each.lost, "never seen"), (each.failed, "connections failed"))
    warning = ", ".join(f"{number:,} {what}" for number, what in failed if number)
    return _times(each.services, each.contestant, quiet(each), ms, note, warning)


def quiet(each: results.Programming) -> str:
    """Say whether other slices changed meanwhile."""
    return "others change too" if each.churn_per_s else "quiet"


def _times(
    services: int, column: str, what: str, ms: list[float], note: str = "", warning: str = ""
) -> list[Figure]:
    if not ms:
        return []
    place = Place(Group.PROGRAMMING, CHANGED, what, services, column)
    p50, p99 = (place._replace(what=f"{what}, {name}") for name in ("p50", "p99"))
    goals = (targets.PROGRAMMING_P50, targets.PROGRAMMING_P99) if column == LBPROXY else (None, None)
    # Of the few times at the end, how far they lie apart is all that is known.
    margins = (stats.summary(ms).margin, stats.gap(stats.percentile(ms, 0.9), max(ms)))
    return [
        Figure(
            *of, stats.percentile(ms, share), min(ms), max(ms), len(ms), margin, "ms",
            more_is_better=False, target=goal, note=note, warning=warning, travels=False,
        )
        for of, share, margin, goal in zip((p50, p99), (0.5, 0.99), margins, goals, strict=True)
    ]  # fmt: skip


def _starts(found: results.Results) -> collections.abc.Iterator[Figure]:
    def kind(start: results.Start) -> tuple[int, str, int]:
        return list(STARTS).index(start.how), start.contestant, start.services

    for (_, name, services), together in itertools.groupby(sorted(found.starts, key=kind), key=kind):
        chosen = list(together)
        how = chosen[0].how
        note = f"{len(chosen)} start{'s' if len(chosen) > 1 else ''}"
        place = Place(Group.START, STARTS[how], SERVING, services, name)
        failed, made = sum(each.failed for each in chosen), sum(each.connections for each in chosen)
        # Before a first start there is nobody who could have answered.
        warning = f"{failed:,} connections failed" if failed and how not in FIRST else ""
        times: dict[str, typing.Any] = {"unit": "s", "more_is_better": False, "note": note, "travels": False}
        target = targets.START.get(services) if name == LBPROXY else None
        yield summed(
            place, stats.summary([each.synced_s for each in chosen]), target=target, warning=warning, **times
        )
        cpu = stats.summary([each.cpu_s for each in chosen])
        yield summed(place._replace(what="CPU time until quiet"), cpu, **times)
        if made <= len(chosen):
            # Rules are loaded, and nobody goes on connecting.
            continue
        yield single(
            Place(Group.FAILED, "failed connections", during(how), services, name),
            failed,
            "failed",
            target=targets.FAILED if name == LBPROXY and how not in FIRST else None,
            note=f"of {made:,} in {note}",
        )


def during(how: str) -> str:
    """Say of which starts something is."""
    kind, _, rest = STARTS[how].partition(",")
    return f"during {kind}s{f',{rest}' if rest else ''}"


def _memory(each: results.Memory) -> collections.abc.Iterator[Figure]:
    def of(what: str, size: int, note: str = "", target: targets.Target | None = None) -> Figure:
        place = Place(Group.MEMORY, "memory", what, each.services, each.contestant)
        if each.contestant != LBPROXY or each.services > targets.MEMORY_SERVICES:
            target = None
        return single(place, size / 1e6, "MB", target=target, note=note)

    if each.rss:
        parts = [f"{each.rss_anonymous / 1e6:.1f} MB anonymous"]
        if each.rss_of_maps:
            parts.append(f"{each.rss_of_maps / 1e6:.1f} MB mapped BPF maps")
        yield of(RESIDENT, each.rss, ", ".join(parts), targets.AGENT_MEMORY)
        yield of("agent, greatest RSS", each.rss_peak, "while starting")
    # Of lbproxy alone: page cache is charged to whoever read a file first, and to a kube-proxy's program
    # that was the harness or an agent before. Beside each other they would be unlike things.
    if each.cgroup_peak is not None and each.contestant == LBPROXY:
        yield of(CGROUP, each.cgroup_peak, "with its compiler, page cache and kernel memory, maps too")
    if each.maps:
        note = f"programs {each.programs / 1e6:.1f} MB"
        yield of(KERNEL_MEMORY, sum(each.maps.values()), note, targets.BPF_MEMORY)
    if each.rules is not None:
        # The cgroup tells rules and the rest of an agent's kernel memory not apart.
        yield of(KERNEL_MEMORY, each.rules, "with page tables and sockets of the agent" if each.rss else "")


def _cpu(each: results.Cpu) -> Figure:
    changes = max(1, round(each.changes_per_s))
    what = f"at {changes} change{'s' if changes > 1 else ''} a second" if each.changes_per_s else "at rest"
    judged = each.contestant == LBPROXY and changes <= 1
    return single(
        Place(Group.CPU, "CPU", what, each.services, each.contestant),
        100 * each.cpu_s / each.seconds,
        "%",
        target=targets.CPU if judged else None,
        note=f"over {each.seconds:.0f} s",
        travels=False,
    )


def measure(way: str, what: str) -> str:
    """Name what is measured of one way: `what` is "rate", "p50" or "p99"."""
    return f"{WAYS.get(way, way)}, {what}"


def _rates(traffic: results.Traffic) -> collections.abc.Iterator[Figure]:
    for variant in variants(traffic):
        name, _, way = variant.partition("/")
        made = runs(traffic, variant)
        place = Place(Group.RATES, topic(traffic), measure(way, "rate"), traffic.services, name)
        rate = stats.summary([run.rate_per_s for run in made])
        yield summed(place, rate, unit=rate_unit(traffic), travels=False)
        if traffic.mode == "bulk":
            continue
        for what in ("p50", "p99"):
            yield summed(
                place._replace(what=measure(way, what)),
                stats.summary(latencies(made, what)),
                unit="µs",
                more_is_better=False,
                travels=False,
            )
