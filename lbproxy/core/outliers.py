"""Which backends of a service port fail more than the others, and how long they are left out.

Counts come from the kernel, as they stand, every second or so; the time is given. A backend is
ejected when it had enough failures within the window, when a share of its connections
failed that is clearly above that of all the others that are in use, and when so many failures
are no chance at the others' rate. So nobody is
ejected where all fail alike: then it is not the backend. At most a share of them is out,
never the last one, and whom probes of this node have found down is out already.

After its time a backend is back, on trial for a window: the next failure sends
it out again, for twice as long. When those that are left fail too, all come back.
"""

import collections
import math
import typing
from collections.abc import Mapping

from lbproxy.core import ejection, outcomes, topology

_WORSE_BY: typing.Final = 0.25  # failed connections, as a share, above the others'
_LONGEST_TIMES_BASE: typing.Final = 32.0
_BOTH_BAD: typing.Final = 0.5  # those that are left fail as well
_NO_CHANCE: typing.Final = 1e-4  # a thousand backends are looked at every second
_WEAK: typing.Final = 1e-3  # of a sum: smaller terms do not matter


class Sample(typing.NamedTuple):
    """What has been counted of a backend so far; another id is another backend at the same place."""

    id: int
    fared: outcomes.Outcomes
    down: bool = False  # probes speak against it: others are used in its place
    clients: ejection.Clients = ejection.Clients.NODE  # whose connections have been counted


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
        self.why = ""  # it is out
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
        if before is not None and before.clients is not sample.clients:
            # What others counted says nothing of these.
            self.forget_counts()
            before = None
        # Counts that went back are of an older copy of the kernel's table: they begin anew.
        if before is not None and before.id == sample.id and not sample.fared.is_before(before.fared):
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

    @property
    def is_used(self) -> bool:
        """Whether new connections come to it."""
        return not self.is_out and not (self.last is not None and self.last.down)


class _Suspect(typing.NamedTuple):
    """One that fails: the share, failures and attempts that tell, and itself; the worst is the greatest."""

    share: float
    failures: int
    attempts: int
    place: topology.Place
    needed: int  # failures


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

    def why(self, place: topology.Place) -> str:
        """Why one of those is out."""
        return self._known[place].why

    def was_ejected(self, place: topology.Place, now_s: float, why: str = "") -> None:
        """Take over a backend that an earlier agent ejected: its time begins anew."""
        self._eject(self._known.setdefault(place, _Backend()), now_s, why)

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
        if self.ejected and (why := self._none_better()):
            changes += [self._back(place, now_s, why) for place in self.ejected]
            # Until something is known of all of them, nobody is an outlier.
            self._calm_until_s = now_s + self.how.window_s
        if now_s >= self._calm_until_s:
            changes += self._worst(now_s)
        return changes

    def _due(self, now_s: float) -> list[topology.Place]:
        return [p for p, one in self._known.items() if one.until_s is not None and one.until_s <= now_s]

    def _none_better(self) -> str:
        """Why those that are out might as well be used; empty where they are better left out."""
        latest = [one.latest(self.how.failures) for one in self._known.values() if one.is_used]
        if not latest:
            return "no other is left"
        attempts, failures = (sum(counts) for counts in zip(*latest, strict=True))
        bad = failures >= self.how.failures and _ratio(attempts, failures) >= _BOTH_BAD
        return "the others fail as well" if bad else ""

    def _worst(self, now_s: float) -> list[Change]:
        """Eject the worst first: each is compared with those that are left.

        One round a look, so that a look at many that fail takes no longer than one at many that do not.
        """
        used = [one for one in self._known.values() if one.is_used]
        room = self._most - (len(self._known) - len(used))
        if room <= 0:
            return []
        rest_attempts, rest_failures = sum(one.attempts for one in used), sum(one.failures for one in used)
        changes = []
        for found in sorted(filter(None, (self._suspect(p, now_s) for p in self._known)), reverse=True):
            one = self._known[found.place]
            rest = rest_attempts - one.attempts, rest_failures - one.failures
            if not _is_outlier(one, found, rest):
                continue
            rest_attempts, rest_failures = rest
            said = max(found.attempts, found.failures)
            reason = f"{found.failures} of its last {said} connections failed"
            self._eject(one, now_s, reason)
            changes.append(Change(found.place, True, reason, one.until_s or now_s))
            if len(changes) == room:
                break
        return changes

    @property
    def _most(self) -> int:
        total = len(self._known)
        return min(total - 1, max(1, total * self.how.share_percent // 100))

    def _suspect(self, place: topology.Place, now_s: float) -> _Suspect | None:
        one = self._known[place]
        enough = 1 if now_s < one.trial_until_s else self.how.failures
        if one.failures < enough or not one.is_used:
            return None
        attempts, failures = one.latest(enough)
        return _Suspect(_ratio(attempts, failures), failures, attempts, place, enough)

    def _eject(self, one: _Backend, now_s: float, why: str) -> None:
        # Who has done well for as long as it was out begins anew.
        well = now_s - one.back_s > max(one.took_s, self.how.window_s)
        one.times = 1 if well else one.times + 1
        one.took_s = self.how.base_s * min(2.0 ** (one.times - 1), _LONGEST_TIMES_BASE)
        one.until_s = now_s + one.took_s
        one.why = why
        one.forget_counts()

    def _back(self, place: topology.Place, now_s: float, reason: str) -> Change:
        one = self._known[place]
        one.until_s = None
        one.back_s = now_s
        one.trial_until_s = now_s + self.how.window_s
        one.forget_counts()
        return Change(place, False, reason)


def _is_outlier(one: _Backend, found: _Suspect, rest: tuple[int, int]) -> bool:
    """Whether it fails more than the rest; they by all that is known of them, it by what it does now."""
    if not any(rest) and one.failures < 2 * found.needed:
        # Nothing is known of the others, as at the beginning, or where clients keep to one backend.
        return False
    usual = _ratio(*rest)
    if found.share < usual + _WORSE_BY:
        return False
    # The latest begin with a failure, and are few: among many backends some have a bad second by chance.
    return any(
        chance(attempts, failures, usual) < _NO_CHANCE
        for attempts, failures in ((found.attempts, found.failures), (one.attempts, one.failures))
    )


def chance(attempts: int, failures: int, usual: float) -> float:
    """How probable it is that at least so many of the attempts fail where that share of them usually does.

    The upper end of a binomial distribution, for more failures than are usual; near 1 for any others.
    """
    total = max(attempts, failures)
    if failures <= total * usual:
        return 1.0
    if usual <= 0.0:
        return 0.0
    ways = math.lgamma(total + 1) - math.lgamma(failures + 1) - math.lgamma(total - failures + 1)
    term = math.exp(ways + failures * math.log(usual) + (total - failures) * math.log1p(-usual))
    found = 0.0
    # Each term is smaller than the one before.
    while failures <= total and term > found * _WEAK:
        found += term
        failures += 1
        term *= (total - failures + 1) / failures * usual / (1 - usual)
    return found
