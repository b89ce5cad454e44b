"""Leaves out backends that fail more than the others, of Services that ask for it: core.outliers at work.

One task reads counts from the kernel every second, of these Services alone.
"""

import asyncio
import logging
import time
import typing
from collections.abc import Callable, Iterable

from lbproxy.core import (
    addresses,
    ejection,
    health,
    listing,
    model,
    outcomes,
    outliers,
    reconcile,
    tables,
    topology,
)

LOOK_S: typing.Final = 1.0

# A row by its key costs 2.9 µs, among all of them 0.9 (2 vCPUs); tables are seldom full.
_CHEAPER_ALL: typing.Final = 4
_AN_EARLIER_AGENT: typing.Final = "an earlier agent ejected it"
_log = logging.getLogger(__name__)

Note = Callable[[model.PortKey, topology.Place, health.Source, bool, str], bool]
Said = Callable[[model.PortKey, outliers.Change, str], None]


class Rows(typing.Protocol):
    """The kernel's tables."""

    def rows(self, table: str) -> typing.Iterator[tuple[bytes, bytes]]:
        """Every row that is in use. Raises OSError."""
        ...

    def row(self, table: str, key: bytes) -> bytes | None:
        """One row, or None. Raises OSError."""
        ...

    def rows_of(self, table: str) -> int:
        """How many rows a table has room for."""
        ...


class _Ready(typing.NamedTuple):
    id: int
    down: bool  # probes speak against it


class _Watched:
    """A service port that is looked at: its ready backends, and what is known of them."""

    def __init__(self, judge: outliers.Outliers) -> None:
        self.judge = judge
        self.ready: dict[topology.Place, _Ready] = {}


class Ejecting:
    """Told of every pass; looks until cancelled. `said` is given each change, and a line about it."""

    def __init__(
        self,
        said: Said = lambda _port, _change, _line: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._said = said
        self._clock = clock
        self._note: Note = lambda _port, _place, _source, _usable, _reason: False
        self._watched: dict[model.PortKey, _Watched] = {}
        self._of: dict[model.ServiceName, list[model.PortKey]] = {}
        self._earlier: dict[model.PortKey, set[topology.Place]] = {}

    def take_over(self, note: Note, ejected: Iterable[tuple[model.PortKey, topology.Place]]) -> None:
        """Say who takes verdicts, and whom an earlier agent had ejected: before the first pass.

        They stay out, and their time begins anew.
        """
        self._note = note
        for port, place in list(ejected):
            note(port, place, health.Source.PASSIVE, False, _AN_EARLIER_AGENT)
            self._earlier.setdefault(port, set()).add(place)

    def passed(self, reconciler: reconcile.Reconciler, names: Iterable[model.ServiceName]) -> None:
        """Take what a pass has put in force."""
        for name in names:
            service = reconciler.state.service(name)
            how = service.ejection if service is not None else None
            if how is None and name not in self._of and not self._earlier:
                continue
            before = self._of.pop(name, [])
            ports = list(reconciler.ledger.ports(name)) if how is not None else []
            for key in before:
                if key not in ports:
                    self._forget(key, self._watched.pop(key).judge.ejected)
            for key in [key for key in self._earlier if key.service == name and key not in ports]:
                self._forget(key, self._earlier.pop(key))
            for key in ports:
                assert how is not None
                watched = self._watched.setdefault(key, _Watched(outliers.Outliers(how)))
                watched.judge.how = how
                watched.ready = _ready(reconciler, key)
                for place in self._earlier.pop(key, ()):
                    watched.judge.was_ejected(place, self._clock(), _AN_EARLIER_AGENT)
                # Who went and came back between two looks has been forgotten by the book of health, not by
                # the judge.
                for place in watched.judge.ejected:
                    if place in watched.ready:
                        self._note(key, place, health.Source.PASSIVE, False, watched.judge.why(place))
            if ports:
                self._of[name] = ports

    async def run(self, kernel: Rows) -> typing.NoReturn:
        """Look every second until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look(kernel)
            except OSError as error:
                _log.warning("cannot read how connections fare: %s", error)

    async def look(self, kernel: Rows) -> None:
        """Judge once. Raises OSError."""
        if not self._watched:
            return
        # One id is of one service port.
        wanted = {
            one.id: watched.judge.how.clients
            for watched in self._watched.values()
            for one in watched.ready.values()
        }
        # Not on the loop: of 10,000 backends that takes tens of milliseconds.
        known = await asyncio.to_thread(_read, kernel, wanted)
        now_s = self._clock()
        for key, watched in self._watched.items():
            # Of one that came meanwhile nothing is known: its counts so far are no failures of this second.
            samples = {}
            for place, one in watched.ready.items():
                clients = wanted.get(one.id, watched.judge.how.clients)
                fared = known[one.id] if one.id in known else _fared(kernel, one.id, clients)
                samples[place] = outliers.Sample(one.id, fared, one.down, clients)
            for change in watched.judge.look(samples, now_s):
                self._make(key, change, now_s)

    def _make(self, key: model.PortKey, change: outliers.Change, now_s: float) -> None:
        line = describe(key, change, now_s)
        _log.log(logging.WARNING if change.ejected else logging.INFO, "%s", line)
        self._note(key, change.place, health.Source.PASSIVE, not change.ejected, change.reason)
        self._said(key, change, line)

    def _forget(self, key: model.PortKey, places: Iterable[topology.Place]) -> None:
        for place in places:
            self._note(key, place, health.Source.PASSIVE, True, "")


def describe(key: model.PortKey, change: outliers.Change, now_s: float) -> str:
    """One line about a change, for people."""
    where = listing.place(addresses.text(change.place.address), change.place.port)
    if change.ejected:
        return f"backend {where} of {key} is ejected for {change.until_s - now_s:.0f} s: {change.reason}"
    return f"backend {where} of {key} is back: {change.reason}"


def _read(kernel: Rows, wanted: typing.Mapping[int, ejection.Clients]) -> dict[int, outcomes.Outcomes]:
    """What is known of these backends by now, by whose connections are to tell."""
    if len(wanted) * _CHEAPER_ALL < kernel.rows_of(tables.Table.BACKEND_HEALTH):
        return {number: _fared(kernel, number, clients) for number, clients in wanted.items()}
    every, nothing = outcomes.every(kernel), outcomes.NOTHING_YET
    return {number: _of(every.get(number, nothing), clients) for number, clients in wanted.items()}


def _fared(kernel: Rows, number: int, clients: ejection.Clients) -> outcomes.Outcomes:
    if clients is ejection.Clients.NODE:
        return outcomes.of_node(kernel, number)
    return outcomes.of_backend(kernel, number).everyone


def _of(fared: outcomes.Fared, clients: ejection.Clients) -> outcomes.Outcomes:
    return fared.node if clients is ejection.Clients.NODE else fared.everyone


def _ready(reconciler: reconcile.Reconciler, key: model.PortKey) -> dict[topology.Place, _Ready]:
    """The ready backends of a TCP port, as the kernel has them: only those have outcomes."""
    held = reconciler.ledger.installed.get(key)
    if held is None or key.protocol is not model.Protocol.TCP:
        return {}
    rows = ((number, tables.backend(row)) for number, row in held.backends.items())
    return {
        topology.Place(row.addr, int.from_bytes(row.port, "big")): _Ready(
            number, bool(row.health & tables.Health.PROBE_FAILED)
        )
        for number, row in rows
        if row.state == tables.BackendState.ACTIVE
    }
