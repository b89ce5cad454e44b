"""A v1 Service, as the API server or a person has written it, to its model.

What the API server would refuse of addresses rejects the Service, too: a manifest has no other judge. It
refuses external IPs that are `addresses.special`. It takes whatever ClusterIP is in its range, and load
balancers may be anywhere; but at an address that is nobody's (`addresses.nobodys`) lbproxy serves nothing:
its hooks are in all pods, where kube-proxy's rules are in the node's own network namespace alone.
"""

import functools
import sys
from collections.abc import Sequence

import msgspec

from lbproxy.core import addresses, events, fields, model, service_annotations, wire
from lbproxy.core.wording import quote

DEFAULT_AFFINITY_S = 10800
LONGEST_AFFINITY_S = 86400


def service(value: wire.Service, warnings: list[str]) -> events.Upsert:
    """Headless, ExternalName and other proxies' Services have no value. Raises FieldError."""
    metadata = value.metadata
    name = model.ServiceName(fields.namespace(metadata.namespace), fields.name(metadata.name, fields.LABEL))
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
    external_local = spec.external_traffic_policy == "Local" and _reached_from_outside(spec)
    ports = _service_ports(spec.ports or (), warnings)
    asked = service_annotations.read(metadata.annotations, ports, warnings)
    return events.Upsert(
        events.Kind.SERVICE,
        name,
        model.Service(
            name=name,
            cluster_ips=cluster_ips,
            external_ips=_external_ips(spec.external_ips, families, warnings),
            load_balancer_ips=_load_balancer_ips(ingress, families, warnings),
            ports=ports,
            affinity_s=_affinity_s(spec, warnings),
            internal_local=spec.internal_traffic_policy == "Local",
            external_local=external_local,
            algorithm=asked.algorithm,
            source_ranges=_source_ranges(spec.load_balancer_source_ranges, families, warnings),
            health_check_node_port=_health_check_node_port(spec, external_local, warnings),
            mode=asked.mode,
            weights=asked.weights,
            slow_start_s=asked.slow_start_s,
            zone_spill_over=asked.zone_spill_over,
            probes=asked.probes,
            probe_mistake=asked.probe_mistake,
            ejection=asked.outlier_ejection,
        ),
    )


def _cluster_ips(primary: str, spec: wire.ServiceSpec, warnings: list[str]) -> tuple[bytes, ...]:
    """Return one address for each family of the Service, in its order (SEL-10)."""
    texts = spec.cluster_ips or [primary]
    if not spec.ip_families:
        if len(texts) > 1:
            warnings.append(f"spec.ipFamilies: missing, so only {quote(primary)} is served")
        return (_cluster_ip("spec.clusterIP", primary),)
    found: dict[model.Family, bytes] = {}
    for index, (family_text, text) in enumerate(zip(spec.ip_families, texts, strict=False)):
        family = fields.FAMILIES.get(family_text)
        if family is None:
            warnings.append(f"spec.ipFamilies[{index}]: {quote(family_text)} is no IP family: passed over")
        elif text and family not in found:
            address = _cluster_ip(f"spec.clusterIPs[{index}]", text)
            if addresses.family_of(address) is not family:
                wrong = f"{quote(text)} is not an {family_text} address"
                raise fields.FieldError(f"spec.clusterIPs[{index}]: {wrong}")
            found[family] = address
    return tuple(found.values())


def _cluster_ip(field: str, text: str) -> bytes:
    address = addresses.parse(text)
    if address is None:
        raise fields.FieldError(f"{field}: {quote(text)} is not an IP address")
    if why := addresses.nobodys(address):
        raise fields.FieldError(f"{field}: {quote(text)} is {why}: no Service can have it")
    return address


def _external_ips(
    texts: Sequence[str | None] | None, families: set[model.Family], warnings: list[str]
) -> tuple[bytes, ...]:
    """Parse them; what is no address is skipped (EXT-4)."""
    found = []
    for index, text in enumerate(texts or ()):
        if not text:
            continue
        field = f"spec.externalIPs[{index}]"
        address = addresses.parse(text)
        if address is None:
            warnings.append(f"{field}: {quote(text)} is not an IP address: passed over")
        elif why := addresses.special(address):
            raise fields.FieldError(f"{field}: {quote(text)} is {why}: the API server refuses it")
        else:
            found.append(address)
    return _of(families, found)


def _load_balancer_ips(
    ingress: Sequence[wire.Ingress], families: set[model.Family], warnings: list[str]
) -> tuple[bytes, ...]:
    """Parse those that are to be served; bad ones are skipped (LB-3)."""
    found = []
    for index, entry in enumerate(ingress):
        address = addresses.parse(entry.ip) if entry.ip and entry.ip_mode in (None, "VIP") else None
        if address is None:
            continue
        if why := addresses.nobodys(address):
            field = f"status.loadBalancer.ingress[{index}].ip"
            warnings.append(f"{field}: {quote(entry.ip)} is {why}: passed over")
        else:
            found.append(address)
    return _of(families, found)


def _of(families: set[model.Family], found: Sequence[bytes]) -> tuple[bytes, ...]:
    """Those of the Service's families, each once."""
    return tuple(dict.fromkeys(address for address in found if addresses.family_of(address) in families))


def _service_ports(ports: Sequence[wire.ServicePort], warnings: list[str]) -> tuple[model.ServicePort, ...]:
    """Check and collect ports; the first of two that clash is served, as the API server allows no second."""
    result: list[model.ServicePort] = []
    for index, port in enumerate(ports):
        field = f"spec.ports[{index}]"
        name = sys.intern(port.name or "")
        if len(name) > 63:
            raise fields.FieldError(f"{field}.name: {quote(name)} is longer than 63 characters")
        protocol = fields.protocol(field, port.protocol)
        number = fields.port_number(field + ".port", port.port)
        node_port = port.node_port or 0
        if node_port:
            fields.port_number(field + ".nodePort", node_port)
        for other in result:
            if other.protocol is protocol and (other.name == name or other.port == number):
                same = f"name {quote(name)}" if other.name == name else f"port {number}"
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
        warnings.append(f"spec.sessionAffinity: {quote(spec.session_affinity)} is unknown: none is kept")
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
                warnings.append(f"{field}: {quote(text)} is not a CIDR: passed over")
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


# Most services have one of a few sets of ports: equal ones share one object, a tenth of all memory.
@functools.lru_cache(1024)
def _shared_service_ports(ports: tuple[model.ServicePort, ...]) -> tuple[model.ServicePort, ...]:
    return ports
