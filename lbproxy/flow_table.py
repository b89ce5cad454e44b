"""Keeps the packet path's flow table tidy: rows that have been idle for too long go.

The programs take such a row as if it were not there, so nothing depends on when it
goes but the room it takes. So while there is plenty, little time is spent on it: some
rows a look, and the more of them there are to look at, the less often. Finding the table
empty costs less than a millisecond.
"""

import asyncio
import logging
import time
import typing

from lbproxy import abi, absent_flows, errors, gate, kernel_clock, open_connections
from lbproxy.core import flows, inventory, tables
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
# Otherwise not for more than half a percent of the time: reading a row takes 0.4 us, removing one 3.
_QUIET_PAUSES: typing.Final = 200.0
_QUIET_ROWS: typing.Final = 16_384
_BATCH_ROWS: typing.Final = 4096
_TICK_SHIFT: typing.Final = abi.constant("TICK_SHIFT")
_ROW: typing.Final = tables.row_key(0)
_FLOWS_FULL: typing.Final = tables.row_key(abi.constant("COUNTER_FLOWS_FULL"))


def tick() -> int:
    """The time as the programs note it in flow rows."""
    return kernel_clock.coarse_ns() >> _TICK_SHIFT


def count(kernel: maps.Maps) -> tuple[flows.Counts, int]:
    """What there is in the flow table now, and how many rows are idle; none is removed. Raises OSError."""
    deadlines = flows.Deadlines(inventory.settings(kernel), tick())
    counts, idle = flows.Counts(), 0
    for keys, rows in kernel.batches(tables.Table.FLOWS, _BATCH_ROWS):
        idle += len(flows.sweep(keys, rows, deadlines, counts))
    return counts, idle


class FlowTable:
    """What is known of the flow table."""

    def __init__(
        self,
        kernel: maps.Maps,
        clock: typing.Callable[[], int] = tick,
        counted: open_connections.Counted = open_connections.nobody,
        writing: gate.Gate | None = None,
        absent: absent_flows.AbsentFlows | None = None,
    ) -> None:
        """`counted` are the backends whose open connections matter; `writing` is passed for each look.

        `absent` is told what each look finds.
        """
        self._writing = writing or gate.Gate()
        self._kernel = kernel
        self._counted = counted
        self._counted_anew = 0
        self._absent = absent or absent_flows.AbsentFlows(kernel)
        self._clock = clock
        self.counts = flows.Counts()  # as the last look found them
        self._sent_aside = 0  # rows that went to `flows_new`, as the last look began
        self._took_s = 0.0  # of processor time, for a look

    async def run(self) -> typing.NoReturn:
        """Look at the table every few seconds."""
        failure = ""
        while True:
            began_s = time.monotonic()
            try:
                # Loads that are read from one table and put right in another would be wrong.
                async with self._writing.shared():
                    expired = await asyncio.to_thread(self._timed_look, self._most())
            except (OSError, errors.AgentError) as error:
                if str(error) != failure:
                    _log.error("cannot look after the flow table: %s", error)
                failure = str(error)
            else:
                failure = ""
                if expired:
                    _log.debug("flows rows=%d expired=%d", self.counts.rows, expired)
            await self._pause(began_s)

    def _timed_look(self, most: int | None) -> int:
        # Not by the clock: whoever waits for a processor, or at the gate, has taken nothing from anybody.
        began_s = time.thread_time()
        try:
            return self.look(most)
        finally:
            self._took_s = time.thread_time() - began_s

    def look(self, most: int | None = None) -> int:
        """Remove what has expired, so many rows `most`, and count what has not.

        Returns how many rows went. Raises OSError.
        """
        settings = self._kernel.row(tables.Table.SETTINGS, _ROW)
        if settings is None:
            return 0
        self._sent_aside = self._number("counters", _FLOWS_FULL)
        deadlines = flows.Deadlines(tables.settings(settings), self._clock())
        counts = flows.Counts()
        self._counted_anew = self._counted.anew
        open_now = open_connections.Recount(self._kernel, self._counted(), deadlines)

        found = self._absent.look()
        expired = 0
        for keys, rows in self._kernel.batches(tables.Table.FLOWS, _BATCH_ROWS):
            if found is not None:
                found.add(keys)
            open_now.flows(keys, rows)
            room = None if most is None else max(0, most - expired)
            due = flows.sweep(keys, rows, deadlines, counts, room)
            expired += self._kernel.take(tables.Table.FLOWS, due, deadlines.fresh)
        if found is not None or (self._sent_aside and open_now.wanted):
            for keys, rows in self._kernel.batches(tables.Table.FLOWS_NEW, _BATCH_ROWS):
                if found is not None:
                    found.add(keys)
                open_now.flows(keys, rows)
        if found is not None:
            self._absent.looked(found)
        open_now.put_right()
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
        crowded_s = max(began_s + _CROWDED_INTERVAL_S, ended_s + _PAUSES * self._took_s)
        due_s = max(began_s + _INTERVAL_S, ended_s + _QUIET_PAUSES * self._took_s)
        while (left_s := due_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, _POLL_S))
            if self._counted.anew != self._counted_anew:
                return
            if time.monotonic() >= crowded_s and self._crowded():
                return

    def _most(self) -> int | None:
        """How many rows a look may remove: some, and what is above half of the room; all if that is short."""
        if self._short():
            return None
        return _QUIET_ROWS + max(0, self._above_half())

    def _crowded(self) -> bool:
        try:
            return self._short() or self._above_half() > 0
        except OSError:
            return False

    def _short(self) -> bool:
        """Whether new flows have to do with `flows_new`, or soon will."""
        room = self._kernel.rows_of(tables.Table.FLOWS)
        return (
            self._unassured() >= _CROWDED_UNASSURED * room
            or self._number("counters", _FLOWS_FULL) != self._sent_aside
        )

    def _above_half(self) -> int:
        """How many rows the last look found above half of the room."""
        return self.counts.rows - int(_CROWDED * self._kernel.rows_of(tables.Table.FLOWS))

    def _unassured(self) -> int:
        """As the programs count them: for a moment, fewer than none."""
        return self._number(tables.Table.UNASSURED, _ROW)

    def _number(self, table: str, key: bytes) -> int:
        row = self._kernel.row(table, key) or b""
        return int.from_bytes(row, tables.BYTE_ORDER, signed=True)
