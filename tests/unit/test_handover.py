"""What a start leaves to another proxy, and how long: on tables in memory, and what a tracker would say."""

import asyncio
import collections.abc

import pytest

from lbproxy import abi, errors
from lbproxy.core import absence, addresses, conntrack, tables
from lbproxy.kernel import fake
from lbproxy.migrate import handover
from tests import installing, polling

LEARN, HELD_UDP, RETURN = (
    tables.row_key(abi.constant(f"HANDOVER_{name}")) for name in ("LEARN", "HELD_UDP", "RETURN")
)
NOW = 1000
SERVICE, NODE, ELSEWHERE = "10.96.0.1", "172.18.0.1", "203.0.113.7"
SETTINGS = tables.NO_SETTINGS._replace(
    tcp_new_ticks=60, tcp_established_ticks=80, tcp_half_closed_ticks=70, tcp_closed_ticks=10,
    udp_new_ticks=30, udp_stream_ticks=120, sctp_new_ticks=30, sctp_established_ticks=200,
)  # fmt: skip
OURS = tables.Flow(bytes(16), b"\0\1", b"\0\2", 3, NOW, b"\1\0\0", int(tables.FlowState.ORIGINAL)).pack()


class Keeper:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.there: list[bool] = []
        self.problem = ""

    def keep(self, *, needed: bool) -> str:
        self.there.append(needed)
        return self.problem if needed else ""


class Node:
    """A node with one service port, on a ClusterIP and a NodePort, and a tracker."""

    def __init__(self) -> None:
        self.maps = fake.FakeMaps(installing.SIZES)
        self.entries: list[conntrack.Entry] = []
        self.keeper = Keeper()
        self.now = NOW
        node = installing.address(NODE)
        self.maps.apply(
            [
                tables.Put(tables.Table.SETTINGS, tables.row_key(0), SETTINGS.pack()),
                tables.Put(tables.Table.NODE_ADDRESSES, node, (1).to_bytes(4, tables.BYTE_ORDER)),
                *(
                    tables.Put(
                        tables.Table.FRONTENDS, frontend(*place), tables.Frontend(7, 1, 1, 0, 0, 1, 1).pack()
                    )
                    for place in (
                        (installing.address(SERVICE), 80, 6, tables.SCOPE_ADDRESS),
                        (installing.address(SERVICE), 53, 17, tables.SCOPE_ADDRESS),
                        (addresses.IPV4_ZERO, 30080, 6, tables.SCOPE_NODE_PORT),
                    )
                ),
            ]
        )
        self.prepared: list[tuple[int, int]] = []  # LEARN and HELD_UDP then
        self.made = handover.HandOver(
            self.maps,
            entries=lambda: iter(self.entries),
            keeper=self.keeper,
            clock=lambda: self.now,
            prepare=lambda: self.prepared.append((self.row(LEARN), self.row(HELD_UDP))),
        )

    def row(self, row: bytes) -> int:
        return int.from_bytes(self.maps.row("handover", row) or b"", tables.BYTE_ORDER)

    def flows(self) -> dict[tables.FlowKey, tables.Flow]:
        return {tables.flow_key(key): tables.flow(row) for key, row in self.maps.rows("flows")}


def frontend(address: bytes, port: int, proto: int, scope: int) -> bytes:
    return tables.FrontendKey(address, port.to_bytes(2, "big"), proto, scope).pack()


def entry(
    to: str = SERVICE, port: int = 80, proto: int = 6, client: int = 40000, tcp: int = 3
) -> conntrack.Entry:
    ends = [installing.address(one) for one in ("192.0.2.9", to, "10.244.1.3", NODE)]
    numbers = [number.to_bytes(2, "big") for number in (client, port, 8080, 5000)]
    return conntrack.Entry(
        proto,
        conntrack.Tuple(ends[0], ends[1], numbers[0], numbers[1]),
        conntrack.Tuple(ends[2], ends[3], numbers[2], numbers[3]),
        0x26,
        tcp if proto == 6 else 0,
        100,
    )


@pytest.fixture
def node() -> Node:
    return Node()


