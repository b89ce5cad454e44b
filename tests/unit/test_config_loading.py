"""From flags to the one Config: kube-proxy's flags, defaults, precedence, what has no effect."""

import ipaddress
import pathlib
import typing

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lbproxy import errors
from lbproxy.config import config, kube_proxy_options, loading, writing
from lbproxy.config import docs as config_docs
from lbproxy.config import flags as config_flags
from lbproxy.config.options import Group
from lbproxy.core import model, node_rows

MOUNTINFO = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
41 31 0:38 / /sys/fs/cgroup/uni\\040fied rw,relatime shared:9 - cgroup2 cgroup2 rw
"""
HOST = loading.Host(" Node-A \n", MOUNTINFO)
KUBE_HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
OWN_HEAD = "apiVersion: lbproxy.io/v1alpha1\nkind: LbproxyConfiguration\n"

# The table of contract section 24: flag, default, another value.
KUBE_PROXY_FLAGS = [
    ("--bind-address", "0.0.0.0", "192.0.2.1"),
    ("--bind-address-hard-fail", "false", "true"),
    ("--boot-id-file", "/proc/sys/kernel/random/boot_id", "/x"),
    ("--cleanup", "false", "true"),
    ("--cluster-cidr", "", "10.0.0.0/8,fd00::/48"),
    ("--config", "", "/dev/null"),
    ("--config-sync-period", "15m", "1m"),
    ("--conntrack-max-per-core", "32768", "1"),
    ("--conntrack-min", "131072", "0"),
    ("--conntrack-tcp-be-liberal", "false", "true"),
    ("--conntrack-tcp-timeout-close-wait", "1h", "1m"),
    ("--conntrack-tcp-timeout-established", "24h", "1m"),
    ("--conntrack-udp-timeout", "0", "30s"),
    ("--conntrack-udp-timeout-stream", "0", "30s"),
    ("--detect-local-mode", "ClusterCIDR", "NodeCIDR"),
    ("--feature-gates", "", "A=true,B=false"),
    ("--healthz-bind-address", "0.0.0.0:10256", "[::1]:1"),
    ("--healthz-port", "10256", "0"),
    ("--hostname-override", "", "worker-1"),
    ("--init-only", "false", "true"),
    ("--iptables-localhost-nodeports", "true", "false"),
    ("--iptables-masquerade-bit", "14", "15"),
    ("--iptables-min-sync-period", "0", "1s"),  # kube-proxy: 1s
    ("--iptables-sync-period", "30s", "1m0s"),
    ("--ipvs-exclude-cidrs", "", "10.0.0.0/8"),
    ("--ipvs-min-sync-period", "0", "1s"),  # kube-proxy: 1s
    ("--ipvs-scheduler", "", "rr"),
    ("--ipvs-strict-arp", "false", "true"),
    ("--ipvs-sync-period", "30s", "1m"),
    ("--ipvs-tcp-timeout", "0", "1s"),
    ("--ipvs-tcpfin-timeout", "0", "1s"),
    ("--ipvs-udp-timeout", "0", "1s"),
    ("--kube-api-burst", "10", "20"),
    ("--kube-api-content-type", "application/vnd.kubernetes.protobuf", "application/json"),
    ("--kube-api-qps", "5", "12.5"),
    ("--kubeconfig", "", "/x"),
    ("--log-flush-frequency", "5s", "1s"),
    ("--log-json-info-buffer-size", "0", "1M"),
    ("--log-json-split-stream", "false", "true"),
    ("--log-text-info-buffer-size", "0", "1M"),
    ("--log-text-split-stream", "false", "true"),
    ("--logging-format", "text", "json"),
    ("--machine-id-file", "/etc/machine-id,/var/lib/dbus/machine-id", "/x"),
    ("--masquerade-all", "false", "true"),
    ("--master", "", "https://192.0.2.1:6443"),
    ("--metrics-bind-address", "127.0.0.1:10249", "0.0.0.0"),
    ("--metrics-port", "10249", "1"),
    ("--nodeport-addresses", "", "10.0.0.0/8"),
    ("--oom-score-adj", "-999", "-1000"),
    ("--pod-bridge-interface", "", "cni0"),
    ("--pod-interface-name-prefix", "", "veth"),
    ("--profiling", "false", "true"),
    ("--proxy-mode", "iptables", "nftables"),
    ("--show-hidden-metrics-for-version", "", "1.35"),
    ("--vmodule", "", "a=1"),
    ("--write-config-to", "", "/x"),
    ("-v", "0", "4"),
]


def parse(*arguments: str) -> dict[str, list[str]]:
    parser = config_flags.Parser()
    config_flags.add_to(parser)
    parsed, extra = parser.parse_known_args(config_flags.normalise(arguments))
    assert not extra
    return config_flags.texts(parsed)


def load(*arguments: str) -> config.Config:
    return loading.from_arguments(arguments, HOST)


def problems(*arguments: str) -> tuple[str, ...]:
    with pytest.raises(errors.ConfigError) as caught:
        load(*arguments)
    return caught.value.problems


@pytest.mark.parametrize(("flag", "default", "other"), KUBE_PROXY_FLAGS)
def test_each_flag_of_kube_proxy_is_taken_as_it_writes_them(flag: str, default: str, other: str) -> None:
    (option,) = (option for option in kube_proxy_options.OPTIONS if flag in option.flags)
    assert option.default == default
    wanted = option.type.parse(other)
    assert wanted != option.type.parse(default)
    for spelling in ([flag, other], [f"{flag}={other}"]):
        loaded = loading.load(parse(*spelling), HOST)
        assert loaded.settings[option.name].value == wanted
        if option.no_effect:
            assert loaded.config.ignored == (f"{option.name}: {option.no_effect}",)


def test_the_table_of_flags_is_complete() -> None:
    listed = {flag for flag, _, _ in KUBE_PROXY_FLAGS}
    of_kube_proxy = {
        option.flags[0]
        for option in kube_proxy_options.KUBE_PROXY_OPTIONS
        if option.flags and option.group in (Group.KUBE_PROXY, Group.WITHOUT_EFFECT)
    }
    assert of_kube_proxy <= listed


def test_no_flag_or_field_has_two_meanings() -> None:
    for of_option in (
        lambda option: option.flags,
        lambda option: option.kube_fields,
        lambda option: filter(None, [option.own_field]),
    ):
        names = [name for option in kube_proxy_options.OPTIONS for name in of_option(option)]
        assert len(names) == len(set(names))


def test_without_flags_all_is_as_documented() -> None:
    assert load() == config.Config(node_name="node-a", cgroup=pathlib.Path("/sys/fs/cgroup/uni fied"))


def test_every_own_flag_arrives() -> None:
    loaded = load(
        *(
            "--manifests",
            "/m",
            "--node-name",
            " Worker-1 ",
            "--node-ip",
            "192.0.2.1",
            "--node-ip=2001:db8::1",
        ),
        *(
            "--cgroup",
            "/c",
            "--bpffs=/b",
            "--algorithm",
            "maglev",
            "--map-rows",
            "sockets=64",
            "--map-rows=slots=7",
        ),
        *("--device", "eth0", "--device", "eth1", "--pod-device", "veth*", "--xdp=generic", "--mode", "dsr"),
        "--packet-path=false",
        *("--metrics-max-series=0", "--events=false", "-v2", "--log-format=json", "--masquerade_all"),
        *("--nodeport-addresses=10.0.0.0/8,::/0", "--nodeport-addresses", "192.0.2.0/24"),
    )
    assert loaded == config.Config(
        node_name="worker-1",
        manifests=pathlib.Path("/m"),
        node_ips=(ipaddress.ip_address("192.0.2.1"), ipaddress.ip_address("2001:db8::1")),
        cgroup=pathlib.Path("/c"),
        bpffs=pathlib.Path("/b"),
        algorithm=model.Algorithm.MAGLEV,
        map_rows=config.MapRows(sockets=64, slots=7),
        devices=("eth0", "eth1"),
        pod_devices=("veth*",),
        xdp=config.Xdp.GENERIC,
        packet_path=False,
        mode=model.PacketMode.DSR,
        metrics_max_series=0,
        events=False,
        log_level=2,
        log_format=config.LogFormat.JSON,
        masquerade_all=True,
        nodeport_addresses=tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "::/0", "192.0.2.0/24"))),
    )
    assert loaded.ignored == ()


@pytest.mark.parametrize(
    ("arguments", "healthz", "metrics"),
    [
        ([], "0.0.0.0:10256", "127.0.0.1:10249"),
        (["--healthz-bind-address", "", "--metrics-bind-address="], None, None),
        (["--healthz-bind-address=192.0.2.1", "--metrics-bind-address=::"], "192.0.2.1:10256", "[::]:10249"),
        (["--bind-address", "::"], "[::]:10256", "[::1]:10249"),
        (["--healthz-port", "0", "--metrics-port=0"], None, None),
        (["--healthz-port", "7", "--metrics-port=8"], "0.0.0.0:7", "127.0.0.1:8"),
        (["--healthz-port=7", "--healthz-bind-address=::1"], "[::1]:7", "127.0.0.1:10249"),
        (["--healthz-port=7", "--healthz-bind-address=[::1]:9"], "[::1]:9", "127.0.0.1:10249"),
    ],
)
def test_where_servers_listen(arguments: list[str], healthz: str | None, metrics: str | None) -> None:
    loaded = load(*arguments)
    assert (loaded.healthz_bind_address and str(loaded.healthz_bind_address)) == healthz
    assert (loaded.metrics_bind_address and str(loaded.metrics_bind_address)) == metrics


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--proxy-mode=nftables"], {"nodeport_primary": True, "localhost_node_ports": False}),
        (["--proxy-mode=ipvs"], {"nodeport_primary": False, "localhost_node_ports": False}),
        (["--proxy-mode=NFTables", "--nodeport-addresses=::/0"], {"nodeport_primary": False}),
        (["--nodeport-addresses=primary"], {"nodeport_primary": True, "nodeport_addresses": ()}),
        (["--iptables-localhost-nodeports=false"], {"localhost_node_ports": False}),
        (
            ["--iptables-min-sync-period=2s", "--iptables-sync-period=3s"],
            {"min_sync_period_s": 2, "sync_period_s": 3},
        ),
        (
            ["--ipvs-min-sync-period=2s", "--ipvs-sync-period=3s"],
            {"min_sync_period_s": 0, "sync_period_s": 30},
        ),
        (["--proxy-mode=ipvs", "--ipvs-sync-period=3s"], {"sync_period_s": 3}),
        (["--proxy-mode=ipvs", "--iptables-sync-period=3s"], {"sync_period_s": 30}),
        (["--detect-local-mode=NodeCIDR", "--cluster-cidr=whatever"], {"cluster_cidrs": ()}),
        (
            ["--detect-local-mode=BridgeInterface", "--pod-bridge-interface=cni0"],
            {"bridge_interface": "cni0"},
        ),
        (["--bind-address=192.0.2.9"], {"bind_address": ipaddress.ip_address("192.0.2.9")}),
        (["--node-name", "", "--hostname-override="], {"node_name": "node-a"}),
        (["--node-name=a", "--hostname-override=b"], {"node_name": "b"}),
    ],
)
def test_what_flags_come_to_together(arguments: list[str], expected: dict[str, typing.Any]) -> None:
    loaded = load(*arguments)
    assert {name: getattr(loaded, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--iptables-sync-period=0"], "--iptables-sync-period: 0 is too short"),
        (
            ["--iptables-sync-period=1s", "--iptables-min-sync-period=2s"],
            "--iptables-min-sync-period: longer than the sync period, which is 1s",
        ),
        (["--nodeport-addresses=primary,::/0"], "--nodeport-addresses: primary stands alone, without CIDRs"),
        (["--cluster-cidr=x"], "--cluster-cidr: 'x' is not a CIDR like 10.0.0.0/8 or 2001:db8::/32"),
        (
            ["--detect-local-mode=BridgeInterface"],
            "--detect-local-mode: BridgeInterface needs --pod-bridge-interface (detectLocal.bridgeInterface)",
        ),
        (["--manifests=a", "--kubeconfig=b"], "--manifests: not together with --kubeconfig"),
        (["--xdp"], "--xdp: expected one argument"),
        (["--dev=eth0"], "--dev: unknown flag; did you mean --device?"),
        (["--zzz", "value"], "--zzz: unknown flag; --help lists those there are"),
        (["here"], "'here': arguments other than flags are not taken"),
    ],
)
def test_what_cannot_be(arguments: list[str], problem: str) -> None:
    assert problems(*arguments) == (problem,)


def test_a_host_without_a_name_needs_a_flag() -> None:
    with pytest.raises(errors.ConfigError, match="--node-name: needed"):
        loading.from_arguments([], loading.Host(" ", ""))
    assert loading.from_arguments(["--node-name=a"], loading.Host("", "")).cgroup is None


def test_all_problems_come_at_once() -> None:
    found = problems(
        "--xdp=a", "--mode=b", "--node-ip=c", "--map-rows=d", "--cluster-cidr=e", "--no-such", "f", "g"
    )
    assert [line.split(":")[0] for line in found] == [
        *("--no-such", "'g'", "--node-ip", "--map-rows", "--xdp", "--mode", "--cluster-cidr")
    ]


def test_with_a_kube_proxy_file_its_flags_yield_as_in_kube_proxy(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "config.conf"
    file.write_text(
        KUBE_HEAD
        + "hostnameOverride: of-file\nclusterCIDR: 10.0.0.0/8\nlogging: {verbosity: 1}\n"
        + "clientConnection: {kubeconfig: /of-file}\n---\n"
        + OWN_HEAD
        + "algorithm: maglev\nbpffs: /of-file\n"
    )
    loaded = load(
        *("--config", str(file), "--hostname-override=of-flag", "-v=5", "--master=https://of-flag"),
        *(
            "--healthz-port=1",
            "--metrics-bind-address=",
            "--masquerade-all",
            "--bpffs=/of-flag",
            "--kubeconfig=/x",
        ),
    )
    assert (loaded.node_name, loaded.log_level, loaded.master) == ("of-flag", 5, "https://of-flag")
    assert (loaded.healthz_bind_address, loaded.metrics_bind_address) == (config.HEALTHZ, config.METRICS)
    assert not loaded.masquerade_all
    assert loaded.algorithm is model.Algorithm.MAGLEV
    assert (loaded.bpffs, loaded.kubeconfig) == (pathlib.Path("/of-flag"), pathlib.Path("/of-file"))
    assert loaded.warnings == tuple(
        f"{flag}: not used, as --config has a KubeProxyConfiguration"
        for flag in (*("--kubeconfig", "--metrics-bind-address", "--healthz-port", "--masquerade-all"),)
    )
    assert load("--config", str(file), "--node-name=").node_name == "of-file"


def test_with_only_our_own_file_all_flags_count(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(OWN_HEAD + "manifests: /of-file\n")
    loaded = load("--config", str(file), "--metrics-bind-address=", "--cluster-cidr=10.0.0.0/8")
    assert loaded.metrics_bind_address is None
    assert loaded.cluster_cidrs == (ipaddress.ip_network("10.0.0.0/8"),)
    assert loaded.manifests == pathlib.Path("/of-file")


def test_manifests_come_before_a_files_kubeconfig(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "config.conf"
    file.write_text(KUBE_HEAD + "clientConnection:\n  kubeconfig: /k\n")
    assert load("--config", str(file), "--manifests=/m").ignored == (
        f"{file}:4: clientConnection.kubeconfig: not used, as there are manifests",
    )


NOWHERE = HOST._replace(look_at=pathlib.Path.stat)


def test_manifests_must_exist_at_the_start(tmp_path: pathlib.Path) -> None:
    missing = tmp_path / "none"
    with pytest.raises(errors.ConfigError) as caught:
        loading.from_arguments(["--manifests", str(missing), "--xdp=x"], NOWHERE)
    *others, told = caught.value.problems
    assert told == f"--manifests: {missing}: No such file or directory"
    assert len(others) == 1
    assert loading.from_arguments(["--manifests", str(tmp_path)], NOWHERE).manifests == tmp_path
    # What does not read them does not need them.
    loading.from_arguments(["--manifests", str(missing), "--cleanup"], NOWHERE)


def test_a_kubeconfig_must_exist_at_the_start(tmp_path: pathlib.Path) -> None:
    missing = tmp_path / "none"
    with pytest.raises(errors.ConfigError, match=f"--kubeconfig: {missing}: No such file or directory"):
        loading.from_arguments(["--kubeconfig", str(missing), "--master=http://x"], NOWHERE)
    loading.from_arguments(["--kubeconfig", str(missing), "--init-only"], NOWHERE)


def test_manifests_that_a_file_names_must_exist_too(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(f"{OWN_HEAD}manifests: {tmp_path}/none\n")
    with pytest.raises(errors.ConfigError, match=f"{file}:3: manifests: {tmp_path}/none: No such file"):
        loading.from_arguments(["--config", str(file)], NOWHERE)


def test_every_bad_item_of_a_list_is_told() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        load("--map-rows=foo=1", "--map-rows", "frontends=0,slots=x", "--map-rows=sockets=3,services=2")
    assert [problem.split(":")[1].split()[0] for problem in caught.value.problems] == [
        "'foo'",
        "frontends",
        "slots",
        "sockets",
    ]


VALUES = {
    "--proxy-mode": ["iptables", "ipvs", "nftables"],
    "--bind-address": ["0.0.0.0", "::", "192.0.2.1"],
    "--healthz-bind-address": ["", "::", "192.0.2.1:1"],
    "--metrics-port": ["0", "1"],
    "--nodeport-addresses": ["primary", "10.0.0.0/8,::/0"],
    "--iptables-sync-period": ["1m0.5s", "1h"],
    "--iptables-min-sync-period": ["1s"],
    "--iptables-localhost-nodeports": ["false"],
    "--masquerade-all": ["true"],
    "--cluster-cidr": ["10.0.0.0/8,fd00::/48"],
    "--detect-local-mode": ["NodeCIDR"],
    "--kubeconfig": ["/k"],
    "--node-name": ["B"],
    "--node-ip": ["192.0.2.1,::1"],
    "--algorithm": ["maglev"],
    "--map-rows": ["sockets=4,slots=9"],
    "--xdp": ["off"],
    "--events": ["false"],
    "--conntrack-min": ["7"],
    "--feature-gates": ["A=true", "AllowServiceExternalIPs=false"],
    "--logging-format": ["json"],
    "-v": ["3"],
}
CHOSEN = st.fixed_dictionaries({}, optional={flag: st.sampled_from(texts) for flag, texts in VALUES.items()})


@given(CHOSEN)
def test_written_settings_read_back_to_the_same(
    tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, str]
) -> None:
    first = loading.load({flag: [text] for flag, text in chosen.items()}, HOST)
    file = tmp_path_factory.getbasetemp() / "written.yaml"
    file.write_text(writing.render(first))
    again = loading.from_arguments([f"--config={file}"], HOST)
    assert not again.warnings
    assert comparable(again) == comparable(first.config)


@pytest.mark.parametrize("mode", ["iptables", "ipvs", "nftables"])
def test_sync_periods_are_written_in_the_block_of_the_mode_alone(mode: str) -> None:
    loaded = loading.load({"--proxy-mode": [mode]}, HOST)
    document = next(yaml.safe_load_all(writing.render(loaded)))
    blocks = {"iptables", "ipvs", "nftables"} & document.keys()
    assert {block for block in blocks if "syncPeriod" in document[block]} == {mode}


def comparable(value: config.Config) -> dict[str, object]:
    notes = ("config_file", "ignored", "warnings")
    return {name: getattr(value, name) for name in value.__slots__ if name not in notes}


def test_the_documentation_is_up_to_date() -> None:
    page = pathlib.Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == config_docs.render(), (
        "run python -m lbproxy.config.docs > docs/configuration.md"
    )


def test_one_feature_gate_means_something() -> None:
    assert load().external_ips
    gated = load("--feature-gates", "AllowServiceExternalIPs=false,NFTablesProxyMode=true")
    assert not gated.external_ips
    assert gated.ignored == ("--feature-gates: lbproxy has no feature gate NFTablesProxyMode",)


@pytest.mark.parametrize(
    ("arguments", "timeouts"),
    [
        ([], node_rows.Timeouts()),
        (["--conntrack-tcp-timeout-established=0", "--conntrack-udp-timeout=0"], node_rows.Timeouts()),
        (
            [
                "--conntrack-tcp-timeout-established=2h",
                "--conntrack-tcp-timeout-close-wait=10s",
                "--conntrack-udp-timeout=5s",
                "--conntrack-udp-timeout-stream=1m",
            ],
            node_rows.Timeouts(tcp_established_s=7200, tcp_half_closed_s=10, udp_new_s=5, udp_stream_s=60),
        ),
    ],
)
def test_conntrack_timeouts_are_those_of_our_flows(
    arguments: list[str], timeouts: node_rows.Timeouts
) -> None:
    loaded = load(*arguments)
    assert loaded.flow_timeouts == timeouts
    assert loaded.ignored == ()


@pytest.mark.parametrize(
    ("text", "ports"), [("", None), ("50000-59999", (50000, 59999)), ("61000-61000", (61000, 61000))]
)
def test_masquerade_ports(text: str, ports: tuple[int, int] | None) -> None:
    assert load(f"--masquerade-ports={text}").masquerade_ports == ports


@pytest.mark.parametrize("text", ["50000", "a-b", "0-10", "20-10", "1-65536", "1-2-3", "-1-5"])
def test_what_is_no_range_of_ports_is_a_problem(text: str) -> None:
    with pytest.raises(errors.ConfigError, match="--masquerade-ports"):
        load(f"--masquerade-ports={text}")


def test_a_file_says_how_to_masquerade(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "apiVersion: lbproxy.io/v1alpha1\nkind: LbproxyConfiguration\n"
        "masqueradePorts: 50000-59999\nkeepClientAddress: true\nmode: dsr\ntakeOver: when-told\n"
    )
    loaded = load("--config", str(file))
    assert (loaded.masquerade_ports, loaded.keep_client_address) == ((50000, 59999), True)
    assert loaded.mode is model.PacketMode.DSR
    assert loaded.take_over is config.TakeOver.WHEN_TOLD
    assert load().take_over is config.TakeOver.NEVER
