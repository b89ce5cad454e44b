"""What the tests of kube/ share: the API server stand-in, a client of it, a record of events."""

import asyncio
import contextlib
import time
import typing
from collections.abc import AsyncIterator, Callable

import pytest

from lbproxy.core import events
from lbproxy.kube import client, reflector
from lbproxy.lab import apiserver

T = typing.TypeVar("T")


class Recorder:
    """Keeps what was emitted, and the cluster that it amounts to."""

    def __init__(self) -> None:
        self.batches: list[list[events.Event]] = []
        self.present: dict[str, events.Upsert] = {}

    def __call__(self, batch: list[events.Event]) -> None:
        self.batches.append(batch)
        for event in batch:
            match event:
                case events.Upsert():
                    self.present[str(event.name)] = event
                case events.Delete():
                    self.present.pop(str(event.name), None)

    @property
    def all(self) -> list[events.Event]:
        return [event for batch in self.batches for event in batch]

    def of(self, kind: type[T]) -> list[T]:
        return [event for event in self.all if isinstance(event, kind)]


async def eventually(check: Callable[[], object], timeout_s: float = 20) -> None:
    """Poll until the check holds; its source line is in the traceback where it never does."""
    deadline = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > deadline:
            raise AssertionError("it never came about")
        await asyncio.sleep(0.005)


class Pauses:
    """Stands in for sleep: notes how long was asked for and lets the others run."""

    def __init__(self) -> None:
        self.asked_s: list[float] = []
        self.meanwhile: Callable[[], None] = lambda: None

    async def __call__(self, pause_s: float) -> None:
        self.meanwhile()
        self.asked_s.append(pause_s)
        await asyncio.sleep(0)


class Running:
    """A reflector at work on a server."""

    def __init__(
        self, server: apiserver.ApiServer, watched: reflector.Watched, idle_timeout_s: float = 60
    ) -> None:
        self.server = server
        self.seen = Recorder()
        self.pauses = Pauses()
        self.watched = watched
        self._idle_timeout_s = idle_timeout_s

    @contextlib.asynccontextmanager
    async def work(
        self,
        emit: reflector.Emit | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> AsyncIterator["Running"]:
        api = await client.connect(master=self.server.url)
        self.reflector = reflector.Reflector(
            api,
            self.watched,
            emit or self.seen,
            sleep=self.pauses,
            draw=lambda low, high: (low + high) / 2,
            idle_timeout_s=self._idle_timeout_s,
            clock=clock,
            monotonic=monotonic,
        )
        self.state = self.reflector.state
        task = asyncio.create_task(self.reflector.run())
        try:
            yield self
        finally:
            ended_by_itself = task.done()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await api.close()
        assert not ended_by_itself

    async def until_watching(self) -> None:
        """Wait until the first list is complete and the watch after it is open on both sides."""
        plural = self.watched.path.rpartition("/")[2]
        await eventually(lambda: self.state.synced and self.state.connected and self.server.watching(plural))

    async def until_present(self, *names: str) -> None:
        await eventually(lambda: set(self.seen.present) == {f"default/{name}" for name in names})


@pytest.fixture
async def server() -> AsyncIterator[apiserver.ApiServer]:
    async with apiserver.ApiServer() as server:
        yield server


@pytest.fixture
async def services(server: apiserver.ApiServer) -> AsyncIterator[Running]:
    """A reflector of Services, watching, with the server's `web` and `db` delivered."""
    from tests.kube import objects  # noqa: PLC0415

    for name in ("db", "web"):
        server.store.put(objects.service(name))
    async with Running(server, reflector.services()).work() as running:
        await running.until_watching()
        yield running
