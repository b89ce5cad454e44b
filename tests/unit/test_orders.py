"""What the agent makes of an order on its Node."""

import asyncio
import collections.abc
import contextlib
import dataclasses
import typing

import pytest

from lbproxy import config, errors, gate, orders, taking_over
from lbproxy.core import events, inventory, migration, model, tables
from lbproxy.kernel import fake
from tests import installing, polling

TCP = {"TCP": 3}


@dataclasses.dataclass
class World:
    """A node, its kernel, and what its agent has answered."""

    take_over: config.TakeOver = config.TakeOver.WHEN_TOLD
    here: str = ""  # what is seen of kube-proxy
    rules: list[str] = dataclasses.field(default_factory=lambda: ["nftables table ip kube-proxy"])
    failing: str = ""  # what taking over raises
    migration_problem: str = ""
    ready: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    answers: list[migration.Report] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.kernel = fake.FakeMaps(installing.SIZES)
        settings = config.Config(node_name="node-a", take_over=self.take_over)
        acts = orders.Acts(
            lambda _kernel: taking_over.Flows(TCP, {}),
            lambda: self.here,
            self._take_over,
            self._give_back,
            lambda: list(self.rules),
            lambda: bool(self.rules),
        )
        self.orders = orders.Orders(settings, self.answers.append, lambda: acts, retry_s=0.01)

    def _take_over(self, _kernel: object, _flows: object) -> taking_over.Removed:
        if self.failing:
            raise errors.AgentError(self.failing)
        gone, self.rules = tuple(self.rules), []
        return taking_over.Removed(gone, (), ("iptables-legacy: …",), ())

    def _give_back(self, _kernel: object) -> taking_over.Returned:
        self.kernel.apply([tables.handover(tables.Handover.RETURN, 1)])
        return taking_over.Returned(7, "")

    def told(self, order: str, name: str = "node-a") -> None:
        node = model.Node(name, (), "", (), True, migrate=order)
        self.orders.take([events.Upsert(events.Kind.NODE, events.ObjectName("", name), node)])

    @contextlib.asynccontextmanager
    async def running(self) -> collections.abc.AsyncIterator[None]:
        task = asyncio.create_task(self.orders.run(self.kernel, gate.Gate(), self))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def answer(self, number: int = 1) -> migration.Report:
        await polling.eventually_async(lambda: len(self.answers) >= number)
        return self.answers[number - 1]


async def test_rules_are_removed_once_the_agent_serves() -> None:
    world = World()
    world.told("take-over/1")
    world.told("return/9", name="another")
    async with world.running():
        await asyncio.sleep(0)
        assert world.rules
        world.ready.set()
        assert await world.answer() == migration.Report(
            "take-over/1",
            serving=True,
            removed=("nftables table ip kube-proxy",),
            unable=("iptables-legacy: …",),
            flows_of_kube_proxy=TCP,
        )


async def test_an_order_is_carried_out_once_and_again_when_it_is_given_again() -> None:
    world = World()
    world.ready.set()
    async with world.running():
        for number, order in enumerate(("status", "", "status", "status/2", "status/3"), 1):
            world.told(order)
            world.told(order)
            if order:
                assert (await world.answer(number - (number > 1))).order == order
            else:
                await polling.eventually_async(lambda: not world.orders._order)
                await asyncio.sleep(0.02)
    assert [one.order for one in world.answers] == ["status", "status", "status/2", "status/3"]


async def test_what_can_not_be_done_is_said_once_and_tried_until_it_can() -> None:
    world = World(here="another process has port 10256")
    world.ready.set()
    world.told("take-over")
    async with world.running():
        assert (await world.answer()).problem == "another process has port 10256"
        assert world.migration_problem.startswith("take-over: another process has port 10256")
        assert world.rules
        world.failing, world.here = "no anchor", ""
        assert (await world.answer(2)).problem == "no anchor"
        world.failing = ""
        assert (await world.answer(3)).problem == ""
        assert world.migration_problem == ""
    assert len(world.answers) == 3


async def test_an_order_that_is_taken_away_is_no_problem_any_more() -> None:
    world = World(here="kube-proxy runs here")
    world.ready.set()
    world.told("take-over")
    async with world.running():
        await world.answer()
        world.told("")
        await polling.eventually_async(lambda: not world.migration_problem)
    assert world.rules


async def test_flows_are_left_to_kube_proxy_only_where_its_rules_are() -> None:
    world = World(rules=[])
    world.ready.set()
    world.told("return")
    async with world.running():
        assert "nobody would serve" in (await world.answer()).problem
        world.rules = ["iptables-nft chains"]
        report = await world.answer(2)
    assert (report.problem, report.returning) == ("", True)


@pytest.mark.parametrize(
    ("order", "problem"),
    [
        ("status", ""),
        ("take-over", "takeOver: never"),
        ("return", "takeOver: never"),
        ("cleanup", "'cleanup' is none of status, take-over, return"),
        ("take-over/" + "x" * 100, "is none of"),
        ("\n", "is none of"),
    ],
)
async def test_unless_it_is_set_so_nothing_is_done_but_answering(order: str, problem: str) -> None:
    world = World(config.TakeOver.NEVER)
    world.ready.set()
    world.told(order)
    async with world.running():
        said: typing.Any = await world.answer()
    assert problem in said.problem
    assert bool(said.problem) == bool(problem)
    assert world.rules
    assert not inventory.is_set(world.kernel, tables.Handover.RETURN)
