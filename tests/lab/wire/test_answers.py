"""What the node says of its own accord reaches whoever asked: refusals, and that a packet is too big.

The packets that are answered come with checksums that a device was to complete, or
complete ones, and leave by a device that completes them, or by one that does not.
"""

import collections.abc
import itertools
import socket
import struct

import pytest

from lbproxy.lab import cluster
from tests import polling
from tests.lab import agents, manifests
from tests.lab.wire import wires
from tests.lab.wire.conftest import no_icmp_rate_limits
from tests.lab.wire.test_errors import assert_about
from tests.lab.wire.ways import families
from tests.packets import packets

EMPTY_PORT, DIRECT_PORT = 30191, 30192
SENT_MTU = 1500
OUTER = {4: 20, 6: 40}
TOO_BIG = {4: (packets.ICMP, 3, 4), 6: (packets.ICMP6, 2, 0)}
UNREACHABLE = {4: (packets.ICMP, 3, 3), 6: (packets.ICMP6, 1, 4)}
CHECKSUM_AT = {packets.TCP: 16, packets.UDP: 6, packets.SCTP: 8}
SOL_PACKET, PACKET_VNET_HDR = 263, 15
NEEDS_CSUM = 1  # VIRTIO_NET_HDR_F_NEEDS_CSUM

all_protocols = pytest.mark.parametrize(
    "proto", [packets.TCP, packets.UDP, packets.SCTP], ids=["tcp", "udp", "sctp"]
)


def ports(number: int) -> list[manifests.Port]:
    return [
        manifests.HTTP.on_node_port(number),
        manifests.DNS.on_node_port(number),
        manifests.Port("sctp", "SCTP", 36412, number),
    ]


@pytest.fixture(scope="module", autouse=True)
def services(lab: cluster.Lab, api: agents.Api, agent: agents.Agent) -> None:
    """One without a backend, and one whose backend is sent packets as they came."""
    no_icmp_rate_limits(lab)
    empty, direct = ports(EMPTY_PORT), ports(DIRECT_PORT)
    api.put(
        manifests.service("empty", 11, ports=empty),
        manifests.service("direct", 12, ports=direct, annotations={"lbproxy.io/mode": "dsr"}),
        *manifests.slices("direct", [lab["n2/p1"]], ports=direct),
    )
    agent.has_backends("direct", {"n2/p1"}, [(port.name, family) for port in direct for family in (4, 6)])
    polling.eventually(lambda: "empty" in agent.services(), what="the service without a backend")


@pytest.fixture(
    scope="module",
    autouse=True,
    params=list(itertools.product([True, False], repeat=2)),
    ids=lambda on: f"client-{'on' if on[0] else 'off'}-uplink-{'on' if on[1] else 'off'}",
)
def offloads(request: pytest.FixtureRequest, lab: cluster.Lab) -> collections.abc.Iterator[None]:
    """Whether the client leaves checksums to its device, and whether the uplink completes them."""
    devices = tuple(zip(("outside", "n1"), request.param, strict=True))
    for where, on in devices:
        wires.offload(lab, where, "eth0", "tx", on=on)
    yield
    for where, _ in devices:
        wires.offload(lab, where, "eth0", "tx", "tso", on=True)


@families
def test_a_service_without_a_backend_refuses(lab: cluster.Lab, family: int) -> None:
    node = lab["n1"].address(family)
    with wires.Tap(lab, "outside") as at_client:
        with pytest.raises(ConnectionRefusedError):
            wires.connect(lab, "outside", node, EMPTY_PORT)
        reset = at_client.until(lambda one: not one.outgoing and one.proto == packets.TCP)
        assert packets.wrong_checksums(reset.frame) == []
        # At once: not the answer to a second try.
        assert sum(one.outgoing and one.proto == packets.TCP for one in at_client.seen()) == 1
        for size in (0, 1, 1400):
            with wires.connect(lab, "outside", node, EMPTY_PORT, socket.SOCK_DGRAM) as asking:
                asking.send(b"?" * size)
                with pytest.raises(ConnectionRefusedError):
                    asking.recv(1)
        errors = [one for one in at_client.seen() if one.icmp() == UNREACHABLE[family]]
    assert len(errors) == 3
    for error in errors:
        assert_about(error, lab["outside"].address(family), node, packets.UDP, EMPTY_PORT)


