"""API objects to model values: Services, EndpointSlices and Nodes, from JSON bytes or YAML mappings.

A decoder returns an `Upsert`, whose value is None for objects that a service
proxy is to ignore and whose warnings say what was passed over, or raises
`DecodeError` where there is no telling what the object means. What the API
server would default is defaulted here, so that manifests may be as short.
"""

import datetime
import functools
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence

import msgspec

from lbproxy.core import (
    addresses,
    annotations,
    ejection,
    events,
    identity,
    model,
    port_probes,
    probe,
    ramp,
    spill,
    weights,
    wire,
)

ALGORITHM_ANNOTATION = "lbproxy.io/algorithm"
MODE_ANNOTATION = "lbproxy.io/mode"
WEIGHTS_ANNOTATION = "lbproxy.io/weights"
SLOW_START_ANNOTATION = "lbproxy.io/slow-start"
ZONE_ANNOTATION = "lbproxy.io/zone-spill-over"
EJECTION_ANNOTATION = "lbproxy.io/outlier-ejection"
PROBE_ANNOTATION = "lbproxy.io/probe"
PROBE_SETTINGS_ANNOTATION = "lbproxy.io/probe-settings"
DEFAULT_AFFINITY_S = 10800
LONGEST_AFFINITY_S = 86400

_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"(?=.{1,253}\Z)[a-z0-9](?:[-.a-z0-9]*[a-z0-9])?")
_PROTOCOLS = {None: model.Protocol.TCP} | {protocol.name: protocol for protocol in model.Protocol}
_FAMILIES = {"IPv4": model.Family.IPV4, "IPv6": model.Family.IPV6}
_ALGORITHMS = {algorithm.label: algorithm for algorithm in model.Algorithm}
_MODES = {mode.value: mode for mode in model.PacketMode}
_LEAST_CONNECTIONS_WITH_DSR = (
    "with mode dsr it holds for sockets that dial the ClusterIP; all other addresses need Maglev"
)
_NO_TEXT = "not a text: put it in quotes"  # YAML takes 1.4 for a number and `on` for true
_AUTOSCALER_TAINT = "ToBeDeletedByClusterAutoscaler"


_Choice = typing.TypeVar("_Choice")


class DecodeError(ValueError):
    """An object could not be understood; `reason` is one line that names the field."""

    def __init__(self, kind: events.Kind, name: events.ObjectName, reason: str, uid: str = "") -> None:
        super().__init__(f"{kind} {name}: {reason}")
        self.kind = kind
        self.name = name
        self.reason = reason
        self.uid = uid

    @property
    def event(self) -> events.Rejected:
        """What to tell the core: the object's last good version stays in force."""
        return events.Rejected(self.kind, self.name, self.reason, self.uid)


def service(raw: identity.Source) -> events.Upsert:
    """Decode a v1 Service; headless, ExternalName and other proxies' Services have no value."""
    return _decode(events.Kind.SERVICE, raw)


def endpoint_slice(raw: identity.Source) -> events.Upsert:
    """Decode a discovery.k8s.io/v1 EndpointSlice; one of no Service or of an unknown type has no value."""
    return _decode(events.Kind.ENDPOINT_SLICE, raw)


def node(raw: identity.Source) -> events.Upsert:
    """Decode a v1 Node."""
    return _decode(events.Kind.NODE, raw)


class _FieldError(ValueError):
    pass


class _Reader(typing.NamedTuple):
    api_version: str
    wire_type: type[typing.Any]
    decoder: msgspec.json.Decoder[typing.Any]
    build: Callable[[typing.Any, list[str]], events.Upsert]


def written(kind: str, raw: identity.Source) -> events.Upsert:
    """Decode an object that a person wrote: with what the API server would fill in (not ES-4)."""
    return _decode(events.Kind(kind), raw, _fill_in)


