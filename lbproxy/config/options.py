"""Every setting of the agent, written down once.

The command line, the reading and writing of configuration files, validation,
docs/configuration.md and the Helm chart (`make chart`) are all made from `OPTIONS`;
kube-proxy's own settings are in `kube_proxy_options`. Defaults are written as the flag would be.
"""

import dataclasses
import enum
import typing

from lbproxy.config import config, kinds
from lbproxy.core import model

BLOCKS = ("iptables", "ipvs", "nftables")


class Group(enum.StrEnum):
    """A heading in the help and the documentation."""

    COMMON = "Commonly used"
    DATAPATH = "Datapath"
    SERVING = "Health, metrics and logs"
    ONCE = "Instead of running"
    KUBE_PROXY = "As kube-proxy has them"
    WITHOUT_EFFECT = "Accepted from kube-proxy, without effect"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One setting: how it is given, what it means, and whether it does anything here."""

    flags: tuple[str, ...] = ()  # the first is its name; none: only in files
    kube_fields: tuple[str, ...] = ()  # paths in KubeProxyConfiguration; of several blocks, the mode's counts
    own_field: str = ""  # path in LbproxyConfiguration
    type: kinds.ValueType[typing.Any] = kinds.TEXT
    default: str = ""
    metavar: str = ""  # what help calls the value, where the type's own word says less
    group: Group
    help: str = ""
    flag_help: str = ""  # what more is to be said of the flag, and of the field in a file
    file_help: str = ""
    no_effect: str = ""  # why it does nothing here; empty: it is honoured
    ignored_with_config: bool = False  # the flag yields to --config, as kube-proxy's does (CLI-1)
    zero_is_unset: bool = False  # a zero in a file means the default (CFG-1)

    @property
    def name(self) -> str:
        """What names the option in the table of settings."""
        return self.flags[0] if self.flags else (self.own_field or self.kube_fields[0])

    @property
    def help_of_flag(self) -> str:
        """What it means on the command line."""
        return "; ".join(filter(None, (self.help, self.flag_help)))

    @property
    def help_of_field(self) -> str:
        """What it means in a file."""
        return "; ".join(filter(None, (self.help, self.file_help)))

    @property
    def value_word(self) -> str:
        """What help calls the value."""
        return self.metavar or self.type.metavar


_EMPTY_FLAG: typing.Final = '"" disables'
_EMPTY_FIELD: typing.Final = '"" is the default, too'

OWN_OPTIONS = (
    Option(
        flags=("--config",),
        type=kinds.PATH,
        metavar="FILE",
        group=Group.COMMON,
        help="a KubeProxyConfiguration as in kube-proxy's ConfigMap, a LbproxyConfiguration, or both",
    ),
    Option(
        flags=("--manifests",),
        own_field="manifests",
        type=kinds.PATH,
        group=Group.COMMON,
        help="a file or folder of Services, EndpointSlices and Nodes to follow instead of an API server",
    ),
    Option(
        flags=("--kubeconfig",),
        kube_fields=("clientConnection.kubeconfig",),
        type=kinds.PATH,
        metavar="FILE",
        group=Group.COMMON,
        help="how to reach the API server; without it and --master: as a pod in the cluster",
        ignored_with_config=True,
    ),
    Option(
        flags=("--master",),
        type=kinds.NAME,
        metavar="URL",
        group=Group.COMMON,
        help="URL of the API server; replaces the one in the kubeconfig",
    ),
    Option(
        flags=("--node-name", "--hostname-override"),
        kube_fields=("hostnameOverride",),
        type=kinds.NAME,
        group=Group.COMMON,
        help="this node's name; the flag comes before the file, then the host name; trimmed and lower-cased",
    ),
    Option(
        flags=("--node-ip",),
        own_field="nodeIPs",
        type=kinds.IPS,
        group=Group.COMMON,
        help="an address of this node, instead of those of its Node object",
    ),
    Option(
        flags=("--algorithm",),
        own_field="algorithm",
        type=kinds.named({algorithm.label: algorithm for algorithm in model.Algorithm}),
        default="random",
        group=Group.COMMON,
        help="how a backend is chosen where the Service does not say",
    ),
    Option(
        flags=("--cgroup",),
        own_field="cgroup",
        type=kinds.PATH,
        group=Group.DATAPATH,
        help="the cgroup (v2) whose processes are served; default: the root of the cgroup2 mount",
    ),
    Option(
        flags=("--bpffs",),
        own_field="bpffs",
        type=kinds.PATH,
        default=str(config.BPFFS),
        group=Group.DATAPATH,
        help="where programs and maps are pinned; a bpffs is mounted if there is none",
    ),
    Option(
        flags=("--map-rows",),
        own_field="maps",
        type=kinds.MAP_ROWS,
        group=Group.DATAPATH,
        help="room in one of the maps, e.g. frontends=500000; there are "
        + ", ".join(config.MapRows.__annotations__),
    ),
    Option(
        flags=("--map-growth-limit",),
        own_field="mapGrowthLimit",
        type=kinds.integer(1, 1024),
        default="16",
        group=Group.DATAPATH,
        help="a map that fills up grows by itself, to at most so many times its --map-rows; 1: none does",
    ),
    Option(
        flags=("--packet-path",),
        own_field="packetPath",
        type=kinds.BOOL,
        default="true",
        group=Group.DATAPATH,
        help="attach to the devices of this network namespace; false: serve the sockets of the cgroup only",
    ),
    Option(
        flags=("--device",),
        own_field="devices",
        type=kinds.NAMES,
        metavar="DEV",
        group=Group.DATAPATH,
        help="an uplink that traffic from outside comes in on; "
        "default: those with a default route or an address of the node",
    ),
    Option(
        flags=("--pod-device",),
        own_field="podDevices",
        type=kinds.NAMES,
        metavar="PATTERN",
        group=Group.DATAPATH,
        help="pattern of pod-facing devices to serve packet by packet",
    ),
    Option(
        flags=("--xdp",),
        own_field="xdp",
        type=kinds.choice(config.Xdp),
        default="off",
        group=Group.DATAPATH,
        help="serve uplinks by XDP where their driver can, and by tc; off: by tc only",
    ),
    Option(
        flags=("--mode",),
        own_field="mode",
        type=kinds.choice(model.PacketMode),
        default="snat",
        group=Group.DATAPATH,
        help="how packets from outside reach backends on other nodes, where the Service does not say",
    ),
    Option(
        flags=("--masquerade-ports",),
        own_field="masqueradePorts",
        type=kinds.PORT_RANGE,
        group=Group.DATAPATH,
        help="ports for masqueraded flows; default: the most in a row that are no sockets' or NodePorts",
    ),
    Option(
        flags=("--keep-client-address",),
        own_field="keepClientAddress",
        type=kinds.BOOL,
        default="false",
        group=Group.DATAPATH,
        help="pods of this node see their client's address under Cluster policy too; kube-proxy masquerades",
    ),
    Option(
        flags=("--take-over",),
        own_field="takeOver",
        type=kinds.choice(config.TakeOver),
        default="never",
        group=Group.DATAPATH,
        help="when-told: remove kube-proxy's rules, or leave new flows to it again, when the annotation "
        "lbproxy.io/migrate of this node's Node says so; `lbproxy migrate cluster` writes it",
    ),
    Option(
        flags=("--healthz-bind-address",),
        kube_fields=("healthzBindAddress",),
        type=kinds.LISTEN,
        default=str(config.HEALTHZ),
        group=Group.SERVING,
        help="serve /healthz and /livez here; default with an IPv6 --bind-address: [::]:10256",
        flag_help=_EMPTY_FLAG,
        file_help=_EMPTY_FIELD,
        ignored_with_config=True,
    ),
    Option(
        flags=("--metrics-bind-address",),
        kube_fields=("metricsBindAddress",),
        type=kinds.LISTEN,
        default=str(config.METRICS),
        group=Group.SERVING,
        help="serve /metrics here; default with an IPv6 --bind-address: [::1]:10249",
        flag_help=_EMPTY_FLAG,
        file_help=_EMPTY_FIELD,
        ignored_with_config=True,
    ),
    Option(
        own_field="healthz",
        type=kinds.BOOL,
        default="true",
        group=Group.SERVING,
        help="false disables /healthz",
    ),
    Option(
        own_field="metrics",
        type=kinds.BOOL,
        default="true",
        group=Group.SERVING,
        help="false disables /metrics",
    ),
    Option(
        flags=("--metrics-max-series",),
        own_field="metricsMaxSeries",
        type=kinds.integer(0),
        default="10000",
        group=Group.SERVING,
        help="how many per-backend series /metrics shows at most",
    ),
    Option(
        flags=("--probe-concurrency",),
        own_field="probeConcurrency",
        type=kinds.integer(0, 4096),
        default="256",
        group=Group.SERVING,
        help="how many backends are probed at a time, where Services ask for it; 0: none ever is",
    ),
    Option(
        flags=("--probe-ca-file",),
        own_field="probeCAFile",
        type=kinds.PATH,
        group=Group.SERVING,
        help="authorities (PEM) to verify backends' certificates by, where Services ask for that; "
        "default: the system's",
    ),
    Option(
        flags=("--events",),
        own_field="events",
        type=kinds.BOOL,
        default="true",
        group=Group.SERVING,
        help="write Kubernetes Events",
    ),
    Option(
        flags=("-v", "--v"),
        kube_fields=("logging.verbosity",),
        type=kinds.integer(0, 100),
        default="0",
        group=Group.SERVING,
        help="log level: 0 what an operator wants to know, 2 each change, 4 each map write",
    ),
    Option(
        flags=("--logging-format", "--log-format"),
        kube_fields=("logging.format",),
        type=kinds.choice(config.LogFormat),
        default="text",
        group=Group.SERVING,
        help="how log lines look",
    ),
    Option(
        flags=("--write-config-to",),
        type=kinds.PATH,
        metavar="FILE",
        group=Group.ONCE,
        help="write the settings in effect to a file and exit",
    ),
    Option(
        flags=("--cleanup",),
        type=kinds.BOOL,
        default="false",
        group=Group.ONCE,
        help="the same as `lbproxy cleanup --kube-proxy`, and exit",
    ),
    Option(
        flags=("--init-only",),
        type=kinds.BOOL,
        default="false",
        group=Group.ONCE,
        help="mount the bpffs, load and attach the programs, and exit: an agent that starts next finds them",
    ),
)
