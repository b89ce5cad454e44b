"""Direct server return: packets go to the backend's node as they are, which answers the client."""

import collections.abc

import pytest

from lbproxy.core import model, tables
from tests.packets import packets
from tests.packets.bench import DROP, NEXT, REDIRECT, Bench
from tests.packets.packets import ACK, RST, SYN, V4, Side, frame, icmp, icmp6, ip, sctp, tcp, tunnel, udp

Builder = collections.abc.Callable[[int, int], packets.L4]
PROTOCOLS = [
    pytest.param(model.Protocol.TCP, tcp, id="tcp"),
    pytest.param(model.Protocol.UDP, udp, id="udp"),
    pytest.param(model.Protocol.SCTP, sctp, id="sctp"),
]


def serve(lb: Bench, *endpoints: str, **fields: object) -> None:
    lb.service(*endpoints, mode=model.PacketMode.DSR, **fields)


def to_the_node_of(side: Side, inner: bytes, port: int = 8080) -> bytes:
    return frame(tunnel(side.node, side.far_pod, port, inner))


def from_another_node(side: Side, inner: bytes, to: str = "", port: int = 8080) -> bytes:
    return frame(tunnel(side.router, to or side.pod, port, inner))


def error(side: Side, quoted: bytes) -> packets.L4:
    return icmp(3, 4, quoted, 1400) if ":" not in side.pod else icmp6(2, 0, quoted, 1400)


@pytest.mark.parametrize(("protocol", "ask"), PROTOCOLS)
def test_packets_for_another_node_go_there_as_they_are(
    lb: Bench, side: Side, protocol: model.Protocol, ask: Builder
) -> None:
    serve(lb, side.far_pod, protocol=protocol)
    sent = ip(side.client, side.node, ask(40000, 30080), ttl=9)
    result = lb.outside(frame(sent, padding=4))
    assert result == (REDIRECT, frame(tunnel(side.node, side.far_pod, 8080, sent), padding=4))
    # A Maglev table is all that has to be remembered.
    assert lb.flows() == {}


def test_segments_of_connections_go_there_too(lb: Bench, side: Side) -> None:
    serve(lb, side.far_pod)
    sent = ip(side.client, side.external_ip, tcp(40000, 80, ACK, b"data"))
    assert lb.outside(frame(sent)) == (REDIRECT, to_the_node_of(side, sent))
    reset = frame(ip(side.client, side.external_ip, tcp(40000, 80, RST)))
    assert lb.outside(reset) == (NEXT, reset)


def test_what_pods_send_follows_a_row(lb: Bench, side: Side) -> None:
    """Of theirs only beginnings are looked at without one."""
    serve(lb, side.far_pod)
    for flags in (SYN, ACK, RST):
        sent = ip(side.pod, side.external_ip, tcp(40000, 80, flags))
        assert lb.inside(frame(sent, to=packets.MAC_POD_DEVICE)) == (
            REDIRECT,
            frame(tunnel(side.node, side.far_pod, 8080, sent), to=packets.MAC_POD_DEVICE),
        )
    [row] = lb.flows().values()
    assert row.state & tables.FlowState.TUNNEL
    assert row.state & tables.FlowState.RESET


def test_affinity_is_kept_in_rows(lb: Bench, side: Side) -> None:
    serve(lb, side.far_pod, affinity_s=100)
    for flags in (SYN, ACK):
        sent = ip(side.client, side.external_ip, tcp(40000, 80, flags))
        assert lb.outside(frame(sent)) == (REDIRECT, to_the_node_of(side, sent))
    assert len(lb.flows()) == 1


