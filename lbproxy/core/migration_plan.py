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

Term = dict[str, typing.Any]
"""A NodeSelectorTerm, as it is in JSON."""

STAYS_AWAY: typing.Final[Term] = {"key": migration.LABEL, "operator": "NotIn", "values": [LBPROXY]}
"""What kube-proxy's DaemonSet has to ask of nodes."""


class Target(enum.StrEnum):
    """Who is to serve."""

    LBPROXY = "lbproxy"
    KUBE_PROXY = "kube-proxy"


class Pod(typing.NamedTuple):
    """A DaemonSet's pod on a node."""

    name: str
    ready: bool


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


class Done(typing.NamedTuple):
    """Nothing is left to do with this node; `flows_left`: but to come again when they have ended."""

    note: str
    flows_left: bool = False


Move = SetLabel | Give | Wait | Done


def next_move(node: View, target: Target, *, leave_flows: bool) -> Move:
    """Say what to do with a node; `leave_flows`: lbproxy's pod need not stay for flows that go on."""
    if target is Target.LBPROXY:
        return _there(node)
    return _back(node, leave_flows=leave_flows)


def _there(node: View) -> Move:
    if node.label not in (BOTH, LBPROXY):
        return SetLabel(BOTH, "lbproxy starts beside kube-proxy")
    if (waiting := _not_ready(node.lbproxy, "lbproxy")) is not None:
        return waiting
    if node.label == BOTH:
        report = _answer(node, migration.Step.STATUS, "asked whether it serves")
        if not isinstance(report, migration.Report):
            return report
        if report.problem or not report.serving:
            return Wait(f"lbproxy's agent serves: {migration.described(report)}", for_answer=True)
        return SetLabel(LBPROXY, "lbproxy serves; kube-proxy leaves, its rules stay for the moment")
    if node.kube_proxy is not None:
        return Wait(f"kube-proxy's pod {node.kube_proxy.name} leaves")
    report = _answer(node, migration.Step.TAKE_OVER, "told to remove kube-proxy's rules")
    if not isinstance(report, migration.Report):
        return report
    if report.problem:
        return Wait(f"kube-proxy's rules are removed: {report.problem}")
    note = f"lbproxy serves; going on with kube-proxy: {migration.counted(report.flows_of_kube_proxy)}"
    if report.unable:
        note += f"; these stay until the node boots, or somebody removes them: {', '.join(report.unable)}"
    elif report.kube_proxy_rules:
        return Wait(f"kube-proxy's rules stay away: {', '.join(report.kube_proxy_rules)}", for_answer=True)
    return Done(note)


def _back(node: View, *, leave_flows: bool) -> Move:
    if node.label == LBPROXY:
        return SetLabel(BOTH, "kube-proxy starts beside lbproxy")
    if (waiting := _not_ready(node.kube_proxy, "kube-proxy")) is not None:
        return waiting
    if node.label != BOTH:
        if node.lbproxy is not None:
            return Wait(f"lbproxy's pod {node.lbproxy.name} leaves")
        return Done("kube-proxy serves")
    if (waiting := _not_ready(node.lbproxy, "lbproxy")) is not None:
        return waiting
    report = _answer(node, migration.Step.RETURN, "told to leave new flows to kube-proxy")
    if not isinstance(report, migration.Report):
        return report
    if report.problem:
        return Wait(f"new flows are left to kube-proxy: {report.problem}")
    going_on = migration.counted(report.flows_of_lbproxy)
    if report.flows_of_lbproxy and not leave_flows:
        return Done(f"kube-proxy serves new flows; going on with lbproxy: {going_on}", flows_left=True)
    return SetLabel("", f"lbproxy's pod leaves; what goes on in the kernel: {going_on}")


def _not_ready(pod: Pod | None, whose: str) -> Wait | None:
    if pod is None:
        return Wait(f"there is a pod of {whose}")
    return None if pod.ready else Wait(f"{whose}'s pod {pod.name} is ready")


def _answer(node: View, step: migration.Step, why: str) -> migration.Report | Give | Wait:
    if node.order.partition("/")[0] != step:
        return Give(step, why)
    if node.report is None or node.report.order != node.order:
        return Wait(f"lbproxy's agent, {why}, answers by an Event", for_answer=True)
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
