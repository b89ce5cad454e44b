import itertools
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy import abi
from lbproxy.core import addresses, model, node_rows, tables
from lbproxy.kernel import fake
from tests import serving, strategies


def ip(text: str) -> bytes:
    found = addresses.parse(text)
    assert found is not None
    return found


ETH0, OTHER, LOOPBACK = ip("192.0.2.1"), ip("198.51.100.1"), ip("127.0.0.1")
FACTS = node_rows.NodeFacts((LOOPBACK, ETH0, OTHER), (ETH0,), 4026531840)


def served(maps: fake.FakeMaps) -> set[bytes]:
    serving_flag = abi.LAYOUTS["node_address"].pack(tables.NodeAddressFlag.NODE_PORTS)
    return {key for key, row in maps.rows(tables.Table.NODE_ADDRESSES) if row == serving_flag}


def setting(maps: fake.FakeMaps) -> tuple[int, int]:
    row = maps.row(tables.Table.SETTINGS, tables.row_key(0)) or b""
    cookie, flags = tables.settings(row)[:2]
    return cookie, flags


def write(
    maps: fake.FakeMaps, facts: node_rows.NodeFacts, cidrs: list[str] | None = None, localhost: bool = True
) -> list[tables.Write]:
    have = dict(maps.rows(tables.Table.NODE_ADDRESSES))
    want = node_rows.node_rows(facts, cidrs or [], localhost, maps.rows_of(tables.Table.NODE_ADDRESSES))
    writes = node_rows.node_writes(want, have)
    maps.apply(writes)
    return writes


def test_every_local_address_is_known_and_those_chosen_serve() -> None:
    maps = fake.FakeMaps(serving.SIZES)
    write(maps, FACTS, ["198.51.100.0/24"])
    assert {key for key, _ in maps.rows(tables.Table.NODE_ADDRESSES)} == set(FACTS.local)
    assert served(maps) == {OTHER}
    assert setting(maps)[0] == FACTS.host_netns


def test_primary_means_the_addresses_of_the_node_object() -> None:
    maps = fake.FakeMaps(serving.SIZES)
    write(maps, FACTS, ["primary"])
    assert served(maps) == {ETH0}


def test_loopback_serves_only_where_it_is_asked_for() -> None:
    for localhost, flags in ((True, tables.Setting.LOCALHOST_NODE_PORTS), (False, 0)):
        maps = fake.FakeMaps(serving.SIZES)
        write(maps, FACTS, localhost=localhost)
        assert setting(maps) == (FACTS.host_netns, flags)


def test_what_is_as_it_should_be_is_not_written_again() -> None:
    maps = fake.FakeMaps(serving.SIZES)
    write(maps, FACTS)
    again = write(maps, FACTS)
    assert [w.table for w in again] in ([], [tables.Table.SETTINGS])


@given(st.lists(st.lists(strategies.addresses(), max_size=6, unique=True), min_size=1, max_size=4))
def test_addresses_that_come_and_go_leave_no_trace(versions: list[list[bytes]]) -> None:
    maps = fake.FakeMaps(serving.SIZES)
    for local in versions:
        write(maps, FACTS._replace(local=tuple(local)))
        assert {key for key, _ in maps.rows(tables.Table.NODE_ADDRESSES)} == set(local)


def test_a_node_whose_addresses_all_change_fits_in_a_table_of_its_size() -> None:
    """What goes makes room for what comes: a full table would stop every pass."""
    maps = fake.FakeMaps(serving.sizes(node_addresses=3))
    write(maps, FACTS)
    moved = tuple(ip(f"203.0.113.{host}") for host in range(3))
    write(maps, FACTS._replace(local=moved))
    assert {key for key, _ in maps.rows(tables.Table.NODE_ADDRESSES)} == set(moved)


def test_addresses_are_the_only_rows_that_are_ever_deleted() -> None:
    maps = fake.FakeMaps(serving.SIZES)
    writes = itertools.chain(write(maps, FACTS), write(maps, FACTS._replace(local=())))
    assert {w.table for w in writes if isinstance(w, tables.Delete)} == {tables.Table.NODE_ADDRESSES}


