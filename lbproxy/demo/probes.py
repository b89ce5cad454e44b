"""What the demo tries beside the storm: every way to a Service once, and what it costs."""

import collections.abc
import os
import statistics

from lbproxy.demo import scene, stage
from lbproxy.lab import cluster, shell, topology

REFUSALS = 1000
ROUNDS = 15
ROUND_CONNECTIONS = 200


def ways(lab: cluster.Lab) -> list[scene.Finding]:
    """Reach the shop by every kind of address."""
    node = lab[stage.NODE]
    with (
        lab.shell(stage.CLIENT) as pod,
        lab.shell(stage.NODE) as host,
        lab.shell(topology.OUTSIDE) as outside,
    ):
        return [
            _way("IPv6 ClusterIP", stage.SHOP[6], stage.SERVICE_PORT, pod.tcp),
            _way("UDP ClusterIP, by sendto", stage.SHOP[4], stage.SERVICE_PORT, _unconnected(pod)),
            _way("NodePort, from a pod", node.ipv4, stage.NODE_PORT, pod.tcp),
            _way("NodePort over IPv6, from a pod", node.ipv6, stage.NODE_PORT, pod.tcp),
            _way("NodePort on loopback, on the node", "127.0.0.1", stage.NODE_PORT, host.tcp),
            _way("NodePort, from outside", node.ipv4, stage.NODE_PORT, outside.tcp),
            _way("NodePort over IPv6, from outside", node.ipv6, stage.NODE_PORT, outside.tcp),
        ]


def refusal(lab: cluster.Lab) -> scene.Finding:
    """Connect to a Service without endpoints."""
    result = lab.client(
        stage.CLIENT, "short", stage.EMPTY[4], stage.SERVICE_PORT, count=REFUSALS, timeout_s=1
    ).result()
    each_us = result.seconds * 1e6 / REFUSALS
    refused = result.failures == {"ECONNREFUSED": REFUSALS}
    found = f"refused in {each_us:.0f} µs (mean of {REFUSALS:,})" if refused else f"{result.failures}"
    return scene.Finding("Service without endpoints", found, refused)


def cost(lab: cluster.Lab) -> scene.Finding:
    """Compare short connections through a ClusterIP with direct ones to its only backend.

    In turns, client and server on one CPU, nothing else running; the median of
    each round's p50. Benchmarks proper are in benchmarks/.
    """
    cpu = min(os.sched_getaffinity(0))
    where = stage.place(stage.SINGLE_BACKEND)
    server = lab.serve(where, [stage.SINGLE_PORT], name="single", cpu=cpu)
    targets = ((stage.SINGLE[4], stage.SERVICE_PORT), (lab[where].ipv4, stage.SINGLE_PORT))
    rounds: tuple[list[float], list[float]] = ([], [])
    failed = 0
    for _ in range(ROUNDS):
        for (address, port), seen in zip(targets, rounds, strict=True):
            result = lab.client(
                stage.CLIENT, "short", address, port, count=ROUND_CONNECTIONS, cpu=cpu
            ).result()
            failed += result.failed
            seen.append(result.latency_us.p50)
    server.stop()
    balanced_us, direct_us = (statistics.median(seen) for seen in rounds)
    found = f"{balanced_us:.1f} µs by ClusterIP, {direct_us:.1f} µs direct (p50)"
    return scene.Finding("Connect, ask, close", f"{failed} failed" if failed else found, not failed)


def _way(
    what: str, address: str, port: int, ask: collections.abc.Callable[[str, int], shell.Answer]
) -> scene.Finding:
    answer = ask(address, port)
    shown = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    if answer.error:
        return scene.Finding(what, f"{shown}: {answer.error}", ok=False)
    # An application that looks whom it talks to must see the Service.
    hidden = answer.peer == (address, port)
    seen = "" if hidden else f", but the peer shows as {answer.peer}"
    return scene.Finding(what, f"{shown} → {answer.server}{seen}", hidden)


def _unconnected(place: shell.Shell) -> collections.abc.Callable[[str, int], shell.Answer]:
    return lambda address, port: place.udp(address, port, connected=False)
