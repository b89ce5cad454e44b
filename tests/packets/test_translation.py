"""Flows to services and back: who sees which addresses and ports, byte for byte."""

import collections.abc
import socket
import typing

import pytest

from lbproxy.core import model, node_rows
from tests.packets import packets
from tests.packets.bench import DROP, NEXT, Bench, endpoint, ports
from tests.packets.packets import ACK, RST, SYN, Side, frame, ip, sctp, tcp, udp

Builder = collections.abc.Callable[..., packets.L4]


def synack(sport: int, dport: int) -> packets.L4:
    return tcp(sport, dport, SYN | ACK, seq=7000, ack=1001)


PROTOCOLS = [
    pytest.param(model.Protocol.TCP, tcp, synack, id="tcp"),
    pytest.param(model.Protocol.UDP, udp, udp, id="udp"),
    pytest.param(model.Protocol.SCTP, sctp, sctp, id="sctp"),
]


def far(packet: bytes) -> bytes:
    """A frame of a pod."""
    return frame(packet, to=packets.MAC_POD_DEVICE)


@pytest.mark.parametrize(("protocol", "ask", "answer"), PROTOCOLS)
def test_a_pod_reaches_a_cluster_ip_as_itself(
    lb: Bench, side: Side, protocol: model.Protocol, ask: Builder, answer: Builder
) -> None:
    lb.service(side.far_pod, protocol=protocol)
    sent = far(ip(side.pod, side.cluster_ip, ask(40000, 80)))
    assert lb.inside(sent) == (NEXT, far(ip(side.pod, side.far_pod, ask(40000, 8080))))
    onward = frame(ip(side.pod, side.far_pod, ask(40000, 8080)))
    assert lb.leaves(onward) == (NEXT, onward)
    back = frame(ip(side.far_pod, side.pod, answer(8080, 40000)))
    assert lb.outside(back) == (NEXT, back)
    assert lb.leaves(back, "pod0") == (NEXT, frame(ip(side.cluster_ip, side.pod, answer(80, 40000))))
    assert lb.made.counted() == {}


@pytest.mark.parametrize(("protocol", "ask", "answer"), PROTOCOLS)
@pytest.mark.parametrize("kind", ["cluster ip", "node port", "external ip", "load balancer"])
def test_a_client_outside_is_masqueraded_there_and_back(
    lb: Bench, side: Side, protocol: model.Protocol, ask: Builder, answer: Builder, kind: str
) -> None:
    address, port = {
        "cluster ip": (side.cluster_ip, 80),
        "node port": (side.node, 30080),
        "external ip": (side.external_ip, 80),
        "load balancer": (side.balancer_ip, 80),
    }[kind]
    lb.service(side.far_pod, protocol=protocol)
    sent = frame(ip(side.client, address, ask(40000, port)))
    between = frame(ip(side.client, side.far_pod, ask(40000, 8080)))
    assert lb.outside(sent) == (NEXT, between)
    gone = lb.leaves(between)
    mine, _ = ports(gone)
    assert 61000 <= mine < 62000
    assert gone == (NEXT, frame(ip(side.node, side.far_pod, ask(mine, 8080))))
    assert not packets.wrong_checksums(gone.frame)

    back = frame(ip(side.far_pod, side.node, answer(8080, mine)))
    turned = frame(ip(side.far_pod, side.client, answer(8080, 40000)))
    assert lb.outside(back) == (NEXT, turned)
    assert lb.leaves(turned) == (NEXT, frame(ip(address, side.client, answer(port, 40000))))
    assert len(lb.flows()) == 4
    # The second packet of the client follows the rows.
    assert lb.outside(sent) == (NEXT, between)
    assert len(lb.flows()) == 4


