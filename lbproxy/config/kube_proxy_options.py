"""kube-proxy's own settings (contract sections 24 and 25), and what each means here."""

import typing

from lbproxy.config import config, kinds
from lbproxy.config.options import OWN_OPTIONS, Group, Option

_CONNTRACK = "services need no conntrack here, so its limits are left as they are"
_IPVS = "IPVS is not used"


def _honoured(
    flag: str,
    *fields: str,
    type: kinds.ValueType[typing.Any],
    default: str = "",
    help: str,
    zero: bool = False,
) -> Option:
    return Option(
        flags=(flag,),
        kube_fields=fields,
        type=type,
        default=default,
        group=Group.KUBE_PROXY,
        help=help,
        ignored_with_config=True,
        zero_is_unset=zero,
    )


def _no_effect(
    flag: str,
    *fields: str,
    why: str,
    type: kinds.ValueType[typing.Any] = kinds.TEXT,
    default: str = "",
    wins: bool = False,
    zero: bool = False,
) -> Option:
    return Option(
        flags=(flag,) if flag else (),
        kube_fields=fields,
        type=type,
        default=default,
        group=Group.WITHOUT_EFFECT,
        no_effect=why,
        ignored_with_config=not wins,
        zero_is_unset=zero,
    )


KUBE_PROXY_OPTIONS = (
    _honoured(
        "--proxy-mode",
        "mode",
        type=kinds.choice(config.ProxyMode, config.ProxyMode.IPTABLES, fold_case=True),
        default="iptables",
        help="the mode being replaced: which block of the file counts, and which NodePort defaults",
    ),
    _honoured(
        "--bind-address",
        "bindAddress",
        type=kinds.IP,
        default="0.0.0.0",
        help="a specific address replaces the node's first IP; nothing is bound to it",
    ),
    _honoured(
        "--bind-address-hard-fail",
        "bindAddressHardFail",
        type=kinds.BOOL,
        default="false",
        help="exit if the health or metrics address cannot be bound, instead of trying again",
    ),
    Option(
        flags=("--healthz-port",),
        type=kinds.integer(0, 65535),
        default="10256",
        group=Group.KUBE_PROXY,
        help="deprecated: port of --healthz-bind-address if that names none; 0 disables",
        ignored_with_config=True,
    ),
    Option(
        flags=("--metrics-port",),
        type=kinds.integer(0, 65535),
        default="10249",
        group=Group.KUBE_PROXY,
        help="deprecated: port of --metrics-bind-address if that names none; 0 disables",
        ignored_with_config=True,
    ),
    _honoured(
        "--nodeport-addresses",
        "nodePortAddresses",
        type=kinds.NODE_PORT_RANGES,
        help="node addresses that serve NodePorts, or primary; default: all, in nftables mode primary",
    ),
    _honoured(
        "--iptables-localhost-nodeports",
        "iptables.localhostNodePorts",
        type=kinds.BOOL,
        default="true",
        help="serve NodePorts on 127.0.0.0/8 too; never in ipvs and nftables mode",
    ),
    _honoured(
        "--iptables-sync-period",
        "iptables.syncPeriod",
        "nftables.syncPeriod",
        type=kinds.POSITIVE_DURATION,
        default="30s",
        help="a failed write to the kernel is tried again after it; after twice as long /healthz says 503",
        zero=True,
    ),
    _honoured(
        "--iptables-min-sync-period",
        "iptables.minSyncPeriod",
        "nftables.minSyncPeriod",
        type=kinds.DURATION,
        default="0",
        help="pause between two rounds of changes; kube-proxy has 1s, here changes apply at once",
        zero=True,
    ),
    _honoured(
        "--ipvs-sync-period",
        "ipvs.syncPeriod",
        type=kinds.POSITIVE_DURATION,
        default="30s",
        help="--iptables-sync-period where --proxy-mode is ipvs",
        zero=True,
    ),
    _honoured(
        "--ipvs-min-sync-period",
        "ipvs.minSyncPeriod",
        type=kinds.DURATION,
        default="0",
        help="--iptables-min-sync-period where --proxy-mode is ipvs",
        zero=True,
    ),
    _honoured(
        "--feature-gates",
        "featureGates",
        type=kinds.GATES,
        help=f"{config.ALLOW_EXTERNAL_IPS}=false: external IPs are not served; other gates have no effect",
    ),
    _honoured(
        "--oom-score-adj",
        "oomScoreAdj",
        type=kinds.integer(-1000, 1000),
        default="-999",
        help="how soon the kernel may end the agent for want of memory; a failure to set it is logged",
    ),
    _honoured(
        "--masquerade-all",
        "iptables.masqueradeAll",
        "nftables.masqueradeAll",
        type=kinds.BOOL,
        default="false",
        help="masquerade every connection to a ClusterIP",
    ),
    _honoured(
        "--cluster-cidr",
        "clusterCIDR",
        type=kinds.TEXT,
        help="the pods' CIDR, or one of each family, comma-separated",
    ),
    _honoured(
        "--detect-local-mode",
        "detectLocalMode",
        type=kinds.choice(config.DetectLocalMode, config.DetectLocalMode.CLUSTER_CIDR),
        default="ClusterCIDR",
        help="how traffic from pods is told from other traffic",
    ),
    _honoured(
        "--pod-bridge-interface",
        "detectLocal.bridgeInterface",
        type=kinds.NAME,
        help="the bridge that pods are on, for BridgeInterface",
    ),
    _honoured(
        "--pod-interface-name-prefix",
        "detectLocal.interfaceNamePrefix",
        type=kinds.NAME,
        help="how pods' interfaces are called, for InterfaceNamePrefix",
    ),
    _no_effect(
        "--config-sync-period",
        "configSyncPeriod",
        type=kinds.POSITIVE_DURATION,
        default="15m",
        why="there is no second cache to read again",
        zero=True,
    ),
    _no_effect("--profiling", "enableProfiling", type=kinds.BOOL, default="false", why="there is no pprof"),
    _no_effect(
        "--show-hidden-metrics-for-version", "showHiddenMetricsForVersion", why="no metrics are hidden"
    ),
    _no_effect(
        "--kube-api-content-type",
        "clientConnection.contentType",
        default="application/vnd.kubernetes.protobuf",
        why="the API server is read as JSON",
    ),
    _no_effect("", "clientConnection.acceptContentTypes", why="the API server is read as JSON"),
    _no_effect(
        "--kube-api-qps",
        "clientConnection.qps",
        type=kinds.NUMBER,
        default="5",
        why="three watches need no rate limit",
        zero=True,
    ),
    _no_effect(
        "--kube-api-burst",
        "clientConnection.burst",
        type=kinds.integer(0),
        default="10",
        why="three watches need no rate limit",
        zero=True,
    ),
    _no_effect(
        "--iptables-masquerade-bit",
        "iptables.masqueradeBit",
        "nftables.masqueradeBit",
        type=kinds.integer(0, 31),
        default="14",
        why="no packet marks are used",
    ),
    _no_effect("--ipvs-scheduler", "ipvs.scheduler", why=f"{_IPVS}; see --algorithm"),
    _no_effect("--ipvs-exclude-cidrs", "ipvs.excludeCIDRs", type=kinds.CIDRS, why=_IPVS),
    _no_effect("--ipvs-strict-arp", "ipvs.strictARP", type=kinds.BOOL, default="false", why=_IPVS),
    _no_effect("--ipvs-tcp-timeout", "ipvs.tcpTimeout", type=kinds.DURATION, default="0", why=_IPVS),
    _no_effect("--ipvs-tcpfin-timeout", "ipvs.tcpFinTimeout", type=kinds.DURATION, default="0", why=_IPVS),
    _no_effect("--ipvs-udp-timeout", "ipvs.udpTimeout", type=kinds.DURATION, default="0", why=_IPVS),
    _no_effect(
        "--conntrack-max-per-core",
        "conntrack.maxPerCore",
        type=kinds.integer(0),
        default="32768",
        why=_CONNTRACK,
    ),
    _no_effect("--conntrack-min", "conntrack.min", type=kinds.integer(0), default="131072", why=_CONNTRACK),
    _honoured(
        "--conntrack-tcp-timeout-established",
        "conntrack.tcpEstablishedTimeout",
        type=kinds.DURATION,
        default="24h",
        help="how long a TCP connection may be idle before the packet path forgets it; 0: 24h",
    ),
    _honoured(
        "--conntrack-tcp-timeout-close-wait",
        "conntrack.tcpCloseWaitTimeout",
        type=kinds.DURATION,
        default="1h",
        help="the same, once one side has closed it; 0: 1h",
    ),
    _no_effect(
        "--conntrack-tcp-be-liberal",
        "conntrack.tcpBeLiberal",
        type=kinds.BOOL,
        default="false",
        why=_CONNTRACK,
    ),
    _honoured(
        "--conntrack-udp-timeout",
        "conntrack.udpTimeout",
        type=kinds.DURATION,
        default="0",
        help="how long a UDP flow may be idle before its client has answered; 0: 30s",
    ),
    _honoured(
        "--conntrack-udp-timeout-stream",
        "conntrack.udpStreamTimeout",
        type=kinds.DURATION,
        default="0",
        help="the same, once it has; 0: 2m",
    ),
    _no_effect(
        "--boot-id-file", default="/proc/sys/kernel/random/boot_id", why="nothing reads it", wins=True
    ),
    _no_effect(
        "--machine-id-file",
        default="/etc/machine-id,/var/lib/dbus/machine-id",
        why="nothing reads it",
        wins=True,
    ),
    _no_effect("--vmodule", "logging.vmodule", type=kinds.ANY, why="the log level is one for all", wins=True),
    _no_effect(
        "--log-flush-frequency",
        "logging.flushFrequency",
        type=kinds.FLUSH_INTERVAL,
        default="5s",
        why="every line is written at once",
        wins=True,
    ),
    _no_effect(
        "--log-text-split-stream",
        type=kinds.BOOL,
        default="false",
        why="all lines go to standard error",
        wins=True,
    ),
    _no_effect("--log-text-info-buffer-size", default="0", why="every line is written at once", wins=True),
    _no_effect(
        "--log-json-split-stream",
        type=kinds.BOOL,
        default="false",
        why="all lines go to standard error",
        wins=True,
    ),
    _no_effect("--log-json-info-buffer-size", default="0", why="every line is written at once", wins=True),
    _no_effect("", "logging.options", type=kinds.ANY, why="every line is written to standard error at once"),
    _no_effect("", "portRange", why="kube-proxy does not use it either"),
    _no_effect("", "windowsRunAsService", type=kinds.BOOL, default="false", why="it concerns Windows"),
    _no_effect("", "winkernel", type=kinds.ANY, why="it concerns Windows"),
)

OPTIONS = OWN_OPTIONS + KUBE_PROXY_OPTIONS
BY_NAME = {option.name: option for option in OPTIONS}
