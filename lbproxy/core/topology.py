"""Which endpoints of a service port this node may use: duplicates, terminating pods, policies, hints."""

import typing
from collections.abc import Callable, Iterable, Sequence

from lbproxy.core import model, tables

# As plain integers: a flag's operators cost half a microsecond each.
CLUSTER = tables.BackendSet.CLUSTER.value
LOCAL = tables.BackendSet.LOCAL.value


class Place(typing.NamedTuple):
    """Where an endpoint answers; the identity under which endpoints of several slices merge (ES-7)."""

    address: bytes
    port: int


class Usable(typing.NamedTuple):
    """For each endpoint, in order, the sets it is in (CLUSTER, LOCAL or both, or 0).

    `has_any` tells that some node has an endpoint to use: an empty set then means
    to drop, and to refuse where there is none anywhere (EP-8, REJ-1, REJ-4); `hinted`
    that hints have narrowed the Cluster set.
    """

    sets: tuple[int, ...]
    has_any: bool
    hinted: bool = False


def merge(
    slices: Iterable[model.EndpointSlice], port_name: str, protocol: model.Protocol, family: model.Family
) -> dict[Place, model.Endpoint]:
    """Collect the endpoints of a service port (ES-2..ES-9).

    Of duplicates, a later entry replaces an earlier one unless it is terminating.
    The result depends on the order of `slices`; give them in an order of their own.
    """
    merged: dict[Place, model.Endpoint] = {}
    for slice_ in slices:
        if slice_.family is not family:
            continue
        for port in slice_.ports:
            if port.name != port_name or port.protocol is not protocol:
                continue
            for endpoint in slice_.endpoints:
                place = Place(endpoint.address, port.port)
                if not endpoint.terminating or place not in merged:
                    merged[place] = endpoint
    return merged


def usable(endpoints: Sequence[model.Endpoint], node_name: str, zone: str, *, hinted: bool = True) -> Usable:
    """Choose the endpoints each traffic policy may use on this node.

    Cluster and Local fall back to serving-and-terminating endpoints separately
    (KEP-1669): a node whose last local pod is shutting down keeps answering Local
    traffic while Cluster traffic has already moved. Hints narrow the Cluster set
    only, and only while some endpoint is ready (TOP-7, TOP-8); not at all unless `hinted`.
    """
    # A start comes by every endpoint of the cluster: nothing is called that need not be.
    ready = [endpoint for endpoint in endpoints if endpoint.ready]
    any_ready = bool(ready)
    local_ready = bool(node_name) and node_name in [endpoint.location.node_name for endpoint in ready]
    level = _hinted_level(ready, node_name, zone) if hinted else None
    any_draining = False
    sets = []
    for endpoint in endpoints:
        draining = not endpoint.ready and is_draining(endpoint)
        any_draining |= draining
        in_cluster = endpoint.ready if any_ready else draining
        if in_cluster and level is not None:
            in_cluster = level(endpoint, node_name, zone)
        bits = CLUSTER if in_cluster else 0
        if (
            endpoint.location.node_name == node_name
            and node_name
            and (endpoint.ready if local_ready else draining)
        ):
            bits |= LOCAL
        sets.append(bits)
    return Usable(tuple(sets), any_ready or any_draining, level is not None)


def is_draining(endpoint: model.Endpoint) -> bool:
    """Whether an endpoint still serves while it shuts down; a ready one is simply ready (EP-3, EP-7)."""
    return endpoint.serving and endpoint.terminating and not endpoint.ready


def is_going(endpoint: model.Endpoint) -> bool:
    """Whether an endpoint shuts down, so that nobody counts on it any more."""
    return endpoint.terminating and not endpoint.ready


def _hinted_level(
    ready: Sequence[model.Endpoint], node_name: str, zone: str
) -> Callable[[model.Endpoint, str, str], bool] | None:
    """Return the test for the hints that apply, node before zone; None where none do (TOP-2..TOP-5).

    One ready endpoint without a hint of a level switches that level off.
    """
    if not ready or not (ready[0].location.node_hints or ready[0].location.zone_hints):
        return None
    if all(endpoint.location.node_hints for endpoint in ready) and any(
        _hinted_for_node(endpoint, node_name, zone) for endpoint in ready
    ):
        return _hinted_for_node
    if all(endpoint.location.zone_hints for endpoint in ready) and any(
        _hinted_for_zone(endpoint, node_name, zone) for endpoint in ready
    ):
        return _hinted_for_zone
    return None


def _hinted_for_node(endpoint: model.Endpoint, node_name: str, _zone: str) -> bool:
    return bool(node_name) and node_name in endpoint.location.node_hints


def _hinted_for_zone(endpoint: model.Endpoint, _node_name: str, zone: str) -> bool:
    return bool(zone) and zone in endpoint.location.zone_hints
