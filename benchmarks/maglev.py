"""Maglev tables as the agent builds them: how long that takes, how even they are, and what moves.

Every repeat draws another set of backends, so that a spread is that of sets and of
the machine. Pure, but for the clock.
"""

import collections
import collections.abc
import functools
import random
import time

from benchmarks import progress, results, stats
from lbproxy.core import maglev

SIZES = (251, 1_021, 4_093, 16_381, 65_537)  # and those that lbproxy chooses
BACKENDS = (3, 10, 100, 1_000)
WEIGHTS = (1, 2, 5)  # in turn, where weights are not equal
PERCENTS = (1, 5, 10)  # of the backends that leave at once
_POOL = 1 << 16
_FLOWS = 1 << 16  # hashes, evenly spaced, that tables of different sizes are compared by

Table = collections.abc.Sequence[int]  # an index of a backend for each slot
Clock = collections.abc.Callable[[], int]


def sizes(backends: int) -> tuple[int, ...]:
    """Return the numbers of slots to measure with so many backends: those where each has one at least."""
    return tuple(sorted(slots for slots in {*SIZES, maglev.size(backends)} if slots >= backends))


def leaving(backends: int) -> tuple[int, ...]:
    """Return how many of so many backends leave at once: one, and each whole percentage."""
    return tuple(
        sorted({1, *(backends * percent // 100 for percent in PERCENTS if backends * percent % 100 == 0)})
    )


def thresholds(most: int) -> tuple[int, ...]:
    """Return the numbers of backends, `most` at most, that get a greater table than one fewer."""
    return tuple(count for count in range(3, most + 1) if maglev.size(count) != maglev.size(count - 1))


def loads(table: Table, weights: collections.abc.Sequence[int]) -> tuple[float, float]:
    """Return the slots of the most and of the least loaded backend ÷ what its weight, not 0, is due."""
    held = collections.Counter(table)
    due = len(table) / sum(weights)
    found = [held[index] / (due * weight) for index, weight in enumerate(weights)]
    return max(found), min(found)


def moved(before: Table, after: Table, gone: collections.abc.Container[int]) -> float:
    """Return what share of the slots whose backend is not gone has another one afterwards."""
    kept = [(old, new) for old, new in zip(before, after, strict=True) if old not in gone]
    return sum(old != new for old, new in kept) / len(kept)


def by_flow(table: Table, flows: int = _FLOWS) -> list[int]:
    """Return the backend of so many evenly spaced flows, each at the slot that the programs find by hash."""
    return [table[flow * len(table) // flows] for flow in range(flows)]


def measure(slots: int, backends: int, repeats: int, clock: Clock = time.thread_time_ns) -> results.Maglev:
    """Build tables of one size. `clock` is in ns: by default this thread's CPU time."""
    draw = random.Random(f"{slots} {backends}")
    equal = [1] * backends
    mixed = [WEIGHTS[index % len(WEIGHTS)] for index in range(backends)]
    build_ms: list[float] = []
    even: list[float] = []
    weighted: list[float] = []
    shares: dict[int, list[float]] = {count: [] for count in leaving(backends)}
    for _ in range(repeats):
        identities = _identities(draw, backends)
        pairs = _weighted(identities, equal)
        began_ns = clock()
        table = maglev.table(pairs, slots)
        build_ms.append((clock() - began_ns) / 1e6)
        even += loads(table, equal)
        weighted += loads(maglev.table(_weighted(identities, mixed), slots), mixed)
        for count, seen in shares.items():
            gone = set(draw.sample(range(backends), count))
            seen.append(moved(table, maglev.table(_without(pairs, gone), slots), gone))
    return results.Maglev(
        slots=slots,
        backends=backends,
        chosen=maglev.size(backends) == slots,
        build_ms=build_ms,
        most=max(even),
        least=min(even),
        weighted_most=max(weighted),
        weighted_least=min(weighted),
        moved=shares,
    )


def resize(backends: int, repeats: int) -> results.Resized:
    """Take one of so many backends away from a table whose size lbproxy chooses."""
    draw = random.Random(backends)
    seen = []
    for _ in range(repeats):
        pairs = _weighted(_identities(draw, backends), [1] * backends)
        gone = {draw.randrange(backends)}
        before, after = maglev.table(pairs), maglev.table(_without(pairs, gone))
        seen.append(moved(by_flow(before), by_flow(after), gone))
    return results.Resized(backends, len(before), len(after), seen)


def steps(repeats: int, into: results.Results) -> list[progress.Step]:
    """List what to do: a step for each number of backends, and one for what changes the tables' size."""
    listed = [
        progress.Step(
            f"maglev: {backends:,} backends, {repeats} repeats",
            _expected_s(backends, repeats),
            functools.partial(_measure, backends, repeats, into),
        )
        for backends in BACKENDS
    ]
    return [
        *listed,
        progress.Step(
            f"maglev: tables that change their size, {repeats} repeats",
            0.15 * repeats,
            functools.partial(_resize, repeats, into),
        ),
    ]


def _expected_s(backends: int, repeats: int) -> float:
    tables = 2 + len(leaving(backends))
    return 0.7e-6 * repeats * tables * sum(sizes(backends))


def _measure(backends: int, repeats: int, into: results.Results) -> str:
    made = [measure(slots, backends, repeats) for slots in sizes(backends)]
    into.maglev += made
    chosen = next(each for each in made if each.chosen)
    build = stats.summary(chosen.build_ms).median
    worst = max(chosen.moved[1])
    return f"{chosen.slots:,} slots in {build:.1f} ms; one leaves: up to {worst:.1%} of the others' move"


def _resize(repeats: int, into: results.Results) -> str:
    made = [resize(backends, repeats) for backends in thresholds(max(BACKENDS))]
    into.maglev_resized += made
    worst = max(share for each in made for share in each.moved)
    return f"up to {worst:.0%} of flows move where a backend less makes the table smaller"


def _identities(draw: random.Random, count: int) -> list[bytes]:
    """Return so many pods' addresses with a port, as the agent names backends to Maglev."""
    addresses = (
        bytes(10) + b"\xff\xff\x0a\xf4" + number.to_bytes(2, "big")
        for number in draw.sample(range(_POOL), count)
    )
    return [address + (8080).to_bytes(2, "big") for address in addresses]


def _weighted(
    identities: collections.abc.Iterable[bytes], weights: collections.abc.Iterable[int]
) -> list[tuple[bytes, int]]:
    return list(zip(identities, weights, strict=True))


def _without(
    pairs: collections.abc.Iterable[tuple[bytes, int]], gone: collections.abc.Container[int]
) -> list[tuple[bytes, int]]:
    """Take backends out, and leave the others' indexes as they are."""
    return [(identity, 0 if index in gone else weight) for index, (identity, weight) in enumerate(pairs)]
