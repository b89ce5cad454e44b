import array
import collections
import ipaddress
import random
import statistics
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy import abi, absent_flows
from lbproxy.core import absence, addresses, tables
from lbproxy.kernel import fake
from tests import serving

WORD = (1 << 64) - 1
ADDRESSES = [bytes(10) + b"\xff\xff\x0a\x60\x00" + bytes([last]) for last in range(3)]
ADDRESSES.append(bytes.fromhex("20010db8000000000000000000000001"))
SCOPES = (tables.SCOPE_ADDRESS, tables.SCOPE_NODE_PORT, tables.SCOPE_ADDRESS | tables.SCOPE_OUTSIDE)


def frontend(address: bytes, port: int, scope: int) -> bytes:
    return tables.FrontendKey(address, port.to_bytes(2, "big"), 6, scope).pack()


KEYS = [frontend(address, port, scope) for address in ADDRESSES for port in (80, 443) for scope in SCOPES]


def flow(src: bytes, dst: bytes, sport: int = 1, stage: int = 0) -> bytes:
    return tables.FlowKey(src, dst, sport.to_bytes(2, "big"), b"\0\x50", 6, stage).pack()


def says_none(rows: typing.Mapping[bytes, bytes], place: int) -> bool:
    row = rows.get(tables.row_key(place >> 6), bytes(8))
    return bool(int.from_bytes(row, tables.BYTE_ORDER) >> (place & 63) & 1)


