"""What kube-proxy 1.36 does with a new connection: a simple model, written from its contract.

Nothing here is taken from lbproxy's own code. Objects are dicts as the API server
sends them; the ids in comments are those of the contract. The iptables mode is what
`Config` means unless told otherwise; where the other mode differs, a verdict names
what that one would do in `also`.
"""

import collections.abc
import dataclasses
import enum
import ipaddress
import typing

Object = dict[str, typing.Any]
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
FAMILIES = {"IPv4": 4, "IPv6": 6}
PROXY_NAME = "service.kubernetes.io/service-proxy-name"
HEADLESS = "service.kubernetes.io/headless"
SERVICE_NAME = "kubernetes.io/service-name"
ZONE = "topology.kubernetes.io/zone"


class Kind(enum.StrEnum):
    """What becomes of a connection."""

    SERVED = "served"
    REJECT = "reject"
    DROP = "drop"
    UNTOUCHED = "untouched"


class Backend(typing.NamedTuple):
    """Where a connection ends."""

    address: str
    port: int


class Probe(typing.NamedTuple):
    """A new connection as this node's netfilter sees it."""

    source: str
    address: str
    port: int
    protocol: str = "TCP"
    device: str = ""  # what it came in on; empty: a process of this node


class Verdict(typing.NamedTuple):
    """What becomes of a probe; `masqueraded` are those backends that see the node as their client."""

    kind: Kind
    backends: frozenset[Backend] = frozenset()
    masqueraded: frozenset[Backend] = frozenset()
    affinity: bool = False
    also: frozenset[Kind] = frozenset()  # what kube-proxy's other mode would do


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The node, and how kube-proxy is configured there."""

    node: str
    local: frozenset[str]  # every address assigned to the node's interfaces, without loopback
    detect: str = "ClusterCIDR"
    cluster_cidrs: tuple[str, ...] = ()
    bridge: str = ""
    prefix: str = ""
    masquerade_all: bool = False
    nodeport_addresses: tuple[str, ...] = ()
    localhost: bool = True
    external_ips: bool = True
    nftables: bool = False


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """One endpoint of a service port, its conditions filled in (EP-1)."""

    backend: Backend
    ready: bool
    serving: bool
    terminating: bool
    local: bool
    zones: frozenset[str]
    nodes: frozenset[str]

    @property
    def leaving(self) -> bool:
        """Whether it may serve where nothing is ready (EP-3)."""
        return self.serving and self.terminating


class Oracle:
    """The verdicts of one node on a cluster's objects."""

    def __init__(self, config: Config, objects: collections.abc.Iterable[Object]) -> None:
        listed = list(objects)
        self.config = config
        self._slices = [one for one in listed if one["kind"] == "EndpointSlice"]
        nodes = [one for one in listed if one["kind"] == "Node" and one["metadata"]["name"] == config.node]
        self._node = nodes[0] if nodes else {"metadata": {}}
        self._frontends: dict[tuple[str, int, str], Frontend] = {}
        self._node_ports: dict[tuple[int, int, str], Frontend] = {}
        self._cluster_ips: set[str] = set()
        for service in listed:
            if service["kind"] == "Service" and _is_handled(service):
                self._add(service)

    def verdict(self, probe: Probe) -> Verdict:
        """Say what becomes of a probe."""
        found = self._find(probe)
        if found is None:
            return self._stray(probe)
        endpoints = self._endpoints(found)
        if not any(one.ready or one.leaving for one in endpoints):  # EP-8, REJ-1
            return self._vacant(found, probe)
        if found.kind == "LoadBalancer" and not self._admitted(found, probe):
            return Verdict(Kind.DROP)  # SR-2, SR-9
        chosen, masquerade = self._policy(found, endpoints, probe)
        if not chosen:
            return Verdict(Kind.DROP)  # REJ-4
        backends = frozenset(one.backend for one in chosen)
        masqueraded = {
            one.backend
            for one in chosen
            if (masquerade or self._is_hairpin(one, probe)) and one.backend.address not in self.config.local
        }
        return Verdict(Kind.SERVED, backends, frozenset(masqueraded), found.affinity)

    # --- frontends ---

    def _add(self, service: Object) -> None:
        spec = service["spec"]
        for family in FAMILIES.values():
            cluster_ip = _cluster_ip(spec, family)
            if not cluster_ip:  # SEL-9
                continue
            self._cluster_ips.add(cluster_ip)
            external = spec.get("externalIPs") or [] if self.config.external_ips else []
            ingress = service.get("status", {}).get("loadBalancer", {}).get("ingress") or []
            addresses = [
                ("LoadBalancer", one.get("ip", ""))
                for one in ingress
                if one.get("ipMode", "VIP") == "VIP"  # LB-2
            ]
            addresses += [("ExternalIP", one) for one in external] + [("ClusterIP", cluster_ip)]
            for port in spec.get("ports", []):
                protocol = port.get("protocol", "TCP")
                for kind, text in addresses:
                    address = canonical(text)
                    if address and address.version == family:
                        self._frontends[str(address), port["port"], protocol] = Frontend(
                            kind, service, port, family
                        )
                if port.get("nodePort"):  # SEL-7
                    self._node_ports[family, port["nodePort"], protocol] = Frontend(
                        "NodePort", service, port, family
                    )

    def _find(self, probe: Probe) -> "Frontend | None":
        exact = self._frontends.get((probe.address, probe.port, probe.protocol))
        if exact:
            return exact
        address = ipaddress.ip_address(probe.address)
        ported = self._node_ports.get((address.version, probe.port, probe.protocol))
        return ported if ported and self._has_node_ports(address) else None

    def _has_node_ports(self, address: IPAddress) -> bool:
        if address.is_loopback:
            if address.version == 6 or not self.config.localhost or self.config.nftables:
                return False  # NP-8, NP-9
        elif str(address) not in self.config.local:
            return False  # NP-1
        texts = self.config.nodeport_addresses or (("primary",) if self.config.nftables else ())
        if "primary" in texts:
            texts = tuple(f"{one}/{'32' if '.' in one else '128'}" for one in self._primary())
        ranges = [ipaddress.ip_network(text) for text in texts]
        ranges = [one for one in ranges if one.version == address.version]
        return not ranges or any(address in one for one in ranges)  # NP-6

    def _primary(self) -> list[str]:
        status = self._node.get("status", {})
        listed = [one["address"] for one in status.get("addresses", []) if one["type"] == "InternalIP"]
        found = {ipaddress.ip_address(one).version: one for one in reversed(listed)}
        return list(found.values())

    # --- without a backend ---

    def _stray(self, probe: Probe) -> Verdict:
        if probe.address not in self._cluster_ips:
            return Verdict(Kind.UNTOUCHED)
        alone, refused = Verdict(Kind.UNTOUCHED), Verdict(Kind.REJECT)  # CIP-4
        return _either(refused, alone) if self.config.nftables else _either(alone, refused)

    def _vacant(self, found: "Frontend", probe: Probe) -> Verdict:
        refused, alone, dropped = Verdict(Kind.REJECT), Verdict(Kind.UNTOUCHED), Verdict(Kind.DROP)
        if found.kind == "LoadBalancer" and not self._admitted(found, probe):  # SR-10
            return _either(dropped, refused) if self.config.nftables else _either(refused, dropped)
        if not probe.device and found.kind in ("LoadBalancer", "ExternalIP"):  # REJ-3
            return _either(refused, alone) if self.config.nftables else _either(alone, refused)
        return refused

    def _admitted(self, found: "Frontend", probe: Probe) -> bool:
        source = ipaddress.ip_address(probe.source)
        ranges = [
            one
            for text in found.service["spec"].get("loadBalancerSourceRanges") or []
            if (one := _network(text)) and one.version == found.family
        ]
        if not ranges or any(one.prefixlen == 0 or source in one for one in ranges):  # SR-6, SR-7
            return True
        primary = [ipaddress.ip_address(one) for one in self._primary()]
        own = [one for one in primary if any(one in allowed for allowed in ranges)]
        ingress = found.service["status"]["loadBalancer"]["ingress"]
        return bool(own) and probe.source in {one.get("ip") for one in ingress}  # SR-5

    # --- which backends ---

    def _policy(
        self, found: "Frontend", endpoints: list[Endpoint], probe: Probe
    ) -> tuple[list[Endpoint], bool]:
        """Return the set to choose from, and whether to masquerade whoever is chosen."""
        spec, pod = found.service["spec"], self._is_pod(found.family, probe)
        if found.kind == "ClusterIP":
            local = spec.get("internalTrafficPolicy") == "Local"
            masquerade = self.config.masquerade_all or pod is False  # MASQ-1, MASQ-2
            return (self._local(endpoints) if local else self._cluster(endpoints)), masquerade
        if not _is_external_local(spec):
            return self._cluster(endpoints), True  # ETP-2
        if pod:
            return self._cluster(endpoints), False  # ETP-4
        if probe.source in self.config.local or ipaddress.ip_address(probe.source).is_loopback:
            return self._cluster(endpoints), True  # ETP-5
        return self._local(endpoints), False  # ETP-3

    def _is_pod(self, family: int, probe: Probe) -> bool | None:
        """Whether the detector takes the source for a pod; None where there is no detector."""
        match self.config.detect:
            case "BridgeInterface":
                return probe.device == self.config.bridge
            case "InterfaceNamePrefix":
                return probe.device.startswith(self.config.prefix)
            case "NodeCIDR":
                cidrs = self._node.get("spec", {}).get("podCIDRs") or []
            case _:
                cidrs = list(self.config.cluster_cidrs)
        of_family = [one for text in cidrs if (one := ipaddress.ip_network(text)).version == family]
        if not of_family:
            return None  # DET-1
        return ipaddress.ip_address(probe.source) in of_family[0]

    def _is_hairpin(self, chosen: Endpoint, probe: Probe) -> bool:
        if self.config.nftables and not chosen.local:
            return False
        return chosen.backend.address == probe.source  # MASQ-5

    def _cluster(self, endpoints: list[Endpoint]) -> list[Endpoint]:
        ready = [one for one in endpoints if one.ready]
        if not ready:
            return [one for one in endpoints if one.leaving]  # EP-3, TOP-8
        zone = self._node["metadata"].get("labels", {}).get(ZONE, "")
        if all(one.nodes for one in ready):  # TOP-2
            here = [one for one in ready if self.config.node in one.nodes]
            if here:
                return here
        if zone and all(one.zones for one in ready):  # TOP-3
            here = [one for one in ready if zone in one.zones]
            if here:
                return here
        return ready

    def _local(self, endpoints: list[Endpoint]) -> list[Endpoint]:
        here = [one for one in endpoints if one.local]
        return [one for one in here if one.ready] or [one for one in here if one.leaving]  # EP-4, EP-9

    def _endpoints(self, found: "Frontend") -> list[Endpoint]:
        """Join the slices of a service port (ES-1 to ES-9)."""
        metadata = found.service["metadata"]
        name, protocol = found.port.get("name") or "", found.port.get("protocol", "TCP")
        joined: dict[Backend, Endpoint] = {}
        for one in self._slices:
            labels = one["metadata"].get("labels") or {}
            if one["metadata"]["namespace"] != metadata["namespace"] or HEADLESS in labels:
                continue
            if (
                labels.get(SERVICE_NAME) != metadata["name"]
                or FAMILIES.get(one["addressType"]) != found.family
            ):
                continue
            for port in one.get("ports") or []:
                if (
                    port.get("name") is not None
                    and port.get("port")
                    and (port["name"], port.get("protocol") or "TCP") == (name, protocol)
                ):
                    for entry in one.get("endpoints") or []:
                        self._join(joined, entry, port["port"])
        return list(joined.values())

    def _join(self, joined: dict[Backend, Endpoint], entry: Object, port: int) -> None:
        address = canonical(entry["addresses"][0]) if entry.get("addresses") else None
        if not address:
            return
        conditions, hints = entry.get("conditions") or {}, entry.get("hints") or {}
        fresh = Endpoint(
            Backend(str(address), port),
            ready=conditions.get("ready") is not False,
            serving=conditions.get("serving") is not False,
            terminating=conditions.get("terminating") is True,
            local=entry.get("nodeName") == self.config.node,  # ETP-10
            zones=frozenset(one["name"] for one in hints.get("forZones") or []),
            nodes=frozenset(one["name"] for one in hints.get("forNodes") or []),
        )
        if fresh.backend not in joined or not fresh.terminating:  # ES-8
            joined[fresh.backend] = fresh


