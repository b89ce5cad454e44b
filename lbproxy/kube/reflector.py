"""Follow one kind of object: list it in chunks, then watch; list again where the watch can not go on.

Invariants: nothing is deleted before a complete list; an object that can not be
decoded yields `Rejected` and nothing else; the version to go on from never
passes what has been emitted. What the server does wrong never leaves
`Reflector.run`, which only ends by being cancelled.
"""

import asyncio
import contextlib
import dataclasses
import logging
import random
import time
import typing
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping

import msgspec

from lbproxy.core import decode, events, identity
from lbproxy.kube import client, credentials, lines

PAGE_OBJECTS = 500
WATCH_S = (300, 600)  # how long a watch is to last, drawn anew each time so that agents spread out
SHORT_WATCH_S = 1.0  # one that ends sooner and says nothing counts as a failure
IDLE_TIMEOUT_S = 150.0  # API servers send a bookmark a minute
SILENT_S = 60.0  # after so long without a watch people are told; a server that starts over takes less
MOST_FAILURES = 4  # that the server tells of in a row, from one version: it may never come past it
MOST_SILENCES = 2  # so many watches in a row: what they watch may be of an earlier life of the server
_DECODED_AT_ONCE = 50
BACKOFF_S = (0.5, 30.0)  # first and longest; each wait is drawn between half and one and a half of it

Decode = Callable[[bytes], events.Upsert]
Emit = Callable[[list[events.Event]], None]

_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_log = logging.getLogger(__name__)