def _decode(
    kind: events.Kind, raw: identity.Source, prepare: Callable[[typing.Any], None] = lambda value: None
) -> events.Upsert:
    api_version, wire_type, decoder, build = _READERS[kind]
    warnings: list[str] = []
    try:
        # A raw of some other type is a bug of the caller's: let it raise.
        value = msgspec.convert(raw, wire_type) if isinstance(raw, dict) else decoder.decode(raw)
        if value.api_version not in (None, api_version) or value.kind not in (None, kind):
            raise _FieldError(_wrong_type(api_version, kind, value.api_version, value.kind))
        prepare(value)
        upsert = build(value, warnings)
        if (
            kind is events.Kind.SERVICE
            and upsert.value is not None
            and (isinstance(raw, dict) or annotations.SOUGHT in bytes(raw))
        ):
            _unknown_annotations(raw, warnings)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, _FieldError) as error:
        who = identity.identify(raw, kind)
        reason = _reason(error)
        if who.api_version not in ("", api_version) or who.kind != kind:
            # The better explanation for whatever does not fit.
            reason = _wrong_type(api_version, kind, who.api_version, who.kind)
        raise DecodeError(kind, who.name, reason, who.uid) from error
    if not warnings:
        return upsert
    return upsert._replace(warnings=tuple(warnings), uid=identity.identify(raw, kind).uid)


def _fill_in(value: wire.Service | wire.EndpointSlice | wire.Node) -> None:
    if isinstance(value, wire.EndpointSlice):
        for port in value.ports or ():
            port.name = port.name or ""
    elif isinstance(value, wire.Service) and value.spec:
        spec = value.spec
        spec.cluster_ips = spec.cluster_ips or ([spec.cluster_ip] if spec.cluster_ip else None)
        families = spec.ip_families or []
        more = (spec.cluster_ips or [])[len(families) :]
        spec.ip_families = families + ["IPv6" if ":" in text else "IPv4" for text in more]


def _service(value: wire.Service, warnings: list[str]) -> events.Upsert:
    metadata = value.metadata
    name = model.ServiceName(_namespace(metadata.namespace), _name(metadata.name, _LABEL))
    spec = value.spec or wire.ServiceSpec()
    cluster_ip = spec.cluster_ip or (spec.cluster_ips[0] if spec.cluster_ips else "")
    if (
        cluster_ip in ("", "None")
        or spec.type == "ExternalName"
        or (metadata.labels and metadata.labels.proxy_name is not msgspec.UNSET)
    ):
        return events.Upsert(events.Kind.SERVICE, name, None)
    cluster_ips = _cluster_ips(cluster_ip, spec, warnings)
    families = {addresses.family_of(address) for address in cluster_ips}
    ingress = (value.status and value.status.load_balancer and value.status.load_balancer.ingress) or ()
    load_balancer_ips = [entry.ip for entry in ingress if entry.ip_mode in (None, "VIP")]
    external_local = spec.external_traffic_policy == "Local" and _reached_from_outside(spec)
    said = metadata.annotations or wire.ServiceAnnotations()
    ports = _service_ports(spec.ports or (), warnings)
    algorithm = _annotated(ALGORITHM_ANNOTATION, said.algorithm, _ALGORITHMS, warnings)
    mode = _annotated(MODE_ANNOTATION, said.mode, _MODES, warnings)
    if mode is model.PacketMode.DSR and algorithm is model.Algorithm.LEAST_CONNECTIONS:
        warnings.append(f"metadata.annotations[{ALGORITHM_ANNOTATION}]: {_LEAST_CONNECTIONS_WITH_DSR}")
    probes, mistake = _probes(said, ports, warnings)
    return events.Upsert(
        events.Kind.SERVICE,
        name,
        model.Service(
            name=name,
            cluster_ips=cluster_ips,
            external_ips=_external_ips(spec.external_ips, families, warnings),
            load_balancer_ips=_outside_addresses(load_balancer_ips, families),
            ports=ports,
            affinity_s=_affinity_s(spec, warnings),
            internal_local=spec.internal_traffic_policy == "Local",
            external_local=external_local,
            algorithm=algorithm,
            source_ranges=_source_ranges(spec.load_balancer_source_ranges, families, warnings),
            health_check_node_port=_health_check_node_port(spec, external_local, warnings),
            mode=mode,
            weights=_weights(said.weights, warnings),
            slow_start_s=_number(SLOW_START_ANNOTATION, said.slow_start, ramp.parse_s, warnings),
            zone_spill_over=_number(ZONE_ANNOTATION, said.zone_spill_over, spill.parse, warnings),
            probes=probes,
            probe_mistake=mistake,
            ejection=_ejection(said.outlier_ejection, warnings),
        ),
    )


