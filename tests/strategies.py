"""Hypothesis strategies: addresses, services, slices, clusters, and histories of events that lead to them.

Names, addresses and ports come from small pools, so that objects clash often.
"""

import dataclasses
import math
import random
import typing
from collections.abc import Sequence

import msgspec
from hypothesis import strategies as st

from lbproxy.core import addresses as ip
from lbproxy.core import events, model, plan, tables

NODES = ("node-a", "node-b", "node-c")
ZONES = ("zone-1", "zone-2")
NAMESPACES = ("default", "team")
SERVICES = ("web", "db", "dns")
SLICES = ("one", "two", "three", "four")
PORT_NAMES = ("", "http", "dns")


def _ip(text: str) -> bytes:
    address = ip.parse(text)
    assert address is not None
    return address


def addresses() -> st.SearchStrategy[bytes]:
    """Any address, of either family evenly, loopback now and then."""
    ipv4 = st.binary(min_size=4, max_size=4).map(lambda tail: ip.IPV4_PREFIX + tail)
    return st.one_of(
        ipv4,
        st.binary(min_size=16, max_size=16),
        st.sampled_from([_ip("127.0.0.1"), _ip("::1"), _ip("0.0.0.0"), _ip("::")]),
    )


def picks(*pools: Sequence[typing.Any]) -> st.SearchStrategy[tuple[typing.Any, ...]]:
    """One value from each pool; a single number drawn for all, since drawing takes most of the time."""

    def pick(number: int) -> tuple[typing.Any, ...]:
        picked = []
        for pool in pools:
            number, index = divmod(number, len(pool))
            picked.append(pool[index])
        return tuple(picked)

    return st.integers(0, math.prod(map(len, pools)) - 1).map(pick)


def addresses_of(family: model.Family, network: int) -> list[bytes]:
    """A few addresses of a small network."""
    text = f"10.{network}.0.{{}}" if family is model.Family.IPV4 else f"2001:db8:{network}::{{}}"
    return [_ip(text.format(host)) for host in range(1, 7)]


def service_names() -> st.SearchStrategy[model.ServiceName]:
    return picks(NAMESPACES, SERVICES).map(lambda picked: model.ServiceName(*picked))


def _ports() -> st.SearchStrategy[tuple[model.ServicePort, ...]]:
    port = picks(PORT_NAMES, list(model.Protocol), [53, 80, 443], [0, 30080, 30443])
    # As a decoder leaves them: neither names nor numbers repeat within a protocol.
    return st.lists(port.map(lambda picked: model.ServicePort(*picked)), max_size=3).map(_without_clashes)


def _without_clashes(ports: Sequence[model.ServicePort]) -> tuple[model.ServicePort, ...]:
    kept: list[model.ServicePort] = []
    for port in ports:
        rivals = [other for other in kept if other.protocol is port.protocol]
        if any(port.name == other.name or port.port == other.port for other in rivals):
            continue
        if port.node_port and any(port.node_port == other.node_port for other in rivals):
            continue
        kept.append(port)
    return tuple(kept)


_FAMILIES = [(model.Family.IPV4,), (model.Family.IPV6,), tuple(model.Family), tuple(model.Family)[::-1]]


@st.composite
def services(draw: st.DrawFn) -> model.Service:
    """A Service of one family or both."""
    namespace, name, families, affinity_s, internal_local, external_local, algorithm = draw(
        picks(
            NAMESPACES, SERVICES, _FAMILIES, [0, 60], [False, True], [False, True], [None, *model.Algorithm]
        )
    )
    outside = [address for family in families for address in addresses_of(family, 203)[:3]]
    some = st.lists(st.sampled_from(outside), max_size=3, unique=True).map(tuple)
    bases = [_ip("192.0.2.0"), _ip("2001:db8:5::")]
    ranges = [
        model.SourceRange(base, length)
        for base in bases
        if ip.family_of(base) in families
        for length in (96, 120, 128)
    ]
    return model.Service(
        name=model.ServiceName(namespace, name),
        cluster_ips=tuple(addresses_of(family, 96)[SERVICES.index(name)] for family in families),
        external_ips=draw(some),
        load_balancer_ips=draw(some),
        ports=draw(_ports()),
        affinity_s=affinity_s,
        internal_local=internal_local,
        external_local=external_local,
        algorithm=algorithm,
        source_ranges=draw(st.lists(st.sampled_from(ranges), max_size=2, unique=True).map(tuple)),
        mode=draw(st.sampled_from((None, *model.PacketMode))),
    )


