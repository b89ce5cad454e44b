"""Ejections beside what else is known of backends, and beside passes that come between two looks."""

import asyncio
import typing

import msgspec
import pytest

from lbproxy import abi, ejecting
from lbproxy.core import ejection, health, model, outcomes, tables, topology
from lbproxy.kernel import fake
from tests.unit import test_ledger, test_reconcile

WEB = model.ServiceName("default", "web")
PORT = model.PortKey(WEB, "", model.Protocol.TCP, model.Family.IPV4)


def place(host: int) -> topology.Place:
    return topology.Place(test_ledger.address(host), 8080)


class Kernel:
    """Maps whose rows are counted as they are read."""

    def __init__(self, maps: fake.FakeMaps) -> None:
        self._maps = maps
        self.dumps = 0

    def rows(self, table: str) -> typing.Iterator[tuple[bytes, bytes]]:
        self.dumps += 1
        return self._maps.rows(table)

    def row(self, table: str, key: bytes) -> bytes | None:
        return self._maps.row(table, key)

    def rows_of(self, table: str) -> int:
        return self._maps.rows_of(table)


class World:
    """A Service whose backends a judge looks at, pass by pass and second by second."""

    def __init__(self, *hosts: int, room: int = 4096) -> None:
        self.agent = test_reconcile.Agent({"backend_health": room})
        self.now_s = 1000.0
        self.kernel = Kernel(self.agent.kernel.maps)
        self.ejecting = ejecting.Ejecting(clock=lambda: self.now_s)
        self.ejecting.take_over(self.note, ())
        self.agent.take(*test_reconcile.SYNCED)
        self.asks(ejection.Ejection())
        self.has(*hosts)

    def asks(self, how: ejection.Ejection) -> None:
        """What the Service's annotation says, and the passes that put it in force."""
        web = msgspec.structs.replace(test_reconcile.service(), ejection=how)
        self.agent.take(test_reconcile.upsert(web))
        self.settle()

    def note(
        self, port: model.PortKey, at: topology.Place, source: health.Source, usable: bool, reason: str
    ) -> bool:
        changed = self.agent.reconciler.health.note(port, at, source, usable, reason)
        if changed:
            self.agent.reconciler.health_changed(port.service)
        return changed

    def has(self, *hosts: int) -> None:
        """Endpoints, and the passes that put them in force."""
        self.agent.take(test_reconcile.upsert(test_reconcile.slice_of(hosts=hosts)))
        self.settle()

    def settle(self) -> None:
        while self.agent.reconciler.pending:
            self.agent.settle(self.now_s)
            self.ejecting.passed(self.agent.reconciler, [WEB])

    def second(self, **fared: outcomes.Outcomes) -> None:
        """What is counted by now, of `h1` and so on, and of `e1` with clients elsewhere."""
        for name, counts in fared.items():
            row = abi.LAYOUTS["backend_health"].pack(*counts)
            key = outcomes.keys(self.ids()[place(int(name[1:]))])[name[0] == "e"]
            self.agent.kernel.maps.apply([tables.Put(tables.Table.BACKEND_HEALTH, key, row)])
        self.now_s += 1
        asyncio.run(self.ejecting.look(self.kernel))
        self.settle()

    def ids(self) -> dict[topology.Place, int]:
        held = self.agent.reconciler.ledger.installed[PORT].backends
        rows = {number: tables.backend(row) for number, row in held.items()}
        return {
            topology.Place(row.addr, int.from_bytes(row.port, "big")): number for number, row in rows.items()
        }

    @property
    def out(self) -> set[topology.Place]:
        return set(self.agent.reconciler.health.of(PORT))


def counts(good: int, bad: int) -> outcomes.Outcomes:
    return outcomes.Outcomes(established=good, refused=bad)


def ejected() -> World:
    world = World(1, 2, 3)
    world.second()
    world.second(h1=counts(10, 0), h2=counts(0, 10), h3=counts(10, 0))
    assert world.out == {place(2)}
    return world


def test_who_leaves_and_comes_back_between_two_looks_is_still_out() -> None:
    """As an endpoint that moves from one EndpointSlice to another."""
    world = ejected()
    world.has(1, 3)
    assert world.out == set()
    world.has(1, 2, 3)
    assert world.out == {place(2)}
    (verdict,) = world.agent.reconciler.health.of(PORT).values()
    assert verdict.reasons == ("10 of its last 10 connections failed",)
    world.now_s += 30
    world.second()
    assert world.out == set()


def test_who_leaves_for_longer_begins_anew() -> None:
    world = ejected()
    world.has(1, 3)
    world.second()
    world.has(1, 2, 3)
    assert world.out == set()


@pytest.mark.parametrize(("clients", "out"), [("node", set()), ("all", {place(2)})])
def test_clients_elsewhere_tell_only_where_that_is_asked_for(clients: str, out: set[topology.Place]) -> None:
    """A firewall may forbid them what this node's own clients may."""
    for room in (4096, 4):
        world = World(1, 2, room=room)
        world.asks(ejection.Ejection(clients=ejection.Clients(clients)))
        world.second(h1=counts(10, 0), e2=counts(0, 10))
        assert world.out == set()
        world.second(h1=counts(20, 0), e2=counts(0, 20))
        assert world.out == out


def test_failures_of_others_than_before_begin_anew() -> None:
    world = World(1, 2)
    world.second(h1=counts(10, 0), e2=counts(0, 90))
    world.second(h1=counts(20, 0))
    world.asks(ejection.Ejection(clients=ejection.Clients.ALL))
    world.second(h1=counts(30, 0))
    assert world.out == set()
    world.second(h1=counts(40, 0), e2=counts(0, 100))
    assert world.out == {place(2)}


def test_whom_probes_have_found_down_is_no_other_one() -> None:
    world = World(1, 2)
    world.note(PORT, place(1), health.Source.ACTIVE, usable=False, reason="no answer")
    world.settle()
    world.second()
    world.second(h2=counts(28, 12))
    assert world.out == {place(1)}


def test_all_of_a_table_is_read_only_where_most_of_it_is_asked_for() -> None:
    hosts = tuple(range(1, 101))
    world = World(*hosts)
    world.second()
    world.second(h7=counts(0, 10))
    assert (world.out, world.kernel.dumps) == ({place(7)}, 0)
    world = World(*hosts, room=256)
    world.second()
    world.second(h7=counts(0, 10))
    assert (world.out, world.kernel.dumps) == ({place(7)}, 2)