def test_what_the_tracker_translates_for_our_frontends_is_held(node: Node) -> None:
    node.entries = [entry(), entry(NODE, 30080, client=40001), entry(ELSEWHERE), entry(SERVICE, 81)]
    node.made.begin(sockets=True)
    assert node.row(LEARN) == abi.constant("LEARN_PACKETS") | abi.constant("LEARN_SOCKETS")
    assert node.made.learning
    node.made.finish()
    assert node.made.counts == {6: 2}
    rows = node.flows()
    # Both have the same port of this node here, which a tracker would not have.
    assert len(rows) == 2 + 2 + 1
    assert all(conntrack.is_held(row.state) and row.service == b"\7\0\0" for row in rows.values())
    assert node.keeper.there == [True, True]
    assert node.row(HELD_UDP) == 0


def test_nobody_denies_that_there_are_the_rows_of_what_is_held(node: Node) -> None:
    node.maps.set_column("no_flows", "none", absence.Pairs().none())
    node.entries = [entry()]
    node.made.finish()
    seen = absence.Pairs()
    seen.add(b"".join(key for key, _ in node.maps.rows("flows")))
    assert node.maps.column("no_flows", "none") == seen.none() != absence.Pairs().none()


def test_udp_is_prepared_for_before_it_is_anybodys(node: Node) -> None:
    node.entries = [entry(port=53, proto=17)]
    node.made.begin(sockets=True)
    node.made.finish()
    assert node.prepared == [(3, 1)]
    assert node.row(LEARN) == 0
    node.entries.clear()
    node.made.look()
    assert node.row(HELD_UDP) == 0


def test_nothing_to_hold_is_over_at_once(node: Node) -> None:
    node.made.begin(sockets=False)
    node.made.finish()
    assert node.prepared == []
    assert node.flows() == {}
    assert node.keeper.there == [False, False]


def test_no_flow_is_begun_before_the_tracker_was_read(node: Node) -> None:
    """Else whatever it translates would be reset, packet by packet."""
    fails = True

    def entries() -> collections.abc.Iterator[conntrack.Entry]:
        if fails:
            raise OSError(105, "No buffer space available")
        return iter([entry()])

    made = handover.HandOver(node.maps, entries=entries, keeper=node.keeper, clock=lambda: NOW)
    made.begin(sockets=True)
    with pytest.raises(OSError, match="No buffer space"):
        made.finish()
    assert node.row(LEARN) != 0
    fails = False
    made.finish()
    assert node.row(LEARN) == 0
    assert made.counts == {6: 1}


def test_more_flows_than_there_is_room_for_begin_nothing_either(node: Node) -> None:
    room = installing.SIZES["flows"]
    node.entries = [entry(client=port) for port in range(1024, 1024 + room)]
    node.made.begin(sockets=True)
    with pytest.raises(errors.AgentError, match=f"another proxy has {room} flows, .* --map-rows flows=N"):
        node.made.finish()
    assert node.row(LEARN) != 0
    assert node.flows() == {}


def test_a_flow_of_ours_is_not_taken_away(node: Node) -> None:
    node.entries = [entry()]
    key = next(iter(conntrack.rows(node.entries[0], NOW, SETTINGS)))
    node.maps.apply([tables.Put(tables.Table.FLOWS, key, OURS)])
    node.made.look()
    node.made.look()
    assert node.maps.row("flows", key) == OURS


def test_rows_go_when_twice_no_entry_is_found(node: Node) -> None:
    node.entries = [entry()]
    assert node.made.look() == 3
    node.entries.clear()
    assert node.made.look() == 3
    assert len(node.flows()) == 3
    assert node.made.look() == 0
    assert node.flows() == {}


def test_one_that_is_found_again_stays(node: Node) -> None:
    node.entries = [entry()]
    for found in (True, False, True, False):
        node.entries = [entry()] if found else []
        node.made.look()
    assert len(node.flows()) == 3


def test_a_closed_connection_is_not_counted_and_not_renewed(node: Node) -> None:
    node.entries = [entry(tcp=7)]
    node.made.look()
    assert node.flows() == {}
    assert node.keeper.there == [False]
    assert handover.theirs(node.maps, lambda: iter([entry(tcp=7), entry(), entry(ELSEWHERE)])) == {6: 1}


