"""What the agent makes of an order on its Node."""

import asyncio
import collections.abc
import contextlib
import dataclasses
import typing

import pytest

from lbproxy import errors, gate
from lbproxy.config import config
from lbproxy.core import events, inventory, migration, migration_plan, model, tables
from lbproxy.kernel import fake
from lbproxy.migrate import handover, orders, taking_over
from tests import installing, polling
from tests.unit import test_handover

TCP = {"TCP": 3}
BOTH, LBPROXY = migration_plan.BOTH, migration_plan.LBPROXY
# Who is to run there when an order comes, unless a test is about that.
LABELS = {"take-over": LBPROXY, "return": BOTH, "resume": BOTH}
NO_SERVICE = "kube-proxy's rules have no Service yet"


@dataclasses.dataclass
class World:
    """A node, its kernel, and what its agent has answered."""

    take_over: config.TakeOver = config.TakeOver.WHEN_TOLD
    here: str = ""  # what is seen of kube-proxy
    rules: list[str] = dataclasses.field(default_factory=lambda: ["nftables table ip kube-proxy"])
    failing: str = ""  # what taking over raises
    migration_problem: str = ""
    unserved: list[str] = dataclasses.field(default_factory=list)
    unreadable: str = ""  # what counting flows raises
    ready: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    answers: list[migration.Report] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.kernel = fake.FakeMaps(installing.SIZES)
        settings = config.Config(node_name="node-a", take_over=self.take_over)
        acts = orders.Acts(
            self._flows,
            lambda: self.here,
            self._take_over,
            self._give_back,
            lambda: list(self.rules),
            lambda _kernel: "" if self.rules else NO_SERVICE,
        )
        self.keeper = test_handover.Keeper()
        self.hand_over = handover.HandOver(self.kernel, entries=lambda: iter(()), keeper=self.keeper)
        self.orders = orders.Orders(settings, self.answers.append, lambda: acts, retry_s=0.01)

    def _flows(self, _kernel: object) -> taking_over.Flows:
        if self.unreadable:
            raise errors.AgentError(self.unreadable)
        return taking_over.Flows(TCP, {})

    def _take_over(self, _hand_over: object) -> taking_over.Removed:
        if self.failing:
            raise errors.AgentError(self.failing)
        gone, self.rules = tuple(self.rules), []
        return taking_over.Removed(
            gone, (), ("iptables-legacy: …",), (), ("table nat: KUBE-MARK-MASQ, since …",)
        )

    def _give_back(self, _kernel: object) -> taking_over.Returned:
        self.kernel.apply([tables.handover(tables.Handover.RETURN, 1)])
        return taking_over.Returned(7, "")

    def told(self, order: str, name: str = "node-a", label: str | None = None) -> None:
        label = LABELS.get(order.partition("/")[0], "") if label is None else label
        node = model.Node(name, (), "", (), True, migrate=order, proxy=label)
        self.orders.take([events.Upsert(events.Kind.NODE, events.ObjectName("", name), node)])

    @contextlib.asynccontextmanager
    async def running(self) -> collections.abc.AsyncIterator[None]:
        task = asyncio.create_task(self.orders.run(self.kernel, gate.Gate(), self, self.hand_over))
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
            obeys=True,
            serving=True,
            removed=("nftables table ip kube-proxy",),
            unable=("iptables-legacy: …",),
            kept=("table nat: KUBE-MARK-MASQ, since …",),
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
        assert NO_SERVICE in (await world.answer()).problem
        world.rules = ["iptables-nft chains"]
        report = await world.answer(2)
    assert (report.problem, report.returning) == ("", True)


async def test_nothing_is_removed_where_lbproxy_does_not_serve_all() -> None:
    world = World(unserved=["the packet path is off"])
    world.ready.set()
    world.told("status/1")
    async with world.running():
        status = await world.answer()
        assert (status.problem, status.serving) == ("", False)
        assert status.unserved == ("the packet path is off",)
        assert "does not serve all: the packet path is off" in migration.described(status)
        world.told("take-over/1")
        refused = await world.answer(2)
        assert refused.problem == "kube-proxy's rules may still be needed: the packet path is off"
        assert migration.described(refused).count("the packet path is off") == 1
        assert world.rules
        world.unserved.clear()
        assert (await world.answer(3)).problem == ""
    assert not world.rules


async def test_what_return_began_ends_without_anything_being_removed() -> None:
    world = World()
    world.ready.set()
    world.told("return/1")
    async with world.running():
        assert (await world.answer()).returning
        world.told("resume/2")
        report = await world.answer(2)
    assert (report.problem, report.returning, report.serving, report.removed) == ("", False, True, ())
    assert world.rules


@pytest.mark.parametrize(
    ("order", "label", "obeyed"),
    [
        ("take-over", "", False),
        ("take-over", BOTH, False),
        ("take-over", "x" * 100, False),
        ("take-over", LBPROXY, True),
        ("return", "", False),
        ("return", LBPROXY, False),
        ("return", BOTH, True),
        ("resume", "", False),
        ("resume", BOTH, True),
        ("resume", LBPROXY, True),
        ("status", "", True),
    ],
)
async def test_an_order_has_to_go_with_who_is_to_run_there(order: str, label: str, obeyed: bool) -> None:
    world = World()
    world.ready.set()
    world.told(order, label=label)
    async with world.running():
        report = await world.answer()
        assert (report.problem == "") is obeyed
        if obeyed:
            return
        assert "label lbproxy.io/proxy is" in report.problem
        assert len(report.problem) < 150
        assert (bool(world.rules), report.returning) == (True, False)
        world.told(order)
        assert (await world.answer(2)).problem == ""


def test_the_plan_gives_orders_where_the_agent_obeys_them() -> None:
    pod = migration_plan.Pod("pod", True)
    for label in ("", BOTH, LBPROXY):
        for target in migration_plan.Target:
            for theirs in (None, pod):
                view = migration_plan.View("n1", label, "", theirs, pod, None)
                move = migration_plan.next_move(view, target, leave_flows=False)
                if isinstance(move, migration_plan.Give) and move.step is not migration.Step.STATUS:
                    assert label in orders.LABELS[move.step]


async def test_an_agent_that_can_not_count_flows_says_so_and_serves() -> None:
    world = World(unreadable="cannot read the connection tracker: ENOBUFS")
    world.ready.set()
    world.told("status")
    async with world.running():
        report = await world.answer()
    assert (report.problem, report.obeys, report.serving) == (world.unreadable, True, True)


@pytest.mark.parametrize(
    ("order", "problem"),
    [
        ("status", ""),
        ("take-over", "takeOver: never"),
        ("return", "takeOver: never"),
        ("resume", "takeOver: never"),
        ("cleanup", "none of status, take-over, return, resume"),
        ("take-over/" + "x" * 100, "none of"),
        ("\n", "none of"),
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
    assert (said.obeys, said.serving) == (False, True)
    line = migration.described(said)
    assert "does not serve" not in line
    assert line.isprintable()
    assert len(said.order) < 50
    assert world.rules
    assert not inventory.is_set(world.kernel, tables.Handover.RETURN)