@pytest.mark.parametrize("length", [0, 1, 3, 4, 255, 256, 1000, 1408, 2047])
def test_the_sctp_checksum_is_right_whatever_is_behind_the_ports(lb: Bench, side: Side, length: int) -> None:
    lb.service(side.far_pod, protocol=model.Protocol.SCTP)
    payload = bytes(number * 7 & 0xFF for number in range(length))
    for port in (1, 40000, 65535):
        sent = frame(ip(side.client, side.node, sctp(port, 30080, payload)))
        assert lb.outside(sent) == (NEXT, frame(ip(side.client, side.far_pod, sctp(port, 8080, payload))))


def test_the_masquerade_address_is_that_of_the_device_towards_the_backend(lb: Bench, side: Side) -> None:
    lb.service(side.pod)
    lb.outside(frame(ip(side.client, side.node, tcp(40000, 30080))))
    gone = lb.leaves(frame(ip(side.client, side.pod, tcp(40000, 8080))), "pod0")
    mine, _ = ports(gone)
    assert gone.frame == frame(ip(side.node_to_pods, side.pod, tcp(mine, 8080)))


def test_a_pod_that_reaches_itself_is_masqueraded(lb: Bench, side: Side) -> None:
    lb.service(side.pod)
    between = far(ip(side.pod, side.pod, tcp(40000, 8080)))
    assert lb.inside(far(ip(side.pod, side.cluster_ip, tcp(40000, 80)))) == (NEXT, between)
    gone = lb.leaves(between, "pod0")
    mine, _ = ports(gone)
    assert gone.frame == far(ip(side.node_to_pods, side.pod, tcp(mine, 8080)))
    back = far(ip(side.pod, side.node_to_pods, synack(8080, mine)))
    turned = far(ip(side.pod, side.pod, synack(8080, 40000)))
    assert lb.inside(back) == (NEXT, turned)
    assert lb.leaves(turned, "pod0") == (NEXT, far(ip(side.cluster_ip, side.pod, synack(80, 40000))))


def test_a_pod_that_reaches_itself_from_the_port_it_serves(lb: Bench, side: Side) -> None:
    lb.service(side.pod, protocol=model.Protocol.UDP)
    between = lb.inside(far(ip(side.pod, side.cluster_ip, udp(8080, 80))))
    port, _ = ports(between)
    assert port != 8080
    assert between == (NEXT, far(ip(side.pod, side.pod, udp(port, 8080))))
    gone = lb.leaves(between.frame, "pod0")
    mine, _ = ports(gone)
    assert gone.frame == far(ip(side.node_to_pods, side.pod, udp(mine, 8080)))
    turned = lb.inside(far(ip(side.pod, side.node_to_pods, udp(8080, mine))))
    assert turned == (NEXT, far(ip(side.pod, side.pod, udp(8080, port))))
    back = far(ip(side.cluster_ip, side.pod, udp(80, 8080)))
    assert lb.leaves(turned.frame, "pod0") == (NEXT, back)


def test_pods_on_one_device_are_kept_from_answering_each_other(lb: Bench, side: Side) -> None:
    lb.service(side.pod)
    neighbour = side.pod.replace("10", "11") if ":" in side.pod else "10.244.1.11"
    lb.inside(far(ip(neighbour, side.cluster_ip, tcp(40000, 80))))
    gone = lb.leaves(far(ip(neighbour, side.pod, tcp(40000, 8080))), "pod0")
    assert gone.frame[26:30] == packets.packed(packets.NODE_TO_PODS) or ":" in side.pod
    assert len(lb.flows()) == 4


MASQUERADE = [
    # who, rules, service, where to, masqueraded
    ("pod", {}, {}, "cluster_ip", False),
    ("client", {}, {}, "cluster_ip", True),
    ("client", {"pod_cidrs": ()}, {}, "cluster_ip", False),
    ("pod", {"masquerade_all": True}, {}, "cluster_ip", True),
    ("pod", {}, {}, "external_ip", True),
    ("pod", {}, {"external_local": True}, "external_ip", False),
    ("client", {}, {"external_local": True}, "external_ip", False),
    ("client", {}, {}, "external_ip", True),
    ("client", {"keep_client": True}, {}, "external_ip", False),
    ("pod", {"pods_by_device": True}, {}, "cluster_ip", True),
]


