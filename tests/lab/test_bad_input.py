"""Whatever is wrong around the agent: one clear line about it, and the rest keeps working."""

import collections.abc
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import typing

import pytest

from lbproxy import errors, noting
from lbproxy.core import tables
from lbproxy.kernel import bpffs, features
from lbproxy.lab import cluster
from tests import polling
from tests.kube import certificates
from tests.lab import agents, manifests

GOOD = 1
TCP, UDP = manifests.TCP_PORT, manifests.UDP_PORT
PODS = ("n1/p2", "n2/p1")


@pytest.fixture(scope="module")
def servers(lab: cluster.Lab) -> None:
    for pod in PODS:
        lab.serve(pod)


@pytest.fixture(scope="module")
def folder(lab: cluster.Lab) -> agents.Folder:
    made = agents.Folder(lab.workdir / "manifests")
    made.write("good.json", good(lab, *PODS))
    return made


@pytest.fixture(scope="module")
def agent(lab: cluster.Lab, folder: agents.Folder, servers: None) -> collections.abc.Iterator[agents.Agent]:
    """One agent for all bad files. It must survive them without a traceback."""
    rows = ["--map-rows", "backends=16384", "--map-rows", "slots=4096", "--map-rows", "services=4096"]
    with agents.Agent(lab, folder.source, *rows, "--map-growth-limit=1") as running:
        yield running
        assert running.running
        assert "Traceback" not in running.log


def good(lab: cluster.Lab, *pods: str) -> list[manifests.Object]:
    return [manifests.service("good", GOOD), *manifests.slices("good", [lab[pod] for pod in pods])]


@contextlib.contextmanager
def all_else_works(agent: agents.Agent, folder: agents.Folder) -> collections.abc.Iterator[None]:
    """See that the good service is served during the block, and that its changes are still followed."""
    try:
        yield
        (before, *_) = sorted(agent.backends("good"))
        (pod,) = set(PODS) - {before}
        folder.write("good.json", good(agent.lab, pod))
        agent.has_backends("good", {pod})
        assert agent.at("n1/p1").tcp(manifests.cluster_ip(GOOD), TCP).server == pod
        assert agent.at("n1").udp(manifests.cluster_ip(GOOD, 6), UDP, connected=False).server == pod
    finally:
        for path in folder.path.glob("bad*"):
            path.unlink()
        # The next test must not meet what this one has left.
        polling.eventually(lambda: agent.services() == {"good"}, what="nothing but the good service")


def bad_service(name: str = "bad", **spec: typing.Any) -> manifests.Object:
    return manifests.service(name, 3, **spec)


def bad_port(name: str, **fields: typing.Any) -> list[manifests.Object]:
    service = bad_service(name)
    service["spec"]["ports"][0] |= fields
    return [service]


def bad_endpoint(name: str, address: str) -> list[manifests.Object]:
    piece = manifests.slices(name, [])[0]
    piece["endpoints"] = [{"addresses": [address]}]
    return [piece]


class BadFile(typing.NamedTuple):
    """A file, and what the only line about it says."""

    name: str
    content: typing.Any
    said: str


BAD_FILES = [
    BadFile("bad-yaml.yaml", "kind: Service\n  spec: [1, 2\n", "bad-yaml.yaml"),
    BadFile("bad-json.json", '{"kind": "Service", ', "bad-json.json"),
    BadFile("bad-utf8.yaml", b"kind: Service\nmetadata: {name: \xff\xfe}\n", "bad-utf8.yaml"),
    BadFile("bad-shape.yaml", "- just\n- words\n", "bad-shape.yaml"),
    BadFile("bad-ip.json", [bad_service("ip", clusterIP="10.96.0.300", clusterIPs=[])], "'10.96.0.300'"),
    BadFile("bad-outside.json", [bad_service("outside", externalIPs=["127.0.0.1"])], "spec.externalIPs[0]"),
    BadFile("bad-metadata.json", bad_endpoint("metadata", "169.254.169.254"), "'169.254.169.254'"),
    BadFile("bad-port.json", bad_port("port", port=70000), "spec.ports[0].port: 70000"),
    BadFile("bad-text.json", bad_port("text", port="eighty"), "default/text: spec.ports[0].port"),
    BadFile("bad-node-port.json", bad_port("node-port", nodePort=-1), "spec.ports[0].nodePort: -1"),
    BadFile("bad-protocol.json", bad_port("protocol", protocol="CARP"), "'CARP'"),
    BadFile("bad-name.json", [bad_service("n" * 64)], "metadata.name"),
    BadFile("bad-version.json", [bad_service("version") | {"apiVersion": "v2"}], "'v2 Service'"),
    BadFile(
        "bad-slice-version.json",
        [manifests.slices("bad", [])[0] | {"apiVersion": "discovery.k8s.io/v1beta1"}],
        "'discovery.k8s.io/v1beta1 EndpointSlice'",
    ),
]


