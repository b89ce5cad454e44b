"""Who a client is, by its address: a socket of this node, or somebody whose packets come in."""

import typing

from lbproxy.core import addresses, inventory, model, tables, walk

CLIENTS: typing.Final = {
    walk.Client.POD: "a process in a pod on this node",
    walk.Client.NODE: "a process in the node's own network namespace",
    walk.Client.OUTSIDE: "a sender outside this node",
}


def pod_network(settings: tables.Settings, family: model.Family) -> addresses.Network | None:
    """The network whose addresses are pods' (DET-1, DET-2); None where no network tells them."""
    if family is model.Family.IPV4:
        flag, base, mask = tables.Setting.PODS_BY_IPV4, settings.pods4_addr, settings.pods4_mask
    else:
        flag, base, mask = tables.Setting.PODS_BY_IPV6, settings.pods6_addr, settings.pods6_mask
    if not settings.flags & flag:
        return None
    return addresses.Network(base, int.from_bytes(mask, "big").bit_count(), family)


def classify(way: walk.Walk, source: str) -> walk.Sender:
    """Say who `source` is, a `Client` or an address. Raises ValueError where it is neither."""
    if source in walk.Client.__members__.values():
        client = walk.Client(source)
        way.say("client", CLIENTS[client])
        return walk.Sender(client, client is not walk.Client.OUTSIDE)
    address = addresses.parse(source)
    if address is None:
        raise ValueError(f"{source!r} is not an IP address, pod, node or outside")
    if address in way.node_ports.local or addresses.is_loopback(address):
        way.say("client", f"{source} is this node's: {CLIENTS[walk.Client.NODE]}")
        return walk.Sender(walk.Client.NODE, True, address)
    return _of_address(way, source, address)


def _of_address(way: walk.Walk, source: str, address: bytes) -> walk.Sender:
    backends = list(way.backends())
    node = _node_of(backends, address)
    here = _this_node(backends)
    network = pod_network(way.settings, addresses.family_of(address))
    facts = []
    if any(backend.address == address for backend in backends):
        facts.append(f"a backend (on {node}, says its EndpointSlice)" if node else "a backend")
    if network is not None:
        facts.append(f"{'in' if address in network else 'not in'} {network}, where pods are")
    what = " and ".join(facts) or "not known here"
    is_pod = network is not None and address in network
    if node and here and node not in here:
        kind = walk.Client.POD if is_pod else walk.Client.OUTSIDE
        on_its_way = "comes in from outside, and counts as" if is_pod else "so it comes in from outside:"
        way.say(
            "client",
            f"{source} is {what}: {on_its_way} {'a pod' if is_pod else CLIENTS[kind]}; "
            "what its own node makes of it first, ask there",
        )
        return walk.Sender(kind, False, address)
    if network is not None and not is_pod and node not in here:
        way.say("client", f"{source} is {what}: {CLIENTS[walk.Client.OUTSIDE]}")
        return walk.Sender(walk.Client.OUTSIDE, False, address)
    way.say("client", f"{source} is {what}: taken for {CLIENTS[walk.Client.POD]}")
    if node not in here:
        way.say(
            "assumption",
            f"nothing here tells that {source} is on this node: if it is not, ask with `--from outside`",
        )
    return walk.Sender(walk.Client.POD, True, address)


def _node_of(backends: typing.Iterable[inventory.Backend], address: bytes) -> str:
    return next((one.node for one in backends if one.address == address and one.node), "")


def _this_node(backends: typing.Iterable[inventory.Backend]) -> set[str]:
    """What this node is called, as far as that shows.

    The agent puts only its own node's backends into the Local set. There is no name of
    this node in the tables: without such a backend it is not known.
    """
    return {one.node for one in backends if one.node and one.sets & tables.BackendSet.LOCAL}
