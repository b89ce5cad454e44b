"""The configurations that scenarios are played with: the agent's flags, and what they mean to kube-proxy."""

import dataclasses
import typing

from tests.lab.contract import book, oracle

CIDRS = ("10.244.0.0/16", "fd00:244::/32")
LOCAL = frozenset((*book.PLACES["n1"].addresses, *book.BRIDGE.values()))
# A client that has a source port again soon is not to meet a flow of the variant before.
COMMON = ("--conntrack-udp-timeout", "1s")
POD_DEVICES = ("--pod-device", "pod*")
PLAIN = oracle.Config(node="n1", local=LOCAL, cluster_cidrs=CIDRS)
BY_CIDR = ("--cluster-cidr", ",".join(CIDRS))


@dataclasses.dataclass(frozen=True)
class Variant:
    """One start of the agent."""

    name: str
    flags: tuple[str, ...]
    config: oracle.Config = PLAIN
    zone: str = "a"
    clients: tuple[book.Client, ...] = book.CLIENTS

    def node(self) -> book.Object:
        """Write the Node object of n1."""
        return {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": "n1", "labels": {oracle.ZONE: self.zone} if self.zone else {}},
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:244:1::/64"]},
            "status": {
                "addresses": [{"type": "InternalIP", "address": one} for one in book.PLACES["n1"].addresses]
            },
        }


def _variant(
    name: str,
    *flags: str,
    zone: str = "a",
    cidrs: bool = True,
    pod_devices: bool = True,
    **config: typing.Any,
) -> Variant:
    all_flags = (*COMMON, *(POD_DEVICES if pod_devices else ()), *(BY_CIDR if cidrs else ()), *flags)
    if not cidrs:
        config.setdefault("cluster_cidrs", ())
    clients = tuple(one for one in book.CLIENTS if pod_devices or one is not book.PACKET_POD)
    return Variant(name, all_flags, dataclasses.replace(PLAIN, **config), zone, clients)


VARIANTS = {
    one.name: one
    for one in (
        _variant("plain"),
        _variant("no-pod-devices", pod_devices=False),
        _variant("no-detector", cidrs=False),
        _variant("v4-detector", "--cluster-cidr", CIDRS[0], cidrs=False, cluster_cidrs=CIDRS[:1]),
        _variant("nodecidr", "--detect-local-mode", "NodeCIDR", detect="NodeCIDR"),
        _variant(
            "bridge",
            "--detect-local-mode", "BridgeInterface", "--pod-bridge-interface", "cni0",
            detect="BridgeInterface", bridge="cni0",
        ),
        _variant(
            "prefix",
            "--detect-local-mode", "InterfaceNamePrefix", "--pod-interface-name-prefix", "cni",
            detect="InterfaceNamePrefix", prefix="cni",
        ),
        _variant("masquerade-all", "--masquerade-all", masquerade_all=True),
        _variant("no-zone", zone=""),
        _variant("maglev", "--algorithm", "maglev"),
        _variant("xdp", "--xdp", "generic"),
        _variant("no-external-ips", "--feature-gates", "AllowServiceExternalIPs=false", external_ips=False),
        _variant("no-localhost", "--iptables-localhost-nodeports=false", localhost=False),
        _variant(
            "nodeport-addresses",
            "--nodeport-addresses", "172.18.0.0/24,fd00:244::/32",
            nodeport_addresses=("172.18.0.0/24", "fd00:244::/32"),
        ),
        _variant(
            "nodeport-other-family",
            "--nodeport-addresses", "10.244.0.0/16",
            nodeport_addresses=("10.244.0.0/16",),
        ),
        _variant("nodeport-primary", "--nodeport-addresses", "primary", nodeport_addresses=("primary",)),
        _variant("nftables", "--proxy-mode", "nftables", nftables=True),
    )
}  # fmt: skip
