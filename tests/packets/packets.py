"""Frames, and the addresses that they are between.

Each function builds one layer around a payload; `frame` puts Ethernet before it. Every
checksum is right unless a test says otherwise, and `wrong_checksums` computes all of
them anew.
"""

import functools
import socket
import struct
import typing

MAC_UP = "02:00:00:00:00:01"  # this node's, of the uplink
MAC_POD_DEVICE = "02:00:00:00:00:02"
MAC_GATEWAY = "02:00:00:00:00:03"
MAC_FAR = "02:00:00:00:00:99"

NODE, NODE6 = "192.0.2.1", "2001:db8::1"
NODE_TO_PODS, NODE6_TO_PODS = "10.244.1.1", "2001:db8:244:1::1"
GATEWAY, GATEWAY6 = "192.0.2.254", "2001:db8::fe"
ROUTER, ROUTER6 = "198.51.100.254", "2001:db8:51::fe"
CLIENT, CLIENT6 = "198.51.100.7", "2001:db8:51::7"
OTHER_CLIENT, OTHER_CLIENT6 = "203.0.113.9", "2001:db8:113::9"
POD_A, POD_A6 = "10.244.1.10", "2001:db8:244:1::10"  # of this node
POD_B, POD_B6 = "10.244.2.20", "2001:db8:244:2::20"  # of another
POD_CIDR, POD_CIDR6 = "10.244.0.0/16", "2001:db8:244::/48"
CLUSTER_IP, CLUSTER_IP6 = "10.96.0.10", "2001:db8:96::10"
EXTERNAL_IP, EXTERNAL_IP6 = "203.0.113.80", "2001:db8:113::80"
BALANCER_IP, BALANCER_IP6 = "203.0.113.81", "2001:db8:113::81"


class Side(typing.NamedTuple):
    """The same places in one family's addresses."""

    node: str
    node_to_pods: str
    router: str
    client: str
    other_client: str
    pod: str  # of this node
    far_pod: str  # of another
    pod_cidr: str
    cluster_ip: str
    external_ip: str
    balancer_ip: str


V4: typing.Final = Side(
    NODE,
    NODE_TO_PODS,
    ROUTER,
    CLIENT,
    OTHER_CLIENT,
    POD_A,
    POD_B,
    POD_CIDR,
    CLUSTER_IP,
    EXTERNAL_IP,
    BALANCER_IP,
)
V6: typing.Final = Side(
    NODE6,
    NODE6_TO_PODS,
    ROUTER6,
    CLIENT6,
    OTHER_CLIENT6,
    POD_A6,
    POD_B6,
    POD_CIDR6,
    CLUSTER_IP6,
    EXTERNAL_IP6,
    BALANCER_IP6,
)

