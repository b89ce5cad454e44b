"""Maglev lookup tables: backends and weights to slots, the same on every node.

Source: Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load
Balancer", NSDI 2016, section 3.4. A table depends on nothing but the set of
(identity, weight) pairs: not on their order, the process or the machine.
"""

import array
import hashlib
import heapq
import itertools
import typing
from collections.abc import Iterator, Sequence

# Primes, so that every step size visits every slot.
SIZES = (251, 1021, 4093, 16381, 65521)
LARGEST = SIZES[-1]
SLOTS_PER_BACKEND = 100  # keeps the difference between equal backends at 1 %


class _Walk(typing.NamedTuple):
    """The order in which a backend asks for slots: `start`, then every `step` onwards."""

    start: int
    step: int


def size(backends: int) -> int:
    """Return how many slots a table of this many backends has."""
    return next((prime for prime in SIZES if prime >= SLOTS_PER_BACKEND * backends), LARGEST)


def table(backends: Sequence[tuple[bytes, int]], slots: int | None = None) -> "array.array[int]":
    """Return a table of indexes into `backends`, each an (identity, weight) pair.

    It has `slots` slots, a prime, or by default as many as `size` says. Identities are
    distinct. Slots go by weight: with W the sum of the weights and M slots, backend i
    of n has at most M·w/W + 1 and more than M·w/W - n·w/W; equal weights differ by at
    most one. A backend of weight 0 has none, any other at least one, where there are
    as many. One backend needs one slot; more backends than the largest table has slots
    have one each, whatever their weights. Raises ValueError for a negative weight.
    """
    if any(weight < 0 for _, weight in backends):
        raise ValueError("a backend's weight is negative")
    order = sorted((identity, index) for index, (identity, weight) in enumerate(backends) if weight)
    indexes = [index for _, index in order]
    if len(indexes) < 2 or len(indexes) > LARGEST:
        return array.array("I", indexes)
    slots = slots or size(len(indexes))
    walks = [_walk(identity, slots) for identity, _ in order]
    weights = [backends[index][1] for index in indexes]
    equal = min(weights) == max(weights)
    turns = itertools.cycle(range(len(weights))) if equal else _turns(weights)
    return array.array("I", map(indexes.__getitem__, _fill(slots, walks, turns)))


def _walk(identity: bytes, slots: int) -> _Walk:
    digest = hashlib.blake2b(identity, digest_size=16).digest()
    start = int.from_bytes(digest[:8], "big") % slots
    return _Walk(start, int.from_bytes(digest[8:], "big") % (slots - 1) + 1)


def _fill(slots: int, walks: Sequence[_Walk], turns: Iterator[int]) -> list[int]:
    filled: list[int | None] = [None] * slots
    at = [walk.start for walk in walks]
    steps = [walk.step for walk in walks]
    for backend in itertools.islice(turns, slots):
        slot = at[backend]
        if filled[slot] is not None:
            step = steps[backend]
            while filled[slot] is not None:
                slot = (slot + step) % slots
        filled[slot] = backend
        at[backend] = slot
    return typing.cast(list[int], filled)


def _turns(weights: Sequence[int]) -> Iterator[int]:
    """Yield backends in proportion to their weights, each once before any twice.

    A backend's turn number k is due at k / weight (Adams' divisor method). IEEE 754
    division is exact to the same bit everywhere, and ties go by position.
    """
    due = [(0.0, backend, 0) for backend in range(len(weights))]
    while True:
        _, backend, taken = due[0]
        yield backend
        heapq.heapreplace(due, ((taken + 1) / weights[backend], backend, taken + 1))
