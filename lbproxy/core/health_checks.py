"""Health check node ports: where cloud load balancers ask whether this node has endpoints of a Service.

Only Services of type LoadBalancer with externalTrafficPolicy Local have one
(HC-1); `model.Service.health_check_node_port` is 0 for all others.
"""

import json
import typing
from collections.abc import Iterable, Sequence

from lbproxy.core import addresses, healthz, model, state, topology

WEIGHT_HEADER: typing.Final = "X-Load-Balancing-Endpoint-Weight"


class Listener(typing.NamedTuple):
    """Where to listen; an address of zeros is every address of its family."""

    address: bytes
    port: int


class Check(typing.NamedTuple):
    """What to say of a Service: its ready endpoints on this node, by the families that it has."""

    port: int
    local: dict[model.Family, int]


class Wanted(typing.NamedTuple):
    """Which Service is asked at which listener, and whose listener another Service has already."""

    listeners: dict[Listener, model.ServiceName]
    refused: dict[model.ServiceName, Listener]


class Checks:
    """The checks of all Services that have one, kept up as Services change."""

    def __init__(self) -> None:
        self.by_service: dict[model.ServiceName, Check] = {}

    def look(self, cluster: state.ClusterState, names: Iterable[model.ServiceName]) -> bool:
        """Look at these Services again; returns whether anything is other than before."""
        changed = False
        for name in names:
            before = self.by_service.get(name)
            now = check(cluster, name)
            if now == before:
                continue
            changed = True
            if now is None:
                del self.by_service[name]
            else:
                self.by_service[name] = now
        return changed

    def wanted(self, places: typing.Mapping[model.Family, Sequence[bytes]]) -> Wanted:
        """Say where to listen; of two Services that claim one port, the first by name has it."""
        wanted = Wanted({}, {})
        for name, of_service in sorted(self.by_service.items()):
            for family in of_service.local:
                for address in places.get(family, ()):
                    listener = Listener(address, of_service.port)
                    if wanted.listeners.setdefault(listener, name) != name:
                        wanted.refused.setdefault(name, listener)
        return wanted


def check(cluster: state.ClusterState, name: model.ServiceName) -> Check | None:
    """Return a Service's check; None where it has none."""
    service = cluster.service(name)
    if service is None or not service.health_check_node_port:
        return None
    slices = cluster.slices(name)
    return Check(
        service.health_check_node_port,
        {
            family: _local_ready(slices, family, cluster.node_name)
            for family in map(addresses.family_of, service.cluster_ips)
        },
    )


def _local_ready(slices: Iterable[model.EndpointSlice], family: model.Family, node_name: str) -> int:
    """Count distinct addresses; an endpoint that is shutting down is not ready, whatever it still serves."""
    ordered = sorted(slices, key=lambda slice_: (slice_.namespace, slice_.name))
    ports = {(port.name, port.protocol) for slice_ in ordered for port in slice_.ports}
    found = set()
    for port_name, protocol in ports:
        merged = topology.merge(ordered, port_name, protocol, family)
        found |= {
            place.address
            for place, endpoint in merged.items()
            if endpoint.ready and endpoint.location.node_name == node_name
        }
    return len(found)


def places(
    cidrs: Sequence[str], local: Iterable[bytes], node_addresses: Sequence[bytes]
) -> dict[model.Family, tuple[bytes, ...]]:
    """Choose what to listen on in each family: every address, or those that nodePortAddresses match (HC-2).

    The arguments are those of `addresses.nodeport_addresses`.
    """
    allowed = addresses.nodeport_networks(cidrs, node_addresses)
    found: dict[model.Family, tuple[bytes, ...]] = {}
    for family, zero in ((model.Family.IPV4, addresses.IPV4_ZERO), (model.Family.IPV6, addresses.IPV6_ZERO)):
        networks = [network for network in allowed if network.family is family]
        if not networks or any(network.base == zero and not _bits(network) for network in networks):
            found[family] = (zero,)
        else:
            matching = (one for one in local if any(one in network for network in networks))
            # Where a link-local address is needs an interface, too: no load balancer could ask there.
            found[family] = tuple(dict.fromkeys(one for one in matching if not _is_link_local(one)))
    return found


def answer(name: model.ServiceName, local: int, *, healthy: bool) -> tuple[healthz.Answer, dict[str, str]]:
    """Answer a request, to the byte as kube-proxy does (HC-3, HC-5, HC-6); with the headers of its own."""
    body = {
        "service": {"namespace": name.namespace, "name": name.name},
        "localEndpoints": local,
        "serviceProxyHealthy": healthy,
    }
    status = 200 if local and healthy else 503
    return healthz.Answer(status, json.dumps(body, indent="\t").encode()), {WEIGHT_HEADER: str(local)}


def _bits(network: addresses.Network) -> int:
    return network.prefix_length - (96 if network.family is model.Family.IPV4 else 0)


def _is_link_local(address: bytes) -> bool:
    return address[0] == 0xFE and address[1] & 0xC0 == 0x80
