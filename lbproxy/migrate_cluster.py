"""`lbproxy migrate cluster`: from kube-proxy to lbproxy, or back, node by node, from anywhere.

It decides nothing by itself (core/migration_plan.py does) and does nothing on a node: it labels, has
the two DaemonSets' controllers start and end pods, tells the agents what to do and reads their answers.
"""

import argparse
import contextlib
import difflib
import itertools
import secrets
import sys
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from lbproxy import errors, output, render
from lbproxy.core import migration, migration_plan
from lbproxy.kube import cluster

_FIRST_PAUSE_S: typing.Final = 0.2
_LONGEST_PAUSE_S: typing.Final = 3.0
_ANSWER_S: typing.Final = 30.0  # an Event may get lost: then the order is given once more
_OVERLAY: typing.Final = "deploy/kustomize/overlays/migrate"


class NodeStatus(msgspec.Struct, frozen=True):
    """A node, as the cluster shows it; `report` is what its agent said last, at `reported_at`."""

    node: str
    label: str
    kube_proxy: str  # its pod: ready, not ready, or empty for none
    lbproxy: str
    outcome: str  # of this command; empty where it did nothing there
    report: migration.Report | None
    reported_at: str


class Stopped(errors.AgentError):
    """A node on which it does not go on; what to do is said."""


def main(args: argparse.Namespace) -> int:
    """Show the cluster, or take its nodes there or back; returns the exit status. Raises LbproxyError."""
    _check(args)
    return Migration(args, cluster.connect(args.kubeconfig, args.context)).run()


def _check(args: argparse.Namespace) -> None:
    problems = []
    if args.to and not (args.node or args.all_nodes):
        problems.append("--to: say which nodes: --node NAME, more than once if you like, or --all-nodes")
    if args.node and args.all_nodes:
        problems.append("--node and --all-nodes: one of them")
    if not args.to and (args.node or args.all_nodes):
        problems.append("--to lbproxy or --to kube-proxy: which way the nodes are to go")
    if problems:
        raise errors.ConfigError(problems)


