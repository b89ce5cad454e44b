"""Tells the programs which address the sockets of each network namespace have.

Only while some load balancer IP is restricted to source ranges, or while UDP flows are left
to another proxy, which may be of such sockets. An unknown
namespace may not use such an IP, so a new pod has to be found quickly: by the
notices of its devices and addresses, by a look at the names of namespaces every
second, and by a look at everything now and then.
"""

import asyncio
import contextlib
import logging
import math
import socket
import threading
import time
import typing

from lbproxy import errors, gate
from lbproxy.core import inventory, netns_rows, tables
from lbproxy.kernel import maps, namespaces, netns_addresses, node

_log = logging.getLogger(__name__)

_SETTLE_S: typing.Final = 0.02
_NAMES_S: typing.Final = 1.0
_EVERYTHING_S: typing.Final = 30.0
# Not every runtime names its namespaces: after a notice that no name explains, processes are asked.
_PROCESSES_S: typing.Final = 5.0
# A pod has its addresses within this time; until then it is looked at again after each notice.
_NEW_S: typing.Final = 10.0


class _Known(typing.NamedTuple):
    """A namespace, and the paths it was found at: its number may go to another one that comes after it."""

    found: netns_rows.Namespace
    paths: frozenset[str]
    since_s: float

    def is_at(self, paths: typing.Iterable[str]) -> bool:
        return not self.paths.isdisjoint(paths)


