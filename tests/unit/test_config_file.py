"""Configuration files: kubeadm's, lbproxy's own, and broken ones."""

import ipaddress
import json
import pathlib
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy import errors
from lbproxy.config import config, config_file, loading
from lbproxy.core import model

HOST = loading.Host("Node-A.example\n", "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")

KUBEADM = """\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
kind: KubeProxyConfiguration
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: "0"
    text:
      infoBufferSize: "0"
  verbosity: 0
metricsBindAddress: ""
mode: ""
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: ""
  rootHnsEndpointName: ""
  sourceVip: ""
"""

KUBE_HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
OWN_HEAD = "apiVersion: lbproxy.io/v1alpha1\nkind: LbproxyConfiguration\n"


TEXTS = st.text("01s.:/,-ab", max_size=9)


def load(path: pathlib.Path, text: str | bytes, *flags: str) -> config.Config:
    file = path / "config.conf"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return loading.from_arguments(["--config", str(file), *flags], HOST)


def problems(path: pathlib.Path, text: str | bytes, *flags: str) -> list[str]:
    with pytest.raises(errors.ConfigError) as caught:
        load(path, text, *flags)
    return [line.replace(f"{path}/", "") for line in caught.value.lines()]


def test_kubeadms_file_means_the_defaults(tmp_path: pathlib.Path) -> None:
    loaded = load(tmp_path, KUBEADM, "--hostname-override", "worker-1")
    assert loaded == config.Config(
        node_name="worker-1",
        kubeconfig=pathlib.Path("/var/lib/kube-proxy/kubeconfig.conf"),
        config_file=tmp_path / "config.conf",
        cgroup=pathlib.Path("/sys/fs/cgroup"),
        cluster_cidrs=(ipaddress.ip_network("10.244.0.0/16"),),
    )


def test_both_documents_together(tmp_path: pathlib.Path) -> None:
    text = textwrap.dedent("""\
        ---
        apiVersion: kubeproxy.config.k8s.io/v1alpha1
        kind: KubeProxyConfiguration
        hostnameOverride: " Worker-2 "
        bindAddress: "2001:db8::7"
        mode: nftables
        nftables: {minSyncPeriod: 2s, syncPeriod: 1m}
        iptables: {syncPeriod: 7s}
        logging: {verbosity: 3, format: json}
        ---
        apiVersion: lbproxy.io/v1alpha1
        kind: LbproxyConfiguration
        algorithm: maglev
        nodeIPs: [192.0.2.1, "2001:db8::1"]
        maps: {sockets: 1024, backends: 99}
        cgroup: /sys/fs/cgroup/some
        bpffs: /sys/fs/bpf/other
        manifests: /etc/cluster
        metrics: false
        events: false
        metricsMaxSeries: 5
        ---
    """)
    loaded = load(tmp_path, text, "--map-rows", "backends=7")
    assert loaded.node_name == "worker-2"
    assert loaded.bind_address == ipaddress.ip_address("2001:db8::7")
    assert (loaded.min_sync_period_s, loaded.sync_period_s) == (2, 60)
    assert (loaded.log_level, loaded.log_format) == (3, config.LogFormat.JSON)
    assert loaded.algorithm is model.Algorithm.MAGLEV
    assert [str(ip) for ip in loaded.node_ips] == ["192.0.2.1", "2001:db8::1"]
    assert loaded.map_rows == config.MapRows(sockets=1024, backends=7)
    assert loaded.cgroup == pathlib.Path("/sys/fs/cgroup/some")
    assert loaded.bpffs == pathlib.Path("/sys/fs/bpf/other")
    assert loaded.manifests == pathlib.Path("/etc/cluster")
    assert loaded.healthz_bind_address == ("::", 10256)
    assert loaded.metrics_bind_address is None
    assert (loaded.events, loaded.metrics_max_series) == (False, 5)
    assert loaded.nodeport_primary
    assert not loaded.localhost_node_ports
    assert loaded.ignored == (f"{tmp_path}/config.conf:8: iptables.syncPeriod: the mode is nftables",)


