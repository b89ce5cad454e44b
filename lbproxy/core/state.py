"""The cluster as the events so far tell it, and which services an event concerns.

Slices are kept whether or not their Service is known (ES-10), under the Service
that they name now (ES-15). An event costs in proportion to its own object and
its service, never to the cluster; only a change of this node's zone concerns
every service (TOP-6), and one of its addresses those with source ranges (SR-5).
"""

import typing
from collections.abc import Iterator, Set

from lbproxy.core import events, model

NOTHING: Set[model.ServiceName] = frozenset()


class Counts(typing.NamedTuple):
    """How much is known. Endpoints are counted once a slice, whether or not their Service is known."""

    services: int
    slices: int
    ready: int
    terminating: int  # serving and terminating
    unready: int


class ClusterState:
    """Events folded into Services, EndpointSlices and this node."""

    def __init__(self, node_name: str) -> None:
        self.node_name = node_name
        self._services: dict[model.ServiceName, model.Service] = {}
        self._slices: dict[events.ObjectName, model.EndpointSlice] = {}
        # Nearly all have one: a tuple around each would be half a megabyte with 10,000 Services.
        self._slices_of: dict[model.ServiceName, model.EndpointSlice | tuple[model.EndpointSlice, ...]] = {}
        self._node: model.Node | None = None
        self._synced: set[events.Kind] = set()

    @property
    def synced(self) -> bool:
        """Whether the first complete lists of Services and EndpointSlices have arrived (SYNC-1)."""
        return {events.Kind.SERVICE, events.Kind.ENDPOINT_SLICE} <= self._synced

    @property
    def node(self) -> model.Node | None:
        """Our own Node as last seen; None if it never was. It outlives its deletion (HZ-2, NODE-7)."""
        return self._node

    @property
    def without_node(self) -> bool:
        """Whether a complete list of Nodes has arrived that never had ours."""
        return self._node is None and events.Kind.NODE in self._synced

    @property
    def zone(self) -> str:
        """Our node's zone; empty where unknown."""
        return self._node.zone if self._node else ""

    def apply(self, event: events.Event) -> Set[model.ServiceName]:
        """Fold an event in and return the known Services whose plan it may change, or that it removed."""
        match event:
            case events.Upsert(events.Kind.SERVICE, name, model.Service() as service):
                return self._put_service(model.ServiceName(*name), service)
            case events.Upsert(events.Kind.ENDPOINT_SLICE, name, model.EndpointSlice() as slice_):
                return self._put_slice(name, slice_)
            case events.Upsert(events.Kind.NODE, _, model.Node() as node):
                return self._put_node(node)
            case events.Upsert(events.Kind.SERVICE, name) | events.Delete(events.Kind.SERVICE, name):
                return self._remove_service(model.ServiceName(*name))
            case events.Upsert(events.Kind.ENDPOINT_SLICE, name) | events.Delete(
                events.Kind.ENDPOINT_SLICE, name
            ):
                return self._remove_slice(name)
            case events.Synced(kind):
                self._synced.add(kind)
        # What remains: a rejected object keeps its last good version, a deleted Node its last state.
        return NOTHING

    def service(self, name: model.ServiceName) -> model.Service | None:
        """Return a Service if it is known and to be balanced."""
        return self._services.get(name)

    def slices(self, name: model.ServiceName) -> tuple[model.EndpointSlice, ...]:
        """Return the slices that name a Service, in no particular order."""
        filed = self._slices_of.get(name, ())
        return filed if isinstance(filed, tuple) else (filed,)

    def services(self) -> Iterator[model.Service]:
        """Iterate over the Services that are to be balanced."""
        return iter(self._services.values())

    def endpoint_slices(self) -> Iterator[model.EndpointSlice]:
        """Iterate over all slices, those of unknown Services included."""
        return iter(self._slices.values())

    def counts(self) -> Counts:
        """Count what is known; takes time in proportion to the number of endpoints."""
        ready = terminating = total = 0
        for slice_ in self._slices.values():
            total += len(slice_.endpoints)
            for endpoint in slice_.endpoints:
                if endpoint.ready:
                    ready += 1
                elif endpoint.serving and endpoint.terminating:
                    terminating += 1
        unready = total - ready - terminating
        return Counts(len(self._services), len(self._slices), ready, terminating, unready)

    def _put_service(self, name: model.ServiceName, service: model.Service) -> Set[model.ServiceName]:
        if self._services.get(name) == service:
            return NOTHING
        # The value's own name serves as the key: one object less a Service.
        self._services.pop(name, None)
        self._services[service.name] = service
        return {service.name}

    def _remove_service(self, name: model.ServiceName) -> Set[model.ServiceName]:
        return NOTHING if self._services.pop(name, None) is None else {name}

    def _put_slice(self, name: events.ObjectName, slice_: model.EndpointSlice) -> Set[model.ServiceName]:
        old = self._slices.get(name)
        self._slices[name] = slice_
        if old is None:
            self._file(slice_)
            return self._known(slice_.service)
        if old.service != slice_.service:
            self._unfile(old)
            self._file(slice_)
            return self._known(old.service) | self._known(slice_.service)
        self._refile(slice_)
        return NOTHING if _same_endpoints(old, slice_) else self._known(slice_.service)

    def _remove_slice(self, name: events.ObjectName) -> Set[model.ServiceName]:
        old = self._slices.pop(name, None)
        if old is None:
            return NOTHING
        self._unfile(old)
        return self._known(old.service)

    def _file(self, slice_: model.EndpointSlice) -> None:
        self._set_slices(slice_.service, (*self.slices(slice_.service), slice_))

    def _refile(self, slice_: model.EndpointSlice) -> None:
        filed = self.slices(slice_.service)
        self._set_slices(
            slice_.service, tuple(slice_ if other.name == slice_.name else other for other in filed)
        )

    def _unfile(self, slice_: model.EndpointSlice) -> None:
        filed = self.slices(slice_.service)
        self._set_slices(slice_.service, tuple(other for other in filed if other.name != slice_.name))

    def _set_slices(self, name: model.ServiceName, filed: tuple[model.EndpointSlice, ...]) -> None:
        if filed:
            self._slices_of[name] = filed if len(filed) > 1 else filed[0]
        else:
            self._slices_of.pop(name, None)

    def _known(self, name: model.ServiceName) -> Set[model.ServiceName]:
        return {name} if name in self._services else NOTHING

    def _put_node(self, node: model.Node) -> Set[model.ServiceName]:
        if node.name != self.node_name:
            return NOTHING
        before, self._node = self._node, node
        if node.zone != (before.zone if before else ""):
            return set(self._services)
        if before is None or node.addresses != before.addresses:
            # SR-5 looks at the node's addresses, and nothing else does.
            return {name for name, service in self._services.items() if service.source_ranges}
        return NOTHING


def _same_endpoints(one: model.EndpointSlice, other: model.EndpointSlice) -> bool:
    """Whether two slices say the same, but for the time at which they say it."""
    return one.endpoints == other.endpoints and one.ports == other.ports and one.family is other.family
