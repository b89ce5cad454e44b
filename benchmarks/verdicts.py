"""How many of a run's targets are met, so that no table that leaves lines out hides one that is not. Pure."""

import collections.abc
import dataclasses
import math
import typing

from benchmarks import figures, packet_rows, results, tables
from benchmarks.figure import Figure, Group

HEADING = "Targets"
SAID = (
    "Every figure that a target is set for, also those that only docs/benchmarks.md shows. *Within the "
    "noise* are those that are missed by no more than the margin of their median."
)


class Verdict(typing.NamedTuple):
    """Whether one target is met."""

    group: Group
    topic: str
    met: bool
    in_noise: bool  # missed by no more than the figure's margin


@dataclasses.dataclass(slots=True)
class Count:
    """How many targets of one kind there are."""

    met: int = 0
    missed: int = 0
    in_noise: int = 0  # of those missed

    def add(self, one: Verdict) -> None:
        """Count one more."""
        self.met += one.met
        self.missed += not one.met
        self.in_noise += one.in_noise


def verdicts(found: results.Results) -> collections.abc.Iterator[Verdict]:
    """Yield a verdict for each target of a run."""
    for figure in figures.figures(found):
        if figure.target is not None:
            yield Verdict(figure.group, _topic(figure), figure.met, _in_noise(figure))
    for line in packet_rows.lines(found):
        if line.target is not None:
            missed = line.target.missed_by(line.worst)
            yield Verdict(Group.PACKETS, str(Group.PACKETS), not missed, False)


def _topic(figure: Figure) -> str:
    """A line of its own where one group has several kinds of traffic; of the others the group says enough."""
    if figure.group in (Group.SHORT, Group.OTHERS, Group.PATHS):
        return f"{figure.topic}, {figure.what}"
    return str(figure.group)


def _in_noise(figure: Figure) -> bool:
    return 0 < figure.missed_by <= figure.margin < math.inf and not figure.warning


def counts(found: results.Results) -> dict[str, Count]:
    """Count by what it is about, in the order of the tables."""
    counted: dict[str, Count] = {}
    for one in sorted(verdicts(found), key=lambda one: list(Group).index(one.group)):
        counted.setdefault(one.topic, Count()).add(one)
    return counted


def table(found: results.Results) -> tables.Table:
    """Return the counts as a table, with a last line for all of them."""
    counted = counts(found)
    total = Count()
    for one in counted.values():
        total.met += one.met
        total.missed += one.missed
        total.in_noise += one.in_noise
    rows = [_row(what, count) for what, count in counted.items()]
    return tables.Table(
        ("what", "met", "missed", "of these within the noise"), [*rows, _row("all of them", total)]
    )


def _row(what: str, count: Count) -> tuple[tables.Cell, ...]:
    look = tables.Look.MISSED if count.missed else tables.Look.MET
    missed = tables.Cell(str(count.missed), look)
    return tables.Cell(what), tables.Cell(str(count.met)), missed, tables.Cell(str(count.in_noise))


def judged(found: results.Results) -> bool:
    """Whether anything of a run has a target: figures of lbproxy alone do."""
    return any(True for _ in verdicts(found))
