"""Takes a node over from a proxy that is already there, with none of its flows broken.

A flow stays with whoever began it. What the kernel's tracker translates, by kube-proxy's
rules, goes on there until it ends: such flows are held, as rows of `flows` that make the
packet programs pass them on. Only new ones are ours.

1. `begin`, before the packet path is attached: from now on the programs hold what they do not
   know, and begin nothing.
2. `finish`, once it is attached and every service is in the kernel: what the tracker has is
   held too, and from then on new flows are ours. What began before is in the tracker, what
   began in between the programs have seen.
3. While anything is held, the rows are kept as the tracker's entries are: so the programs and
   the tracker agree on whose a flow is, also where its packets do not come by here.

Where new flows were left to the other proxy once more (RETURN), `resume` goes the same way: it
has begun flows meanwhile.

Removing the last rules that use the tracker or its translation ends both, whatever flows
there are; so as long as any is held there is a table of our own that uses them
(`kernel/anchor.py`).
"""

import asyncio
import collections
import contextlib
import logging
import threading
import time
import typing

from lbproxy import abi, absent_flows, errors, flow_table, gate
from lbproxy.core import conntrack, flows, inventory, model, tables
from lbproxy.kernel import anchor, maps
from lbproxy.kernel import conntrack as tracker

_log = logging.getLogger(__name__)

_BATCH_ROWS: typing.Final = 4096
# A row whose packet is still on its way has no entry yet: it goes when twice none was found.
_SOON_S: typing.Final = 0.5
_INTERVAL_S: typing.Final = 10.0
_PAUSES: typing.Final = 50.0  # not for more of the time than a fiftieth
_PACKETS: typing.Final = abi.constant("LEARN_PACKETS")
_SOCKETS: typing.Final = abi.constant("LEARN_SOCKETS")
_STATE_AT: typing.Final = abi.LAYOUTS["flow"].offset("state")


RETURNING: typing.Final = (
    "new connections are left to kube-proxy, as lbproxy migrate return has said: lbproxy migrate take-over "
    "ends that"
)


class Keeper(typing.Protocol):
    """Who keeps the kernel translating: `anchor.Keeper`."""

    def keep(self, *, needed: bool) -> str:
        """Do so, or no longer; returns why that can not be."""
        ...


Entries = typing.Callable[[], typing.Iterator[conntrack.Entry]]