def _cluster_ips(primary: str, spec: wire.ServiceSpec, warnings: list[str]) -> tuple[bytes, ...]:
    """Return one address for each family of the Service, in its order (SEL-10)."""
    texts = spec.cluster_ips or [primary]
    if not spec.ip_families:
        if len(texts) > 1:
            warnings.append(f"spec.ipFamilies: missing, so only {_quote(primary)} is served")
        return (_cluster_ip("spec.clusterIP", primary),)
    found: dict[model.Family, bytes] = {}
    for index, (family_text, text) in enumerate(zip(spec.ip_families, texts, strict=False)):
        family = _FAMILIES.get(family_text)
        if family is None:
            warnings.append(f"spec.ipFamilies[{index}]: {_quote(family_text)} is no IP family: passed over")
        elif text and family not in found:
            address = _cluster_ip(f"spec.clusterIPs[{index}]", text)
            if addresses.family_of(address) is not family:
                raise _FieldError(f"spec.clusterIPs[{index}]: {_quote(text)} is not an {family_text} address")
            found[family] = address
    return tuple(found.values())


def _cluster_ip(field: str, text: str) -> bytes:
    address = addresses.parse(text)
    if address is None:
        raise _FieldError(f"{field}: {_quote(text)} is not an IP address")
    return address


def _external_ips(
    texts: Sequence[str | None] | None, families: set[model.Family], warnings: list[str]
) -> tuple[bytes, ...]:
    warnings += [
        f"spec.externalIPs[{index}]: {_quote(text)} is not an IP address: passed over"
        for index, text in enumerate(texts or ())
        if text and addresses.parse(text) is None
    ]
    return _outside_addresses(texts, families)


def _outside_addresses(texts: Sequence[str | None] | None, families: set[model.Family]) -> tuple[bytes, ...]:
    """Parse external or load balancer IPs; bad ones are skipped (EXT-4, LB-3)."""
    if not texts:
        return ()
    parsed = (addresses.parse(text) for text in texts if text)
    return tuple(
        dict.fromkeys(address for address in parsed if address and addresses.family_of(address) in families)
    )


def _service_ports(ports: Sequence[wire.ServicePort], warnings: list[str]) -> tuple[model.ServicePort, ...]:
    """Check and collect ports; the first of two that clash is served, as the API server allows no second."""
    result: list[model.ServicePort] = []
    for index, port in enumerate(ports):
        field = f"spec.ports[{index}]"
        name = sys.intern(port.name or "")
        if len(name) > 63:
            raise _FieldError(f"{field}.name: {_quote(name)} is longer than 63 characters")
        protocol = _protocol(field, port.protocol)
        number = _port_number(field + ".port", port.port)
        node_port = port.node_port or 0
        if node_port:
            _port_number(field + ".nodePort", node_port)
        for other in result:
            if other.protocol is protocol and (other.name == name or other.port == number):
                same = f"name {_quote(name)}" if other.name == name else f"port {number}"
                warnings.append(f"{field}: has the {same} of an earlier {protocol.name} port: passed over")
                break
            if other.protocol is protocol and node_port and other.node_port == node_port:
                warnings.append(
                    f"{field}.nodePort: {node_port} is an earlier {protocol.name} port's: passed over"
                )
                node_port = 0
        else:
            result.append(model.ServicePort(name, protocol, number, node_port))
    return _shared_service_ports(tuple(result))


