"""What the agent is told: one frozen value that all other code reads.

`loading.load` makes it from flags and files; nothing in it changes later.
"""

import dataclasses
import enum
import ipaddress
import pathlib
import typing

from lbproxy.core import model, node_rows

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

BPFFS = pathlib.Path("/sys/fs/bpf/lbproxy")
HEALTHZ_PORT = 10256
METRICS_PORT = 10249
ALLOW_EXTERNAL_IPS = "AllowServiceExternalIPs"  # the one feature gate that means something here


class ProxyMode(enum.StrEnum):
    """The kube-proxy mode being replaced: it decides which defaults and which block of the file apply."""

    IPTABLES = "iptables"
    IPVS = "ipvs"
    NFTABLES = "nftables"


class Xdp(enum.StrEnum):
    """How the packet path attaches to the uplinks beside tc ingress; OFF means tc only."""

    NATIVE = "native"
    GENERIC = "generic"
    OFF = "off"


class DetectLocalMode(enum.StrEnum):
    """How traffic from pods is told from other traffic (DET-1 to DET-4)."""

    CLUSTER_CIDR = "ClusterCIDR"
    NODE_CIDR = "NodeCIDR"
    BRIDGE_INTERFACE = "BridgeInterface"
    INTERFACE_NAME_PREFIX = "InterfaceNamePrefix"


class LogFormat(enum.StrEnum):
    """How log lines look."""

    TEXT = "text"
    JSON = "json"


class TakeOver(enum.StrEnum):
    """Whether the agent does what its Node tells it of the way from kube-proxy and back."""

    NEVER = "never"
    WHEN_TOLD = "when-told"


class ListenAddress(typing.NamedTuple):
    """An IP address and a port to serve on."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


HEALTHZ = ListenAddress("0.0.0.0", HEALTHZ_PORT)
METRICS = ListenAddress("127.0.0.1", METRICS_PORT)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MapRows:
    """How many rows each BPF map has room for."""

    frontends: int = 131_072
    slots: int = 65_536  # blocks of 16 slots
    backends: int = 131_072
    services: int = 131_072
    localities: int = 16_384
    node_addresses: int = 4_096
    sockets: int = 65_536  # a power of two: a row is found by masking the socket's cookie
    socket_spill: int = 8_192
    affinity: int = 32_768
    flows: int = 262_144  # two for each flow that the packet path translates, four if masqueraded
    flows_new: int = 16_384
    fragments: int = 4_096
    devices: int = 4_096
    source_ranges: int = 65_536
    netns_addresses: int = 8_192
    earlier_slots: int = 4_096
    tunnel_ends: int = 16_384
    backend_health: int = 16_384  # one or two of each backend that connections through this node have asked


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that flags and configuration decide; durations are in seconds."""

    # Where the state of the cluster comes from: `manifests` if set, else the API server.
    kubeconfig: pathlib.Path | None = None
    master: str = ""
    manifests: pathlib.Path | None = None
    config_file: pathlib.Path | None = None  # a change of it ends the agent (CLI-2)

    # Who we are.
    node_name: str
    node_ips: tuple[IPAddress, ...] = ()  # empty: as the Node object says
    bind_address: IPAddress | None = None  # replaces the node's first IP (NODE-3)

    # The datapath.
    cgroup: pathlib.Path | None = None  # None: no cgroup2 mount was found
    bpffs: pathlib.Path = BPFFS
    algorithm: model.Algorithm = model.Algorithm.RANDOM
    map_rows: MapRows = dataclasses.field(default_factory=MapRows)
    map_growth_limit: int = 16  # a map grows to at most so many times its rows; 1: not at all
    packet_path: bool = True
    devices: tuple[str, ...] = ()
    pod_devices: tuple[str, ...] = ()
    xdp: Xdp = Xdp.OFF
    mode: model.PacketMode = model.PacketMode.SNAT

    # Which service addresses are served, to whom.
    proxy_mode: ProxyMode = ProxyMode.IPTABLES
    nodeport_addresses: tuple[IPNetwork, ...] = ()  # empty, and not primary: every node address (NP-3)
    nodeport_primary: bool = False  # NodePorts on the node's primary addresses only (NP-4)
    localhost_node_ports: bool = True
    external_ips: bool = True  # EXT-5
    masquerade_all: bool = False
    masquerade_ports: tuple[int, int] | None = None  # first and last; None: what the node leaves free
    keep_client_address: bool = False  # towards pods of this node
    take_over: TakeOver = TakeOver.NEVER
    flow_timeouts: node_rows.Timeouts = node_rows.DEFAULT_TIMEOUTS
    detect_local_mode: DetectLocalMode = DetectLocalMode.CLUSTER_CIDR
    cluster_cidrs: tuple[IPNetwork, ...] = ()
    bridge_interface: str = ""
    interface_name_prefix: str = ""

    # When changes are applied.
    min_sync_period_s: float = 0.0
    sync_period_s: float = 30.0
    config_sync_period_s: float = 900.0

    # What is served and said.
    healthz_bind_address: ListenAddress | None = HEALTHZ  # None: not served
    metrics_bind_address: ListenAddress | None = METRICS  # None: not served
    bind_address_hard_fail: bool = False
    metrics_max_series: int = 10_000
    probe_concurrency: int = 256  # 0: no backend is probed
    probe_ca_file: pathlib.Path | None = None  # None: the system's authorities
    events: bool = True
    oom_score_adj: int = -999
    log_level: int = 0
    log_format: LogFormat = LogFormat.TEXT

    # Lines to log once at start.
    ignored: tuple[str, ...] = ()  # what was set and has no effect here
    warnings: tuple[str, ...] = ()