def test_each_bad_file_is_told_in_one_line(agent: agents.Agent, folder: agents.Folder) -> None:
    before = len(agent.log.splitlines())
    with all_else_works(agent, folder):
        for bad in BAD_FILES:
            folder.write(bad.name, bad.content)
        for bad in BAD_FILES:
            agent.says(bad.said)
    with all_else_works(agent, folder):
        # Written again, they are not told again, unless they had gone meanwhile.
        for bad in BAD_FILES * 2:
            folder.write(bad.name, bad.content)
        agent.says(BAD_FILES[-1].said)
    told = [line for line in agent.log.splitlines()[before:] if " W " in line or " E " in line]
    for bad in BAD_FILES:
        assert len([line for line in told if bad.said in line]) in (1, 2), (bad, told)
    assert all(any(bad.said in line for bad in BAD_FILES) for line in told), told
    names = [bad.name.partition(".")[0].removeprefix("bad-") for bad in BAD_FILES]
    assert not {port for name in names for port in agent.ports(name)}


def test_the_last_good_version_of_an_object_stays(agent: agents.Agent, folder: agents.Folder) -> None:
    address = manifests.cluster_ip(3)
    folder.write("bad.json", [bad_service(), *manifests.slices("bad", [agent.lab["n1/p2"]])])
    with all_else_works(agent, folder):
        agent.has_backends("bad", {"n1/p2"})
        folder.write(
            "bad.json", [*bad_port("bad", port=70001), *manifests.slices("bad", [agent.lab["n2/p1"]])]
        )
        agent.says("70001")
        # The service is as it was; its endpoints are followed.
        agent.has_backends("bad", {"n2/p1"})
        assert agent.at("n1/p1").tcp(address, TCP).server == "n2/p1"
        # Of a slice as a whole: what else it says is of the same hand.
        folder.write("bad.json", [bad_service(), *bad_endpoint("bad", "127.0.0.1")])
        agent.says("endpoints[0].addresses[0]: '127.0.0.1' is loopback: the API server refuses it")
        assert agent.at("n1/p1").tcp(address, TCP).server == "n2/p1"
        folder.write("bad.json", "{")
        agent.says("bad.json")
        assert agent.at("n1/p1").tcp(address, TCP).server == "n2/p1"


def test_slices_of_an_unknown_service_wait_for_it(agent: agents.Agent, folder: agents.Folder) -> None:
    with all_else_works(agent, folder):
        folder.write("bad-1.json", manifests.slices("bad", [agent.lab["n1/p2"]]))
    with all_else_works(agent, folder):
        folder.write("bad-1.json", manifests.slices("bad", [agent.lab["n1/p2"]]))
        folder.write("bad-2.json", [bad_service()])
        agent.has_backends("bad", {"n1/p2"})
        assert agent.at("n1/p1").tcp(manifests.cluster_ip(3), TCP).server == "n1/p2"


def test_an_unknown_address_type_is_passed_over(agent: agents.Agent, folder: agents.Folder) -> None:
    (named, other) = manifests.slices("bad", [agent.lab["n1/p2"]])
    named |= {"addressType": "FQDN"}
    named["endpoints"] = [{"addresses": ["bad.example"], "conditions": {"ready": True}}]
    with all_else_works(agent, folder):
        folder.write("bad.json", [bad_service(), named, other])
        agent.has_backends("bad", {"n1/p2"}, [("http", 6)])
        agent.has_backends("bad", set(), [("http", 4)])
        sockets = agent.at("n1/p1")
        assert sockets.tcp(manifests.cluster_ip(3, 6), TCP).server == "n1/p2"
        assert sockets.tcp(manifests.cluster_ip(3), TCP).error == "ECONNREFUSED"


