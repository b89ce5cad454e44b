"""What the kernel's tracker says of translated flows, and the rows that this becomes."""

import struct

import pytest

from lbproxy.core import addresses, conntrack, flows, node_rows, tables
from lbproxy.core.tables import FlowState

CLIENT, SERVICE, BACKEND, NODE = ("192.0.2.9", "10.96.0.1", "10.244.1.3", "172.18.0.1")
CLIENT6, SERVICE6, BACKEND6 = ("2001:db8::9", "fd00:96::1", "fd00:244::3")
NOW = 1000
LEFT_S = 100
SETTINGS = tables.NO_SETTINGS._replace(
    tcp_new_ticks=60, tcp_established_ticks=80, tcp_half_closed_ticks=70, tcp_closed_ticks=10,
    udp_new_ticks=30, udp_stream_ticks=120, sctp_new_ticks=30, sctp_established_ticks=200,
)  # fmt: skip
DNAT, REPLY, ASSURED, CONFIRMED, DYING = 0x20, 0x2, 0x4, 0x8, 0x200


def pack(text: str) -> bytes:
    found = addresses.parse(text)
    assert found is not None
    return found


def attribute(number: int, *values: bytes, nested: bool = False) -> bytes:
    value = b"".join(values)
    packed = struct.pack("=HH", 4 + len(value), number | (0x8000 if nested else 0)) + value
    return packed + bytes(-len(packed) % 4)


def one_way(number: int, src: str, dst: str, proto: int, sport: int, dport: int) -> bytes:
    first = 3 if ":" in src else 1
    ends = [pack(one)[12 if first == 1 else 0 :] for one in (src, dst)]
    ip = attribute(1, attribute(first, ends[0]), attribute(first + 1, ends[1]), nested=True)
    ports = [attribute(at, port.to_bytes(2, "big")) for at, port in ((2, sport), (3, dport))]
    l4 = attribute(2, attribute(1, bytes([proto])), *ports, nested=True)
    return attribute(number, ip, l4, nested=True)


def message(status: int, *ways: bytes, tcp: int = 0) -> bytes:
    info = attribute(4, attribute(1, attribute(1, bytes([tcp])), nested=True), nested=True) if tcp else b""
    left = attribute(7, LEFT_S.to_bytes(4, "big"))
    return bytes([2, 0, 0, 0]) + b"".join(ways) + attribute(3, status.to_bytes(4, "big")) + left + info


def entry(proto: int = 6, *, status: int = DNAT, tcp: int = 0, masqueraded: bool = False) -> conntrack.Entry:
    to, port = (NODE, 5000) if masqueraded else (CLIENT, 40000)
    found = conntrack.decode(
        message(
            status,
            one_way(1, CLIENT, SERVICE, proto, 40000, 80),
            one_way(2, BACKEND, to, proto, 8080, port),
            tcp=tcp,
        )
    )
    assert found is not None
    return found


def test_an_entry_is_read() -> None:
    found = entry(status=DNAT | CONFIRMED, tcp=3, masqueraded=True)
    packed = {name: pack(name) for name in (CLIENT, SERVICE, BACKEND, NODE)}
    port = {number: number.to_bytes(2, "big") for number in (40000, 80, 8080, 5000)}
    assert found.original == (packed[CLIENT], packed[SERVICE], port[40000], port[80])
    assert found.reply == (packed[BACKEND], packed[NODE], port[8080], port[5000])
    assert (found[0], found[3:]) == (6, (DNAT | CONFIRMED, 3, LEFT_S))
    assert found.masqueraded
    assert not entry().masqueraded


def test_of_ipv6_too() -> None:
    ways = one_way(1, CLIENT6, SERVICE6, 17, 1, 53), one_way(2, BACKEND6, CLIENT6, 17, 8080, 1)
    found = conntrack.decode(message(DNAT, *ways))
    assert found is not None
    assert found.original.dst == pack(SERVICE6)


@pytest.mark.parametrize(
    "packed",
    [
        message(0, one_way(1, CLIENT, SERVICE, 6, 1, 2), one_way(2, SERVICE, CLIENT, 6, 2, 1)),
        message(DNAT | DYING, one_way(1, CLIENT, SERVICE, 6, 1, 2), one_way(2, BACKEND, CLIENT, 6, 2, 1)),
        message(DNAT, one_way(1, CLIENT, SERVICE, 6, 1, 2)),
        message(DNAT),
        b"",
        bytes(4) + struct.pack("=HH", 2, 3),
    ],
    ids=["untranslated", "dying", "half", "bare", "empty", "torn"],
)
@pytest.mark.parametrize("ipvs", [False, True])
def test_what_is_none_is_passed_over(packed: bytes, ipvs: bool) -> None:
    assert conntrack.decode(packed, ipvs=ipvs) is None


