"""One number of a run, as tables, pages and comparisons need it. Pure."""

import dataclasses
import enum
import math
import typing

from benchmarks import stats, targets

LBPROXY = "lbproxy"
# The column of what nobody balances: bare once more, or the API server stand-in by itself.
CONTROL = "control"


class Group(enum.StrEnum):
    """What a figure is about, as a heading says it."""

    SHORT = "Short connections in the cluster, rate ÷ bare"
    VERSUS = "Connections from outside to NodePorts"
    OTHERS = "Open connections, UDP and throughput, rate ÷ bare"
    PATHS = "Short connections by other ways, rate ÷ bare"
    OUTSIDE = "Connections from outside to NodePorts, rate ÷ dialling the pod"
    ALIKE = "Before anything is programmed anywhere, pod → pod of the same node, rate ÷ bare"
    PROGRAMMING = "A changed slice takes effect"
    START = "Starts"
    FAILED = "Failed connections while it starts over"
    MEMORY = "Memory"
    CPU = "CPU of the agent, of one core"
    PACKETS = "Single packets"
    RATES = "Rates and latencies"
    FAILURES = "Failures"


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """One number of a run."""

    group: Group
    topic: str
    what: str  # of the topic
    services: int
    column: str  # a contestant's name, or CONTROL; of `Group.VERSUS` the one it is compared with
    value: float
    low: float
    high: float
    count: int  # of samples behind it
    margin: float  # how far it may be off, 19 times out of 20, as far as the samples say
    unit: str = ""  # of a ratio none
    more_is_better: bool = True
    target: targets.Target | None = None
    note: str = ""
    warning: str = ""  # what failed among the samples: such a figure meets no target
    travels: bool = True  # means something on another machine as well

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        """What makes it the same figure in another run."""
        return self.group, self.topic, self.what, self.services, self.column

    @property
    def missed_by(self) -> float:
        """How far it is on the wrong side of its target."""
        return self.target.missed_by(self.value) if self.target else 0.0

    @property
    def met(self) -> bool:
        """Whether it is on the right side of its target, with nothing that failed."""
        return self.target is not None and not self.missed_by and not self.warning

    @property
    def verdict(self) -> str:
        """Say whether the target is met, and whether it may be otherwise next time."""
        if self.target is None:
            return ""
        if self.warning and not self.missed_by:
            return f"not met: {self.warning}"
        verdict = f"missed by {with_unit(self.missed_by, self.unit)}" if self.missed_by else "met"
        if 0 < self.margin < math.inf and abs(self.value - self.target.bound) <= self.margin:
            return f"{verdict}, give or take {with_unit(self.margin, self.unit)}"
        return verdict

    @property
    def text(self) -> str:
        """The value, with its unit."""
        return with_unit(self.value, self.unit)

    @property
    def spread(self) -> str:
        """From where to where the middle half of the samples reaches, and what else is to be said."""
        parts = []
        if self.count > 1:
            parts.append(f"{number(self.low, self.unit)} – {number(self.high, self.unit)}")
        return "; ".join([*parts, *filter(None, (self.note, self.warning))])


def number(value: float, unit: str) -> str:
    """Write a number with as many digits as it deserves; a ratio always with three."""
    if math.isinf(value):
        return "never"
    if not unit:
        return f"{value:.3f}"
    if value == int(value) or value >= 100:
        return f"{value:,.0f}"
    if value >= 20:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def with_unit(value: float, unit: str) -> str:
    """Write a number with its unit."""
    said = number(value, unit)
    return said if math.isinf(value) or unit in ("", "failed") else f"{said} {unit}"


class Place(typing.NamedTuple):
    """What a figure is of."""

    group: Group
    topic: str
    what: str
    services: int
    column: str


def summed(place: Place, seen: stats.Summary, noise: float = 0.0, **more: typing.Any) -> Figure:
    """Return a sample's median as a figure; `noise` is the margin of two runs of the same thing."""
    margin = max(seen.margin, noise)
    return Figure(*place, seen.median, seen.low, seen.high, seen.count, margin, **more)


def single(place: Place, value: float, unit: str, **more: typing.Any) -> Figure:
    """Return a value that was taken once as a figure; of all that is so, less is better."""
    return Figure(*place, value, value, value, 1, 0.0, unit, more_is_better=False, **more)