ICMP, TCP, UDP, ICMP6, SCTP = 1, 6, 17, 58, 132
IP_IN_IP, IP6_IN_IP6 = 4, 41
HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION = 0, 43, 44, 60
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
IPV4, IPV6, VLAN, ARP = 0x0800, 0x86DD, 0x8100, 0x0806
ETHERNET = 14
LONGEST = 3000


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def unpacked(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET6 if len(address) == 16 else socket.AF_INET, address)


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def ones_sum(data: bytes) -> int:
    """The ones' complement sum of 16-bit words."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def checksum(data: bytes) -> int:
    return 0xFFFF ^ ones_sum(data)


@functools.cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)  # noqa: PLW2901
        table.append(crc)
    return tuple(table)


def crc32c(data: bytes) -> int:
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def pseudo(src: bytes, dst: bytes, proto: int, length: int) -> bytes:
    """What a TCP, UDP or ICMPv6 checksum covers beside the packet."""
    return src + dst + struct.pack("!II", length, proto)


class L4(typing.NamedTuple):
    """What IP carries. `checksum_at` is where the checksum over the pseudo header goes, None for none."""

    proto: int
    data: bytes
    checksum_at: int | None = None
    covers_addresses: bool = True
    never_zero: bool = False


def tcp(
    sport: int,
    dport: int,
    flags: int = SYN,
    payload: bytes = b"",
    *,
    seq: int = 1000,
    ack: int = 0,
    options: bytes = b"",
) -> L4:
    offset = (20 + len(options)) // 4 << 4
    head = struct.pack("!HHIIBBHHH", sport, dport, seq, ack, offset, flags, 64240, 0, 0)
    return L4(TCP, head + options + payload, 16)


def udp(sport: int, dport: int, payload: bytes = b"hello", *, checksum: bool = True) -> L4:
    head = struct.pack("!HHHH", sport, dport, 8 + len(payload), 0)
    return L4(UDP, head + payload, 6 if checksum else None, never_zero=True)


def sctp(sport: int, dport: int, payload: bytes = b"\x01\0\0\x04") -> L4:
    head = struct.pack("!HHI", sport, dport, 0x12345678)
    crc = crc32c(head + bytes(4) + payload)
    return L4(SCTP, head + crc.to_bytes(4, "little") + payload)


def icmp(kind: int, code: int, quoted: bytes, rest: int = 0) -> L4:
    return L4(ICMP, struct.pack("!BBHI", kind, code, 0, rest) + quoted, 2, covers_addresses=False)


def icmp6(kind: int, code: int, quoted: bytes, rest: int = 0) -> L4:
    return L4(ICMP6, struct.pack("!BBHI", kind, code, 0, rest) + quoted, 2)


def finished(l4: L4, src: bytes, dst: bytes) -> bytes:
    """Its bytes, with the checksum."""
    if l4.checksum_at is None:
        return l4.data
    covered = pseudo(src, dst, l4.proto, len(l4.data)) if l4.covers_addresses else b""
    result = checksum(covered + l4.data) or (0xFFFF if l4.never_zero else 0)
    return l4.data[: l4.checksum_at] + result.to_bytes(2, "big") + l4.data[l4.checksum_at + 2 :]


def ip(
    src: str,
    dst: str,
    l4: L4,
    *,
    ttl: int = 64,
    ident: int = 7,
    fragment: int = 0x4000,
    options: bytes = b"",
    extensions: typing.Sequence[tuple[int, bytes]] = (),
) -> bytes:
    """An IPv4 or IPv6 packet. `extensions` are pairs of a header's number and its bytes behind the first."""
    a, b = packed(src), packed(dst)
    body = finished(l4, a, b)
    if len(a) == 4:
        return ip4(a, b, l4.proto, body, ttl=ttl, ident=ident, fragment=fragment, options=options)
    return ip6(a, b, l4.proto, body, ttl=ttl, extensions=extensions)


def ip4(
    src: bytes,
    dst: bytes,
    proto: int,
    body: bytes,
    *,
    ttl: int = 64,
    ident: int = 7,
    fragment: int = 0x4000,
    options: bytes = b"",
) -> bytes:
    ihl = 5 + len(options) // 4
    head = struct.pack(
        "!BBHHHBBH4s4s", 0x40 | ihl, 0, ihl * 4 + len(body), ident, fragment, ttl, proto, 0, src, dst
    )
    head += options
    return head[:10] + checksum(head).to_bytes(2, "big") + head[12:] + body


def ip6(
    src: bytes,
    dst: bytes,
    proto: int,
    body: bytes,
    *,
    ttl: int = 64,
    extensions: typing.Sequence[tuple[int, bytes]] = (),
    label: int = 0,
) -> bytes:
    numbers = [number for number, _ in extensions] + [proto]
    chain = b"".join(
        bytes([number]) + rest for number, (_, rest) in zip(numbers[1:], extensions, strict=True)
    )
    return (
        struct.pack("!IHBB", 6 << 28 | label, len(chain) + len(body), numbers[0], ttl)
        + src
        + dst
        + chain
        + body
    )


