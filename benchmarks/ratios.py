"""Interleaved rounds of traffic: what a service address costs against no proxy at all.

Each round runs every variant once, in an order that rotates from round to round,
each with a server and a client of its own on one CPU, so that no run inherits
anything from the one before. All runs of a round do the same work but for what is
compared:

| variant | client and server | client dials |
|---|---|---|
| bare, bare_again | in a cgroup without hooks | an address of the server's pod |
| direct | in the agent's cgroup | the same address |
| service | in the agent's cgroup | the ClusterIP, whose endpoints are four addresses of that pod |

Rates are divided by the mean of the round's two bare ones; bare_again ÷ bare says
how far two runs of the same thing are apart.
"""

import collections.abc
import typing

from benchmarks import cluster, process, results, stage
from lbproxy.lab import traffic

Mode = typing.Literal["short", "established", "udp-new", "udp-established"]
MODES: tuple[Mode, ...] = ("short", "established", "udp-established", "udp-new")
VARIANTS = ("bare", "direct", "bare_again", "service")
BARE = ("bare", "bare_again")
# What starting and ending a client and a server takes, beside the time that counts.
OVERHEAD_S = 0.1
WARM_UP_S = 0.3


def expected_s(rounds: int, seconds: float) -> float:
    """Return about how long `measure` takes."""
    return len(VARIANTS) * (rounds * (seconds + OVERHEAD_S) + WARM_UP_S + OVERHEAD_S)


def order(number: int) -> tuple[str, ...]:
    """Return the order of variants in a round: each comes first in turn, then in turn the other way round."""
    turn = number % len(VARIANTS)
    rotated = (*VARIANTS[turn:], *VARIANTS[:turn])
    return rotated if number // len(VARIANTS) % 2 == 0 else rotated[::-1]


def measure(at: stage.Stage, mode: Mode, rounds: int, seconds: float) -> results.Traffic:
    """Run the rounds, after one of warm-up that does not count."""
    for variant in VARIANTS:
        _run(at, variant, mode, WARM_UP_S)
    made = [
        results.Round({variant: _run(at, variant, mode, seconds) for variant in order(number)})
        for number in range(rounds)
    ]
    return results.Traffic(at.services, mode, seconds, made)


def _run(at: stage.Stage, variant: str, mode: Mode, seconds: float) -> results.Run:
    hooked = variant not in BARE
    before_s = process.ended_children_cpu_s()
    server = at.lab.serve(at.measured_at, [stage.PORT], cpu=at.cpu, cgroup=hooked)
    try:
        address, port = stage.place_of(at.measured_at).addresses[0], stage.PORT
        if variant == "service":
            address, port = cluster.MEASURED_IP, cluster.MEASURED_PORT
        client = at.lab.client(
            stage.CLIENT, mode, address, port, cgroup=hooked, seconds=seconds, cpu=at.cpu, connections=1
        )
        seen = client.result()
    finally:
        server.stop()
    return run_of(seen, process.ended_children_cpu_s() - before_s)


def run_of(seen: traffic.Result, spent_s: float) -> results.Run:
    """Return what a client saw, and the CPU time that it and its server have had, as a run."""
    return results.Run(
        rate_per_s=seen.per_second,
        p50_us=seen.latency_us.p50,
        p99_us=seen.latency_us.p99,
        cpu_us=1e6 * spent_s / max(1, seen.count),
        count=seen.count,
        failed=seen.failed,
        failures=seen.failures,
    )


def ratios(rounds: collections.abc.Sequence[results.Round], variant: str) -> list[float]:
    """Return a variant's rate ÷ bare, a round each; for `bare_again` ÷ the other bare alone."""
    return [
        _against_bare({name: run.rate_per_s for name, run in each.runs.items()}, variant) for each in rounds
    ]


def thrift(rounds: collections.abc.Sequence[results.Round], variant: str) -> list[float]:
    """Return bare ÷ a variant's CPU time for a request, a round each.

    The same as the ratio of rates where client and server have their CPU to
    themselves, and nearly free of what else runs on it where they do not.
    """
    return [
        _against_bare({name: 1 / run.cpu_us for name, run in each.runs.items()}, variant) for each in rounds
    ]


def _against_bare(speeds: dict[str, float], variant: str) -> float:
    bare = speeds["bare"] if variant == "bare_again" else (speeds["bare"] + speeds["bare_again"]) / 2
    return speeds[variant] / bare