def test_what_began_while_new_flows_were_left_to_another_proxy_stays_with_it(node: Node) -> None:
    node.maps.apply([tables.handover(tables.Handover.RETURN, tables.Return.YES)])
    node.entries = [entry(), entry(port=53, proto=17)]
    assert not node.made.resume(asked=False)
    assert node.flows() == {}
    assert node.made.resume()
    assert (node.row(RETURN), node.row(LEARN), node.made.counts) == (0, 0, {6: 1, 17: 1})
    # They are held before the programs begin anything, and what begins meanwhile is held by these.
    assert node.prepared == [(3, 1)]
    held = [at for at, write in enumerate(node.maps.log) if write.table == tables.Table.FLOWS]
    said = [
        (at, write.key, any(write.value))
        for at, write in enumerate(node.maps.log)
        if isinstance(write, tables.Put) and write.table == tables.Table.HANDOVER
    ]
    order = [(key, on) for at, key, on in said if key in (LEARN, RETURN)]
    assert order == [(RETURN, True), (LEARN, True), (RETURN, False), (LEARN, False)]
    assert max(held) < next(at for at, key, on in said if (key, on) == (RETURN, False))
    assert not node.made.resume()


def test_another_process_asks_the_agent_to_begin_flows_again(node: Node) -> None:
    node.entries = [entry()]
    node.maps.apply([tables.handover(tables.Handover.RETURN, tables.Return.ENDS)])
    assert (node.made.returning, node.made.unfinished) == (True, True)
    assert node.made.resume(asked=False)
    assert (node.made.returning, node.made.unfinished) == (False, False)
    assert (node.row(RETURN), node.row(LEARN), node.made.counts) == (0, 0, {6: 1})


def test_flows_that_can_not_be_read_stay_where_they_are(node: Node) -> None:
    fails = 1

    def entries() -> collections.abc.Iterator[conntrack.Entry]:
        nonlocal fails
        fails -= 1
        if fails == 0:
            raise OSError(105, "No buffer space available")
        return iter([entry()])

    made = handover.HandOver(node.maps, entries=entries, keeper=node.keeper, clock=lambda: NOW)
    node.maps.apply([tables.handover(tables.Handover.RETURN, tables.Return.YES)])
    with pytest.raises(OSError, match="No buffer space"):
        made.resume()
    assert (node.row(RETURN), node.row(LEARN)) == (tables.Return.YES, 0)
    # Half way: nothing is begun. Whoever asked tries again, or it is as before.
    fails = 2
    with pytest.raises(OSError, match="No buffer space"):
        made.resume()
    assert (node.row(RETURN), bool(node.row(LEARN)), made.unfinished) == (tables.Return.YES, True, True)
    assert made.resume(asked=False)
    assert (node.row(RETURN), node.row(LEARN), made.counts) == (tables.Return.YES, 0, {6: 1})
    assert made.resume()
    assert (node.row(RETURN), node.row(LEARN)) == (0, 0)


def test_translation_is_kept_while_rules_are_removed(node: Node) -> None:
    with node.made.anchored():
        assert node.keeper.there == [False, True]
        node.entries = [entry()]
    assert node.keeper.there == [False, True, True]
    with node.made.anchored():
        node.entries.clear()
    assert node.keeper.there[-1] is False
    node.keeper.problem = "no nf_tables"
    with node.made.anchored():
        pass
    node.entries = [entry()]
    with pytest.raises(errors.AgentError, match="no nf_tables"), node.made.anchored():
        raise AssertionError("removed")


def test_the_agent_looks_until_nothing_is_left(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "_SOON_S", 0.0)
    monkeypatch.setattr(handover, "_INTERVAL_S", 0.0)
    monkeypatch.setattr(handover, "_PAUSES", 0.0)
    told: list[None] = []

    async def run() -> None:
        node.made = handover.HandOver(
            node.maps, entries=lambda: iter(node.entries), keeper=node.keeper,
            clock=lambda: node.now, changed=lambda: told.append(None),
        )  # fmt: skip
        node.entries = [entry(port=53, proto=17)]
        node.made.finish()
        node.made.started()
        task = asyncio.create_task(node.made.run())
        await polling.eventually_async(lambda: len(node.keeper.there) >= 4)
        assert len(told) == 1
        node.entries.clear()
        await polling.eventually_async(lambda: not node.flows() and len(told) == 2)
        looked = len(node.keeper.there)
        await asyncio.sleep(0.02)
        assert len(node.keeper.there) <= looked + 1
        task.cancel()

    asyncio.run(run())
    assert node.keeper.there[-1] is False
