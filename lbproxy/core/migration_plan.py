"""What is to be done next with a node on the way from kube-proxy to lbproxy, or back.

Nothing is remembered but in the cluster: what a node's label, its annotation, its pods and its
agent's last answer say is enough to know the next move. So whoever is interrupted begins again, and
goes on where it was.
"""

import enum
import typing
from collections.abc import Iterable, Mapping, Sequence

from lbproxy.core import migration

LBPROXY: typing.Final = "lbproxy"  # what the label says
BOTH: typing.Final = "both"
CLEANUP: typing.Final = "deploy/kustomize/cleanup"
_NEVER: typing.Final = (
    "this agent is told `takeOver: never`, the default, and obeys no order: `takeOver: when-told` "
    "(--take-over=when-told) in lbproxy's configuration, and a restart of its pods, change that"
)

Term = dict[str, typing.Any]
"""A NodeSelectorTerm, as it is in JSON."""

STAYS_AWAY: typing.Final[Term] = {"key": migration.LABEL, "operator": "NotIn", "values": [LBPROXY]}
"""What kube-proxy's DaemonSet has to ask of nodes."""


class Target(enum.StrEnum):
    """Who is to serve."""

    LBPROXY = "lbproxy"
    KUBE_PROXY = "kube-proxy"


class Pod(typing.NamedTuple):
    """A DaemonSet's pod on a node; `obstacle` is why it is not ready, where that is known."""

    name: str
    ready: bool
    obstacle: str = ""


class View(typing.NamedTuple):
    """A node, as it is to be seen at the API server; `report` is the answer to the order that stands."""

    name: str
    label: str
    order: str
    kube_proxy: Pod | None
    lbproxy: Pod | None
    report: migration.Report | None


class SetLabel(typing.NamedTuple):
    """Label the node; "" takes the label away."""

    value: str
    why: str


class Give(typing.NamedTuple):
    """Give the node's agent an order."""

    step: migration.Step
    why: str


class Wait(typing.NamedTuple):
    """Look again in a while; `for_answer`: give the order once more where none comes."""

    what: str
    for_answer: bool = False
    whose: Target | None = None  # whose pod, or agent, does not get on
    hint: str = ""  # what may keep it from coming about


class Refuse(typing.NamedTuple):
    """Waiting does not help: somebody has to change something first."""

    why: str


class Outcome(enum.StrEnum):
    """What a run of the command came to at a node."""

    FINISHED = "finished"
    FLOWS_LEFT = "flows-left"  # it stays as it is while flows go on: to come again
    RULES_STAY = "rules-stay"  # kube-proxy's, for want of a tool, until the node boots
    CLEANUP_LEFT = "cleanup-left"  # of lbproxy's programs, which nobody has told to leave new flows alone
    GONE = "gone"  # the node, meanwhile
    STOPPED = "stopped"
    CONTRADICTED = "contradicted"  # somebody else has given the node another label


class Done(typing.NamedTuple):
    """Nothing is left to do with this node now."""

    note: str
    outcome: Outcome = Outcome.FINISHED


Move = SetLabel | Give | Wait | Refuse | Done


def next_move(node: View, target: Target, *, leave_flows: bool = False, without_agent: bool = False) -> Move:
    """Say what to do with a node.

    `leave_flows`: lbproxy's pod need not stay for flows that go on. `without_agent`: nor is its agent asked,
    on the way back.
    """
    if target is Target.LBPROXY:
        return _there(node)
    return _back(node, leave_flows=leave_flows, without_agent=without_agent)


def way_out(node: View, target: Target, whose: Target | None) -> str:
    """The arguments that lead away from where a node does not get on; "" where it has to be mended first."""
    if node.label == "":
        return ""
    if whose is Target.LBPROXY:
        # Neither way goes without its agent, but for this.
        return f"--to {Target.KUBE_PROXY} --node {node.name} --without-agent"
    if target is Target.LBPROXY:
        return f"--to {Target.KUBE_PROXY} --node {node.name}"
    return f"--to {Target.LBPROXY} --node {node.name}" if node.lbproxy and node.lbproxy.ready else ""


