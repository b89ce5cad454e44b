"""Carries out what this node's Node object tells the agent: core/migration.py has how it is told.

What can not be seen from an agent's pod, whether kube-proxy has left this node for good, whoever
gives the order has seen at the API server. The agent sees that it serves itself, that no kube-proxy
is to be seen from here, neither its process nor its ports, and what came of it.
"""

import asyncio
import contextlib
import logging
import typing
from collections.abc import Callable, Iterable

from lbproxy import config, errors, gate
from lbproxy.core import events, inventory, migration, model, tables
from lbproxy.kernel import maps

_RETRY_S: typing.Final = 5.0
_log = logging.getLogger(__name__)


class Node(typing.Protocol):
    """What is asked of the controller, and told to it."""

    ready: asyncio.Event
    migration_problem: str


class Acts(typing.NamedTuple):
    """What is done to the kernel, and asked of it; another in tests."""

    flows: Callable[[maps.Maps], typing.Any]
    kube_proxy_here: Callable[[], str]
    take_over: Callable[[maps.Maps, typing.Any], typing.Any]
    give_back: Callable[[maps.Maps], typing.Any]
    rules: Callable[[], list[str]]
    rules_serve: Callable[[], bool]


def real() -> Acts:
    """Those of this node. Imported only where an order comes, which is once in a node's life."""
    from lbproxy import leftovers, taking_over  # noqa: PLC0415 - see above

    def here() -> str:
        if pids := taking_over.kube_proxies():
            return f"kube-proxy runs here (pid {', '.join(map(str, pids))})"
        if ports := taking_over.kube_proxys_ports():
            return f"another process has port {' and '.join(ports)}: kube-proxy still runs here, it seems"
        return ""

    return Acts(
        taking_over.flows,
        here,
        taking_over.take_over,
        taking_over.give_back,
        leftovers.present,
        leftovers.serving,
    )


class Orders:
    """The order that stands, and what became of it."""

    def __init__(
        self,
        settings: config.Config,
        answered: Callable[[migration.Report], None],
        acts: Callable[[], Acts] = real,
        retry_s: float = _RETRY_S,
    ) -> None:
        """`answered` is told, on the event loop, each time that there is something new to say."""
        self._name = settings.node_name
        self._obeys = settings.take_over is config.TakeOver.WHEN_TOLD
        self._answered = answered
        self._acts = acts
        self._retry_s = retry_s
        self._order = ""
        self._changed = asyncio.Event()

    def take(self, batch: Iterable[events.Event]) -> None:
        """Note what a batch says of this node."""
        for event in batch:
            match event:
                case events.Upsert(events.Kind.NODE, _, model.Node(name=self._name) as node):
                    if node.migrate != self._order:
                        self._order = node.migrate
                        self._changed.set()

    async def run(self, kernel: maps.Maps, writing: gate.Gate, node: Node) -> typing.NoReturn:
        """Carry orders out, one after another; one that can not be is tried again while it stands."""
        await node.ready.wait()
        tried = settled = ""
        said: str | None = None
        while True:
            self._changed.clear()
            order = self._order
            if order != tried:
                tried, said, node.migration_problem = order, None, ""
            if not order:
                settled = ""
            if order == settled:
                await self._changed.wait()
                continue
            async with writing.shared():
                report = await asyncio.to_thread(self._carry_out, order, kernel)
            line = migration.described(report)
            if report.problem != said:
                level = logging.WARNING if report.problem else logging.INFO
                _log.log(level, "%s of this Node: %s", migration.ANNOTATION, line)
                self._answered(report)
            said, node.migration_problem = report.problem, line if report.problem else ""
            if not report.problem:
                settled = order
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._retry_s):
                    await self._changed.wait()

    def _carry_out(self, order: str, kernel: maps.Maps) -> migration.Report:
        """Do it, in a thread of its own, and say what is so now."""
        acts = self._acts()
        removed: tuple[str, ...] = ()
        unable: tuple[str, ...] = ()
        problem = ""
        try:
            step = migration.step(order)
            flows = acts.flows(kernel)
            if step is not migration.Step.STATUS and not self._obeys:
                problem = "not done, since this agent is told takeOver: never"
            elif step is migration.Step.TAKE_OVER:
                problem = acts.kube_proxy_here()
                if not problem:
                    done = acts.take_over(kernel, flows)
                    removed, unable = done.removed, done.unable
                    problem = "; ".join(done.failed)
            elif step is migration.Step.RETURN:
                # Not asked whether kube-proxy is here: its rules are what new flows are left to.
                if acts.rules_serve():
                    problem = acts.give_back(kernel).problem
                else:
                    problem = "kube-proxy's rules have no Service yet: nobody would serve new flows"
            flows = acts.flows(kernel)
            return migration.Report(
                order,
                problem,
                serving=not inventory.is_set(kernel, tables.Handover.LEARN),
                returning=inventory.is_set(kernel, tables.Handover.RETURN),
                removed=removed,
                kube_proxy_rules=tuple(acts.rules()),
                unable=unable,
                flows_of_kube_proxy=flows.of_kube_proxy,
                flows_of_lbproxy=flows.of_lbproxy,
            )
        except (OSError, ValueError, errors.AgentError) as error:
            return migration.Report(order, str(error))