@dataclasses.dataclass(frozen=True)
class Frontend:
    """An address and port of a service, of one family."""

    kind: str
    service: Object
    port: Object
    family: int

    @property
    def affinity(self) -> bool:
        """Whether a client stays with its backend."""
        return bool(self.service["spec"].get("sessionAffinity") == "ClientIP")


def canonical(text: str) -> IPAddress | None:
    """Parse an address as leniently as kube-proxy (SEL-13); None where it is none."""
    stripped = text.strip()
    if ":" not in stripped:
        parts = stripped.split(".")
        if len(parts) == 4 and all(part.isdecimal() for part in parts):
            stripped = ".".join(str(int(part)) for part in parts)
    try:
        return ipaddress.ip_address(stripped)
    except ValueError:
        return None


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    address, slash, bits = text.strip().partition("/")
    found = canonical(address)
    if not found or not slash or not bits.isdecimal() or int(bits) > found.max_prefixlen:
        return None
    return ipaddress.ip_network(f"{found}/{bits}", strict=False)


def _is_handled(service: Object) -> bool:
    spec = service["spec"]
    if PROXY_NAME in (service["metadata"].get("labels") or {}):
        return False  # SEL-4
    return spec.get("clusterIP", "") not in ("", "None") and spec.get("type") != "ExternalName"


def _cluster_ip(spec: Object, family: int) -> str:
    families = [FAMILIES[text] for text in spec.get("ipFamilies") or []]
    if not families:  # SEL-10
        only = canonical(spec["clusterIP"])
        return str(only) if only and only.version == family else ""
    addresses = spec.get("clusterIPs") or [spec["clusterIP"]]
    if family not in families or families.index(family) >= len(addresses):
        return ""
    return str(canonical(addresses[families.index(family)]) or "")


def _is_external_local(spec: Object) -> bool:
    """ETP-1."""
    if spec.get("type", "ClusterIP") == "ClusterIP" and not spec.get("externalIPs"):
        return False
    return bool(spec.get("externalTrafficPolicy") == "Local")


def _either(chosen: Verdict, other: Verdict) -> Verdict:
    return chosen._replace(also=frozenset({other.kind}))
