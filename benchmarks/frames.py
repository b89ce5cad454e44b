"""Ethernet frames with TCP or UDP in them, of one length, and who they are from and to. Pure."""

import struct
import typing

from lbproxy.core import addresses, model

LENGTH = 128
ETHERNET = 14
SYN, SYN_ACK, ACK = 0x02, 0x12, 0x10
TCP, UDP = 6, 17
_IPV4, _IPV6 = 20, 40


class Ends(typing.NamedTuple):
    """Who sends a packet to whom; addresses are 16 bytes."""

    src: bytes
    sport: int
    dst: bytes
    dport: int

    def turned(self) -> "Ends":
        """Return those of an answer."""
        return Ends(self.dst, self.dport, self.src, self.sport)


def is_ipv4(ends: Ends) -> bool:
    """Say which family a packet is of."""
    return addresses.family_of(ends.src) is model.Family.IPV4


def l4_at(ipv4: bool) -> int:
    """Return the offset of the TCP or UDP header."""
    return ETHERNET + (_IPV4 if ipv4 else _IPV6)


def word_at(ipv4: bool, source: bool) -> int:
    """Return the offset of the last word of one of the addresses."""
    if ipv4:
        return ETHERNET + (12 if source else 16)
    return ETHERNET + (8 if source else 24) + 12


def port_at(ipv4: bool, source: bool) -> int:
    """Return the offset of one of the ports."""
    return l4_at(ipv4) + (0 if source else 2)


def build(ends: Ends, proto: int, tcp_flags: int, to_mac: bytes, from_mac: bytes) -> bytes:
    """Return a frame with right checksums, filled with a pattern."""
    ipv4 = is_ipv4(ends)
    length = LENGTH - l4_at(ipv4)
    ports = struct.pack("!HH", ends.sport, ends.dport)
    if proto == TCP:
        head = ports + struct.pack("!IIBBHHH", 1000, 2000, 5 << 4, tcp_flags, 0xFFFF, 0, 0)
        checksum_at = 16
    else:
        head = ports + struct.pack("!HH", length, 0)
        checksum_at = 6
    segment = bytearray(head + bytes(byte & 0xFF for byte in range(length - len(head))))
    src, dst = (one[-4:] if ipv4 else one for one in (ends.src, ends.dst))
    pseudo = src + dst + struct.pack("!II", length, proto)
    struct.pack_into("!H", segment, checksum_at, _checksum(pseudo + segment) or 0xFFFF)
    if ipv4:
        ip = bytearray(struct.pack("!BBHHHBBH", 0x45, 0, _IPV4 + length, 1, 0x4000, 64, proto, 0) + src + dst)
        struct.pack_into("!H", ip, 10, _checksum(ip))
    else:
        ip = bytearray(struct.pack("!IHBB", 6 << 28, length, proto, 64) + src + dst)
    return to_mac + from_mac + (b"\x08\x00" if ipv4 else b"\x86\xdd") + bytes(ip) + bytes(segment)


def read(frame: bytes) -> Ends:
    """Return who a frame is from and to."""
    ipv4 = frame[12:14] == b"\x08\x00"

    def address(source: bool) -> bytes:
        end = word_at(ipv4, source) + 4
        return addresses.IPV4_PREFIX + frame[end - 4 : end] if ipv4 else frame[end - 16 : end]

    sport, dport = struct.unpack_from("!HH", frame, l4_at(ipv4))
    return Ends(address(True), sport, address(False), dport)


def l4_checksum_is_right(frame: bytes, proto: int) -> bool:
    """Say whether the TCP or UDP checksum covers what is there."""
    ends = read(frame)
    ipv4 = is_ipv4(ends)
    segment = frame[l4_at(ipv4) :]
    src, dst = (one[-4:] if ipv4 else one for one in (ends.src, ends.dst))
    return _checksum(src + dst + struct.pack("!II", len(segment), proto) + segment) == 0


def _checksum(data: bytes | bytearray) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