def rows_of(column: bytes) -> dict[bytes, bytes]:
    """A table's rows, of what all of them say."""
    return {tables.row_key(at // 8): column[at : at + 8] for at in range(0, len(column), 8)}


# --- frontends ---

# What comes and goes together: single frontends, and so many of one address that with a few of the others
# they are as many as are counted, or one more or less.
CROWD = frozenset(
    frontend(ADDRESSES[0], port, tables.SCOPE_ADDRESS) for port in range(1000, 999 + absence.MOST)
)
ONCE = st.sets(st.sampled_from([*(frozenset([key]) for key in KEYS), CROWD])).map(
    lambda chosen: frozenset().union(*chosen)
)


@given(st.lists(st.tuples(ONCE, ONCE)), st.integers(0, 3))
def test_no_bit_ever_denies_a_frontend_and_in_the_end_every_other_one_does(
    changes: list[tuple[frozenset[bytes], frozenset[bytes]]], begins_at: int
) -> None:
    """But for bits that had more frontends than are counted: they stay as they were then."""
    known, there, rows = absence.Frontends(), set[bytes](), dict[bytes, bytes]()
    counts, crowded = collections.Counter[int](), set[int]()

    def write(writes: list[tables.Write]) -> None:
        for one in writes:
            assert isinstance(one, tables.Put)
            assert one.table is tables.Table.NO_FRONTENDS
            rows[one.key] = one.value
        used = {place for key in there for place in absence.frontend_places(key)}
        assert not [place for place in used if says_none(rows, place)]

    for number, (go, come) in enumerate(changes):
        if number == begins_at:
            rows |= rows_of(known.begin())
            write([])
        # One that goes and comes in the same change is there all the time.
        for key in sorted(go & there):
            known.goes(key)
            counts.subtract(absence.frontend_places(key))
        for key in sorted(come - (there - go)):
            known.comes(key)
            counts.update(absence.frontend_places(key))
        crowded |= {place for place, count in counts.items() if count >= absence.MOST}
        before, after = known.taken(), known.freed()
        there |= come
        write(before)
        there -= go - come
        write(after)
    used = crowded | {place for place, count in counts.items() if count}
    for row in range(abi.constant("NO_FRONTENDS_ROWS")):
        some = sum(1 << (place & 63) for place in used if place >> 6 == row)
        said = int.from_bytes(rows.get(tables.row_key(row), bytes(8)), tables.BYTE_ORDER)
        assert said == (WORD & ~some if len(changes) > begins_at else 0)


def test_what_was_counted_no_further_is_so_until_all_are_counted_anew() -> None:
    known, keys = absence.Frontends(), sorted(CROWD)[: absence.MOST - 1]
    more = frontend(ADDRESSES[0], 1, tables.SCOPE_ADDRESS)
    known.begin()
    for key in keys:
        known.comes(key)
    known.taken()
    for key in keys:
        known.goes(key)
    places = set(absence.address_places(ADDRESSES[0]))
    assert len(places) == 2
    [freed] = known.freed()
    assert isinstance(freed, tables.Put)
    assert all(says_none({freed.key: freed.value}, place) for place in places)
    for key in [*keys, more]:
        known.comes(key)
    known.taken()
    for key in [*keys, more]:
        known.goes(key)
    assert known.freed() == []
    anew = rows_of(absence.Frontends().begin())
    assert all(says_none(anew, place) for place in places)


def test_both_bits_of_an_address_may_be_one() -> None:
    some = (bytes(10) + b"\xff\xff\x0a\x60" + number.to_bytes(2, "big") for number in range(4096))
    alone = next(one for one in some if len(set(absence.address_places(one))) == 1)
    known, [place, _] = absence.Frontends(), absence.address_places(alone)
    known.begin()
    keys = [frontend(alone, port, tables.SCOPE_ADDRESS) for port in (80, 443)]
    for key in keys:
        known.comes(key)
    [taken] = known.taken()
    assert isinstance(taken, tables.Put)
    assert int.from_bytes(taken.value, tables.BYTE_ORDER) == WORD & ~(1 << (place & 63))
    known.goes(keys[0])
    assert known.freed() == []
    known.goes(keys[1])
    [freed] = known.freed()
    assert isinstance(freed, tables.Put)
    assert freed.value == b"\xff" * 8


SERVICES, NODES, PODS = 10_000, 24, range(2, 252)  # of each node


def packed(network: str, number: int) -> bytes:
    found = addresses.parse(str(ipaddress.ip_network(network)[number]))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("services", "pods", "of_a_node"),
    [
        ("10.96.0.0/12", "10.244.0.0/16", 1 << 8),
        ("10.96.0.0/16", "10.0.0.0/16", 1 << 8),
        ("fd00:10:96::/108", "fd00:10:244::/48", 1 << 64),
        ("fd00:10:96::/112", "fd00:10:244::/112", 1 << 8),
    ],
)
@pytest.mark.parametrize("how", ["in a row", "at random"])
def test_few_pods_of_any_node_have_no_bits_but_those_of_services(
    services: str, pods: str, of_a_node: int, how: str
) -> None:
    """Addresses are given out by rules, and must not meet by rules: of numbers drawn 0.7 % would meet."""
    size = ipaddress.ip_network(services).num_addresses
    drawn = random.Random(1).sample(range(size), SERVICES) if how == "at random" else range(1, SERVICES + 1)
    used = {place for number in drawn for place in absence.address_places(packed(services, number))}
    shares = [
        statistics.mean(
            used.issuperset(absence.address_places(packed(pods, node * of_a_node + pod))) for pod in PODS
        )
        for node in range(NODES)
    ]
    assert statistics.mean(shares) < 0.015
    assert max(shares) < 0.05


@pytest.mark.parametrize("protocol", [6, 17, 132])
@pytest.mark.parametrize("address", [bytes(16), bytes(10) + b"\xff\xff" + bytes(4)])
def test_a_node_port_has_one_bit_whatever_its_family_and_protocol(protocol: int, address: bytes) -> None:
    key = tables.FrontendKey(address, (30080).to_bytes(2, "big"), protocol, tables.SCOPE_NODE_PORT).pack()
    first = abi.constant("NO_FRONTENDS_ADDRESSES") * 64
    assert absence.frontend_places(key) == (first + int.from_bytes(key[16:18], tables.BYTE_ORDER),)


# --- flows ---


@given(st.lists(st.tuples(*[st.sampled_from(ADDRESSES)] * 2, st.integers(1, 9), st.sampled_from([0, 1]))))
def test_pairs_are_those_of_the_rows_that_were_seen(
    seen: list[tuple[bytes, bytes, int, int]],
) -> None:
    found = absence.Pairs()
    keys = [flow(*one) for one in seen]
    for first in range(0, len(keys), 3):
        found.add(b"".join(keys[first : first + 3]))
    words = array.array("Q", found.none())
    places = set(absence.pair_places(b"".join(keys)))
    assert len(places) == len({(src, dst, stage) for src, dst, _, stage in seen})
    assert sum(WORD.bit_count() - word.bit_count() for word in words) == len(places)
    assert not any(words[place >> 6] >> (place & 63) & 1 for place in places)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def column(kernel: fake.FakeMaps, field: str) -> bytes:
    return kernel.column("no_flows", field)


def begin(kernel: fake.FakeMaps, places: typing.Iterable[int]) -> None:
    words = array.array("Q", column(kernel, "begun"))
    for place in places:
        words[place >> 6] |= 1 << (place & 63)
    kernel.set_column("no_flows", "begun", words.tobytes())


class Waiting(fake.FakeMaps):
    """Notes what the table says at each wait for programs."""

    def __init__(self) -> None:
        super().__init__(serving.SIZES)
        self.waits: list[tuple[bool, bool]] = []  # whether any bit of `none`, and of `begun`, is set

    def wait_for_programs(self) -> None:
        self.waits.append((any(column(self, "none")), any(column(self, "begun"))))


def test_nothing_is_said_until_all_rows_were_looked_at() -> None:
    kernel = fake.FakeMaps(serving.SIZES)
    known = absent_flows.AbsentFlows(kernel)
    found = known.look()
    assert found is not None
    assert not any(column(kernel, "none"))
    found.add(flow(ADDRESSES[0], ADDRESSES[1]))
    known.looked(found)
    assert column(kernel, "none") == found.none() != bytes(len(found.none()))
    assert known.look() is None


def test_what_has_begun_is_cleared_when_no_program_takes_back_for_said() -> None:
    """Such a program has read the first word, is held up, and then reads the second."""
    kernel = Waiting()
    kernel.set_column("no_flows", "none", absence.Pairs().none())
    begin(kernel, range(absent_flows.MANY + 1))
    assert absent_flows.AbsentFlows(kernel).look() is not None
    assert kernel.waits == [(False, True), (False, False)]


def test_what_was_said_is_taken_back_once_much_has_begun_and_not_too_often() -> None:
    kernel, clock = fake.FakeMaps(serving.SIZES), Clock()
    known = absent_flows.AbsentFlows(kernel, clock)

    def look() -> bool:
        found = known.look()
        if found is None:
            return False
        known.looked(found)
        assert any(column(kernel, "none"))
        return True

    assert look()
    begin(kernel, range(absent_flows.MANY))
    clock.now_s += absent_flows.REST_S + 1.0
    assert not look()
    begin(kernel, range(absent_flows.MANY + 1))
    assert look()
    assert not any(column(kernel, "begun"))
    begin(kernel, range(absent_flows.MANY + 1))
    assert not look()
    clock.now_s += absent_flows.REST_S + 1.0
    assert look()


@pytest.mark.parametrize("at", ["before the look", "meanwhile", "after it"])
def test_rows_that_the_agent_writes_are_never_denied(at: str) -> None:
    kernel = fake.FakeMaps(serving.SIZES)
    known = absent_flows.AbsentFlows(kernel)
    key = flow(ADDRESSES[0], ADDRESSES[1])
    table = tables.Table.FLOWS

    def write() -> None:
        with known.written(key):
            kernel.put_absent(table, {key: bytes(abi.LAYOUTS["flow"].size)})

    if at == "before the look":
        write()
    found = known.look()
    assert found is not None
    for keys, _ in kernel.batches(table, 16):
        found.add(keys)
    if at == "meanwhile":
        write()
    known.looked(found)
    if at == "after it":
        write()
    words = array.array("Q", column(kernel, "none"))
    [place] = absence.pair_places(key)
    assert WORD & ~words[place >> 6] == 1 << (place & 63)
    assert sum(word.bit_count() for word in words) == 64 * absence.PAIR_ROWS - 1


def test_a_look_that_failed_says_nothing() -> None:
    kernel = fake.FakeMaps(serving.SIZES)
    known = absent_flows.AbsentFlows(kernel)
    assert known.look() is not None  # and never comes to its end
    assert not any(column(kernel, "none"))
    assert known.look() is not None


def test_an_agent_goes_on_with_what_the_one_before_it_has_said() -> None:
    kernel = fake.FakeMaps(serving.SIZES)
    said = absence.Pairs().none()
    kernel.set_column("no_flows", "none", said)
    assert absent_flows.AbsentFlows(kernel).look() is None
    assert column(kernel, "none") == said