def test_what_finds_no_room_is_what_matters_least() -> None:
    maps = fake.FakeMaps(serving.sizes(node_addresses=2))
    cluster_ips = tuple(ip(f"10.96.0.{host}") for host in range(1, 9))
    facts = FACTS._replace(local=(LOOPBACK, *cluster_ips, OTHER, ETH0))
    write(maps, facts)
    assert served(maps) == {ETH0, cluster_ips[0]}
    write(maps, facts, ["198.51.100.0/24"])
    assert {key for key, _ in maps.rows(tables.Table.NODE_ADDRESSES)} == {OTHER, ETH0}
    assert served(maps) == {OTHER}
    assert node_rows.node_rows(facts, [], True, 2).dropped == 9
    assert node_rows.node_rows(facts, [], True, 11).dropped == 0


@pytest.mark.parametrize(
    ("cidrs", "localhost", "families"),
    [
        ([], False, ()),
        (["203.0.113.0/24"], False, (model.Family.IPV4,)),
        (["192.0.2.0/24"], False, ()),
        (["127.0.0.0/8"], True, ()),
        (["127.0.0.0/8"], False, (model.Family.IPV4,)),
        (["2001:db8:ffff::/48"], False, ()),  # the node has no IPv6 address that is good for it
    ],
)
def test_families_whose_node_ports_nobody_reaches_are_told(
    cidrs: list[str], localhost: bool, families: tuple[model.Family, ...]
) -> None:
    facts = FACTS._replace(local=(LOOPBACK, ETH0, ip("fe80::1")))
    assert node_rows.node_rows(facts, cidrs, localhost, 16).unserved == families


def test_configured_addresses_come_before_those_of_the_node() -> None:
    bind, given = ip("203.0.113.9"), (ip("203.0.113.1"), ip("2001:db8::1"))
    node = model.Node("node-a", (ETH0, OTHER), "", (), eligible=True)
    assert node_rows.FROM_NODE.addresses(None) == ()
    assert node_rows.FROM_NODE.addresses(node) == (ETH0, OTHER)
    assert node_rows.Identity(None, given).addresses(node) == given
    assert node_rows.Identity(bind).addresses(node) == (bind, ETH0, OTHER)
    assert node_rows.Identity(bind, given).addresses(node) == (bind, *given)


# --- what the packet path is told ---


def rules(**fields: typing.Any) -> node_rows.PacketRules:
    return node_rows.PacketRules(**fields)


def told(rules: node_rows.PacketRules, facts: node_rows.NodeFacts = FACTS) -> tables.Settings:
    return tables.settings(node_rows.node_rows(facts, [], False, 16, rules).settings)


def network(addr: bytes, mask: bytes) -> str:
    """A network as the programs match it."""
    bits = int.from_bytes(mask, "big").bit_count()
    assert mask == ((1 << 128) - (1 << (128 - bits))).to_bytes(16, "big")
    return f"{addresses.text(addr)}/{bits}"


By = tables.Setting


@pytest.mark.parametrize(
    ("given", "node_cidrs", "flags", "of_ipv4", "of_ipv6"),
    [
        pytest.param(rules(), (), 0, "::/0", "::/0", id="no detector"),
        pytest.param(
            rules(pod_cidrs=("10.244.0.0/16", "10.1.0.0/16")),
            (),
            By.PODS_BY_IPV4,
            "10.244.0.0/112",
            "::/0",
            id="the first of a family (DET-1)",
        ),
        pytest.param(
            rules(pod_cidrs=("fd00:10::/48", "10.244.1.9/24")),
            ("192.0.2.0/24",),
            By.PODS_BY_IPV4 | By.PODS_BY_IPV6,
            "10.244.1.0/120",
            "fd00:10::/48",
            id="both families",
        ),
        pytest.param(
            rules(pod_cidrs=None),
            ("10.244.3.0/24", "fd00:10:3::/64"),
            By.PODS_BY_IPV4 | By.PODS_BY_IPV6,
            "10.244.3.0/120",
            "fd00:10:3::/64",
            id="NodeCIDR (DET-2)",
        ),
        pytest.param(rules(pod_cidrs=None), (), 0, "::/0", "::/0", id="NodeCIDR, not known yet"),
        pytest.param(
            rules(pods_by_device=True, pod_cidrs=("10.244.0.0/16",)),
            ("10.244.3.0/24",),
            By.PODS_BY_DEVICE,
            "::/0",
            "::/0",
            id="by device (DET-3)",
        ),
        pytest.param(rules(masquerade_all=True), (), By.MASQUERADE_ALL, "::/0", "::/0", id="masquerade all"),
        pytest.param(rules(keep_client=True), (), By.KEEP_CLIENT, "::/0", "::/0", id="keep client"),
    ],
)
def test_who_is_a_pod(
    given: node_rows.PacketRules, node_cidrs: tuple[str, ...], flags: int, of_ipv4: str, of_ipv6: str
) -> None:
    row = told(given, FACTS._replace(pod_cidrs=node_cidrs))
    assert row.flags == flags
    assert network(row.pods4_addr, row.pods4_mask) == of_ipv4
    assert network(row.pods6_addr, row.pods6_mask) == of_ipv6
    assert row.host_netns == FACTS.host_netns


