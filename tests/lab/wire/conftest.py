"""A real agent on n1 of each module's lab, for the Services of `ways`, and servers behind them.

A module may add to the agent's flags with AGENT_FLAGS.
"""

import collections.abc
import contextlib

import pytest

from lbproxy.lab import cluster, netns
from tests.lab import agents, manifests
from tests.lab.wire import wires
from tests.lab.wire.ways import BACKENDS, NOBODY, TARGET, WAYS

CLUSTER_CIDR = "10.244.0.0/16,fd00:244::/48"
CLUSTER_IPS = {4: "10.96.0.0/16", 6: "fd00:96::/64"}


def no_icmp_rate_limits(lab: cluster.Lab) -> None:
    """Otherwise a host tells another of no more than a few errors a second."""
    for where in lab.places:
        for key in ("net.ipv4.icmp_ratelimit", "net.ipv6.icmp.ratelimit"):
            netns.inside(lab.netns(where), lambda key=key: netns.set_sysctl(key, "0"))  # type: ignore[misc]


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    objects = [manifests.node("n1", *lab["n1"].addresses)]
    for way in WAYS:
        objects += way.objects(lab)
    objects += [manifests.service("nobody", 9, ports=NOBODY), *manifests.slices("nobody", [], ports=NOBODY)]
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


@pytest.fixture(scope="module")
def agent(
    request: pytest.FixtureRequest, lab: cluster.Lab, api: agents.Api
) -> collections.abc.Iterator[agents.Agent]:
    """The agent on n1, once it serves packets."""
    for family, network in CLUSTER_IPS.items():
        wires.ip(lab, "outside", f"-{family} route replace {network} via {lab['n1'].address(family)}")
    flags = getattr(request.module, "AGENT_FLAGS", ())
    with agents.Agent(lab, api.source, *agents.SMALL_MAPS, "--cluster-cidr", CLUSTER_CIDR, *flags) as running:
        running.says(": uplink by")
        yield running


@pytest.fixture(scope="module")
def echoes(lab: cluster.Lab, agent: agents.Agent) -> collections.abc.Iterator[dict[str, wires.Echo]]:
    with contextlib.ExitStack() as stack:
        yield {pod: stack.enter_context(wires.Echo(lab, pod, TARGET)) for pod in BACKENDS}


@pytest.fixture
def set_offload(lab: cluster.Lab) -> collections.abc.Iterator[collections.abc.Callable[..., None]]:
    """Have devices leave checksums and segments to the kernel, until the test ends."""
    with wires.Offloads(lab) as offloads:
        yield offloads.off
