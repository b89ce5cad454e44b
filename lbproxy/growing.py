"""Makes maps larger when they fill up, under the eyes of the programs: no connection notices.

A map can not change its size. So the next generation of the datapath is made beside the one that
serves, as in an upgrade, on the same maps but for those that grow. Only while these are copied, or flows
moved (`kernel/moving.py`), and the programs switched does nobody write: changes wait that long. A restart
adopts what has grown.
"""

import asyncio
import dataclasses
import logging
import time
import typing

from lbproxy import cgroup2, controller, errors, gate
from lbproxy.config import config
from lbproxy.core import fill, growth, tables
from lbproxy.kernel import datapath, maps
from lbproxy.metrics import metrics

_log = logging.getLogger(__name__)

_CHECK_S: typing.Final = 1.0
# These are counted: nobody keeps an account of them.
_COUNT_S: typing.Final = 10.0
_COUNTED: typing.Final = (
    tables.Table.NODE_ADDRESSES,
    tables.Table.DEVICES,
    tables.Table.NETNS_ADDRESSES,
    tables.Table.BACKEND_HEALTH,
)
_RETRY_S: typing.Final = 60.0

Told = typing.Callable[[str], None]


class HalfGrown(errors.AgentError):
    """The programs may be at work on maps that this process does not write to."""


class Growing:
    """Looks at how full the maps are, and makes larger ones."""

    def __init__(
        self,
        settings: config.Config,
        cgroup: cgroup2.Cgroup,
        found: datapath.Datapath,
        kernel: maps.BpfMaps,
        control: controller.Controller,
        telemetry: metrics.Metrics,
        writing: gate.Gate,
        flow_rows: typing.Callable[[], int],
        told: Told = lambda _what: None,
    ) -> None:
        """`writing` keeps out whoever else writes to the maps; `told` is given a line about each growth.

        `flow_rows` says how many rows of `flows` are in use, as whoever removes them has counted last.
        """
        limit = settings.map_growth_limit
        self._most = {name: limit * rows for name, rows in dataclasses.asdict(settings.map_rows).items()}
        self._wanted = control.awaits_room = limit > 1
        self._cgroup = cgroup
        self._datapath = found
        self._kernel = kernel
        self._control = control
        self._telemetry = telemetry
        self._writing = writing
        self._flow_rows = flow_rows
        self._told = told
        self._counted: dict[str, int] = {}
        self._counted_s = -_COUNT_S

    async def run(self) -> None:
        """Look every second; returns at once where no map may grow. Raises HalfGrown."""
        while self._wanted:
            await asyncio.sleep(_CHECK_S)
            try:
                await self._look()
            except HalfGrown:
                raise  # for the next start to finish: nothing here knows any longer which maps serve
            except (errors.AgentError, OSError) as error:
                self._control.stays_full(f"the tables can not be made larger: {error}")
                await asyncio.sleep(_RETRY_S)

    async def _look(self) -> None:
        if time.monotonic() - self._counted_s >= _COUNT_S:
            self._counted = await asyncio.to_thread(self._count)
            self._counted_s = time.monotonic()
        reconciler = self._control.reconciler
        rows = {name: self._kernel.rows_of(name) for name in growth.GROWABLE}
        # Those that a smaller table refused have their turn with the passes that are under way.
        refused = [full for full in reconciler.starved.values() if full.rows >= rows[full.table]]
        used = growth.expected(reconciler.ledger.used(), len(reconciler.ledger.installed), len(refused))
        starved = {full.table for full in refused}
        counted = {**self._counted, str(tables.Table.FLOWS): self._flow_rows()}
        decided = growth.growth(counted | used, rows, starved, self._most)
        if decided.sizes:
            await self._grow(decided.sizes, rows)
        full = ", ".join(f"{name} ({rows[name]} rows)" for name in decided.stuck)
        self._control.stays_full(
            f"no room to grow, see --map-growth-limit and --map-rows: {full}" if full else ""
        )

    async def _grow(self, sizes: dict[str, int], rows: dict[str, int]) -> None:
        began_s = time.monotonic()
        if said := self._cgroup.look():
            _log.warning("%s", said)
        if not self._cgroup.visible:
            raise errors.AgentError("no cgroup2 mount shows the cgroup")
        made = await asyncio.to_thread(self._datapath.prepare, sizes)
        async with self._writing.alone():
            paused_s = time.monotonic()
            try:
                # Not given up half way: whoever stops the agent waits for the thread.
                found = await asyncio.to_thread(self._datapath.take_over, made, self._cgroup.path)
                self._kernel.reopen()
                self._control.grown()
            except (errors.AgentError, OSError) as error:
                raise HalfGrown(f"larger tables are half in use: ending, to finish it: {error}") from error
            ended_s = time.monotonic()
        self._counted_s = -_COUNT_S
        what = ", ".join(f"{name} from {rows[name]} to {number} rows" for name, number in sizes.items())
        _log.info(
            "tables have grown: %s fingerprint=%s took=%.0fms changes waited=%.0fms",
            what,
            found.fingerprint,
            (ended_s - began_s) * 1e3,
            (ended_s - paused_s) * 1e3,
        )
        self._telemetry.grew(sizes, found.fingerprint)
        self._told(f"lbproxy's tables have grown, as they were filling up: {what}")

    def _count(self) -> dict[str, int]:
        return {str(name): fill.used(self._kernel, name) for name in _COUNTED}
