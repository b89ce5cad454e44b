"""The nodes of `lbproxy migrate cluster`, on their way: each move as core/migration_plan.py has it."""

import argparse
import contextlib
import itertools
import secrets
import typing
from collections.abc import Iterator, Sequence

from lbproxy import errors, interrupts
from lbproxy.core import migration, migration_plan
from lbproxy.kube import cluster, cluster_objects
from lbproxy.migrate.daemon_sets import FIRST_PAUSE_S, LONGEST_PAUSE_S, Sets, Waiting, tell

_ANSWER_S: typing.Final = 30.0  # an Event may get lost: then the order is given once more


class Stopped(errors.AgentError):
    """A node on which it does not go on; what to do is said."""


class Result(typing.NamedTuple):
    """What this run came to at a node, and the label that it has then."""

    outcome: migration_plan.Outcome
    note: str
    label: str


class Walk:
    """From node to node; `results` are of those that are done with."""

    def __init__(
        self,
        args: argparse.Namespace,
        api: cluster.Cluster,
        sets: Sets,
        waiting: Waiting,
        signals: interrupts.Interrupts,
    ) -> None:
        self._args = args
        self._api = api
        self._sets = sets
        self._to = migration_plan.Target(args.to)
        self._waiting = waiting
        self._signals = signals
        self._run_id = secrets.token_hex(3)
        self._numbers = itertools.count(1)
        self._touched: list[_Way] = []
        self.results: dict[str, Result] = {}

    def go(self, names: Sequence[str]) -> None:
        """Take these nodes there. Raises Stopped and ApiError; orders are taken back whatever happens."""
        ahead = iter([_Way(name, number, len(names)) for number, name in enumerate(names, 1)])
        under_way = list(self._next(ahead, self._args.at_once))
        pause_s = FIRST_PAUSE_S
        try:
            while under_way:
                moved = False
                self._read_sets()
                for way in tuple(under_way):
                    if self._step(way):
                        moved = True
                    if way.over:
                        under_way.remove(way)
                        under_way += self._next(ahead, 1)
                pause_s = FIRST_PAUSE_S if moved else min(LONGEST_PAUSE_S, 1.5 * pause_s)
                if under_way and not moved:
                    self._waiting.sleep(pause_s)
        finally:
            # Nobody is left to look at what comes of it.
            with self._signals.held():
                for way in under_way:
                    self._withdraw_or_say(way)

    @property
    def orders_stand(self) -> bool:
        """Whether an order of this run could not be taken back."""
        return any(way.order for way in self._touched)

    def standing(self) -> list[str]:
        """How the nodes are that this run has come to, each with its name."""
        return [f"{way.name}: {migration_plan.standing(way.view)}" for way in self._touched if way.view]

    def _next(self, ahead: Iterator["_Way"], count: int) -> Iterator["_Way"]:
        for way in itertools.islice(ahead, count):
            self._touched.append(way)
            yield way

    def _read_sets(self) -> None:
        # Somebody may have made one anew, which has another affinity, and pods of its own.
        with _patiently():
            self._sets.read()

    def _step(self, way: "_Way") -> bool:
        """Look at a node and make its next move; whether it made one. Raises Stopped and ApiError."""
        try:
            way.view = self._view(way)
            move = migration_plan.next_move(
                way.view,
                self._to,
                leave_flows=self._args.leave_flows,
                without_agent=self._args.without_agent,
            )
            return self._make(way, way.view, move)
        except cluster.ApiError as error:
            if error.status == 404:
                way.order = ""
                self._end(way, migration_plan.Outcome.GONE, "the node is not there any more")
                return True
            if not error.passes:
                raise
            self._wait(way, migration_plan.Wait(str(error)))
            return False

    def _view(self, way: "_Way") -> migration_plan.View:
        node = self._api.node(way.name)
        way.lost = node.lost
        if self._to is migration_plan.Target.LBPROXY and not self._sets.stays_away(node.labels):
            raise Stopped(
                f"{way.name}: DaemonSet {'/'.join(self._args.kube_proxy)} does not keep away from "
                "lbproxy's nodes any more: whoever manages it has written it anew. Run again: that puts it "
                "right, and goes on here"
            )
        if node.order and node.order != way.order:
            # Somebody's, or an earlier run's: it is not to be obeyed behind our back.
            way.say(f"an order that is not of this run is taken back: {node.order}")
            self._api.tell(way.name, "")
        report = None
        if way.order:
            answers = self._api.answers().get(way.name, [])
            report = next((one.report for one in reversed(answers) if one.report.order == way.order), None)
        theirs, ours = (_seen(found.get(way.name)) for found in self._sets.pods(way.name))
        label = node.labels.get(migration.LABEL, "")
        return migration_plan.View(way.name, label, way.order, theirs, ours, report)

    def _make(self, way: "_Way", view: migration_plan.View, move: migration_plan.Move) -> bool:
        match move:
            case migration_plan.SetLabel(value, why):
                self._withdraw(way)
                way.say(f"label {migration.LABEL}={value or '(none)'}: {why}")
                self._api.label(way.name, value)
                way.view = view._replace(label=value)
            case migration_plan.Give(step, why):
                way.say(f"the agent is {why}")
                self._give(way, step)
            case migration_plan.Wait():
                self._wait(way, move)
                if move.for_answer and self._waiting.clock() > way.asked_s + _ANSWER_S and way.order:
                    self._give(way, migration.step(way.order))
                return False
            case migration_plan.Refuse(why):
                self._stop(way, why, migration_plan.Target.LBPROXY)
            case migration_plan.Done(note, outcome):
                self._withdraw(way)
                self._end(way, outcome, note)
        way.since_s = None
        return True

    def _give(self, way: "_Way", step: migration.Step) -> None:
        way.order = f"{step}/{self._run_id}-{next(self._numbers)}"
        way.asked_s = self._waiting.clock()
        self._api.tell(way.name, way.order)

    def _withdraw(self, way: "_Way") -> None:
        if way.order:
            self._api.tell(way.name, "")
            way.order = ""

    def _withdraw_or_say(self, way: "_Way") -> None:
        try:
            self._withdraw(way)
        except cluster.ApiError as error:
            way.say(f"{error}; its order stands: kubectl annotate node {way.name} {migration.ANNOTATION}-")

    def _end(self, way: "_Way", outcome: migration_plan.Outcome, note: str) -> None:
        way.say(note)
        self.results[way.name] = Result(outcome, note, way.view.label if way.view else "")
        way.over = True

    def _wait(self, way: "_Way", wait: migration_plan.Wait) -> None:
        now_s = self._waiting.clock()
        if way.since_s is None:
            way.since_s = now_s
        if wait.what != way.waits_for:
            way.waits_for = wait.what
            way.say(f"waiting until {wait.what}")
        if now_s - way.since_s > self._args.timeout:
            self._stop(way, f"not within {self._args.timeout:g} s: {wait.what}", wait.whose, wait.hint)

    def _stop(
        self, way: "_Way", why: str, whose: migration_plan.Target | None, hint: str = ""
    ) -> typing.NoReturn:
        label = way.view.label if way.view else ""
        self.results[way.name] = Result(migration_plan.Outcome.STOPPED, f"stopped: {why}", label)
        said = [f"{way.name}: {why}"]
        said += [hint] if hint else []
        if whose and way.view and (waiting := self._sets.unscheduled(whose, way.name)):
            said.append(waiting)
        if way.lost:
            said.append(f"The node is not Ready; --all-nodes --except {way.name} leaves it as it is")
        said.append(
            "Whoever began a connection still serves it. Look at the pods of this node, their logs and "
            f"`kubectl describe node {way.name}`; run again, it goes on here"
        )
        out = migration_plan.way_out(way.view, self._to, whose) if way.view else ""
        back = f"; or: lbproxy migrate cluster {out}" if out else ""
        raise Stopped(". ".join(said) + back)


class _Way:
    """How far a node is: what its agent was told by this run, and what is waited for."""

    def __init__(self, name: str, number: int, of: int) -> None:
        self.name = name
        self.view: migration_plan.View | None = None
        self.lost = False  # to its kubelet
        self.order = ""
        self.asked_s = 0.0
        self.waits_for = ""
        self.since_s: float | None = None
        self.over = False
        self._place = f"[{number}/{of}] {name}"

    def say(self, what: str) -> None:
        """Say what happens to it."""
        tell(f"{self._place}: {what}")


def _seen(pod: cluster_objects.Pod | None) -> migration_plan.Pod | None:
    return None if pod is None else migration_plan.Pod(pod.metadata.name, pod.ready, pod.obstacle)


@contextlib.contextmanager
def _patiently() -> Iterator[None]:
    """Let go by what may be otherwise the next time."""
    try:
        yield
    except cluster.ApiError as error:
        if not error.passes:
            raise