def _affinity_s(spec: wire.ServiceSpec, warnings: list[str]) -> int:
    if spec.session_affinity in (None, "", "None"):
        return 0
    if spec.session_affinity != "ClientIP":
        warnings.append(f"spec.sessionAffinity: {_quote(spec.session_affinity)} is unknown: none is kept")
        return 0
    config = spec.session_affinity_config
    timeout_s = config.client_ip.timeout_seconds if config and config.client_ip else None
    if timeout_s is None:
        return DEFAULT_AFFINITY_S
    if not 1 <= timeout_s <= LONGEST_AFFINITY_S:
        field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
        warnings.append(
            f"{field}: {timeout_s} is not in 1..{LONGEST_AFFINITY_S}: {DEFAULT_AFFINITY_S} is used"
        )
        return DEFAULT_AFFINITY_S
    return timeout_s


def _reached_from_outside(spec: wire.ServiceSpec) -> bool:
    """Whether externalTrafficPolicy means anything (ETP-1)."""
    return spec.type in ("NodePort", "LoadBalancer") or (
        spec.type in (None, "", "ClusterIP") and bool(spec.external_ips)
    )


def _annotated(
    annotation: str, text: object, choices: Mapping[str, _Choice], warnings: list[str]
) -> _Choice | None:
    if text is msgspec.UNSET:
        return None
    chosen = choices.get(text) if isinstance(text, str) else None
    if chosen is None:
        # A typo must not take a service down.
        choice = " or ".join(sorted(choices))
        wrong = f"not {choice}" if isinstance(text, str) else _NO_TEXT
        warnings.append(f"metadata.annotations[{annotation}]: {_quote(text)} is {wrong}: the default is used")
    return chosen


def _number(annotation: str, text: object, parse: Callable[[str], float], warnings: list[str]) -> float:
    """Return 0 where there is none, or none that is understood."""
    if text is msgspec.UNSET:
        return 0.0
    try:
        if not isinstance(text, str):
            raise ValueError(_NO_TEXT)
        return parse(text)
    except ValueError as error:
        warnings.append(f"metadata.annotations[{annotation}]: {_quote(text)} is {error}: passed over")
        return 0.0


def _weights(text: object, warnings: list[str]) -> model.Weights | None:
    if text is msgspec.UNSET:
        return None
    field = f"metadata.annotations[{WEIGHTS_ANNOTATION}]"
    if not isinstance(text, str):
        warnings.append(f"{field}: {_quote(text)} is {_NO_TEXT}: all weights are equal")
        return None
    said, problems = weights.parse(text)
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        warnings.append(f"{field}: {problems[0]}{more}: passed over")
    return said


def _probes(
    said: wire.ServiceAnnotations, ports: Sequence[model.ServicePort], warnings: list[str]
) -> tuple[port_probes.PortProbes | None, str]:
    """The probes of a Service's ports, or what is wrong with them."""
    asked, settings = said.probe, said.probe_settings
    if asked is msgspec.UNSET:
        if settings is not msgspec.UNSET:
            field = f"metadata.annotations[{PROBE_SETTINGS_ANNOTATION}]"
            warnings.append(f"{field}: without {PROBE_ANNOTATION}: passed over")
        return None, ""
    try:
        if not isinstance(asked, str):
            raise probe.ProbeError(_NO_TEXT)
        if not isinstance(settings, str | msgspec.UnsetType):
            raise probe.SettingsError(_NO_TEXT)
        found = _shared_probes(asked, settings or "")
        _check_ports(found, {port.name: port.protocol.name for port in ports}, asked)
    except probe.ProbeError as error:
        of_settings = isinstance(error, probe.SettingsError)
        annotation = PROBE_SETTINGS_ANNOTATION if of_settings else PROBE_ANNOTATION
        why = f"{_quote(settings if of_settings else asked)}: {error}"
        warnings.append(f"metadata.annotations[{annotation}]: {why}: backends are not probed")
        return None, f"{annotation}: {why}"
    return found, ""


