"""The short way through XDP: what it takes it translates for both ends, all else it leaves alone."""

import pytest

from lbproxy.core import model, tables
from tests.packets import harness, packets
from tests.packets.bench import XDP, Bench, ports
from tests.packets.packets import ACK, FIN, SYN, Side, frame, icmp, ip, tcp, udp

PASS, SENT = harness.XDP_PASS, harness.XDP_TX


def onward(packet: bytes) -> bytes:
    """A frame to the next hop."""
    return frame(packet, to=packets.MAC_GATEWAY, by=packets.MAC_UP)


class Flow:
    """A masqueraded flow that tc has begun, between two other hosts."""

    def __init__(self, lb: Bench, side: Side, udp_too: bool = False) -> None:
        self.lb, self.side = lb, side
        lb.service(side.far_pod, protocol=model.Protocol.UDP if udp_too else model.Protocol.TCP)
        self.build = udp if udp_too else tcp
        lb.outside(frame(ip(side.client, side.node, self.build(40000, 30080))))
        gone = lb.leaves(frame(ip(side.client, side.far_pod, self.build(40000, 8080))))
        self.mine, _ = ports(gone)

    def xdp(self, packet: bytes) -> harness.Result:
        return self.lb.run(XDP, frame(packet), "up0")


@pytest.mark.parametrize("udp_too", [False, True], ids=["tcp", "udp"])
def test_both_directions_of_a_flow_are_sent_on(lb: Bench, side: Side, udp_too: bool) -> None:
    flow = Flow(lb, side, udp_too)
    build = flow.build
    there = flow.xdp(ip(side.client, side.node, build(40000, 30080), ttl=9))
    assert there == (SENT, onward(ip(side.node, side.far_pod, build(flow.mine, 8080), ttl=8)))
    back = flow.xdp(ip(side.far_pod, side.node, build(8080, flow.mine), ttl=2))
    assert back == (SENT, onward(ip(side.node, side.client, build(30080, 40000), ttl=1)))
    assert not packets.wrong_checksums(back.frame)


def test_all_rows_take_note(lb: Bench, side: Side) -> None:
    flow = Flow(lb, side)
    flow.xdp(ip(side.far_pod, side.node, tcp(8080, flow.mine, SYN | ACK)))
    flow.xdp(ip(side.client, side.node, tcp(40000, 30080, ACK)))
    settled = tables.FlowState.REPLIED | tables.FlowState.ASSURED
    assert all(row.state & settled == settled for row in lb.flows().values())
    assert lb.made.unassured[0] == 0
    flow.xdp(ip(side.client, side.node, tcp(40000, 30080, ACK | FIN)))
    ends = tables.FlowState.FIN | tables.FlowState.PEER_FIN
    assert all(row.state & ends for row in lb.flows().values())


def test_a_udp_checksum_that_is_absent_stays_so(lb: Bench) -> None:
    side = packets.V4
    flow = Flow(lb, side, udp_too=True)
    sent = flow.xdp(ip(side.client, side.node, udp(40000, 30080, checksum=False)))
    want = onward(ip(side.node, side.far_pod, udp(flow.mine, 8080, checksum=False), ttl=63))
    assert sent == (SENT, want)


def test_everything_else_is_left_to_tc(lb: Bench, side: Side) -> None:
    flow = Flow(lb, side)
    ask = tcp(40000, 30080, ACK)
    cut = packets.fragments4 if ":" not in side.pod else packets.fragments6
    first, later = cut(side.client, side.node, tcp(40000, 30080, ACK, b"x" * 60), 32)
    quoted = ip(side.node, side.far_pod, tcp(flow.mine, 8080))
    left = {
        "a new flow": frame(ip(side.client, side.node, tcp(40001, 30080))),
        "at the end of its life": frame(ip(side.client, side.node, ask, ttl=1)),
        "to somebody else": frame(ip(side.client, side.node, ask), to=packets.MAC_FAR),
        "too big": frame(ip(side.client, side.node, tcp(40000, 30080, ACK, bytes(1500)))),
        "first": frame(first),
        "later": frame(later),
        "cut off": frame(ip(side.client, side.node, ask))[:-1],
        "tagged": frame(b"\0\5\x08\0" + ip(side.client, side.node, ask), kind=packets.VLAN),
    }
    if ":" not in side.pod:
        left["an error"] = frame(ip(side.router, side.node, icmp(3, 4, quoted)))
    for what, sent in left.items():
        assert lb.run(XDP, sent, "up0") == (PASS, sent), what


def test_a_flow_to_a_backend_of_this_node_is_left_to_tc(lb: Bench, side: Side) -> None:
    lb.service(side.pod)
    sent = frame(ip(side.client, side.node, tcp(40000, 30080)))
    lb.outside(sent)
    assert lb.run(XDP, sent, "up0") == (PASS, sent)


def test_a_checksum_that_a_device_is_to_complete_is_left_to_tc(lb: Bench, side: Side) -> None:
    Flow(lb, side)
    l4 = tcp(40000, 30080, ACK)
    covered = packets.pseudo(packets.packed(side.client), packets.packed(side.node), 6, len(l4.data))
    partial = packets.ones_sum(covered).to_bytes(2, "big")
    unfinished = packets.L4(6, l4.data[:16] + partial + l4.data[18:])
    sent = frame(ip(side.client, side.node, unfinished))
    assert lb.run(XDP, sent, "up0") == (PASS, sent)