class NetnsAddresses:
    """Follows the namespaces of this machine while it is needed."""

    def __init__(
        self,
        kernel: maps.Maps,
        clock: typing.Callable[[], float] = time.monotonic,
        writing: gate.Gate | None = None,
    ) -> None:
        """`writing` is passed whenever the tables are written to."""
        self._kernel = kernel
        self._writing = writing or gate.Gate()
        self._clock = clock
        self._ranges_changed = asyncio.Event()
        self._ranges_changed.set()
        self._awake = asyncio.Event()
        self._heard = False  # a notice, since the last look
        self._unexplained = False  # there was a notice, and nothing was found that had changed
        self._known: dict[namespaces.Identity, _Known] = {}
        self._own: netns_rows.Own = {}
        self._everything_s = -math.inf
        self._processes_s = -math.inf  # when they were asked last
        self._said = ""
        self._alone = threading.Lock()  # one look at a time, in whichever thread

    def wrote(self, writes: typing.Sequence[tables.Write]) -> None:
        """Take note of writes that were just made; on the event loop."""
        if any(write.table == tables.Table.SOURCE_RANGES for write in writes):
            self.wanted()

    def wanted(self) -> None:
        """Look again whether it is needed; on the event loop."""
        self._ranges_changed.set()
        self._awake.set()

    async def run(self, ready: asyncio.Event) -> typing.NoReturn:
        """Follow the namespaces from the first full state on, whenever ranges are in force."""
        await ready.wait()
        while True:
            await self._ranges_changed.wait()
            self._ranges_changed.clear()
            try:
                if await asyncio.to_thread(self.needed):
                    await self._follow()
                async with self._writing.shared():
                    await asyncio.to_thread(self.forget)
            except (OSError, errors.AgentError) as error:
                self._say(f"cannot tell whose the sockets are that dial restricted addresses: {error}")
                await asyncio.sleep(_NAMES_S)
                self._ranges_changed.set()

    async def _follow(self) -> None:
        """For as long as it is needed, also while the ranges change: one socket hears all notices."""
        loop = asyncio.get_running_loop()
        with netns_addresses.notices() as notices:
            loop.add_reader(notices, self._drain, notices)
            try:
                # Until now nobody has listened.
                heard = everything = True
                while True:
                    async with self._writing.shared():
                        await asyncio.to_thread(self.look, heard=heard, everything=everything)
                    everything = False
                    heard = await self._wait()
                    if self._ranges_changed.is_set():
                        self._ranges_changed.clear()
                        if not await asyncio.to_thread(self.needed):
                            return
            finally:
                loop.remove_reader(notices)

    async def _wait(self) -> bool:
        """Whether there was a notice within the time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_NAMES_S):
                await self._awake.wait()
            # They come in bursts.
            await asyncio.sleep(_SETTLE_S)
        self._awake.clear()
        heard, self._heard = self._heard, False
        return heard

    def _drain(self, notices: socket.socket) -> None:
        # The kernel may have had more than the socket could hold.
        with contextlib.suppress(OSError):
            while notices.recv(65536):
                pass
        self._heard = True
        self._awake.set()

    def needed(self) -> bool:
        """Whether any address is restricted, or any UDP flow held. Raises OSError."""
        return inventory.is_set(self._kernel, tables.Handover.HELD_UDP) or any(
            keys for keys, _ in self._kernel.batches(tables.Table.SOURCE_RANGES, 1)
        )

    def forget(self) -> None:
        """Remove what the programs were told. Raises OSError and AgentError."""
        with self._alone:
            self._known.clear()
            self._everything_s = -math.inf
            self._write({})

    def look(self, *, heard: bool, everything: bool = False) -> None:
        """Enter the namespaces that are new, or all when it is time to, and write what has changed.

        `heard` says that something has happened somewhere. Raises OSError and AgentError.
        """
        with self._alone:
            now_s = self._clock()
            if everything or now_s - self._everything_s >= _EVERYTHING_S:
                self._look_at_everything(now_s)
                return
            changed = self._look_at_new(namespaces.named(), now_s, heard=heard)
            self._unexplained |= heard and not changed
            if self._unexplained and now_s - self._processes_s >= _PROCESSES_S:
                self._processes_s, self._unexplained = now_s, False
                self._look_at_new(namespaces.every(), now_s, heard=True)

    def _look_at_everything(self, now_s: float) -> None:
        spaces = namespaces.every()
        self._everything_s = self._processes_s = now_s
        self._unexplained = False
        self._known = {space: known for space, known in self._known.items() if space in spaces}
        self._own = self._own_addresses()
        self._visit(spaces, now_s)

    def _look_at_new(self, spaces: namespaces.Found, now_s: float, *, heard: bool) -> bool:
        """Enter those that are not known, and after a notice those that are new. Whether any had changed."""
        due: namespaces.Found = {}
        for space, paths in spaces.items():
            known = self._known.get(space)
            if known is None or not known.is_at(paths) or (heard and now_s - known.since_s < _NEW_S):
                due[space] = paths
        own = self._own_addresses()
        if not due and own == self._own:
            return False
        self._own = own
        return self._visit(due, now_s)

    def _visit(self, due: namespaces.Found, now_s: float) -> bool:
        """Enter these, and write what all known ones amount to. Whether anything had changed."""
        found, failures = namespaces.visit(due, netns_addresses.here)
        changed = False
        for space, namespace in found.items():
            known = self._known.get(space)
            same = known is not None and known.found.cookie == namespace.cookie
            changed |= known is None or known.found != namespace
            since_s = known.since_s if known is not None and same else now_s
            self._known[space] = _Known(namespace, frozenset(due[space]), since_s)
        self._write(self._rows())
        failed = sorted({str(failure) for failure in failures.values()})
        self._say(
            f"cannot look into {len(failures)} network namespaces: {'; '.join(failed)}" if failed else ""
        )
        return changed

    def _rows(self) -> dict[bytes, bytes]:
        found = [known.found for known in self._known.values()]
        return netns_rows.rows(found, node.netns_cookie(), self._own)

    def _own_addresses(self) -> netns_rows.Own:
        packed = self._kernel.row(tables.Table.SETTINGS, tables.row_key(0))
        return netns_rows.own_addresses(tables.settings(packed)) if packed else {}

    def _write(self, want: dict[bytes, bytes]) -> None:
        have = dict(self._kernel.rows(tables.Table.NETNS_ADDRESSES))
        writes = netns_rows.writes(want, have)
        if writes:
            self._kernel.apply(writes)
            _log.debug("source addresses of network namespaces: %d changed", len(writes))

    def _say(self, what: str) -> None:
        if what and what != self._said:
            _log.error("%s", what)
        self._said = what
