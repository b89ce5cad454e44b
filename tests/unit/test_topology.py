"""The lab's addresses and commands, without building anything."""

import pytest

from lbproxy.lab import topology


def test_places_have_the_addresses_the_documentation_promises() -> None:
    places = topology.Topology(topology.uniform(nodes=2, pods=2)).places()
    assert {name: place.addresses for name, place in places.items()} == {
        "fabric": ("172.18.0.254", "fd00:172:18::fe"),
        "n1": ("172.18.0.1", "fd00:172:18::1"),
        "n1/p1": ("10.244.1.2", "fd00:244:1::2"),
        "n1/p2": ("10.244.1.3", "fd00:244:1::3"),
        "n2": ("172.18.0.2", "fd00:172:18::2"),
        "n2/p1": ("10.244.2.2", "fd00:244:2::2"),
        "n2/p2": ("10.244.2.3", "fd00:244:2::3"),
        "outside": ("172.18.0.100", "fd00:172:18::64"),
    }


def test_a_family_left_out_appears_nowhere() -> None:
    only_ipv4 = topology.Topology(topology.uniform(2, 1), families=(4,))
    names = dict.fromkeys(only_ipv4.places(), "x")
    assert not [line for _, lines in only_ipv4.commands(names) for line in lines if "::" in line]
    assert all(place.ipv6 == "" for place in only_ipv4.places().values())


def test_a_namespace_is_wired_before_its_own_addresses_are_set() -> None:
    described = topology.Topology(topology.uniform(2, 2))
    names = dict.fromkeys(described.places(), "x")
    order = [place for place, _ in described.commands(names)]
    assert order == list(described.places())


@pytest.mark.parametrize(
    "nodes",
    [
        (topology.NodeSpec("a"), topology.NodeSpec("a")),
        (topology.NodeSpec("a", ("p", "p")),),
        (topology.NodeSpec("a/b"),),
        (topology.NodeSpec(""),),
        (topology.NodeSpec("outside"),),
        topology.uniform(100, 0),
        topology.uniform(1, 201),
    ],
)
def test_a_topology_that_can_not_be_built_is_refused(nodes: tuple[topology.NodeSpec, ...]) -> None:
    with pytest.raises(ValueError, match=r"names|at most"):
        topology.Topology(nodes)


def test_unknown_families_are_refused() -> None:
    with pytest.raises(ValueError, match="families"):
        topology.Topology((), families=(5,))
