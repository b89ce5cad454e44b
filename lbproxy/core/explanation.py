"""What the kernel would do with a connection: the steps of the programs, taken over the same rows.

Sockets of this node are served when they connect (bpf/sock_lb.c), everyone else
packet by packet (bpf/open.h).
"""

import typing

import msgspec

from lbproxy import abi
from lbproxy.core import (
    addresses,
    classification,
    inventory,
    known_flow,
    left_out,
    model,
    notes,
    packet_walk,
    tables,
    walk,
    wording,
)


class Explanation(msgspec.Struct, frozen=True, rename={"source": "from", "destination": "to"}):
    """The steps, and what they come to. `service` is empty where the address is none of a Service.

    `left_out` are the service's other backends, where one was drawn or none could be.
    """

    source: str
    destination: str
    verdict: str
    reason: str
    service: str
    steps: tuple[walk.Step, ...]
    backends: tuple[walk.Choice, ...]
    left_out: tuple[left_out.LeftOut, ...]


_NETNS_KEY: typing.Final = abi.LAYOUTS["netns_key"]


def explain(
    rows: inventory.Rows,
    hooks: walk.Hooks,
    source: str,
    target: walk.Target,
    now_s: int,
    netns: typing.Sequence[int] = (),
    source_port: int = 0,
    noted: notes.Notes = notes.NOTHING,
) -> Explanation:
    """Follow a connection from `source` (a `Client` or an address) to `target`.

    `now_s` is the monotonic clock, which the kernel measures session affinity with. `netns` are the
    cookies of this node's network namespaces that have the address `source`, as far as they are known.
    `source_port` tells a flow that is known already, where not 0. `noted` is what the agent has written down.
    Raises ValueError where `source` is neither.
    """
    way = walk.Walk(rows, hooks, target, now_s, noted)
    sender = classification.classify(way, source)
    try:
        if _dials_here(way, sender, source_port):
            reason = _through_socket(way, sender, netns)
        else:
            reason = packet_walk.through(way, sender, source_port)
    except walk.End as end:
        verdict, reason = end.verdict, end.reason
    else:
        verdict = walk.Verdict.BALANCED
    steps = tuple(way.steps)
    return Explanation(source, str(target), verdict, reason, way.service, steps, way.choices, way.left_out)


def with_neighbours(rows: inventory.Rows, target: walk.Target, found: Explanation) -> Explanation:
    """The same; where the address is no service's, also what is served at it, or as NodePort, otherwise.

    Of the kernel's steps it is none: whoever asks may have taken the other port or protocol.
    """
    if found.reason != walk.NOT_A_SERVICE:
        return found
    served = set()
    here = target.packed in inventory.node_ports(rows).addresses
    zero = addresses.IPV4_ZERO if target.family is model.Family.IPV4 else addresses.IPV6_ZERO
    for row, frontend in rows.rows(tables.Table.FRONTENDS):
        key = tables.frontend_key(row)
        port = int.from_bytes(key.port, "big")
        of_node = here and key.scope == tables.SCOPE_NODE_PORT and (key.addr, port) == (zero, target.port)
        if not of_node and (key.scope, key.addr) != (tables.SCOPE_ADDRESS, target.packed):
            continue
        whose = inventory.port_key(rows, tables.frontend(frontend).service)
        if whose is not None:
            what = "NodePort " if of_node else ""
            served.add(f"{what}{port}/{model.Protocol(key.proto).name} of {whose.service}")
    if not served:
        return found
    text = f"served are {wording.few(sorted(served), 5)}"
    return msgspec.structs.replace(found, steps=(*found.steps, walk.Step("else", text)))


def _dials_here(way: walk.Walk, sender: walk.Sender, source_port: int) -> bool:
    """Whether a socket of this node is led to a backend as it connects; else its packets are looked at."""
    if not sender.here:
        return False
    target = way.target
    if target.protocol is model.Protocol.SCTP and sender.kind is not walk.Client.NODE:
        return False
    if not source_port or sender.address is None:
        return True
    # Somebody whom no hook saw, as a virtual machine, whose packets have a flow already.
    ends = known_flow.Ends(sender.address, source_port, target.packed, target.port, target.protocol)
    return known_flow.find(way.rows, ends, way.settings, way.now_s) is None


def _through_socket(way: walk.Walk, sender: walk.Sender, netns: typing.Sequence[int]) -> str:
    """Take every step of a socket that connects; raises End at the one that decides against a backend."""
    _hook(way)
    frontend = way.find_frontend(sender)
    way.handover(by_socket=True)
    sender = _as_it_counts(way, sender)
    frontend = way.for_client(frontend, sender)
    way.admit(frontend, sender)
    way.usable(frontend, "no backend is usable: connect() fails with ECONNREFUSED")
    of_node = sender.kind is walk.Client.NODE
    clients = [_cookie(one) for one in ((way.node_ports.host_netns,) if of_node else netns)]
    # Of namespaces with the same address only those in our cgroup have rows.
    remembered = (one for one in clients if way.affinity(frontend, one, by_netns=True) is not None)
    client = next(remembered, clients[0] if clients else None)
    who = "the node" if of_node else "a pod"
    if not way.remembered(frontend, client, True, who):
        way.draw(frontend, "the socket")
    if way.target.protocol is model.Protocol.UDP:
        way.say(
            "socket",
            "an unconnected socket that has sent here before stays with its backend while that serves",
        )
    return "the socket is connected to a backend"


def _hook(way: walk.Walk) -> None:
    protocol = way.target.protocol
    if protocol is model.Protocol.SCTP:
        raise way.ending(
            "hook",
            "no program sees the node's own SCTP sockets",
            walk.Verdict.UNTOUCHED,
            "the node's own sockets are translated if they are TCP or UDP",
        )
    version = way.target.address.version
    names = [f"connect{version}"] + [f"sendmsg{version}"] * (protocol is model.Protocol.UDP)
    broken = [name for name in names if name in way.hooks.broken]
    if broken:
        raise way.ending(
            "hook",
            f"{' and '.join(broken)} not attached",
            walk.Verdict.UNTOUCHED,
            "no program sees this connection: see `lbproxy status`",
        )
    way.say("hook", f"{' and '.join(names)} attached to {way.hooks.cgroup}")


def _as_it_counts(way: walk.Walk, sender: walk.Sender) -> walk.Sender:
    """What a socket's owner is to a service: a pod that nothing tells is a client outside (ETP-6)."""
    if sender.kind is walk.Client.NODE:
        if sender.address is not None:
            return sender
        family = way.target.family
        key = _NETNS_KEY.pack(way.node_ports.host_netns, family.value)
        return sender._replace(address=way.rows.row(tables.Table.NETNS_ADDRESSES, key))
    if way.settings.flags & tables.Setting.PODS_BY_DEVICE:
        return sender
    network = classification.pod_network(way.settings, way.target.family)
    if network is None or (sender.address is not None and sender.address not in network):
        return sender._replace(kind=walk.Client.OUTSIDE)
    return sender


def _cookie(netns: int) -> bytes:
    """A client that is a network namespace, as session affinity knows it."""
    halves = (netns & 0xFFFFFFFF, netns >> 32)
    return b"".join(half.to_bytes(4, tables.BYTE_ORDER) for half in halves).ljust(16, b"\0")
