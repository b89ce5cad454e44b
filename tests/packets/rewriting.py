"""The bytes that the reference expects: packets with other addresses, and answers.

Checksums are computed as sums modulo 65535, in which what is not covered by a change
cancels out: a checksum that was wrong stays wrong by as much.
"""

import typing

from tests.packets import packets, parsing

_MAPPED: typing.Final = 12


class Bytes(typing.NamedTuple):
    """A frame, and where it has checksums: of these 0 and 0xffff are the same number."""

    frame: bytes
    checksums: tuple[int, ...] = ()

    def agrees(self, other: bytes) -> bool:
        """Whether this is that frame."""
        if self.frame == other:
            return True
        if len(self.frame) != len(other):
            return False
        mine = bytearray(self.frame)
        for at in self.checksums:
            theirs = other[at : at + 2]
            if {self.frame[at : at + 2], theirs} == {b"\0\0", b"\xff\xff"}:
                mine[at : at + 2] = theirs
        return mine == other


class Ends(typing.NamedTuple):
    """Where a packet is to come from and go to."""

    src: bytes
    dst: bytes
    sport: bytes
    dport: bytes


def rewrite(frame: bytes, packet: parsing.Packet, to: Ends) -> Bytes:
    """A packet of a flow, translated."""
    new = bytearray(frame)
    checksums = []
    _set_addresses(new, packet, to.src, to.dst)
    if packet.ipv4:
        checksums.append(packet.l3 + 10)
    if packet.fragment == parsing.LATER:
        return Bytes(bytes(new), tuple(checksums))
    l4 = packet.l4
    ports = to.sport + to.dport
    new[l4 : l4 + 4] = ports
    if packet.proto == parsing.SCTP:
        if not packet.fragment and frame[l4 : l4 + 4] != ports:
            _set_crc(new, frame, packet)
        return Bytes(bytes(new), tuple(checksums))
    at = l4 + (16 if packet.proto == parsing.TCP else 6)
    is_udp = packet.proto == parsing.UDP
    if is_udp and frame[at : at + 2] == b"\0\0":
        return Bytes(bytes(new), tuple(checksums))
    before = packet.src + packet.dst + frame[l4 : l4 + 4]
    _adjust(new, at, before, to.src + to.dst + ports)
    if is_udp:
        if new[at : at + 2] == b"\0\0":
            new[at : at + 2] = b"\xff\xff"
    else:
        checksums.append(at)
    return Bytes(bytes(new), tuple(checksums))


def is_partial(frame: bytes, packet: parsing.Packet) -> bool:
    """Whether a TCP or UDP checksum covers only the pseudo header: a device was to complete it."""
    cut = _MAPPED if packet.ipv4 else 0
    at = packet.l4 + (16 if packet.proto == parsing.TCP else 6)
    covered = packets.pseudo(packet.src[cut:], packet.dst[cut:], packet.proto, packet.end - packet.l4)
    return packets.ones_sum(covered) == int.from_bytes(frame[at : at + 2], "big")


def forward(frame: bytes, packet: parsing.Packet, to: Ends, mac: bytes, next_mac: bytes) -> Bytes:
    """A packet translated and sent on, as a router does it."""
    done = rewrite(frame, packet, to)
    new = bytearray(done.frame)
    hops = packet.l3 + (8 if packet.ipv4 else 7)
    new[hops] -= 1
    if packet.ipv4:
        _adjust(new, packet.l3 + 10, frame[hops : hops + 2], bytes(new[hops : hops + 2]))
    new[:12] = next_mac + mac
    return done._replace(frame=bytes(new))


def rewrite_error(
    frame: bytes, packet: parsing.Packet, quoted: parsing.Packet, src: bytes, dst: bytes, inner: Ends
) -> Bytes:
    """An ICMP error with other addresses, about a packet with other ends. What is quoted behind stays."""
    new = bytearray(frame)
    at, l4 = packet.l4 + 2, quoted.l4
    _set_addresses(new, packet, src, dst)
    _set_addresses(new, quoted, inner.src, inner.dst)
    new[l4 : l4 + 4] = inner.sport + inner.dport
    checksums = [at]
    before, after = frame[l4 : l4 + 4], inner.sport + inner.dport
    if packet.ipv4:
        # The quoted header's checksum makes up for its addresses.
        checksums += [packet.l3 + 10, quoted.l3 + 10]
    else:
        before += packet.src + packet.dst + quoted.src + quoted.dst
        after += src + dst + inner.src + inner.dst
    _adjust(new, at, before, after)
    return Bytes(bytes(new), tuple(checksums))


