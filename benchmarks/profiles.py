"""What a run measures, and the steps it consists of."""

import contextlib
import dataclasses
import functools

from benchmarks import (
    bed,
    latency,
    node_ports,
    packets,
    progress,
    ratios,
    report,
    results,
    stage,
    starts,
    stats,
)

# Services beyond which memory, start and latency are worth their time.
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
    starts: int  # of each kind, at the large numbers of services
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
    short_rounds=24,
    short_s=0.3,
    other_rounds=16,
    other_s=0.2,
    others_everywhere=False,
    starts=3,
    changes=30,
    cpu_s=20.0,
    packet_rounds=11,
    packet_services=10_000,
    maglev_repeats=5,
    outside_rounds=10,
    outside_s=0.2,
)
FULL = Profile(
    name="full",
    services=(1, 100, 1_000, 5_000, 10_000, 30_000),
    short_rounds=64,
    short_s=0.4,
    other_rounds=32,
    other_s=0.3,
    others_everywhere=True,
    starts=7,
    changes=100,
    cpu_s=60.0,
    packet_rounds=41,
    packet_services=30_000,
    maglev_repeats=41,
    outside_rounds=40,
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
PROFILES = {profile.name: profile for profile in (QUICK, FULL, SMOKE)}


def steps(profile: Profile, at: stage.Stage, into: results.Results) -> list[progress.Step]:
    """List what to do at every number of services, smallest first."""
    return [step for services in profile.services for step in _at_size(profile, at, into, services)]


def packet_steps(
    profile: Profile, cpu: int, into: results.Results, stack: contextlib.ExitStack
) -> list[progress.Step]:
    """List what to do with single packets; what that needs is up from the first step to the last."""
    at = bed.Bed(profile.packet_services, cpu)
    rounds = profile.packet_rounds

    def load() -> str:
        stack.enter_context(at)
        return f"{profile.packet_services:,} services in the tables"

    def ports() -> str:
        found = packets.ports(at, 4, rounds)
        into.ports.append(found)
        stack.close()
        return f"{found.reached:,} flows from {found.ports:,} ports until one was refused"

    listed = [progress.Step("packets: load the datapath", 4 + profile.packet_services / 5_000, load)]
    for family in (4, 6):
        for proto, name in packets.PROTOCOLS.items():
            action = functools.partial(_packets, at, into, family, proto, rounds)
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


def _at_size(profile: Profile, at: stage.Stage, into: results.Results, services: int) -> list[progress.Step]:
    greatest = max(profile.services)
    last = services == greatest
    thorough = services >= _LARGE or last
    load_s = 1 + services / 3_000  # of the stand-in
    start_s = 4 + services / 3_000
    said = f"{services:,} service{'s' if services > 1 else ''}"

    def step(label: str, expected_s: float, action: functools.partial[str]) -> progress.Step:
        return progress.Step(f"{said}: {label}", expected_s, action)

    listed = [step("fill the API server", load_s, functools.partial(_fill, at, services))]
    listed += [
        step("first start", start_s, functools.partial(_start, at, into, "fresh"))
        for _ in range(profile.starts if thorough else 1)
    ]
    listed.append(step("memory", 1, functools.partial(_memory, at, into)))
    for mode in ratios.MODES:
        rounds, seconds = profile.other_rounds, profile.other_s
        if mode == "short":
            rounds, seconds = profile.short_rounds, profile.short_s
        elif not (profile.others_everywhere or last):
            continue
        expected_s = ratios.expected_s(rounds, seconds)
        traffic = functools.partial(_traffic, at, into, mode, rounds, seconds)
        listed.append(step(f"{mode}, {rounds} rounds", expected_s, traffic))
    if services in (min(profile.services), greatest):
        outside = functools.partial(_outside, at, into, profile.outside_rounds, profile.outside_s)
        expected_s = node_ports.expected_s(profile.outside_rounds, profile.outside_s)
        listed.append(step(f"NodePorts from outside, {profile.outside_rounds} rounds", expected_s, outside))
    if thorough:
        for churn in (0, 10):
            latencies = functools.partial(_programming, at, into, profile.changes, churn)
            label = f"{profile.changes} changes seen by a client, {churn} others a second"
            listed.append(step(label, 2 + profile.changes * 0.15, latencies))
        listed.append(
            step("the stand-in by itself", 2, functools.partial(_stand_in, at, into, profile.changes))
        )
        for changes_per_s in (0, 1):
            spent = functools.partial(_cpu, at, into, changes_per_s, profile.cpu_s)
            listed.append(step(f"CPU at {changes_per_s} changes a second", profile.cpu_s, spent))
        listed += [
            step("restart", start_s, functools.partial(_start, at, into, "adopted"))
            for _ in range(profile.starts)
        ]
    return listed


def _fill(at: stage.Stage, services: int) -> str:
    at.fill(services)
    return at.url


def _start(at: stage.Stage, into: results.Results, how: str) -> str:
    found = starts.fresh(at) if how == "fresh" else starts.adopted(at)
    into.starts.append(found)
    return f"synced after {found.synced_s:.2f} s, {found.cpu_s:.2f} s of CPU, {_failures(found.failed)}"


def _memory(at: stage.Stage, into: results.Results) -> str:
    assert at.agent is not None
    found = at.agent.memory(at.services, at.pins)
    into.memory.append(found)
    return f"agent {found.rss / 1e6:.1f} MB, BPF maps {sum(found.maps.values()) / 1e6:.1f} MB"


def _traffic(at: stage.Stage, into: results.Results, mode: ratios.Mode, rounds: int, seconds: float) -> str:
    found = ratios.measure(at, mode, rounds, seconds)
    into.traffic.append(found)
    said = [
        f"{variant} ÷ bare {stats.summary(ratios.ratios(found.rounds, variant)).median:.3f}"
        for variant in ("service", "direct", "bare_again")
    ]
    failed = sum(run.failed for each in found.rounds for run in each.runs.values())
    return ", ".join([*said, _failures(failed)])


def _outside(at: stage.Stage, into: results.Results, rounds: int, seconds: float) -> str:
    found = node_ports.measure(at, rounds, seconds)
    into.outside.append(found)
    said = [
        f"{variant} ÷ direct {stats.summary(node_ports.compared(found.rounds, variant)).median:.3f}"
        for variant in node_ports.AGAINST
    ]
    failed = sum(run.failed for each in found.rounds for run in each.runs.values())
    return ", ".join([*said, _failures(failed)])


def _programming(at: stage.Stage, into: results.Results, changes: int, churn: float) -> str:
    found = latency.programming(at, changes, churn)
    into.programming.append(found)
    p50, p99 = (stats.percentile(found.latency_ms, share) for share in (0.5, 0.99))
    return f"p50 {p50:.2f} ms, p99 {p99:.2f} ms, {found.lost} not seen, {_failures(found.failed)}"


def _stand_in(at: stage.Stage, into: results.Results, changes: int) -> str:
    found = latency.stand_in(at, changes)
    into.stand_in.append(found)
    return f"p50 {stats.percentile(found.event_ms, 0.5):.2f} ms"


def _cpu(at: stage.Stage, into: results.Results, changes_per_s: float, seconds: float) -> str:
    found = starts.cpu(at, changes_per_s, seconds)
    into.cpu.append(found)
    return f"{found.cpu_s / found.seconds:.2%} of a CPU at {found.changes_per_s:g} changes a second"


def _failures(count: int) -> str:
    return f"{count} failed"