def standing(node: View) -> str:
    """How a node is, for whoever leaves it there; as far as it was seen."""
    shown = f"{migration.LABEL}={node.label or '(none)'}"
    if node.label == LBPROXY:
        pod = "gone" if node.kube_proxy is None else "there"
        return f"{shown}: lbproxy serves, kube-proxy's pod is {pod}, its rules may be there"
    if node.label == BOTH:
        if node.report is not None and node.report.returning:
            return f"{shown}: kube-proxy serves new flows, lbproxy those that it has begun"
        return f"{shown}: both may run, and whoever began a connection serves it"
    return f"{shown}: kube-proxy serves"


def _there(node: View) -> Move:
    if node.label not in (BOTH, LBPROXY):
        return SetLabel(BOTH, "lbproxy starts beside kube-proxy")
    if (waiting := _not_ready(node.lbproxy, Target.LBPROXY)) is not None:
        return waiting
    if node.label == BOTH:
        return _until_it_can_do_alone(node)
    if node.kube_proxy is not None:
        return Wait(f"kube-proxy's pod {node.kube_proxy.name} leaves", whose=Target.KUBE_PROXY)
    if _given(node) is migration.Step.RESUME and not _resumed(node):
        return _resume(node)
    report = _answer(node, migration.Step.TAKE_OVER, "told to remove kube-proxy's rules")
    if not isinstance(report, migration.Report):
        return report
    if not report.obeys:
        return Refuse(f"kube-proxy's rules stay: {_NEVER}")
    if report.problem and report.returning:
        # Whatever keeps the rules there, nobody is left who would change them.
        return _resume(node)
    if report.problem:
        return Wait(f"kube-proxy's rules are removed: {report.problem}")
    note = f"lbproxy serves; going on with kube-proxy: {migration.counted(report.flows_of_kube_proxy)}"
    if report.kept:
        note += f"; left alone: {'; '.join(report.kept)}"
    if report.unable:
        return Done(f"{note}; {', '.join(report.unable)}", Outcome.RULES_STAY)
    if report.kube_proxy_rules:
        return Wait(f"kube-proxy's rules stay away: {', '.join(report.kube_proxy_rules)}", for_answer=True)
    return Done(note)


def _until_it_can_do_alone(node: View) -> Move:
    """With both there: kube-proxy is not to leave before new flows are lbproxy's."""
    resuming = _given(node) is migration.Step.RESUME
    report = (
        _resumption(node) if resuming else _answer(node, migration.Step.STATUS, "asked whether it serves")
    )
    if not isinstance(report, migration.Report):
        return report
    if not report.obeys:
        return Refuse(f"kube-proxy stays: {_NEVER}")
    if report.problem or not report.serving:
        return Wait(
            f"lbproxy's agent serves: {migration.described(report)}", for_answer=True, whose=Target.LBPROXY
        )
    if report.returning:
        # Rules that kube-proxy leaves behind would serve new flows with backends as they were.
        return _resume(node)
    return SetLabel(LBPROXY, "lbproxy serves; kube-proxy leaves, its rules stay for the moment")


def _resume(node: View) -> Move:
    report = _resumption(node)
    if not isinstance(report, migration.Report):
        return report
    return Wait(
        f"new flows are lbproxy's again: {report.problem or 'it goes on leaving them to kube-proxy'}",
        for_answer=True,
        whose=Target.LBPROXY,
    )


def _resumption(node: View) -> migration.Report | Give | Wait:
    return _answer(node, migration.Step.RESUME, "told that new flows are lbproxy's again")


def _resumed(node: View) -> bool:
    answer = _resumption(node)
    return isinstance(answer, migration.Report) and not (answer.problem or answer.returning)


