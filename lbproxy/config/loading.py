"""Make the one `Config` from flags, a configuration file and facts about the host.

Where both the file and a flag speak: lbproxy's own flags win; those that
KubeProxyConfiguration has a field for yield to such a document, as they do in
kube-proxy (CLI-1), except node name, master and logging.
"""

import pathlib
import socket
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence

from lbproxy import cgroup2, errors
from lbproxy.config import config, config_file, kinds
from lbproxy.config import flags as config_flags
from lbproxy.config.config_file import FileSettings, Setting
from lbproxy.config.kube_proxy_options import OPTIONS
from lbproxy.config.options import Option
from lbproxy.core import node_rows

DEFAULT = "default"
# With these neither manifests nor a kubeconfig are read, and need not exist.
_NOT_RUNNING = ("--write-config-to", "--cleanup", "--init-only")


class Host(typing.NamedTuple):
    """What defaults depend on: the host's name and its /proc/self/mountinfo.

    `look_at` raises OSError for a path that can not be read from.
    """

    name: str
    mountinfo: str
    look_at: Callable[[pathlib.Path], object] = lambda path: None


class Loaded(typing.NamedTuple):
    """The configuration, and the settings it was made from by option name."""

    config: config.Config
    settings: Mapping[str, Setting]


def this_host() -> Host:
    """Read the facts of the machine we run on."""
    try:
        mountinfo = pathlib.Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:
        mountinfo = ""
    return Host(socket.gethostname(), mountinfo, pathlib.Path.stat)