def _check_ports(probes: port_probes.PortProbes, protocols: Mapping[str, str], asked: str) -> None:
    """Raise ProbeError where a probe is of no port that the Service has; `asked` is what says the probes."""
    for name, found in probes.named:
        if name not in protocols:
            kind = probe.ProbeError if name in port_probes.names(asked) else probe.SettingsError
            raise kind(f"the Service has no port {name}")
        if found is not None and not found.suits(protocols[name]):
            raise probe.ProbeError(f"port {name}: asks at {found.protocol} ports, and that is none")
    others, named = probes.others, {name for name, _ in probes.named}
    left = [protocol for name, protocol in protocols.items() if name not in named]
    if others is not None and not probes.shared and not any(map(others.suits, left)):
        more = " that no line names" if named else ""
        raise probe.ProbeError(f"asks at {others.protocol} ports, and the Service has none{more}")


def _ejection(text: object, warnings: list[str]) -> ejection.Ejection | None:
    if text is msgspec.UNSET:
        return None
    try:
        if not isinstance(text, str):
            raise ejection.EjectionError(_NO_TEXT)
        return ejection.parse(text)
    except ejection.EjectionError as error:
        field = f"metadata.annotations[{EJECTION_ANNOTATION}]"
        warnings.append(f"{field}: {_quote(text)}: {error}: no backend is ejected")
        return None


def _unknown_annotations(raw: identity.Source, warnings: list[str]) -> None:
    unknown = annotations.unknown(raw)
    if unknown:
        meant = annotations.meant(unknown[0])
        advice = f", did you mean {meant}?" if meant else ""
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        warnings.append(
            f"metadata.annotations[{_quote(unknown[0])}]: unknown annotation{advice}{more}: passed over"
        )


def _source_ranges(
    texts: Sequence[str | None] | None, families: set[model.Family], warnings: list[str]
) -> tuple[model.SourceRange, ...]:
    """Parse the ranges of the Service's families; bad ones are skipped (SR-6), empty ones without a word."""
    found: dict[model.SourceRange, None] = {}
    for index, text in enumerate(texts or ()):
        trimmed = (text or "").strip()
        network = addresses.parse_cidr(trimmed)
        if network is None:
            if trimmed:
                field = f"spec.loadBalancerSourceRanges[{index}]"
                warnings.append(f"{field}: {_quote(text)} is not a CIDR: passed over")
        elif network.family in families:
            found[model.SourceRange(network.base, network.prefix_length)] = None
    return tuple(found)


def _health_check_node_port(spec: wire.ServiceSpec, external_local: bool, warnings: list[str]) -> int:
    """Return the port to answer health checks on, 0 where there is none to be (HC-1)."""
    number = spec.health_check_node_port or 0
    if not number or not external_local or spec.type != "LoadBalancer":
        return 0
    if not 1 <= number <= 65535:
        warnings.append(f"spec.healthCheckNodePort: {number} is not in 1..65535: none is served")
        return 0
    return number


def _endpoint_slice(value: wire.EndpointSlice, warnings: list[str]) -> events.Upsert:
    metadata = value.metadata
    labels = metadata.labels
    name = events.ObjectName(_namespace(metadata.namespace), _name(metadata.name, _SUBDOMAIN))
    family = _FAMILIES.get(value.address_type or "")
    if labels is None or not labels.service_name or labels.headless is not msgspec.UNSET or family is None:
        return events.Upsert(events.Kind.ENDPOINT_SLICE, name, None)
    trigger_time = metadata.annotations.trigger_time if metadata.annotations else None
    return events.Upsert(
        events.Kind.ENDPOINT_SLICE,
        name,
        model.EndpointSlice(
            namespace=name.namespace,
            name=name.name,
            service=model.ServiceName(name.namespace, sys.intern(labels.service_name)),
            family=family,
            ports=_slice_ports(value.ports or (), warnings),
            endpoints=_endpoints(value.endpoints or (), family, warnings),
            trigger_time_s=_unix_time_s(trigger_time) if isinstance(trigger_time, str) else 0.0,
        ),
    )


