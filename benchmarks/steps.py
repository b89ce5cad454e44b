"""The steps that a run consists of, in their order, each with how long it is expected to take."""

import collections.abc
import contextlib
import functools

from benchmarks import (
    bed,
    contestants,
    fields,
    latency,
    node_ports,
    packets,
    profiles,
    progress,
    ratios,
    remarks,
    results,
    rounds,
    starts,
    stats,
)

# Services beyond which start and latency are worth their time.
_LARGE = 10_000
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


def of_cluster(profile: profiles.Profile, field: fields.Field) -> list[progress.Step]:
    """List what to do: with nothing programmed anywhere, then at every number of services, smallest first."""
    count, seconds = profile.other_rounds, profile.other_s
    listed = [_traffic_step(field, 0, "pod", "short", count, seconds)]
    return listed + [step for services in profile.services for step in _at_size(profile, field, services)]


def of_packets(
    profile: profiles.Profile, cpu: int, into: results.Results, stack: contextlib.ExitStack
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
    busy = f"; OTHERS HAD {others:.0%} OF THE CPUS: TOO BUSY" if others > remarks.TOO_BUSY else ""
    return ", ".join(said) + busy


def _at_size(profile: profiles.Profile, field: fields.Field, services: int) -> list[progress.Step]:
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
        # Before there is traffic, whose flows and outcomes an agent looks after for a while.
        if of.real and (thorough or profile.everywhere):
            for changes_per_s in (0, 1, 10):
                spent = functools.partial(_cpu, changes_per_s=changes_per_s, seconds=profile.cpu_s)
                add(of, f"CPU at {changes_per_s} changes a second", profile.cpu_s, spent)
    count, seconds = profile.short_rounds, profile.short_s
    listed.append(_traffic_step(field, services, "pod", "short", count, seconds))
    if profile.everywhere or services == greatest:
        listed += [
            _traffic_step(field, services, path, mode, profile.other_rounds, profile.other_s)
            for path, mode in _OTHERS
        ]
    if profile.everywhere or services in (least, greatest):
        listed.append(_outside_step(field, services, profile.outside_rounds, profile.outside_s))
    for of in field.who:
        if thorough or profile.everywhere:
            # Rules that are generated are those of one change: nobody is there whom others would keep busy.
            for churn in (0, 10) if of.real else (0,):
                label = f"{profile.changes} changes seen by a client, {churn} others a second"
                latencies = functools.partial(_programming, changes=profile.changes, churn=churn)
                add(of, label, 2 + profile.changes * (0.05 + sum(of.pause_s) / 2), latencies)
        if thorough and of.real:
            _at_length(profile, of, services, add)
        add(of, "end", 1, _end)
    return listed


def _at_length(profile: profiles.Profile, of: contestants.Contestant, services: int, add: Adder) -> None:
    """Add what only an agent can be asked."""
    if of.name == contestants.Lbproxy.name:
        stand_in = functools.partial(_stand_in, changes=profile.changes)
        add(of, "the API server stand-in by itself", 2, stand_in)
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
    if not found.latency_ms:
        return f"none of {found.lost} changes was seen"
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