def _endpoint(
    address: bytes, ready: bool, serving: bool, terminating: bool, *rest: typing.Any
) -> model.Endpoint:
    *location, weight = rest
    return model.Endpoint(address, ready, serving, terminating, model.Location(*location), weight)


def endpoints(family: model.Family, heaviest: int = 1) -> st.SearchStrategy[model.Endpoint]:
    """An endpoint in any of its conditions."""
    return picks(
        addresses_of(family, 244),
        [True, False],
        [True, False],
        [False, True],
        ("", *NODES),
        ("", *ZONES),
        [(), *((zone,) for zone in ZONES), ZONES],
        [(), *((node,) for node in NODES), NODES[:2]],
        range(1, heaviest + 1),
    ).map(lambda picked: _endpoint(*picked))


@st.composite
def slices(draw: st.DrawFn, service: model.ServiceName | None = None) -> model.EndpointSlice:
    """An EndpointSlice; several may list the same endpoints in other conditions."""
    name, family, trigger_time_s = draw(picks(SLICES, list(model.Family), [0.0, 1.5]))
    owner = service or draw(service_names())
    port = picks(PORT_NAMES, list(model.Protocol), [53, 8080]).map(lambda picked: model.SlicePort(*picked))
    return model.EndpointSlice(
        namespace=owner.namespace,
        name=name,
        service=owner,
        family=family,
        ports=tuple(draw(st.lists(port, max_size=3))),
        endpoints=tuple(draw(st.lists(endpoints(family), max_size=4))),
        trigger_time_s=trigger_time_s,
    )


def nodes() -> st.SearchStrategy[model.Node]:
    return picks(NODES, ("", *ZONES), [True, False]).map(
        lambda picked: model.Node(picked[0], (), picked[1], (), picked[2])
    )


