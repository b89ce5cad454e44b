"""ICMP errors about translated packets: each end is shown the packet that it has sent itself."""

import collections.abc

import pytest

from lbproxy.core import model
from tests.packets import packets
from tests.packets.bench import DROP, NEXT, Bench, ports
from tests.packets.packets import ACK, Side, frame, icmp, icmp6, ip, sctp, tcp, udp


def about(side: Side, quoted: bytes) -> packets.L4:
    """An error that says "too big"."""
    return icmp(3, 4, quoted, 1400) if ":" not in side.pod else icmp6(2, 0, quoted, 1400)


Builder = collections.abc.Callable[[int, int], packets.L4]
PROTOCOLS: dict[str, tuple[model.Protocol, Builder]] = {
    "tcp": (model.Protocol.TCP, tcp),
    "udp": (model.Protocol.UDP, udp),
    "sctp": (model.Protocol.SCTP, sctp),
}


class Flow:
    """A masqueraded flow from a client outside to a backend on another node."""

    def __init__(self, lb: Bench, side: Side, name: str = "tcp") -> None:
        protocol, self.build = PROTOCOLS[name]
        lb.service(side.far_pod, protocol=protocol)
        lb.outside(frame(ip(side.client, side.external_ip, self.build(40000, 80))))
        gone = lb.leaves(frame(ip(side.client, side.far_pod, self.build(40000, 8080))))
        self.mine, _ = ports(gone)


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("by", ["router", "far_pod"])
def test_an_error_about_what_the_client_sent_reaches_the_client(
    lb: Bench, side: Side, name: str, by: str
) -> None:
    flow = Flow(lb, side, name)
    source = getattr(side, by)

    def quoting(src: str, dst: str, sport: int, dport: int, inner_checksum_of: bytes) -> bytes:
        """The packet as somebody saw it; the checksum that covers its ports stays as the backend got it."""
        packet = ip(src, dst, flow.build(sport, dport))
        at = 20 if ":" not in side.pod else 40
        return packet[: at + 4] + inner_checksum_of[at + 4 :]

    sent = ip(side.node, side.far_pod, flow.build(flow.mine, 8080))
    error = frame(ip(source, side.node, about(side, sent)))
    between_quote = quoting(side.client, side.far_pod, 40000, 8080, sent)
    between = frame(ip(source, side.client, about(side, between_quote)))
    assert lb.outside(error) == (NEXT, between)
    shown_quote = quoting(side.client, side.external_ip, 40000, 80, sent)
    # What the backend itself says comes from the service, what a router says from the router.
    seen_from = side.external_ip if by == "far_pod" else source
    assert lb.leaves(between) == (NEXT, frame(ip(seen_from, side.client, about(side, shown_quote))))
    assert not packets.wrong_checksums(lb.checker.last)


@pytest.mark.parametrize("quoted_bytes", [8, 20, 64])
def test_an_error_about_an_answer_reaches_the_backend(lb: Bench, side: Side, quoted_bytes: int) -> None:
    flow = Flow(lb, side)
    size = (20 if ":" not in side.pod else 40) + quoted_bytes
    payload = b"x" * 60
    answer = ip(side.external_ip, side.client, tcp(80, 40000, ACK, payload))
    error = frame(ip(side.client, side.external_ip, about(side, answer[:size])))
    inside = _readdressed(side, answer, side.far_pod, side.client, 8080, 40000)[:size]
    between = frame(ip(side.client, side.far_pod, about(side, inside)))
    assert lb.outside(error) == (NEXT, between)
    there = _readdressed(side, answer, side.far_pod, side.node, 8080, flow.mine)[:size]
    assert lb.leaves(between) == (NEXT, frame(ip(side.node, side.far_pod, about(side, there))))


def _readdressed(side: Side, packet: bytes, src: str, dst: str, sport: int, dport: int) -> bytes:
    """A packet with other ends, whose TCP checksum is not its business."""
    at = 20 if ":" not in side.pod else 40
    head = ip(src, dst, packets.L4(packets.TCP, packet[at:]))[:at]
    return head + sport.to_bytes(2, "big") + dport.to_bytes(2, "big") + packet[at + 4 :]


@pytest.mark.parametrize("kind", [0, 8, 13, 200])
def test_what_is_no_error_stays(lb: Bench, kind: int) -> None:
    side = packets.V4
    flow = Flow(lb, side)
    quoted = ip(side.node, side.far_pod, tcp(flow.mine, 8080))
    sent = frame(ip(side.router, side.node, icmp(kind, 0, quoted)))
    assert lb.outside(sent) == (NEXT, sent)


def test_a_redirect_about_a_flow_is_dropped(lb: Bench) -> None:
    side = packets.V4
    flow = Flow(lb, side)
    quoted = ip(side.node, side.far_pod, tcp(flow.mine, 8080))
    assert lb.outside(frame(ip(side.router, side.node, icmp(5, 1, quoted)))).verdict == DROP
    other = frame(ip(side.router, side.node, icmp(5, 1, ip(side.node, side.far_pod, tcp(1, 8080)))))
    assert lb.outside(other) == (NEXT, other)


def test_errors_about_others_and_half_of_a_packet_stay(lb: Bench, side: Side) -> None:
    flow = Flow(lb, side)
    at = 20 if ":" not in side.pod else 40
    packet = ip(side.node, side.far_pod, tcp(flow.mine, 8080))
    for quoted in (
        ip(side.node, side.far_pod, tcp(flow.mine + 1, 8080)),
        ip(side.node, side.far_pod, udp(flow.mine, 8080)),
        packet[: at + 7],
        packet[: at - 1],
        b"",
    ):
        sent = frame(ip(side.router, side.node, about(side, quoted)))
        assert lb.outside(sent) == (NEXT, sent)


def test_what_lies_behind_an_error_is_not_quoted(lb: Bench, side: Side) -> None:
    """The frame goes on with bytes that look like the rest of the packet."""
    flow = Flow(lb, side)
    at = 20 if ":" not in side.pod else 40
    packet = ip(side.node, side.far_pod, tcp(flow.mine, 8080))
    error = ip(side.router, side.node, about(side, packet[: at + 4]))
    sent = frame(error + packet[at + 4 :])
    assert lb.outside(sent) == (NEXT, sent)


def test_options_and_extension_headers_around_and_inside(lb: Bench) -> None:
    side = packets.V4
    flow = Flow(lb, side)
    options = b"\x01" * 8
    sent = ip(side.node, side.far_pod, tcp(flow.mine, 8080), options=options)[:36]
    error = frame(ip(side.router, side.node, icmp(11, 0, sent), options=options))
    shown = ip(side.client, side.far_pod, tcp(40000, 8080), options=options)[:32] + sent[32:]
    want = frame(ip(side.router, side.client, icmp(11, 0, shown), options=options))
    assert lb.outside(error) == (NEXT, want)
