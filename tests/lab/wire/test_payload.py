"""What clients outside send through NodePorts arrives whole, and so do the answers: sums, sizes, fragments.

Of each packet that reaches its end the checksum is computed anew: whether it was
complete from the start, or left to the device behind the node.
"""

import collections.abc
import socket

import pytest

from lbproxy.lab import cluster
from tests.lab import agents, manifests
from tests.lab.wire import wires
from tests.lab.wire.ways import SCTP_PORT, TARGET, Way, families, ways, who_sums
from tests.packets import packets

pytestmark = pytest.mark.usefixtures("echoes")


@ways
@families
@who_sums
def test_checksums_are_right_whoever_makes_them(
    lab: cluster.Lab,
    set_offload: collections.abc.Callable[..., None],
    devices: tuple[tuple[str, str], ...],
    way: Way,
    family: int,
) -> None:
    set_offload(*devices)
    node = lab["n1"].address(family)
    wrong_before = {where: errors(lab, where) for where in ("outside", way.backend)}
    with wires.Tap(lab, "outside") as at_client, wires.Tap(lab, way.backend) as at_backend:
        wires.exchange(lab, "outside", node, way.node_port, 50_000)
        for size in (0, 1, 1400):
            wires.ask(lab, "outside", node, way.node_port, size)
        for tap, port in ((at_client, way.node_port), (at_backend, None)):
            arrived = [
                one for one in tap.seen() if not one.outgoing and one.proto in (packets.TCP, packets.UDP)
            ]
            assert {one.proto for one in arrived} == {packets.TCP, packets.UDP}
            assert {one.sport for one in arrived} == {port} or {one.dport for one in arrived} == {TARGET}
            assert [packets.wrong_checksums(one.frame) for one in arrived] == [[]] * len(arrived)
    assert {where: errors(lab, where) for where in wrong_before} == wrong_before


def errors(lab: cluster.Lab, where: str) -> dict[str, int]:
    found = wires.snmp(lab, where)
    return {name: count for name, count in found.items() if "CsumErrors" in name or name == "TcpInErrs"}


@ways
@families
def test_a_bulk_transfer_goes_in_big_segments(
    lab: cluster.Lab, echoes: dict[str, wires.Echo], way: Way, family: int
) -> None:
    size = 20_000_000
    echo = echoes[way.backend]
    echo.peers.clear()
    with wires.Tap(lab, "n1") as tap:
        wires.exchange(lab, "outside", lab["n1"].address(family), way.node_port, size)
        longest = {
            outgoing: max(one.length for one in tap.seen() if one.outgoing == outgoing)
            for outgoing in (False, True)
        }
    assert min(longest.values()) > 10_000
    client = lab["outside"].address(family)
    assert (client in echo.peers) != way.masqueraded


@ways
@families
def test_fragments_follow_the_first_one(lab: cluster.Lab, way: Way, family: int) -> None:
    node = lab["n1"].address(family)
    with wires.Tap(lab, "outside") as at_client, wires.Tap(lab, way.backend) as at_backend:
        for _ in range(2):
            wires.ask(lab, "outside", node, way.node_port, 8000)
        for tap in (at_client, at_backend):
            kinds = {one.fragment for one in tap.seen() if one.proto == packets.UDP and not one.outgoing}
            assert kinds == {True}


@ways
@families
def test_a_fragment_before_the_first_one_is_not_served(
    lab: cluster.Lab, agent: agents.Agent, way: Way, family: int
) -> None:  # as docs/contract.md says
    client, node = lab["outside"].address(family), lab["n1"].address(family)
    cut = packets.fragments4 if family == 4 else packets.fragments6
    by, to = wires.mac(lab, "outside"), wires.mac(lab, "n1")
    # A number is known for longer than its datagram takes: each Service has its own.
    reversed_id, id_ = range(70 + way.number * 2, 72 + way.number * 2)

    def parts(ident: int) -> list[bytes]:
        datagram = packets.udp(40000 + ident, way.node_port, bytes(64))
        return [packets.frame(part, by=by, to=to) for part in cut(client, node, datagram, 16, ident=ident)]

    lost = agent.counter("fragment_lost")
    with wires.Tap(lab, way.backend) as at_backend, wires.Tap(lab, "outside") as at_client:
        for frame in (*reversed(parts(reversed_id)), *parts(id_)):
            at_client.send(frame)
        at_client.until(lambda one: not one.outgoing and one.dport == 40000 + id_, "the answer to the other")
        answered = {one.dport for one in at_client.seen() if not one.outgoing and one.proto == packets.UDP}
        assert answered == {40000 + id_}
        assert len([one for one in at_backend.seen() if not one.outgoing and one.fragment]) == 3
    assert agent.counter("fragment_lost") == lost + 1