@pytest.mark.parametrize(
    ("field", "path", "message"),
    [
        ("bindAddress: somewhere", "bindAddress", "'somewhere' is not an IP address"),
        ("healthzBindAddress: 0.0.0.0:99999", "healthzBindAddress", "the port is not in 1 to 65535"),
        ("metricsBindAddress: localhost", "metricsBindAddress", "is not an IP:PORT"),
        ("mode: userspace", "mode", "is not one of iptables, ipvs, nftables"),
        ("detectLocalMode: Guess", "detectLocalMode", "is not one of ClusterCIDR"),
        ("detectLocalMode: BridgeInterface", "detectLocalMode", "detectLocal.bridgeInterface"),
        ("detectLocalMode: InterfaceNamePrefix", "detectLocalMode", "detectLocal.interfaceNamePrefix"),
        ("clusterCIDR: 10.244.0.0", "clusterCIDR", "is not a CIDR"),
        ("clusterCIDR: 10.1.0.0/16,10.2.0.0/16", "clusterCIDR", "one of each family"),
        ("nodePortAddresses: [10.0.0.0]", "nodePortAddresses", "is not a CIDR"),
        ("nodePortAddresses: [primary, 10.0.0.0/8]", "nodePortAddresses", "primary stands alone"),
        ("nodePortAddresses: 10.0.0.0/8", "nodePortAddresses", "is not a list"),
        ("oomScoreAdj: -1001", "oomScoreAdj", "-1001 is not in -1000 to 1000"),
        ("configSyncPeriod: -1s", "configSyncPeriod", "is negative"),
        ("iptables: {syncPeriod: 30}", "iptables.syncPeriod", "is not a string"),
        (
            "iptables: {minSyncPeriod: 1h}",
            "iptables.minSyncPeriod",
            "longer than the sync period, which is 30s",
        ),
        ("iptables: {masqueradeBit: 32}", "iptables.masqueradeBit", "is not in 0 to 31"),
        ("iptables: {masqueradeAll: sometimes}", "iptables.masqueradeAll", "is not true or false"),
        ("iptables: all", "iptables", "is not a mapping"),
        ("nftables: {masqueradeBit: -1}", "nftables.masqueradeBit", "is not in 0 to 31"),
        ("ipvs: {tcpTimeout: -1s}", "ipvs.tcpTimeout", "is negative"),
        ("ipvs: {excludeCIDRs: [x]}", "ipvs.excludeCIDRs", "is not a CIDR"),
        ("conntrack: {min: -1}", "conntrack.min", "-1 is not in"),
        ("conntrack: {udpTimeout: soon}", "conntrack.udpTimeout", "is not a duration"),
        ("clientConnection: {burst: -1}", "clientConnection.burst", "-1 is not in"),
        ("hostnameOverride: 5", "hostnameOverride", "5 is not a string"),
        ("hostnameOverride: 2024-99-99", "hostnameOverride", "'2024-99-99' is not a value"),
        ("logging: {format: xml}", "logging.format", "is not one of text, json"),
        ("logging: {verbosity: loud}", "logging.verbosity", "is not a whole number"),
        ("featureGates: [A]", "featureGates", "is not a mapping"),
    ],
)
def test_a_bad_value_is_named_by_file_line_and_path(
    tmp_path: pathlib.Path, field: str, path: str, message: str
) -> None:
    (problem,) = problems(tmp_path, KUBE_HEAD + field)
    assert problem.startswith(f"config.conf:3: {path}: ")
    assert message in problem


@pytest.mark.parametrize(
    ("field", "path"),
    [
        ("algorithm: best", "algorithm"),
        ("xdp: maybe", "xdp"),
        ("mode: nat", "mode"),
        ("nodeIPs: [x]", "nodeIPs"),
        ("maps: {sockets: 3}", "maps"),
        ("maps: {unknown: 3}", "maps"),
        ("metricsMaxSeries: -1", "metricsMaxSeries"),
        ("events: 1", "events"),
    ],
)
def test_a_bad_value_of_our_own_is_named_too(tmp_path: pathlib.Path, field: str, path: str) -> None:
    (problem,) = problems(tmp_path, OWN_HEAD + field)
    assert problem.startswith(f"config.conf:3: {path}: ")