def test_duplicates_count_once_and_the_live_one_counts(agent: agents.Agent, folder: agents.Folder) -> None:
    one, two = (agent.lab[pod] for pod in PODS)
    dying: manifests.Object = {"ready": False, "serving": True, "terminating": True}
    members = [manifests.Member(one), manifests.Member(one), manifests.Member(two, **dying)]
    again = manifests.slices("bad", [manifests.Member(two), manifests.Member(one, **dying)])
    for obj in again:
        obj["metadata"]["name"] += "-again"
    with all_else_works(agent, folder):
        folder.write("bad.json", [bad_service(), *manifests.slices("bad", members), *again])
        agent.has_backends("bad", set(PODS))
        for family in (4, 6):
            port = agent.port("bad", family=family)
            assert [one.slot_count for one in port.frontends] == [2]
            assert [one.state for one in port.backends] == [tables.BackendState.ACTIVE] * 2


def test_two_services_that_claim_one_address_disturb_nobody(
    agent: agents.Agent, folder: agents.Folder
) -> None:
    claimed: manifests.Object = {"externalIPs": ["192.0.2.66"]}
    with all_else_works(agent, folder):
        folder.write(
            "bad.json",
            [
                bad_service(**claimed),
                *manifests.slices("bad", [agent.lab["n1/p2"]]),
                manifests.service("worse", 4, **claimed),
                *manifests.slices("worse", [agent.lab["n2/p1"]]),
                # And one that wants the ClusterIP of the good one.
                manifests.service("worst", GOOD),
                *manifests.slices("worst", [agent.lab["n1/p3"]]),
            ],
        )
        agent.has_backends("bad", {"n1/p2"})
        agent.has_backends("worse", {"n2/p1"})
        sockets = agent.at("n1/p1")
        assert sockets.tcp(manifests.cluster_ip(3), TCP).server == "n1/p2"
        assert sockets.tcp(manifests.cluster_ip(4), TCP).server == "n2/p1"
        winners = {sockets.tcp("192.0.2.66", TCP).server for _ in range(20)}
        assert len(winners) == 1
        assert winners <= set(PODS)
        # When the winner goes, the other has it.
        (winner,) = winners
        name, number, place = ("bad", 3, "n1/p2") if winner == "n2/p1" else ("worse", 4, "n2/p1")
        left = [manifests.service(name, number, **claimed), *manifests.slices(name, [agent.lab[place]])]
        folder.write("bad.json", left)
        polling.eventually(lambda: sockets.tcp("192.0.2.66", TCP).server == place, what="the other")


def test_ten_thousand_endpoints_in_one_service(agent: agents.Agent, folder: agents.Folder) -> None:
    lab = agent.lab
    # One pod has them all.
    lab.check_output("n1/p2", ["ip", "route", "add", "local", "10.245.0.0/16", "dev", "lo"])
    lab.check_output("n1", ["ip", "route", "add", "10.245.0.0/16", "via", lab["n1/p2"].ipv4])
    addresses = [f"10.245.{number // 250}.{number % 250 + 1}" for number in range(10_000)]
    pieces = []
    for first in range(0, len(addresses), 1000):
        piece = manifests.slices("bad", [])[0]
        piece["metadata"]["name"] = f"bad-{first}"
        piece["endpoints"] = [{"addresses": [address]} for address in addresses[first : first + 1000]]
        pieces.append(piece)
    ports = [manifests.HTTP]
    with all_else_works(agent, folder):
        folder.write("bad.json", [bad_service(ports=ports), *pieces])
        polling.eventually(
            lambda: [one.slot_count for one in agent.port("bad").frontends] == [10_000], what="10,000 slots"
        )
        result = lab.client("n1/p1", "short", manifests.cluster_ip(3), TCP, count=2000).result()
        assert (result.failures, result.servers) == ({}, {"n1/p2": 2000})
        used = sum(1 for backend in agent.port("bad").backends if backend.connections)
        # 2,000 draws of 10,000 hit 1,813 different ones, give or take 13.
        assert 1700 < used < 1930


