"""Connections to every Service of the wire tests that are held while something happens beside them."""

import collections.abc
import contextlib

from lbproxy.lab import cluster, traffic
from tests.lab.wire.ways import WAYS, Way


def targets(lab: cluster.Lab) -> list[tuple[Way, str]]:
    """Every Service, and the node's address in both families."""
    return [(way, str(lab["n1"].address(family))) for way in WAYS for family in (4, 6)]


@contextlib.contextmanager
def established(lab: cluster.Lab) -> collections.abc.Iterator[None]:
    """Hold connections to every Service, in both families, and ask on them; none may notice anything."""
    held = [
        lab.client(
            "outside", "established", node, way.node_port, connections=10, interval_s=0.05, timeout_s=20
        )
        for way, node in targets(lab)
    ]
    yield
    kept = [client.stop() for client in held]
    assert [result.failures for result in kept] == [{}] * len(held)
    assert [result.open for result in kept] == [10] * len(held)
    assert [list(result.servers) for result in kept] == [[way.backend] for way, _ in targets(lab)]


@contextlib.contextmanager
def connections(lab: cluster.Lab) -> collections.abc.Iterator[list[traffic.Client]]:
    """The same, and yield clients that begin new ones meanwhile."""
    with established(lab):
        yield [
            lab.client("outside", "short", node, way.node_port, pause_s=0.01, timeout_s=5)
            for way, node in targets(lab)
        ]


def results(clients: list[traffic.Client]) -> list[traffic.Result]:
    return [client.stop() for client in clients]