def tunnelled(src: bytes, dst: bytes, port: bytes, inner: bytes) -> bytes:
    """A packet inside another one, for a port of its destination."""
    if len(src) == 4:
        return ip4(src, dst, IP_IN_IP, inner, ident=int.from_bytes(port, "big"))
    return ip6(src, dst, IP6_IN_IP6, inner, label=int.from_bytes(port, "big"))


def tunnel(src: str, dst: str, port: int, inner: bytes) -> bytes:
    """The same by name."""
    return tunnelled(packed(src), packed(dst), port.to_bytes(2, "big"), inner)


def options6(number: int = DESTINATION, words: int = 1) -> tuple[int, bytes]:
    """An IPv6 options header that only pads, 8 bytes for each word."""
    return number, bytes([words - 1, 1, words * 8 - 4]) + bytes(words * 8 - 4)


def routing6(segments_left: int) -> tuple[int, bytes]:
    return ROUTING, bytes([0, 4, segments_left]) + bytes(4)


def fragment6(offset: int, more: bool, ident: int = 9) -> tuple[int, bytes]:
    """An IPv6 fragment header; `offset` in bytes."""
    return FRAGMENT, b"\0" + (offset | more).to_bytes(2, "big") + ident.to_bytes(4, "big")


def frame(
    packet: bytes, *, to: str = MAC_UP, by: str = MAC_FAR, kind: int | None = None, padding: int = 0
) -> bytes:
    """A packet in Ethernet, with so many bytes behind it."""
    if kind is None:
        kind = IPV6 if packet[:1] and packet[0] >> 4 == 6 else IPV4
    return mac(to) + mac(by) + kind.to_bytes(2, "big") + packet + bytes(padding)


def fragments4(src: str, dst: str, l4: L4, at: int, *, ident: int = 7) -> tuple[bytes, bytes]:
    """Two IPv4 fragments of a datagram, cut behind so many bytes."""
    a, b = packed(src), packed(dst)
    body = finished(l4, a, b)
    return (
        ip4(a, b, l4.proto, body[:at], ident=ident, fragment=0x2000),
        ip4(a, b, l4.proto, body[at:], ident=ident, fragment=at // 8),
    )


def fragments6(src: str, dst: str, l4: L4, at: int, *, ident: int = 9) -> tuple[bytes, bytes]:
    """The same for IPv6."""
    a, b = packed(src), packed(dst)
    body = finished(l4, a, b)
    return (
        ip6(a, b, l4.proto, body[:at], extensions=[fragment6(0, True, ident)]),
        ip6(a, b, l4.proto, body[at:], extensions=[fragment6(at, False, ident)]),
    )


def wrong_checksums(frame: bytes) -> list[str]:
    """The checksums of a whole packet that are not what they should be, by name."""
    kind, packet = int.from_bytes(frame[12:14], "big"), frame[14:]
    if kind == IPV4:
        ihl = (packet[0] & 15) * 4
        wrong = ["IPv4"] if checksum(packet[:ihl]) else []
        src, dst, proto = packet[12:16], packet[16:20], packet[9]
        body = packet[ihl : int.from_bytes(packet[2:4], "big")]
    else:
        wrong, src, dst, proto, at = [], packet[8:24], packet[24:40], packet[6], 40
        while proto in (HOP_BY_HOP, ROUTING, DESTINATION, FRAGMENT):
            proto, at = packet[at], at + (8 if proto == FRAGMENT else packet[at + 1] * 8 + 8)
        body = packet[at : 40 + int.from_bytes(packet[4:6], "big")]
    covered = pseudo(src, dst, proto, len(body))
    if proto == SCTP:
        right = crc32c(body[:8] + bytes(4) + body[12:])
        return wrong + (["SCTP"] if right != int.from_bytes(body[8:12], "little") else [])
    if proto == UDP and body[6:8] == b"\0\0":
        return wrong + (["UDP6 without"] if kind == IPV6 else [])
    names = {TCP: "TCP", UDP: "UDP", ICMP: "ICMP", ICMP6: "ICMPv6"}
    right = checksum((b"" if proto == ICMP else covered) + body)
    return wrong + ([names.get(proto, "?")] if right else [])