def _slice_ports(ports: Sequence[wire.SlicePort], warnings: list[str]) -> tuple[model.SlicePort, ...]:
    result = []
    for index, port in enumerate(ports):
        if port.name is None:
            warnings.append(f'ports[{index}].name: missing: passed over (an unnamed port has the name "")')
        elif port.port:
            number = _port_number(f"ports[{index}].port", port.port)
            protocol = _protocol(f"ports[{index}]", port.protocol)
            result.append(model.SlicePort(sys.intern(port.name), protocol, number))
    return _shared_slice_ports(tuple(result))


def _endpoints(
    endpoints: Sequence[wire.Endpoint], family: model.Family, warnings: list[str]
) -> tuple[model.Endpoint, ...]:
    result = []
    bad = []
    for index, endpoint in enumerate(endpoints):
        if not endpoint.addresses:
            continue
        address = addresses.parse(endpoint.addresses[0])
        if address is None or addresses.family_of(address) is not family:
            bad.append(index)
            continue
        ready, serving, terminating = True, True, False
        if endpoint.conditions is not None:
            conditions = endpoint.conditions
            ready = conditions.ready is not False
            serving = conditions.serving is not False
            terminating = conditions.terminating is True
        hints = endpoint.hints
        result.append(
            model.Endpoint(
                address,
                ready,
                serving,
                terminating,
                _shared_place(
                    _interned(endpoint.node_name),
                    _interned(endpoint.zone),
                    _hinted(hints.for_zones) if hints else (),
                    _hinted(hints.for_nodes) if hints else (),
                ),
            )
        )
    if bad:
        text = _quote((endpoints[bad[0]].addresses or [""])[0])
        more = f", nor {len(bad) - 1} more" if len(bad) > 1 else ""
        warnings.append(
            f"endpoints[{bad[0]}].addresses[0]: {text} is not an IPv{family.value} address{more}: passed over"
        )
    return tuple(result)


def _hinted(hints: Sequence[wire.Hint] | None) -> tuple[str, ...]:
    return tuple([_interned(hint.name) for hint in hints]) if hints else ()


def _unix_time_s(rfc3339: str) -> float:
    """Return 0 where the text is no time with an offset (NPL-1)."""
    try:
        time = datetime.datetime.fromisoformat(rfc3339)
    except ValueError:
        return 0.0
    return time.timestamp() if time.tzinfo else 0.0


def _node(value: wire.Node, _warnings: list[str]) -> events.Upsert:
    metadata = value.metadata
    name = events.ObjectName("", _name(metadata.name, _SUBDOMAIN))
    spec = value.spec or wire.NodeSpec()
    listed = (value.status and value.status.addresses) or ()
    parsed = [
        addresses.parse(entry.address or "")
        for wanted in ("InternalIP", "ExternalIP")
        for entry in listed
        if entry.type == wanted
    ]
    return events.Upsert(
        events.Kind.NODE,
        name,
        model.Node(
            name=name.name,
            addresses=tuple(dict.fromkeys(address for address in parsed if address)),
            zone=_interned(metadata.labels.zone) if metadata.labels else "",
            pod_cidrs=tuple(spec.pod_cidrs or ([spec.pod_cidr] if spec.pod_cidr else ())),
            eligible=metadata.deletion_timestamp is None
            and all(taint.key != _AUTOSCALER_TAINT for taint in spec.taints or ()),
            deleting=metadata.deletion_timestamp is not None,
            migrate=str(metadata.annotations.migrate or "") if metadata.annotations else "",
            proxy=str(metadata.labels.proxy or "") if metadata.labels else "",
        ),
    )


