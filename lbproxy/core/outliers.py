"""Which backends of a service port fail more than the others, and how long they are left out.

Counts come from the kernel, as they stand, every second or so; the time is given. A backend is
ejected when it had enough failures within the window, and when a share of its connections
failed that is clearly above that of all the others that are in use. So nobody is
ejected where all fail alike: then it is not the backend. At most a share of them is out,
never the last one.

After its time a backend is back, on trial for a window: the next failure sends
it out again, for twice as long. When those that are left fail too, all come back.
"""

import collections
import typing
from collections.abc import Iterable, Mapping

from lbproxy.core import ejection, outcomes, topology

_WORSE_BY: typing.Final = 0.25  # failed connections, as a share, above the others'
_LONGEST_TIMES_BASE: typing.Final = 32.0
_BOTH_BAD: typing.Final = 0.5  # those that are left fail as well


class Sample(typing.NamedTuple):
    """What has been counted of a backend so far; another id is another backend at the same place."""

    id: int
    fared: outcomes.Outcomes


class Change(typing.NamedTuple):
    """A backend that is ejected, until a time on the given clock, or back."""

    place: topology.Place
    ejected: bool
    reason: str
    until_s: float = 0.0


class _Backend:
    """What is known of one of them."""

    def __init__(self) -> None:
        self.last: Sample | None = None
        self.steps: collections.deque[tuple[float, int, int]] = (
            collections.deque()
        )  # time, attempts, failures
        self.attempts = 0
        self.failures = 0
        self.times = 0  # how often it has been out of late
        self.until_s: float | None = None  # where it is out
        self.trial_until_s = 0.0
        self.took_s = 0.0  # how long it was out the last time
        self.back_s = 0.0

    def add(self, sample: Sample, now_s: float, window_s: float) -> None:
        before, self.last = self.last, sample
        if before is not None and before.id == sample.id:
            new = sample.fared.since(before.fared)
            if new.attempts or new.failed:
                self.steps.append((now_s, new.attempts, new.failed))
                self.attempts += new.attempts
                self.failures += new.failed
        while self.steps and self.steps[0][0] <= now_s - window_s:
            _, attempts, failures = self.steps.popleft()
            self.attempts -= attempts
            self.failures -= failures

    def latest(self, enough: int) -> tuple[int, int]:
        """Attempts and failures of the latest steps that have enough failures between them."""
        attempts = failures = 0
        for _, tried, failed in reversed(self.steps):
            attempts += tried
            failures += failed
            if failures >= enough:
                break
        return attempts, failures

    def forget_counts(self) -> None:
        self.steps.clear()
        self.attempts = self.failures = 0

    @property
    def is_out(self) -> bool:
        return self.until_s is not None


def _ratio(attempts: int, failures: int) -> float:
    """The share that failed: of the attempts, but more open connections than these may have ended."""
    return failures / max(attempts, failures) if failures else 0.0


class Outliers:
    """The backends of one service port."""

    def __init__(self, how: ejection.Ejection) -> None:
        self.how = how
        self._known: dict[topology.Place, _Backend] = {}
        self._calm_until_s = 0.0

    @property
    def ejected(self) -> list[topology.Place]:
        """Who is out now."""
        return [place for place, one in self._known.items() if one.is_out]

    def was_ejected(self, place: topology.Place, now_s: float) -> None:
        """Take over a backend that an earlier agent ejected: its time begins anew."""
        self._eject(self._known.setdefault(place, _Backend()), now_s)

    def look(self, samples: Mapping[topology.Place, Sample], now_s: float) -> list[Change]:
        """Judge the ready backends by what has been counted; returns what is to change, in order.

        Who is not among them any more is forgotten, and is not out any more.
        """
        changes = []
        for place in sorted(self._known.keys() - samples.keys()):
            if self._known.pop(place).is_out:
                changes.append(Change(place, False, "it is not ready any more"))
        for place, sample in samples.items():
            self._known.setdefault(place, _Backend()).add(sample, now_s, self.how.window_s)
        changes += [self._back(place, now_s, "its time is over") for place in self._due(now_s)]
        if self.ejected and self._rest_fails():
            why = "the others fail as well"
            changes += [self._back(place, now_s, why) for place in self.ejected]
            # Until something is known of all of them, nobody is an outlier.
            self._calm_until_s = now_s + self.how.window_s
        if now_s >= self._calm_until_s:
            changes += self._worst(now_s)
        return changes

    def _due(self, now_s: float) -> list[topology.Place]:
        return [p for p, one in self._known.items() if one.until_s is not None and one.until_s <= now_s]

    def _rest_fails(self) -> bool:
        latest = [one.latest(self.how.failures) for one in self._known.values() if not one.is_out]
        attempts, failures = (sum(counts) for counts in zip(*latest, strict=True)) if latest else (0, 0)
        return failures >= self.how.failures and _ratio(attempts, failures) >= _BOTH_BAD

    def _worst(self, now_s: float) -> list[Change]:
        """Eject one after another, the worst first: each is compared with those that are left."""
        changes = []
        while len(self.ejected) < self._most:
            suspects = [found for place in self._known if (found := self._outlier(place, now_s))]
            if not suspects:
                break
            _, failures, attempts, place = max(suspects)
            one = self._known[place]
            reason = f"{failures} of its last {max(attempts, failures)} connections failed"
            self._eject(one, now_s)
            changes.append(Change(place, True, reason, one.until_s or now_s))
        return changes

    @property
    def _most(self) -> int:
        total = len(self._known)
        return min(total - 1, max(1, total * self.how.share_percent // 100))

    def _outlier(self, place: topology.Place, now_s: float) -> tuple[float, int, int, topology.Place] | None:
        """How bad a backend is, if it is one: the share, failures and attempts that tell, and itself."""
        one = self._known[place]
        enough = 1 if now_s < one.trial_until_s else self.how.failures
        if one.is_out or one.failures < enough:
            return None
        rest = _sums(other for where, other in self._known.items() if where != place and not other.is_out)
        if not any(rest) and one.failures < 2 * enough:
            # Nothing is known of the others, as at the beginning, or where clients keep to one backend.
            return None
        # The others by all that is known of them, this one by what it does now.
        attempts, failures = one.latest(enough)
        share = _ratio(attempts, failures)
        if share < _ratio(*rest) + _WORSE_BY:
            return None
        return share, failures, attempts, place

    def _eject(self, one: _Backend, now_s: float) -> None:
        # Who has done well for as long as it was out begins anew.
        well = now_s - one.back_s > max(one.took_s, self.how.window_s)
        one.times = 1 if well else one.times + 1
        one.took_s = self.how.base_s * min(2.0 ** (one.times - 1), _LONGEST_TIMES_BASE)
        one.until_s = now_s + one.took_s
        one.forget_counts()

    def _back(self, place: topology.Place, now_s: float, reason: str) -> Change:
        one = self._known[place]
        one.until_s = None
        one.back_s = now_s
        one.trial_until_s = now_s + self.how.window_s
        one.forget_counts()
        return Change(place, False, reason)


def _sums(backends: Iterable[_Backend]) -> tuple[int, int]:
    attempts = failures = 0
    for one in backends:
        attempts += one.attempts
        failures += one.failures
    return attempts, failures
