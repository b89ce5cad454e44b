import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.core import pools

ROWS = 12


@given(st.lists(st.one_of(st.none(), st.integers(0, 20)), max_size=60))
def test_no_id_has_two_owners_and_none_is_lost(steps: list[int | None]) -> None:
    """None takes an id, a number gives back one of those held."""
    pool, held = pools.IdPool("backends", ROWS), list[int]()
    for step in steps:
        if step is not None and held:
            pool.give_back(held.pop(step % len(held)))
        elif len(held) < ROWS - 1:
            taken = pool.take()
            assert 1 <= taken < ROWS
            assert taken not in held
            held.append(taken)
        else:
            with pytest.raises(pools.Exhausted):
                pool.take()
        assert (pool.used, pool.left) == (len(held), ROWS - 1 - len(held))


def test_the_longest_unused_id_is_given_out_first() -> None:
    pool = pools.IdPool("backends", 4)
    for _ in range(3):
        pool.take()
    for number in (2, 3, 1):
        pool.give_back(number)
    assert [pool.take() for _ in range(3)] == [2, 3, 1]


@given(st.sets(st.integers(1, ROWS - 1)))
def test_restored_ids_are_held_and_all_others_are_free(held: set[int]) -> None:
    pool = pools.IdPool("backends", ROWS)
    pool.restore(held)
    assert pool.used == len(held)
    free = [pool.take() for _ in range(pool.left)]
    assert sorted([*free, *held]) == list(range(1, ROWS))


def test_a_full_pool_names_its_table_and_the_flag() -> None:
    pool = pools.IdPool("localities", 1)
    with pytest.raises(pools.Exhausted, match=r"\(1 rows\).*--map-rows localities=N"):
        pool.take()


def blocks(extent: pools.Extent) -> set[int]:
    return set(range(extent.start, extent.start + extent.blocks))


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5)), max_size=60))
def test_extents_never_overlap_and_all_room_comes_back(steps: list[tuple[bool, int]]) -> None:
    pool, held = pools.ExtentPool("slots", ROWS), list[pools.Extent]()
    for takes, number in steps:
        if takes:
            try:
                extent = pool.take(number)
            except pools.Exhausted:
                # It may only refuse where no gap between the extents is large enough.
                free = set(range(1, ROWS)) - set().union(*map(blocks, held))
                assert not any(blocks(pools.Extent(at, number)) <= free for at in range(1, ROWS))
                continue
            assert extent.blocks == number
            assert blocks(extent) <= set(range(1, ROWS))
            assert not any(blocks(extent) & blocks(other) for other in held)
            held.append(extent)
        elif held:
            pool.give_back(held.pop(number % len(held)))
        assert pool.used == sum(extent.blocks for extent in held)
    for extent in held:
        pool.give_back(extent)
    assert pool.take(ROWS - 1) == pools.Extent(1, ROWS - 1)
    with pytest.raises(pools.Exhausted):
        pool.take(1)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), max_size=6))
def test_restored_extents_are_held_and_the_gaps_are_free(gaps: list[tuple[int, int]]) -> None:
    at, held = 1, list[pools.Extent]()
    for gap, length in gaps:
        held.append(pools.Extent(at + gap, length))
        at += gap + length
    pool = pools.ExtentPool("slots", at + 5)
    pool.restore(set(held))
    owners: collections.Counter[int] = collections.Counter()
    for extent in held:
        owners.update(blocks(extent))
    for _ in range(at + 4 - pool.used):
        owners.update(blocks(pool.take(1)))
    assert owners == dict.fromkeys(range(1, at + 5), 1)


def test_neighbours_are_joined_when_nothing_else_is_large_enough() -> None:
    pool = pools.ExtentPool("slots", 7)
    extents = [pool.take(2) for _ in range(3)]
    for extent in (extents[0], extents[2], extents[1]):
        pool.give_back(extent)
    assert pool.take(5) == pools.Extent(1, 5)