def encapsulate(frame: bytes, packet: parsing.Packet, src: bytes, dst: bytes, port: bytes) -> Bytes:
    """A packet inside another one, which says which port of `dst` it is for."""
    cut = _MAPPED if packet.ipv4 else 0
    outer = packets.tunnelled(src[cut:], dst[cut:], port, frame[packet.l3 : packet.end])
    behind = frame[packet.end :]
    checksums = (packets.ETHERNET + 10,) if packet.ipv4 else ()
    return Bytes(frame[: packets.ETHERNET] + outer + behind, checksums)


def too_big(frame: bytes, packet: parsing.Packet, sender: bytes, mtu: int) -> Bytes:
    """The ICMP error that says how long a packet may be."""
    quoted = frame[packet.l3 : packet.l4 + 8][:96]
    error = packets.icmp(3, 4, quoted, mtu) if packet.ipv4 else packets.icmp6(2, 0, quoted, mtu)
    return _answer(frame, packet, sender, error)


def reset(frame: bytes, packet: parsing.Packet) -> Bytes:
    """The RST that answers a segment (RFC 9293, 3.10.7.1)."""
    l4 = packet.l4
    if packet.flags & packets.ACK:
        flags, seq, ack = packets.RST, int.from_bytes(frame[l4 + 8 : l4 + 12], "big"), 0
    else:
        length = packet.end - l4 - (frame[l4 + 12] >> 4) * 4
        length += bool(packet.flags & packets.SYN) + bool(packet.flags & packets.FIN)
        flags, seq = packets.RST | packets.ACK, 0
        ack = int.from_bytes(frame[l4 + 4 : l4 + 8], "big") + length & 0xFFFFFFFF
    head = packet.dport + packet.sport + seq.to_bytes(4, "big") + ack.to_bytes(4, "big")
    segment = packets.L4(packets.TCP, head + bytes([5 << 4, flags]) + bytes(6), 16)
    return _answer(frame, packet, packet.dst, segment)


def unreachable(frame: bytes, packet: parsing.Packet, sender: bytes) -> Bytes:
    """The ICMP error that says that nobody listens: it quotes all headers, as far as 96 bytes."""
    quoted = frame[packet.l3 : packet.l4 + 8][:96]
    error = packets.icmp(3, 3, quoted) if packet.ipv4 else packets.icmp6(1, 4, quoted)
    return _answer(frame, packet, sender, error)


def _answer(frame: bytes, packet: parsing.Packet, sender: bytes, l4: packets.L4) -> Bytes:
    cut = _MAPPED if packet.ipv4 else 0
    ends = sender[cut:], packet.src[cut:]
    body = packets.finished(l4, *ends)
    if packet.ipv4:
        answer = packets.ip4(*ends, l4.proto, body, ident=0)
    else:
        answer = packets.ip6(*ends, l4.proto, body)
    at = packets.ETHERNET + len(answer) - len(body) + (l4.checksum_at or 0)
    checksums = (at, packets.ETHERNET + 10) if packet.ipv4 else (at,)
    return Bytes(frame[6:12] + frame[:6] + frame[12:14] + answer, checksums)


def _set_addresses(new: bytearray, packet: parsing.Packet, src: bytes, dst: bytes) -> None:
    l3 = packet.l3
    if packet.ipv4:
        before = packet.src[_MAPPED:] + packet.dst[_MAPPED:]
        after = src[_MAPPED:] + dst[_MAPPED:]
        new[l3 + 12 : l3 + 20] = after
        _adjust(new, l3 + 10, before, after)
    else:
        new[l3 + 8 : l3 + 40] = src + dst


def _adjust(new: bytearray, at: int, before: bytes, after: bytes) -> None:
    """Make a checksum right by as much as it was before something that it covers has changed."""
    was = int.from_bytes(new[at : at + 2], "big")
    now = (was + int.from_bytes(before, "big") - int.from_bytes(after, "big")) % 0xFFFF
    new[at : at + 2] = now.to_bytes(2, "big")


def _set_crc(new: bytearray, frame: bytes, packet: parsing.Packet) -> None:
    l4, end = packet.l4, packet.end
    was = int.from_bytes(frame[l4 + 8 : l4 + 12], "little")
    change = packets.crc32c(_zeroed(frame[l4:end])) ^ packets.crc32c(_zeroed(bytes(new[l4:end])))
    new[l4 + 8 : l4 + 12] = (was ^ change).to_bytes(4, "little")


def _zeroed(packet: bytes) -> bytes:
    return packet[:8] + bytes(4) + packet[12:]
