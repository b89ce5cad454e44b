"""What this node is to serve for a service: frontends, backends and the slots that join them.

The plan of a service depends on nothing but its Service, its slices, what is
known of its backends' health, this node's name, zone and addresses, and the defaults;
not on the order in which they became known. Where externalTrafficPolicy is Local, each
frontend other than the ClusterIP stands twice: pods and the node draw from the Cluster
set (ETP-4, ETP-5), clients outside from the Local one (ETP-3).
"""

import itertools
import typing
from collections.abc import Iterable, Sequence

import msgspec

from lbproxy.core import addresses, health, maglev, model, spill, state, tables, topology, weights

# Where a NodePort's frontend stands: one row of each family, whatever addresses the node has.
NODE_PORT_ADDRESS = {model.Family.IPV4: addresses.IPV4_ZERO, model.Family.IPV6: addresses.IPV6_ZERO}


_HERE = tables.BackendSet.HERE.value
_NOT_HINTED = tables.BackendSet.NOT_HINTED.value
_ZONE_KEEPS = tables.BackendSet.ZONE_KEEPS.value
_NO_WEIGHT = tables.BackendSet.NO_WEIGHT.value


class FrontendPlan(msgspec.Struct, frozen=True, gc=False):
    """An address and port that clients dial; a node port has the zero address of its family.

    `drop` says that the frontend's set is empty while other nodes have backends, so
    clients are left to time out instead of being refused (ITP-2, REJ-4). `outside` is
    the one of a pair that is for clients outside, `external_local` the other one.
    """

    address: bytes
    port: int
    protocol: model.Protocol
    kind: tables.FrontendKind
    set: tables.BackendSet
    drop: bool
    outside: bool = False
    external_local: bool = False
    restricted: bool = False  # only for the port's source ranges
    dsr: bool = False


class BackendPlan(msgspec.Struct, frozen=True, gc=False):
    """An address and port that answers; `sets` are the BackendSet bits it may be used in."""

    address: bytes
    port: int
    state: tables.BackendState
    sets: int
    node_name: str
    zone: str
    weight: int
    health: int = 0  # tables.Health bits: who speaks against it
    left_out: int = 0  # BackendSet bits that say why it is not in a set, for people's eyes


class PortPlan(msgspec.Struct, frozen=True, gc=False):
    """One service port of one family. All known endpoints are listed, by address and port.

    `source_ranges` are empty where no frontend is restricted. `spared` are the BackendSet
    bits of those of its sets whose every backend is unhealthy, or more of them than the
    Service's `panic` allows: all of them are used.
    """

    key: model.PortKey
    frontends: tuple[FrontendPlan, ...]
    backends: tuple[BackendPlan, ...]
    algorithm: model.Algorithm
    affinity_s: int
    internal_local: bool
    external_local: bool
    source_ranges: tuple[model.SourceRange, ...] = ()
    spared: int = 0


class Defaults(typing.NamedTuple):
    """What is the same for all services.

    `external_ips` is the feature gate AllowServiceExternalIPs (EXT-5), `node_ips` are
    this node's primary addresses.
    """

    algorithm: model.Algorithm
    mode: model.PacketMode = model.PacketMode.SNAT
    external_ips: bool = True
    node_ips: tuple[bytes, ...] = ()


def plan(
    cluster: state.ClusterState,
    name: model.ServiceName,
    defaults: Defaults,
    book: health.HealthBook | None = None,
) -> list[PortPlan]:
    """Plan a service as the cluster state has it; nothing if it is not known."""
    service = cluster.service(name)
    if service is None:
        return []
    slices = cluster.slices(name)
    return plan_service(service, slices, cluster.node_name, cluster.zone, defaults, book)


