"""Short connections from outside to NodePorts, against the same pods dialled directly.

Rounds as in `ratios`: every round makes one run of each variant, each with a client
and a server of its own on one CPU.

| variant | the client outside dials | who answers |
|---|---|---|
| direct, direct_again | the pod's address, by way of its node | the pod of this node |
| local | a NodePort of externalTrafficPolicy Local | the same, and sees the client |
| masqueraded | a NodePort of policy Cluster | the same, and sees the node |
| elsewhere | the pod's address, by way of its node | a pod of another node |
| remote | a NodePort of policy Cluster | the same, and sees the first node |
| dsr | a NodePort of policy Cluster with `lbproxy.io/mode: dsr` | the same, and answers the client itself |

The packets of `direct` and `elsewhere` pass the programs too, as those of no service.
"""

import collections.abc
import time

from benchmarks import cluster, process, ratios, results, stage

VARIANTS = ("direct", "local", "masqueraded", "direct_again", "elsewhere", "remote", "dsr")
AGAINST = {
    "local": ("direct", "direct_again"),
    "masqueraded": ("direct", "direct_again"),
    "direct_again": ("direct",),
    "remote": ("elsewhere",),
    "dsr": ("elsewhere",),
}
# Not the one that services lead to: a client's port may be the same there at the same time.
DIRECT_PORT = stage.PORT + 1
PORTS = (stage.PORT, DIRECT_PORT)
_READY_S = 40.0


def expected_s(rounds: int, seconds: float) -> float:
    """Return about how long `measure` takes."""
    return 5 + len(VARIANTS) * (rounds * (seconds + ratios.OVERHEAD_S) + ratios.WARM_UP_S + ratios.OVERHEAD_S)


def order(number: int) -> tuple[str, ...]:
    """Return the order of variants in a round."""
    turn = number % len(VARIANTS)
    rotated = (*VARIANTS[turn:], *VARIANTS[:turn])
    return rotated if number // len(VARIANTS) % 2 == 0 else rotated[::-1]


def measure(at: stage.Stage, rounds: int, seconds: float) -> results.Traffic:
    """Run the rounds, after one of warm-up that does not count."""
    with at.other_agent():
        for variant in VARIANTS:
            _until_served(at, variant)
            _run(at, variant, ratios.WARM_UP_S)
        made = [
            results.Round({variant: _run(at, variant, seconds) for variant in order(number)})
            for number in range(rounds)
        ]
    return results.Traffic(at.services, "node-port", seconds, made)


def _place(at: stage.Stage, variant: str) -> tuple[str, str, int]:
    """Return who serves, and what the client dials."""
    node = at.lab[stage.NODE].ipv4
    match variant:
        case "direct" | "direct_again":
            return stage.SERVERS[0], at.lab[stage.SERVERS[0]].ipv4, DIRECT_PORT
        case "elsewhere":
            return stage.ELSEWHERE, at.lab[stage.ELSEWHERE].ipv4, DIRECT_PORT
        case "remote" | "dsr":
            return stage.ELSEWHERE, node, cluster.NODE_PORTS[variant]
        case _:
            return stage.SERVERS[0], node, cluster.NODE_PORTS[variant]


def _until_served(at: stage.Stage, variant: str) -> None:
    server, address, port = _place(at, variant)
    serving = at.lab.serve(server, PORTS, cpu=at.cpu)
    try:
        deadline = time.monotonic() + _READY_S
        while True:
            seen = at.lab.client(stage.OUTSIDE, "short", address, port, count=1, timeout_s=1.0).result()
            if seen.servers == {server: 1}:
                return
            if time.monotonic() > deadline:
                raise stage.BenchError(f"{variant}: {address}:{port} gives {seen.servers or seen.failures}")
            time.sleep(0.2)
    finally:
        serving.stop()


def _run(at: stage.Stage, variant: str, seconds: float) -> results.Run:
    name, address, port = _place(at, variant)
    before_s = process.ended_children_cpu_s()
    server = at.lab.serve(name, PORTS, cpu=at.cpu)
    try:
        client = at.lab.client(
            stage.OUTSIDE, "short", address, port, seconds=seconds, cpu=at.cpu, connections=1
        )
        seen = client.result()
    finally:
        server.stop()
    strangers = sum(count for who, count in seen.servers.items() if who != name)
    if strangers:
        raise stage.BenchError(f"{variant}: {strangers} answers of others: {seen.servers}")
    return ratios.run_of(seen, process.ended_children_cpu_s() - before_s)


def compared(rounds: collections.abc.Sequence[results.Round], variant: str) -> list[float]:
    """Return a variant's rate ÷ that of the same pod dialled directly, a round each."""
    return [_compared({name: run.rate_per_s for name, run in each.runs.items()}, variant) for each in rounds]


def thrift(rounds: collections.abc.Sequence[results.Round], variant: str) -> list[float]:
    """Return the same of CPU time for a connection, upside down."""
    return [_compared({name: 1 / run.cpu_us for name, run in each.runs.items()}, variant) for each in rounds]


def _compared(speeds: dict[str, float], variant: str) -> float:
    against = AGAINST[variant]
    return speeds[variant] * len(against) / sum(speeds[name] for name in against)
