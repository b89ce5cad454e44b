"""Fragments: those without ports are translated as the first of their datagram was."""

import pytest

from lbproxy.core import model
from tests.packets import packets
from tests.packets.bench import NEXT, Bench
from tests.packets.packets import ACK, Side, frame, ip, tcp, udp


def cut(side: Side, src: str, dst: str, l4: packets.L4, at: int, ident: int = 7) -> tuple[bytes, bytes]:
    split = packets.fragments4 if ":" not in side.pod else packets.fragments6
    return split(src, dst, l4, at, ident=ident)


@pytest.mark.parametrize("at", [8, 16, 48])
def test_both_halves_of_a_datagram_reach_the_backend(lb: Bench, side: Side, at: int) -> None:
    lb.service(side.pod, protocol=model.Protocol.UDP, external_local=True)
    first, later = cut(side, side.client, side.external_ip, udp(40000, 80, b"x" * 60), at)
    want_first, want_later = cut(side, side.client, side.pod, udp(40000, 8080, b"x" * 60), at)
    assert lb.outside(frame(first)) == (NEXT, frame(want_first))
    assert lb.outside(frame(later)) == (NEXT, frame(want_later))
    # The answer's, at the other end.
    first, later = cut(side, side.pod, side.client, udp(8080, 40000, b"y" * 60), at)
    want_first, want_later = cut(side, side.external_ip, side.client, udp(80, 40000, b"y" * 60), at)
    assert lb.leaves(frame(first)) == (NEXT, frame(want_first))
    assert lb.leaves(frame(later)) == (NEXT, frame(want_later))


def test_a_later_fragment_is_left_alone_where_the_first_was_not_seen(lb: Bench, side: Side) -> None:
    lb.service(side.pod, protocol=model.Protocol.UDP)
    first, later = cut(side, side.client, side.external_ip, udp(40000, 80, b"x" * 60), 16)
    assert lb.outside(frame(later)) == (NEXT, frame(later))
    assert lb.made.counted() == {"FRAGMENT_LOST": 1}
    lb.outside(frame(first))
    _, other = cut(side, side.client, side.external_ip, udp(40000, 80, b"x" * 60), 16, ident=8)
    assert lb.outside(frame(other)) == (NEXT, frame(other))
    _, other = cut(side, side.client, side.external_ip, tcp(40000, 80, ACK, b"x" * 60), 32)
    assert lb.outside(frame(other)) == (NEXT, frame(other))


def test_a_segment_in_fragments_moves_its_connection_on_once(lb: Bench, side: Side) -> None:
    lb.service(side.pod, external_local=True)
    lb.outside(frame(ip(side.client, side.external_ip, tcp(40000, 80))))
    first, later = cut(side, side.client, side.external_ip, tcp(40000, 80, ACK, b"x" * 60), 32)
    want = cut(side, side.client, side.pod, tcp(40000, 8080, ACK, b"x" * 60), 32)
    assert lb.outside(frame(first)) == (NEXT, frame(want[0]))
    assert lb.outside(frame(later)) == (NEXT, frame(want[1]))


def test_a_fragment_too_short_for_its_header_is_nobodys(lb: Bench, side: Side) -> None:
    lb.service(side.pod)
    first, later = cut(side, side.client, side.external_ip, tcp(40000, 80, payload=b"x" * 60), 16)
    assert lb.outside(frame(first)) == (NEXT, frame(first))
    assert lb.outside(frame(later)) == (NEXT, frame(later))
    assert lb.flows() == {}


def test_fragments_whose_headers_go_on_behind_their_end_are_nobodys(lb: Bench) -> None:
    side = packets.V6
    lb.service(side.pod, protocol=model.Protocol.UDP)
    first, later = cut(side, side.client, side.external_ip, udp(40000, 80, b"x" * 60), 16)
    lb.outside(frame(first))
    short = later[:4] + b"\0\4" + later[6:]
    assert lb.outside(frame(short)) == (NEXT, frame(short))
    assert lb.made.counted() == {}
