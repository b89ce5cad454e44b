"""What the demo has to show: connections by backend over time, and what has happened.

Pure: it is told of each interval of traffic and of each moment, and only counts.
"""

import collections.abc
import dataclasses
import enum

from lbproxy.lab import traffic

SLOT_MS = 100  # the history's resolution
RATE_SLOTS = 5  # a rate is over half a second


class State(enum.StrEnum):
    """What has become of a backend."""

    SERVING = "serving"
    REMOVED = "removed"
    STOPPED = "stopped"


@dataclasses.dataclass(slots=True)
class Backend:
    """One backend and the connections it got; times are of the monotonic clock, in seconds."""

    name: str
    node: str
    state: State = State.SERVING
    total: int = 0
    history: dict[int, int] = dataclasses.field(default_factory=dict)  # connections by slot
    last_seen_s: float = 0.0
    first_seen_s: float | None = None  # since `forget`
    passed_over: int = 0  # connections that others got since the last one here

    def count(self, slot: int, connections: int, others: int, now_s: float) -> None:
        """Take in one interval."""
        if not connections:
            self.passed_over += others
            return
        self.total += connections
        self.history[slot] = self.history.get(slot, 0) + connections
        self.last_seen_s = now_s
        self.passed_over = 0
        if self.first_seen_s is None:
            self.first_seen_s = now_s

    def forget(self) -> None:
        """Begin anew to look for the first connection."""
        self.first_seen_s = None


@dataclasses.dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened, `at_s` seconds after traffic began."""

    at_s: float
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One line of the result."""

    what: str
    found: str
    ok: bool = True


@dataclasses.dataclass(slots=True)
class Scene:
    """All there is to see."""

    backends: list[Backend]
    title: str = ""
    now: str = ""
    slot: int = 0  # the latest
    connections: int = 0
    failures: dict[str, int] = dataclasses.field(default_factory=dict)
    moments: list[Moment] = dataclasses.field(default_factory=list)
    findings: list[Finding] = dataclasses.field(default_factory=list)

    def __getitem__(self, name: str) -> Backend:
        """Return the backend of this name."""
        return next(backend for backend in self.backends if backend.name == name)

    @property
    def failed(self) -> int:
        """How many connections failed."""
        return sum(self.failures.values())

    @property
    def elapsed_s(self) -> float:
        """How long traffic has been running, by its own clock."""
        return (self.slot + 1) * SLOT_MS / 1000 if self.connections else 0.0

    @property
    def succeeded(self) -> bool:
        """Whether traffic flowed, nothing failed and all was found as it should be."""
        return self.connections > 0 and not self.failed and all(finding.ok for finding in self.findings)

    def count(self, seen: traffic.Progress, now_s: float) -> None:
        """Take in what the client saw in one interval, told of at `now_s`."""
        self.slot = max(0, seen.t_ms - 1) // SLOT_MS
        self.connections += seen.count
        for name, times in seen.failures.items():
            self.failures[name] = self.failures.get(name, 0) + times
        for backend in self.backends:
            own = seen.servers.get(backend.name, 0)
            backend.count(self.slot, own, seen.count - own, now_s)

    def happened(self, text: str) -> None:
        """Note what has just happened."""
        self.now = text
        self.moments.append(Moment(self.elapsed_s, text))

    def rate(self, backend: Backend) -> float:
        """Return how many connections a second this backend gets now."""
        # The latest slot is still filling.
        slots = range(max(0, self.slot - RATE_SLOTS), max(1, self.slot))
        return sum(backend.history.get(slot, 0) for slot in slots) * 1000 / (SLOT_MS * len(slots))

    def share(self, backend: Backend) -> float:
        """Return which part of all connections this backend got."""
        return backend.total / self.connections if self.connections else 0.0


def condensed(history: collections.abc.Mapping[int, int], slots: int, columns: int) -> list[float]:
    """Return connections a slot over the first `slots` slots, averaged so as to fit into `columns`."""
    width = -(-slots // columns) if slots else 1
    spans = (range(first, min(first + width, slots)) for first in range(0, slots, width))
    return [sum(history.get(slot, 0) for slot in span) / len(span) for span in spans]
