"""Flows through the packet path that are open while their service changes."""

import collections.abc
import dataclasses
import pathlib

import pytest

from lbproxy.lab import shell
from tests import polling
from tests.lab.contract import book, playing, variants
from tests.lab.contract.book import LOCAL, LOCAL_TOO, REMOTE, Endpoint
from tests.lab.contract.patterns import BOTH_LOCAL, DRAINING, GONE, UNREADY
from tests.lab.contract.test_changes import become, page

PLACES = ("outside", "n2/p1", "n1/p4")
clients = pytest.mark.parametrize("where", PLACES)
families = pytest.mark.parametrize("family", [4, 6])
OWN = book.Addresses(1)
USUAL = (*variants.POD_DEVICES, *variants.BY_CIDR)


@pytest.fixture(scope="module")
def player(load_program: pathlib.Path) -> collections.abc.Iterator[playing.Player]:
    with playing.Player([], load_program) as started:
        # Flows are to live as long as usual.
        started.start(dataclasses.replace(variants.VARIANTS["plain"], flags=USUAL))
        yield started


@pytest.fixture(scope="module")
def shells(player: playing.Player) -> collections.abc.Iterator[dict[str, shell.Shell]]:
    opened = {where: player.lab.shell(where, cgroup=False) for where in PLACES}
    yield opened
    for one in opened.values():
        one.close()


def targets(family: int, port: int) -> list[tuple[str, int]]:
    node = book.PLACES["n1"].address(family)
    return [(OWN.cluster(family), port), (OWN.balancer(family), port), (node, OWN.node_port)]


def settle(player: playing.Player, scenario: book.Scenario, *places: str) -> None:
    """Make the service so, and wait until new connections go to one of these places."""
    become(player, scenario)
    names = {f"{place}@{book.TARGET}" for place in places}
    with player.lab.shell("outside", cgroup=False) as fresh:

        def settled() -> bool:
            asked = [target for family in book.FAMILIES for target in targets(family, book.TCP_PORT)]
            found = {fresh.tcp(*target, timeout_s=0.3).server for target in asked}
            return found <= names if names else found == {""}

        polling.eventually(settled, what=f"connections to {names}")


def server(held: shell.Socket) -> str:
    return held.ask(2.0).server


@clients
@families
def test_tcp_keeps_its_backend_whatever_becomes_of_the_service(
    player: playing.Player, shells: dict[str, shell.Shell], where: str, family: int
) -> None:  # EP-11, ETP-11, REJ-5, CT-8, SYNC-7
    settle(player, page(endpoints=[Endpoint(LOCAL)]), LOCAL)
    held = [shells[where].open(*target) for target in targets(family, book.TCP_PORT)]
    first = f"{LOCAL}@{book.TARGET}"
    try:
        assert [server(one) for one in held] == [first] * 3
        settle(player, page(endpoints=[Endpoint(REMOTE)]), REMOTE)
        assert [server(one) for one in held] == [first] * 3
        settle(player, page(endpoints=[Endpoint(LOCAL_TOO), Endpoint(REMOTE)], spec=BOTH_LOCAL), LOCAL_TOO)
        assert [server(one) for one in held] == [first] * 3
        become(player, page())
        assert [server(one) for one in held] == [first] * 3
        become(player, book.Scenario("none", (), [], []))
        player.start(player.variant)
        assert [server(one) for one in held] == [first] * 3
    finally:
        for one in held:
            one.close()


@clients
@families
def test_udp_moves_when_its_backend_no_longer_serves(
    player: playing.Player, shells: dict[str, shell.Shell], where: str, family: int
) -> None:  # CT-2, CT-3, E2E-2
    here, there = f"{LOCAL}@{book.TARGET}", f"{REMOTE}@{book.TARGET}"
    settle(player, page(endpoints=[Endpoint(LOCAL)]), LOCAL)
    held = [shells[where].open(*target, udp=True) for target in targets(family, book.UDP_PORT)]
    try:
        assert [server(one) for one in held] == [here] * 3
        for conditions in (DRAINING, UNREADY):
            settle(player, page(endpoints=[Endpoint(LOCAL, **conditions), Endpoint(REMOTE)]), REMOTE)
            assert [server(one) for one in held] == [here] * 3
        settle(player, page(endpoints=[Endpoint(LOCAL, **GONE)]))
        assert [server(one) for one in held] == [here] * 3
        settle(player, page(endpoints=[Endpoint(REMOTE)]), REMOTE)
        assert [server(one) for one in held] == [there] * 3
    finally:
        for one in held:
            one.close()


@clients
@families
def test_udp_finds_endpoints_that_come_later(
    player: playing.Player, shells: dict[str, shell.Shell], where: str, family: int
) -> None:  # CT-4
    settle(player, book.Scenario("none", (), [], []))
    held = [shells[where].open(*target, udp=True) for target in targets(family, book.UDP_PORT)[:2]]
    try:
        for one in held:
            one.send(b"?\n")
        settle(player, page(endpoints=[Endpoint(LOCAL)]), LOCAL)
        assert [server(one) for one in held] == [f"{LOCAL}@{book.TARGET}"] * 2
    finally:
        for one in held:
            one.close()
