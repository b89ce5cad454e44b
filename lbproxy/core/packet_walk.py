"""What becomes of the first packet of a flow from elsewhere: the steps of bpf/open.h and masquerade.h."""

import collections

from lbproxy.core import (
    addresses,
    classification,
    inventory,
    known_flow,
    listing,
    model,
    outcomes,
    tables,
    walk,
    wording,
)


def through(way: walk.Walk, sender: walk.Sender, source_port: int = 0) -> str:
    """Take every step; raises End at the one that decides against a backend.

    `source_port` tells a flow that is known already, where not 0.
    """
    _hook(way, sender)
    if source_port and sender.address is not None and _known(way, sender.address, source_port):
        return "the packet goes on as the row of its flow says"
    frontend = way.find_frontend(sender)
    way.handover(by_socket=False)
    frontend = way.for_client(frontend, sender)
    way.admit(frontend, sender)
    tcp = way.target.protocol is model.Protocol.TCP
    told = "a TCP RST" if tcp else "ICMP port unreachable"
    way.usable(frontend, f"no backend is usable: the sender is told so with {told}")
    who = sender.text if sender.address is not None else "each client"
    if not way.remembered(frontend, sender.address, False, who):
        way.draw(frontend, "the flow's addresses and ports")
    return _masquerade(way, frontend, sender)


def _hook(way: walk.Walk, sender: walk.Sender) -> None:
    devices = way.hooks.others if sender.here else way.hooks.uplinks
    if devices:
        where = "of this node's devices" if sender.here else "where clients outside come in"
        way.say("hook", f"packets are served on {', '.join(devices)}, {where}")
        return
    if way.hooks.others and not sender.here:
        # bpf/tc_lb.c: only what may begin a flow is looked at there, and this does.
        way.say(
            "hook",
            f"no uplink is attached, but {_few(list(way.hooks.others))} serve what begins a flow, "
            "should it come in there",
        )
        return
    what = "device of pods" if sender.here else "uplink"
    raise way.ending(
        "hook",
        f"the packet path is attached to no {what}",
        walk.Verdict.UNTOUCHED,
        "no program sees this packet: see `lbproxy status`",
    )


def _known(way: walk.Walk, source: bytes, source_port: int) -> bool:
    """Whether the flow is known, and nothing is chosen any more. Raises End where it is another proxy's."""
    target = way.target
    ends = known_flow.Ends(source, source_port, target.packed, target.port, target.protocol)
    row = known_flow.find(way.rows, ends, way.settings, way.now_s)
    if row is None:
        way.say("flow", "none is known of these addresses and ports: a new one")
        return False
    way.say("flow", known_flow.in_words(row, target.protocol, way.settings))
    if known_flow.is_held(row):
        reason = "it stays with the proxy that has begun it: see `lbproxy migrate status`"
        raise walk.End(walk.Verdict.UNTOUCHED, reason)
    # Where a flow by DSR ends, its row says that its client is elsewhere.
    backend = inventory.backend(way.rows, row.backend & ~outcomes.ELSEWHERE)
    to = (row.addr, int.from_bytes(row.dport, "big"))
    if backend is not None and (backend.address, backend.port) == to:
        way.chosen = [(backend, 100.0)]
    return True


def _masquerade(way: walk.Walk, frontend: tables.Frontend, sender: walk.Sender) -> str:
    """Say whom the backends will see, and how the packets come to them."""
    answers: dict[tuple[bool, str], list[str]] = collections.defaultdict(list)
    tunnelled = []
    for backend, _ in way.chosen:
        place = listing.place(addresses.text(backend.address), backend.port)
        if frontend.flags & tables.FrontendFlag.DSR and not _is_here(way, backend):
            tunnelled.append(place)
        else:
            answers[_why(way, frontend, sender, backend)].append(place)
    for (masquerade, why), places in answers.items():
        to = "" if len(answers) == 1 and not tunnelled else f"to {_few(places)}: "
        way.say("masquerade", f"{to}{'yes' if masquerade else 'no'}, {why}")
    if tunnelled:
        way.say(
            "dsr",
            f"{_few(tunnelled)}: inside another packet, to answer the client without this node, "
            "which does not see how that fares",
        )
    if not any(masquerade for masquerade, _ in answers):
        return "the packet goes to a backend, which sees the client's address"
    return "the packet goes to a backend, which sees this node's address where it is masqueraded"


def _why(
    way: walk.Walk, frontend: tables.Frontend, sender: walk.Sender, backend: inventory.Backend
) -> tuple[bool, str]:
    """Whether a flow is masqueraded, and why (MASQ-1 to MASQ-5, MASQ-8)."""
    flags = way.settings.flags
    if backend.address == sender.address:
        return True, "since the client is the backend itself"
    if backend.address in way.node_ports.local:
        return False, "since the backend is the node itself"
    if flags & tables.Setting.KEEP_CLIENT and backend.sets & tables.BackendSet.LOCAL:
        return False, "since pods of this node are to see their client (--keep-client-address)"
    if frontend.flags & tables.FrontendFlag.DSR:
        return False, "since backends of a DSR service see their client"
    pod = sender.kind is walk.Client.POD
    if frontend.kind == tables.FrontendKind.CLUSTER_IP:
        if flags & tables.Setting.MASQUERADE_ALL:
            return True, "as every flow to a ClusterIP (--masquerade-all)"
        if pod:
            return False, "since the client is a pod"
        by_device = flags & tables.Setting.PODS_BY_DEVICE
        if not by_device and classification.pod_network(way.settings, way.target.family) is None:
            return False, "since nothing tells pods from other clients (--cluster-cidr)"
        return True, "since the client is no pod"
    if way.key.scope & tables.SCOPE_OUTSIDE:
        return False, "since externalTrafficPolicy is Local"
    if frontend.flags & tables.FrontendFlag.EXTERNAL_LOCAL and pod:
        return False, "since externalTrafficPolicy is Local, and the client a pod"
    return True, "since externalTrafficPolicy is Cluster"


def _is_here(way: walk.Walk, backend: inventory.Backend) -> bool:
    return bool(backend.sets & tables.BackendSet.LOCAL) or backend.address in way.node_ports.local


def _few(places: list[str]) -> str:
    return wording.few(places, 3)
