"""The two DaemonSets of `lbproxy migrate cluster`: whether they heed the label, and kube-proxy's made to."""

import argparse
import difflib
import sys
import time
import typing
from collections.abc import Callable, Mapping

from lbproxy import errors
from lbproxy.commands import render
from lbproxy.core import migration, migration_plan
from lbproxy.kube import cluster, cluster_objects

FIRST_PAUSE_S: typing.Final = 0.2
LONGEST_PAUSE_S: typing.Final = 3.0
_OVERLAY: typing.Final = "deploy/kustomize/overlays/migrate"
_CONFLICTS: typing.Final = 5  # with whoever writes its status


class Waiting(typing.NamedTuple):
    """How time passes, and who is asked; others in tests."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def tell(line: str) -> None:
    """Print it at once, beside what is the command's result."""
    # In one piece: a signal between a line and its end would put the last word behind it.
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def ask(question: str) -> str:
    """Ask where it is told: standard output is for the result."""
    print(question, end="", file=sys.stderr, flush=True)
    try:
        return input()
    except (EOFError, KeyboardInterrupt):
        tell("")  # what comes next is a line of its own
        raise


class Sets:
    """kube-proxy's DaemonSet and lbproxy's, as they were when they were last read; None: there is none."""

    def __init__(self, args: argparse.Namespace, api: cluster.Cluster) -> None:
        self._args = args
        self._api = api
        self.kube_proxy: cluster_objects.DaemonSet | None = None
        self.lbproxy: cluster_objects.DaemonSet | None = None
        self.patched = False  # kube-proxy's, by this run

    def read(self) -> None:
        """Look at both. Raises ApiError."""
        self.kube_proxy = self._api.daemon_set(*self._args.kube_proxy)
        self.lbproxy = self._api.daemon_set(*self._args.lbproxy)

    def pods(self, node: str = "") -> tuple[dict[str, cluster_objects.Pod], dict[str, cluster_objects.Pod]]:
        """kube-proxy's pods and lbproxy's, by node, of one node or all. Raises ApiError."""
        (space, name), (our_space, our_name) = self._args.kube_proxy, self._args.lbproxy
        theirs = cluster.owned_by(name, self.kube_proxy, self._api.pods(space, node))
        return theirs, cluster.owned_by(our_name, self.lbproxy, self._api.pods(our_space, node))

    def unscheduled(self, whose: migration_plan.Target, node: str) -> str:
        """Why a pod that is for a node is on none yet; empty where there is no such pod."""
        of, (space, name) = self.kube_proxy, self._args.kube_proxy
        if whose is migration_plan.Target.LBPROXY:
            of, (space, name) = self.lbproxy, self._args.lbproxy
        try:
            # Asked for only where it stops: among all pods, since of a node there is none.
            waiting = [pod for pod in self._api.pods(space) if pod.is_for(node)]
        except cluster.ApiError:
            return ""
        found = cluster.owned_by(name, of, waiting).values()
        return next((f"Its pod {pod.metadata.name} is {pod.obstacle}" for pod in found if pod.obstacle), "")

    def returned(self, nodes: Mapping[str, cluster_objects.Node]) -> str:
        """That kube-proxy's pods may run again on nodes that are lbproxy's; empty where they may not."""
        alone = (
            node for node in nodes.values() if node.labels.get(migration.LABEL) == migration_plan.LBPROXY
        )
        found = [node.metadata.name for node in alone if not self.stays_away(node.labels)]
        if not found:
            return ""
        return (
            f"DaemonSet {'/'.join(self._args.kube_proxy)} does not keep away from {', '.join(found)}, which "
            "lbproxy serves: whoever manages it has written it anew. lbproxy migrate cluster --to lbproxy "
            f"{' '.join(f'--node {name}' for name in found)} puts that right, and takes its rules away"
        )

    def absent(self) -> list[str]:
        """Which of them is not there, and what to do about it."""
        found = [self._no_kube_proxy()] if self.kube_proxy is None else []
        if self.lbproxy is None:
            found.append(
                f"there is no DaemonSet {'/'.join(self._args.lbproxy)}: kubectl apply -k {_OVERLAY} (its "
                "pods wait for the label), or name it with --lbproxy"
            )
        return found

    def with_kube_proxy(self, nodes: Mapping[str, cluster_objects.Node]) -> list[str]:
        """All nodes but those that kube-proxy's DaemonSet is not for, such as Windows' or serverless ones."""
        if self.kube_proxy is None:
            return list(nodes)
        chosen = [name for name, node in nodes.items() if _runs(self.kube_proxy, node.labels)[0]]
        if not chosen:
            # What stands in the way is said of each.
            return list(nodes)
        if others := [name for name in nodes if name not in chosen]:
            tell(
                f"DaemonSet {'/'.join(self._args.kube_proxy)} does not run on {', '.join(others)}: left alone"
            )
        return chosen

    def change(self, labels: Mapping[str, Mapping[str, str]]) -> list[migration_plan.Term]:
        """Check that both heed the label; kube-proxy's terms where they are to be changed, else nothing."""
        for problem in self.absent():
            raise errors.AgentError(problem)
        theirs, ours = self.kube_proxy, self.lbproxy
        assert theirs is not None
        assert ours is not None
        terms: list[migration_plan.Term] = []
        for name, given in labels.items():
            none, both, alone = _runs(ours, given)
            if none or not (both and alone):
                why = "runs on nodes without the label" if none else f"would not run on {name}"
                raise errors.AgentError(
                    f"DaemonSet {'/'.join(self._args.lbproxy)} {why}: its nodeAffinity has to ask for "
                    f"{migration.LABEL} In {migration_plan.LBPROXY}, {migration_plan.BOTH}; {_OVERLAY} does. "
                    "Where it runs already (a trial), those nodes get the label `both` before that: "
                    "docs/migration.md"
                )
            none, both, alone = _runs(theirs, given)
            if not (none and both):
                raise errors.AgentError(
                    f"DaemonSet {'/'.join(self._args.kube_proxy)} does not run on {name}, whatever its "
                    "label: look at its nodeSelector and nodeAffinity"
                )
            if alone:
                terms = migration_plan.staying_away(theirs.pod_spec)
        return terms

    def stays_away(self, labels: Mapping[str, str]) -> bool:
        """Whether kube-proxy's keeps away from such a node once it is lbproxy's."""
        return self.kube_proxy is None or not _runs(self.kube_proxy, labels)[2]

    def difference(self, required: list[migration_plan.Term]) -> str:
        """What a change of kube-proxy's terms comes to, line by line."""
        assert self.kube_proxy is not None
        before = migration_plan.terms(self.kube_proxy.pod_spec)
        was, is_to_be = (
            render.to_yaml({"nodeSelectorTerms": terms}).splitlines() for terms in (before or [], required)
        )
        return "\n".join(f"  {line}" for line in difflib.ndiff(was, is_to_be) if not line.startswith("?"))

    def apply(
        self, required: list[migration_plan.Term], waiting: Waiting, answer: Callable[[str], str]
    ) -> None:
        """Ask, change kube-proxy's, and wait until that is everywhere. Raises LbproxyError."""
        assert self.kube_proxy is not None
        namespace, name = self._args.kube_proxy
        tell(f"DaemonSet {namespace}/{name} has to keep away from nodes that are lbproxy's:")
        tell(self.difference(required))
        tell("its pods are replaced once, one after another, as at any change of it")
        shown = _version(self.kube_proxy)
        if not self._args.yes:
            try:
                said = answer("change it? [y/N] ")
            except EOFError:
                said = ""
            if said.strip().lower() not in ("y", "yes"):
                raise errors.AgentError("nothing was changed; --yes says yes beforehand")
        self._patch(shown, migration_plan.affinity_patch(required))
        self._roll_out(waiting)

    def _patch(self, shown: object, patch: Mapping[str, typing.Any]) -> None:
        """Change what was shown; its status alone may have been written since, again and again."""
        namespace, name = self._args.kube_proxy
        for attempt in range(_CONFLICTS):
            found = self._api.daemon_set(namespace, name)
            if found is None or _version(found) != shown:
                raise errors.AgentError(
                    f"somebody has changed DaemonSet {namespace}/{name} meanwhile: nothing was changed; run "
                    "again"
                )
            try:
                self.patched = True
                self._api.patch_daemon_set(namespace, found, patch)
                return
            except cluster.ApiError as error:
                if error.status != 409 or attempt == _CONFLICTS - 1:
                    raise

    def _roll_out(self, waiting: Waiting) -> None:
        timeout_s = self._args.timeout
        seen: object = None
        deadline, pause_s = waiting.clock() + timeout_s, FIRST_PAUSE_S
        while True:
            try:
                self.read()
                if self.kube_proxy is not None and self.kube_proxy.rolled_out:
                    return
                now = self.kube_proxy and self.kube_proxy.progress
                if now != seen:
                    seen, deadline = now, waiting.clock() + timeout_s
            except cluster.ApiError as error:
                if not error.passes:
                    raise
            if waiting.clock() > deadline:
                raise errors.AgentError(
                    f"no progress for {timeout_s:g} s: the change of kube-proxy's DaemonSet is rolled out. "
                    "No node was touched; look at its pods, and run again"
                )
            waiting.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, 1.5 * pause_s)

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


def _version(of: cluster_objects.DaemonSet) -> tuple[str, int]:
    """What changes when somebody changes what it asks for, and not with its status."""
    return of.metadata.uid, of.metadata.generation


def _runs(of: cluster_objects.DaemonSet, labels: Mapping[str, str]) -> tuple[bool, bool, bool]:
    """Whether its pods run on a node with such labels without ours, with "both", and with "lbproxy"."""
    others = {name: text for name, text in labels.items() if name != migration.LABEL}
    none, both, alone = (
        migration_plan.admits(of.pod_spec, {**others, migration.LABEL: value} if value else others)
        for value in ("", migration_plan.BOTH, migration_plan.LBPROXY)
    )
    return none, both, alone