class HandOver:
    """What is held, and whether it is being learned."""

    def __init__(
        self,
        kernel: maps.Maps,
        *,
        writing: gate.Gate | None = None,
        entries: Entries = tracker.translated,
        keeper: Keeper | None = None,
        clock: typing.Callable[[], int] = flow_table.tick,
        changed: typing.Callable[[], None] = lambda: None,
        prepare: typing.Callable[[], object] = lambda: None,
        absent: absent_flows.AbsentFlows | None = None,
    ) -> None:
        """`changed` is told, on the event loop, when flows of UDP are held or no longer are.

        `prepare` is called where such are held, before new flows are ours. `absent` is told which rows
        are written.
        """
        self._kernel = kernel
        self._writing = writing or gate.Gate()
        self._entries = entries
        self._keeper: Keeper = keeper or anchor.Keeper()
        self._clock = clock
        self._changed = changed
        self._prepare = prepare
        self._absent = absent or absent_flows.AbsentFlows(kernel)
        self._alone = threading.RLock()  # one look at a time, in whichever thread
        self._due = asyncio.Event()
        self._missing: set[bytes] = set()
        self._said_udp = False
        self._took_s = 0.0  # of processor time, for a look
        self.counts: collections.Counter[int] = collections.Counter()  # flows held, by protocol

    @property
    def learning(self) -> bool:
        """Whether an earlier process has begun, and not finished. Raises OSError."""
        return inventory.is_set(self._kernel, tables.Handover.LEARN)

    @property
    def returning(self) -> bool:
        """Whether `lbproxy migrate return` has said that no flow is to be begun. Raises OSError."""
        return inventory.is_set(self._kernel, tables.Handover.RETURN)

    @property
    def unfinished(self) -> bool:
        """Whether new flows are to be ours, and are not yet. Raises OSError."""
        return self.learning or self._return() == tables.Return.ENDS

    def _return(self) -> int:
        return inventory.handover(self._kernel, tables.Handover.RETURN)

    def begin(self, *, sockets: bool) -> None:
        """Have the programs hold what they do not know, of unconnected sockets only if `sockets`.

        Raises AgentError.
        """
        self._put(tables.Handover.LEARN, _PACKETS | (_SOCKETS if sockets else 0))

    def finish(self) -> None:
        """Hold what the tracker has, then let the programs begin flows.

        Raises OSError and AgentError before they do: to be tried again. To begin flows without
        knowing whose those are that come by would break every one of them.
        """
        with self._alone:
            self._finish()

    def _finish(self, *, ends_return: bool = False) -> None:
        began_s = time.monotonic()
        self.look()
        if self.counts[model.Protocol.UDP]:
            self._prepare()
        if ends_return:
            # Not before: while it is set, what lbproxy goes on with and has no row of is told from the rest.
            self._put(tables.Handover.RETURN, tables.Return.NO)
        self._put(tables.Handover.LEARN, 0)
        # What was learned meanwhile is in the tracker by now, with all its addresses.
        try:
            self.look()
        except (OSError, errors.AgentError) as error:
            _log.warning("cannot look once more at the flows of another proxy: %s", error)
        took_ms = (time.monotonic() - began_s) * 1e3
        if total := self.counts.total():
            parts = ", ".join(f"{model.Protocol(one).name} {n}" for one, n in sorted(self.counts.items()))
            _log.info(
                "took over: %d flows (%s) of another proxy stay with it until they end; took=%.0fms",
                total,
                parts,
                took_ms,
            )
        else:
            _log.info("no flow of another proxy to be left alone; took=%.0fms", took_ms)

    def resume(self, *, asked: bool = True) -> bool:
        """End what `return` has begun: hold what the other proxy has begun meanwhile, and begin new flows.

        Unless `asked`, only where somebody at the node has asked for that, or where it was begun.
        Returns whether there was anything to end. Raises OSError and AgentError: to be tried again.
        """
        with self._alone:
            said = self._return()
            ends = said == tables.Return.ENDS or (asked and said != tables.Return.NO)
            if not (ends or self.learning):
                return False
            if ends:
                # Where that fails nothing has changed yet.
                self.look()
                self.begin(sockets=True)
            self._finish(ends_return=ends)
        return True

    @contextlib.contextmanager
    def anchored(self) -> typing.Iterator[None]:
        """While rules of the other proxy are removed: what it has begun is held, and goes on without them.

        Raises OSError, and AgentError where that can not be.
        """
        with self._alone:
            self.look()
            problem = self._keeper.keep(needed=True)
            if problem and self.counts:
                raise errors.AgentError(problem)
            try:
                yield
            finally:
                # Where it can not be seen whether it is needed still, it stays.
                with contextlib.suppress(OSError, errors.AgentError):
                    self.look()

    def started(self) -> None:
        """Look after what is held from now on; on the event loop."""
        self._due.set()

    async def run(self) -> typing.NoReturn:
        """Keep the rows as the tracker's entries are, while anything is held."""
        failure = ""
        while True:
            await self._due.wait()
            self._tell()
            pause_s = _SOON_S
            while True:
                await asyncio.sleep(pause_s)
                try:
                    async with self._writing.shared():
                        left = await asyncio.to_thread(self.look)
                except (OSError, errors.AgentError) as error:
                    if str(error) != failure:
                        _log.error("cannot look after the flows of another proxy: %s", error)
                    failure, left = str(error), 1
                else:
                    failure = ""
                self._tell()
                if not left:
                    break
                pause_s = max(_INTERVAL_S, _PAUSES * self._took_s)
            self._due.clear()
            _log.debug("no flow of another proxy is left")

    def look(self) -> int:
        """Make the rows what the tracker's entries are; returns how many rows are held.

        Raises OSError and AgentError.
        """
        with self._alone:
            return self._look()

    def _look(self) -> int:
        began_s = time.thread_time()
        settings = inventory.settings(self._kernel)
        held: dict[bytes, bytes] = {}
        for keys, packed in self._kernel.batches(tables.Table.FLOWS, _BATCH_ROWS):
            held |= flows.held(keys, packed)
        frontends = _Frontends(self._kernel)
        counts: collections.Counter[int] = collections.Counter()
        found: set[bytes] = set()
        absent: dict[bytes, bytes] = {}
        stale: dict[bytes, tuple[bytes, bytes]] = {}
        now = self._clock()
        for entry in self._entries():
            service = frontends.service(entry)
            if service is None:
                continue
            rows = conntrack.rows(entry, now, settings, service)
            found.update(rows)
            # One that is over is only kept from others as long as its last packets may come.
            if not entry.over:
                counts[entry.proto] += 1
                absent |= {key: row for key, row in rows.items() if key not in held}
            for key, row in rows.items():
                if key in held and (new := conntrack.renewed(entry, held[key], row, now, settings)):
                    stale[key] = held[key], new
        room = self._kernel.rows_of(tables.Table.FLOWS)
        if len(held) + len(absent) > room:
            raise errors.AgentError(
                f"another proxy has {counts.total()} flows, which take {len(held) + len(absent)} rows of "
                f"{tables.Table.FLOWS}, and it has {room}: raise it with --map-rows {tables.Table.FLOWS}=N"
            )
        # Before anything is held: once it is, the rules may go at any moment.
        self._keeper.keep(needed=bool(counts))
        self._put(tables.Handover.HELD_UDP, int(bool(counts[model.Protocol.UDP])))
        # A dead row's key may be a flow's of ours by now.
        self._kernel.exchange(tables.Table.FLOWS, stale)
        if absent:
            with self._absent.written(b"".join(absent)):
                self._kernel.put_absent(tables.Table.FLOWS, absent)
        missing = held.keys() - found
        self._kernel.take(tables.Table.FLOWS, missing & self._missing, _is_ours)
        left = len(held) + len(absent) - len(missing & self._missing)
        self._missing = missing - self._missing
        self.counts = counts
        self._took_s = time.thread_time() - began_s
        return left

    def _tell(self) -> None:
        udp = bool(self.counts[model.Protocol.UDP])
        if udp != self._said_udp:
            self._said_udp = udp
            self._changed()

    def _put(self, row: tables.Handover, value: int) -> None:
        write = tables.handover(row, value)
        if self._kernel.row(write.table, write.key) != write.value:
            self._kernel.apply([write])