@families
@all_protocols
@pytest.mark.parametrize("unfinished", [True, False])
def test_whatever_is_too_big_for_its_tunnel_is_answered(
    lab: cluster.Lab, family: int, proto: int, unfinished: bool
) -> None:
    client, node = lab["outside"].address(family), lab["n1"].address(family)
    payload = bytes(SENT_MTU - OUTER[family] - (20 if proto == packets.TCP else 12))
    with wires.Tap(lab, "outside") as at_client:
        send(lab, family, packet(client, node, proto, DIRECT_PORT, payload), proto, unfinished=unfinished)
        error = at_client.until(lambda one: one.icmp() == TOO_BIG[family], "too big")
    assert_about(error, client, node, proto, DIRECT_PORT)
    assert int.from_bytes(error.body[4:8], "big") == SENT_MTU - OUTER[family]
    wires.ip(lab, "outside", f"-{family} route flush cache")


@families
@all_protocols
@pytest.mark.parametrize("unfinished", [True, False])
@pytest.mark.parametrize("size", [0, 4, 1200])
def test_whatever_nobody_serves_is_answered(
    lab: cluster.Lab, family: int, proto: int, unfinished: bool, size: int
) -> None:
    client, node = lab["outside"].address(family), lab["n1"].address(family)
    with wires.Tap(lab, "outside") as at_client:
        sent = packet(client, node, proto, EMPTY_PORT, bytes(size))
        send(lab, family, sent, proto, unfinished=unfinished)
        if proto == packets.TCP:
            reset = at_client.until(lambda one: not one.outgoing and one.proto == packets.TCP, "a reset")
            assert (reset.sport, len(reset.body), reset.body[13]) == (
                EMPTY_PORT,
                20,
                packets.RST | packets.ACK,
            )
            assert packets.wrong_checksums(reset.frame) == []
            return
        error = at_client.until(lambda one: one.icmp() == UNREACHABLE[family], "port unreachable")
    assert_about(error, client, node, proto, EMPTY_PORT)


def packet(client: str, node: str, proto: int, port: int, payload: bytes) -> bytes:
    if proto == packets.TCP:
        l4 = packets.tcp(41000, port, payload=payload)
    else:
        l4 = (packets.udp if proto == packets.UDP else packets.sctp)(41000, port, payload)
    return packets.ip(client, node, l4)


def send(lab: cluster.Lab, family: int, whole: bytes, proto: int, *, unfinished: bool) -> None:
    """Put a packet on the wire of the client; unfinished: with its checksum left to the device."""
    l4 = OUTER[family]
    frame = bytearray(packets.frame(whole, to=wires.mac(lab, "n1"), by=wires.mac(lab, "outside")))
    start, at = packets.ETHERNET + l4, CHECKSUM_AT[proto]
    header = bytes(10)
    if unfinished:
        ends = (whole[12:16], whole[16:20]) if family == 4 else (whole[8:24], whole[24:40])
        covered = packets.pseudo(*ends, proto, len(whole) - l4)
        width = 4 if proto == packets.SCTP else 2
        begun = bytes(4) if proto == packets.SCTP else packets.ones_sum(covered).to_bytes(2, "big")
        frame[start + at : start + at + width] = begun
        header = struct.pack("=BBHHHH", NEEDS_CSUM, 0, start, 0, start, at)
    with wires.open_socket(lab, "outside", socket.AF_PACKET, socket.SOCK_RAW) as opened:
        opened.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        opened.bind(("eth0", 0))
        opened.send(header + frame)