def test_more_endpoints_than_there_is_room_for(agent: agents.Agent, folder: agents.Folder) -> None:
    piece = manifests.slices("bad", [])[0]
    piece["endpoints"] = [
        {"addresses": [f"10.250.{number // 250}.{number % 250 + 1}"]} for number in range(20_000)
    ]
    with all_else_works(agent, folder):
        folder.write("bad.json", [bad_service(), piece])
        assert "default/bad" in agent.says("not served as planned")


def test_the_longest_names(agent: agents.Agent, folder: agents.Folder) -> None:
    name, port_name = "n" * 63, "p" * 63
    ports = [manifests.HTTP._replace(name=port_name)]
    long = manifests.service(name, 3, ports=ports)
    with all_else_works(agent, folder):
        folder.write("bad.json", [long, *manifests.slices(name, [agent.lab["n1/p2"]], ports=ports)])
        agent.has_backends(name, {"n1/p2"}, [(port_name, 4), (port_name, 6)])
        assert agent.at("n1/p1").tcp(manifests.cluster_ip(3), TCP).server == "n1/p2"
        assert name in agent.lbproxy("services", "-o", "json")
        assert port_name in agent.lbproxy("services", "-o", "json")


def test_a_folder_that_vanishes_and_comes_back(agent: agents.Agent, folder: agents.Folder) -> None:
    away = folder.path.with_name("away")
    folder.path.rename(away)
    try:
        assert "last state stays" in agent.says("No such file or directory")
        assert agent.at("n1/p1").tcp(manifests.cluster_ip(GOOD), TCP).server in PODS
        # The test before may have left one of its own.
        said = f"Manifest {folder.path} is rejected"
        polling.eventually(lambda: said in agent.lbproxy("status"), what=said)
    finally:
        away.rename(folder.path)
    with all_else_works(agent, folder):
        polling.eventually(lambda: not noting.read(agent.root).rejected)


# --- the API server ---


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    with agents.Api(lab.netns("n2"), *good(lab, *PODS), tokens=["right"]) as running:
        yield running


@pytest.fixture(scope="module")
def kubeconfig(lab: cluster.Lab, api: agents.Api) -> pathlib.Path:
    assert api.server is not None
    path = lab.workdir / "kubeconfig"
    path.write_text(kubeconfig_text(api.server.url, "right"))
    return path


def kubeconfig_text(url: str, token: str) -> str:
    return f"""
apiVersion: v1
kind: Config
clusters: [{{name: c, cluster: {{server: "{url}"}}}}]
users: [{{name: u, user: {{token: "{token}"}}}}]
contexts: [{{name: x, context: {{cluster: c, user: u}}}}]
current-context: x
"""


@pytest.fixture(scope="module")
def reader(
    lab: cluster.Lab, kubeconfig: pathlib.Path, servers: None
) -> collections.abc.Iterator[agents.Agent]:
    """An agent on the other node, that follows an API server with all its faults."""
    with agents.Agent(lab, ["--kubeconfig", str(kubeconfig)], *agents.SMALL_MAPS, node="n2") as running:
        yield running
        assert running.running
        assert "Traceback" not in running.log


def follows(reader: agents.Agent, api: agents.Api) -> None:
    """See that changes still arrive."""
    for pods in ({"n1/p2"}, {"n2/p1"}, set(PODS)):
        api.put(*manifests.slices("good", [reader.lab[pod] for pod in sorted(pods)]))
        reader.has_backends("good", pods)
        assert reader.at("n2/p2").tcp(manifests.cluster_ip(GOOD), TCP).server in pods


HALF = b'{"type":"MODIFIED","object":{"kind":"EndpointSlice","apiVersion":"discovery.k8s.io/v1","meta'


@pytest.mark.parametrize(
    ("line", "dropped", "told"),
    [
        (HALF, True, ""),
        (HALF + b"\n", False, "unreadable"),
        (b'{"type":"MODIFIED","object":{"metadata":{"name":"\xff\xfe"}}}\n', False, "EndpointSlice"),
        (b"\0\0\0\n", False, "unreadable"),
        (b'{"type":"NEWS","object":{}}\n', False, ""),
    ],
    ids=["cut and dropped", "cut", "invalid UTF-8", "zeros", "unknown type"],
)
def test_a_bad_line_of_a_watch_is_survived(
    reader: agents.Agent, api: agents.Api, line: bytes, dropped: bool, told: str
) -> None:
    polling.eventually(lambda: api.do(lambda server: server.watching("endpointslices")), what="a watch")
    if dropped:
        api.do(lambda server: server.drop_after("endpointslices", line))
    else:
        api.do(lambda server: server.send("endpointslices", line))
    if told:
        reader.says(told)
    assert reader.at("n2/p2").tcp(manifests.cluster_ip(GOOD), TCP).server in PODS
    follows(reader, api)


