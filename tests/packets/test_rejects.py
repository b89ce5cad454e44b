"""Frontends without a backend that may be used: who is told, and how, and who is not."""

import pytest

from lbproxy.core import model
from tests.packets import packets
from tests.packets.bench import DROP, INSIDE, LEAVING, NEXT, REDIRECT, Bench, endpoint
from tests.packets.packets import ACK, FIN, RST, SYN, Side, frame, ip, tcp, udp


def back(packet: bytes) -> bytes:
    """A frame to where they come from."""
    return frame(packet, to=packets.MAC_FAR, by=packets.MAC_UP)


@pytest.mark.parametrize("sent_options", [b"", b"\x02\x04\x05\xb4"])
def test_a_syn_is_answered_with_a_reset(lb: Bench, side: Side, sent_options: bytes) -> None:
    lb.service()
    syn = tcp(40000, 30080, seq=0xFFFFFFFF, options=sent_options)
    sent = frame(ip(side.client, side.node, syn), padding=6)
    reset = tcp(30080, 40000, RST | ACK, seq=0, ack=0)
    want = back(ip(side.node, side.client, _without_window(reset), ident=0))
    assert lb.outside(sent) == (REDIRECT, want)
    assert lb.made.counted() == {"REFUSED": 1}
    assert lb.flows() == {}


@pytest.mark.parametrize(
    ("flags", "payload", "answer"),
    [
        (ACK, b"", tcp(80, 40000, RST, seq=555)),
        (ACK | FIN, b"data", tcp(80, 40000, RST, seq=555)),
        (SYN | ACK, b"", tcp(80, 40000, RST, seq=555)),
        (FIN, b"data", tcp(80, 40000, RST | ACK, seq=0, ack=1005)),
        (0, b"", tcp(80, 40000, RST | ACK, seq=0, ack=1000)),
    ],
)
def test_a_segment_of_no_connection_is_answered_with_a_reset(
    lb: Bench, side: Side, flags: int, payload: bytes, answer: packets.L4
) -> None:
    lb.service(side.pod)
    sent = frame(ip(side.client, side.cluster_ip, tcp(40000, 80, flags, payload, seq=1000, ack=555)))
    want = back(ip(side.cluster_ip, side.client, _without_window(answer), ident=0))
    assert lb.outside(sent) == (REDIRECT, want)
    # From pods, connections are looked at once.
    assert lb.run(INSIDE, sent, "up0") == (NEXT, sent)


def _without_window(segment: packets.L4) -> packets.L4:
    return segment._replace(data=segment.data[:14] + bytes(6))


@pytest.mark.parametrize("protocol", [model.Protocol.UDP, model.Protocol.SCTP])
def test_a_datagram_is_answered_with_port_unreachable(
    lb: Bench, side: Side, protocol: model.Protocol
) -> None:
    lb.service(protocol=protocol)
    build = udp if protocol is model.Protocol.UDP else packets.sctp
    packet = ip(side.client, side.cluster_ip, build(40000, 80, b"a long payload, which is not quoted"))
    quoted = packet[: (20 if ":" not in side.pod else 40) + 8]
    error = packets.icmp(3, 3, quoted) if ":" not in side.pod else packets.icmp6(1, 4, quoted)
    assert lb.outside(frame(packet)) == (REDIRECT, back(ip(side.node, side.client, error, ident=0)))
    assert not packets.wrong_checksums(lb.checker.last)


def test_headers_are_quoted_as_far_as_there_is_room(lb: Bench) -> None:
    lb.service(protocol=model.Protocol.UDP)
    side = packets.V4
    packet = ip(side.client, side.cluster_ip, udp(40000, 80, b"x" * 100), options=b"\x01" * 40)
    want = back(ip(side.node, side.client, packets.icmp(3, 3, packet[:68]), ident=0))
    assert lb.outside(frame(packet)) == (REDIRECT, want)
    side = packets.V6
    extensions = [packets.options6(words=12)]
    packet = ip(side.client, side.cluster_ip, udp(40000, 80, b"x" * 100), extensions=extensions)
    want = back(ip(side.node, side.client, packets.icmp6(1, 4, packet[:96])))
    assert lb.outside(frame(packet)) == (REDIRECT, want)


