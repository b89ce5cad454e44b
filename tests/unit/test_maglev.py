import collections
import subprocess
import sys

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lbproxy.core import maglev

identities = st.lists(st.binary(min_size=18, max_size=18), min_size=1, max_size=30, unique=True)


@st.composite
def weighted(draw: st.DrawFn) -> list[tuple[bytes, int]]:
    weights = st.sampled_from([0, 1, 1, 2, 3, 10, 100]) | st.integers(0, 65535)
    return [(identity, draw(weights)) for identity in draw(identities)]


def backends(count: int) -> list[tuple[bytes, int]]:
    return [(number.to_bytes(18, "big"), 1) for number in range(count)]


def by_identity(pairs: list[tuple[bytes, int]]) -> list[bytes]:
    return [pairs[index][0] for index in maglev.table(pairs)]


@pytest.mark.parametrize(
    ("count", "size"),
    [
        (2, 251),
        (3, 1021),
        (10, 1021),
        (11, 4093),
        (40, 4093),
        (41, 16381),
        (163, 16381),
        (164, 65521),
        (60000, 65521),
    ],
)
def test_size_follows_the_number_of_backends(count: int, size: int) -> None:
    assert maglev.size(count) == size


def test_sizes_are_primes_so_that_every_step_visits_every_slot() -> None:
    for size in maglev.SIZES:
        assert all(size % divisor for divisor in range(2, int(size**0.5) + 1)), size


@given(weighted(), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_the_order_of_backends_does_not_matter(pairs: list[tuple[bytes, int]], random: object) -> None:
    shuffled = list(pairs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert by_identity(shuffled) == by_identity(pairs)


@given(weighted())
@settings(max_examples=60)
def test_each_slot_holds_a_live_backend_in_proportion_to_its_weight(pairs: list[tuple[bytes, int]]) -> None:
    slots = collections.Counter(maglev.table(pairs))
    total = sum(weight for _, weight in pairs)
    live = sum(weight > 0 for _, weight in pairs)
    table_size = slots.total()
    assert table_size == (maglev.size(live) if live > 1 else live)
    for index, (_, weight) in enumerate(pairs):
        if not weight:
            assert index not in slots
            continue
        quota = table_size * weight / total
        assert slots[index] >= 1
        assert slots[index] <= quota + 1 + 1e-6
        assert slots[index] >= quota - live * weight / total - 1e-6


@given(identities, st.integers(1, 65535))
@settings(max_examples=60)
def test_equal_weights_differ_by_at_most_one_slot(names: list[bytes], weight: int) -> None:
    pairs = [(name, weight) for name in names]
    slots = collections.Counter(maglev.table(pairs))
    assert max(slots.values()) - min(slots.values()) <= 1
    assert len(slots) == len(pairs)
    assert by_identity(pairs) == by_identity([(name, 1) for name in names])


@given(st.integers(42, 160), st.data())
@settings(max_examples=15)
def test_one_backend_leaving_moves_few_of_the_others_slots(count: int, data: st.DataObject) -> None:
    names = data.draw(
        st.lists(st.binary(min_size=18, max_size=18), min_size=count, max_size=count, unique=True)
    )
    pairs = [(name, 1) for name in names]
    gone = data.draw(st.sampled_from(names))
    before = by_identity(pairs)
    after = by_identity([pair for pair in pairs if pair[0] != gone])
    assume(len(before) == len(after) == 16381)
    survivors = [(old, new) for old, new in zip(before, after, strict=True) if old != gone]
    moved = sum(old != new for old, new in survivors)
    assert moved / len(survivors) <= 0.04


def test_a_heavier_backend_takes_its_slots_from_all_others_evenly() -> None:
    pairs = backends(50)
    pairs[0] = (pairs[0][0], 10)
    slots = collections.Counter(maglev.table(pairs))
    others = [slots[index] for index in range(1, 50)]
    assert max(others) - min(others) <= 1
    assert 9.5 <= slots[0] / others[0] <= 10.5


def test_ten_thousand_backends_all_have_slots() -> None:
    slots = collections.Counter(maglev.table(backends(10_000)))
    assert slots.total() == maglev.LARGEST
    assert len(slots) == 10_000
    assert max(slots.values()) - min(slots.values()) <= 1


def test_more_backends_than_slots_become_a_plain_list() -> None:
    count = maglev.LARGEST + 1
    assert sorted(maglev.table(backends(count))) == list(range(count))


@pytest.mark.parametrize(
    ("pairs", "slots"), [([], []), ([(b"a", 0)], []), ([(b"a", 7)], [0]), ([(b"a", 0), (b"b", 1)], [1])]
)
def test_none_and_one(pairs: list[tuple[bytes, int]], slots: list[int]) -> None:
    assert list(maglev.table(pairs)) == slots


@given(weighted())
@settings(max_examples=60)
def test_a_backend_of_weight_0_is_as_if_it_were_not_there(pairs: list[tuple[bytes, int]]) -> None:
    assert by_identity(pairs) == by_identity([pair for pair in pairs if pair[1]])


@pytest.mark.parametrize("slots", [251, 65537])
def test_another_size_may_be_asked_for(slots: int) -> None:
    held = collections.Counter(maglev.table(backends(10), slots))
    assert held.total() == slots
    assert max(held.values()) - min(held.values()) <= 1
    assert maglev.table(backends(10), maglev.size(10)) == maglev.table(backends(10))


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        maglev.table([(b"a", 1), (b"b", -1)])


def test_another_process_builds_the_same_table() -> None:
    """Nodes agree only if nothing depends on Python's own, seeded, hashes."""
    code = (
        "from lbproxy.core import maglev, plan\n"
        "print(list(maglev.table([(bytes([n]) * 18, n % 3 + 1) for n in range(20)]))[:300])"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    expected = list(maglev.table([(bytes([n]) * 18, n % 3 + 1) for n in range(20)]))[:300]
    assert seen == {f"{expected}\n".encode()}


def test_the_table_is_the_one_older_versions_built() -> None:
    """Nodes of two versions serve one cluster during an upgrade: a change here must be a decision."""
    table = maglev.table([(bytes([n]) * 18, 1) for n in range(5)])
    assert len(table) == 1021
    assert list(table)[:24] == EXPECTED


EXPECTED = [2, 4, 0, 1, 3, 0, 2, 0, 3, 2, 3, 0, 3, 1, 2, 2, 0, 2, 1, 4, 3, 1, 0, 1]