def test_a_packet_without_room_for_another_header_is_told_so(lb: Bench, side: Side) -> None:
    serve(lb, side.far_pod)
    header = 20 if ":" not in side.pod else 40
    fits, too_big = (
        ip(side.client, side.external_ip, tcp(40000, 80, ACK, bytes(1500 - 2 * header - 20 + more)))
        for more in (0, 1)
    )
    assert lb.outside(frame(fits)) == (REDIRECT, to_the_node_of(side, fits))
    quoted = too_big[: header + 8]
    mtu = 1500 - header
    told = icmp(3, 4, quoted, mtu) if ":" not in side.pod else icmp6(2, 0, quoted, mtu)
    want = frame(ip(side.node, side.client, told, ident=0), to=packets.MAC_FAR, by=packets.MAC_UP)
    assert lb.outside(frame(too_big)) == (REDIRECT, want)
    assert lb.made.counted() == {"TOO_BIG": 1}


def test_a_backend_of_this_node_sees_the_client(lb: Bench, side: Side) -> None:
    serve(lb, side.pod)
    sent = frame(ip(side.client, side.external_ip, tcp(40000, 80)))
    assert lb.outside(sent) == (NEXT, frame(ip(side.client, side.pod, tcp(40000, 8080))))
    assert len(lb.flows()) == 2


@pytest.mark.parametrize(("protocol", "ask"), PROTOCOLS)
def test_what_another_node_sends_is_served_here(
    lb: Bench, side: Side, protocol: model.Protocol, ask: Builder
) -> None:
    serve(lb, side.pod, protocol=protocol)
    # Dialled at the other node.
    sent = ip(side.client, side.router, ask(40000, 30080), ttl=9)
    want = frame(ip(side.client, side.pod, ask(40000, 8080), ttl=9))
    for _ in range(2):
        assert lb.outside(from_another_node(side, sent)) == (NEXT, want)
    assert len(lb.flows()) == 2
    back = frame(ip(side.pod, side.client, ask(8080, 40000)))
    assert lb.leaves(back) == (NEXT, frame(ip(side.router, side.client, ask(30080, 40000))))


def test_segments_cut_behind_the_other_node_count_its_port_up(lb: Bench) -> None:
    """As the kernel and devices do with the identification of IPv4, when they cut what was one packet."""
    side = V4
    serve(lb, side.pod)

    def arrives(flags: int, port: int, sport: int = 40000) -> tuple[int, bytes]:
        sent = ip(side.client, side.router, tcp(sport, 30080, flags))
        return lb.outside(frame(tunnel(side.router, side.pod, port, sent)))

    def to_pod(flags: int, port: int, sport: int = 40000) -> tuple[int, bytes]:
        return NEXT, frame(ip(side.client, side.pod, tcp(sport, port, flags)))

    assert arrives(SYN, 8080) == to_pod(SYN, 8080)
    for number in range(3):
        assert arrives(ACK, 8080 + number) == to_pod(ACK, 8080)
    assert len(lb.flows()) == 2
    # What begins a connection is never cut, and 8081 is no backend's.
    assert arrives(SYN, 8081, 40001)[0] == DROP


def test_fragments_come_through_tunnels(lb: Bench, side: Side) -> None:
    serve(lb, side.pod, protocol=model.Protocol.UDP)
    cut = packets.fragments4 if ":" not in side.pod else packets.fragments6
    sent = cut(side.client, side.external_ip, udp(40000, 80, b"x" * 60), 16)
    want = cut(side.client, side.pod, udp(40000, 8080, b"x" * 60), 16)
    for one, two in zip(sent, want, strict=True):
        assert lb.outside(from_another_node(side, one)) == (NEXT, frame(two))


def test_other_tunnels_stay_as_they_are(lb: Bench, side: Side) -> None:
    serve(lb, side.pod)
    inner = ip(side.client, side.external_ip, tcp(40000, 80))
    nested = tunnel(side.router, side.pod, 8080, inner)
    left = {
        "no frontend": from_another_node(side, ip(side.client, side.client, tcp(40000, 80))),
        "another port": from_another_node(side, ip(side.client, side.external_ip, tcp(40000, 81))),
        "through here": from_another_node(side, inner, to=side.far_pod),
        "two tunnels": from_another_node(side, nested),
        "cut off": from_another_node(side, inner[:-1]),
        "nothing": from_another_node(side, b""),
        "no error": from_another_node(side, ip(side.client, side.external_ip, icmp(8, 0, b""))),
    }
    for what, sent in left.items():
        assert lb.outside(sent) == (NEXT, sent), what
        assert lb.leaves(sent) == (NEXT, sent), what
    assert lb.flows() == {}