@ways
@families
@pytest.mark.parametrize("kind", ["node port", "cluster ip"])
def test_sctp_is_translated_with_its_checksum(lab: cluster.Lab, kind: str, way: Way, family: int) -> None:
    """By hand: this kernel knows no SCTP."""
    client = lab["outside"].address(family)
    target = (
        (lab["n1"].address(family), way.node_port)
        if kind == "node port"
        else (manifests.cluster_ip(way.number, family), SCTP_PORT)
    )
    unmasqueraded = kind == "node port" and not way.masqueraded
    init = b"\x01\0\0\x14" + bytes(range(16))
    init_ack = b"\x02\0\0\x1d" + bytes(range(25))
    with wires.raw(lab, "outside", family) as here, wires.raw(lab, way.backend, family) as there:
        here.sendto(packets.sctp(41000, target[1], init).data, (target[0], 0))
        asked, (asker, *_) = wires.receive_l4(there)
        assert asked[12:] == init
        assert (sctp_ports(asked)[1], asker == client) == (TARGET, unmasqueraded)
        assert is_right(asked)
        there.sendto(packets.sctp(TARGET, sctp_ports(asked)[0], init_ack).data, (asker, 0))
        answer, (answerer, *_) = wires.receive_l4(here)
        assert (answerer, sctp_ports(answer)) == (target[0], (target[1], 41000))
        assert answer[12:] == init_ack
        assert is_right(answer)


def sctp_ports(packet: bytes) -> tuple[int, int]:
    return int.from_bytes(packet[:2], "big"), int.from_bytes(packet[2:4], "big")


def is_right(packet: bytes) -> bool:
    return packets.crc32c(packet[:8] + bytes(4) + packet[12:]) == int.from_bytes(packet[8:12], "little")


def tagged(frame: bytes, tag: int) -> bytes:
    return frame[:12] + packets.VLAN.to_bytes(2, "big") + tag.to_bytes(2, "big") + frame[12:]


@ways
@families
def test_tagged_frames_are_left_to_vlan_devices(lab: cluster.Lab, way: Way, family: int) -> None:
    """This node has none for 100, and 0 is no tag."""
    client, node = lab["outside"].address(family), lab["n1"].address(family)
    by, to = wires.mac(lab, "outside"), wires.mac(lab, "n1")
    with wires.open_socket(lab, "outside", family, socket.SOCK_DGRAM) as asking:
        asking.connect((node, way.node_port))
        port = asking.getsockname()[1]

        def frame(payload: bytes) -> bytes:
            return packets.frame(
                packets.ip(client, node, packets.udp(port, way.node_port, payload)), by=by, to=to
            )

        with wires.Tap(lab, "outside") as wire, wires.Tap(lab, way.backend) as at_backend:
            for payload in (b"before", b"again"):
                wire.send(frame(payload))
                assert asking.recv(100) == payload
            for tag in (100, 0xE064):
                wire.send(tagged(frame(b"tagged"), tag))
            for payload, tag in ((b"zero", 0), (b"priority", 0xE000)):
                wire.send(tagged(frame(payload), tag))
                assert asking.recv(100) == payload
            wire.send(frame(b"after"))
            assert asking.recv(100) == b"after"
            arrived = [
                one.body[8:] for one in at_backend.seen() if not one.outgoing and one.proto == packets.UDP
            ]
    assert arrived == [b"before", b"again", b"zero", b"priority", b"after"]
