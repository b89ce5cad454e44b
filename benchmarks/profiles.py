"""What a run measures, and the steps it consists of."""

import collections.abc
import contextlib
import dataclasses
import functools

from benchmarks import (
    bed,
    contestants,
    fields,
    latency,
    node_ports,
    packets,
    progress,
    ratios,
    report,
    results,
    rounds,
    starts,
    stats,
)

# Services beyond which start and latency are worth their time.
_LARGE = 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """How much to measure."""

    name: str
    services: tuple[int, ...]
    short_rounds: int
    short_s: float
    other_rounds: int
    other_s: float
    others_everywhere: bool  # established TCP and UDP at every number of services, not only the greatest
    starts: int  # of each kind, at the large numbers of services; 0: only the one that is needed
    changes: int
    cpu_s: float
    packet_rounds: int
    packet_services: int  # that share the tables
    maglev_repeats: int
    outside_rounds: int  # of connections to NodePorts, at the least and the greatest number of services
    outside_s: float


QUICK = Profile(
    name="quick",
    services=(1, 1_000, 10_000),
    short_rounds=16,
    short_s=0.25,
    other_rounds=8,
    other_s=0.2,
    others_everywhere=False,
    starts=3,
    changes=30,
    cpu_s=10.0,
    packet_rounds=7,
    packet_services=10_000,
    maglev_repeats=5,
    outside_rounds=8,
    outside_s=0.2,
)
FULL = Profile(
    name="full",
    services=(1, 100, 1_000, 5_000, 10_000, 30_000),
    short_rounds=32,
    short_s=0.4,
    other_rounds=12,
    other_s=0.3,
    others_everywhere=True,
    starts=5,
    changes=60,
    cpu_s=30.0,
    packet_rounds=21,
    packet_services=30_000,
    maglev_repeats=41,
    outside_rounds=12,
    outside_s=0.4,
)
# Shows that everything works; its figures mean nothing.
SMOKE = Profile(
    name="smoke",
    services=(1, 200),
    short_rounds=2,
    short_s=0.2,
    other_rounds=2,
    other_s=0.2,
    others_everywhere=False,
    starts=1,
    changes=5,
    cpu_s=2.0,
    packet_rounds=2,
    packet_services=200,
    maglev_repeats=1,
    outside_rounds=2,
    outside_s=0.2,
)
# Beside short connections between pods of a node.
_OTHERS: tuple[tuple[rounds.Path, rounds.Mode], ...] = (
    ("remote", "short"),
    ("node", "short"),
    ("pod", "established"),
    ("pod", "udp-established"),
    ("pod", "udp-new"),
    ("pod", "bulk"),
)
_PATHS = {"pod": "pod to pod", "remote": "pod to a pod of another node", "node": "node to pod"}
Adder = collections.abc.Callable[[contestants.Contestant, str, float, fields.Action], None]
PROFILES = {profile.name: profile for profile in (QUICK, FULL, SMOKE)}


def steps(profile: Profile, field: fields.Field) -> list[progress.Step]:
    """List what to do: with nothing programmed anywhere, then at every number of services, smallest first."""
    count, seconds = profile.other_rounds, profile.other_s
    listed = [_traffic_step(field, 0, "pod", "short", count, seconds)]
    return listed + [step for services in profile.services for step in _at_size(profile, field, services)]


def packet_steps(
    profile: Profile, cpu: int, into: results.Results, stack: contextlib.ExitStack
) -> list[progress.Step]:
    """List what to do with single packets; what that needs is up from the first step to the last."""
    at = bed.Bed(profile.packet_services, cpu)
    rounds = profile.packet_rounds

    up: list[bed.Bed] = []

    def load() -> str:
        up.append(stack.enter_context(at))
        return f"{profile.packet_services:,} services in the tables"

    def of_kind(family: int, proto: int) -> str:
        return _packets(at, into, family, proto, rounds) if up else "left out"

    def ports() -> str:
        if not up:
            return "left out"
        try:
            found = packets.ports(at, 4, rounds)
        finally:
            stack.close()
        into.ports.append(found)
        return f"{found.reached:,} flows from {found.ports:,} ports until one was refused"

    listed = [progress.Step("packets: load the datapath", 4 + profile.packet_services / 5_000, load)]
    for family in (4, 6):
        for proto, name in packets.PROTOCOLS.items():
            action = functools.partial(of_kind, family, proto)
            label = f"packets: IPv{family} {name}, {rounds} rounds"
            listed.append(progress.Step(label, packets.expected_s(rounds), action))
    listed.append(progress.Step("packets: ports to masquerade with", 2 + 0.5 * rounds, ports))
    return listed