class Migration:
    """One run of the command."""

    def __init__(
        self,
        args: argparse.Namespace,
        api: cluster.Cluster,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        ask: Callable[[str], str] = input,
    ) -> None:
        self._args = args
        self._api = api
        self._to = migration_plan.Target(args.to) if args.to else None
        self._clock, self._sleep, self._ask = clock, sleep, ask
        self._run_id = secrets.token_hex(3)
        self._numbers = itertools.count(1)
        self._kube_proxy: cluster.DaemonSet | None = None
        self._lbproxy: cluster.DaemonSet | None = None
        self._outcomes: dict[str, str] = {}

    def run(self) -> int:
        """Do what the arguments say; returns the exit status. Raises LbproxyError."""
        nodes = {node.metadata.name: node for node in self._api.nodes()}
        self._kube_proxy = self._api.daemon_set(*self._args.kube_proxy)
        self._lbproxy = self._api.daemon_set(*self._args.lbproxy)
        if self._to is None:
            self._show(nodes)
            return 0
        if unknown := [name for name in self._args.node if name not in nodes]:
            raise errors.ConfigError([f"--node {name}: there is no such node" for name in unknown])
        chosen = (
            self._with_kube_proxy(nodes) if self._args.all_nodes else list(dict.fromkeys(self._args.node))
        )
        patch = self._prepare({name: nodes[name].labels for name in chosen})
        if self._args.dry_run:
            self._foresee([nodes[name] for name in chosen], patch)
            return 0
        try:
            self._patch(patch)
            self._go(chosen)
        finally:
            if self._outcomes:
                self._show({name: node for name, node in nodes.items() if name in chosen})
        return 0

    # --- the DaemonSets ---

    def _with_kube_proxy(self, nodes: Mapping[str, cluster.Node]) -> list[str]:
        """All nodes but those that kube-proxy's DaemonSet is not for, such as Windows' or serverless ones."""
        if self._kube_proxy is None:
            return list(nodes)
        chosen = [name for name, node in nodes.items() if _runs(self._kube_proxy, node.labels)[0]]
        if not chosen:
            # What stands in the way is said of each.
            return list(nodes)
        if others := [name for name in nodes if name not in chosen]:
            _tell(
                f"DaemonSet {'/'.join(self._args.kube_proxy)} does not run on {', '.join(others)}: left alone"
            )
        return chosen

    def _prepare(self, labels: Mapping[str, Mapping[str, str]]) -> list[migration_plan.Term]:
        """Check that both heed the label; kube-proxy's terms where they are to be changed, else nothing."""
        theirs, ours = self._kube_proxy, self._lbproxy
        if theirs is None:
            raise errors.AgentError(self._no_kube_proxy())
        if ours is None:
            raise errors.AgentError(
                f"there is no DaemonSet {'/'.join(self._args.lbproxy)}: kubectl apply -k {_OVERLAY} (its "
                "pods wait for the label), or name it with --lbproxy"
            )
        patch: list[migration_plan.Term] = []
        for name, given in labels.items():
            none, both, alone = _runs(ours, given)
            if none or not (both and alone):
                why = "runs on nodes without the label" if none else f"would not run on {name}"
                raise errors.AgentError(
                    f"DaemonSet {'/'.join(self._args.lbproxy)} {why}: its nodeAffinity has to ask for "
                    f"{migration.LABEL} In {migration_plan.LBPROXY}, {migration_plan.BOTH}; {_OVERLAY} does"
                )
            none, both, alone = _runs(theirs, given)
            if not (none and both):
                raise errors.AgentError(
                    f"DaemonSet {'/'.join(self._args.kube_proxy)} does not run on {name}, whatever its "
                    "label: look at its nodeSelector and nodeAffinity"
                )
            if alone:
                patch = migration_plan.staying_away(theirs.pod_spec)
        return patch

    def _no_kube_proxy(self) -> str:
        namespace, name = self._args.kube_proxy
        by_hand = "go node by node, on the nodes: docs/migration.md"
        if any(pod.metadata.name.startswith("kube-proxy") for pod in self._api.pods(namespace)):
            return (
                f"kube-proxy's pods in {namespace} are of no DaemonSet {name}: name it with --kube-proxy. If "
                "there is none (GKE: static pods, which the kubelet starts from a file on each node), "
                f"{by_hand}"
            )
        return (
            f"there is no DaemonSet {namespace}/{name}: name it with --kube-proxy. k3s, RKE2 and others run "
            f"kube-proxy inside a process of theirs (k3s: --disable-kube-proxy): there, {by_hand}"
        )

    def _patch(self, required: list[migration_plan.Term]) -> None:
        if not required:
            return
        assert self._kube_proxy is not None
        namespace, name = self._args.kube_proxy
        _tell(f"DaemonSet {namespace}/{name} has to keep away from nodes that are lbproxy's:")
        _tell(self._difference(required))
        _tell("its pods are replaced once, one after another, as at any change of it")
        if not self._args.yes:
            try:
                answer = self._ask("change it? [y/N] ")
            except EOFError:
                answer = ""
            if answer.strip().lower() not in ("y", "yes"):
                raise errors.AgentError("nothing was changed; --yes says yes beforehand")
        self._api.patch_daemon_set(namespace, self._kube_proxy, migration_plan.affinity_patch(required))
        self._until(self._rolled_out, "the change of kube-proxy's DaemonSet is rolled out")

    def _rolled_out(self) -> bool:
        self._kube_proxy = self._api.daemon_set(*self._args.kube_proxy)
        return self._kube_proxy is not None and self._kube_proxy.rolled_out

    def _difference(self, required: list[migration_plan.Term]) -> str:
        assert self._kube_proxy is not None
        before = migration_plan.terms(self._kube_proxy.pod_spec)
        was, is_to_be = (
            render.to_yaml({"nodeSelectorTerms": terms}).splitlines() for terms in (before or [], required)
        )
        return "\n".join(f"  {line}" for line in difflib.ndiff(was, is_to_be) if not line.startswith("?"))

    def _until(self, check: Callable[[], bool], what: str) -> None:
        deadline, pause_s = self._clock() + self._args.timeout, _FIRST_PAUSE_S
        while not self._patiently(check):
            if self._clock() > deadline:
                raise errors.AgentError(f"not within {self._args.timeout:g} s: {what}")
            self._sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, 1.5 * pause_s)

    def _patiently(self, check: Callable[[], bool]) -> bool:
        try:
            return check()
        except cluster.ApiError as error:
            if not error.passes:
                raise
            return False

    # --- the nodes ---

    def _go(self, names: Sequence[str]) -> None:
        ahead = iter([_Way(name, number, len(names)) for number, name in enumerate(names, 1)])
        under_way = list(itertools.islice(ahead, self._args.at_once))
        pause_s = _FIRST_PAUSE_S
        try:
            while under_way:
                moved = False
                for way in tuple(under_way):
                    if self._step(way):
                        moved = True
                    if way.over:
                        under_way.remove(way)
                        under_way += itertools.islice(ahead, 1)
                pause_s = _FIRST_PAUSE_S if moved else min(_LONGEST_PAUSE_S, 1.5 * pause_s)
                if under_way and not moved:
                    self._sleep(pause_s)
        finally:
            for way in under_way:
                # Nobody is left to look at what comes of it.
                with contextlib.suppress(cluster.ApiError):
                    self._withdraw(way)

    def _step(self, way: "_Way") -> bool:
        """Look at a node and make its next move; whether it made one. Raises Stopped and ApiError."""
        try:
            view = self._view(way)
            assert self._to is not None
            move = migration_plan.next_move(view, self._to, leave_flows=self._args.leave_flows)
            return self._make(way, move)
        except cluster.ApiError as error:
            if not error.passes:
                raise
            self._wait(way, str(error))
            return False

    def _view(self, way: "_Way") -> migration_plan.View:
        node = self._api.node(way.name)
        if node.order and node.order != way.order:
            # Somebody's, or an earlier run's: it is not to be obeyed behind our back.
            self._api.tell(way.name, "")
        report = None
        if way.order:
            answers = self._api.answers().get(way.name, [])
            report = next((one.report for one in reversed(answers) if one.report.order == way.order), None)
        pods = [self._pod_on(way.name, *each) for each in self._sets()]
        return migration_plan.View(
            way.name, node.labels.get(migration.LABEL, ""), way.order, pods[0], pods[1], report
        )

    def _sets(self) -> Iterator[tuple[str, cluster.DaemonSet | None]]:
        yield self._args.kube_proxy[0], self._kube_proxy
        yield self._args.lbproxy[0], self._lbproxy

    def _pod_on(self, node: str, namespace: str, of: cluster.DaemonSet | None) -> migration_plan.Pod | None:
        pod = cluster.owned_by(of, self._api.pods(namespace, node)).get(node)
        return migration_plan.Pod(pod.metadata.name, pod.ready) if pod else None

    def _make(self, way: "_Way", move: migration_plan.Move) -> bool:
        match move:
            case migration_plan.SetLabel(value, why):
                self._withdraw(way)
                way.say(f"label {migration.LABEL}={value or '(none)'}: {why}")
                self._api.label(way.name, value)
            case migration_plan.Give(step, why):
                way.say(f"the agent is {why}")
                self._give(way, step)
            case migration_plan.Wait(what, for_answer):
                self._wait(way, what)
                if for_answer and self._clock() > way.asked_s + _ANSWER_S and way.order:
                    self._give(way, migration.step(way.order))
                return False
            case migration_plan.Done(note, _):
                way.say(note)
                self._outcomes[way.name] = note
                self._withdraw(way)
                way.over = True
        way.since_s = None
        return True

    def _give(self, way: "_Way", step: migration.Step) -> None:
        way.order = f"{step}/{self._run_id}-{next(self._numbers)}"
        way.asked_s = self._clock()
        self._api.tell(way.name, way.order)

    def _withdraw(self, way: "_Way") -> None:
        if way.order:
            self._api.tell(way.name, "")
            way.order = ""

    def _wait(self, way: "_Way", what: str) -> None:
        now_s = self._clock()
        if way.since_s is None:
            way.since_s = now_s
        if what != way.waits_for:
            way.waits_for = what
            way.say(f"waiting until {what}")
        if now_s - way.since_s > self._args.timeout:
            late = f"not within {self._args.timeout:g} s: {what}"
            self._outcomes[way.name] = f"stopped: {late}"
            back = next(one for one in migration_plan.Target if one is not self._to)
            raise Stopped(
                f"{way.name}: {late}. Nothing is broken: whoever began a connection still serves it. Look at "
                f"the pods of this node, their logs and `kubectl describe node {way.name}`; run again, it "
                f"goes on here; or back: lbproxy migrate cluster --to {back} --node {way.name}"
            )

    # --- what is shown ---

    def _foresee(self, nodes: Sequence[cluster.Node], patch: list[migration_plan.Term]) -> None:
        if patch:
            output.write(f"would change DaemonSet {'/'.join(self._args.kube_proxy)}:")
            output.write(self._difference(patch))
        goal = (migration_plan.LBPROXY,) if self._to is migration_plan.Target.LBPROXY else ("",)
        for number, node in enumerate(nodes, 1):
            label = node.labels.get(migration.LABEL, "")
            then = "is there, and would be looked at" if label in goal else f"would go to {self._to}"
            output.write(
                f"[{number}/{len(nodes)}] {node.metadata.name}: {migration.LABEL}={label or '(none)'}: {then}"
            )

    def _show(self, nodes: Mapping[str, cluster.Node]) -> None:
        try:
            found = self._statuses({node.metadata.name: node for node in self._api.nodes()}, set(nodes))
        except cluster.ApiError as error:
            _tell(f"lbproxy: {error}")
            return
        render.show(found, self._args.output, lambda: _present(found))

    def _statuses(self, nodes: Mapping[str, cluster.Node], chosen: set[str]) -> list[NodeStatus]:
        answers = self._api.answers()
        theirs, ours = (cluster.owned_by(of, self._api.pods(namespace)) for namespace, of in self._sets())
        found = []
        for name, node in nodes.items():
            if name in chosen:
                last = answers[name][-1] if name in answers else None
                found.append(
                    NodeStatus(
                        name,
                        node.labels.get(migration.LABEL, ""),
                        _state(theirs.get(name)),
                        _state(ours.get(name)),
                        self._outcomes.get(name, ""),
                        last.report if last else None,
                        last.at if last else "",
                    )
                )
        return found