Value = model.Service | model.EndpointSlice | model.Node
Key = tuple[events.Kind, events.ObjectName]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What exists in the end."""

    objects: dict[Key, Value]

    def services(self) -> list[model.Service]:
        return [value for value in self.objects.values() if isinstance(value, model.Service)]

    def slices(self, name: model.ServiceName) -> list[model.EndpointSlice]:
        return [
            value
            for value in self.objects.values()
            if isinstance(value, model.EndpointSlice) and value.service == name
        ]

    def zone(self, node_name: str) -> str:
        node = self.objects.get((events.Kind.NODE, events.ObjectName("", node_name)))
        return node.zone if isinstance(node, model.Node) else ""


def key_of(value: Value) -> Key:
    match value:
        case model.Service():
            return events.Kind.SERVICE, events.ObjectName(*value.name)
        case model.EndpointSlice():
            return events.Kind.ENDPOINT_SLICE, events.ObjectName(value.namespace, value.name)
        case model.Node():
            return events.Kind.NODE, events.ObjectName("", value.name)


def clusters(largest: int = 4) -> st.SearchStrategy[Cluster]:
    """A few Services, slices of known and unknown ones, and Nodes."""
    values = st.tuples(
        st.lists(services(), max_size=largest),
        st.lists(slices(), max_size=largest),
        st.lists(nodes(), max_size=2),
    )
    return values.map(lambda lists: Cluster({key_of(value): value for part in lists for value in part}))


def _version_of(key: Key, pool: Cluster, order: random.Random) -> Value | None:
    """Some other version of an object, None being one that a proxy ignores."""
    kind, name = key
    value = order.choice([None, *(value for known, value in pool.objects.items() if known[0] is kind)])
    match value:
        case model.Service():
            return msgspec.structs.replace(value, name=model.ServiceName(*name))
        case model.EndpointSlice():
            # Of another service, too: slices may be relabelled.
            owner = model.ServiceName(name.namespace, value.service.name)
            return msgspec.structs.replace(value, namespace=name.namespace, name=name.name, service=owner)
        case model.Node():
            return msgspec.structs.replace(value, name=name.name)
    return None


@st.composite
def histories(draw: st.DrawFn, cluster: Cluster) -> list[events.Event]:
    """Events in some order that all lead to `cluster`.

    Objects have earlier versions, go and come back, are delivered twice, are
    rejected meanwhile; some exist only for a time; and the whole may be listed again.
    """
    passing = draw(clusters(2))
    pool = Cluster(cluster.objects | passing.objects)
    # Seeded: to draw each choice by itself would take nearly all of the time.
    order = random.Random(draw(st.integers(0, 2**32 - 1)))
    threads: list[list[events.Event]] = []
    for key in pool.objects:
        kind, name = key
        if key not in cluster.objects and kind is events.Kind.NODE:
            continue  # a Node's last state outlives it
        steps: list[events.Event] = []
        for _ in range(order.randint(0, 2)):
            version = _version_of(key, pool, order)
            if version is not None or kind is not events.Kind.NODE:
                steps.append(events.Upsert(kind, name, version))
            if order.random() < 0.5:
                steps.append(events.Delete(kind, name))
        last: events.Event = events.Delete(kind, name)
        if key in cluster.objects:
            last = events.Upsert(kind, name, cluster.objects[key])
        steps += [last] * order.randint(1, 2)
        if order.random() < 0.3:
            steps += [events.Rejected(kind, name, "spec: broken"), last]
        threads.append(steps)
    threads.append([events.Synced(events.Kind.SERVICE), events.Synced(events.Kind.NODE)])
    threads.append([events.Synced(events.Kind.ENDPOINT_SLICE)])

    history: list[events.Event] = []
    while threads := [thread for thread in threads if thread]:
        history.append(order.choice(threads).pop(0))
    if order.random() < 0.5:
        relist = [events.Upsert(kind, name, value) for (kind, name), value in cluster.objects.items()]
        history += order.sample(relist, len(relist))
    return history


def fresh(value: Value) -> Value:
    """An equal value that shares no object with the first, as decoding it again gives."""
    copy: Value = msgspec.structs.replace(value)
    return copy


# --- plans: what the ledger takes ---


@dataclasses.dataclass(frozen=True)
class Step:
    """Some services get these plans, so long after the step before."""

    pause_s: float
    plans: dict[model.ServiceName, list[plan.PortPlan]]


SERVICE_NAMES = tuple(model.ServiceName("default", name) for name in ("a", "b", "c"))
_SETS = (tables.BackendSet.CLUSTER, tables.BackendSet.LOCAL)


def _external(text: str, kind: tables.FrontendKind, **fields: bool) -> tuple[plan.FrontendPlan, ...]:
    """What stands where externalTrafficPolicy decides: one frontend, or two if it is Local."""
    cluster, local = (
        plan.FrontendPlan(_ip(text), 80, model.Protocol.TCP, kind, backend_set, False, **fields)
        for backend_set in _SETS
    )
    if not cluster.external_local:
        return (cluster,)
    return cluster, msgspec.structs.replace(local, outside=True, external_local=False)


# So few frontends that services claim each other's, and so few backends that they stay from plan to plan.
_FRONTENDS = (
    *(
        (plan.FrontendPlan(_ip(text), 80, model.Protocol.TCP, tables.FrontendKind.CLUSTER_IP, of, False),)
        for text in ("10.96.0.1", "10.96.0.2")
        for of in _SETS
    ),
    *(
        _external(text, kind, external_local=local, dsr=dsr)
        for text, kind in (
            ("203.0.113.1", tables.FrontendKind.EXTERNAL_IP),
            ("0.0.0.0", tables.FrontendKind.NODE_PORT),
        )
        for local in (False, True)
        for dsr in (False, False, True)
    ),
    *(
        _external("203.0.113.2", tables.FrontendKind.LOAD_BALANCER, external_local=local, restricted=ranged)
        for local in (False, True)
        for ranged in (False, True, True)
    ),
)
# Short ones within long ones, and one that another service may have too.
_RANGES = tuple(
    model.SourceRange(_ip(text), 96 + bits)
    for text, bits in (("192.0.2.0", 24), ("192.0.2.0", 25), ("192.0.2.1", 32), ("198.51.100.0", 24))
)
_BACKENDS = tuple(
    plan.BackendPlan(_ip(f"10.244.0.{host}"), 8080, state, sets, *place, weight)
    for host in range(1, 6)
    for state, sets in (
        (tables.BackendState.ACTIVE, 1),
        (tables.BackendState.ACTIVE, 2),
        (tables.BackendState.ACTIVE, 3),
        (tables.BackendState.ACTIVE, 3 | tables.BackendSet.HERE),
        (tables.BackendState.TERMINATING, 1),
        (tables.BackendState.UNREADY, 0),
        (tables.BackendState.SERVING, 0),
    )
    for place in (("", ""), ("node-a", "zone-1"), ("node-b", "zone-2"))
    for weight in (1, 1, 1, 2)
)
_CROWD = tuple(
    plan.BackendPlan(_ip(f"10.245.0.{host}"), 8080, tables.BackendState.ACTIVE, 1, "", "", 1)
    for host in range(1, 18)
)
_TRAITS = st.tuples(
    st.lists(st.sampled_from(_FRONTENDS), max_size=3, unique_by=lambda pair: pair[0].address),
    st.lists(st.sampled_from(_BACKENDS), max_size=4, unique_by=lambda backend: backend.address),
    st.sampled_from((0, 0, 0, 0, 0, 13, 17)),  # of the crowd: more than one block of slots
    st.sampled_from((model.Algorithm.RANDOM,) * 4 + tuple(model.Algorithm)),
    st.sampled_from((0, 60)),
    st.lists(st.sampled_from(_RANGES), min_size=1, max_size=3, unique=True).map(tuple),
)


def _port_plans(key: model.PortKey) -> st.SearchStrategy[plan.PortPlan]:
    def made(
        traits: tuple[
            list[tuple[plan.FrontendPlan, ...]],
            list[plan.BackendPlan],
            int,
            model.Algorithm,
            int,
            tuple[model.SourceRange, ...],
        ],
    ) -> plan.PortPlan:
        pairs, backends, crowd, algorithm, affinity_s, ranges = traits
        frontends = tuple(frontend for pair in pairs for frontend in pair)
        by_place = sorted((*backends, *_CROWD[:crowd]), key=lambda backend: backend.address)
        restricted = any(frontend.restricted for frontend in frontends)
        return plan.PortPlan(
            key,
            frontends,
            tuple(by_place),
            algorithm,
            affinity_s,
            False,
            False,
            ranges if restricted else (),
        )

    return _TRAITS.map(made)


def _service_plans(name: model.ServiceName) -> st.SearchStrategy[list[plan.PortPlan]]:
    """The plans of a service's ports; none where the service is to go."""
    ports = [
        _port_plans(model.PortKey(name, port_name, model.Protocol.TCP, model.Family.IPV4))
        for port_name in ("", "http")
    ]
    return st.one_of(st.just([]), ports[0].map(lambda port: [port]), st.tuples(*ports).map(list))


_STEP = st.tuples(
    st.sampled_from((0.0, 0.5, 0.99, 1.0, 2.0)),
    st.fixed_dictionaries({}, optional={name: _service_plans(name) for name in SERVICE_NAMES}),
).map(lambda drawn: Step(*drawn))


def steps(longest: int = 6) -> st.SearchStrategy[list[Step]]:
    """Services come, change and go, at any distance in time, and claim each other's frontends."""
    return st.lists(_STEP, min_size=1, max_size=longest)
