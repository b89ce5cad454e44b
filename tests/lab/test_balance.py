"""How new connections spread over backends, and the tables that decide it."""

import collections.abc

import pytest

from lbproxy.core import maglev, model, tables
from lbproxy.lab import cluster, traffic
from tests import polling
from tests.lab import agents, manifests

EVEN, HASHED, FOLLOWING = 1, 2, 3
MAGLEV = {"lbproxy.io/algorithm": "maglev"}
RANDOM = {"lbproxy.io/algorithm": "random"}
PODS = ("n1/p2", "n1/p3", "n2/p1", "n2/p2")
CONNECTIONS = 3000
# Chi-square of three degrees of freedom is above this once in 100 million times.
GENEROUS = 40.0


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    everyone = [lab[pod] for pod in PODS]
    objects = [
        manifests.service("even", EVEN),
        *manifests.slices("even", everyone),
        manifests.service("hashed", HASHED, annotations=MAGLEV),
        *manifests.slices("hashed", everyone),
        manifests.service("following", FOLLOWING),
        *manifests.slices("following", everyone),
    ]
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


def table_of(agent: agents.Agent, name: str, family: int = 4) -> list[tuple[bytes, int]]:
    """The backends, by address and port, in the slots of a Service's ClusterIP."""
    port = agent.port(name, family=family)
    places = {backend.id: (backend.address, backend.port) for backend in port.backends}
    address = port.frontends[0].address
    (row,) = [
        tables.frontend(value)
        for key, value in agent.maps.rows(tables.Table.FRONTENDS)
        if tables.frontend_key(key).addr == address
        and int.from_bytes(tables.frontend_key(key).port, "big") == manifests.TCP_PORT
    ]
    ids: list[int] = []
    for block in range(row.block, row.block + -(-row.slot_count // 16)):
        packed = agent.maps.row(tables.Table.SLOTS, tables.row_key(block)) or b""
        ids += [int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), 4)]
    return [places[number] for number in ids[: row.slot_count]]


def maglev_table(agent: agents.Agent, pods: collections.abc.Sequence[str], family: int) -> list[bytes]:
    """The Maglev table that any node makes of these pods."""
    identities = [
        agents.mapped(agent.lab[pod].address(family)) + manifests.TARGET_PORT.to_bytes(2, "big")
        for pod in pods
    ]
    return [identities[index] for index in maglev.table([(identity, 1) for identity in identities])]


def chi_square(servers: dict[str, int]) -> float:
    assert set(servers) == set(PODS)
    expected = sum(servers.values()) / len(servers)
    return sum((count - expected) ** 2 / expected for count in servers.values())


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("number", [EVEN, HASHED], ids=["random", "maglev"])
@pytest.mark.parametrize("mode", ["short", "udp-new"])
def test_new_connections_spread_evenly(
    agent: agents.Agent, mode: traffic.Mode, number: int, family: int
) -> None:
    port = manifests.UDP_PORT if mode == "udp-new" else manifests.TCP_PORT
    address = manifests.cluster_ip(number, family)
    result = agent.lab.client("n1/p1", mode, address, port, count=CONNECTIONS).result()
    assert result.failures == {}
    assert chi_square(result.servers) < GENEROUS


def test_the_kernel_counts_what_the_servers_count(agent: agents.Agent) -> None:
    before = agent.port("even")
    address = manifests.cluster_ip(EVEN)
    result = agent.lab.client("n1", "short", address, manifests.TCP_PORT, count=500).result()
    after = agent.port("even")
    counted = {
        agent.place(new.address): new.connections - old.connections
        for new, old in zip(after.backends, before.backends, strict=True)
    }
    assert counted == result.servers
    assert after.connections - before.connections == 500


@pytest.mark.parametrize("family", [4, 6])
def test_an_annotation_chooses_maglev_for_a_service(agent: agents.Agent, family: int) -> None:
    assert agent.port("even", family=family).algorithm is model.Algorithm.RANDOM
    assert agent.port("hashed", family=family).algorithm is model.Algorithm.MAGLEV
    placed = [address + port.to_bytes(2, "big") for address, port in table_of(agent, "hashed", family)]
    assert placed == maglev_table(agent, PODS, family)


@pytest.mark.parametrize("annotations", [{}, MAGLEV], ids=["random", "maglev"])
def test_tables_are_as_large_as_the_backends_need(
    agent: agents.Agent, api: agents.Api, annotations: dict[str, str]
) -> None:
    api.put(manifests.service("following", FOLLOWING, annotations=annotations))
    sizes = []
    for count in (4, 2, 1, 3, 4):
        pods = PODS[:count]
        api.put(*manifests.slices("following", [agent.lab[pod] for pod in pods]))
        agent.has_backends("following", set(pods))
        wanted = maglev.size(count) if annotations and count > 1 else count

        def slots(wanted: int = wanted) -> bool:
            return all(one.slot_count == wanted for one in agent.port("following").frontends)

        polling.eventually(slots, what=f"{wanted} slots")
        sizes.append(wanted)
        if annotations:
            found = [address + port.to_bytes(2, "big") for address, port in table_of(agent, "following")]
            assert found == maglev_table(agent, pods, 4)
        seen = {
            agent.at("n1/p1").tcp(manifests.cluster_ip(FOLLOWING), manifests.TCP_PORT).server
            for _ in range(100)
        }
        assert seen == set(pods)
    assert sizes == ([1021, 251, 1, 1021, 1021] if annotations else [4, 2, 1, 3, 4])


def test_a_flag_chooses_maglev_for_all_others(
    build_lab: collections.abc.Callable[..., cluster.Lab],
) -> None:
    with build_lab(nodes=2, pods=2) as lab:
        pods = ("n1/p1", "n1/p2", "n2/p1")
        for pod in pods:
            lab.serve(pod)
        folder = agents.Folder(lab.workdir / "manifests")
        everyone = [lab[pod] for pod in pods]
        folder.write("a.json", [manifests.service("hashed", 1), *manifests.slices("hashed", everyone)])
        random = manifests.service("random", 2, annotations=RANDOM)
        folder.write("b.json", [random, *manifests.slices("random", everyone[::-1])])
        flags = [*folder.source, *agents.SMALL_MAPS, "--algorithm", "maglev"]
        # On each node: the same table from the same endpoints, whatever their order or place.
        found = []
        for node in ("n1", "n2"):
            with agents.Agent(lab, flags, node=node) as agent:
                assert agent.port("random").algorithm is model.Algorithm.RANDOM
                assert len(table_of(agent, "random")) == len(pods)
                found.append(table_of(agent, "hashed"))
                assert agent.port("hashed").algorithm is model.Algorithm.MAGLEV
                answer = agent.at(f"{node}/p2").tcp(manifests.cluster_ip(1), manifests.TCP_PORT)
                assert answer.server in pods
            folder.write(
                "a.json", [manifests.service("hashed", 1), *manifests.slices("hashed", everyone[::-1])]
            )
        assert found[0] == found[1]
        assert len(found[0]) == maglev.size(3)


def test_a_random_choice_has_one_slot_for_each_backend(agent: agents.Agent) -> None:
    assert sorted(table_of(agent, "even")) == sorted(
        (agents.mapped(agent.lab[pod].ipv4), manifests.TARGET_PORT) for pod in PODS
    )
