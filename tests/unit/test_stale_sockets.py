"""When stale sockets are looked for, and what becomes of failures."""

import asyncio
from collections.abc import Iterator

import pytest

from lbproxy import stale_sockets
from lbproxy.core import model, tables
from lbproxy.kernel import fake
from lbproxy.metrics import metrics
from tests import polling, serving

UDP, TCP = 17, 6


class Looks(stale_sockets.StaleSockets):
    """Counts its looks, which close nothing."""

    def __init__(self, kernel: fake.FakeMaps) -> None:
        super().__init__(kernel, metrics.Metrics())
        self.count = 0

    def close(self) -> dict[model.Family, int]:
        self.count += 1
        return super().close()


def written(proto: int) -> list[tables.Write]:
    row = tables.Backend(bytes(16), bytes(2), proto, tables.BackendState.DRAINING, 1, 0, 1, 0)
    return [tables.Put(tables.Table.BACKENDS, tables.row_key(1), row.pack())]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stale_sockets, "_LEAST_PAUSE_S", 0.001)
    monkeypatch.setattr(stale_sockets, "_AGAIN_S", 0.01)


async def looked(looks: Looks, count: int) -> None:
    await polling.eventually_async(lambda: looks.count >= count)
    await asyncio.sleep(0.05)
    assert looks.count == count


async def test_a_look_follows_the_first_full_state_and_each_change_of_udp() -> None:
    looks, ready = Looks(fake.FakeMaps(serving.SIZES)), asyncio.Event()
    running = asyncio.create_task(looks.run(ready))
    await looked(looks, 0)
    ready.set()
    # And once more each time, when no program can have the old slot any longer.
    await looked(looks, 2)
    looks.wrote(written(TCP))
    await looked(looks, 2)
    looks.wrote(written(UDP))
    await looked(looks, 4)
    running.cancel()


class Broken(fake.FakeMaps):
    def rows(self, table: str) -> Iterator[tuple[bytes, bytes]]:
        raise OSError(5, "no such luck")


async def test_a_failure_is_told_once_and_the_next_change_is_followed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    looks, ready = Looks(Broken(serving.SIZES)), asyncio.Event()
    running = asyncio.create_task(looks.run(ready))
    ready.set()
    await looked(looks, 2)
    looks.wrote(written(UDP))
    await looked(looks, 4)
    running.cancel()
    assert [record.message for record in caplog.records] == [
        "cannot look for sockets of backends that are gone: [Errno 5] no such luck"
    ]