def plan_service(
    service: model.Service,
    slices: Iterable[model.EndpointSlice],
    node_name: str,
    zone: str,
    defaults: Defaults,
    book: health.HealthBook | None = None,
) -> list[PortPlan]:
    """Plan each port of a service in each family that it has a ClusterIP of (SEL-8, SEL-9)."""
    if not defaults.external_ips:
        service = msgspec.structs.replace(service, external_ips=())
    ordered = sorted(slices, key=lambda slice_: (slice_.namespace, slice_.name))
    dsr = (service.mode or defaults.mode) is model.PacketMode.DSR
    # Of DSR's tables all nodes need the same, in whatever zone they are.
    spills = bool(service.zone_spill_over) and not dsr
    plans = []
    for cluster_ip in service.cluster_ips:
        family = addresses.family_of(cluster_ip)
        ranges = _source_ranges(service, family, defaults.node_ips)
        for port in service.ports:
            merged = topology.merge(ordered, port.name, port.protocol, family)
            places = sorted(merged)
            endpoints = [merged[place] for place in places]
            usable = topology.usable(endpoints, node_name, zone, hinted=not spills)
            key = model.PortKey(service.name, port.name, port.protocol, family)
            known = health.NOTHING_KNOWN if book is None else book.of(key)
            against, spared = [0] * len(places), 0
            if known:
                against = [known[place].sources if place in known else 0 for place in places]
                asked = service.probe_of(port.name)
                panic = asked.panic if asked is not None else 0.0
                usable, spared = _healthy(usable, endpoints, against, node_name, zone, panic)
            frontends = _frontends(service, port, cluster_ip, usable, restricted=bool(ranges), dsr=dsr)
            shares = weighted = weights.shares(service.weights, endpoints, usable.sets)
            if spills:
                shares = spill.shares(service.zone_spill_over, zone, endpoints, *shares, said=service.weights)
            left = _left_out(endpoints, against, usable, weighted[0], shares[0])
            plans.append(
                PortPlan(
                    key=key,
                    frontends=frontends,
                    backends=tuple(
                        _backend(place, endpoint, sets, weight, node_name, bits, why)
                        for place, endpoint, sets, weight, bits, why in zip(
                            places, endpoints, *shares, against, left, strict=True
                        )
                    ),
                    algorithm=defaults.algorithm if service.algorithm is None else service.algorithm,
                    affinity_s=service.affinity_s,
                    internal_local=service.internal_local,
                    external_local=service.external_local,
                    source_ranges=ranges if any(frontend.restricted for frontend in frontends) else (),
                    spared=spared and spared & _drawn_from(frontends),
                )
            )
    return plans


def slots(port_plan: PortPlan, backend_set: tables.BackendSet) -> Sequence[int]:
    """Return indexes into the plan's backends: a new flow goes to that of a slot drawn evenly.

    A Maglev slot is to be drawn by hash. Without one each usable backend has a slot, or
    where weights differ as many as its weight says; if those would be more than a table has,
    its share of one. Empty where no backend is usable. What a DSR frontend draws from is
    always a Maglev table: several nodes have to agree.
    """
    bit = int(backend_set)  # not `value`, which is a property in Python
    usable = []
    found = set()
    for index, backend in enumerate(port_plan.backends):
        if backend.sets & bit:
            usable.append(index)
            found.add(backend.weight)
    hashed = port_plan.algorithm is model.Algorithm.MAGLEV or any(
        frontend.dsr and frontend.set == bit for frontend in port_plan.frontends
    )
    if not hashed and len(found) < 2:
        return usable
    if not hashed:
        small = weights.reduced([port_plan.backends[index].weight for index in usable])
        if sum(small) <= maglev.size(len(usable)):
            return [index for index, weight in zip(usable, small, strict=True) for _ in range(weight)]
    table = maglev.table([_identity(port_plan.backends[index]) for index in usable])
    return [usable[index] for index in table]


def _frontends(
    service: model.Service,
    port: model.ServicePort,
    cluster_ip: bytes,
    usable: topology.Usable,
    *,
    restricted: bool,
    dsr: bool,
) -> tuple[FrontendPlan, ...]:
    """List a port's frontends; an address that two fields of the Service name is the first's."""
    family = addresses.family_of(cluster_ip)
    cluster = tables.BackendSet.CLUSTER, _drops(usable, topology.CLUSTER)
    local = tables.BackendSet.LOCAL, _drops(usable, topology.LOCAL)
    kinds = tables.FrontendKind
    drawn_from, drop = local if service.internal_local else cluster
    frontends = [FrontendPlan(cluster_ip, port.port, port.protocol, kinds.CLUSTER_IP, drawn_from, drop)]
    external = [(address, port.port, kinds.EXTERNAL_IP) for address in service.external_ips]
    external += [(address, port.port, kinds.LOAD_BALANCER) for address in service.load_balancer_ips]
    if port.node_port:
        external.append((NODE_PORT_ADDRESS[family], port.node_port, kinds.NODE_PORT))
    taken = {cluster_ip}
    for address, number, kind in external:
        if address in taken or addresses.family_of(address) is not family:
            continue
        taken.add(address)
        plain = FrontendPlan(
            address,
            number,
            port.protocol,
            kind,
            *cluster,
            external_local=service.external_local,
            restricted=restricted and kind is kinds.LOAD_BALANCER,
            dsr=dsr,
        )
        frontends.append(plain)
        if service.external_local:
            drawn_from, drop = local
            frontends.append(
                msgspec.structs.replace(plain, set=drawn_from, drop=drop, outside=True, external_local=False)
            )
    return tuple(frontends)


