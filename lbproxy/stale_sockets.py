"""Closes connected UDP sockets whose backend is gone, so that their applications connect anew.

They are in the network namespaces of pods. Which sockets they are the kernel's
tables say, so also what became stale while no agent ran is found; each is closed
only if it still has the cookie and the peer that its record says. An application
that dialled the backend itself has no record.
"""

import asyncio
import collections
import contextlib
import logging
import time
import typing

from lbproxy.core import addresses, model, quarantine, stale, tables
from lbproxy.kernel import maps, namespaces, sock_diag
from lbproxy.metrics import metrics

_log = logging.getLogger(__name__)

# Of the time, at most a twentieth goes into this.
_PAUSES: typing.Final = 20.0
_LEAST_PAUSE_S: typing.Final = 0.1
# A program may have followed an old slot just before it was replaced: look once more after that.
_AGAIN_S: typing.Final = quarantine.RECYCLE_AFTER_S
# A socket that was not found is of TCP, or not connected; it may become so later.
_FORGET_S: typing.Final = 60.0


class StaleSockets:
    """Looks for such sockets whenever the backends of a UDP port have changed."""

    def __init__(self, kernel: maps.Maps, telemetry: metrics.Metrics) -> None:
        self._kernel = kernel
        self._telemetry = telemetry
        self._changed = asyncio.Event()
        self._changed.set()
        self._passed: dict[stale.Stale, float] = {}
        self._said = ""

    def wrote(self, writes: typing.Sequence[tables.Write]) -> None:
        """Take note of writes that were just made; on the event loop."""
        if not self._changed.is_set() and stale.concerns_udp(writes):
            self._changed.set()

    async def run(self, ready: asyncio.Event) -> typing.NoReturn:
        """Look once the first full state is in the kernel, and after each change."""
        await ready.wait()
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._look()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_AGAIN_S):
                    await self._changed.wait()
                    continue
            await self._look()

    async def _look(self) -> None:
        began_s = time.monotonic()
        try:
            closed = await asyncio.to_thread(self.close)
        except OSError as error:
            self._say(f"cannot look for sockets of backends that are gone: {error}")
        else:
            self._telemetry.closed_sockets(closed, time.monotonic() - began_s)
        await asyncio.sleep(max(_LEAST_PAUSE_S, _PAUSES * (time.monotonic() - began_s)))

    def close(self) -> dict[model.Family, int]:
        """Close what is stale now; returns how many sockets that were, by family. Raises OSError."""
        now_s = time.monotonic()
        found = stale.stale(self._kernel)
        self._passed = {one: due_s for one in found if (due_s := self._passed.get(one, now_s)) > now_s}
        wanted = {
            one.cookie: sock_diag.Peer(one.address, one.port) for one in found if one not in self._passed
        }
        if not wanted:
            return {}
        results, failures = namespaces.visit(namespaces.every(), lambda: sock_diag.close_udp(wanted))
        closed = set().union(*results.values())
        if failures:
            reasons = sorted({str(failure) for failure in failures.values()})
            self._say(f"cannot look for sockets in {len(failures)} network namespaces: {'; '.join(reasons)}")
        else:
            self._said = ""
            self._passed.update({one: now_s + _FORGET_S for one in found if one.cookie in wanted})
        if closed:
            _log.info("closed UDP sockets of backends that no longer serve: %d", len(closed))
        return collections.Counter(addresses.family_of(wanted[cookie].address) for cookie in closed)

    def _say(self, what: str) -> None:
        if what != self._said:
            _log.error("%s", what)
        self._said = what