@pytest.mark.parametrize(
    ("answers", "to", "held"),
    [
        ((BACKEND, 8080), (CLIENT, 40000), 2),
        ((BACKEND, 8080), (NODE, 5000), 3),
        ((SERVICE, 8080), (CLIENT, 40000), 2),
        ((SERVICE, 80), (NODE, 5000), 0),  # masqueraded, and to whom the client meant
        ((SERVICE, 80), (CLIENT, 40000), 0),
    ],
)
def test_what_ipvs_translates_shows_in_who_answers(
    answers: tuple[str, int], to: tuple[str, int], held: int
) -> None:
    ways = one_way(1, CLIENT, SERVICE, 6, 40000, 80), one_way(2, answers[0], to[0], 6, answers[1], to[1])
    packed = message(REPLY | ASSURED | CONFIRMED, *ways, tcp=3)
    assert conntrack.decode(packed) is None
    found = conntrack.decode(packed, ipvs=True)
    assert len(conntrack.rows(found, NOW, SETTINGS) if found else ()) == held


def test_with_ipvs_all_entries_are_asked_for() -> None:
    assert conntrack.request(10, ipvs=True) == bytes([10, 0, 0, 0])
    assert len(conntrack.request(10)) > 4


def test_rows_lead_to_themselves() -> None:
    for masqueraded in (False, True):
        rows = conntrack.rows(entry(masqueraded=masqueraded), NOW, SETTINGS, 7)
        assert len(rows) == 2 + masqueraded
        for packed, row in rows.items():
            key, to = tables.flow_key(packed), tables.flow(row)
            assert key.becomes(to) == key
            assert conntrack.is_held(to.state)
            assert (to.seen, int.from_bytes(to.service, "little"), to.backend) == (NOW, 7, 0)


STATES = [
    (DNAT, 1, FlowState(0)),
    (DNAT | REPLY, 2, FlowState.REPLIED),
    (DNAT | REPLY | ASSURED, 3, FlowState.REPLIED | FlowState.ASSURED),
    (DNAT | REPLY, 3, FlowState.REPLIED | FlowState.ASSURED),
    (DNAT | REPLY | ASSURED, 4, FlowState.REPLIED | FlowState.ASSURED | FlowState.FIN),
    (DNAT | REPLY | ASSURED, 7, FlowState.REPLIED | FlowState.ASSURED | FlowState.FIN | FlowState.PEER_FIN),
    (DNAT | REPLY | ASSURED, 8, FlowState.REPLIED | FlowState.ASSURED | FlowState.RESET),
]


@pytest.mark.parametrize(("status", "tcp", "state"), STATES)
def test_the_state_is_the_trackers(status: int, tcp: int, state: FlowState) -> None:
    found = entry(status=status, tcp=tcp)
    rows = {
        tables.flow_key(key).stage: FlowState(tables.flow(row).state)
        for key, row in conntrack.rows(found, NOW, SETTINGS).items()
    }
    assert rows[0] == state | FlowState.ORIGINAL | FlowState.HELD
    both = FlowState.FIN | FlowState.PEER_FIN
    mirrored = state & ~both
    if state & FlowState.FIN:
        mirrored |= FlowState.PEER_FIN
    if state & FlowState.PEER_FIN:
        mirrored |= FlowState.FIN
    assert rows[1] == mirrored | FlowState.HELD
    assert found.over == (tcp >= 7)


def test_held_rows_are_picked_from_a_batch() -> None:
    mine = tables.Flow(pack(BACKEND), b"\0\1", b"\0\2", 3, NOW, b"\1\0\0", int(FlowState.TUNNEL))
    key = tables.FlowKey(pack(CLIENT), pack(SERVICE), b"\0\1", b"\0\2", 6, 0)
    rows = conntrack.rows(entry(), NOW, SETTINGS)
    batch = {key.pack(): mine.pack(), **rows}
    assert flows.held(b"".join(batch), b"".join(batch.values())) == rows