def test_all_problems_of_flags_and_file_come_at_once(tmp_path: pathlib.Path) -> None:
    text = (
        KUBE_HEAD + "bindAddress: x\nmode: y\niptables:\n  syncPeriod: z\n---\n" + OWN_HEAD + "algorithm: w\n"
    )
    assert [
        line.split(": ")[0:2] for line in problems(tmp_path, text, "--xdp", "v", "stray", "--no-such-flag")
    ] == [
        ["'stray'", "arguments other than flags are not taken"],
        ["--no-such-flag", "unknown flag; --help lists those there are"],
        ["--xdp", "'v' is not one of native, generic, off"],
        ["config.conf:3", "bindAddress"],
        ["config.conf:4", "mode"],
        ["config.conf:6", "iptables.syncPeriod"],
        ["config.conf:10", "algorithm"],
    ]


def test_unknown_and_repeated_fields_are_warnings(tmp_path: pathlib.Path) -> None:
    loaded = load(tmp_path, KUBE_HEAD + "newField: 1\nmode: ipvs\nipvs: {newer: 2}\nmode: nftables\n")
    assert loaded.proxy_mode is config.ProxyMode.NFTABLES
    assert [line.removeprefix(f"{tmp_path}/config.conf:") for line in loaded.warnings] == [
        "6: mode: given twice, the last one counts",
        "3: newField: unknown field, left out",
        "5: ipvs.newer: unknown field, left out",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (KUBE_HEAD + "a: [1\nb: 2", "config.conf:4: not YAML: "),
        (KUBE_HEAD + "\tmode: ipvs", "config.conf:3: not YAML: "),
        (KUBE_HEAD.encode() + b"mode: \xff\xfe", "config.conf:3: not UTF-8"),
        (KUBE_HEAD + "mode: \x01", "config.conf:3: not YAML: a character that is not allowed"),
        (KUBE_HEAD + "mode: *nothing", "config.conf:3: not YAML: "),
        (KUBE_HEAD + "mode: !!python/object:os.system x", "config.conf:3: not YAML: "),
        (KUBE_HEAD + "logging: {options: &a [*a]}", "config.conf:3: not YAML: found unconstr"),
        (KUBE_HEAD + "logging: {options: " + "[" * 5000, "config.conf: nested too deeply"),
        ("- a", "config.conf:1: a document is to be a mapping of fields"),
        ("mode: ipvs", "config.conf:1: a document without apiVersion and kind is not "),
        ("apiVersion: v1\nkind: ConfigMap", "config.conf:1: v1 ConfigMap is not "),
        (KUBE_HEAD.replace("v1alpha1", "v1"), "config.conf:1: kubeproxy.config.k8s.io/v1 KubeProxy"),
        (f"{KUBE_HEAD}---\n{KUBE_HEAD}", "config.conf:4: a second KubeProxyConfiguration"),
        (f"{OWN_HEAD}---\n{OWN_HEAD}", "config.conf:4: a second LbproxyConfiguration"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_its_place(
    tmp_path: pathlib.Path, text: str | bytes, problem: str
) -> None:
    (found,) = problems(tmp_path, text)
    assert found.startswith(problem)
    assert "\n" not in found


def test_a_file_that_is_not_there_is_a_problem(tmp_path: pathlib.Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(errors.ConfigError) as caught:
            loading.from_arguments([f"--config={path}"], HOST)
        assert caught.value.lines() == (f"--config: {path}: {reason}",)


def test_an_empty_file_sets_nothing(tmp_path: pathlib.Path) -> None:
    assert load(tmp_path, "---\n---\n").node_name == "node-a.example"


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(content: bytes) -> None:
    config_file.read(content, "file")


@given(
    st.dictionaries(
        st.sampled_from(sorted(config_file.kube_schema())),
        st.none() | st.booleans() | st.integers() | TEXTS | st.lists(TEXTS, max_size=3) | st.floats(),
        max_size=5,
    )
)
def test_no_value_breaks_the_decoder(fields: dict[str, object]) -> None:
    document = {"apiVersion": config_file.KUBE_PROXY[0], "kind": config_file.KUBE_PROXY[1]}
    read = config_file.read(json.dumps(document | fields).encode(), "file")
    top_level = {field for field in fields if "." not in field}
    named = {*read.kube, *(line.split(": ")[1] for line in read.problems)}
    assert named <= top_level
    assert len(read.warnings) == len(fields) - len(top_level)