def _source_ranges(
    service: model.Service, family: model.Family, node_ips: Iterable[bytes]
) -> tuple[model.SourceRange, ...]:
    """The ranges that restrict a family's load balancer IPs; none where it is open (SR-6, SR-7).

    Where this node's own address is in one, so are those IPs: from a node that has
    them on a device, its own packets to them carry them as their source (SR-5).
    """
    if not service.source_ranges:
        return ()
    everything = 96 if family is model.Family.IPV4 else 0
    ranges = [
        addresses.Network(*one, family)
        for one in service.source_ranges
        if addresses.family_of(one.base) is family
    ]
    if any(one.prefix_length == everything for one in ranges):
        return ()
    allowed = [model.SourceRange(one.base, one.prefix_length) for one in ranges]
    if any(address in one for one in ranges for address in node_ips):
        allowed += [
            model.SourceRange(address, 128)
            for address in service.load_balancer_ips
            if addresses.family_of(address) is family
        ]
    return tuple(dict.fromkeys(allowed))


def _healthy(
    usable: topology.Usable,
    endpoints: Sequence[model.Endpoint],
    against: Sequence[int],
    node_name: str,
    zone: str,
    panic: float,
) -> tuple[topology.Usable, int]:
    """Leave unhealthy endpoints out of the sets, and say which sets are too ill for that: they keep all.

    Hints are a preference: where they lead to unhealthy endpoints only, the Cluster set
    is chosen without them if it has a healthy one then. What is chosen may be too ill to
    go by, as `panic` says: that is no reason to choose again, for nobody else is probed.
    """
    down = list(map(bool, against))
    sets = usable.sets
    chosen = health.exclude(sets, down)
    if chosen.spared & topology.CLUSTER:
        all_sets = topology.usable(endpoints, node_name, zone, hinted=False).sets
        wider = health.exclude(all_sets, down)
        if not wider.spared & topology.CLUSTER:
            sets, chosen = all_sets, wider
            usable = usable._replace(hinted=False)
    if panic:
        chosen = health.exclude(sets, down, panic)
    return usable._replace(sets=chosen.sets), chosen.spared


def _left_out(
    endpoints: Sequence[model.Endpoint],
    against: Sequence[int],
    usable: topology.Usable,
    weighted: Sequence[int],
    kept: Sequence[int],
) -> Iterable[int]:
    """For each endpoint, why it is in fewer sets than it might be; health and its state speak for themselves.

    `usable` are the sets by hints and health, `weighted` those after weights, `kept` after what zones keep.
    """
    if not usable.hinted and weighted is usable.sets and kept is weighted:
        return itertools.repeat(0, len(endpoints))
    found = []
    for endpoint, ill, chosen, heavy, mine in zip(
        endpoints, against, usable.sets, weighted, kept, strict=True
    ):
        bits = _NO_WEIGHT if chosen & ~heavy else 0
        bits |= _ZONE_KEEPS if heavy & ~mine else 0
        if usable.hinted and endpoint.ready and not ill and not chosen & topology.CLUSTER:
            bits |= _NOT_HINTED
        found.append(bits)
    return found


def _drawn_from(frontends: Iterable[FrontendPlan]) -> int:
    bits = 0
    for frontend in frontends:
        bits |= frontend.set
    return bits


def _drops(usable: topology.Usable, bit: int) -> bool:
    return usable.has_any and not any(sets & bit for sets in usable.sets)


def _backend(
    place: topology.Place,
    endpoint: model.Endpoint,
    sets: int,
    weight: int,
    node_name: str,
    against: int,
    left_out: int,
) -> BackendPlan:
    if node_name and endpoint.location.node_name == node_name:
        sets |= _HERE
    if endpoint.ready:
        backend_state = tables.BackendState.ACTIVE
    elif topology.is_draining(endpoint):
        backend_state = tables.BackendState.TERMINATING
    elif endpoint.serving and not endpoint.terminating:
        backend_state = tables.BackendState.SERVING
    else:
        backend_state = tables.BackendState.UNREADY
    return BackendPlan(
        place.address,
        place.port,
        backend_state,
        sets,
        endpoint.location.node_name,
        endpoint.location.zone,
        weight,
        against,
        left_out,
    )


def _identity(backend: BackendPlan) -> tuple[bytes, int]:
    """What Maglev tables agree on between nodes, where ids do not."""
    return backend.address + backend.port.to_bytes(2, "big"), backend.weight