def test_a_service_without_dsr_takes_nothing_from_tunnels(lb: Bench, side: Side) -> None:
    lb.service(side.pod)
    sent = from_another_node(side, ip(side.client, side.external_ip, tcp(40000, 80)))
    assert lb.outside(sent) == (NEXT, sent)


@pytest.mark.parametrize(
    ("to", "port", "sport", "flags"),
    [("pod", 22, 40001, SYN), ("pod", 22, 40000, SYN), ("node", 22, 40000, ACK), ("node", 8080, 40000, ACK)],
)
def test_a_tunnel_ends_at_backends_only(
    lb: Bench, side: Side, to: str, port: int, sport: int, flags: int
) -> None:
    """Not even for a flow that has its rows already."""
    serve(lb, side.pod)
    inner = ip(side.client, side.external_ip, tcp(40000, 80))
    assert lb.outside(from_another_node(side, inner)).verdict == NEXT
    before = lb.flows()
    inner = ip(side.client, side.external_ip, tcp(sport, 80, flags))
    forged = from_another_node(side, inner, getattr(side, to), port)
    assert lb.outside(forged).verdict == DROP
    assert lb.made.counted() == {"BAD_TUNNEL": 1}
    assert lb.flows() == before


def test_a_tunnel_is_no_way_round_source_ranges(lb: Bench, side: Side) -> None:
    serve(lb, side.pod, source_ranges=("203.0.113.9/32", "2001:db8:113::9/128"))
    inner = ip(side.client, side.balancer_ip, tcp(40000, 80))
    sent = from_another_node(side, inner)
    assert lb.outside(sent) == (DROP, sent)
    assert lb.flows() == {}


def test_an_error_about_an_answer_goes_where_the_flow_is(lb: Bench, side: Side) -> None:
    serve(lb, side.far_pod)
    answer = ip(side.external_ip, side.client, tcp(80, 40000, ACK))
    sent = ip(side.client, side.external_ip, error(side, answer))
    assert lb.outside(frame(sent)) == (REDIRECT, to_the_node_of(side, sent))


def test_an_error_from_a_tunnel_reaches_the_backend(lb: Bench, side: Side) -> None:
    serve(lb, side.pod)
    lb.outside(from_another_node(side, ip(side.client, side.external_ip, tcp(40000, 80))))
    header = 20 if ":" not in side.pod else 40
    answer = ip(side.external_ip, side.client, tcp(80, 40000, ACK))[: header + 8]
    seen = ip(side.pod, side.client, tcp(8080, 40000, ACK))[: header + 8]
    sent = from_another_node(side, ip(side.client, side.external_ip, error(side, answer)))
    want = frame(ip(side.client, side.pod, error(side, seen)))
    assert lb.outside(sent) == (NEXT, want)
    # One about no flow goes no further, lest it go round in circles.
    answer = ip(side.external_ip, side.client, tcp(80, 40001, ACK))
    lost = ip(side.client, side.external_ip, error(side, answer))
    assert lb.outside(from_another_node(side, lost)) == (NEXT, frame(lost))


def test_an_empty_service_is_refused(lb: Bench, side: Side) -> None:
    serve(lb)
    assert lb.outside(frame(ip(side.client, side.external_ip, tcp(40000, 80)))).verdict == REDIRECT
    serve(lb, side.far_pod, external_local=True)
    assert lb.outside(frame(ip(side.client, side.external_ip, tcp(40000, 80)))).verdict == DROP