@pytest.mark.parametrize(("who", "rules", "service", "to", "masqueraded"), MASQUERADE)
def test_who_is_masqueraded(
    lb: Bench,
    side: Side,
    who: str,
    rules: dict[str, typing.Any],
    service: dict[str, typing.Any],
    to: str,
    masqueraded: bool,
) -> None:
    """Packets come in at the uplink; the backend is this node's."""
    lb.node(**rules)
    lb.service(side.pod, **service)
    src = side.far_pod if who == "pod" else side.client
    result = lb.outside(frame(ip(src, getattr(side, to), tcp(40000, 80))))
    assert result == (NEXT, frame(ip(src, side.pod, tcp(40000, 8080))))
    assert (len(lb.flows()) == 4) is masqueraded


def test_a_backend_that_is_this_node_sees_the_client(lb: Bench, side: Side) -> None:
    lb.service(side.node)
    assert lb.outside(frame(ip(side.client, side.external_ip, tcp(40000, 80)))) == (
        NEXT,
        frame(ip(side.client, side.node, tcp(40000, 8080))),
    )
    assert len(lb.flows()) == 2


def test_a_checksum_that_is_absent_stays_so(lb: Bench) -> None:
    side = packets.V4
    lb.service(side.far_pod, protocol=model.Protocol.UDP)
    sent = frame(ip(side.client, side.node, udp(40000, 30080, checksum=False)))
    assert lb.outside(sent) == (NEXT, frame(ip(side.client, side.far_pod, udp(40000, 8080, checksum=False))))


def test_a_udp_checksum_that_comes_to_zero_is_written_as_ones(lb: Bench, side: Side) -> None:
    lb.service(side.far_pod, protocol=model.Protocol.UDP)
    bare = packets.finished(udp(40000, 8080, b"\0\0"), *map(packets.packed, (side.client, side.far_pod)))
    payload = bare[6:8]  # added, it makes the sum complete
    sent = frame(ip(side.client, side.external_ip, udp(40000, 80, payload)))
    result = lb.outside(sent)
    at = 40 if ":" not in side.pod else 60
    assert result.frame[at : at + 2] == b"\xff\xff"
    assert result == (NEXT, frame(ip(side.client, side.far_pod, udp(40000, 8080, payload))))


def test_options_and_time_to_live_stay(lb: Bench) -> None:
    side = packets.V4
    lb.service(side.far_pod)
    kept: dict[str, typing.Any] = {
        "options": b"\x07\x07\x04" + bytes(5),
        "ttl": 1,
        "ident": 4242,
        "fragment": 0,
    }
    payload = tcp(40000, 30080, options=b"\x02\x04\x05\xb4", payload=b"early")
    want = tcp(40000, 8080, options=b"\x02\x04\x05\xb4", payload=b"early")
    result = lb.outside(frame(ip(side.client, side.node, payload, **kept), padding=9))
    assert result == (NEXT, frame(ip(side.client, side.far_pod, want, **kept), padding=9))


@pytest.mark.parametrize(
    "extensions",
    [
        [packets.options6(packets.HOP_BY_HOP)],
        [packets.options6(), packets.routing6(0), packets.options6(words=3)],
        [packets.fragment6(0, False)],
        [packets.options6()] * 6,
    ],
    ids=["hop by hop", "three", "whole in a fragment header", "six"],
)
def test_extension_headers_are_walked(lb: Bench, extensions: list[tuple[int, bytes]]) -> None:
    side = packets.V6
    lb.service(side.far_pod)
    sent = frame(ip(side.client, side.node, tcp(40000, 30080), extensions=extensions, ttl=1))
    want = frame(ip(side.client, side.far_pod, tcp(40000, 8080), extensions=extensions, ttl=1))
    assert lb.outside(sent) == (NEXT, want)


