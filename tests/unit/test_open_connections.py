"""The agent's count of what is open, over maps in memory."""

import asyncio

import pytest

from lbproxy import abi, flow_table
from lbproxy.core import inventory, model, tables
from lbproxy.kernel import fake, maps
from tests import installing, polling

LEAST = model.Algorithm.LEAST_CONNECTIONS
NOW = 1000


class Cluster:
    """A service with least-connections and one without, and what their backends have open."""

    def __init__(self) -> None:
        self.maps = fake.FakeMaps(installing.SIZES)
        self.installer = installing.Installer(self.maps, maps.capacity(installing.SIZES))
        timeouts = tables.NO_SETTINGS._replace(tcp_new_ticks=60, tcp_established_ticks=600)
        self.maps.apply([tables.Put(tables.Table.SETTINGS, tables.row_key(0), timeouts.pack())])
        self.put(LEAST)
        self.looked = flow_table.FlowTable(self.maps, lambda: NOW, self)

    def put(self, algorithm: model.Algorithm) -> None:
        endpoints = [installing.endpoint(f"10.244.0.{host}") for host in (1, 2)]
        self.installer.service("default/web", ["10.96.0.1"], endpoints, algorithm=algorithm)

    @property
    def anew(self) -> int:
        return self.installer.ledger.counted_anew

    def __call__(self) -> dict[int, bytes]:
        return self.installer.ledger.counted_backends()

    def socket(self, number: int, cookie: int) -> None:
        """A socket's record that names a backend."""
        place = self()[number]
        pack = abi.LAYOUTS["socket_record"].pack
        row = pack(cookie, bytes(16), place[:16], b"\0\x50", place[16:], number, 0)
        self.maps._rows["sockets"][tables.row_key(cookie % 256)] = row

    def flow(self, number: int, port: int, table: str = "flows") -> None:
        """A flow's row of its first direction."""
        place = self()[number]
        key = tables.FlowKey(bytes(16), bytes(16), port.to_bytes(2, "big"), b"\0\x50", 6, 0)
        state = tables.FlowState.ORIGINAL
        row = tables.Flow(place[:16], b"\0\1", place[16:], number, NOW, bytes(3), state)
        self.maps._rows[table][key.pack()] = row.pack()

    def count(self, number: int, opened: int, closed: int) -> None:
        """What the programs have counted."""
        row = abi.LAYOUTS["backend_load"].pack(opened, closed)
        self.maps.apply([tables.Put(tables.Table.BACKEND_LOAD, tables.row_key(number), row)])

    @property
    def open(self) -> list[int | None]:
        (port,) = inventory.read(self.maps).ports
        return [backend.open for backend in port.backends]


def test_what_programs_did_not_see_is_found_at_the_next_look() -> None:
    cluster = Cluster()
    first, second = cluster()
    for cookie in (1, 2, 3):
        cluster.socket(first, cookie)
    cluster.flow(second, 40_000)
    assert cluster.open == [0, 0]
    cluster.looked.look()
    assert cluster.open == [3, 1]
    # They close, and that is seen: what was put right stays so.
    cluster.maps._rows["sockets"].clear()
    cluster.maps._rows["flows"].clear()
    cluster.count(first, 0, 3)
    cluster.count(second, 5, 6)
    assert cluster.open == [0, 0]
    written = len(cluster.maps.log)
    cluster.looked.look()
    assert cluster.open == [0, 0]
    assert all(write.table is not tables.Table.LOAD_CORRECTIONS for write in cluster.maps.log[written:])


def test_flows_that_were_sent_aside_are_open_too() -> None:
    cluster = Cluster()
    first, _ = cluster()
    cluster.looked.look()  # the first one is for absent_flows.py as well, and reads everything
    cluster.flow(first, 40_000)
    cluster.flow(first, 40_001, "flows_new")
    cluster.looked.look()
    assert cluster.open == [1, 0]
    full = tables.row_key(abi.constant("COUNTER_FLOWS_FULL"))
    cluster.maps._rows["counters"][full] = (1).to_bytes(8, tables.BYTE_ORDER)
    cluster.looked.look()
    assert cluster.open == [2, 0]


def test_nothing_is_read_where_nobody_is_counted() -> None:
    cluster = Cluster()
    cluster.put(model.Algorithm.RANDOM)

    def refuse(table: str) -> None:
        raise AssertionError(table)

    cluster.maps.rows = refuse  # type: ignore[method-assign,assignment]
    cluster.looked.look()


async def test_a_service_that_is_counted_from_now_on_is_looked_at_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flow_table, "_POLL_S", 0.01)
    # Not when it is due anyway: that would be never.
    monkeypatch.setattr(flow_table, "_INTERVAL_S", 1e9)
    cluster = Cluster()
    cluster.put(model.Algorithm.RANDOM)
    before = cluster.looked.counts
    looking = asyncio.create_task(cluster.looked.run())
    try:
        await polling.eventually_async(lambda: cluster.looked.counts is not before, what="the first look")
        cluster.put(LEAST)
        first, _ = cluster()
        cluster.socket(first, 1)
        await polling.eventually_async(lambda: cluster.open == [1, 0], what="another look")
    finally:
        looking.cancel()