def _packets(at: bed.Bed, into: results.Results, family: int, proto: int, rounds: int) -> str:
    others = packets.measure(at, family, proto, rounds, into.packets)
    into.others_during_packets.append(others)
    said = [
        f"{what} {stats.summary(each.ns).median:.0f} ns"
        for what, program, flows in (
            ("one flow", "tc_from_outside", 1), ("64k flows", "tc_from_outside", packets.FLOWS)
        )
        for each in into.packets
        if (each.program, each.what, each.flows) == (program, packets.HERE, flows)
        and (each.family, each.protocol) == (family, packets.PROTOCOLS[proto])
    ]  # fmt: skip
    busy = f"; OTHERS HAD {others:.0%} OF THE CPUS: TOO BUSY" if others > report.TOO_BUSY else ""
    return ", ".join(said) + busy


def _at_size(profile: Profile, field: fields.Field, services: int) -> list[progress.Step]:
    greatest, least = max(profile.services), min(profile.services)
    thorough = services >= _LARGE or services == greatest
    fill_s = 1 + services / 3_000
    listed: list[progress.Step] = []

    def add(of: contestants.Contestant, label: str, expected_s: float, action: fields.Action) -> None:
        text = f"{_services(services)}: {of.name}: {label}"
        listed.append(progress.Step(text, expected_s, functools.partial(field.attempt, of, action)))

    for of in field.who:
        text = f"{_services(services)}: {of.name}: fill the API server"
        listed.append(progress.Step(text, fill_s, functools.partial(field.begin, of, services)))
        start_s, again = 4 + services / 3_000, profile.starts if thorough and of.real else 0
        ours = of.name == contestants.Lbproxy.name
        for _ in range(1 if ours else max(1, again)):
            add(of, "first start", start_s + 4 * ours, _fresh)
        add(of, "memory", 1, _memory)
        # What there is to compile is the same at every size, and once is enough.
        for _ in range(again if ours else 0):
            add(of, "first start, compiled before", start_s, _compiled)
    count, seconds = profile.short_rounds, profile.short_s
    listed.append(_traffic_step(field, services, "pod", "short", count, seconds))
    if profile.others_everywhere or services == greatest:
        listed += [
            _traffic_step(field, services, path, mode, profile.other_rounds, profile.other_s)
            for path, mode in _OTHERS
        ]
    if profile.others_everywhere or services in (least, greatest):
        listed.append(_outside_step(field, services, profile.outside_rounds, profile.outside_s))
    for of in field.who:
        if thorough:
            for churn in (0, 10) if of.real else (0,):
                label = f"{profile.changes} changes seen by a client, {churn} others a second"
                latencies = functools.partial(_programming, changes=profile.changes, churn=churn)
                add(of, label, 2 + profile.changes * (0.05 + sum(of.pause_s) / 2), latencies)
        elif profile.others_everywhere:
            label = f"{profile.changes} changes seen by a client"
            latencies = functools.partial(_programming, changes=profile.changes, churn=0)
            add(of, label, 2 + profile.changes * (0.05 + sum(of.pause_s) / 2), latencies)
        if thorough and of.real:
            _at_length(profile, of, services, add)
        add(of, "end", 1, _end)
    return listed


def _at_length(profile: Profile, of: contestants.Contestant, services: int, add: Adder) -> None:
    """Add what only an agent can be asked."""
    if of.name == contestants.Lbproxy.name:
        stand_in = functools.partial(_stand_in, changes=profile.changes)
        add(of, "the API server stand-in by itself", 2, stand_in)
    for changes_per_s in (0, 1, 10):
        spent = functools.partial(_cpu, changes_per_s=changes_per_s, seconds=profile.cpu_s)
        add(of, f"CPU at {changes_per_s} changes a second", profile.cpu_s, spent)
    start_s = 4 + services / 3_000
    for _ in range(profile.starts):
        add(of, "restart", start_s, _adopted)
    if of.name == contestants.Lbproxy.name:
        for _ in range(profile.starts):
            add(of, "upgrade", 4 + start_s, _upgraded)


def _services(count: int) -> str:
    return f"{count:,} service{'s' if count > 1 else ''}" if count else "nothing programmed"


