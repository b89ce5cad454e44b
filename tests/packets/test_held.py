"""Flows of another proxy pass as they are, while they are taken over and until they end."""

import pytest

from lbproxy import abi, absent_flows
from lbproxy.core import conntrack, model, node_rows, tables
from tests import installing
from tests.packets import harness
from tests.packets.bench import NEXT, REDIRECT, Bench
from tests.packets.packets import ACK, FIN, RST, SYN, Side, frame, ip, tcp, udp

State = tables.FlowState
LEARN, RETURN = abi.constant("HANDOVER_LEARN"), abi.constant("HANDOVER_RETURN")
PORT = 40000


def entry(side: Side, proto: int = 6, status: int = 0x26, tcp_state: int = 3) -> conntrack.Entry:
    """As kube-proxy has made one: masqueraded, to a pod of this node."""
    client, service, pod, node = map(
        installing.address, (side.client, side.external_ip, side.pod, side.node_to_pods)
    )
    port = {number: number.to_bytes(2, "big") for number in (PORT, 80, 8080, 5000)}
    there = conntrack.Tuple(client, service, port[PORT], port[80])
    back = conntrack.Tuple(pod, node, port[8080], port[5000])
    return conntrack.Entry(proto, there, back, status, tcp_state if proto == 6 else 0, 86400)


def hold(lb: Bench, found: conntrack.Entry) -> None:
    settings = tables.settings(lb.made.maps.row("settings", tables.row_key(0)) or b"")
    rows = conntrack.rows(found, harness.tick(), settings)
    # As migrate/handover.py does it: no program has begun these.
    with absent_flows.AbsentFlows(lb.made.maps).written(b"".join(rows)):
        lb.made.maps.put_absent(tables.Table.FLOWS, rows)
    lb.look()


def asked(side: Side, flags: int = ACK) -> bytes:
    return frame(ip(side.client, side.external_ip, tcp(PORT, 80, flags)))


def answered(side: Side, flags: int = ACK) -> bytes:
    return frame(ip(side.external_ip, side.client, tcp(80, PORT, flags)))


def states(lb: Bench) -> dict[tuple[int, bool], State]:
    """By stage, and whether the row is of the masquerade."""
    return {
        (key.stage, key.sport == b"\x1f\x90"): State(row.state) & ~State.HELD
        for key, row in lb.flows().items()
    }


def test_both_directions_pass_and_are_noted(lb: Bench, side: Side) -> None:
    lb.service(side.pod)
    hold(lb, entry(side, status=0x20, tcp_state=2))
    for flags, give, back in ((ACK, lb.leaves, answered), (ACK, lb.outside, asked)):
        given = back(side, flags)
        assert give(given) == (NEXT, given)
    given = frame(ip(side.pod, side.node_to_pods, tcp(8080, 5000, ACK)))
    assert lb.inside(given) == (NEXT, given)
    both = State.REPLIED | State.ASSURED
    assert states(lb) == {(0, False): State.ORIGINAL | both, (1, False): both, (0, True): State.REPLIED}


def test_one_that_is_over_makes_way(lb: Bench, side: Side) -> None:
    lb.service(side.pod)
    hold(lb, entry(side))
    assert lb.outside(asked(side, SYN)).verdict == NEXT
    assert lb.outside(asked(side, FIN | ACK)).verdict == NEXT
    assert lb.outside(asked(side, SYN)).verdict == NEXT
    assert lb.leaves(answered(side, FIN | ACK)).verdict == NEXT
    changed = lb.outside(asked(side, SYN))
    assert changed.verdict == NEXT
    assert changed.frame != asked(side, SYN)


def test_udp_is_left_with_its_backend_until_it_is_idle(lb: Bench, side: Side) -> None:
    lb.service(side.pod, protocol=model.Protocol.UDP)
    hold(lb, entry(side, proto=17))
    given = frame(ip(side.client, side.external_ip, udp(PORT, 80)))
    assert lb.outside(given) == (NEXT, given)
    lb.age(1000)
    lb.look()
    assert lb.outside(given).frame != given


