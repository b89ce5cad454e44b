"""One loaded set of programs for the session, and a node with nothing on it for each test."""

import collections.abc

import pytest

from tests.packets import bench, harness, packets


@pytest.fixture(scope="session")
def made(needs_bpf: None) -> collections.abc.Iterator[harness.Harness]:
    with harness.started() as started:
        yield started


@pytest.fixture
def lb(made: harness.Harness) -> bench.Bench:
    return bench.Bench(made)


@pytest.fixture(params=[packets.V4, packets.V6], ids=["ipv4", "ipv6"])
def side(request: pytest.FixtureRequest) -> packets.Side:
    found: packets.Side = request.param
    return found