S4, S6 = packets.V4, packets.V6
ASK4, ASK6 = ip(S4.client, S4.node, tcp(40000, 30080)), ip(S6.client, S6.node, tcp(40000, 30080))
NOT_OURS = {
    "another port": ip(S4.client, S4.node, tcp(40000, 30081)),
    "another protocol": ip(S4.client, S4.node, udp(40000, 30080)),
    "another address": ip(S4.client, S4.router, tcp(40000, 30080)),
    "a node port at a cluster ip": ip(S4.client, S4.cluster_ip, tcp(40000, 30080)),
    "ping": ip(S4.client, S4.node, packets.icmp(8, 0, b"x" * 40)),
    "ping6": ip(S6.client, S6.node, packets.icmp6(128, 0, b"x" * 40)),
    "a reset of nothing": ip(S4.client, S4.node, tcp(40000, 30080, RST)),
    "sent as this node": ip(S4.node_to_pods, S4.node, tcp(40000, 30080)),
    "sent by nobody": ip("0.0.0.0", S4.node, tcp(40000, 30080)),
    "sent by many": ip("224.0.0.1", S4.node, tcp(40000, 30080)),
    "sent by many6": ip("ff02::1", S6.node, tcp(40000, 30080)),
    "IPv4 in IPv6's form": ip("::ffff:198.51.100.7", "::ffff:192.0.2.1", tcp(40000, 30080)),
    "seven extension headers": ip(S6.client, S6.node, tcp(40000, 30080), extensions=[packets.options6()] * 7),
    "not at its destination yet": ip(S6.client, S6.node, tcp(40000, 30080), extensions=[packets.routing6(1)]),
    "cut off": ASK4[:-1],
    "cut off6": ASK6[:-1],
    "no ports": ip(S4.client, S4.node, packets.L4(packets.UDP, b"\x9c\x40\x75")),
    "half a header": ip(S4.client, S4.node, packets.L4(packets.TCP, tcp(40000, 30080).data[:19])),
    "half a header6": ip(S6.client, S6.node, packets.L4(packets.TCP, tcp(40000, 30080).data[:19])),
    "a version that is none": b"\x65" + ASK4[1:],
    "a short header": b"\x44" + ASK4[1:],
    "a length less than its header": ASK4[:2] + b"\0\x13" + ASK4[4:],
}


@pytest.mark.parametrize("packet", NOT_OURS.values(), ids=NOT_OURS.keys())
def test_what_is_not_ours_stays_as_it_is(lb: Bench, packet: bytes) -> None:
    lb.service(packets.POD_A, packets.POD_A6)
    kind = packets.IPV4 if packet[0] >> 4 != 6 or packet in (NOT_OURS["a version that is none"],) else None
    sent = frame(packet, kind=kind)
    for run in (lb.outside, lb.inside, lb.leaves):
        assert run(sent, "up0") == (NEXT, sent)
    assert lb.flows() == {}
    assert lb.made.counted() == {}


def test_tagged_and_foreign_frames_stay_as_they_are(lb: Bench) -> None:
    lb.service(packets.POD_A)
    for sent in (
        frame(b"\0\x05\x08\0" + ASK4, kind=packets.VLAN),
        frame(ASK4, kind=packets.ARP),
        frame(ASK4, to="02:00:00:00:00:77"),
        frame(b"", kind=0x88CC),
    ):
        assert lb.outside(sent) == (NEXT, sent)


def test_an_ipv6_sender_can_not_pass_for_an_ipv4_one(lb: Bench) -> None:
    """Its addresses, written as IPv4's, must not find the rows of IPv4's flows."""
    side = packets.V4
    lb.service(side.far_pod)
    lb.outside(frame(ASK4))
    before = lb.flows()
    sent = frame(ip(f"::ffff:{side.client}", f"::ffff:{side.node}", tcp(40000, 30080, RST)))
    assert lb.outside(sent) == (NEXT, sent)
    assert lb.flows() == before


