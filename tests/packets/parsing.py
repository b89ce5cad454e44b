"""What a frame says, as the reference reads it: written from the RFCs, not from bpf/packet.h.

A packet counts only if all headers that matter lie inside it, whatever is behind it in
its frame.
"""

import typing

TCP, UDP, SCTP = 6, 17, 132
_ICMP, _ICMP6 = 1, 58
_IP_IN_IP, _IP6_IN_IP6 = 4, 41
_ERRORS: typing.Final = {_ICMP: (3, 4, 5, 11, 12), _ICMP6: (1, 2, 3, 4)}
_SHORTEST: typing.Final = {TCP: 20, UDP: 8, SCTP: 12}
_MAPPED: typing.Final = bytes(10) + b"\xff\xff"
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _DESTINATION = 0, 43, 44, 60
_MOST_EXTENSIONS: typing.Final = 6
_QUOTE_AT: typing.Final = 8  # in an ICMP error

WHOLE, FIRST, LATER = range(3)


class Packet(typing.NamedTuple):
    """Addresses of 16 bytes and ports of 2, as the maps have them; offsets into the frame."""

    ipv4: bool
    l3: int
    l4: int
    end: int  # behind the packet
    src: bytes
    dst: bytes
    proto: int
    fragment: int
    ident: bytes  # of the datagram
    sport: bytes = bytes(2)
    dport: bytes = bytes(2)
    flags: int = 0
    error: bool = False  # an ICMP error
    tunnel: bool = False  # it holds another packet of its family

    def begins(self) -> bool:
        """Whether it may be the first of a flow."""
        return self.proto != TCP or self.flags & 0x12 == 0x02


def parse(frame: bytes) -> Packet | None:
    """The packet in a frame, if it is one that a flow may have, or an ICMP error."""
    kind = frame[12:14]
    if kind == b"\x08\x00":
        packet = _ipv4(frame, 14, len(frame))
    elif kind == b"\x86\xdd":
        packet = _ipv6(frame, 14, len(frame))
    else:
        return None
    return _with_ports(frame, packet, len(frame))


def parse_inner(frame: bytes, outer: Packet) -> Packet | None:
    """The packet in a tunnel's packet, if it is one that a flow may have, or an ICMP error."""
    read = _ipv4 if outer.ipv4 else _ipv6
    packet = _with_ports(frame, read(frame, outer.l4, outer.end), outer.end)
    return None if packet is None or packet.tunnel else packet


def _with_ports(frame: bytes, packet: Packet | None, limit: int) -> Packet | None:
    if packet is None or packet.end > limit or packet.l4 > packet.end:
        return None
    l4, end, proto = packet.l4, packet.end, packet.proto
    if packet.fragment == LATER:
        return packet if proto in _SHORTEST else None
    if proto in _SHORTEST:
        if l4 + _SHORTEST[proto] > end:
            return None
        flags = frame[l4 + 13] if proto == TCP else 0
        return packet._replace(sport=frame[l4 : l4 + 2], dport=frame[l4 + 2 : l4 + 4], flags=flags)
    if proto == (_IP_IN_IP if packet.ipv4 else _IP6_IN_IP6):
        return None if packet.fragment else packet._replace(tunnel=True)
    if proto != (_ICMP if packet.ipv4 else _ICMP6) or packet.fragment or l4 + 8 > end:
        return None
    return packet._replace(error=True) if frame[l4] in _ERRORS[proto] else None


def parse_quoted(frame: bytes, error: Packet) -> Packet | None:
    """The packet that an ICMP error is about, of which 8 bytes behind the headers are enough."""
    read = _ipv4 if error.ipv4 else _ipv6
    packet = read(frame, error.l4 + _QUOTE_AT, error.end)
    if packet is None or packet.fragment == LATER or packet.proto not in _SHORTEST:
        return None
    l4 = packet.l4
    if l4 + 8 > error.end:
        return None
    return packet._replace(sport=frame[l4 : l4 + 2], dport=frame[l4 + 2 : l4 + 4])


def _ipv4(frame: bytes, at: int, limit: int) -> Packet | None:
    if at + 20 > limit or frame[at] >> 4 != 4:
        return None
    header, length = (frame[at] & 15) * 4, int.from_bytes(frame[at + 2 : at + 4], "big")
    # 0 stands for more than 64 KB, as segmentation offload makes them.
    if header < 20 or 0 < length < header:
        return None
    place = int.from_bytes(frame[at + 6 : at + 8], "big")
    fragment = LATER if place & 0x1FFF else FIRST if place & 0x2000 else WHOLE
    return Packet(
        True,
        at,
        at + header,
        at + length if length else limit,
        _MAPPED + frame[at + 12 : at + 16],
        _MAPPED + frame[at + 16 : at + 20],
        frame[at + 9],
        fragment,
        frame[at + 4 : at + 6] + bytes(2),
    )


def _ipv6(frame: bytes, at: int, limit: int) -> Packet | None:
    if at + 40 > limit or frame[at] >> 4 != 6:
        return None
    length, proto = int.from_bytes(frame[at + 4 : at + 6], "big"), frame[at + 6]
    src, dst = frame[at + 8 : at + 24], frame[at + 24 : at + 40]
    # Such addresses stand for IPv4 ones, and are on no wire (RFC 4942, 2.2).
    if src.startswith(_MAPPED) or dst.startswith(_MAPPED):
        return None
    l4, fragment, ident = at + 40, WHOLE, bytes(4)
    for _ in range(_MOST_EXTENSIONS):
        if proto not in (_HOP_BY_HOP, _ROUTING, _DESTINATION, _FRAGMENT):
            break
        if l4 + 8 > limit:
            return None
        header = frame[l4 : l4 + 8]
        if proto == _FRAGMENT:
            place, ident = int.from_bytes(header[2:4], "big"), header[4:]
            l4 += 8
            proto = header[0]
            if place & 0xFFF8:
                fragment = LATER
                break
            if place & 1:
                fragment = FIRST
            continue
        if proto == _ROUTING and header[3]:
            return None
        proto, l4 = header[0], l4 + 8 + header[1] * 8
    return Packet(False, at, l4, at + 40 + length if length else limit, src, dst, proto, fragment, ident)