def test_a_held_udp_flow_is_over_before_the_trackers_is() -> None:
    held = int(FlowState.HELD)
    assert flows.timeout_ticks(SETTINGS, 17, held) == 28
    assert flows.timeout_ticks(SETTINGS, 17, held | int(FlowState.ASSURED)) == 118
    assert flows.timeout_ticks(SETTINGS, 17, int(FlowState.TUNNEL)) == 30


def test_rows_end_before_their_entry() -> None:
    found = entry(17, status=DNAT | REPLY | ASSURED)
    for row in map(tables.flow, conntrack.rows(found, NOW, SETTINGS).values()):
        ends = row.seen + flows.timeout_ticks(SETTINGS, 17, row.state)
        assert 0 < (NOW - ends) * -node_rows.TICK_S < LEFT_S
        # But not where it would have to be seen in time to come.
    found = entry(6, status=DNAT | ASSURED, tcp=3)
    assert {tables.flow(row).seen for row in conntrack.rows(found, NOW, SETTINGS).values()} == {NOW}


def test_a_row_follows_its_entry() -> None:
    new = entry(17, status=DNAT)
    stream = entry(17, status=DNAT | REPLY | ASSURED)
    for key, row in conntrack.rows(new, NOW, SETTINGS).items():
        assert conntrack.renewed(new, row, row, NOW, SETTINGS) is None
        later = conntrack.rows(stream, NOW + 20, SETTINGS)[key]
        got = conntrack.renewed(stream, row, later, NOW + 20, SETTINGS)
        assert got is not None
        assert tables.flow(got) == tables.flow(later)


def test_a_row_whose_time_is_over_is_anybodys() -> None:
    stream = entry(17, status=DNAT | REPLY | ASSURED)
    for row in conntrack.rows(stream, NOW, SETTINGS).values():
        assert conntrack.renewed(stream, row, row, NOW + 1000, SETTINGS) is None


def test_what_is_closed_stays_so_and_who_has_closed_is_not_guessed() -> None:
    ends = entry(status=DNAT | REPLY | ASSURED, tcp=4)
    key, row = next(iter(conntrack.rows(ends, NOW, SETTINGS).items()))
    open_row = next(iter(conntrack.rows(entry(status=DNAT | REPLY | ASSURED, tcp=3), NOW, SETTINGS).values()))
    assert conntrack.renewed(ends, open_row, row, NOW, SETTINGS) is None
    shut = tables.flow(row)
    shut = shut._replace(state=shut.state | FlowState.FIN | FlowState.PEER_FIN)
    assert conntrack.renewed(ends, shut.pack(), row, NOW + 60, SETTINGS) is None
    assert tables.flow_key(key).stage == 0


def test_ports_that_are_masqueraded_with_are_reserved_while_they_are_in_use() -> None:
    backend, node, client = pack(BACKEND), pack(NODE), pack(CLIENT)
    port = {number: number.to_bytes(2, "big") for number in (8080, 5000, 40000)}
    answers = tables.FlowKey(backend, node, port[8080], port[5000], 6, 0)
    open_ = tables.Flow(
        client, port[8080], port[40000], 0, NOW, b"\7\0\0", int(FlowState.REPLIED | FlowState.ASSURED)
    )
    rows = {
        answers: open_,
        # Too long ago, over, of the other direction, where it leaves, and another proxy's.
        answers._replace(dport=b"\0\1"): open_._replace(seen=NOW - 100),
        answers._replace(dport=b"\0\2"): open_._replace(state=open_.state | int(FlowState.RESET)),
        answers._replace(dport=b"\0\3"): open_._replace(state=open_.state | int(FlowState.ORIGINAL)),
        answers._replace(dport=b"\0\4", stage=1): open_,
        answers._replace(dport=b"\0\5"): open_._replace(state=open_.state | int(FlowState.HELD)),
    }
    keys, values = b"".join(key.pack() for key in rows), b"".join(row.pack() for row in rows.values())
    [found] = conntrack.reserved(keys, values, NOW, SETTINGS)
    assert (found.proto, found.ends) == (6, (node, backend, port[5000], port[8080]))
    # If something comes at the end of its time, it has its time once more.
    assert 170 <= found.left_s <= 180
    # What is entered reads as a connection whose destination nobody translates.
    packed = conntrack.reservation(found)
    assert conntrack.decode(packed) is None
    assert one_way(1, NODE, BACKEND, 6, 5000, 8080) in packed
    assert one_way(2, BACKEND, NODE, 6, 8080, 5000) in packed
