"""Which backends are to be probed and when, and when results make one unusable, or usable again.

A target is an address, a port and a probe; however many service ports lead to it,
it is asked once. Only backends that this node may use are asked. A new one counts as
usable until `fall` probes in a row have failed: Kubernetes has called it ready. One
that was down stays down until `rise` in a row have passed, also where its probe is
another now, or the agent has started anew.

No Service takes all the probes that may be under way: it is given another one only while
more are free than it has. So backends that hang keep half of them busy where they are of one
Service, two thirds where they are of two, and whoever has none under way finds one.
"""

import collections
import heapq
import itertools
import random
import typing
from collections.abc import Container, Iterable, Iterator, Mapping, Set

import msgspec

from lbproxy.core import addresses, model, probe, reach, state, token_bucket, topology

_SAYINGS: typing.Final = 4  # changes of a target that are said at once
_SAYINGS_PER_S: typing.Final = 1 / 300  # and after these
_STALE_ROWS: typing.Final = 64


class Target(typing.NamedTuple):
    """What is probed, and how."""

    address: bytes
    port: int
    probe: probe.Probe


class User(typing.NamedTuple):
    """A backend of a service port, as the health of backends is kept."""

    port: model.PortKey
    place: topology.Place


class Users(typing.NamedTuple):
    """What is to be asked for each backend, and why others are not asked."""

    targets: dict[User, Target]
    spared: dict[User, str]


class Attempt(typing.NamedTuple):
    """A target that is to be asked now; hand it back with the result."""

    target: Target
    serial: int
    taken_s: float
    late_s: float  # how long it has been due
    payer: model.ServiceName  # whose share of the probes it takes


class Result(typing.NamedTuple):
    """How a probe went; `reason` is why it failed, in a few words.

    `blameless` says that it was never made, for want of something on this node, or that
    this node was too busy to see the answer: that counts for nothing.
    """

    passed: bool
    reason: str = ""
    blameless: bool = False


class Change(typing.NamedTuple):
    """A backend is usable now or no longer, as far as probes say.

    `loud` is false where it changes so often that people have been told enough, and
    where nothing was found out: it is not probed any more.
    """

    user: User
    usable: bool
    reason: str
    loud: bool


class Trouble(typing.NamedTuple):
    """A backend whose last probe failed, or that is down: since when, and the last failure.

    `in_a_row` of the `needed` results speak against what it counts as now.
    """

    user: User
    up: bool
    in_a_row: int
    needed: int
    reason: str
    since_s: float


class _State:
    __slots__ = ("attempt", "due_s", "last", "reason", "sayings", "streak", "up", "users")

    def __init__(self, *, up: bool, now_s: float) -> None:
        self.users: dict[User, None] = {}
        self.up = up
        self.reason = ""  # of the verdict
        self.last = ""  # of the last failure
        self.streak = 0  # results in a row that speak against `up`
        self.due_s = 0.0
        self.attempt = 0  # the serial of the probe that is under way; 0: none
        self.sayings = token_bucket.TokenBucket(_SAYINGS, _SAYINGS_PER_S, now_s)


_Row = tuple[float, int, Target]  # when it is due, the order it came in