def test_flows_are_masqueraded_as_an_address_that_answers_come_back_to() -> None:
    external, link_local, inner = ip("203.0.113.5"), ip("fe80::1"), ip("2001:db8::7")
    facts = node_rows.NodeFacts((LOOPBACK, OTHER, ETH0, link_local, inner), (external, ETH0), 1)
    row = told(rules(), facts)
    assert (row.node4_addr, row.node6_addr) == (ETH0, inner)
    row = told(rules(), facts._replace(local=(LOOPBACK, ip("169.254.1.1"), link_local), node_addresses=()))
    assert (row.node4_addr, row.node6_addr) == (tables.NO_ADDRESS, tables.NO_ADDRESS)


def test_timeouts_are_never_shorter_than_they_were_given() -> None:
    row = told(rules(ports=node_rows.Ports(1024, 100), timeouts=node_rows.Timeouts(udp_new_s=0.1)))
    assert (row.ports_first, row.ports_count) == (1024, 100)
    assert row.tcp_established_ticks == 80467  # 24 h
    assert row.udp_new_ticks == 1
    assert all(
        count * 2**30 >= wanted_s * 10**9 for count, wanted_s in zip(row[-8:], (60, 86400), strict=False)
    )


@pytest.mark.parametrize(
    ("local", "node_ports", "first", "last"),
    [
        ((32768, 60999), (30000, 32767), 1024, 29999),
        ((1024, 60999), (30000, 32767), 61000, 65535),
        ((1024, 65535), (30000, 32767), 61000, 65535),
        ((15000, 20000), (30000, 32767), 32768, 65535),
        ((40000, 65535), (30000, 40000), 1024, 29999),
        ((0, 65535), (30000, 32767), 61000, 65535),
        ((1, 80), (30000, 32767), 32768, 65535),
    ],
)
def test_ports_to_masquerade_with(
    local: tuple[int, int], node_ports: tuple[int, int], first: int, last: int
) -> None:
    assert node_rows.masquerade_ports(local, node_ports) == node_rows.Ports(first, last - first + 1)


@given(*[st.tuples(st.integers(0, 65535), st.integers(0, 65535)).map(sorted)] * 2)
def test_no_port_is_handed_out_twice(local: list[int], node_ports: list[int]) -> None:
    chosen = node_rows.masquerade_ports((local[0], local[1]), (node_ports[0], node_ports[1]))
    taken = {*range(local[0], local[1] + 1), *range(node_ports[0], node_ports[1] + 1)}
    free = set(range(1024, 65536)) - taken
    ports = set(range(chosen.first, chosen.first + chosen.size))
    if free:
        assert ports <= free
        longest = at = 0
        for port in range(1024, 65537):
            at = at + 1 if port in free else 0
            longest = max(longest, at)
        assert chosen.size == longest
    else:
        assert ports == set(range(61000, 65536))


def stranger(bits: bytes, address: bytes) -> bool:
    place = int.from_bytes(address[12:], tables.BYTE_ORDER) * 0x9E3779B1 % 2**32 >> 22
    return bool(bits[place // 8] >> place % 8 & 1)


@given(st.lists(strategies.addresses(), max_size=40), strategies.addresses())
def test_no_address_of_the_node_is_a_stranger_and_most_others_are(own: list[bytes], other: bytes) -> None:
    want = node_rows.node_rows(node_rows.NodeFacts(tuple(own), (), 0), [], False, 20)
    bits = tables.settings(want.settings).strangers
    assert not any(stranger(bits, address) for address in want.addresses)
    assert sum(byte.bit_count() for byte in bits) >= 1024 - len(want.addresses)
    assert stranger(bits, other) or want.addresses