class Transport(typing.Protocol):
    """What a reflector needs of `client.Client`."""

    async def get(self, path: str, query: Mapping[str, str]) -> bytes:
        """Return a whole body."""

    def stream(
        self, path: str, query: Mapping[str, str], idle_timeout_s: float
    ) -> contextlib.AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Yield a body as it arrives."""


class Watched(typing.NamedTuple):
    """A kind of object, where it is served, which of them are wanted and how one is decoded."""

    kind: events.Kind
    path: str
    decode: Decode
    label_selector: str = ""
    field_selector: str = ""

    @property
    def selectors(self) -> dict[str, str]:
        """The selectors as query parameters."""
        query = {"labelSelector": self.label_selector, "fieldSelector": self.field_selector}
        return {name: value for name, value in query.items() if value}


def services() -> Watched:
    """Services but headless ones and those of another proxy (SEL-1, SEL-4)."""
    return Watched(
        events.Kind.SERVICE,
        "/api/v1/services",
        decode.service,
        label_selector="!service.kubernetes.io/service-proxy-name",
        field_selector="spec.clusterIP!=None",
    )


def endpoint_slices() -> Watched:
    """EndpointSlices but those of headless Services (SEL-5)."""
    return Watched(
        events.Kind.ENDPOINT_SLICE,
        "/apis/discovery.k8s.io/v1/endpointslices",
        decode.endpoint_slice,
        label_selector="!service.kubernetes.io/headless",
    )


def node(name: str) -> Watched:
    """The one Node that we run on (API-1)."""
    return Watched(events.Kind.NODE, "/api/v1/nodes", decode.node, field_selector=f"metadata.name={name}")


class ListMetadata(msgspec.Struct, rename={"resource_version": "resourceVersion", "token": "continue"}):
    """What versions a list and continues it."""

    resource_version: str = ""
    token: str | None = None


class Page(msgspec.Struct):
    """A list, or a chunk of one, with its objects left as they are."""

    metadata: ListMetadata
    items: list[msgspec.Raw] | None = None


class WatchLine(msgspec.Struct):
    """An event of a watch, with its object left as it is."""

    type: str
    object: msgspec.Raw


class BookmarkMetadata(msgspec.Struct, rename="camel"):
    """What a bookmark says."""

    resource_version: str


class Bookmark(msgspec.Struct):
    """An event that only moves the version on."""

    metadata: BookmarkMetadata


class WatchFailed(client.ClientError):
    """The server says in a watch that it can not go on with it."""


class Relist(Exception):  # noqa: N818
    """The watch can not go on from where it is."""


@dataclasses.dataclass(slots=True)
class State:
    """How a reflector fares, for metrics; times are Unix seconds, 0 where never."""

    connected: bool = False
    synced: bool = False
    version: str = ""  # empty: has to be listed
    last_heard_s: float = 0.0
    last_bookmark_s: float = 0.0
    lists: int = 0
    watches: int = 0
    failures: int = 0
    rejected: int = 0
    last_error: str = ""


class Reflector:
    """Emits what happens to the objects of one kind, in batches of one chunk or one read."""

    def __init__(
        self,
        transport: Transport,
        watched: Watched,
        emit: Emit,
        *,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        draw: Callable[[float, float], float] = random.uniform,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.watched = watched
        self.state = State()
        self._transport = transport
        self._emit = emit
        self._idle_timeout_s = idle_timeout_s
        self._sleep = sleep
        self._draw = draw
        self._clock = clock
        self._monotonic = monotonic
        self._closed_s = monotonic()  # when the last watch ended
        self._silences = 0  # watches in a row that were given up for being silent
        self._failures = 0  # and that have failed where they began
        self._known: dict[events.ObjectName, None] = {}  # a set of half the size
        self._unreadable: set[events.ObjectName] = set()  # as far as lines of the watch could be read
        self._backoff_s = BACKOFF_S[0]
        self._read_page = msgspec.json.Decoder(Page).decode
        self._read_line = msgspec.json.Decoder(WatchLine).decode

    @property
    def problem(self) -> str:
        """That there was no watch for a minute, to be read by anybody; empty where there is one."""
        closed_s = self._monotonic() - self._closed_s
        if self.state.connected or not self.state.synced or closed_s < SILENT_S:
            return ""
        told = f"the API server has told nothing of {self.watched.kind} for {closed_s:.0f} s"
        return f"{told}: this node serves what it knew last"

    async def run(self) -> typing.NoReturn:
        """List and watch until cancelled."""
        while True:
            try:
                if not self.state.version:
                    await self._list()
                while await self._watch():
                    pass
                await self._wait("the watch ended before it said anything")
            except Relist as reason:
                self.state.version = ""
                await self._wait(f"has to be listed again: {reason}")
            except client.ClientError as error:
                self._silences += isinstance(error, client.Stalled)
                self._failures += isinstance(error, WatchFailed)
                stuck = self._silences >= MOST_SILENCES or self._failures >= MOST_FAILURES
                if error.status in (400, 410) or _is_ahead(error) or stuck:
                    self.state.version = ""
                    self._silences = self._failures = 0
                await self._wait(str(error))

    async def _wait(self, reason: str) -> None:
        """Back off, longer each time until a watch makes progress."""
        self.state.failures += 1
        self.state.last_error = reason
        pause_s = self._backoff_s * self._draw(0.5, 1.5)
        self._backoff_s = min(2 * self._backoff_s, BACKOFF_S[1])
        _log.warning("%s: %s; next attempt in %.1f s", self.watched.kind, reason, pause_s)
        await self._sleep(pause_s)

    async def _list(self) -> None:
        self.state.lists += 1
        listed: dict[events.ObjectName, None] = {}
        version = ""
        async with contextlib.aclosing(self._pages()) as pages:
            async for page in pages:
                objects: list[events.Event] = []
                names: dict[events.ObjectName, None] = {}
                for number, raw in enumerate(page.items or ()):
                    event = self._decoded(raw)
                    objects.append(event)
                    names[event.name] = None
                    if number % _DECODED_AT_ONCE == 0:
                        # Others have their turn, and the request for the next chunk is sent.
                        await asyncio.sleep(0)
                # What was emitted is known even if the list breaks off: the next must be able to delete it.
                self._known |= names
                listed |= names
                self._emit(objects)
                version = page.metadata.resource_version
        vanished = sorted(self._known.keys() - listed.keys())
        self._known = listed
        # What the list has it also decides on; the rest of an unreadable line may have named nothing at all.
        mended = sorted(self._unreadable - listed.keys())
        self._unreadable.clear()
        kind = self.watched.kind
        self._emit(
            [
                *(events.Delete(kind, name) for name in vanished),
                *(events.Accepted(kind, name) for name in mended),
                events.Synced(kind),
            ]
        )
        self.state.version = version
        self.state.synced = True

    async def _pages(self) -> AsyncGenerator[Page, None]:
        """Yield the chunks of a list; each is asked for while the one before it is decoded."""
        query = {"limit": str(PAGE_OBJECTS), **self.watched.selectors}
        asked = asyncio.create_task(self._transport.get(self.watched.path, query))
        try:
            while True:
                body = await asked
                try:
                    page = self._read_page(body)
                except _UNREADABLE as error:
                    raise client.ClientError(f"{self.watched.path}: not a list: {error}") from error
                self._heard()
                if not page.metadata.token:
                    yield page
                    return
                query = {**query, "continue": page.metadata.token}
                asked = asyncio.create_task(self._transport.get(self.watched.path, query))
                yield page
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    def _decoded(self, raw: msgspec.Raw) -> events.Upsert | events.Rejected:
        try:
            return self.watched.decode(bytes(raw))
        except decode.DecodeError as error:
            self.state.rejected += 1
            return error.event

    async def _watch(self) -> bool:
        """Watch until the server ends it; whether the next watch may follow at once."""
        self.state.watches += 1
        started_s = self._monotonic()
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self.state.version,
            "timeoutSeconds": str(int(self._draw(*WATCH_S))),
            **self.watched.selectors,
        }
        started_at = self.state.version
        splitter = lines.LineSplitter()
        async with self._transport.stream(self.watched.path, query, self._idle_timeout_s) as pieces:
            self.state.connected = True
            try:
                async for piece in pieces:
                    self._heard()
                    self._silences = 0
                    self._take(splitter.feed(piece))
            except lines.LineTooLong as error:
                raise Relist(str(error)) from error
            finally:
                self.state.connected = False
                self._closed_s = self._monotonic()
        # A line that was cut off is forgotten: the next watch sends it again.
        return self.state.version != started_at or self._monotonic() - started_s >= SHORT_WATCH_S

    def _take(self, complete: list[bytes]) -> None:
        """Emit what the lines say, as one batch, then move the version past them."""
        batch: list[events.Event] = []
        version = self.state.version
        try:
            for line in complete:
                moved = self._event(line, batch)
                if _went_back(version, moved):
                    # Restored from a backup, say: what was deleted in between would stay for ever.
                    raise Relist(f"the server's versions went back from {version} to {moved}")
                version = moved or version
        finally:
            if batch:
                self._emit(batch)
            if version != self.state.version:
                self.state.version = version
                self._backoff_s = BACKOFF_S[0]
                self._failures = 0

    def _event(self, line: bytes, batch: list[events.Event]) -> str:
        """Add what one line says to the batch; returns the version it moves to, empty if to none."""
        kind = self.watched.kind
        try:
            event = self._read_line(line)
            if event.type == "ERROR":
                self._fail(msgspec.json.decode(event.object, type=client.Status))
            if event.type == "BOOKMARK":
                self.state.last_bookmark_s = self._clock()
                return msgspec.json.decode(event.object, type=Bookmark).metadata.resource_version
        except _UNREADABLE as error:
            # What the line would have said is lost, so it has to be asked for again.
            reason = credentials.one_line(f"a line of the watch is unreadable: {error}")
            self.state.rejected += 1
            name = identity.identify(line, kind).name
            self._unreadable.add(name)
            batch.append(events.Rejected(kind, name, reason))
            raise Relist(reason) from error
        who = identity.identify(event.object, kind)
        if event.type == "DELETED":
            self._known.pop(who.name, None)
            batch.append(events.Delete(kind, who.name))
        elif event.type in ("ADDED", "MODIFIED"):
            self._known[who.name] = None
            batch.append(self._decoded(event.object))
        return who.resource_version

    def _fail(self, status: client.Status) -> typing.NoReturn:
        message = status.message or status.reason or "no reason given"
        raise WatchFailed(f"{self.watched.path}: the watch failed: {message}", status.code)

    def _heard(self) -> None:
        self.state.last_heard_s = self._clock()


def _went_back(version: str, moved: str) -> bool:
    """Whether a watch has moved to an earlier version. Those that are no numbers can not be compared."""
    return version.isdecimal() and moved.isdecimal() and int(moved) < int(version)


def _is_ahead(error: client.ClientError) -> bool:
    """Whether the server says that it has not come as far as the version that was asked for."""
    return error.status == 504 and "too large resource version" in str(error).lower()
