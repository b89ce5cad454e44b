"""What the programs are told not to be there is not looked up, and never what is there."""

import array
import random

import pytest

from lbproxy import abi
from lbproxy.core import absence, model, tables
from lbproxy.kernel import map_rows
from tests import installing
from tests.packets import packets
from tests.packets.bench import NEXT, Bench
from tests.packets.packets import ACK, SYN, Side, frame, ip, tcp


def begun(lb: Bench) -> set[int]:
    words = array.array("Q", lb.made.maps.column("no_flows", "begun"))
    return {64 * row + bit for row, word in enumerate(words) for bit in range(64) if word >> bit & 1}


def forget_begun(lb: Bench) -> None:
    lb.made.maps.set_column("no_flows", "begun", bytes(8 * absence.PAIR_ROWS))


def drawn(lot: random.Random, side: Side) -> str:
    """An address that no other test has."""
    last = lot.randrange(1, 1 << 16)
    return f"198.18.{last >> 8}.{last & 255}" if side is packets.V4 else f"2001:db8:{last:x}::{last:x}"


def test_programs_and_agent_number_pairs_alike(lb: Bench, side: Side) -> None:
    lb.service(side.pod)
    lot = random.Random(1)
    for _ in range(50):
        lb.outside(frame(ip(drawn(lot, side), side.external_ip, tcp(40000, 80, SYN))))
    both = (tables.Table.FLOWS, tables.Table.FLOWS_NEW)
    keys = [key for table in both for key, _ in lb.made.maps.rows(table)]
    assert len(keys) == 200  # four each: they are masqueraded
    assert begun(lb) == set(absence.pair_places(b"".join(keys)))


def test_programs_and_agent_number_addresses_alike(lb: Bench, side: Side) -> None:
    """Each of an address's two bits says that there is nothing, and none but these does."""
    lot = random.Random(1)
    addresses = [drawn(lot, side) for _ in range(30)]
    lb.service(side.pod, external=addresses)
    of_addresses, count = abi.constant("NO_FRONTENDS_ADDRESSES"), lb.made.maps.rows_of("no_frontends")
    node_ports = b"\xff" * 8 * (count - of_addresses)
    for address in addresses:
        asked = frame(ip(side.client, address, tcp(40000, 80, SYN)))
        places = set(absence.address_places(installing.address(address)))
        for place in places:
            bits = array.array("Q", bytes(8 * of_addresses) + node_ports)
            bits[place >> 6] |= 1 << (place & 63)
            lb.made.maps.set_column("no_frontends", "none", bits.tobytes())
            assert lb.made.run("tc_from_outside", asked) == (NEXT, asked)
        bits = array.array("Q", b"\xff" * 8 * of_addresses + node_ports)
        for place in places:
            bits[place >> 6] &= ~(1 << (place & 63))
        lb.made.maps.set_column("no_frontends", "none", bits.tobytes())
        assert lb.made.run("tc_from_outside", asked).frame != asked


def test_a_row_is_not_looked_up_where_there_is_said_to_be_none(lb: Bench, side: Side) -> None:
    lb.service(side.pod, external_local=True)
    asked = frame(ip(side.client, side.external_ip, tcp(40000, 80, SYN)))
    answer = frame(ip(side.pod, side.client, tcp(8080, 40000, SYN | ACK)))
    lb.outside(asked)
    translated = lb.made.run("tc_to_any", answer)
    assert translated.frame != answer
    forget_begun(lb)
    assert lb.made.run("tc_to_any", answer) == (NEXT, answer)
    lb.made.say_no_flows(b"\0")
    assert lb.made.run("tc_to_any", answer) == translated


