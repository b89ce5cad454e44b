"""What all pages of a run say: words and tables, neither Markdown nor HTML. Pure."""

import collections.abc
import math

from benchmarks import figures, results, rows, stats, tables
from benchmarks.figure import LBPROXY, Figure, Group

KEY = """\
*Bare* is the same client and server on a node where nothing is programmed. Every round runs each
variant once, in rotating order, client and server on one CPU; ratios are of rates within a round,
figures are medians of rounds. *Give or take* is the median's 95 % margin, where the target is within
it. 4 endpoints per service."""
_OF_PACKETS = """\
Of single packets, ns in the kernel by BPF_PROG_TEST_RUN, medians with quartiles. Each run restores
its packet first, and that is in every figure: *returns at once* is the floor. Tables have the
default sizes,{services} and, but for new flows, 64k flows in them; *64k* sends a packet of
each in turn."""
NOT_SHOWN = (
    "more than one machine (all of it ran on one, over veth devices and bridges, without a NIC)",
    "other CNIs than plain routes and a bridge",
    "a real API server (a stand-in serves the objects over HTTP: faster, without admission or etcd)",
)
_NO_KUBE_PROXY = "what kube-proxy itself computes before it writes its rules (those here were generated)"
CAPTIONS = {
    Group.SHORT: "Connect, ask, be answered, close; pod → pod of the same node. 1 is no proxy at all.",
    Group.VERSUS: "Rate of lbproxy ÷ that of the other, in the same rounds; DSR ÷ the other's masquerading.",
    Group.ALIKE: "Every node is like the bare one until it is programmed: 1 but for noise.",
    Group.PROGRAMMING: "From the patch of one slice to the first connection that reaches the new pod.",
    Group.START: "From the command to the first connection to where the last service now is.",
}
_OF_GENERATED = {
    Group.PROGRAMMING: (
        "Of generated rules loading alone was measured: nobody had to compute them. That is no lower bound "
        "of what a kube-proxy takes. Side by side on a busy machine, medians, generated against a real "
        "kube-proxy 1.30: iptables, 200 services, 94 to 102 ms against 52 to 60; 1,000, 78 to 116 against "
        "105 to 130; nftables, 200, 78 to 125 against 261 to 271; 1,000, 366 to 396 against 1,507. So a real "
        "one can be faster (iptables, few services) or several times slower (nftables): to know, measure "
        "one with `--kube-proxy PATH`."
    ),
    Group.START: "Of generated rules only their loading.",
    Group.MEMORY: "Of generated rules there is no agent whose memory could be measured.",
    Group.CPU: "Of generated rules there is no agent whose CPU time could be measured.",
}


def of_packets(found: results.Results) -> str:
    """Say what the figures of single packets are."""
    services = found.settings.get("packet_services")
    return _OF_PACKETS.format(
        services=f" {services:,} services" if isinstance(services, int) else " services"
    )


def headline_caption(group: Group, found: results.Results) -> str:
    """Say what the figures of `headlines` are."""
    if group is Group.OTHERS:
        return "Through a ClusterIP, pod → pod of the same node; other sizes in docs/benchmarks.md."
    if group is Group.PATHS:
        return "With as many services; other sizes in docs/benchmarks.md."
    return caption(group, found)


def caption(group: Group, found: results.Results) -> str:
    """Say what a group's figures are, and what is missing of those of generated rules."""
    generated = any(not each.real for each in found.contestants)
    parts = (CAPTIONS.get(group, ""), _OF_GENERATED.get(group, "") if generated else "")
    return " ".join(part for part in parts if part)


def not_shown(found: results.Results) -> list[str]:
    """Say what a run does not show."""
    generated = any(not each.real for each in found.contestants)
    return [*NOT_SHOWN, _NO_KUBE_PROXY] if generated else list(NOT_SHOWN)


def rates(found: results.Results) -> tables.Table:
    """Return the rates and latencies behind the ratios."""
    head = ("traffic", "services", "variant", "a second", "p50 µs", "p99 µs", "CPU µs", "own code", "failed")
    called = rows.headings(found)
    listed = []
    for traffic in found.traffic:
        unit = "" if figures.rate_unit(traffic) == "/s" else " MB"
        for variant in figures.variants(traffic):
            runs = figures.runs(traffic, variant)
            seen = stats.summary([run.rate_per_s for run in runs])
            name, _, way = variant.partition("/")
            said = (
                figures.WAYS.get(way, way)
                if name == "bare"
                else f"{called[name]}, {figures.WAYS.get(way, way)}"
            )
            # A stream has no requests to take the time of.
            samples = (
                figures.latencies(runs, "p50"),
                figures.latencies(runs, "p99"),
                [run.cpu_us if run.count else math.inf for run in runs],
            )
            times = ["–" if unit else _time(values) for values in samples]
            own = stats.summary([run.own_share for run in runs]).median
            listed.append(
                (
                    tables.Cell(figures.topic(traffic)),
                    tables.count(traffic.services),
                    tables.Cell(said),
                    tables.Cell(
                        f"{seen.median:,.0f}{unit}", tables.Look.FIGURE, f"{seen.low:,.0f} – {seen.high:,.0f}"
                    ),
                    *tables.plain(*times),
                    tables.Cell(f"{own:.0%}"),
                    tables.Cell(_failed(runs)),
                )
            )
    return tables.Table(head, listed)


def _time(values: list[float]) -> str:
    median = stats.summary(values).median
    return "never" if math.isinf(median) else f"{median:,.1f}"


def _failed(runs: collections.abc.Iterable[results.Run]) -> str:
    by_name: dict[str, int] = {}
    total = 0
    for run in runs:
        total += run.failed
        for name, number in run.failures.items():
            by_name[name] = by_name.get(name, 0) + number
    names = ", ".join(f"{name} {number}" for name, number in by_name.items())
    return f"{total} ({names})" if names else str(total)


def headlines(found: results.Results) -> dict[Group, list[Figure]]:
    """Return the figures for README.md by their group: what the product is chosen for.

    At the least and the greatest number of services, and at the one that most targets are of.
    """
    chosen: dict[Group, list[Figure]] = {}
    measured = {each.services for each in found.traffic if each.services}
    greatest = max(measured, default=0)
    shown = {min(measured, default=0), _JUDGED_AT, greatest}
    for figure in figures.figures(found):
        group = figure.group
        if group in (Group.OUTSIDE, Group.ALIKE) or figure.services not in shown:
            continue

        if group in (Group.OTHERS, Group.PATHS) and figure.services != greatest:
            continue
        if group is Group.OTHERS and figure.what != figures.WAYS["service"]:
            continue

        if group in (Group.START, Group.MEMORY) and figure.what not in _SHOWN:
            continue
        if group is Group.FAILED and figure.what in map(figures.during, figures.FIRST):
            continue
        chosen.setdefault(group, []).append(figure)
    return chosen


_JUDGED_AT = 10_000
_SHOWN = (figures.SERVING, figures.RESIDENT, figures.KERNEL_MEMORY)


def maps(found: results.Results) -> tables.Table:
    """Return what each BPF map occupies, at the greatest number of services."""
    ours = [each for each in found.memory if each.contestant == LBPROXY]
    greatest = max(ours, key=lambda each: each.services, default=None)
    sizes = sorted(greatest.maps.items(), key=lambda item: -item[1]) if greatest else []
    return tables.Table(
        ("map", "MB"), [(tables.Cell(name), tables.Cell(f"{size / 1e6:.2f}")) for name, size in sizes]
    )