@pytest.mark.parametrize("status", [500, 401, 403, 429])
def test_a_refusing_api_server_is_asked_again(reader: agents.Agent, api: agents.Api, status: int) -> None:
    before = reader.log.count(str(status))

    def refuse(server: typing.Any) -> None:
        # Refused credentials are read again and tried a second time.
        server.faults.fail, server.faults.fail_status = 8 if status == 401 else 3, status
        server.cut()

    api.do(refuse)
    polling.eventually(lambda: reader.log.count(str(status)) > before, what=f"a line about {status}")
    assert reader.at("n2/p2").tcp(manifests.cluster_ip(GOOD), TCP).server in PODS
    polling.eventually(lambda: api.do(lambda server: server.faults.fail == 0), what="another attempt")
    follows(reader, api)


def test_a_compacted_history_is_listed_again(reader: agents.Agent, api: agents.Api) -> None:
    def compact(server: typing.Any) -> None:
        server.faults.gone_watches = 1
        server.cut()

    api.do(compact)
    follows(reader, api)


@pytest.fixture
def other_flags(reader: agents.Agent) -> collections.abc.Iterator[agents.Agent]:
    """The agent, to be started with other flags; with its own again at the end."""
    flags = reader.flags
    reader.stop()
    try:
        yield reader
    finally:
        if reader.process is not None:
            reader.stop()
        reader.flags = flags
        reader.start()


def test_a_wrong_token_leaves_the_datapath_as_it_is(
    other_flags: agents.Agent, lab: cluster.Lab, api: agents.Api
) -> None:
    assert api.server is not None
    path = lab.workdir / "wrong"
    path.write_text(kubeconfig_text(api.server.url, "wrong"))
    other_flags.flags = ["--kubeconfig", str(path), *agents.SMALL_MAPS]
    other_flags.start(wait=False)
    assert "Unauthorized" in other_flags.says("401")
    assert other_flags.at("n2/p2").tcp(manifests.cluster_ip(GOOD), TCP).server in PODS
    # The right one is taken up without a restart.
    path.write_text(kubeconfig_text(api.server.url, "right"))
    other_flags.wait_ready()


def test_an_untrusted_certificate_leaves_the_datapath_as_it_is(
    other_flags: agents.Agent, lab: cluster.Lab, tmp_path: pathlib.Path
) -> None:
    authority = certificates.Authority(tmp_path)
    context = authority.server_context(authority.pair("server"))
    with agents.Api(lab.netns("n2"), port=8443, tls=context) as stranger:
        other_flags.flags = [*stranger.source, *agents.SMALL_MAPS]
        other_flags.start(wait=False)
        assert "certificate" in other_flags.says("next attempt").lower()
        assert other_flags.at("n2/p2").tcp(manifests.cluster_ip(GOOD), TCP).server in PODS
        assert other_flags.running


# --- what the agent needs to start ---


def run(
    agent: agents.Agent, *flags: str, wrapper: collections.abc.Sequence[str] = ()
) -> tuple[int, list[str]]:
    """Start another agent that ends by itself: its status and what it said."""
    argv = [*wrapper, *agent.command(*flags, "--healthz-bind-address", "", "--metrics-bind-address", "")]
    ended = subprocess.run(
        agent.lab.command("n1", argv, cgroup=False), capture_output=True, text=True, check=False, timeout=120
    )
    return ended.returncode, ended.stderr.splitlines()


@pytest.fixture
def unstarted(lab: cluster.Lab, folder: agents.Folder, tmp_path: pathlib.Path) -> agents.Agent:
    """An agent of its own, never started."""
    return agents.Agent(lab, folder.source, *agents.SMALL_MAPS)


