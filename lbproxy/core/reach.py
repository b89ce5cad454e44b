"""Which addresses probes may be sent to: they come from the host's network, which pods' policies do not bind.

Else whoever may write EndpointSlices could have the agent talk to what listens on this
node alone, or to what a cloud tells its nodes and not their pods.
"""

import typing

from lbproxy.core import addresses

_NETWORKS: typing.Final = (
    # Loopback, link-local (most clouds' metadata) and multicast: Kubernetes allows no endpoint there.
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "224.0.0.0/4",
    "::/124",
    "fe80::/10",
    "ff00::/8",
    # Metadata that is not link-local: of Oracle, Alibaba and Azure; of AWS (Nitro) and Google by IPv6.
    "192.0.0.0/24",
    "100.100.100.200/32",
    "168.63.129.16/32",
    "fd00:ec2::/32",
    "fd20:ce::/64",
)
_FORBIDDEN: typing.Final = tuple(
    network for network in map(addresses.parse_cidr, _NETWORKS) if network is not None
)
# What a NAT64 takes for an IPv4 address (RFC 6052).
_TRANSLATED: typing.Final = bytes.fromhex("0064ff9b") + bytes(8)


NEVER: typing.Final = "loopback, link-local, multicast and metadata addresses are never probed"
OWN: typing.Final = "an address of this node's own is probed only where the endpoint's nodeName is this node"


def forbids(address: bytes, own: typing.Container[bytes] = (), *, here: bool = False) -> str:
    """Why no probe may be sent to an address; empty where one may. `own` are those of this node's devices.

    To one of its own only where the endpoint is said to be `here`, as a pod of the host's
    network is.
    """
    if address.startswith(_TRANSLATED):
        address = addresses.IPV4_PREFIX + address[12:]
    if any(address in network for network in _FORBIDDEN):
        return NEVER
    return "" if here or address not in own else OWN