def load(texts: Mapping[str, Sequence[str]], host: Host, problems: Sequence[str] = ()) -> Loaded:
    """Build the configuration from the texts of flags; raises ConfigError with every problem there is."""
    found = [*problems]
    flags = _read_flags(texts, found)
    file = _read_file(flags.get("--config"), found)
    found += file.problems
    resolved = _Resolved(flags, file)
    built = _build(resolved, host, found)
    source, path = ("--manifests", built.manifests) if built.manifests else ("--kubeconfig", built.kubeconfig)
    if path and not any(resolved.value(name) for name in _NOT_RUNNING):
        try:
            host.look_at(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            found.append(f"{resolved[source].place}: {path}: {reason}")
    if found:
        raise errors.ConfigError(found)
    return Loaded(built, resolved.settings)


def from_arguments(arguments: Sequence[str], host: Host | None = None) -> config.Config:
    """Build the configuration that `lbproxy run` with these arguments has."""
    parser = config_flags.Parser()
    config_flags.add_to(parser)
    parsed, extra = parser.parse_known_args(config_flags.normalise(arguments))
    problems = config_flags.unknown(extra, parser._option_string_actions)
    return load(config_flags.texts(parsed), host or this_host(), problems).config


def _read_flags(texts: Mapping[str, Sequence[str]], problems: list[str]) -> dict[str, Setting]:
    settings = {}
    for option in OPTIONS:
        if option.name not in texts:
            continue
        given = texts[option.name]
        text = ",".join(given) if option.type.joins else given[-1]
        try:
            settings[option.name] = Setting(option.type.parse(text), option.name)
        except ValueError as error:
            told = [*_item_problems(option, text)] or [str(error)]
            problems += [f"{option.name}: {problem}" for problem in told]
    return settings


def _item_problems(option: Option, text: str) -> Iterator[str]:
    """Say what is wrong with each item of a list, of which a type's parser names the first alone."""
    for item in dict.fromkeys(text.split(",")) if option.type.joins else ():
        try:
            option.type.parse(item)
        except ValueError as error:
            yield str(error)


def _read_file(setting: Setting | None, problems: list[str]) -> FileSettings:
    if setting is None or setting.value is None:
        return FileSettings()
    try:
        content = setting.value.read_bytes()
    except OSError as error:
        problems.append(f"--config: {setting.value}: {error.strerror}")
        return FileSettings()
    return config_file.read(content, str(setting.value))


class _Resolved:
    """For each option the one setting that counts, and notes about those that do not."""

    def __init__(self, flags: Mapping[str, Setting], file: FileSettings) -> None:
        self.settings: dict[str, Setting] = {}
        self.ignored: list[str] = []
        self.warnings = list(file.warnings)
        self._flags = flags
        self._file = file
        self._mode = config.ProxyMode.IPTABLES
        # Which block of the file counts depends on the mode, so that comes first.
        for option in sorted(OPTIONS, key=lambda option: option.name != "--proxy-mode"):
            setting = self._choose(option)
            self.settings[option.name] = setting
            if option.name == "--proxy-mode":
                self._mode = setting.value
        for option in OPTIONS:
            self._note(option)

    def __getitem__(self, name: str) -> Setting:
        return self.settings[name]

    def value(self, name: str) -> typing.Any:
        """The value that counts for an option."""
        return self.settings[name].value

    def is_set(self, name: str) -> bool:
        """Whether a flag or file says anything about an option."""
        return self.settings[name].place != DEFAULT

    def _choose(self, option: Option) -> Setting:
        flag = None if self._yields(option) else self._flags.get(option.name)
        filed = self._file.own.get(option.own_field)
        for field in option.kube_fields:
            if self._is_active(field):
                filed = self._file.kube.get(field, filed)
        if flag and filed and isinstance(flag.value, dict):
            return Setting(filed.value | flag.value, flag.place)
        # An empty node name is no node name, also where the file has one.
        if flag and (flag.value or option.name != "--node-name"):
            return flag
        return filed or Setting(option.type.parse(option.default), DEFAULT)

    def _yields(self, option: Option) -> bool:
        return option.ignored_with_config and self._file.has_kube_proxy

    def _is_active(self, field: str) -> bool:
        return config_file.is_active(field, self._mode)

    def _note(self, option: Option) -> None:
        flag = self._flags.get(option.name)
        other_mode = f"the mode is {self._mode.value}"
        if flag and self._yields(option):
            self.warnings.append(f"{flag.place}: not used, as --config has a KubeProxyConfiguration")
        elif flag and option.no_effect:
            self.ignored.append(f"{flag.place}: {option.no_effect}")
        elif flag and option.kube_fields and not any(map(self._is_active, option.kube_fields)):
            self.ignored.append(f"{flag.place}: {other_mode}")
        filed = [self._file.kube.get(field) for field in option.kube_fields]
        active = [self._is_active(field) for field in option.kube_fields]
        if option.own_field:
            filed, active = [*filed, self._file.own.get(option.own_field)], [*active, True]
        for setting, is_active in zip(filed, active, strict=True):
            if setting and not setting.is_zero and (option.no_effect or not is_active):
                self.ignored.append(f"{setting.place}: {option.no_effect or other_mode}")


def _build(resolved: _Resolved, host: Host, problems: list[str]) -> config.Config:
    get = resolved.value
    mode = get("--proxy-mode")
    bind = get("--bind-address")
    period = "--ipvs-sync-period" if mode == config.ProxyMode.IPVS else "--iptables-sync-period"
    pause = "--ipvs-min-sync-period" if mode == config.ProxyMode.IPVS else "--iptables-min-sync-period"
    if get(pause) > get(period):
        limit = kinds.format_duration(get(period))
        problems.append(f"{resolved[pause].place}: longer than the sync period, which is {limit}")
    if get("--manifests") and {"--manifests", "--kubeconfig"} <= {
        resolved[name].place for name in ("--manifests", "--kubeconfig")
    }:
        problems.append("--manifests: not together with --kubeconfig")
    elif get("--manifests"):
        resolved.ignored += [
            f"{resolved[name].place}: not used, as there are manifests"
            for name in ("--kubeconfig", "--master")
            if resolved.is_set(name) and get(name)
        ]
    node_name = get("--node-name").lower() or host.name.strip().lower()
    if not node_name:
        problems.append("--node-name: needed, as the host has no name")
    ranges = get("--nodeport-addresses")
    primary = kinds.PRIMARY in ranges or (not ranges and mode == config.ProxyMode.NFTABLES)
    gates = resolved["--feature-gates"]
    resolved.ignored += [
        f"{gates.place}: lbproxy has no feature gate {name}"
        for name in gates.value
        if name != config.ALLOW_EXTERNAL_IPS
    ]
    if kinds.PRIMARY in ranges and len(ranges) > 1:
        problems.append(f"{resolved['--nodeport-addresses'].place}: primary stands alone, without CIDRs")
    return config.Config(
        kubeconfig=get("--kubeconfig"),
        master=get("--master"),
        manifests=get("--manifests"),
        config_file=get("--config"),
        node_name=node_name,
        node_ips=get("--node-ip"),
        bind_address=None if bind.is_unspecified else bind,
        cgroup=get("--cgroup") or cgroup2.mount_point(host.mountinfo),
        bpffs=get("--bpffs") or config.BPFFS,
        algorithm=get("--algorithm"),
        map_rows=config.MapRows(**get("--map-rows")),
        map_growth_limit=get("--map-growth-limit"),
        devices=get("--device"),
        packet_path=get("--packet-path"),
        pod_devices=get("--pod-device"),
        xdp=get("--xdp"),
        mode=get("--mode"),
        proxy_mode=mode,
        nodeport_addresses=() if primary else ranges,
        nodeport_primary=primary,
        localhost_node_ports=mode == config.ProxyMode.IPTABLES and get("--iptables-localhost-nodeports"),
        external_ips=get("--feature-gates").get(config.ALLOW_EXTERNAL_IPS, True),
        masquerade_all=get("--masquerade-all"),
        masquerade_ports=get("--masquerade-ports"),
        keep_client_address=get("--keep-client-address"),
        take_over=get("--take-over"),
        flow_timeouts=_flow_timeouts(resolved),
        detect_local_mode=get("--detect-local-mode"),
        cluster_cidrs=_cluster_cidrs(resolved, problems),
        bridge_interface=get("--pod-bridge-interface"),
        interface_name_prefix=get("--pod-interface-name-prefix"),
        min_sync_period_s=get(pause),
        sync_period_s=get(period),
        config_sync_period_s=get("--config-sync-period"),
        healthz_bind_address=_listen(resolved, "healthz", "0.0.0.0", "::"),
        metrics_bind_address=_listen(resolved, "metrics", "127.0.0.1", "::1"),
        bind_address_hard_fail=get("--bind-address-hard-fail"),
        metrics_max_series=get("--metrics-max-series"),
        probe_concurrency=get("--probe-concurrency"),
        probe_ca_file=get("--probe-ca-file"),
        events=get("--events"),
        oom_score_adj=get("--oom-score-adj"),
        log_level=get("-v"),
        log_format=get("--logging-format"),
        ignored=tuple(resolved.ignored),
        warnings=tuple(resolved.warnings),
    )


def _listen(resolved: _Resolved, server: str, host4: str, host6: str) -> config.ListenAddress | None:
    """Complete the address of a server: by family, and with the port where it has none."""
    address: config.ListenAddress | None = resolved.value(f"--{server}-bind-address")
    port = resolved.value(f"--{server}-port")
    if not resolved.value(server) or address is None or port == 0:
        return None
    if not resolved.is_set(f"--{server}-bind-address"):
        return config.ListenAddress(host6 if resolved.value("--bind-address").version == 6 else host4, port)
    return address if address.port else address._replace(port=port)


def _flow_timeouts(resolved: _Resolved) -> node_rows.Timeouts:
    """What kube-proxy sets conntrack to, for our own table of flows; 0 means the default there."""
    given = {
        "tcp_established_s": resolved.value("--conntrack-tcp-timeout-established"),
        "tcp_half_closed_s": resolved.value("--conntrack-tcp-timeout-close-wait"),
        "udp_new_s": resolved.value("--conntrack-udp-timeout"),
        "udp_stream_s": resolved.value("--conntrack-udp-timeout-stream"),
    }
    return node_rows.DEFAULT_TIMEOUTS._replace(**{name: value for name, value in given.items() if value})


def _cluster_cidrs(resolved: _Resolved, problems: list[str]) -> tuple[config.IPNetwork, ...]:
    """Check what the way of telling pods' traffic needs, and read the CIDRs if it is those."""
    needs = {
        config.DetectLocalMode.BRIDGE_INTERFACE: ("--pod-bridge-interface", "detectLocal.bridgeInterface"),
        config.DetectLocalMode.INTERFACE_NAME_PREFIX: (
            "--pod-interface-name-prefix",
            "detectLocal.interfaceNamePrefix",
        ),
    }
    mode = resolved.value("--detect-local-mode")
    if mode in needs and not resolved.value(needs[mode][0]):
        place = resolved["--detect-local-mode"].place
        problems.append(f"{place}: {mode.value} needs {needs[mode][0]} ({needs[mode][1]})")
    setting = resolved["--cluster-cidr"]
    if mode != config.DetectLocalMode.CLUSTER_CIDR or not setting.value:
        return ()
    try:
        cidrs = tuple(kinds.parse_cidr(item.strip()) for item in setting.value.split(","))
    except ValueError as error:
        problems.append(f"{setting.place}: {error}")
        return ()
    if len(cidrs) > 2 or len({cidr.version for cidr in cidrs}) != len(cidrs):
        problems.append(f"{setting.place}: {setting.value!r} is not one CIDR, or one of each family")
    return cidrs
