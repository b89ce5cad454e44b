"""What interleaved rounds of traffic say: who costs how much against no proxy at all. Pure.

Rates are divided by the mean of the round's two bare ones; bare/again ÷ bare says
how far two runs of the same thing are apart. A variant whose server is on another
node than the one dialled is divided by that server dialled directly.
A round without a variant, or in which what it is divided by answered nothing, says
nothing of it and is left out; a variant that answered nothing itself has the ratio 0.
"""

import collections.abc
import statistics

from benchmarks import results

BARE = ("bare", "bare/again")
# Variants whose server is on another node than the one that is dialled.
ELSEWHERE = ("remote", "dsr")


def ratios(rounds: collections.abc.Sequence[results.Round], variant: str) -> list[float]:
    """Return a variant's rate ÷ bare, a round each; for "bare/again" ÷ the other bare alone."""
    speeds = ({name: run.rate_per_s for name, run in each.runs.items()} for each in rounds)
    return _against_bare(speeds, variant)


def thrift(rounds: collections.abc.Sequence[results.Round], variant: str) -> list[float]:
    """Return bare ÷ a variant's CPU time for a request, a round each.

    The same as the ratio of rates where client and server have their CPU to
    themselves, and nearly free of what else runs on it where they do not.
    """
    return _against_bare((_by_cpu(each.runs) for each in rounds), variant)


def _by_cpu(runs: collections.abc.Mapping[str, results.Run]) -> dict[str, float]:
    """Return the requests that a unit of CPU time answers; who answered nothing answers none in any time."""
    return {
        name: 1 / run.cpu_us if run.count else 0.0
        for name, run in runs.items()
        if run.cpu_us > 0 or not run.count
    }


def bare_of(way: str) -> str:
    """Name what a way is divided by that nobody balances."""
    return "bare/elsewhere" if way in ELSEWHERE else BARE[0]


def against(rounds: collections.abc.Sequence[results.Round], variant: str, other: str) -> list[float]:
    """Return a variant's rate ÷ another's, a round each."""
    return [
        each.runs[variant].rate_per_s / each.runs[other].rate_per_s
        for each in rounds
        if variant in each.runs and other in each.runs and each.runs[other].rate_per_s
    ]


def _against_bare(rounds: collections.abc.Iterable[dict[str, float]], variant: str) -> list[float]:
    bare: tuple[str, ...] = BARE
    if variant == "bare/again":
        bare = BARE[:1]
    elif variant.partition("/")[2] in ELSEWHERE:
        bare = (bare_of(variant.partition("/")[2]),)
    return [
        speeds[variant] / statistics.fmean(speeds[each] for each in bare)
        for speeds in rounds
        if variant in speeds and all(speeds.get(each) for each in bare)
    ]
