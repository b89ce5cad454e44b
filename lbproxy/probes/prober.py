"""Makes the probes that are due, and hands on what follows: one prober for all Services of this node.

So many at a time and so many a second, whatever annotations ask for: where that is
not enough, probes come late and `late_s` says so, and nothing piles up. One Service's do
not take the place of another's: core.probing says how they share.
"""

import asyncio
import contextlib
import logging
import random
import time
import typing
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Set

from lbproxy.core import addresses, health, listing, model, probe, probing, state, token_bucket, topology
from lbproxy.probes import asking

STARTS_PER_S: typing.Final = 1000.0
LINES: typing.Final = 100  # about changes at once, and after these
LINES_PER_S: typing.Final = 1.0

_TURN_S: typing.Final = 0.02  # probes that are due within so long begin together
_STARTS_PER_TURN: typing.Final = round(STARTS_PER_S * _TURN_S)
_EARLIER: typing.Final = "an earlier agent found it down"
_log = logging.getLogger(__name__)

Note = Callable[[model.PortKey, topology.Place, health.Source, bool, str], bool]
Ask = Callable[[probing.Target], Awaitable[asking.Asked]]
Said = Callable[[probing.Change], None]
Probed = Callable[[probe.Kind, probing.Result, float], None]


class Prober:
    """Told of every pass, and asks until cancelled. At most `most` at a time; 0: nobody is ever asked.

    `probed` hears of each probe and how many seconds it took, `said` of the changes that
    people are to be told of.
    """

    def __init__(
        self,
        most: int,
        probed: Probed,
        said: Said,
        ask: Ask,
        source: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._probed = probed
        self._said = said
        self._ask = ask
        self._clock = clock
        self._probing = probing.Probing(source or random.Random(), most)
        self._note: Note = lambda _port, _place, _source, _usable, _reason: False
        self._wake = asyncio.Event()
        self._until_s: float | None = None  # when the loop that waits is going to look again
        # When a node loses its network, thousands go down at once.
        self._lines = token_bucket.TokenBucket(LINES, LINES_PER_S, clock())
        self._unsaid = 0
        self._asked: dict[model.ServiceName, dict[str, str]] = {}
        self._mistakes: dict[model.ServiceName, str] = {}
        self._changes = 0

    def take_over(self, note: Note, down: Iterable[tuple[model.PortKey, topology.Place]]) -> None:
        """Say who takes verdicts, and which backends an earlier agent had found down: before the first pass.

        They stay down until this one has found them up, or nobody wants them probed.
        """
        self._note = note
        if not self._most:
            return
        for port, place in down:
            note(port, place, health.Source.ACTIVE, False, _EARLIER)
            self._probing.was_down(probing.User(port, place), _EARLIER)

    def passed(
        self,
        cluster: state.ClusterState,
        names: Iterable[model.ServiceName],
        own: Set[bytes] = frozenset(),
    ) -> None:
        """Take what a pass has put in force, and this node's own addresses."""
        names = list(names)
        for name in names:
            service = cluster.service(name)
            mistake = service.probe_mistake if service is not None else ""
            if mistake != self._mistakes.get(name, ""):
                self._changes += 1
                self._mistakes[name] = mistake
                if not mistake:
                    del self._mistakes[name]
            if service is not None and service.probes is not None:
                self._asked[name] = {
                    port.name: probe.describe(wanted) for port, wanted in probing.asked(service)
                }
                self._changes += 1
            elif self._asked.pop(name, None) is not None:
                self._changes += 1
        if not self._most:
            return
        self._hand_on(self._probing.look(cluster, names, self._clock(), own))
        self._wake.set()

    async def run(self) -> typing.NoReturn:
        """Make probes until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._wake.clear()
                self._count_unsaid()
                started = 0
                for attempt in self._probing.take(self._clock(), _STARTS_PER_TURN):
                    started += 1
                    tasks.create_task(self._probe(attempt))
                if started:
                    await asyncio.sleep(_TURN_S)
                else:
                    await self._wait()

    # --- what others ask ---

    @property
    def targets(self) -> int:
        """How many addresses, ports and probes there are to ask."""
        return self._probing.targets

    @property
    def late_s(self) -> float:
        """How long the probe that waits longest has been due."""
        return self._probing.late_s(self._clock())

    @property
    def off(self) -> str:
        """Why nobody is probed, whatever Services ask for; empty where they are."""
        return "" if self._most else "--probe-concurrency is 0 on this node"

    @property
    def asked(self) -> Mapping[model.ServiceName, Mapping[str, str]]:
        """The Services whose annotations ask for probes: of which ports by name, and which."""
        return self._asked

    @property
    def mistakes(self) -> Mapping[model.ServiceName, str]:
        """The Services whose annotations about probes are not understood, and why."""
        return self._mistakes

    def spared(self) -> Iterator[tuple[probing.User, str]]:
        """Every backend that this node uses and must not ask, and why."""
        return self._probing.spared()

    @property
    def changes(self) -> int:
        """Grows whenever one of the others here may be another than before."""
        return self._changes + self._probing.changes

    def troubles(self) -> Iterator[probing.Trouble]:
        """Every backend that is down or failed its last probe; times are of `clock`."""
        return self._probing.troubles()

    def down(self) -> Mapping[model.PortKey, tuple[int, int]]:
        """Of each probed service port, how many backends probes have found down, and how many there are."""
        return self._probing.down()

    # --- one after another ---

    async def _wait(self) -> None:
        """Until something is due and there is room for it."""
        due_s = self._probing.next_due_s if self._probing.free > 0 else None
        pause_s = None if due_s is None else max(_TURN_S, due_s - self._clock())
        self._until_s = due_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._wake.wait()

    async def _probe(self, attempt: probing.Attempt) -> None:
        asked = await self._ask(attempt.target)
        self._probed(attempt.target.probe.kind, asked.result, asked.took_s)
        self._hand_on(self._probing.finished(attempt, asked.result, self._clock()))
        due_s = self._probing.next_due_s
        # Its next one may be due before all others, or wait for the room that there is now.
        if self._probing.holds_back or (
            due_s is not None and (self._until_s is None or due_s < self._until_s)
        ):
            self._wake.set()

    def _hand_on(self, changes: Iterable[probing.Change]) -> None:
        for change in changes:
            self._note(
                change.user.port, change.user.place, health.Source.ACTIVE, change.usable, change.reason
            )
            if change.loud:
                self._say(change)

    def _say(self, change: probing.Change) -> None:
        if not self._lines.take(self._clock()):
            self._unsaid += 1
            return
        _log.log(logging.INFO if change.usable else logging.WARNING, "%s", describe(change))
        self._said(change)

    def _count_unsaid(self) -> None:
        if self._unsaid and self._lines.take(self._clock()):
            _log.warning("%d more backends went up or down: too many to say each", self._unsaid)
            self._unsaid = 0


def describe(change: probing.Change) -> str:
    """One line about a change, for people."""
    place, port = change.user.place, change.user.port
    where = listing.place(addresses.text(place.address), place.port)
    if change.usable:
        return f"backend {where} of {port} is up: its probes pass"
    return f"backend {where} of {port} is down: {change.reason}"
