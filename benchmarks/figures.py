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
FIRST = ("fresh", "compiled")  # before them nobody served
SERVING = "until it serves what is now so"
KERNEL_MEMORY = "in the kernel: maps, or rules"
RESIDENT = "agent, resident (RSS)"
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
        listed += _times(stand_in.services, CONTROL, "quiet", stand_in.event_ms, "")
    listed += _starts(found)
    for memory in found.memory:
        listed += _memory(memory)
    listed += map(_cpu, found.cpu)
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


def variants(traffic: results.Traffic) -> list[str]:
    """Return the variants that every round has, those of one contestant together."""
    if not traffic.rounds:
        return []
    common = set.intersection(*(set(each.runs) for each in traffic.rounds))
    ways = list(WAYS)

    def place(variant: str) -> tuple[bool, str, int]:
        name, _, way = variant.partition("/")
        return name != "bare", "" if name == LBPROXY else name, ways.index(way) if way in ways else len(ways)

    return sorted(common, key=place)


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
        seen = stats.summary(ratios.ratios(traffic.rounds, variant))
        if name == "bare":
            column, way = CONTROL, "service" if traffic.services else "direct"
        else:
            column = name
        place = Place(group, topic(traffic), WAYS.get(way, way), traffic.services, column)
        judged = column == LBPROXY and traffic.services > 0
        target = _ratio_target(traffic.mode, way) if judged else None
        yield summed(place, seen, noise, target=target, note=_by_cpu(traffic, variant))


def _noise(traffic: results.Traffic, listed: list[str]) -> float:
    if "bare/again" not in listed:
        return 0.0
    return stats.summary(ratios.ratios(traffic.rounds, "bare/again")).margin


def _by_cpu(traffic: results.Traffic, variant: str) -> str:
    # Of a stream, CPU time is not by byte.
    if traffic.mode == "bulk":
        return ""
    return f"by CPU time {stats.summary(ratios.thrift(traffic.rounds, variant)).median:.3f}"


def _ratio_target(mode: str, way: str) -> targets.Target | None:
    if way == "direct":
        return targets.DIRECT if mode == "short" else None
    return {"short": targets.SHORT, "udp-new": None}.get(mode, targets.ESTABLISHED)


def _outside(traffic: results.Traffic) -> collections.abc.Iterator[Figure]:
    listed = variants(traffic)
    noise = _noise(traffic, listed)
    others = sorted({variant.partition("/")[0] for variant in listed} - {"bare", LBPROXY})
    for variant in listed:
        name, _, way = variant.partition("/")
        if variant in ("bare", "bare/elsewhere"):
            continue
        seen = stats.summary(ratios.ratios(traffic.rounds, variant))
        by_cpu = stats.summary(ratios.thrift(traffic.rounds, variant))
        column, way = (CONTROL, "local") if name == "bare" else (name, way)
        place = Place(Group.OUTSIDE, topic(traffic), WAYS.get(way, way), traffic.services, column)
        yield summed(place, seen, noise, note=f"by CPU time {by_cpu.median:.3f}")
        for other in others if name == LBPROXY else ():
            against = f"{other}/{_INSTEAD.get(way, way)}"
            if against not in listed:
                continue
            seen = stats.summary(ratios.against(traffic.rounds, variant, against))
            target = targets.node_port(traffic.services) if other == "iptables" else None
            yield summed(
                place._replace(group=Group.VERSUS, column=other), seen, noise * seen.median, target=target
            )


def _programming(each: results.Programming) -> list[Figure]:
    notes = [f"{len(each.latency_ms)} changes"]
    if each.churn_per_s:
        notes.append(f"{each.churn_per_s:.1f} others a second")
    if each.lost:
        notes.append(f"{each.lost} never seen")
    if each.failed:
        notes.append(f"{each.failed} connections failed")
    what = "others change too" if each.churn_per_s else "quiet"
    return _times(each.services, each.contestant, what, each.latency_ms, ", ".join(notes))


def _times(services: int, column: str, what: str, ms: list[float], note: str) -> list[Figure]:
    place = Place(Group.PROGRAMMING, "one slice changed → first connection", what, services, column)
    p50, p99 = (place._replace(what=f"{what}, {name}") for name in ("p50", "p99"))
    goals = (targets.PROGRAMMING_P50, targets.PROGRAMMING_P99) if column == LBPROXY else (None, None)
    if not ms:
        return [
            single(each, math.inf, "ms", target=goal, note=note, travels=False)
            for each, goal in zip((p50, p99), goals, strict=True)
        ]
    # Of the few times at the end, how far they lie apart is all that is known.
    margins = (stats.summary(ms).margin, max(ms) - stats.percentile(ms, 0.9))
    return [
        Figure(
            *of, stats.percentile(ms, share), min(ms), max(ms), len(ms), margin, "ms",
            more_is_better=False, target=goal, note=note, travels=False,
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
        times: dict[str, typing.Any] = {"unit": "s", "more_is_better": False, "note": note, "travels": False}
        target = targets.START.get(services) if name == LBPROXY else None
        yield summed(place, stats.summary([each.synced_s for each in chosen]), target=target, **times)
        cpu = stats.summary([each.cpu_s for each in chosen])
        yield summed(place._replace(what="CPU time until quiet"), cpu, **times)
        failed, made = sum(each.failed for each in chosen), sum(each.connections for each in chosen)
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
        target = target if each.contestant == LBPROXY else None
        return single(place, size / 1e6, "MB", target=target, note=note)

    if each.rss:
        parts = [f"{each.rss_anonymous / 1e6:.1f} MB anonymous"]
        if each.rss_of_maps:
            parts.append(f"{each.rss_of_maps / 1e6:.1f} MB mapped BPF maps")
        yield of(RESIDENT, each.rss, ", ".join(parts), targets.AGENT_MEMORY)
        yield of("agent, greatest RSS", each.rss_peak, "while starting")
    if each.cgroup_peak is not None:
        yield of("agent's cgroup, greatest", each.cgroup_peak, "with compiler and kernel memory")
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
        runs = [each.runs[variant] for each in traffic.rounds]
        place = Place(Group.RATES, topic(traffic), measure(way, "rate"), traffic.services, name)
        rate = stats.summary([run.rate_per_s for run in runs])
        yield summed(place, rate, unit=rate_unit(traffic), travels=False)
        if traffic.mode == "bulk":
            continue
        for what, values in (("p50", [run.p50_us for run in runs]), ("p99", [run.p99_us for run in runs])):
            yield summed(
                place._replace(what=measure(way, what)),
                stats.summary(values),
                unit="µs",
                more_is_better=False,
                travels=False,
            )
