"""IP addresses as 16 bytes in network order, IPv4 as ::ffff:a.b.c.d, and the text they come from.

Text is read as kube-proxy reads it: leniently, leading zeros being decimal and
not octal (SEL-13), so an address that an old cluster stored keeps working.
"""

import ipaddress
import socket
import typing
from collections.abc import Iterable, Sequence

from lbproxy.core import model

IPV4_PREFIX = bytes(10) + b"\xff\xff"
IPV4_ZERO = IPV4_PREFIX + bytes(4)
IPV6_ZERO = bytes(16)

PRIMARY = "primary"

_COMPATIBLE_PREFIX = bytes(12)


def parse(text: str) -> bytes | None:
    """Parse an address; None where the text is none (a zone, a prefix, blanks, other digits, …)."""
    try:
        if ":" in text:
            return socket.inet_pton(socket.AF_INET6, text)
        return IPV4_PREFIX + socket.inet_pton(socket.AF_INET, text)
    except (OSError, ValueError):
        return _parse_with_leading_zeros(text)


def packed(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bytes:
    """Return the 16 bytes of an address."""
    return address.packed if address.version == 6 else IPV4_PREFIX + address.packed


def family_of(address: bytes) -> model.Family:
    """Return the family of an address: an IPv4-mapped one is IPv4."""
    return model.Family.IPV4 if address.startswith(IPV4_PREFIX) else model.Family.IPV6


def text(address: bytes) -> str:
    """Return the canonical text of an address (RFC 5952)."""
    if address.startswith(IPV4_PREFIX):
        return socket.inet_ntop(socket.AF_INET, address[12:])
    if address.startswith(_COMPATIBLE_PREFIX):
        # inet_ntop would write the deprecated ::a.b.c.d here.
        return str(ipaddress.IPv6Address(address))
    return socket.inet_ntop(socket.AF_INET6, address)


class Network(typing.NamedTuple):
    """A CIDR; `prefix_length` counts from the start of the 16 bytes, so an IPv4 /8 is 104."""

    base: bytes
    prefix_length: int
    family: model.Family

    def __str__(self) -> str:
        offset = 96 if self.family is model.Family.IPV4 else 0
        return f"{text(self.base)}/{self.prefix_length - offset}"

    def __contains__(self, address: object) -> bool:
        # The family is compared too: ::/0 is every IPv6 address and no IPv4 one.
        return (
            isinstance(address, bytes)
            and family_of(address) is self.family
            and _masked(address, self.prefix_length) == self.base
        )


def parse_cidr(cidr: str) -> Network | None:
    """Parse `address/length`, host bits ignored; None where the text is none."""
    host, _, length_text = cidr.partition("/")
    address = parse(host)
    # Longer than any prefix length is, and int() refuses thousands of digits with an error of its own.
    if address is None or not _is_decimal(length_text) or len(length_text) > 3:
        return None
    length = int(length_text)
    if length > (128 if ":" in host else 32):
        return None
    if ":" not in host:
        length += 96
    base = _masked(address, length)
    return Network(base, length, family_of(base))


LOOPBACK_IPV4 = Network(IPV4_PREFIX + bytes([127, 0, 0, 0]), 104, model.Family.IPV4)
_LOOPBACK_IPV6 = bytes(15) + b"\x01"


def is_loopback(address: bytes) -> bool:
    """Tell whether an address is in 127.0.0.0/8 or is ::1."""
    return address in LOOPBACK_IPV4 or address == _LOOPBACK_IPV6


_LINK_LOCAL_IPV4 = bytes([169, 254])
_MULTICAST_IPV4 = bytes([224, 0, 0])


def nobodys(address: bytes) -> str:
    """Why an address can be no service's: it means another place to each host and pod. Empty where it can."""
    if address in (IPV4_ZERO, IPV6_ZERO):
        return "unspecified"
    return "loopback" if is_loopback(address) else ""


def special(address: bytes) -> str:
    """Why the API server lets no endpoint and no external IP have an address; empty where it does.

    As its ValidateEndpointIP has it (`pkg/apis/core/validation`): of multicast, link-local alone.
    """
    ipv4 = address.startswith(IPV4_PREFIX)
    # Thousands of endpoints pass here, and next to none begins like this.
    if (address[12] not in (0, 127, 169, 224)) if ipv4 else (address[0] not in (0, 0xFE, 0xFF)):
        return ""
    if address.startswith(_LINK_LOCAL_IPV4, 12) if ipv4 else address[0] == 0xFE and address[1] & 0xC0 == 0x80:
        return "link-local"
    if address.startswith(_MULTICAST_IPV4, 12) if ipv4 else address[0] == 0xFF and address[1] & 0x0F == 0x02:
        return "link-local multicast"
    return nobodys(address)


class NodePortAddresses(typing.NamedTuple):
    """Where NodePorts are served: `addresses`, none of them loopback, and 127.0.0.0/8 if `loopback`."""

    addresses: tuple[bytes, ...]
    loopback: bool


def nodeport_addresses(
    cidrs: Sequence[str], local: Iterable[bytes], node_addresses: Sequence[bytes]
) -> NodePortAddresses:
    """Choose the local addresses that serve NodePorts (NP-3..NP-7).

    `cidrs` is kube-proxy's nodePortAddresses: empty, `["primary"]` or CIDRs, of
    which an unparseable one counts for nothing. A family without a CIDR of its own
    is unrestricted. `node_addresses` are the Node's, in its order. Whether NodePorts
    on loopback are wanted at all is the caller's setting (NP-8); ::1 never serves
    any (NP-9).
    """
    allowed = nodeport_networks(cidrs, node_addresses)
    restricted = {network.family for network in allowed}
    ipv4_allowed = [network for network in allowed if network.family is model.Family.IPV4]
    return NodePortAddresses(
        addresses=tuple(
            address
            for address in dict.fromkeys(local)
            if not is_loopback(address)
            and (family_of(address) not in restricted or any(address in network for network in allowed))
        ),
        loopback=not ipv4_allowed or any(_overlap(network, LOOPBACK_IPV4) for network in ipv4_allowed),
    )


def nodeport_networks(cidrs: Sequence[str], node_addresses: Sequence[bytes]) -> list[Network]:
    """Return what nodePortAddresses allow; a family that no network is of is unrestricted (NP-6)."""
    if PRIMARY in cidrs:
        return [_host(address) for address in primary_addresses(node_addresses)]
    return [network for cidr in cidrs if (network := parse_cidr(cidr))]


def primary_addresses(node_addresses: Sequence[bytes]) -> tuple[bytes, ...]:
    """Return a Node's first address and its first of the other family (NODE-2, NP-4).

    Loopback addresses only stand in for ones not known yet, and are left out.
    """
    first_by_family: dict[model.Family, bytes] = {}
    for address in node_addresses:
        if not is_loopback(address):
            first_by_family.setdefault(family_of(address), address)
    return tuple(first_by_family.values())


def _host(address: bytes) -> Network:
    return Network(address, 128, family_of(address))


def _overlap(one: Network, other: Network) -> bool:
    return one.base in other or other.base in one


def _masked(address: bytes, prefix_length: int) -> bytes:
    host_bits = 128 - prefix_length
    return (int.from_bytes(address, "big") >> host_bits << host_bits).to_bytes(16, "big")


def _parse_with_leading_zeros(text: str) -> bytes | None:
    """Parse what inet_pton refuses only for its leading zeros."""
    head, colon, tail = text.rpartition(":")
    if not colon:
        octets = _octets(text)
        return None if octets is None else IPV4_PREFIX + octets
    if "." in tail:
        octets = _octets(tail)
        if octets is None:
            return None
        tail = octets[:2].hex() + ":" + octets[2:].hex()
    # A group may have been empty (::) or all zeros: the first must stay empty.
    groups = [group and (group.lstrip("0") or "0") for group in f"{head}:{tail}".split(":")]
    try:
        return socket.inet_pton(socket.AF_INET6, ":".join(groups))
    except (OSError, ValueError):
        return None


def _octets(text: str) -> bytes | None:
    parts = text.split(".")
    if len(parts) != 4 or not all(_is_decimal(part) for part in parts):
        return None
    significant = [part.lstrip("0") or "0" for part in parts]
    if any(len(part) > 3 or int(part) > 255 for part in significant):
        return None
    return bytes(map(int, significant))


def _is_decimal(text: str) -> bool:
    return text.isascii() and text.isdecimal()
