"""Carries out what this node's Node object tells the agent: core/migration.py has how it is told.

What can not be seen from an agent's pod, whether kube-proxy has left this node for good, whoever
gives the order has seen at the API server. The agent sees that it serves itself, that no kube-proxy
is to be seen from here, neither its process nor its ports, and what came of it. It sees the Node's
label, too: an order that does not go with who is to run here is somebody's mistake.
"""

import asyncio
import contextlib
import logging
import typing
from collections.abc import Callable, Iterable

import msgspec

from lbproxy import errors, gate
from lbproxy.config import config
from lbproxy.core import events, inventory, migration, migration_plan, model, tables
from lbproxy.kernel import maps

if typing.TYPE_CHECKING:
    from lbproxy.migrate import handover, taking_over

_RETRY_S: typing.Final = 5.0
# Who is to run on a node, as its label has it, when its agent is told something.
LABELS: typing.Final[dict[migration.Step, tuple[str, ...]]] = {
    migration.Step.TAKE_OVER: (migration_plan.LBPROXY,),
    migration.Step.RETURN: (migration_plan.BOTH,),
    migration.Step.RESUME: (migration_plan.BOTH, migration_plan.LBPROXY),
}
_log = logging.getLogger(__name__)


class Node(typing.Protocol):
    """What is asked of the controller, and told to it."""

    ready: asyncio.Event
    migration_problem: str

    @property
    def unserved(self) -> typing.Sequence[str]:
        """Why not all is served that is to be."""
        ...


class Acts(typing.NamedTuple):
    """What is done to the kernel, and asked of it; another in tests."""

    flows: Callable[[maps.Maps], "taking_over.Flows"]
    kube_proxy_here: Callable[[], str]
    take_over: Callable[["handover.HandOver"], "taking_over.Removed"]
    give_back: Callable[[maps.Maps], "taking_over.Returned"]
    rules: Callable[[], list[str]]
    rules_lack: Callable[[maps.Maps], str]


class _Done(typing.NamedTuple):
    """What became of a step."""

    problem: str = ""
    removed: tuple[str, ...] = ()
    unable: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def real() -> Acts:
    """Those of this node. Imported only where an order comes, which is once in a node's life."""
    from lbproxy import leftovers  # noqa: PLC0415 - see above
    from lbproxy.migrate import taking_over  # noqa: PLC0415 - see above

    return Acts(
        taking_over.flows,
        taking_over.kube_proxy_here,
        taking_over.take_over,
        taking_over.give_back,
        leftovers.present,
        leftovers.lacking,
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
        self._label = ""
        self._changed = asyncio.Event()

    def take(self, batch: Iterable[events.Event]) -> None:
        """Note what a batch says of this node."""
        for event in batch:
            match event:
                case events.Upsert(events.Kind.NODE, _, model.Node(name=self._name) as node):
                    if (node.migrate, node.proxy) != (self._order, self._label):
                        self._order, self._label = node.migrate, node.proxy
                        self._changed.set()

    async def run(
        self, kernel: maps.Maps, writing: gate.Gate, node: Node, hand_over: "handover.HandOver"
    ) -> typing.NoReturn:
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
                report = await asyncio.to_thread(
                    self._carry_out, order, self._label, kernel, hand_over, tuple(node.unserved)
                )
            if report.removed or not report.problem:
                # What kube-proxy has begun in the last seconds is looked after as well.
                hand_over.started()
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

    def _carry_out(
        self,
        order: str,
        label: str,
        kernel: maps.Maps,
        hand_over: "handover.HandOver",
        unserved: tuple[str, ...],
    ) -> migration.Report:
        """Do it, in a thread of its own, and say what is so now."""
        acts, said = self._acts(), order
        try:
            step = migration.step(order)
        except ValueError as error:
            done, said = _Done(str(error)), migration.quoted(order)
        else:
            try:
                done = self._do(step, label, kernel, hand_over, unserved, acts)
            except (OSError, ValueError, errors.AgentError) as error:
                done = _Done(str(error))
        report = migration.Report(
            said,
            done.problem,
            obeys=self._obeys,
            unserved=unserved,
            removed=done.removed,
            unable=done.unable,
            kept=done.kept,
        )
        try:
            report = msgspec.structs.replace(
                report,
                serving=not unserved and not inventory.is_set(kernel, tables.Handover.LEARN),
                returning=inventory.is_set(kernel, tables.Handover.RETURN),
                kube_proxy_rules=tuple(acts.rules()),
            )
            flows = acts.flows(kernel)
            return msgspec.structs.replace(
                report, flows_of_kube_proxy=flows.of_kube_proxy, flows_of_lbproxy=flows.of_lbproxy
            )
        except (OSError, errors.AgentError) as error:
            return msgspec.structs.replace(report, problem=done.problem or str(error))

    def _do(
        self,
        step: migration.Step,
        label: str,
        kernel: maps.Maps,
        hand_over: "handover.HandOver",
        unserved: tuple[str, ...],
        acts: Acts,
    ) -> _Done:
        if step is migration.Step.STATUS:
            return _Done()
        if not self._obeys:
            return _Done("not done, since this agent is told takeOver: never")
        if label not in LABELS[step]:
            goes = " or ".join(LABELS[step])
            given = migration.quoted(label)
            return _Done(f"not done, since this Node's label {migration.LABEL} is {given}, not {goes}")
        match step:
            case migration.Step.TAKE_OVER:
                if problem := acts.kube_proxy_here() or _still_needed(unserved):
                    return _Done(problem)
                gone = acts.take_over(hand_over)
                return _Done("; ".join(gone.failed), gone.removed, gone.unable, gone.kept)
            case migration.Step.RETURN:
                # Not asked whether kube-proxy is here: its rules are what new flows are left to.
                return _Done(acts.rules_lack(kernel) or acts.give_back(kernel).problem)
            case migration.Step.RESUME:
                hand_over.resume()
                return _Done()


def _still_needed(unserved: tuple[str, ...]) -> str:
    return f"kube-proxy's rules may still be needed: {'; '.join(unserved)}" if unserved else ""