def _namespace(text: str | None) -> str:
    if not text:
        return identity.DEFAULT_NAMESPACE
    if not _LABEL.fullmatch(text):
        raise _FieldError(f"metadata.namespace: {_quote(text)} is not a DNS label of at most 63 characters")
    return sys.intern(text)


def _name(text: str, pattern: re.Pattern[str]) -> str:
    if not pattern.fullmatch(text):
        what = "DNS label of at most 63" if pattern is _LABEL else "DNS subdomain of at most 253"
        raise _FieldError(f"metadata.name: {_quote(text)} is not a {what} characters")
    # Services are named again by their slices; the names of slices do not repeat.
    return sys.intern(text) if pattern is _LABEL else text


def _protocol(field: str, text: str | None) -> model.Protocol:
    protocol = _PROTOCOLS.get(text)
    if protocol is None:
        raise _FieldError(f"{field}.protocol: {_quote(text)} is not TCP, UDP or SCTP")
    return protocol


def _port_number(field: str, number: int) -> int:
    if not 1 <= number <= 65535:
        raise _FieldError(f"{field}: {number} is not in 1..65535")
    return number


# Most services have one of a few sets of ports: equal ones share one object, a tenth of all memory.
@functools.lru_cache(1024)
def _shared_service_ports(ports: tuple[model.ServicePort, ...]) -> tuple[model.ServicePort, ...]:
    return ports


# A relist compares every probe with the one that is known: the same object is equal at once.
@functools.lru_cache(1024)
def _shared_probes(asked: str, settings: str) -> port_probes.PortProbes:
    return port_probes.parse(asked, settings)


@functools.lru_cache(1024)
def _shared_slice_ports(ports: tuple[model.SlicePort, ...]) -> tuple[model.SlicePort, ...]:
    return ports


@functools.lru_cache(8192)
def _shared_place(
    node_name: str, zone: str, zone_hints: tuple[str, ...], node_hints: tuple[str, ...]
) -> model.Place:
    return model.Place(node_name, zone, zone_hints, node_hints)


def _interned(text: str | None) -> str:
    """Share one object for a name that thousands of endpoints repeat."""
    if not text:
        return ""
    return sys.intern(text) if text.isascii() else sys.intern(text.encode("ascii", "replace").decode())


def _quote(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:76]}..."


def _wrong_type(api_version: str, kind: str, found_version: str | None, found_kind: str | None) -> str:
    found = f"{found_version or api_version} {found_kind or kind}"
    return f"apiVersion, kind: {_quote(found)} is not understood, {api_version} {kind} is"


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"invalid UTF-8: {error.reason}"
    text = " ".join(str(error).replace("`", "").split())
    # msgspec's "Expected int, got str - at $.spec.ports[0].port".
    problem, at, path = text.rpartition(" - at $")
    return f"{path.lstrip('.') or 'object'}: {problem}" if at else text


def _reader(
    api_version: str, wire_type: type[typing.Any], build: Callable[[typing.Any, list[str]], events.Upsert]
) -> _Reader:
    return _Reader(api_version, wire_type, msgspec.json.Decoder(wire_type), build)


_READERS: Mapping[events.Kind, _Reader] = {
    events.Kind.SERVICE: _reader("v1", wire.Service, _service),
    events.Kind.ENDPOINT_SLICE: _reader("discovery.k8s.io/v1", wire.EndpointSlice, _endpoint_slice),
    events.Kind.NODE: _reader("v1", wire.Node, _node),
}

DECODERS: Mapping[str, Callable[[identity.Source], events.Upsert]] = {
    events.Kind.SERVICE: service,
    events.Kind.ENDPOINT_SLICE: endpoint_slice,
    events.Kind.NODE: node,
}
identify = identity.identify
