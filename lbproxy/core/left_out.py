"""Why backends of a service are not among those that a connection may go to: told by their rows."""

import typing

import msgspec

from lbproxy.core import addresses, inventory, listing, tables


class LeftOut(msgspec.Struct, frozen=True):
    """A backend that is known and not chosen, and why."""

    ip: str
    port: int
    node: str
    zone: str
    state: str
    why: str


_BY_STATE: typing.Final = {
    tables.BackendState.TERMINATING: "it is ending, and others are ready",
    tables.BackendState.UNREADY: "its endpoint is not ready",
    tables.BackendState.DRAINING: "it is gone from its EndpointSlice",
    tables.BackendState.SERVING: "its endpoint is not ready; what it has it keeps",
}


def left_out(
    known: typing.Iterable[inventory.Backend], chosen: typing.Container[int], backend_set: int
) -> tuple[LeftOut, ...]:
    """The backends whose ids are not among `chosen`, in order; `backend_set` is what is drawn from."""
    every = tuple(known)
    drawn = [one for one in every if one.sets & backend_set]
    return tuple(
        LeftOut(
            addresses.text(one.address),
            one.port,
            one.node,
            one.zone,
            listing.state_of(one),
            _why(one, backend_set, drawn),
        )
        for one in sorted(every, key=lambda one: (one.address, one.port))
        if one.id not in chosen
    )


def _why(backend: inventory.Backend, backend_set: int, drawn: typing.Sequence[inventory.Backend]) -> str:
    """The reason, or those there may be where a row does not tell; `drawn` are drawn from."""
    if backend.state in _BY_STATE:
        return _BY_STATE[backend.state]
    if backend_set == tables.BackendSet.LOCAL and not backend.sets & tables.BackendSet.HERE:
        return "it is on another node, and the policy is Local"
    if backend.health:
        return f"it is unhealthy: {', '.join(listing.health_names(backend.health))}"
    if backend.sets & backend_set:
        return "no slot leads to it yet" if backend.weight else "its weight is 0"
    sets = tables.BackendSet
    if backend_set == sets.CLUSTER and backend.sets & sets.NOT_HINTED:
        return "topology hints give it to others"
    if backend.sets & sets.NO_WEIGHT:
        return "its weight is 0"
    if backend.sets & sets.ZONE_KEEPS:
        zone = next((one.zone for one in drawn), "")
        return f"{zone} keeps its own flows: lbproxy.io/zone-spill-over"
    if not drawn:
        return "it is in no set that is drawn from"
    # An agent of an earlier version has written the row.
    return "its weight is 0, lbproxy.io/zone-spill-over keeps flows in their zone, or hints give it to others"