def test_a_missing_cgroup_is_told(unstarted: agents.Agent, tmp_path: pathlib.Path) -> None:
    for path, text in ((tmp_path / "none", "no such folder"), (tmp_path, "not in a cgroup v2 hierarchy")):
        status, (line,) = run(unstarted, "--cgroup", str(path))
        assert (status, text in line, str(path) in line) == (1, True, True)
    assert not unstarted.root.exists()


def test_an_unusable_bpffs_is_told(unstarted: agents.Agent, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "below", tmp_path / "file"):
        status, (line,) = run(unstarted, "--bpffs", str(path))
        assert (status, str(path) in line) == (1, True)


def test_a_missing_bpffs_is_mounted(unstarted: agents.Agent) -> None:
    assert not bpffs.is_bpffs(unstarted.root.parent)
    with unstarted:
        # Seen from here too: the mount belongs to everybody, as the one of the node does.
        assert os.path.ismount(unstarted.root)
        assert bpffs.is_bpffs(unstarted.root)
    assert not unstarted.root.exists()


def test_missing_capabilities_are_told(unstarted: agents.Agent) -> None:
    status, (line,) = run(unstarted, wrapper=["setpriv", "--bounding-set", "-all"])
    assert (status, "CAP_BPF" in line, "CAP_NET_ADMIN" in line) == (1, True, True)
    assert not unstarted.root.exists()


class Refused(agents.Agent):
    """An agent on a kernel that refuses a program of the packet path."""

    def command(self, *flags: str) -> list[str]:
        _, _, _, *rest = super().command(*flags)
        return [sys.executable, "-c", REFUSED, *rest]


REFUSED = """
import errno, sys
from lbproxy import cli
from lbproxy.kernel import libbpf
real = libbpf.prog_load
def prog_load(kind, name, *rest):
    if name == "tc_open":
        raise libbpf.RefusedError(errno.EACCES, name, "R1 invalid mem access 'scalar' !")
    return real(kind, name, *rest)
libbpf.prog_load = prog_load
sys.exit(cli.main())
"""


def test_a_kernel_that_refuses_the_packet_path_serves_sockets(
    lab: cluster.Lab, folder: agents.Folder, servers: None
) -> None:
    told = "the packet path is off: this kernel refuses its programs (tc_open: R1 invalid mem access"
    # Another agent may serve this node too, and have the usual port.
    health = ("--healthz-bind-address", "127.0.0.1:10356")
    with Refused(lab, folder.source, *agents.SMALL_MAPS, *health, node="n2") as agent:
        for how in ("created", "adopted"):
            assert f"datapath {how}" in agent.log
            agent.says(told)
            assert agent.log.count(told) == 1
            assert agent.at("n2/p1").tcp(manifests.cluster_ip(GOOD), TCP).server in PODS
            assert agent.at("n2").udp(manifests.cluster_ip(GOOD, 6), UDP, connected=False).server in PODS
            answer = agents.run_script(
                lab,
                "n2",
                # With 503 too there are reasons; and it is served a moment after the agent is ready.
                "import json,time,urllib.error,urllib.request as r\n"
                "for left in range(50, -1, -1):\n"
                "    try:\n"
                "        found = r.urlopen('http://127.0.0.1:10356/healthz',timeout=5)\n"
                "    except urllib.error.HTTPError as answer:\n"
                "        found = answer\n"
                "    except OSError:\n"
                "        assert left\n"
                "        time.sleep(0.1)\n"
                "        continue\n"
                "    break\n"
                "print(json.dumps(found.read().decode()))",
            )
            assert told in answer
            assert json.loads(agent.lbproxy("status", "-o", "json"))["devices"] == []
            assert agent.stop() == 0
            agent.start()


@pytest.mark.parametrize("feature", features.FEATURES, ids=lambda feature: feature.since)
def test_a_kernel_without_a_feature_is_told(feature: features.Feature) -> None:
    def probe_type(kind: int) -> bool:
        return feature.helper is not None or kind != feature.prog_type

    def probe_helper(kind: int, helper: int) -> bool:
        return (kind, helper) != (feature.prog_type, feature.helper)

    with pytest.raises(errors.UnsupportedKernel) as caught:
        features.check(probe_type, probe_helper)
    assert caught.value.exit_status == 3
    (line,) = caught.value.lines()
    assert feature.what in line
    assert feature.since in line
    # Where the kernel gives no answer, the verifier will.
    features.check(lambda _kind: None, lambda _kind, _helper: None)
