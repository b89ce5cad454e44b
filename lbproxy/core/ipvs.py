"""What kube-proxy's IPVS mode means for a migration, and what to do about it. Pure.

IPVS translates by itself, from the same virtual servers for as long as a connection lasts: so
nothing can keep its connections alive when these go, as table inet lbproxy-handover does for rules.
"""

import typing
from collections.abc import Collection

import msgspec

from lbproxy.core import addresses, migration, model, node_rows, wording

_NAMED: typing.Final = 5  # of others' virtual servers
FIRST = (
    "have kube-proxy run in iptables mode first (its setting mode: iptables; in nftables mode it removes the "
    "virtual servers when it starts, and all of that breaks), so that none is added, and wait until lbproxy "
    "migrate status counts none; or drain this node"
)


class Server(typing.NamedTuple):
    """A virtual server, by address (16 bytes), port and protocol, or by a mark of packets (not 0)."""

    proto: int
    address: bytes
    port: int
    mark: int = 0

    def __str__(self) -> str:
        if self.mark:
            return f"mark {self.mark}"
        host = addresses.text(self.address)
        at = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        return f"{at}/{model.Protocol(self.proto).name}" if self.proto in tuple(model.Protocol) else at

    def is_kube_proxys(self, on_device: Collection[bytes], on_node: Collection[bytes]) -> bool:
        """Judge by its address: one of kube-proxy's device, or one of the node, which then is a NodePort's.

        Others have some too, such as keepalived, and kube-proxy leaves those alone that it is told to
        (--ipvs-exclude-cidrs).
        """
        if self.mark:
            return False
        first, last = node_rows.NODE_PORTS
        return self.address in on_device or (self.address in on_node and first <= self.port <= last)


class Found(msgspec.Struct, frozen=True):
    """kube-proxy's virtual servers, and what goes on through them, by protocol; and whose else there are."""

    servers: int = 0
    connections: dict[str, int] = {}
    problem: str = ""  # why they could not be asked for
    others: tuple[str, ...] = ()  # which are somebody else's, and stay

    @property
    def in_use(self) -> bool:
        """Whether anything breaks when they go, as far as is known."""
        return bool(self.problem or any(self.connections.values()))


def described(found: Found) -> str:
    """How it is, for people."""
    if found.problem:
        return f"its virtual servers could not be asked for: {found.problem}"
    said = f"{found.servers} virtual servers; going on through them: {migration.counted(found.connections)}"
    return f"{said}; {others(found.others)}" if found.others else said


def others(named: Collection[str]) -> str:
    """Say which virtual servers are left alone."""
    return f"not kube-proxy's, by their addresses and ports, and left alone: {wording.few(named, _NAMED)}"


def obstacle(found: Found | None) -> str:
    """Why its virtual servers are not to be removed now; empty where they may be."""
    if found is None or not found.in_use:
        return ""
    return f"kube-proxy ran in IPVS mode, {described(found)}; that breaks when they are removed: {FIRST}"
