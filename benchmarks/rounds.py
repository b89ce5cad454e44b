"""Interleaved rounds of traffic.

Each round runs every variant once, in an order that rotates from round to round,
each with a server and a client of its own on one CPU, so that no run inherits
anything from the one before. All runs of a round do the same work but for what is
compared. In the cluster (`inside`):

| variant | where | client dials |
|---|---|---|
| bare, bare/again | a node where nothing is programmed | an address of the server's pod |
| NAME/direct | the contestant's node | the same |
| NAME/service | the contestant's node | a service whose endpoints are four addresses of that pod |

The client is in a pod ("pod"), or on the node itself ("node"), and the server in a pod of the
same node; or the client is in a pod and the server in one of another node ("remote").
"""

import collections.abc
import typing

from benchmarks import arena, cluster, results
from lbproxy.lab import traffic

Mode = typing.Literal["short", "established", "udp-new", "udp-established", "bulk"]
Path = typing.Literal["pod", "node", "remote"]
# What starting and ending a client and a server takes, beside the time that counts.
OVERHEAD_S = 0.1
WARM_UP_S = 0.3
# UDP sockets by the thousand fill a connection tracker; longer runs would meet their own old entries.
UDP_NEW_S = 0.2


class VariantError(arena.BenchError):
    """A run of one variant failed; it says whose."""

    def __init__(self, variant: str, why: Exception | str) -> None:
        super().__init__(f"{variant}: {why}")
        self.name = variant.partition("/")[0]


class Way(typing.NamedTuple):
    """What one run does: who serves, who asks, and what it dials."""

    server: str
    client: str
    address: str
    port: int


def variants(names: collections.abc.Iterable[str], services: bool = True) -> tuple[str, ...]:
    """List the variants of a round inside; without `services` nothing is dialled but pods."""
    kinds = ("service", "direct") if services else ("direct",)
    return with_bare([f"{name}/{what}" for name in names for what in kinds])


def with_bare(others: collections.abc.Sequence[str]) -> tuple[str, ...]:
    """Add the two bare ones, half a round apart.

    So their mean is of the whole round, and they differ by as much as the machine changes within one.
    """
    half = len(others) // 2
    return ("bare", *others[:half], "bare/again", *others[half:])


def order(listed: collections.abc.Sequence[str], number: int) -> tuple[str, ...]:
    """Return the order of variants in a round: each comes first in turn, then in turn the other way round."""
    turn = number % len(listed)
    rotated = (*listed[turn:], *listed[:turn])
    return rotated if number // len(listed) % 2 == 0 else rotated[::-1]


def expected_s(count: int, rounds: int, seconds: float) -> float:
    """Return about how long `measure` takes with so many variants."""
    return count * (rounds * (seconds + OVERHEAD_S) + WARM_UP_S + OVERHEAD_S)


def measure(
    at: arena.Arena,
    listed: collections.abc.Sequence[str],
    way: collections.abc.Callable[[str, int], Way],
    mode: Mode,
    count: int,
    seconds: float,
    before_each: collections.abc.Callable[[], None],
) -> list[results.Round]:
    """Run the rounds, after one of warm-up that does not count; `way` is of a variant in a round.

    VariantError where one can not be run, or reaches somebody else.
    """

    def one(variant: str, number: int, lasting_s: float) -> results.Run:
        try:
            return run(at, way(variant, number), mode, lasting_s)
        except (arena.BenchError, OSError, RuntimeError) as error:
            raise VariantError(variant, error) from error

    before_each()
    for variant in listed:
        one(variant, 0, min(WARM_UP_S, seconds))
    made = []
    for number in range(count):
        before_each()
        made.append(
            results.Round({variant: one(variant, number, seconds) for variant in order(listed, number)})
        )
    return made


def inside(at: arena.Arena, services: int, path: Path) -> collections.abc.Callable[[str, int], Way]:
    """Return the ways of traffic inside the cluster."""

    def way(variant: str, number: int) -> Way:
        name, _, what = variant.partition("/")
        site = at.sites[name]
        copy = number % max(1, cluster.copies(services))
        if path == "remote":
            server, direct, service = at.far, at.lab[at.far].ipv4, cluster.remote_ip(copy)
        else:
            server = site.servers[0]
            direct = site.place_of(server).addresses[number % cluster.ENDPOINTS]
            service = cluster.measured_ip(copy)
        client = site.node if path == "node" else site.client
        if what == "service":
            return Way(server, client, service, cluster.MEASURED_PORT)
        return Way(server, client, direct, arena.DIRECT_PORT)

    return way


def run(at: arena.Arena, way: Way, mode: Mode, seconds: float) -> results.Run:
    """Make one run; BenchError where somebody else than the server answered."""
    server = at.lab.serve(way.server, arena.PORTS, cpu=at.cpu)
    try:
        client = at.lab.client(
            way.client, mode, way.address, way.port, seconds=seconds, cpu=at.cpu, connections=1
        )
        seen = client.result()
    finally:
        served = server.stop()
    strangers = sum(count for who, count in seen.servers.items() if who != way.server)
    if strangers:
        raise arena.BenchError(f"{way.address}:{way.port}: {strangers} answers of others: {seen.servers}")
    return run_of(seen, served)


def run_of(seen: traffic.Result, served: traffic.Served) -> results.Run:
    """Put together what a client saw, and what it and its server spent on it, their start left out."""
    spent = traffic.CpuTime(seen.cpu_s.user + served.cpu_s.user, seen.cpu_s.system + served.cpu_s.system)
    return results.Run(
        rate_per_s=seen.bytes_per_second / 1e6 if seen.bytes else seen.per_second,
        p50_us=seen.latency_us.p50,
        p99_us=seen.latency_us.p99,
        cpu_us=1e6 * (spent.user + spent.system) / max(1, seen.count),
        own_share=spent.user_share,
        count=seen.count,
        failed=seen.failed,
        failures=seen.failures,
    )
