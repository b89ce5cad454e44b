"""`lbproxy migrate cluster`: from kube-proxy to lbproxy, or back, node by node, from anywhere.

It decides nothing by itself (core/migration_plan.py does) and does nothing on a node: it labels, has
the two DaemonSets' controllers start and end pods, tells the agents what to do and reads their answers
(`nodes`). Here is what is before that and after: the rights, the question, what is shown.
"""

import argparse
import signal
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from lbproxy import errors, interrupts
from lbproxy.commands import render
from lbproxy.core import migration, migration_plan
from lbproxy.kube import cluster, cluster_objects
from lbproxy.migrate import daemon_sets
from lbproxy.migrate import nodes as migrate_nodes
from lbproxy.migrate.daemon_sets import tell

MORE_TO_DO: typing.Final = 4  # nothing failed, but this is not the end of it
_LEFT: typing.Final = (
    migration_plan.Outcome.FLOWS_LEFT, migration_plan.Outcome.RULES_STAY, migration_plan.Outcome.CLEANUP_LEFT
)  # fmt: skip


class NodeStatus(msgspec.Struct, frozen=True):
    """A node, as the cluster shows it; `report` is what its agent said last, at `reported_at`."""

    node: str
    label: str
    kube_proxy: str  # its pod: ready, not ready, or empty for none
    lbproxy: str
    state: str  # what this command came to there, a migration_plan.Outcome; empty where it did nothing
    outcome: str  # the same in words
    not_ready: dict[str, str]  # why not, of kube-proxy's pod and lbproxy's, where their status says so
    report: migration.Report | None
    reported_at: str


class Foreseen(msgspec.Struct, frozen=True):
    """What would become of a node."""

    node: str
    label: str
    would: str


class Foresight(msgspec.Struct, frozen=True):
    """What --dry-run says; `node_selector_terms` are kube-proxy's to be, null where they stay."""

    daemon_set: str
    node_selector_terms: list[migration_plan.Term] | None
    nodes: list[Foreseen]


def main(args: argparse.Namespace) -> int:
    """Show the cluster, or take its nodes there or back; returns the exit status. Raises LbproxyError."""
    signals = interrupts.Interrupts()
    run = Migration(args, cluster.connect(args.kubeconfig, args.context), signals=signals)
    with signals.caught():
        try:
            return run.run()
        except KeyboardInterrupt:
            pass
        except errors.LbproxyError as error:
            if not signals.number:
                raise
            tell(f"lbproxy: error: {error}")
        with signals.held():
            number = signals.number or signal.SIGINT
            tell(f"lbproxy: interrupted by {signal.Signals(number).name}: {run.standing()}")
            return 128 + number


