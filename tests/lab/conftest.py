"""Labs for the tests in this folder.

`lab` is two nodes (n1, n2) of three pods (p1, p2, p3) each, one for all tests of a
module: end the servers and clients you start in it. `build_lab` makes one to a
test's own measure. Neither leaves anything behind; the session fails if one does.
`agent` needs the module to have a fixture `api` and the names of its PODS, and
takes its AGENT_FLAGS.
"""

import collections.abc
import pathlib
import typing

import pytest

from lbproxy import cgroup2
from lbproxy.lab import cluster, netns, topology, traffic
from tests.lab import agents

LabFactory = collections.abc.Callable[..., cluster.Lab]


def leftovers() -> list[str]:
    """List namespaces and cgroups of labs that belong to this process."""
    mount = cgroup2.mount_point()
    found = [*netns.names(), *(path.name for path in mount.iterdir())] if mount else netns.names()
    return [name for name in found if name.startswith(cluster.run_prefix())]


@pytest.fixture(scope="session")
def load_program(needs_lab: None, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return traffic.build(tmp_path_factory.mktemp("load"))


@pytest.fixture(scope="session")
def build_lab(load_program: pathlib.Path) -> collections.abc.Iterator[LabFactory]:
    def build(nodes: int = 2, pods: int = 3, **options: typing.Any) -> cluster.Lab:
        return cluster.Lab(topology.uniform(nodes, pods), program=load_program, **options)

    yield build
    assert leftovers() == []


@pytest.fixture(scope="module")
def agent(
    request: pytest.FixtureRequest, lab: cluster.Lab, api: agents.Api
) -> collections.abc.Iterator[agents.Agent]:
    """The agent on n1, following the module's `api`, while a server answers in each of its PODS."""
    for pod in request.module.PODS:
        lab.serve(pod)
    flags = getattr(request.module, "AGENT_FLAGS", ())
    with agents.Agent(lab, api.source, *agents.SMALL_MAPS, *flags) as running:
        yield running


@pytest.fixture(scope="module")
def lab(build_lab: LabFactory) -> collections.abc.Iterator[cluster.Lab]:
    with build_lab() as built:
        yield built
