"""lbproxy against an API server, driven through the official synchronous client.

Always against the stand-in over real HTTP; and the same against a real API server
where KUBECONFIG names a cluster that was made for it, which its current context
has to say: a name that begins with `lbproxy-e2e`. Nothing of the cluster is used
but its API: the agent's hooks are on a cgroup of a lab, whose pods are the
clients and backends, so the node that runs the test is left alone.
"""

import asyncio
import collections.abc
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import typing
import uuid

import kubernetes
import pytest
import yaml

from lbproxy.kernel import bpffs
from lbproxy.lab import apiserver, cluster, topology
from tests import polling

CONTEXT_PREFIX = "lbproxy-e2e"
PORT = 8080


class Api(typing.NamedTuple):
    """An API server: how to reach it, and whether it is a real one."""

    kubeconfig: pathlib.Path
    real: bool


@contextlib.contextmanager
def stand_in() -> collections.abc.Iterator[str]:
    """Run the stand-in on loopback, in a thread of its own; yields its URL."""
    listening = threading.Event()
    found: dict[str, typing.Any] = {}

    async def serve() -> None:
        stop = asyncio.Event()
        async with apiserver.ApiServer() as server:
            found.update(url=server.url, stop=stop, loop=asyncio.get_running_loop())
            listening.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert listening.wait(30)
    try:
        yield found["url"]
    finally:
        found["loop"].call_soon_threadsafe(found["stop"].set)
        thread.join(30)


def real_kubeconfig() -> pathlib.Path:
    path = os.environ.get("KUBECONFIG", "")
    if not path:
        pytest.skip("KUBECONFIG names no cluster")
    context = yaml.safe_load(pathlib.Path(path).read_text()).get("current-context", "")
    if not context.startswith(CONTEXT_PREFIX):
        pytest.skip(f"KUBECONFIG: context {context!r} is not {CONTEXT_PREFIX}*: not a cluster made for this")
    return pathlib.Path(path)


@pytest.fixture(params=["stand-in", "real"])
def api(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> collections.abc.Iterator[Api]:
    if request.param == "real":
        yield Api(real_kubeconfig(), real=True)
        return
    with stand_in() as url:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "stand-in",
            "clusters": [{"name": "stand-in", "cluster": {"server": url}}],
            "users": [{"name": "nobody", "user": {}}],
            "contexts": [{"name": "stand-in", "context": {"cluster": "stand-in", "user": "nobody"}}],
        }
        path = tmp_path / "kubeconfig"
        path.write_text(yaml.safe_dump(config))
        yield Api(path, real=False)


@pytest.fixture
def client(api: Api) -> collections.abc.Iterator[typing.Any]:
    with kubernetes.config.new_client_from_config(str(api.kubeconfig)) as made:
        yield made


@pytest.fixture
def namespace(api: Api, client: typing.Any) -> collections.abc.Iterator[str]:
    name = f"{CONTEXT_PREFIX}-{uuid.uuid4().hex[:8]}"
    if not api.real:
        yield name
        return
    core = kubernetes.client.CoreV1Api(client)
    core.create_namespace({"metadata": {"name": name}})
    try:
        yield name
    finally:
        core.delete_namespace(name)


@contextlib.contextmanager
def agent(lab: cluster.Lab, api: Api) -> collections.abc.Iterator[pathlib.Path]:
    """Run the agent where the API server can be reached, with its hooks on the lab; yields its log."""
    root, log_file = lab.workdir / "bpf", lab.workdir / "agent.log"
    argv = [sys.executable, "-m", "lbproxy", "run", "--kubeconfig", str(api.kubeconfig), "--node-name", "n1"]
    argv += ["--cgroup", str(lab.cgroup("n1")), "--bpffs", str(root)]
    # Nothing of the lab's may be attached to the devices of this machine.
    argv += ["--packet-path=false"]
    argv += ["--healthz-bind-address", "", "--metrics-bind-address", ""]
    with log_file.open("wb") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        polling.eventually(lambda: " ready: " in log_file.read_text(), what="the agent's readiness")
        yield log_file
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        bpffs.remove(root)


def service(name: str, cluster_ip: str | None) -> dict[str, typing.Any]:
    spec: dict[str, typing.Any] = {
        "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": PORT}]
    }
    if cluster_ip:
        spec |= {"clusterIP": cluster_ip, "clusterIPs": [cluster_ip], "ipFamilies": ["IPv4"]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def endpoint_slice(name: str, addresses: collections.abc.Iterable[str]) -> dict[str, typing.Any]:
    endpoints = [{"addresses": [address], "conditions": {"ready": True}} for address in addresses]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{name}-1", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": PORT, "protocol": "TCP"}],
        "endpoints": endpoints,
    }


def test_a_service_from_creation_to_deletion(
    needs_lab: None, needs_bpf: None, api: Api, client: typing.Any, namespace: str
) -> None:
    core, discovery = kubernetes.client.CoreV1Api(client), kubernetes.client.DiscoveryV1Api(client)
    with cluster.Lab(topology.uniform(1, 3)) as lab, agent(lab, api):
        lab.serve("n1/p2", ports=(PORT,), name="first")
        lab.serve("n1/p3", ports=(PORT,), name="second")
        pod = lab.shell("n1/p1")
        one, two = lab["n1/p2"].ipv4, lab["n1/p3"].ipv4

        made = core.create_namespaced_service(namespace, service("web", None if api.real else "10.96.77.7"))
        address = made.spec.cluster_ip
        polling.eventually(lambda: pod.tcp(address, 80).error == "ECONNREFUSED", what="refusal")

        discovery.create_namespaced_endpoint_slice(namespace, endpoint_slice("web", [one]))
        polling.eventually(lambda: pod.tcp(address, 80).server == "first", what="the first backend")
        assert pod.tcp(address, 80).peer == (address, 80)

        discovery.replace_namespaced_endpoint_slice("web-1", namespace, endpoint_slice("web", [one, two]))
        polling.eventually(
            lambda: {pod.tcp(address, 80).server for _ in range(20)} == {"first", "second"},
            what="both backends",
        )

        discovery.replace_namespaced_endpoint_slice("web-1", namespace, endpoint_slice("web", [two]))
        polling.eventually(
            lambda: {pod.tcp(address, 80).server for _ in range(20)} == {"second"}, what="the second alone"
        )

        core.delete_namespaced_service("web", namespace)
        polling.eventually(
            lambda: pod.tcp(address, 80, timeout_s=0.2).error not in ("", "ECONNREFUSED"),
            what="nothing there",
        )
