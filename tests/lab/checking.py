"""Holds all that an agent has pinned against what the same objects come to in memory, from scratch."""

import collections.abc
import contextlib
import json
import typing

from lbproxy.core import decode, events, ledger, model, plan, reconcile
from lbproxy.kernel import fake, maps
from tests import serving
from tests.lab import agents, manifests


def differences(agent: agents.Agent, *objects: manifests.Object) -> list[str]:
    """What the kernel has and should not, lacks, or has otherwise; empty where it is as planned."""
    with contextlib.closing(maps.BpfMaps(str(agent.root / "maps"))) as opened:
        # Both have the methods that are used here.
        kernel = typing.cast(fake.FakeMaps, opened)
        wanted = expected(agent, objects)
        found = serving.dangling(kernel)
        found += _differ("frontend", serving.view(kernel), serving.view(wanted))
        found += _differ("backend", serving.backends(kernel), serving.backends(wanted))
        return found


def dangling(agent: agents.Agent) -> list[str]:
    """Whatever in the kernel leads nowhere, or to something of somebody else."""
    with contextlib.closing(maps.BpfMaps(str(agent.root / "maps"))) as opened:
        return serving.dangling(typing.cast(fake.FakeMaps, opened))


def expected(agent: agents.Agent, objects: collections.abc.Iterable[manifests.Object]) -> fake.FakeMaps:
    """Tables that have never known anything but these objects."""
    made = fake.FakeMaps(agent.identity().sizes)
    fresh = reconcile.Reconciler(
        agent.node, plan.Defaults(model.Algorithm.RANDOM), ledger.Ledger(made.capacity())
    )
    for one in objects:
        fresh.take(decode.written(one["kind"], json.dumps(one).encode()))
    for kind in events.Kind:
        fresh.take(events.Synced(kind))
    while fresh.pending:
        made.apply(fresh.next_pass(0.0).writes)
    return made


def _differ(
    what: str,
    have: collections.abc.Mapping[typing.Any, object],
    want: collections.abc.Mapping[typing.Any, object],
) -> list[str]:
    keys = have.keys() | want.keys()
    return [
        f"{what} {key!r}: {have.get(key)!r}, not {want.get(key)!r}"
        for key in keys
        if have.get(key) != want.get(key)
    ]