def _back(node: View, *, leave_flows: bool, without_agent: bool) -> Move:
    if node.label == LBPROXY:
        return SetLabel(BOTH, "kube-proxy starts beside lbproxy")
    if (waiting := _not_ready(node.kube_proxy, Target.KUBE_PROXY)) is not None:
        return waiting
    if node.label != BOTH:
        if node.lbproxy is not None:
            return Wait(f"lbproxy's pod {node.lbproxy.name} leaves")
        if without_agent:
            return Done(
                "kube-proxy runs; what lbproxy has in the kernel comes before its rules, with backends "
                f"as they were, until {CLEANUP} has been here, which breaks what goes on through it",
                Outcome.CLEANUP_LEFT,
            )
        # Nobody is there to be asked whether that is so.
        return Done(f"kube-proxy serves; what lbproxy may have left in the kernel goes with {CLEANUP}")
    if without_agent:
        return SetLabel(
            "", "lbproxy's pod leaves, and its agent is not asked to leave new flows to kube-proxy"
        )
    if (waiting := _not_ready(node.lbproxy, Target.LBPROXY)) is not None:
        return waiting
    report = _answer(node, migration.Step.RETURN, "told to leave new flows to kube-proxy")
    if not isinstance(report, migration.Report):
        return report
    if not report.obeys:
        return Refuse(f"new flows stay lbproxy's: {_NEVER}")
    if report.problem:
        return Wait(f"new flows are left to kube-proxy: {report.problem}")
    going_on = migration.counted(report.flows_of_lbproxy)
    if report.flows_of_lbproxy and not leave_flows:
        return Done(f"kube-proxy serves new flows; going on with lbproxy: {going_on}", Outcome.FLOWS_LEFT)
    return SetLabel("", f"lbproxy's pod leaves; what goes on in the kernel: {going_on}")


def _not_ready(pod: Pod | None, whose: Target) -> Wait | None:
    if pod is None:
        return Wait(f"there is a pod of {whose}", whose=whose)
    why = f" ({pod.obstacle})" if pod.obstacle else ""
    return None if pod.ready else Wait(f"{whose}'s pod {pod.name} is ready{why}", whose=whose)


def _given(node: View) -> migration.Step | None:
    name = node.order.partition("/")[0]
    return migration.Step(name) if name in tuple(migration.Step) else None


def _answer(node: View, step: migration.Step, why: str) -> migration.Report | Give | Wait:
    if _given(node) is not step:
        return Give(step, why)
    if node.report is None or node.report.order != node.order:
        return Wait(
            f"lbproxy's agent, {why}, answers by an Event",
            for_answer=True,
            whose=Target.LBPROXY,
            hint="An agent with `events: false` (--events=false) writes none",
        )
    return node.report


# --- where DaemonSets run ---


def admits(pod_spec: Mapping[str, typing.Any], labels: Mapping[str, str]) -> bool:
    """Whether a node's labels let pods of such a spec run there. Taints are not looked at."""
    selector = pod_spec.get("nodeSelector") or {}
    if any(labels.get(key) != value for key, value in selector.items()):
        return False
    found = terms(pod_spec)
    return found is None or any(_term_admits(term, labels) for term in found)


def terms(pod_spec: Mapping[str, typing.Any]) -> list[Term] | None:
    """What is required of nodes, any of them; None: nothing is."""
    affinity = (pod_spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    return None if required is None else list(required.get("nodeSelectorTerms") or ())


def staying_away(pod_spec: Mapping[str, typing.Any]) -> list[Term]:
    """The terms that besides what they ask already keep kube-proxy from nodes that are lbproxy's."""
    found = terms(pod_spec)
    if found is None:
        return [{"matchExpressions": [STAYS_AWAY]}]
    # A term that asks for nothing admits nothing, and is to go on so.
    return [
        {**term, "matchExpressions": [*(term.get("matchExpressions") or ()), STAYS_AWAY]}
        for term in found
        if term.get("matchExpressions") or term.get("matchFields")
    ]


def affinity_patch(required: Sequence[Term]) -> dict[str, typing.Any]:
    """The patch of a DaemonSet that makes these its terms. Any kind of patch replaces them as a whole."""
    affinity = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": list(required)}}
    return {"spec": {"template": {"spec": {"affinity": {"nodeAffinity": affinity}}}}}


def _term_admits(term: Term, labels: Mapping[str, str]) -> bool:
    expressions: Iterable[Term] = term.get("matchExpressions") or ()
    if not expressions and not term.get("matchFields"):
        return False
    return all(_holds(one, labels) for one in expressions)


def _holds(expression: Term, labels: Mapping[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values") or ()
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt" | "Lt" as operator:
            if value is None or not _is_number(value) or not values or not _is_number(values[0]):
                return False
            return int(value) > int(values[0]) if operator == "Gt" else int(value) < int(values[0])
        case _:
            return False


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()