def _traffic_step(
    field: fields.Field, services: int, path: rounds.Path, mode: rounds.Mode, count: int, seconds: float
) -> progress.Step:
    lasting_s = min(seconds, rounds.UDP_NEW_S) if mode == "udp-new" else seconds

    def measure(names: list[str]) -> list[results.Round]:
        listed = rounds.variants(names, services > 0)
        way = rounds.inside(field.at, services, path)
        return rounds.measure(field.at, listed, way, mode, count, lasting_s, field.forget_connections)

    label = f"{_services(services)}: {mode}, {_PATHS[path]}, {count} rounds"

    def action() -> str:
        found = results.Traffic(services, path, mode, lasting_s, field.together(label, measure))
        field.into.traffic.append(found)
        return _said(found)

    variants = len(rounds.variants(field.names, services > 0))
    return progress.Step(label, rounds.expected_s(variants, count, lasting_s), action)


def _outside_step(field: fields.Field, services: int, count: int, seconds: float) -> progress.Step:
    def measure(names: list[str]) -> list[results.Round]:
        with contextlib.ExitStack() as stack:
            for of in field.present:
                stack.enter_context(of.beside())
            return node_ports.measure(field.at, names, count, seconds, field.forget_connections)

    label = f"{_services(services)}: NodePorts from outside, {count} rounds"

    def action() -> str:
        found = results.Traffic(services, "outside", "short", seconds, field.together(label, measure))
        field.into.traffic.append(found)
        return _said(found)

    variants = len(node_ports.variants(field.names))
    return progress.Step(label, 5 + rounds.expected_s(variants, count, seconds), action)


def _said(found: results.Traffic) -> str:
    failed = sum(run.failed for each in found.rounds for run in each.runs.values())
    medians = (
        f"{variant} {stats.summary(ratios.ratios(found.rounds, variant)).median:.3f}"
        for variant in found.rounds[0].runs
        if variant not in ("bare", "bare/elsewhere")
    )
    return f"÷ bare: {', '.join(medians)}; {_failures(failed)}"


def _fresh(field: fields.Field, of: contestants.Contestant) -> str:
    return _started(field, starts.fresh(of))


def _compiled(field: fields.Field, of: contestants.Contestant) -> str:
    assert isinstance(of, contestants.Lbproxy)
    return _started(field, starts.compiled(of))


def _adopted(field: fields.Field, of: contestants.Contestant) -> str:
    return _started(field, starts.adopted(of))


def _upgraded(field: fields.Field, of: contestants.Contestant) -> str:
    assert isinstance(of, contestants.Lbproxy)
    return _started(field, starts.upgraded(of))


def _started(field: fields.Field, found: results.Start) -> str:
    field.into.starts.append(found)
    return f"synced after {found.synced_s:.2f} s, {found.cpu_s:.2f} s of CPU, {_failures(found.failed)}"


def _memory(field: fields.Field, of: contestants.Contestant) -> str:
    found = of.memory()
    field.into.memory.append(found)
    parts = [
        ("agent", found.rss), ("BPF maps", sum(found.maps.values())), ("rules", found.rules or 0)
    ]  # fmt: skip
    return ", ".join(f"{what} {size / 1e6:.1f} MB" for what, size in parts if size)


def _programming(field: fields.Field, of: contestants.Contestant, changes: int, churn: float) -> str:
    found = latency.programming(of, changes, churn)
    field.into.programming.append(found)
    p50, p99 = (stats.percentile(found.latency_ms, share) for share in (0.5, 0.99))
    return f"p50 {p50:.2f} ms, p99 {p99:.2f} ms, {found.lost} not seen, {_failures(found.failed)}"


def _stand_in(field: fields.Field, of: contestants.Contestant, changes: int) -> str:
    found = latency.stand_in(of, changes)
    field.into.stand_in.append(found)
    return f"p50 {stats.percentile(found.event_ms, 0.5):.2f} ms"


def _cpu(field: fields.Field, of: contestants.Contestant, changes_per_s: float, seconds: float) -> str:
    found = starts.cpu(of, changes_per_s, seconds)
    field.into.cpu.append(found)
    return f"{found.cpu_s / found.seconds:.2%} of a CPU at {found.changes_per_s:g} changes a second"


def _end(_field: fields.Field, of: contestants.Contestant) -> str:
    of.take_down()
    return "done"


def _failures(count: int) -> str:
    return f"{count} failed"