@pytest.mark.parametrize("ask", [tcp, sctp])
def test_a_second_service_of_the_same_backend_gets_another_client_port(
    lb: Bench, side: Side, ask: Builder
) -> None:
    protocol = model.Protocol.TCP if ask is tcp else model.Protocol.SCTP
    lb.service(side.pod, protocol=protocol, external_local=True)
    for address in (side.external_ip, side.balancer_ip):
        lb.outside(frame(ip(side.client, address, ask(40000, 80))))
    seen = {(key.dport, row.addr) for key, row in lb.flows().items() if key.stage}
    assert len(seen) == 2
    assert len({port for port, _ in seen}) == 2
    for port, src in seen:
        number = int.from_bytes(port, "big")
        result = lb.leaves(frame(ip(side.pod, side.client, ask(8080, number))))
        address = side.external_ip if src.endswith(packets.packed(side.external_ip)) else side.balancer_ip
        assert result == (NEXT, frame(ip(address, side.client, ask(80, 40000))))


def test_ports_run_out_and_that_is_told(lb: Bench, side: Side) -> None:
    lb.node(ports=node_rows.Ports(61000, 2))
    lb.service(side.far_pod, protocol=model.Protocol.UDP)
    for client_port in (40000, 40001):
        assert lb.outside(frame(ip(side.client, side.node, udp(client_port, 30080)))).verdict == NEXT
    assert lb.outside(frame(ip(side.client, side.node, udp(40002, 30080)))).verdict == DROP
    assert lb.made.counted() == {"PORTS_EXHAUSTED": 1}


def test_a_closed_flows_port_is_taken_last(lb: Bench, side: Side) -> None:
    """The backend may still wait for its late packets."""
    lb.node(ports=node_rows.Ports(61000, 2))
    lb.service(side.far_pod)

    def masquerade(client_port: int) -> int:
        assert lb.outside(frame(ip(side.client, side.node, tcp(client_port, 30080)))).verdict == NEXT
        return ports(lb.leaves(frame(ip(side.client, side.far_pod, tcp(client_port, 8080)))))[0]

    def close(client_port: int) -> None:
        for run, sent in (
            (lb.outside, ip(side.client, side.node, tcp(client_port, 30080, RST))),
            (lb.leaves, ip(side.client, side.far_pod, tcp(client_port, 8080, RST))),
        ):
            run(frame(sent))

    for client_port in range(40000, 40010, 2):
        first = masquerade(client_port)
        close(client_port)
        second = masquerade(client_port + 1)
        assert {first, second} == {61000, 61001}
        assert masquerade(client_port + 2) == first
        close(client_port + 1)
        close(client_port + 2)
        lb.made.empty("flows")
        lb.look()


def test_a_port_of_a_socket_is_not_taken(lb: Bench) -> None:
    side = packets.V4
    lb.node(ports=node_rows.Ports(61000, 2))
    lb.service(side.far_pod)

    def listen() -> socket.socket:
        return socket.create_server((side.node, 61000))

    with lb.made.inside(listen):
        lb.used_ports.append((packets.TCP, (61000).to_bytes(2, "big")))
        lb.look()
        assert lb.outside(frame(ip(side.client, side.node, tcp(40000, 30080)))).verdict == NEXT
        gone = lb.leaves(frame(ip(side.client, side.far_pod, tcp(40000, 8080))))
        assert ports(gone)[0] == 61001
        assert lb.outside(frame(ip(side.client, side.node, tcp(40001, 30080)))).verdict == DROP


def test_a_first_packet_too_big_for_the_way_is_the_kernels_to_deal_with(lb: Bench, side: Side) -> None:
    lb.service(side.far_pod, protocol=model.Protocol.UDP)
    payload = bytes(2000)
    assert lb.outside(frame(ip(side.client, side.node, udp(40000, 30080, payload)))) == (
        NEXT,
        frame(ip(side.client, side.far_pod, udp(40000, 8080, payload))),
    )
    assert len(lb.flows()) == 4


def test_endpoints_are_this_or_that(lb: Bench, side: Side) -> None:
    lb.service(endpoint(side.pod, ready=False, serving=True, terminating=True))
    assert lb.outside(frame(ip(side.client, side.node, tcp(40000, 30080)))) == (
        NEXT,
        frame(ip(side.client, side.pod, tcp(40000, 8080))),
    )
