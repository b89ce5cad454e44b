"""How often the log tells of a table that is full, and that it says how many service ports are concerned."""

import asyncio
import collections.abc
import contextlib
import logging
import logging.handlers

from lbproxy import shortfalls
from lbproxy.core import events
from tests.unit import test_controller, test_reconcile

MANY = 100
in_virtual_time = test_controller.in_virtual_time


@contextlib.contextmanager
def logged() -> collections.abc.Iterator[logging.handlers.BufferingHandler]:
    """What is logged of full tables in the meantime."""
    lines = logging.handlers.BufferingHandler(10 * MANY)
    logger = logging.getLogger(shortfalls.__name__)
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.setLevel(logging.NOTSET)
        logger.removeHandler(lines)


def taken(lines: logging.handlers.BufferingHandler) -> list[str]:
    found = [record.getMessage() for record in lines.buffer]
    lines.flush()
    return found


async def come(agent: test_controller.Agent, *numbers: int) -> None:
    """Services of one port, each of which has a pass of its own; all within MANY milliseconds."""
    for number in numbers:
        agent.told(test_reconcile.upsert(test_reconcile.service(f"many-{number}", number)))
        await test_controller.settled(agent)


async def grow(agent: test_controller.Agent, **rows: int) -> None:
    agent.kernel.grow(**rows)
    agent.control.grown()
    await test_controller.settled(agent)


@in_virtual_time
async def test_a_table_that_refuses_ever_more_while_it_is_about_to_grow_is_told_of_once() -> None:
    with logged() as lines:
        async with test_controller.Agent(room={"frontends": 1}).running() as agent:
            agent.told(*test_reconcile.SYNCED)
            await come(agent, *range(1, MANY + 1))
            assert len(agent.control.unserved) == 10
            assert len(agent.control.reconciler.starved) == MANY - 1
            [line] = taken(lines)
            assert line.startswith("1 service ports are not served as planned, such as default/many-2")
            assert "the frontends table is full (1 rows)" in line
            # Half of them have room, and more come: it is the same story.
            await grow(agent, frontends=MANY // 2)
            await come(agent, *range(MANY + 1, MANY + 11))
            assert taken(lines) == []
            await grow(agent, frontends=2 * MANY)
            assert agent.control.unserved == []
            assert taken(lines) == [
                f"the frontends table refuses nobody any more: up to {MANY - 1} service ports had no room"
            ]
            await come(agent, *range(MANY + 11, 2 * MANY + 2))
            assert len(taken(lines)) == 1


@in_virtual_time
async def test_each_table_has_a_line() -> None:
    with logged() as lines:
        async with test_controller.Agent(room={"frontends": 1, "services": 4}).running() as agent:
            agent.told(*test_reconcile.SYNCED)
            await come(agent, 1, 2, 3, 4, 5)
            [line] = taken(lines)
            assert "the frontends table" in line
            await grow(agent, frontends=8)
            ended, line = sorted(taken(lines), reverse=True)
            assert ended == "the frontends table refuses nobody any more: up to 4 service ports had no room"
            assert "2 service ports are not served" in line
            assert "the services table is full (4 rows)" in line


@in_virtual_time
async def test_of_one_that_can_not_grow_the_log_tells_again_when_more_were_refused() -> None:
    with logged() as lines:
        async with test_controller.Agent(room={"frontends": 1}).running() as agent:
            agent.told(*test_reconcile.SYNCED)
            await come(agent, 1, 2, 3, 4)
            assert len(taken(lines)) == 1
            # Nothing happens but that the agent tries again, every ten seconds.
            await asyncio.sleep(3600)
            [line] = taken(lines)
            assert line.startswith("3 service ports are not served as planned, such as ")
            agent.told(events.Delete(events.Kind.SERVICE, events.ObjectName("default", "many-4")))
            await asyncio.sleep(3600)
            assert taken(lines) == []
            await come(agent, 5)
            [line] = taken(lines)
            assert line.startswith("3 service ports are not served as planned, such as ")
