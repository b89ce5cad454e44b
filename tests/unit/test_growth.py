"""Which maps grow, how far, and which can not any more."""

import asyncio
import contextlib
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy import gate
from lbproxy.core import fill, growth
from tests import polling, serving

ROWS: typing.Final = dict.fromkeys(growth.GROWABLE, 100)
MOST: typing.Final = dict.fromkeys(growth.GROWABLE, 1600)
USES = st.fixed_dictionaries(dict.fromkeys(growth.GROWABLE, st.integers(0, 100)))
STARVED = st.sets(st.sampled_from(growth.GROWABLE))


def test_a_map_grows_before_anybody_is_alerted() -> None:
    assert growth.GROW_AT < fill.WARN_AT
    assert growth.growth({"frontends": 74}, ROWS, (), MOST) == growth.Growth({}, ())
    assert growth.growth({"frontends": 75}, ROWS, (), MOST) == growth.Growth({"frontends": 200}, ())


def test_what_refuses_somebody_grows_however_full_it_is() -> None:
    assert growth.growth({"slots": 3}, ROWS, {"slots"}, MOST).sizes == {"slots": 200}


def test_the_last_step_goes_as_far_as_is_allowed() -> None:
    most = {**MOST, "frontends": 150}
    assert growth.growth({"frontends": 100}, ROWS, (), most).sizes == {"frontends": 150}
    at_the_end = {**ROWS, "frontends": 150}
    assert growth.growth({"frontends": 119}, at_the_end, (), most) == growth.Growth({}, ())
    assert growth.growth({"frontends": 121}, at_the_end, (), most) == growth.Growth({}, ("frontends",))
    assert growth.growth({}, at_the_end, {"frontends"}, most) == growth.Growth({}, ("frontends",))


def test_one_that_an_earlier_configuration_made_larger_stays_as_it_is() -> None:
    assert growth.growth({"backends": 90}, ROWS, (), {**MOST, "backends": 50}).sizes == {}


@given(USES, STARVED, st.integers(1, 3000))
def test_whatever_grows_then_has_room_or_is_as_large_as_it_may_be(
    used: dict[str, int], starved: set[str], limit: int
) -> None:
    most = dict.fromkeys(growth.GROWABLE, limit)
    decided = growth.growth(used, ROWS, starved, most)
    for name, rows in decided.sizes.items():
        assert ROWS[name] < rows <= limit
        assert rows == limit or used[name] < growth.GROW_AT * fill.usable_rows(name, rows)
    assert not decided.sizes.keys() & set(decided.stuck)
    again = growth.growth(used, {**ROWS, **decided.sizes}, (), most)
    assert again.sizes == {}


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 10_000))
def test_those_refused_are_expected_to_need_what_others_do(served: int, refused: int, rows: int) -> None:
    (found,) = growth.expected({"slots": rows}, served, refused).values()
    assert found >= rows
    if served:
        assert abs(found - rows / served * (served + refused)) <= 1


def test_what_forgets_by_itself_does_not_grow() -> None:
    assert set(growth.GROWABLE) & {"flows_new", "affinity", "socket_spill", "fragments"} == set()
    assert set(growth.GROWABLE) <= serving.SIZES.keys()


# --- who writes meanwhile ---


async def test_whoever_is_alone_waits_for_those_inside_and_others_for_it() -> None:
    writing = gate.Gate()
    order: list[str] = []
    leave, entered = asyncio.Event(), asyncio.Event()

    async def inside(name: str) -> None:
        async with writing.shared():
            order.append(name)
            entered.set()
            await leave.wait()

    async def alone() -> None:
        async with writing.alone():
            order.append("alone")
            # Nobody can have come in, however often the others had their turn.
            for _ in range(10):
                await asyncio.sleep(0)
            order.append("done")

    async with asyncio.TaskGroup() as tasks:
        for name in ("first", "second"):
            tasks.create_task(inside(name))
        await entered.wait()
        tasks.create_task(alone())
        await asyncio.sleep(0)
        tasks.create_task(inside("later"))
        tasks.create_task(alone())
        await asyncio.sleep(0)
        assert order == ["first", "second"]
        leave.set()
    assert order[:4] == ["first", "second", "alone", "done"]
    assert sorted(order[4:]) == ["alone", "done", "later"]
    assert order.index("done", 4) == order.index("alone", 4) + 1


async def test_one_who_gives_up_waiting_keeps_nobody_out() -> None:
    writing = gate.Gate()

    async def alone() -> None:
        async with writing.alone():
            pytest.fail("somebody is inside")

    async with writing.shared():
        waiting = asyncio.create_task(alone())
        await asyncio.sleep(0)
        late: list[bool] = []

        async def other() -> None:
            async with writing.shared():
                late.append(True)

        after = asyncio.create_task(other())
        await asyncio.sleep(0)
        assert not late
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        await polling.eventually_async(lambda: late)
        await after
