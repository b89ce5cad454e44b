"""What nothing leads to any more keeps its row for a while: a program may just have read the old pointer."""

import collections
import typing

from lbproxy import abi
from lbproxy.core import outcomes, pools, tables

# Programs run for microseconds, under RCU; a second is for ever to them.
RECYCLE_AFTER_S: typing.Final = 1.0
_NO_BACKEND_STATS: typing.Final = bytes(abi.LAYOUTS["backend_stats"].size)
_NO_LOAD: typing.Final = bytes(abi.LAYOUTS["backend_load"].size)
_NO_CORRECTION: typing.Final = bytes(4)
_NO_SERVICE_STATS: typing.Final = bytes(abi.LAYOUTS["service_stats"].size)


class _Retired(typing.NamedTuple):
    """Something that may be used again from `due_s` on."""

    due_s: float
    backend: int = 0
    counted: bool = False  # that backend may have a load
    service: int = 0
    extent: pools.Extent | None = None


class Quarantine:
    """Ids and extents that are not free yet, the longest there first."""

    def __init__(self) -> None:
        self._retired: collections.deque[_Retired] = collections.deque()

    @property
    def next_due_s(self) -> float | None:
        """When `expire` next has something to do."""
        return self._retired[0].due_s if self._retired else None

    def add(
        self,
        now_s: float,
        *,
        backend: int = 0,
        counted: bool = False,
        service: int = 0,
        extent: pools.Extent | None = None,
    ) -> None:
        """Keep one of these for RECYCLE_AFTER_S; of a backend, whether its open connections were counted."""
        self._retired.append(_Retired(now_s + RECYCLE_AFTER_S, backend, counted, service, extent))

    def expire(
        self, now_s: float, services: pools.IdPool, backends: pools.IdPool, extents: pools.ExtentPool
    ) -> list[tables.Write]:
        """Give back what has been here long enough; returns the writes that clear its rows."""
        rows: list[tables.Write] = []
        stats: list[tables.Write] = []
        loads: list[tables.Write] = []
        health: list[tables.Write] = []
        while self._retired and self._retired[0].due_s <= now_s:
            retired = self._retired.popleft()
            if retired.backend:
                key = tables.row_key(retired.backend)
                rows.append(tables.Put(tables.Table.BACKENDS, key, tables.NO_BACKEND))
                stats.append(tables.Put(tables.Table.BACKEND_STATS, key, _NO_BACKEND_STATS))
                if retired.counted:
                    loads.append(tables.Put(tables.Table.BACKEND_LOAD, key, _NO_LOAD))
                    loads.append(tables.Put(tables.Table.LOAD_CORRECTIONS, key, _NO_CORRECTION))
                health += (
                    tables.Delete(tables.Table.BACKEND_HEALTH, row) for row in outcomes.keys(retired.backend)
                )
                backends.give_back(retired.backend)
            if retired.service:
                key = tables.row_key(retired.service)
                rows.append(tables.Put(tables.Table.SERVICE_STATS, key, _NO_SERVICE_STATS))
                services.give_back(retired.service)
            if retired.extent is not None:
                extents.give_back(retired.extent)
        # The row that is not yet FREE is what tells a successor that its statistics are to be cleared.
        return stats + loads + health + rows
