"""Follows this node's own Node: tells what changes of it, and ends the agent where it can not go on so.

Pods are told from others by the Node's podCIDRs in NodeCIDR mode. They are waited
for, and another agent has to start where they change (NODE-6): flows that are
masqueraded or not by the old ones go on meanwhile, as the kernel has them.
"""

import asyncio
import logging
import pathlib
import typing
from collections.abc import Iterable

from lbproxy import errors, local_node
from lbproxy.config import config
from lbproxy.core import addresses, events, model

POD_CIDRS_WAIT_S: typing.Final = 300.0

_log = logging.getLogger(__name__)


def has_both_families(proc: pathlib.Path = pathlib.Path("/proc")) -> bool:
    """Whether this host can do IPv6 besides IPv4 (DS-1)."""
    try:
        disabled = (proc / "sys/net/ipv6/conf/all/disable_ipv6").read_text().strip() == "1"
    except OSError:
        return False
    return not disabled and (proc / "net/if_inet6").exists()


def no_such_node(name: str) -> str:
    """What to say where the API server knows no Node of that name."""
    return f'no Node is called "{name}": see --node-name'


class NodeWatch:
    """Takes every event, and heeds those of this node."""

    def __init__(self, settings: config.Config, *, both_families: bool) -> None:
        self._name = settings.node_name
        self._by_nothing = (
            settings.detect_local_mode is config.DetectLocalMode.CLUSTER_CIDR and not settings.cluster_cidrs
        )
        self._by_pod_cidrs = settings.detect_local_mode is config.DetectLocalMode.NODE_CIDR
        self._cluster_cidrs = [str(cidr) for cidr in settings.cluster_cidrs]
        self._identity = local_node.identity(settings)
        self._both_families = both_families
        self._node: model.Node | None = None
        self._may_be_missing = settings.manifests is not None
        self._told_missing = False
        self._changed = asyncio.Event()

    def take(self, batch: Iterable[events.Event]) -> None:
        """Note what a batch says of this node."""
        for event in batch:
            match event:
                case events.Upsert(events.Kind.NODE, _, model.Node() as node) if node.name == self._name:
                    self._tell(self._node, node)
                    self._node = node
                    self._changed.set()
                case events.Delete(events.Kind.NODE, name) if name.name == self._name:
                    _log.error("Node %s was deleted: going on with what was known of it", self._name)
                case events.Synced(events.Kind.NODE) if self._node is None and not self._may_be_missing:
                    if not self._told_missing:
                        _log.warning("%s", no_such_node(self._name))
                    self._told_missing = True

    async def run(self) -> None:
        """Check what has to fit; returns once nothing is left to check. Raises AgentError."""
        if self._by_nothing:
            _log.warning(
                "ClusterCIDR mode, but no --cluster-cidr: "
                "pods can not be told from clients outside the cluster"
            )
        if not self._by_pod_cidrs:
            while self._node is None:
                await self._change()
            self._check("clusterCIDR", self._cluster_cidrs)
            return
        node = await self._with_pod_cidrs()
        first = node.pod_cidrs
        self._check("podCIDRs", first)
        while node.pod_cidrs == first:
            await self._change()
            node = self._node or node
        raise errors.AgentError(
            f"the podCIDRs of Node {self._name} have changed from {_list(first)} to "
            f"{_list(node.pod_cidrs)}: ending, to be started again with them"
        )

    async def _with_pod_cidrs(self) -> model.Node:
        try:
            async with asyncio.timeout(POD_CIDRS_WAIT_S):
                while (node := self._node) is None or not node.pod_cidrs:
                    await self._change()
        except TimeoutError:
            raise errors.AgentError(
                f"Node {self._name} has had no podCIDRs for {POD_CIDRS_WAIT_S:.0f} s, which NodeCIDR mode "
                "needs: let the controller manager assign them, or choose another --detect-local-mode"
            ) from None
        return node

    async def _change(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def _check(self, field: str, cidrs: Iterable[str]) -> None:
        """Compare the family of CIDRs that tell pods with the node's first one (DS-4)."""
        families = {network.family for cidr in cidrs if (network := addresses.parse_cidr(cidr))}
        own = self._identity.addresses(self._node)
        first = addresses.family_of(own[0]) if own else model.Family.IPV4
        if not families:
            return
        if first in families:
            for other in sorted({addresses.family_of(address) for address in own} - families):
                _log.warning(
                    "%s has no IPv%d CIDR: IPv%d pods can not be told from clients outside the cluster",
                    field,
                    other.value,
                    other.value,
                )
            return
        problem = f"{field} has no IPv{first.value} CIDR, and IPv{first.value} is the family of this node"
        if not self._both_families:
            raise errors.AgentError(problem)
        _log.error("%s: no IPv%d client is known to be a pod", problem, first.value)

    def _tell(self, before: model.Node | None, now: model.Node) -> None:
        if before is None:
            _log.info("Node %s: addresses %s, zone %r", now.name, _addresses(now), now.zone)
        elif before.addresses != now.addresses:
            _log.warning(
                "the addresses of Node %s have changed from %s to %s",
                now.name,
                _addresses(before),
                _addresses(now),
            )


def _addresses(node: model.Node) -> str:
    return _list(map(addresses.text, node.addresses))


def _list(items: Iterable[str]) -> str:
    return ", ".join(items) or "none"
