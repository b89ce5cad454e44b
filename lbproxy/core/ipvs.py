"""What kube-proxy's IPVS mode means for a migration, and what to do about it. Pure.

IPVS translates by itself, from the same virtual servers for as long as a connection lasts: so
nothing can keep its connections alive when these go, as table inet lbproxy-handover does for rules.
"""

import msgspec

from lbproxy.core import migration

FIRST = (
    "have kube-proxy run in iptables mode first (its setting mode: iptables; in nftables mode it removes the "
    "virtual servers when it starts, and all of that breaks), so that none is added, and wait until lbproxy "
    "migrate status counts none; or drain this node"
)


class Found(msgspec.Struct, frozen=True):
    """The virtual servers of a node with kube-proxy's device, and what goes on through them, by protocol."""

    servers: int = 0
    connections: dict[str, int] = {}
    problem: str = ""  # why they could not be asked for

    @property
    def in_use(self) -> bool:
        """Whether anything breaks when they go, as far as is known."""
        return bool(self.problem or any(self.connections.values()))


def described(found: Found) -> str:
    """How it is, for people."""
    if found.problem:
        return f"its virtual servers could not be asked for: {found.problem}"
    return f"{found.servers} virtual servers; going on through them: {migration.counted(found.connections)}"


def obstacle(found: Found | None) -> str:
    """Why its virtual servers are not to be removed now; empty where they may be."""
    if found is None or not found.in_use:
        return ""
    return f"kube-proxy ran in IPVS mode, {described(found)}; that breaks when they are removed: {FIRST}"
