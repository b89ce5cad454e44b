"""Leaves out backends that fail more than the others, of Services that ask for it: core.outliers at work.

One task reads counts from the kernel every second, of these Services alone.
"""

import asyncio
import logging
import time
import typing
from collections.abc import Callable, Iterable

from lbproxy.core import addresses, health, listing, model, outcomes, outliers, reconcile, tables, topology

LOOK_S: typing.Final = 1.0

_MANY: typing.Final = 64  # backends that are cheaper to read all at once
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


class _Watched:
    """A service port that is looked at: its ready backends' ids, and what is known of them."""

    def __init__(self, judge: outliers.Outliers) -> None:
        self.judge = judge
        self.ids: dict[topology.Place, int] = {}


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
            note(port, place, health.Source.PASSIVE, False, "an earlier agent ejected it")
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
                watched.ids = _ready(reconciler, key)
                for place in self._earlier.pop(key, ()):
                    watched.judge.was_ejected(place, self._clock())
            if ports:
                self._of[name] = ports

    async def run(self, kernel: Rows) -> typing.NoReturn:
        """Look every second until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                self.look(kernel)
            except OSError as error:
                _log.warning("cannot read how connections fare: %s", error)

    def look(self, kernel: Rows) -> None:
        """Judge once. Raises OSError."""
        if not self._watched:
            return
        many = sum(len(watched.ids) for watched in self._watched.values()) > _MANY
        known = outcomes.every(kernel) if many else None
        now_s = self._clock()
        for key, watched in self._watched.items():
            samples = {
                place: outliers.Sample(
                    number,
                    outcomes.of_backend(kernel, number)
                    if known is None
                    else known.get(number, outcomes.Outcomes()),
                )
                for place, number in watched.ids.items()
            }
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


def _ready(reconciler: reconcile.Reconciler, key: model.PortKey) -> dict[topology.Place, int]:
    """The ready backends of a TCP port, as the kernel has them: only those have outcomes."""
    held = reconciler.ledger.installed.get(key)
    if held is None or key.protocol is not model.Protocol.TCP:
        return {}
    rows = ((number, tables.backend(row)) for number, row in held.backends.items())
    return {
        topology.Place(row.addr, int.from_bytes(row.port, "big")): number
        for number, row in rows
        if row.state == tables.BackendState.ACTIVE
    }
