"""What interleaved rounds of traffic say: who costs how much against no proxy at all. Pure.

Rates are divided by the mean of the round's two bare ones; bare/again ÷ bare says
how far two runs of the same thing are apart. A variant whose server is on another
node than the one dialled is divided by that server dialled directly.
"""

import collections.abc

from benchmarks import results

BARE = ("bare", "bare/again")
# Variants whose server is on another node than the one that is dialled.
ELSEWHERE = ("remote", "dsr")


def ratios(rounds: collections.abc.Sequence[results.Round], variant: str) -> list[float]:
    """Return a variant's rate ÷ bare, a round each; for "bare/again" ÷ the other bare alone."""
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


def against(rounds: collections.abc.Sequence[results.Round], variant: str, other: str) -> list[float]:
    """Return a variant's rate ÷ another's, a round each."""
    return [each.runs[variant].rate_per_s / each.runs[other].rate_per_s for each in rounds]


def _against_bare(speeds: dict[str, float], variant: str) -> float:
    if variant == "bare/again":
        return speeds[variant] / speeds["bare"]
    if variant.partition("/")[2] in ELSEWHERE:
        return speeds[variant] / speeds["bare/elsewhere"]
    return speeds[variant] / ((speeds["bare"] + speeds["bare/again"]) / 2)