@pytest.mark.parametrize("node_port", [False, True])
def test_a_frontend_is_not_looked_up_where_there_is_said_to_be_none(
    lb: Bench, side: Side, node_port: bool
) -> None:
    lb.service(side.pod)
    to, port = (side.node, 30080) if node_port else (side.external_ip, 80)
    asked = frame(ip(side.client, to, tcp(40000, port, SYN)))
    rows = list(lb.made.maps.rows(tables.Table.FRONTENDS))
    for key, _ in rows:
        map_rows.delete(lb.made.fds["frontends"], key)
    count = lb.made.maps.rows_of("no_frontends")
    lb.made.maps.set_column("no_frontends", "none", b"\xff" * 8 * count)
    for key, row in rows:
        map_rows.update(lb.made.fds["frontends"], key, row)
    assert lb.made.run("tc_from_outside", asked) == (NEXT, asked)
    lb.made.maps.set_column("no_frontends", "none", bytes(8 * count))
    assert lb.made.run("tc_from_outside", asked).frame != asked


def test_what_is_no_services_is_left_alone(lb: Bench, side: Side) -> None:
    """Whether anything is said or not: with flags of all kinds, and UDP."""
    lb.service(side.pod)
    lb.outside(frame(ip(side.client, side.external_ip, tcp(40000, 80, SYN))))
    frames = [
        frame(ip(side.pod, side.other_client, tcp(40000, 80, flags))) for flags in (SYN, ACK, SYN | ACK)
    ]
    frames += [frame(ip(side.pod, side.other_client, packets.udp(40000, 53)))]
    for byte in (b"\xff", b"\0"):
        lb.made.say_no_flows(byte)
        for program in ("tc_from_outside", "tc_from_inside", "tc_to_any"):
            for given in frames:
                assert lb.made.run(program, given) == (NEXT, given)


def test_a_row_that_moves_between_the_looks_at_both_tables_is_not_missed(lb: Bench, side: Side) -> None:
    """The agent reads `flows`, then a client answers and its rows come there, then it reads `flows_new`."""
    lb.service(side.pod, external_local=True)
    lb.made.unassured[0] = 1 << 20  # as in a flood: new rows go to flows_new
    ends = side.client, side.external_ip
    lb.outside(frame(ip(*ends, tcp(40000, 80, SYN))))
    lb.leaves(frame(ip(side.pod, side.client, tcp(8080, 40000, SYN | ACK))))
    assert len(lb.made.flows("flows_new")) == 2
    forget_begun(lb)
    lb.made.say_no_flows(b"\0")

    found = absence.Pairs()
    lb.made.unassured[0] = 0
    found.add(b"".join(key for key, _ in lb.made.maps.rows("flows")))
    lb.outside(frame(ip(*ends, tcp(40000, 80, ACK))))
    assert len(lb.made.flows()) == 2
    found.add(b"".join(key for key, _ in lb.made.maps.rows("flows_new")))
    lb.made.maps.set_column("no_flows", "none", found.none())

    data = frame(ip(*ends, tcp(40000, 80, ACK)))
    assert lb.outside(data)[1] != data
    answer = frame(ip(side.pod, side.client, tcp(8080, 40000, ACK)))
    assert lb.leaves(answer)[1] != answer


@pytest.mark.parametrize("protocol", list(model.Protocol))
def test_a_frontend_that_comes_is_seen_by_the_next_packet(
    lb: Bench, side: Side, protocol: model.Protocol
) -> None:
    l4 = {
        model.Protocol.TCP: tcp(40000, 80, SYN),
        model.Protocol.UDP: packets.udp(40000, 80),
        model.Protocol.SCTP: packets.sctp(40000, 80),
    }[protocol]
    asked = frame(ip(side.client, side.external_ip, l4))
    assert lb.made.run("tc_from_outside", asked) == (NEXT, asked)
    lb.service(side.pod, protocol=protocol)
    assert lb.made.run("tc_from_outside", asked).frame != asked
    lb.made.installer.remove("test/web")
    key = tables.FrontendKey(installing.address(side.external_ip), b"\0\x50", 0, tables.SCOPE_ADDRESS)
    words = array.array("Q", lb.made.maps.column("no_frontends", "none"))
    assert all(words[place >> 6] >> (place & 63) & 1 for place in absence.frontend_places(key.pack()))