class Probing:
    """The schedule and the verdicts. Times are seconds of one clock that never goes back.

    At most `most` probes are under way at a time.
    """

    def __init__(self, source: random.Random, most: int) -> None:
        self._random = source
        self._most = most
        self._under_way: collections.Counter[model.ServiceName] = collections.Counter()
        self._states: dict[Target, _State] = {}
        self._wanted: dict[model.ServiceName, dict[User, Target]] = {}
        self._down: dict[model.ServiceName, dict[User, str]] = {}
        self._spared: dict[model.ServiceName, dict[User, str]] = {}
        self._troubled: dict[Target, float] = {}  # down or failed last, since when
        self._queue: list[_Row] = []
        # Due, but their Services have their share under way: heaps, as the queue is one.
        self._held: dict[model.ServiceName, list[_Row]] = {}
        self._serial = 0
        self._own: Set[bytes] = frozenset()  # this node's addresses
        self.changes = 0  # grows whenever `troubles` or what is asked changes

    # --- what is to be probed ---

    def was_down(self, user: User, reason: str) -> None:
        """Say what an earlier agent had found; before the first look at its service."""
        self._down.setdefault(user.port.service, {})[user] = reason

    def look(
        self,
        cluster: state.ClusterState,
        names: Iterable[model.ServiceName],
        now_s: float,
        own: Set[bytes] = frozenset(),
    ) -> list[Change]:
        """Look again at what these Services want probed; returns what follows at once.

        Where this node has other addresses of its `own` than before, at all of them.
        """
        changes: list[Change] = []
        if own != self._own:
            self._own = frozenset(own)
            names = {*names, *(service.name for service in cluster.services() if service.probes)}
        for name in names:
            service = cluster.service(name)
            if (
                (service is None or service.probes is None)
                and name not in self._wanted
                and name not in self._down
                and name not in self._spared
            ):
                continue
            wanted: dict[User, Target] = {}
            self._spared.pop(name, None)
            if service is not None:
                down = self._down.get(name, {})
                wanted, spared = users(
                    service, cluster.slices(name), cluster.node_name, cluster.zone, down, own
                )
                if spared:
                    self._spared[name] = spared
            changes += self._want(name, wanted, now_s)
        return changes

    def _want(self, name: model.ServiceName, wanted: dict[User, Target], now_s: float) -> list[Change]:
        down = self._down.setdefault(name, {})
        self.changes += 1
        self._join(name, wanted, down, now_s)
        changes = []
        for user in [user for user in down if user not in wanted]:
            del down[user]
            changes.append(Change(user, usable=True, reason="no longer probed", loud=False))
        for user, target in wanted.items():
            known = self._states[target]
            # Also of one that was down before: who went and came back between two looks has been forgotten.
            if not known.up or user in down:
                changes.append(self._verdict(user, known, loud=False))
        if not down:
            del self._down[name]
        self._compact()
        return changes

    def _join(
        self, name: model.ServiceName, wanted: dict[User, Target], down: Mapping[User, str], now_s: float
    ) -> None:
        """Put users to their targets, and take them from those that they had."""
        before = self._wanted.pop(name, {})
        if wanted:
            self._wanted[name] = wanted
        for user, target in wanted.items():
            if before.get(user) == target:
                continue
            known = self._states.get(target)
            if known is None:
                known = self._states[target] = _State(up=user not in down, now_s=now_s)
                known.reason = known.last = down.get(user, "")
                if not known.up:
                    self._troubled[target] = now_s
                # Anywhere in the interval: a thousand that come together are not asked together.
                self._schedule(target, known, now_s + self._random.random() * target.probe.interval_s)
            known.users[user] = None
        for user, target in before.items():
            if wanted.get(user) != target:
                self._leave(user, target)

    def _leave(self, user: User, target: Target) -> None:
        known = self._states[target]
        del known.users[user]
        if not known.users:
            del self._states[target]
            self._troubled.pop(target, None)

    # --- the schedule ---

    @property
    def free(self) -> int:
        """How many more probes may be under way."""
        return self._most - self._under_way.total()

    @property
    def next_due_s(self) -> float | None:
        """When a probe is due next; None where nothing is probed, or only what is held back."""
        return self._first(self._queue)

    @property
    def holds_back(self) -> bool:
        """Whether probes that were due wait for others of their Service to end."""
        return bool(self._held)

    def late_s(self, now_s: float) -> float:
        """How long the probe that waits longest has been due; 0 where none is."""
        firsts = (self._first(rows) for rows in (self._queue, *self._held.values()))
        due_s = min((due_s for due_s in firsts if due_s is not None), default=now_s)
        return max(0.0, now_s - due_s)

    def take(self, now_s: float, most: int) -> Iterator[Attempt]:
        """Take probes that are due, the longest waiting first; none of a target that is being asked."""
        self._let_go()
        while most > 0 and (free := self.free) > 0:
            due_s = self.next_due_s
            if due_s is None or due_s > now_s:
                return
            row = heapq.heappop(self._queue)
            target = row[2]
            known = self._states[target]
            payer = min({user.port.service for user in known.users}, key=self._has_under_way)
            if self._under_way[payer] >= free:
                heapq.heappush(self._held.setdefault(payer, []), row)
                continue
            self._under_way[payer] += 1
            self._serial += 1
            known.attempt = self._serial
            most -= 1
            yield Attempt(target, self._serial, now_s, now_s - due_s, payer)

    def _let_go(self) -> None:
        """Put back into the queue what Services may have under way by now."""
        free = self.free
        for payer, rows in list(self._held.items()):
            for _ in range(free - self._under_way[payer]):
                if self._first(rows) is None:
                    break
                heapq.heappush(self._queue, heapq.heappop(rows))
            if not rows:
                del self._held[payer]

    def _has_under_way(self, name: model.ServiceName) -> tuple[int, model.ServiceName]:
        return self._under_way[name], name

    def _first(self, rows: list[_Row]) -> float | None:
        """When the first of a heap is due, rid of what is stale."""
        while rows and not self._is_due(rows[0]):
            heapq.heappop(rows)
        return rows[0][0] if rows else None

    def finished(self, attempt: Attempt, result: Result, now_s: float) -> list[Change]:
        """Take the result of a probe; returns the backends that it makes usable or unusable.

        The next one is due an interval after this one was to begin, or at once: what
        comes late is not made up for.
        """
        target = attempt.target
        self._under_way[attempt.payer] -= 1
        if not self._under_way[attempt.payer]:
            del self._under_way[attempt.payer]
        known = self._states.get(target)
        if known is None or known.attempt != attempt.serial:
            # Removed meanwhile, and may have come back as somebody new.
            return []
        pause_s = target.probe.interval_s * (1 + target.probe.jitter * self._random.random())
        self._schedule(target, known, max(now_s, attempt.taken_s + pause_s))
        if result.blameless:
            return []
        if not result.passed:
            known.last = result.reason
            self._troubled.setdefault(target, now_s)
        if target in self._troubled:
            self.changes += 1
        if result.passed == known.up:
            known.streak = 0
            if known.up:
                self._troubled.pop(target, None)
            return []
        known.streak += 1
        if known.streak < (target.probe.rise if result.passed else target.probe.fall):
            return []
        known.streak, known.up, known.reason = 0, result.passed, result.reason
        if known.up:
            self._troubled.pop(target, None)
        loud = known.sayings.take(now_s)
        changes = [self._verdict(user, known, loud=loud) for user in known.users]
        for name in {user.port.service for user in known.users}:
            if not self._down[name]:
                del self._down[name]
        return changes

    def _schedule(self, target: Target, known: _State, due_s: float) -> None:
        known.attempt = 0
        known.due_s = due_s
        self._serial += 1
        heapq.heappush(self._queue, (due_s, self._serial, target))

    def _is_due(self, row: _Row) -> bool:
        due_s, _, target = row
        known = self._states.get(target)
        return known is not None and not known.attempt and known.due_s == due_s

    def _compact(self) -> None:
        """Rows of removed targets go when their time comes, or when they are most of the queue."""
        if self.queued > 2 * len(self._states) + _STALE_ROWS:
            self._queue += itertools.chain.from_iterable(self._held.values())
            self._held.clear()
            self._queue = [row for row in self._queue if self._is_due(row)]
            heapq.heapify(self._queue)

    def _verdict(self, user: User, known: _State, *, loud: bool) -> Change:
        of_service = self._down.setdefault(user.port.service, {})
        if known.up:
            of_service.pop(user, None)
        else:
            of_service[user] = known.reason
        return Change(user, known.up, known.reason, loud)

    # --- what others ask ---

    @property
    def targets(self) -> int:
        """How many targets there are."""
        return len(self._states)

    @property
    def queued(self) -> int:
        """How many rows the schedule has, stale ones included."""
        return len(self._queue) + sum(map(len, self._held.values()))

    def down(self) -> dict[model.PortKey, tuple[int, int]]:
        """How many backends of each probed service port are down, and how many are probed."""
        found: dict[model.PortKey, tuple[int, int]] = {}
        for name, wanted in self._wanted.items():
            of_service = self._down.get(name, {})
            for user in wanted:
                down, probed = found.get(user.port, (0, 0))
                found[user.port] = (down + (user in of_service), probed + 1)
        return found

    def troubles(self) -> Iterator[Trouble]:
        """Every backend that is down or failed its last probe, those of longest standing first."""
        for target, since_s in self._troubled.items():
            known = self._states[target]
            needed = target.probe.fall if known.up else target.probe.rise
            for user in known.users:
                yield Trouble(user, known.up, known.streak, needed, known.last, since_s)

    def spared(self) -> Iterator[tuple[User, str]]:
        """Every backend that this node may use and must not ask, and why."""
        for of_service in self._spared.values():
            yield from of_service.items()

    def is_up(self, user: User) -> bool | None:
        """Whether probes let a backend be used; None where it is not probed."""
        target = self._wanted.get(user.port.service, {}).get(user)
        return None if target is None else self._states[target].up


