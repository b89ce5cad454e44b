"""The manifests that the README offers for copying are served without a warning."""

import asyncio
import pathlib

from lbproxy.core import events, model, plan, state
from lbproxy.kube import manifests

EXAMPLE = pathlib.Path(__file__).parents[2] / "docs" / "example"


def test_the_example_is_a_service_with_backends_of_both_families() -> None:
    seen: list[events.Event] = []
    source = manifests.Manifests(EXAMPLE, seen.extend, sleep=asyncio.sleep)
    seen += source.look()
    cluster = state.ClusterState("worker-1")
    for event in seen:
        assert not isinstance(event, events.Rejected)
        assert not isinstance(event, events.Upsert) or event.warnings == ()
        cluster.apply(event)
    (service,) = cluster.services()
    ports = plan.plan(cluster, service.name, plan.Defaults(model.Algorithm.RANDOM))
    assert [len(port.backends) for port in ports] == [2, 1]
