"""Tables of iptables-legacy, as the kernel tells them: written here entry by entry."""

import socket
import struct

import pytest

from lbproxy.kernel import legacy_tables
from lbproxy.kernel.legacy_tables import Jump

MATCHES = {socket.AF_INET: 112, socket.AF_INET6: 168}  # where an entry's matches begin
RETURN = -5


def entry(family: socket.AddressFamily, target: str, given: bytes, matches: bytes = b"") -> bytes:
    """An entry (ipt_entry, ip6t_entry) with its target."""
    at = MATCHES[family] + len(matches)
    size = at + 32 + len(given)
    offsets = struct.pack("=HH", at, size)
    head = bytes(88 if family == socket.AF_INET else 140) + offsets
    return head.ljust(MATCHES[family], b"\0") + matches + struct.pack("=H29sx", 32, target.encode()) + given


def verdict(family: socket.AddressFamily, number: int, matches: bytes = b"") -> bytes:
    return entry(family, "", struct.pack("=i4x", number), matches)


def head(family: socket.AddressFamily, chain: str) -> bytes:
    return entry(family, "ERROR", struct.pack("=30s2x", chain.encode()))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_chains_and_what_leads_to_them(family: socket.AddressFamily) -> None:
    rule, with_match = len(verdict(family, 0)), len(verdict(family, 0, bytes(24)))
    chain = len(head(family, ""))
    services = with_match + rule + rule + chain  # where its rules begin
    service = services + rule + rule + rule + chain
    entries = [
        verdict(family, services, b"\0KUBE-PROXY-CANARY\0".ljust(24, b"\0")),  # a comment, say
        verdict(family, -2),  # the policy of PREROUTING
        verdict(family, -2),  # OUTPUT
        head(family, "KUBE-SERVICES"),
        verdict(family, service),
        verdict(family, services + rule + rule),  # no target: on to the next rule
        verdict(family, RETURN),
        head(family, "KUBE-SVC-NPX46M4PTMTKRN6Y"),
        entry(family, "DNAT", bytes(16)),
        verdict(family, RETURN),
        head(family, "ERROR"),
    ]
    begins = {0: "PREROUTING", with_match + rule: "OUTPUT"}
    assert legacy_tables.decoded(family, b"".join(entries), begins) == (
        {"PREROUTING": True, "OUTPUT": True, "KUBE-SERVICES": False, "KUBE-SVC-NPX46M4PTMTKRN6Y": False},
        [
            Jump("PREROUTING", 0, "KUBE-SERVICES"),
            Jump("KUBE-SERVICES", services, "KUBE-SVC-NPX46M4PTMTKRN6Y"),
        ],
    )


def test_what_is_cut_short_has_an_end() -> None:
    whole = head(socket.AF_INET, "KUBE-SERVICES") + bytes(200)
    assert legacy_tables.decoded(socket.AF_INET, whole, {}) == ({"KUBE-SERVICES": False}, [])
    assert legacy_tables.decoded(socket.AF_INET, b"", {}) == ({}, [])