def asked(service: model.Service) -> Iterator[tuple[model.ServicePort, probe.Probe]]:
    """The ports of a Service whose backends are to be probed, and how."""
    for port in service.ports:
        wanted = service.probe_of(port.name)
        if wanted is not None and wanted.suits(port.protocol.name):
            yield port, wanted


def users(
    service: model.Service,
    slices: Iterable[model.EndpointSlice],
    node_name: str,
    zone: str,
    down: Container[User] = (),
    own: Container[bytes] = (),
) -> Users:
    """Say what is to be asked for each backend of a Service that this node may use.

    Where hints choose some and all of these are down, all the others are used and so
    asked, until one of the chosen is up again. Never what reach forbids; `own` are the
    addresses of this node.
    """
    found = Users({}, {})
    if service.probes is None:
        return found
    ordered = sorted(slices, key=lambda slice_: (slice_.namespace, slice_.name))
    for family in map(addresses.family_of, service.cluster_ips):
        for port, wanted in asked(service):
            # What results lead to does not make another probe.
            made = msgspec.structs.replace(wanted, panic=0.0)
            key = model.PortKey(service.name, port.name, port.protocol, family)
            drawn = _drawn_from(service, port, family)
            merged = topology.merge(ordered, port.name, port.protocol, family)
            places = sorted(merged)
            endpoints = [merged[place] for place in places]
            # What spills over goes to the other zones by and by.
            hinted = not service.zone_spill_over
            sets = topology.usable(endpoints, node_name, zone, hinted=hinted).sets
            chosen = [place for place, bits in zip(places, sets, strict=True) if bits & topology.CLUSTER]
            if all(User(key, place) in down for place in chosen):
                sets = topology.usable(endpoints, node_name, zone, hinted=False).sets
            for place, bits in zip(places, sets, strict=True):
                here = bool(node_name) and merged[place].location.node_name == node_name
                if not bits & drawn:
                    continue
                if why := reach.forbids(place.address, own, here=here):
                    found.spared[User(key, place)] = why
                else:
                    found.targets[User(key, place)] = Target(place.address, made.port or place.port, made)
    return found


def _drawn_from(service: model.Service, port: model.ServicePort, family: model.Family) -> int:
    """The sets that some frontend of a port draws from: its ClusterIP, and whatever else it has."""
    inside = topology.LOCAL if service.internal_local else topology.CLUSTER
    others = itertools.chain(service.external_ips, service.load_balancer_ips)
    if not port.node_port and not any(addresses.family_of(address) is family for address in others):
        return inside
    return inside | topology.CLUSTER | (topology.LOCAL if service.external_local else 0)