class Migration:
    """One run of the command."""

    def __init__(
        self,
        args: argparse.Namespace,
        api: cluster.Cluster,
        *,
        waiting: daemon_sets.Waiting | None = None,
        signals: interrupts.Interrupts | None = None,
        ask: Callable[[str], str] = daemon_sets.ask,
    ) -> None:
        self._args = args
        self._api = api
        self._to = migration_plan.Target(args.to) if args.to else None
        self._signals = signals or interrupts.Interrupts()
        self._waiting, self._ask = waiting or daemon_sets.Waiting(sleep=self._signals.sleep), ask
        self._sets = daemon_sets.Sets(args, api)
        self._walk: migrate_nodes.Walk | None = None

    def run(self) -> int:
        """Do what the arguments say; returns the exit status. Raises LbproxyError."""
        if self._to is not None:
            self._check_rights(rights(self._args))
        nodes = {node.metadata.name: node for node in self._api.nodes()}
        self._sets.read()
        if self._to is None:
            self._tell_what_is_odd(nodes)
            self._show(list(nodes))
            return 0
        chosen = self._chosen(nodes)
        patch = self._sets.change({name: nodes[name].labels for name in chosen})
        if patch:
            self._check_rights([patching(self._args)])
        if self._args.dry_run:
            self._foresee([nodes[name] for name in chosen], patch)
            return 0
        if patch:
            self._sets.apply(patch, self._waiting, self._ask)
        walk = migrate_nodes.Walk(self._args, self._api, self._sets, self._waiting, self._signals)
        self._walk = walk
        try:
            walk.go(chosen)
        except (errors.LbproxyError, OSError):
            if walk.results:
                self._show(chosen)
            raise
        return _exit_status(self._show(chosen))

    def standing(self) -> str:
        """Where an interrupted run leaves the cluster, in a line."""
        touched = self._walk.standing() if self._walk else []
        if touched:
            # Where one stands, that was said.
            orders = "" if self._walk and self._walk.orders_stand else " Its orders are taken back."
            return f"{'; '.join(touched)}.{orders} The same command goes on there"
        patched = "kube-proxy's DaemonSet keeps away from the label now, and " if self._sets.patched else ""
        return f"{patched}no node was touched"

    def _tell_what_is_odd(self, nodes: Mapping[str, cluster_objects.Node]) -> None:
        for problem in (*self._sets.absent(), self._sets.returned(nodes)):
            if problem:
                tell(f"lbproxy: {problem}")
        for name, node in nodes.items():
            if node.order:
                tell(
                    f"lbproxy: {name}: the order {node.order} stands, of a run that goes on, or was killed: "
                    "the next run takes it back"
                )

    def _chosen(self, nodes: Mapping[str, cluster_objects.Node]) -> list[str]:
        given = {"--node": self._args.node, "--except": self._args.excepted}
        if unknown := [(flag, name) for flag, names in given.items() for name in names if name not in nodes]:
            raise errors.ConfigError([f"{flag} {name}: there is no such node" for flag, name in unknown])
        if self._args.node:
            return list(dict.fromkeys(self._args.node))
        rest = {name: node for name, node in nodes.items() if name not in self._args.excepted}
        chosen = self._sets.with_kube_proxy(rest)
        if lost := [name for name in chosen if nodes[name].lost]:
            tell(
                f"not Ready: {', '.join(lost)}; it will stop there. "
                f"{' '.join(f'--except {name}' for name in lost)} leaves them as they are"
            )
        return chosen

    def _check_rights(self, needed: Sequence[cluster.Right]) -> None:
        try:
            missing = [right for right in needed if not self._api.may(right)]
        except cluster.ApiError as error:
            if error.status not in (403, 404, 405):
                raise
            tell(f"lbproxy: whether all rights are there can not be asked: {error}")
            return
        if missing:
            raise errors.AgentError(
                f"{self._api.host}: nothing was changed, for want of the right to "
                f"{', to '.join(map(str, missing))}; docs/migration.md has the rights that are needed"
            )

    # --- what is shown ---

    def _foresee(self, nodes: Sequence[cluster_objects.Node], patch: list[migration_plan.Term]) -> None:
        goal = migration_plan.LBPROXY if self._to is migration_plan.Target.LBPROXY else ""
        found = []
        for node in nodes:
            label = node.labels.get(migration.LABEL, "")
            would = "is there, and would be looked at" if label == goal else f"would go to {self._to}"
            found.append(Foreseen(node.metadata.name, label, would))
        said = Foresight("/".join(self._args.kube_proxy), patch or None, found)

        def present() -> Iterator[render.Table | str]:
            if patch:
                yield f"would change DaemonSet {said.daemon_set}:"
                yield self._sets.difference(patch)
            for number, one in enumerate(found, 1):
                where = f"[{number}/{len(found)}] {one.node}"
                yield f"{where}: {migration.LABEL}={one.label or '(none)'}: {one.would}"

        render.show(said, self._args.output, present)

    def _show(self, chosen: Sequence[str]) -> list[str]:
        """Show these nodes as they are now; returns the states of those that were gone to."""
        try:
            found = self._statuses(chosen)
        except cluster.ApiError as error:
            tell(f"lbproxy: what came of it can not be looked at: {error}")
            return [one.outcome for one in self._walk.results.values()] if self._walk else []
        render.show(found, self._args.output, lambda: _present(found))
        return [one.state for one in found]

    def _statuses(self, chosen: Sequence[str]) -> list[NodeStatus]:
        nodes = {node.metadata.name: node for node in self._api.nodes()}
        answers = self._api.answers()
        theirs, ours = self._sets.pods()
        results = self._walk.results if self._walk else {}
        found = []
        for name in chosen:
            result = results.get(name)
            if name not in nodes and result is None:
                continue
            label = nodes[name].labels.get(migration.LABEL, "") if name in nodes else ""
            state, said = (result.outcome.value, result.note) if result else ("", "")
            if result and name in nodes and label != result.label:
                state = migration_plan.Outcome.CONTRADICTED.value
                said += f"; but its label is {label or '(none)'} now: somebody else has changed it"
                tell(f"{name}: {migration.LABEL} is {label or '(none)'}, which is not of this run")
            last = answers[name][-1] if name in answers else None
            found.append(
                NodeStatus(
                    name,
                    label,
                    _state(theirs.get(name)),
                    _state(ours.get(name)),
                    state,
                    said,
                    _obstacles(kube_proxy=theirs.get(name), lbproxy=ours.get(name)),
                    last.report if last else None,
                    last.at if last else "",
                )
            )
        return found


def rights(args: argparse.Namespace) -> list[cluster.Right]:
    """What whoever runs it has to be allowed, whichever way."""
    return [
        *(cluster.Right("", "nodes", verb) for verb in ("list", "get", "patch")),
        *(cluster.Right("apps", "daemonsets", "get", *each) for each in (args.kube_proxy, args.lbproxy)),
        *(
            cluster.Right("", "pods", "list", namespace)
            for namespace in dict.fromkeys((args.kube_proxy[0], args.lbproxy[0]))
        ),
        cluster.Right("events.k8s.io", "events", "list", cluster.EVENTS_OF_NODES),
    ]


def patching(args: argparse.Namespace) -> cluster.Right:
    """What is needed besides, as long as kube-proxy's DaemonSet does not heed the label."""
    return cluster.Right("apps", "daemonsets", "patch", *args.kube_proxy)


def _exit_status(states: Sequence[str]) -> int:
    if migration_plan.Outcome.CONTRADICTED in states:
        return 1
    return MORE_TO_DO if any(state in _LEFT for state in states) else 0


def _state(pod: cluster_objects.Pod | None) -> str:
    if pod is None:
        return ""
    return "ready" if pod.ready else "not ready"


def _obstacles(**pods: cluster_objects.Pod | None) -> dict[str, str]:
    return {
        name.replace("_", "-"): pod.obstacle
        for name, pod in pods.items()
        if pod is not None and not pod.ready and pod.obstacle
    }


def _present(found: Sequence[NodeStatus]) -> Iterator[render.Table | str]:
    rows: list[render.Row] = []
    for one in found:
        said = one.outcome
        if not said and one.report:
            said = f"{migration.described(one.report)} ({one.reported_at})"
        if not one.outcome:
            said = "; ".join((*(f"{of}: {why}" for of, why in one.not_ready.items()), *filter(None, [said])))
        rows.append((one.node, one.label or "-", one.kube_proxy or "-", one.lbproxy or "-", said or "-"))
    yield render.Table(("NODE", "LABEL", "KUBE-PROXY", "LBPROXY", "LAST WORD"), rows, prose=True)