class _Way:
    """How far a node is: what its agent was told by this run, and what is waited for."""

    def __init__(self, name: str, number: int, of: int) -> None:
        self.name = name
        self.order = ""
        self.asked_s = 0.0
        self.waits_for = ""
        self.since_s: float | None = None
        self.over = False
        self._place = f"[{number}/{of}] {name}"

    def say(self, what: str) -> None:
        """Say what happens to it."""
        _tell(f"{self._place}: {what}")


def _tell(line: str) -> None:
    """Print it at once, beside what is the command's result."""
    print(line, file=sys.stderr, flush=True)


def _runs(of: cluster.DaemonSet, labels: Mapping[str, str]) -> tuple[bool, bool, bool]:
    """Whether its pods run on a node with such labels without ours, with "both", and with "lbproxy"."""
    others = {name: text for name, text in labels.items() if name != migration.LABEL}
    none, both, alone = (
        migration_plan.admits(of.pod_spec, {**others, migration.LABEL: value} if value else others)
        for value in ("", migration_plan.BOTH, migration_plan.LBPROXY)
    )
    return none, both, alone


def _state(pod: cluster.Pod | None) -> str:
    if pod is None:
        return ""
    return "ready" if pod.ready else "not ready"


def _present(found: Sequence[NodeStatus]) -> Iterator[render.Table | str]:
    rows: list[render.Row] = []
    for one in found:
        said = one.outcome
        if not said and one.report:
            said = f"{migration.described(one.report)} ({one.reported_at})"
        rows.append((one.node, one.label or "-", one.kube_proxy or "-", one.lbproxy or "-", said or "-"))
    yield render.Table(("NODE", "LABEL", "KUBE-PROXY", "LBPROXY", "LAST WORD"), rows, prose=True)
