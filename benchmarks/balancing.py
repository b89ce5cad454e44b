"""What an algorithm buys: tail latency where one backend of eight is slow.

A node with the real agent, a client's pod and eight servers' pods, all on one CPU. One of the servers
answers only after a while, as one does whose disk or neighbour is slow. A service for each
algorithm has the same eight backends; rounds run each of them once, in rotating order.
"""

import collections.abc
import contextlib
import functools
import pathlib
import subprocess
import sys
import tempfile
import time
import typing

import msgspec

from benchmarks import agents, arena, progress, results, rounds, stats
from lbproxy.kernel import bpffs
from lbproxy.lab import cluster, topology

BACKENDS = 8
CLIENTS = 16
PAUSE_MS = 5
SLOW_MS = 20
# What somebody may give the others who has found out which one it is.
WEIGHT = 10
ALGORITHMS = ("random", "maglev", "random, weights", "least-connections")
_SECONDS = 2.0
_WARM_UP_S = 0.3
_READY_S = 60.0
_PORT, _TARGET = 80, arena.PORT
_NODE = "n1"
_CLIENT, *_SERVERS = (f"{_NODE}/p{number}" for number in range(1, BACKENDS + 2))
SLOW = _SERVERS[0]


def steps(count: int, cpu: int, into: results.Results) -> list[progress.Step]:
    """List the one step of it, of so many rounds."""
    expected_s = 8 + len(ALGORITHMS) * (count * (_SECONDS + 0.3) + _WARM_UP_S)
    label = f"balancing: one slow backend of {BACKENDS}, {count} rounds"
    return [progress.Step(label, expected_s, functools.partial(_step, count, cpu, into))]


def _step(count: int, cpu: int, into: results.Results) -> str:
    into.balancing = measure(count, cpu)
    return ", ".join(
        f"{each.algorithm}: p95 {stats.summary(each.p95_us).median / 1e3:.1f} ms, "
        f"{stats.summary(each.slow_share).median:.1%} slow"
        for each in into.balancing
    )


def measure(count: int, cpu: int, seconds: float = _SECONDS) -> list[results.Balancing]:
    """Run the rounds; BenchError where a service does not answer."""
    arena.sweep()
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(cluster.Lab(topology.uniform(1, BACKENDS + 1), families=(4,)))
        address_of = _serve(lab, cpu, stack)
        found = {
            name: results.Balancing(name, CLIENTS, PAUSE_MS, SLOW_MS, BACKENDS, [], [], [], [], [], 0)
            for name in ALGORITHMS
        }
        for name in ALGORITHMS:
            _until_all_answer(lab, address_of[name], cpu)
            _run(lab, address_of[name], cpu, _WARM_UP_S)
        for number in range(count):
            for name in rounds.order(ALGORITHMS, number):
                seen = _run(lab, address_of[name], cpu, seconds)
                found[name] = _with(found[name], seen)
        return list(found.values())


class _Seen(msgspec.Struct):
    """What `balance_client.py` prints."""

    servers: dict[str, int]
    failed: int
    seconds: float
    took_us: list[float]


def _with(found: results.Balancing, seen: _Seen) -> results.Balancing:
    if not seen.took_us:
        raise arena.BenchError(f"{found.algorithm}: nobody was answered")
    answered = len(seen.took_us)
    p50, p95, p99 = (stats.percentile(seen.took_us, share) for share in (0.5, 0.95, 0.99))
    return msgspec.structs.replace(
        found,
        rate_per_s=[*found.rate_per_s, round(answered / seen.seconds, 1)],
        slow_share=[*found.slow_share, round(seen.servers.get(SLOW, 0) / answered, 5)],
        p50_us=[*found.p50_us, p50],
        p95_us=[*found.p95_us, p95],
        p99_us=[*found.p99_us, p99],
        failed=found.failed + seen.failed,
    )


def _serve(lab: cluster.Lab, cpu: int, stack: contextlib.ExitStack) -> dict[str, str]:
    """Start servers and the agent; returns the address of each algorithm's service."""
    for server in _SERVERS[1:]:
        stack.callback(lab.serve(server, [_TARGET], cpu=cpu).stop)
    argv = _script("balance_server", cpu, SLOW, _TARGET, SLOW_MS)
    slow = lab.popen(SLOW, argv, stdout=subprocess.PIPE)
    stack.callback(arena.end, slow)
    assert slow.stdout is not None
    if "ready" not in slow.stdout.readline():
        raise arena.BenchError("the slow server does not start")
    services = dict(zip(ALGORITHMS, (f"10.96.0.{number}" for number in range(1, 9)), strict=False))
    file = lab.workdir / "balancing.json"
    items = [each for name, address in services.items() for each in _objects(lab, name, address)]
    file.write_bytes(msgspec.json.encode({"apiVersion": "v1", "kind": "List", "items": items}))
    pins = pathlib.Path(tempfile.gettempdir()) / f"{arena.own_prefix()}balancing-pins"
    argv = [
        sys.executable, "-m", "lbproxy", "run", "--manifests", str(file), "--node-name", _NODE,
        "--cgroup", str(lab.cgroup(_NODE)), "--bpffs", str(pins),
    ]  # fmt: skip
    stack.callback(bpffs.remove, pins)
    agent = agents.Agent(lab, _NODE, argv)
    stack.callback(agent.stop)
    deadline_s = time.monotonic() + _READY_S
    while not any(" ready: " in line for line in agent.log()):
        agent.check()
        if time.monotonic() > deadline_s:
            raise arena.BenchError("the agent is not ready")
        time.sleep(0.1)
    return services


def _objects(lab: cluster.Lab, name: str, address: str) -> collections.abc.Iterator[dict[str, typing.Any]]:
    algorithm, _, weighted = name.partition(", ")
    weights = {"lbproxy.io/weights": f"{lab[SLOW].ipv4}=1, node:{_NODE}={WEIGHT}"} if weighted else {}
    metadata = {"name": name.replace(", ", "-"), "namespace": "default"}
    yield {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {**metadata, "annotations": {"lbproxy.io/algorithm": algorithm, **weights}},
        "spec": {"clusterIP": address, "ports": [{"name": "http", "port": _PORT}]},
    }
    yield {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {**metadata, "labels": {"kubernetes.io/service-name": metadata["name"]}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": _TARGET}],
        "endpoints": [{"addresses": [lab[server].ipv4], "nodeName": _NODE} for server in _SERVERS],
    }


def _until_all_answer(lab: cluster.Lab, address: str, cpu: int) -> None:
    answered: set[str] = set()
    deadline_s = time.monotonic() + _READY_S
    while len(answered) < BACKENDS:
        if time.monotonic() > deadline_s:
            raise arena.BenchError(f"{address}: only {len(answered)} of {BACKENDS} backends answer")
        answered |= _run(lab, address, cpu, _WARM_UP_S).servers.keys()


def _run(lab: cluster.Lab, address: str, cpu: int, seconds: float) -> _Seen:
    argv = _script("balance_client", cpu, address, _PORT, CLIENTS, PAUSE_MS, seconds)
    return msgspec.json.decode(lab.check_output(_CLIENT, argv), type=_Seen)


def _script(name: str, cpu: int, *arguments: object) -> list[str]:
    path = pathlib.Path(__file__).with_name(f"{name}.py")
    return ["taskset", "--cpu-list", str(cpu), sys.executable, "-I", "-S", str(path), *map(str, arguments)]
