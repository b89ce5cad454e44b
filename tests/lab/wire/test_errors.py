"""ICMP errors about translated flows reach whoever sent the packet, and quote what they sent.

Ways with a smaller MTU, ports where nobody listens, packets that have gone too far.
"""

import collections.abc
import contextlib
import errno
import socket

import pytest

from lbproxy.lab import cluster
from tests.lab.wire import wires
from tests.lab.wire.conftest import no_icmp_rate_limits
from tests.lab.wire.ways import DEAD, NOBODYS_PORT, TARGET, Way, families, ways, who_sums
from tests.packets import packets

NARROW = 1400
BULK = 2_000_000
TIME_EXCEEDED = {4: (packets.ICMP, 11, 0), 6: (packets.ICMP6, 3, 0)}
TOO_BIG = {4: (packets.ICMP, 3, 4), 6: (packets.ICMP6, 2, 0)}

pytestmark = pytest.mark.usefixtures("agent")


@pytest.fixture(scope="module", autouse=True)
def no_rate_limits(lab: cluster.Lab) -> None:
    no_icmp_rate_limits(lab)


@contextlib.contextmanager
def narrow(lab: cluster.Lab, where: str, to: str, device: str) -> collections.abc.Iterator[None]:
    """Have a node send no more than NARROW bytes at once to an address, and all forget what they learnt."""
    family = 6 if ":" in to else 4
    route = f"-{family} route %s {to} dev {device}"
    wires.ip(lab, where, route % "add" + f" mtu {NARROW}")
    try:
        yield
    finally:
        wires.ip(lab, where, route % "del")
        for place in ("outside", "n1", "n1/p2", "n2/p1"):
            wires.ip(lab, place, f"-{family} route flush cache")


@ways
@families
def test_a_narrow_way_to_the_backend_is_found_out(
    lab: cluster.Lab, echoes: dict[str, wires.Echo], way: Way, family: int
) -> None:
    node = lab["n1"].address(family)
    with narrow(lab, way.backend.split("/")[0], lab[way.backend].address(family), "cni0"):
        with wires.Tap(lab, "outside") as at_client:
            wires.exchange(lab, "outside", node, way.node_port, BULK)
            error = at_client.until(lambda one: one.icmp() == TOO_BIG[family], "too big")
        assert_about(error, lab["outside"].address(family), node, packets.TCP, way.node_port)
        with wires.connect(lab, "outside", node, way.node_port) as later:
            assert wires.path_mtu(later) == NARROW


@ways
@families
def test_a_narrow_way_to_the_client_is_found_out(
    lab: cluster.Lab, echoes: dict[str, wires.Echo], way: Way, family: int
) -> None:
    with narrow(lab, "n1", lab["outside"].address(family), "eth0"):
        with wires.Tap(lab, way.backend) as at_backend:
            wires.exchange(lab, "outside", lab["n1"].address(family), way.node_port, BULK)
            error = at_backend.until(lambda one: one.icmp() == TOO_BIG[family], "too big")
            asker = next(one.src for one in at_backend.seen() if one.dport == TARGET)
        quoted = error.quoted()
        assert (quoted.src, quoted.dst) == (lab[way.backend].address(family), asker)
        assert quoted.sport == TARGET


def assert_about(error: wires.Seen, client: str, node: str, proto: int, port: int) -> None:
    """Whether an error is right in itself, and about a packet from the client to the service."""
    assert packets.wrong_checksums(error.frame) == []
    quoted = error.quoted()
    assert (quoted.src, quoted.dst, quoted.proto, quoted.dport) == (client, node, proto, port)
    if quoted.frame[12:14] == b"\x08\0":
        assert packets.checksum(quoted.frame[14:34]) == 0


@ways
@families
def test_a_dead_port_refuses_its_client(lab: cluster.Lab, way: Way, family: int) -> None:
    node = lab["n1"].address(family)
    with pytest.raises(ConnectionRefusedError):
        wires.connect(lab, "outside", node, way.dead_port)
    with (
        wires.Tap(lab, "outside") as at_client,
        wires.connect(lab, "outside", node, way.dead_port, socket.SOCK_DGRAM) as asking,
    ):
        asking.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            asking.recv(1)
        error = at_client.until(lambda one: one.icmp() is not None)
    assert_about(error, lab["outside"].address(family), node, packets.UDP, way.dead_port)


@families
@who_sums
def test_a_service_without_backends_refuses_its_client(
    lab: cluster.Lab,
    set_offload: collections.abc.Callable[..., None],
    devices: tuple[tuple[str, str], ...],
    family: int,
) -> None:
    set_offload(*devices)
    node = lab["n1"].address(family)
    with wires.Tap(lab, "outside") as at_client:
        with pytest.raises(ConnectionRefusedError):
            wires.connect(lab, "outside", node, NOBODYS_PORT)
        with wires.connect(lab, "outside", node, NOBODYS_PORT, socket.SOCK_DGRAM) as asking:
            asking.send(b"anybody?")
            with pytest.raises(ConnectionRefusedError):
                asking.recv(1)
        error = at_client.until(lambda one: one.icmp() is not None)
        reset = at_client.until(lambda one: not one.outgoing and one.proto == packets.TCP)
    assert packets.wrong_checksums(reset.frame) == []
    assert_about(error, lab["outside"].address(family), node, packets.UDP, NOBODYS_PORT)


@ways
@families
def test_a_client_that_has_gone_refuses_its_backend(lab: cluster.Lab, way: Way, family: int) -> None:
    with wires.open_socket(lab, way.backend, family, socket.SOCK_DGRAM) as backend:
        backend.bind((lab[way.backend].address(family), DEAD))
        node = lab["n1"].address(family)
        with wires.connect(lab, "outside", node, way.dead_port, socket.SOCK_DGRAM) as asking:
            asking.send(b"anybody?")
            peer = backend.recvfrom(100)[1]
        backend.connect(peer)
        backend.send(b"me")
        with pytest.raises(ConnectionRefusedError):
            backend.recv(1)


# The node forwards it with one less; the second node is only there for `far`.
@ways
@families
@pytest.mark.parametrize("proto", [packets.TCP, packets.UDP])
@pytest.mark.parametrize("ttl", [1, 2, 3])
def test_a_packet_that_has_gone_too_far_is_reported_by_the_node_where_it_ended(
    lab: cluster.Lab, echoes: dict[str, wires.Echo], way: Way, family: int, proto: int, ttl: int
) -> None:
    client, node = lab["outside"].address(family), lab["n1"].address(family)
    nodes = ["n1", "n2"] if way.backend.startswith("n2") else ["n1"]
    kind = socket.SOCK_STREAM if proto == packets.TCP else socket.SOCK_DGRAM
    with wires.Tap(lab, "outside") as at_client, wires.open_socket(lab, "outside", family, kind) as asking:
        if family == 4:
            asking.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        else:
            asking.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, ttl)
        asking.setblocking(False)
        assert asking.connect_ex((node, way.node_port)) in (0, errno.EINPROGRESS)
        if proto == packets.UDP:
            asking.send(b"how far?")
        if ttl > len(nodes):
            at_client.until(lambda one: not one.outgoing and (one.proto, one.sport) == (proto, way.node_port))
            return
        error = at_client.until(lambda one: one.icmp() == TIME_EXCEEDED[family], "time exceeded")
    assert error.src == lab[nodes[ttl - 1]].address(family)
    assert_about(error, client, node, proto, way.node_port)
