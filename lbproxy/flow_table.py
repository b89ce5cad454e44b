"""Keeps the packet path's flow table tidy: rows that have been idle for too long go.

The programs take such a row as if it were not there, so nothing depends on when it
goes but the room it takes. Finding the table empty costs less than a millisecond.
"""

import asyncio
import logging
import time
import typing

from lbproxy import abi, errors
from lbproxy.core import flows, tables
from lbproxy.kernel import maps

_log = logging.getLogger(__name__)

_INTERVAL_S: typing.Final = 10.0
# While half of the table is of unanswered flows, or it is full, new ones have to do with
# `flows_new`: from half way there it is looked at more often, but not for more than a tenth of the
# time. Short connections fill it with rows that stay for ten seconds after they were closed.
_CROWDED_UNASSURED: typing.Final = 1 / 4
_CROWDED: typing.Final = 1 / 2
_CROWDED_INTERVAL_S: typing.Final = 2.0
_POLL_S: typing.Final = 1.0
_PAUSES: typing.Final = 10.0
_BATCH_ROWS: typing.Final = 4096
_CLOCK_MONOTONIC_COARSE: typing.Final = 6
_TICK_SHIFT: typing.Final = abi.constant("TICK_SHIFT")
_ROW: typing.Final = tables.row_key(0)
_FLOWS_FULL: typing.Final = tables.row_key(abi.constant("COUNTER_FLOWS_FULL"))


def tick() -> int:
    """The time as the programs note it in flow rows."""
    return time.clock_gettime_ns(_CLOCK_MONOTONIC_COARSE) >> _TICK_SHIFT


class FlowTable:
    """What is known of the flow table."""

    def __init__(self, kernel: maps.Maps, clock: typing.Callable[[], int] = tick) -> None:
        self._kernel = kernel
        self._clock = clock
        self.counts = flows.Counts()  # as the last look found them
        self._sent_aside = 0  # rows that went to `flows_new`, as the last look began

    async def run(self) -> typing.NoReturn:
        """Look at the table every few seconds."""
        failure = ""
        while True:
            began_s = time.monotonic()
            try:
                expired = await asyncio.to_thread(self.look)
            except (OSError, errors.AgentError) as error:
                if str(error) != failure:
                    _log.error("cannot look after the flow table: %s", error)
                failure = str(error)
            else:
                failure = ""
                if expired:
                    _log.debug("flows rows=%d expired=%d", self.counts.rows, expired)
            await self._pause(began_s)

    def look(self) -> int:
        """Remove what has expired and count the rest; returns how many rows went. Raises OSError."""
        settings = self._kernel.row(tables.Table.SETTINGS, _ROW)
        if settings is None:
            return 0
        self._sent_aside = self._number("counters", _FLOWS_FULL)
        deadlines = flows.Deadlines(tables.settings(settings), self._clock())
        counts = flows.Counts()

        def fresh(row: bytes) -> bool:
            return not deadlines.expired(key, row)

        expired = 0
        for keys, rows in self._kernel.batches(tables.Table.FLOWS, _BATCH_ROWS):
            for key in flows.sweep(keys, rows, deadlines, counts):
                expired += self._kernel.take(tables.Table.FLOWS, key, fresh)
        # What programs counted meanwhile is lost: the number only has to say whether the table
        # is crowded, and the next look puts it right.
        if counts.unassured != self._unassured():
            self._kernel.apply(
                [tables.Put(tables.Table.UNASSURED, _ROW, counts.unassured.to_bytes(8, tables.BYTE_ORDER))]
            )
        self.counts = counts
        return expired

    async def _pause(self, began_s: float) -> None:
        ended_s = time.monotonic()
        crowded_s = max(began_s + _CROWDED_INTERVAL_S, ended_s + _PAUSES * (ended_s - began_s))
        due_s = max(began_s + _INTERVAL_S, crowded_s)
        while (left_s := due_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, _POLL_S))
            if time.monotonic() >= crowded_s and self._crowded():
                return

    def _crowded(self) -> bool:
        try:
            room = self._kernel.rows_of(tables.Table.FLOWS)
            return (
                self._unassured() >= _CROWDED_UNASSURED * room
                or self.counts.rows > _CROWDED * room
                or self._number("counters", _FLOWS_FULL) != self._sent_aside
            )
        except OSError:
            return False

    def _unassured(self) -> int:
        """As the programs count them: for a moment, fewer than none."""
        return self._number(tables.Table.UNASSURED, _ROW)

    def _number(self, table: str, key: bytes) -> int:
        row = self._kernel.row(table, key) or b""
        return int.from_bytes(row, tables.BYTE_ORDER, signed=True)