def test_a_fragment_without_a_header_is_not_answered(lb: Bench, side: Side) -> None:
    lb.service(protocol=model.Protocol.UDP)
    cut = packets.fragments4 if ":" not in side.pod else packets.fragments6
    first, later = cut(side.client, side.cluster_ip, udp(40000, 80, b"x" * 60), 24)
    assert lb.outside(frame(first)).verdict == REDIRECT
    assert lb.outside(frame(later)).verdict == DROP


def test_a_later_fragment_is_not_taken_for_a_segment(lb: Bench, side: Side) -> None:
    lb.service(side.pod)
    cut = packets.fragments4 if ":" not in side.pod else packets.fragments6
    first, later = cut(side.client, side.cluster_ip, tcp(40000, 80, ACK, b"x" * 60), 40)
    assert lb.outside(frame(first)).verdict == REDIRECT
    assert lb.outside(frame(later)).verdict == DROP


def test_backends_elsewhere_are_no_reason_to_refuse(lb: Bench, side: Side) -> None:
    lb.service(side.far_pod, external_local=True, internal_local=True)
    sent = frame(ip(side.client, side.external_ip, tcp(40000, 80)))
    assert lb.outside(sent) == (DROP, sent)
    assert lb.inside(frame(ip(side.pod, side.cluster_ip, tcp(40000, 80)))).verdict == DROP
    assert lb.made.counted() == {"DROPPED": 2}
    # Pods reach the external address: they draw from the whole cluster.
    assert lb.inside(frame(ip(side.pod, side.external_ip, tcp(40000, 80)))).verdict == NEXT


def test_what_a_service_drops_does_not_leave_either(lb: Bench, side: Side) -> None:
    lb.service(side.far_pod, internal_local=True)
    sent = frame(ip(side.node, side.cluster_ip, tcp(40000, 80)))
    assert lb.run(LEAVING, sent, "up0").verdict == DROP
    sent = frame(ip(side.node, side.cluster_ip, tcp(40000, 80, ACK)))
    assert lb.run(LEAVING, sent, "up0") == (NEXT, sent)


def test_what_is_not_let_in_does_not_leave_either(lb: Bench, side: Side) -> None:
    lb.service(side.far_pod, source_ranges=("203.0.113.0/24", "2001:db8:113::/48"))
    sent = frame(ip(side.node, side.balancer_ip, tcp(40000, 80)))
    assert lb.leaves(sent).verdict == DROP
    sent = frame(ip(side.other_client, side.balancer_ip, tcp(40000, 80)))
    assert lb.leaves(sent) == (NEXT, sent)


@pytest.mark.parametrize(
    ("ranges", "to", "passes"),
    [
        (("198.51.100.0/24", "2001:db8:51::/48"), "balancer_ip", True),
        (("203.0.113.0/24", "2001:db8:113::/48"), "balancer_ip", False),
        (("203.0.113.0/24", "2001:db8:113::/48"), "external_ip", True),
        (("198.51.100.7/32", "2001:db8:51::7/128"), "balancer_ip", True),
        (("198.51.100.6/32", "2001:db8:51::6/128"), "balancer_ip", False),
        (("0.0.0.0/0", "::/0", "203.0.113.0/24"), "balancer_ip", True),
    ],
)
def test_source_ranges(lb: Bench, side: Side, ranges: tuple[str, ...], to: str, passes: bool) -> None:
    lb.service(side.pod, source_ranges=ranges)
    result = lb.outside(frame(ip(side.client, getattr(side, to), tcp(40000, 80))))
    assert result.verdict == (NEXT if passes else DROP)
    assert lb.made.counted() == ({} if passes else {"SOURCE_DENIED": 1})


def test_clients_outside_draw_from_this_node_and_pods_from_all(lb: Bench, side: Side) -> None:
    lb.service(side.pod, side.far_pod, external_local=True)
    for port in range(40000, 40020):
        result = lb.outside(frame(ip(side.client, side.external_ip, tcp(port, 80))))
        assert result == (NEXT, frame(ip(side.client, side.pod, tcp(port, 8080))))
    seen = {lb.inside(frame(ip(side.pod, side.external_ip, tcp(port, 80)))).frame[-60:] for port in range(30)}
    assert len({one[:40] for one in seen}) > 1


def test_an_unready_endpoint_is_refused(lb: Bench, side: Side) -> None:
    lb.service(endpoint(side.pod, ready=False, serving=False))
    assert lb.outside(frame(ip(side.client, side.node, tcp(40000, 30080)))).verdict == REDIRECT
