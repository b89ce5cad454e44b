"""Tells the kernel of this node: its addresses, its network namespace, and who is a pod to it.

Apart from the passes: where these rows can not be written, services still are.
"""

import logging
import pathlib
import typing

from lbproxy.config import config
from lbproxy.core import addresses, model, node_rows, pools, tables
from lbproxy.kernel import maps

_log = logging.getLogger(__name__)

_RETRY_S: typing.Final = 5.0
_LOCAL_PORTS: typing.Final = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range")
# What Linux has by default.
_DEFAULT_LOCAL_PORTS: typing.Final = (32768, 60999)


Known = typing.Callable[[tuple[bytes, ...]], None]


class LocalNode:
    """What is known of this node, and whether the kernel knows it too."""

    def __init__(
        self,
        settings: config.Config,
        kernel: maps.Maps,
        clock: typing.Callable[[], float],
        known: Known = lambda _addresses: None,
    ) -> None:
        """`known` is told the node's own addresses once they are settled."""
        self._kernel = kernel
        self._clock = clock
        self._primary = settings.nodeport_primary
        cidrs = [str(network) for network in settings.nodeport_addresses]
        self._cidrs = [addresses.PRIMARY] if self._primary else cidrs
        self._localhost = settings.localhost_node_ports
        self._identity = identity(settings)
        self._rules = packet_rules(settings)
        self._known = known
        self._found: tuple[tuple[bytes, ...], int] | None = None
        self._written: node_rows.NodeFacts | None = None
        self._full = ""
        self._nowhere = ""
        self._failure = ""
        self.due_s: float | None = None  # when a write that failed is tried again

    @property
    def written(self) -> bool:
        """Whether the kernel has been told."""
        return self._written is not None

    @property
    def facts(self) -> node_rows.NodeFacts | None:
        """What the kernel was told; None where it was not yet, or may have lost it."""
        return self._written

    @property
    def reasons(self) -> list[str]:
        """What is not as it should be, one line each."""
        return [reason for reason in (self._full, self._nowhere, self._failure) if reason]

    @property
    def unserved(self) -> list[str]:
        """Those of them for which it does not serve as it was configured to."""
        return [reason for reason in (self._full, self._failure) if reason]

    def found(self, local: tuple[bytes, ...], host_netns: int) -> None:
        """Take the addresses of every link, and the cookie of the node's network namespace."""
        self._found = (local, host_netns)

    def forget(self) -> None:
        """Look at the kernel's rows again with the next write."""
        self._written = None

    def write(self, node: model.Node | None, *, settled: bool) -> None:
        """Write what has changed. `settled` says that the Node is known, or is not waited for any longer."""
        if self._found is None or (self.due_s is not None and self._clock() < self.due_s):
            return
        self.due_s = None
        local, host_netns = self._found
        own, pod_cidrs = self._identity.addresses(node), node.pod_cidrs if node else ()
        facts = node_rows.NodeFacts(local, own, host_netns, pod_cidrs)
        if settled:
            self._known(own)
        if facts == self._written:
            return
        room = self._kernel.rows_of(tables.Table.NODE_ADDRESSES)
        want = node_rows.node_rows(facts, self._cidrs, self._localhost, room, self._rules)
        # Which addresses serve, and which have to go without a row, is for the Node to say.
        if not settled and (self._primary or want.dropped):
            return
        try:
            have = dict(self._kernel.rows(tables.Table.NODE_ADDRESSES))
            self._kernel.apply(node_rows.node_writes(want, have))
        except (maps.MapWriteError, OSError) as error:
            self.due_s = self._clock() + _RETRY_S
            self._failure = _said(self._failure, f"cannot write this node's addresses: {error}")
            return
        self._written = facts
        self._failure = ""
        full = pools.Exhausted(tables.Table.NODE_ADDRESSES, room) if want.dropped else ""
        self._full = _said(self._full, str(full))
        families = " and ".join(f"IPv{family.value}" for family in want.unserved)
        nowhere = (
            f"--nodeport-addresses {','.join(self._cidrs)}: no {families} address of this node is in these"
        )
        self._nowhere = _said(self._nowhere, f"{nowhere}: its NodePorts are not served" if families else "")


def _said(before: str, now: str) -> str:
    if now and now != before:
        _log.warning("%s", now)
    return now


def identity(settings: config.Config) -> node_rows.Identity:
    """The addresses that this node was configured to have."""
    bind = settings.bind_address
    return node_rows.Identity(
        None if bind is None else addresses.packed(bind), tuple(map(addresses.packed, settings.node_ips))
    )


def packet_rules(settings: config.Config, local_ports: pathlib.Path = _LOCAL_PORTS) -> node_rows.PacketRules:
    """What the packet path is configured to do; `local_ports` tells which ports sockets get by default."""
    mode = settings.detect_local_mode
    modes = config.DetectLocalMode
    cidrs: tuple[str, ...] | None = tuple(map(str, settings.cluster_cidrs))
    if mode is modes.NODE_CIDR:
        cidrs = None
    if settings.masquerade_ports is None:
        ports = node_rows.masquerade_ports(_read_range(local_ports))
    else:
        first, last = settings.masquerade_ports
        ports = node_rows.Ports(first, last - first + 1)
    return node_rows.PacketRules(
        masquerade_all=settings.masquerade_all,
        keep_client=settings.keep_client_address,
        pod_cidrs=cidrs,
        pods_by_device=mode in (modes.BRIDGE_INTERFACE, modes.INTERFACE_NAME_PREFIX),
        ports=ports,
        timeouts=settings.flow_timeouts,
    )


def _read_range(path: pathlib.Path) -> tuple[int, int]:
    try:
        first, last = map(int, path.read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return _DEFAULT_LOCAL_PORTS
    return first, last