def theirs(kernel: maps.Maps, entries: Entries = tracker.translated) -> collections.Counter[int]:
    """The flows to our frontends that the tracker translates, by protocol. Raises OSError."""
    frontends = _Frontends(kernel)
    found = (one.proto for one in entries() if not one.over and frontends.service(one) is not None)
    return collections.Counter(found)


class _Frontends:
    """Which service an entry is of: found under its address, or under its port on one of this node."""

    def __init__(self, kernel: maps.Maps) -> None:
        self._kernel = kernel
        self._known: dict[tuple[bytes, bytes, int], int | None] = {}

    def service(self, entry: conntrack.Entry) -> int | None:
        """The id of the service port; None where the address is none of ours."""
        place = (entry.original.dst, entry.original.dport, entry.proto)
        if place not in self._known:
            self._known[place] = self._look(*place)
        return self._known[place]

    def _look(self, address: bytes, port: bytes, proto: int) -> int | None:
        def on_node(of: bytes) -> bool:
            return self._kernel.row(tables.Table.NODE_ADDRESSES, of) is not None

        found = inventory.frontend_at(self._kernel, address, port, proto, on_node)
        return None if found is None else found.service


def _is_ours(_key: bytes, row: bytes) -> bool:
    return not conntrack.is_held(row[_STATE_AT])
