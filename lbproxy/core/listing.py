"""What the read-side commands print of the inventory: field names and their order are a contract.

Addresses are text and enumerations are the words that people know; everything is
in an order of its own, so that two listings of one state are equal byte by byte.
"""

import collections
import datetime
import functools
import operator
import typing
from collections.abc import Iterable, Sequence

import msgspec

from lbproxy.core import addresses, inventory, model, notes, outcomes, tables

LOOPBACK: typing.Final = "127.0.0.1"


class Frontend(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where clients dial. A NodePort has its family's zero address and the `addresses` that serve it."""

    ip: str
    port: int
    type: str
    addresses: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET


class Probe(msgspec.Struct, frozen=True):
    """What an annotation has asked of a Service's backends; `off` says why they are not, if they are not.

    `invalid` says what of the annotations is not understood: then nothing is asked.
    """

    asks: str
    off: str
    invalid: str


class BackendProbe(msgspec.Struct, frozen=True):
    """What probes have found of a backend.

    `state` is up; failing, which counts as up and has failed `in_a_row` of `needed` times; down, which has
    passed so often since; not-asked, or off: nobody is, on this node. `reason` says why, of the last
    failure where there is one, `since` when that began.
    """

    state: str
    in_a_row: int = 0
    needed: int = 0
    reason: str = ""
    since: str = ""


class Backend(msgspec.Struct, frozen=True):
    """Who answers; `connections` since it became a backend.

    `usable`: the ClusterIP may choose it now. Where a service port does not have its ClusterIP, any frontend.
    `health` is what speaks against it: probe-failed, ejected. `open_connections` are those and the flows
    of this node that are open now, null where the algorithm is not least-connections. `probe` is null
    where no probe is asked for.
    """

    ip: str
    port: int
    node: str
    zone: str
    state: str
    weight: int
    connections: int
    usable: bool
    health: tuple[str, ...]
    open_connections: int | None
    probe: BackendProbe | None


class SessionAffinity(msgspec.Struct, frozen=True):
    """`type` is None or ClientIP, as in a Service; `timeout_s` is 0 for None."""

    type: str
    timeout_s: int


class ServicePort(msgspec.Struct, frozen=True):
    """One service port of one family.

    `source_ranges` are who may use its load balancer IPs; empty: everyone. `mode` is how
    packets to its other addresses than the ClusterIP reach backends on other nodes.
    `all_unhealthy`: something speaks against each backend that the ClusterIP may choose, so all are used.
    `probe` is null where none is asked for.
    """

    namespace: str
    name: str
    port_name: str
    protocol: str
    family: str
    algorithm: str
    frontends: tuple[Frontend, ...]
    backends: tuple[Backend, ...]
    session_affinity: SessionAffinity
    internal_traffic_policy: str
    external_traffic_policy: str
    connections: int
    refused: int
    source_ranges: tuple[str, ...]
    mode: str
    all_unhealthy: bool
    probe: Probe | None


class Tcp(msgspec.Struct, frozen=True):
    """How TCP connections to a backend fare: counts since it became one, times in ms.

    `unanswered` had no answer to the first SYN for a second, or no way there; the backend
    `reset` open ones, and `lost` ones had no acknowledgement any more. Times are 0 where
    nothing was measured.
    """

    established: int
    refused: int
    unanswered: int
    reset: int
    lost: int
    handshake_ms: float
    rtt_ms: float


class BackendOfService(msgspec.Struct, frozen=True):
    """A backend by itself. `sets` are the traffic policies it may be used under now: Cluster, Local.

    The service fields are empty where the service port has gone before it. `health` is what speaks
    against it: probe-failed, ejected. `open_connections` and `probe` as in a listing of services. `tcp` is
    of this node's sockets, its pods' among them, `tcp_elsewhere` of all whose packets come in. `not_seen`
    says whose connections from here count in neither: dsr, where the backend's node counts them.
    """

    ip: str
    port: int
    protocol: str
    namespace: str
    name: str
    port_name: str
    state: str
    sets: tuple[str, ...]
    node: str
    zone: str
    weight: int
    connections: int
    health: tuple[str, ...]
    open_connections: int | None
    tcp: Tcp
    tcp_elsewhere: Tcp
    not_seen: tuple[str, ...]
    probe: BackendProbe | None


class Filter(typing.NamedTuple):
    """Which Services to show; None is every one."""

    namespace: str | None = None
    name: str | None = None

    def takes(self, service: model.ServiceName | None) -> bool:
        """Whether it is one of these."""
        if service is None:
            return self == Filter()
        return self.namespace in (None, service.namespace) and self.name in (None, service.name)


EVERYTHING: typing.Final = Filter()


def named(text: str) -> Filter:
    """Read NAME, of any namespace, or NAMESPACE/NAME. Raises ValueError."""
    namespace, slash, name = text.rpartition("/")
    if not name or (slash and not namespace) or "/" in namespace:
        raise ValueError(f"{text!r} is not a NAME or NAMESPACE/NAME of a Service")
    return Filter(namespace or None, name)


def services(
    found: inventory.Inventory,
    node_ports: inventory.NodePorts,
    wanted: Filter = EVERYTHING,
    noted: notes.Notes = notes.NOTHING,
) -> list[ServicePort]:
    """The service ports; of their backends those that a listing of endpoints would still have."""
    probed = Probed(noted)
    served_on = {
        family: tuple(
            addresses.text(address)
            for address in node_ports.addresses
            if addresses.family_of(address) is family
        )
        for family in model.Family
    }
    if node_ports.loopback:
        served_on[model.Family.IPV4] += (LOOPBACK,)
    return [_service(port, served_on, probed) for port in found.ports if wanted.takes(port.key.service)]


def backends(
    found: inventory.Inventory, wanted: Filter = EVERYTHING, noted: notes.Notes = notes.NOTHING
) -> list[BackendOfService]:
    """Every backend of every service port, also those that are on their way out."""
    probed = Probed(noted)
    listed = [
        _backend_of(port, backend, probed)
        for port in found.ports
        if wanted.takes(port.key.service)
        for backend in port.backends
    ]
    if wanted.takes(None):
        listed += [_backend_of(None, backend, probed) for backend in found.orphans]
    return listed


def backends_by_state(found: inventory.Inventory) -> dict[str, int]:
    """How many backends are in each state."""
    every = [*(backend for port in found.ports for backend in port.backends), *found.orphans]
    count = collections.Counter(state_of(backend) for backend in every)
    return {name: count[name] for name in STATES}


def warnings(found: inventory.Inventory) -> list[str]:
    """A line for each way in which service ports are known but not served."""
    lines = []
    if homeless := [port.key for port in found.ports if not port.frontends]:
        what = f"{_ports(len(homeless))} with no frontend, such as {homeless[0]}"
        lines.append(f"{what}: another service has their address")
    if sctp := [port.key for port in found.ports if port.key.protocol is model.Protocol.SCTP]:
        lines.append(f"{_ports(len(sctp))} of SCTP, such as {sctp[0]}: {NO_SCTP}")
    return lines


NO_SCTP: typing.Final = "what the node's own processes send is not balanced"


def _ports(count: int) -> str:
    return f"{count} service port{'' if count == 1 else 's'}"


def place(ip: str, port: int) -> str:
    """An address and port as one word; an IPv6 address is in brackets."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def state_name(state: tables.BackendState) -> str:
    """What a state is called in listings."""
    return state.name.lower()


def state_of(backend: inventory.Backend) -> str:
    """What a backend's state is called: what the API says, or `unhealthy` where it says ready in vain."""
    if backend.health and backend.state is tables.BackendState.ACTIVE:
        return UNHEALTHY
    return state_name(backend.state)


UNHEALTHY: typing.Final = "unhealthy"
STATES: typing.Final = (*(state.name.lower() for state in tables.BackendState if state), UNHEALTHY)


def health_names(bits: int) -> tuple[str, ...]:
    """What speaks against a backend, in words."""
    return tuple(name.name.lower().replace("_", "-") for name in tables.Health if name.name and bits & name)


def set_names(bits: int) -> tuple[str, ...]:
    """What backend sets are called in listings: by the traffic policy that draws from them."""
    return tuple(name for member, name in _SET_NAMES if bits & member)


_SET_NAMES: typing.Final = (
    (tables.BackendSet.CLUSTER.value, "Cluster"),
    (tables.BackendSet.LOCAL.value, "Local"),
)


UP, FAILING, DOWN, NOT_ASKED, OFF = "up", "failing", "down", "not-asked", "off"
_NOT_USED: typing.Final = "this node does not use it"


class Probed:
    """What the agent has noted of probes, to be found by service and by backend."""

    def __init__(self, noted: notes.Notes) -> None:
        self._ports = {
            (one.namespace, one.name, one.port_name): Probe(one.probe, noted.probes_off, "")
            for one in noted.asked
        }
        self._mistakes = {(one.namespace, one.name): Probe("", "", one.reason) for one in noted.mistakes}
        self._troubles = {one.who: one for one in noted.troubles}
        self._spared = {one.who: one.reason for one in noted.spared}

    def port(self, key: model.PortKey) -> Probe | None:
        """What is asked for at a service port; None where nothing is."""
        return self._ports.get((*key.service, key.port_name)) or self._mistakes.get((*key.service,))

    def backend(self, key: model.PortKey, backend: inventory.Backend, drawn_from: int) -> BackendProbe | None:
        """What probes say of a backend; None where nothing asks for any.

        `drawn_from` are the sets that some frontend of its service port draws from.
        """
        who = (*key.service, key.port_name, key.protocol.value, addresses.text(backend.address), backend.port)
        trouble = self._troubles.get(who)
        if trouble is not None:
            return _trouble(trouble)
        failed = bool(backend.health & tables.Health.PROBE_FAILED)
        asked = self._ports.get((*key.service, key.port_name))
        if asked is None or failed:
            # Whatever had no room in the notes, this is in the backend's row.
            return BackendProbe(DOWN) if failed else None
        if asked.off:
            return BackendProbe(OFF, reason=asked.off)
        if who in self._spared:
            return BackendProbe(NOT_ASKED, reason=self._spared[who])
        # One that is ejected is in no set, and is asked.
        used = backend.health or backend.sets & drawn_from
        return BackendProbe(UP) if used else BackendProbe(NOT_ASKED, reason=_NOT_USED)


def _trouble(known: notes.Trouble) -> BackendProbe:
    since = datetime.datetime.fromtimestamp(known.since_s, datetime.UTC)
    text = since.isoformat().replace("+00:00", "Z")
    return BackendProbe(FAILING if known.up else DOWN, known.in_a_row, known.needed, known.reason, text)


def _service(
    port: inventory.ServicePort, served_on: dict[model.Family, tuple[str, ...]], probed: Probed
) -> ServicePort:
    key = port.key
    affinity = SessionAffinity("ClientIP" if port.affinity_s else "None", port.affinity_s)
    return ServicePort(
        key.service.namespace,
        key.service.name,
        key.port_name,
        key.protocol.name,
        f"IPv{key.family.value}",
        port.algorithm.label,
        tuple(_frontend(frontend, served_on[key.family]) for frontend in port.frontends),
        tuple(_known(port, probed)),
        affinity,
        "Local" if port.internal_local else "Cluster",
        "Local" if port.external_local else "Cluster",
        port.connections,
        port.refused,
        tuple(map(str, port.source_ranges)),
        (model.PacketMode.DSR if any(one.dsr for one in port.frontends) else model.PacketMode.SNAT).value,
        _all_unhealthy(port),
        probed.port(key),
    )


def _all_unhealthy(port: inventory.ServicePort) -> bool:
    # An unhealthy one is in no set that has a healthy one.
    drawn_from = _drawn_from(port.frontends)
    return any(backend.health and backend.sets & drawn_from for backend in port.backends)


def _frontend(frontend: inventory.Frontend, served_on: tuple[str, ...]) -> Frontend:
    node_port = frontend.kind is tables.FrontendKind.NODE_PORT
    return Frontend(
        addresses.text(frontend.address),
        frontend.port,
        frontend.kind.label,
        served_on if node_port else msgspec.UNSET,
    )


def _drawn_from(frontends: Sequence[inventory.Frontend]) -> int:
    """The backend sets that clients of a service port draw from: those of the ClusterIP if it has one."""
    cluster_ips = [one for one in frontends if one.kind is tables.FrontendKind.CLUSTER_IP]
    return _sets(cluster_ips or frontends)


def _sets(frontends: Iterable[inventory.Frontend]) -> int:
    return functools.reduce(operator.or_, (frontend.set for frontend in frontends), 0)


def _known(port: inventory.ServicePort, probed: Probed) -> Iterable[Backend]:
    drawn_from = _drawn_from(port.frontends)
    of_any = _sets(port.frontends)
    return (
        Backend(
            addresses.text(backend.address),
            backend.port,
            backend.node,
            backend.zone,
            state_of(backend),
            backend.weight,
            backend.connections,
            bool(backend.sets & drawn_from),
            health_names(backend.health),
            backend.open,
            probed.backend(port.key, backend, of_any),
        )
        for backend in port.backends
        if backend.state is not tables.BackendState.DRAINING
    )


def _backend_of(
    port: inventory.ServicePort | None, backend: inventory.Backend, probed: Probed
) -> BackendOfService:
    key = port.key if port is not None else None
    try:
        protocol = model.Protocol(backend.protocol).name
    except ValueError:
        protocol = str(backend.protocol)
    return BackendOfService(
        addresses.text(backend.address),
        backend.port,
        protocol,
        key.service.namespace if key else "",
        key.service.name if key else "",
        key.port_name if key else "",
        state_of(backend),
        set_names(backend.sets),
        backend.node,
        backend.zone,
        backend.weight,
        backend.connections,
        health_names(backend.health),
        backend.open,
        _tcp(backend.fared.node),
        _tcp(backend.fared.elsewhere),
        (model.PacketMode.DSR.value,) if port is not None and _is_led_to_by_dsr(port, backend) else (),
        probed.backend(port.key, backend, _sets(port.frontends)) if port is not None else None,
    )


def _is_led_to_by_dsr(port: inventory.ServicePort, backend: inventory.Backend) -> bool:
    """Whether connections go there whose answers do not come by: to a backend elsewhere (bpf/dsr.h)."""
    if port.key.protocol is not model.Protocol.TCP or backend.sets & tables.BackendSet.HERE:
        return False
    return any(one.dsr and one.set == tables.BackendSet.CLUSTER for one in port.frontends)


def _tcp(fared: outcomes.Outcomes) -> Tcp:
    return Tcp(
        fared.established,
        fared.refused,
        fared.unanswered,
        fared.resets,
        fared.lost,
        round(fared.handshake_s * 1e3, 3),
        round(fared.srtt_us / 1e3, 3),
    )