def test_no_flow_gets_the_same_port(lb: Bench, side: Side) -> None:
    lb.node(ports=node_rows.Ports(5000, 2))
    lb.service(side.pod)
    hold(lb, entry(side))
    for port in (1, 2):
        lb.used_ports.clear()
        lb.made.run("tc_from_outside", frame(ip(side.client, side.external_ip, tcp(port, 80, SYN))))
    used = {
        int.from_bytes(key.dport, "big")
        for key, row in lb.flows().items()
        if not key.stage and not row.state & State.ORIGINAL and not conntrack.is_held(row.state)
    }
    assert used == {5001}
    assert lb.made.counted()["PORTS_EXHAUSTED"] == 1


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_what_begins_while_flows_are_learned_stays_with_the_other(lb: Bench, side: Side, proto: str) -> None:
    lb.service(side.pod, protocol=model.Protocol[proto.upper()])
    lb.made.handover[LEARN] = 1
    l4 = {"tcp": tcp(PORT, 80, SYN), "udp": udp(PORT, 80)}[proto]
    given = frame(ip(side.client, side.external_ip, l4))
    assert lb.made.run("tc_from_outside", given) == (NEXT, given)
    assert states(lb) == {(0, False): State.ORIGINAL, (1, False): State(0)}
    assert all(conntrack.is_held(row.state) for row in lb.flows().values())
    lb.made.handover[LEARN] = 0
    lb.look()
    assert lb.outside(given) == (NEXT, given)
    assert lb.made.counted() == {}


def test_a_connection_under_way_is_learned_and_not_reset(lb: Bench, side: Side) -> None:
    lb.service(side.pod)
    lb.made.handover[LEARN] = 1
    assert lb.made.run("tc_from_outside", asked(side)) == (NEXT, asked(side))
    assert (
        lb.made.run("tc_from_outside", frame(ip(side.client, side.external_ip, tcp(1, 80, RST)))).verdict
        == NEXT
    )
    lb.made.handover[LEARN] = 0
    lb.look()
    assert lb.outside(asked(side)) == (NEXT, asked(side))
    # And one that nobody has ever heard of is.
    assert lb.outside(frame(ip(side.client, side.external_ip, tcp(2, 80, ACK)))).verdict == REDIRECT


def test_on_the_way_back_new_flows_are_the_others_and_ours_go_on(lb: Bench, side: Side) -> None:
    lb.service(side.pod)
    ours = frame(ip(side.client, side.external_ip, tcp(1, 80, SYN)))
    changed = lb.made.run("tc_from_outside", ours)
    assert changed.frame != ours
    lb.made.handover[RETURN] = 1
    more = frame(ip(side.client, side.external_ip, tcp(1, 80, ACK)))
    assert lb.made.run("tc_from_outside", more).frame != more
    rows = lb.flows()
    for flags in (SYN, ACK):
        given = frame(ip(side.client, side.external_ip, tcp(2, 80, flags)))
        assert lb.made.run("tc_from_outside", given) == (NEXT, given)
    assert lb.flows().keys() == rows.keys()
    # Nor do the rows of one that is over get in the way of whoever has its port next.
    lb.made.run("tc_from_outside", frame(ip(side.client, side.external_ip, tcp(1, 80, RST))))
    for flags in (SYN, ACK):
        given = frame(ip(side.client, side.external_ip, tcp(1, 80, flags)))
        assert lb.made.run("tc_from_outside", given) == (NEXT, given)
    lb.made.handover[RETURN] = 0
    assert lb.made.run("tc_from_outside", ours).frame != ours


@pytest.mark.parametrize("learn", [0, 1])
def test_on_the_way_back_and_at_its_end_dsr_marks_what_begins_and_the_rest_goes_on(
    lb: Bench, side: Side, learn: int
) -> None:
    lb.service(side.far_pod, mode=model.PacketMode.DSR)
    under_way = asked(side)
    tunnelled = lb.made.run("tc_from_outside", under_way)
    assert tunnelled.verdict == REDIRECT
    lb.made.handover[RETURN], lb.made.handover[LEARN] = 1, learn
    assert lb.made.run("tc_from_outside", under_way) == tunnelled
    for flags in (SYN, ACK):
        theirs = frame(ip(side.client, side.external_ip, tcp(2, 80, flags)))
        assert lb.made.run("tc_from_outside", theirs) == (NEXT, theirs)
    assert {bool(conntrack.is_held(row.state)) for row in lb.flows().values()} == {True}
    lb.made.handover[RETURN], lb.made.handover[LEARN] = 0, 0
    assert lb.made.run("tc_from_outside", under_way) == tunnelled
    lb.look()


def test_at_the_end_of_the_way_back_what_begins_is_the_others_for_good(lb: Bench, side: Side) -> None:
    lb.service(side.pod)
    lb.made.handover[RETURN], lb.made.handover[LEARN] = 1, 1
    assert lb.made.run("tc_from_outside", asked(side, SYN)) == (NEXT, asked(side, SYN))
    lb.made.handover[RETURN], lb.made.handover[LEARN] = 0, 0
    lb.look()
    assert lb.outside(asked(side)) == (NEXT, asked(side))
