"""How a whole cluster's way from kube-proxy to lbproxy is told to the nodes, and how they answer.

Two names on a Node and one kind of Event are all of it:

- the label LABEL says who is to run there. Both DaemonSets look at it, and nobody else does;
- the annotation ANNOTATION is an order to the node's agent: a step of `lbproxy migrate`, and after
  a slash whatever tells this order from an earlier one (`take-over/5f0c`). It stands until it is
  carried out, or until it is taken away;
- an Event about the Node, whose reason is REASON, is the agent's answer. Its note is for people;
  the same, for programs, is its annotation REPORT, a `Report` in JSON.

An agent needs no right for this that it has not got anyway.
"""

import enum
import typing

import msgspec

LABEL: typing.Final = "lbproxy.io/proxy"
ANNOTATION: typing.Final = "lbproxy.io/migrate"
REPORT: typing.Final = "lbproxy.io/migration-report"
REASON: typing.Final = "LbproxyMigration"
ORDER_CHARACTERS: typing.Final = 80
_QUOTED_CHARACTERS: typing.Final = 40  # of what is no order


class Step(enum.StrEnum):
    """What an agent may be told; the words are those of `lbproxy migrate` on the node, and RESUME."""

    STATUS = "status"
    TAKE_OVER = "take-over"
    RETURN = "return"
    RESUME = "resume"  # ends RETURN: new flows are lbproxy's again, and nothing is removed


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an agent made of an order, and how its node is; flows are counted by protocol."""

    order: str  # as it stands in the annotation
    problem: str = ""  # why it is not carried out; empty: it is
    obeys: bool = False  # it does more than answer `status` (takeOver: when-told)
    serving: bool = False  # all is in the kernel and served, and new flows are known from old ones
    unserved: tuple[str, ...] = ()  # why not, where it is not only a matter of time
    returning: bool = False  # new flows are kube-proxy's
    removed: tuple[str, ...] = ()
    kube_proxy_rules: tuple[str, ...] = ()  # what of them is in force
    unable: tuple[str, ...] = ()  # which of them stay, for want of a tool
    kept: tuple[str, ...] = ()  # what others use of them, or have beside them, and stays for that
    flows_of_kube_proxy: dict[str, int] = {}
    flows_of_lbproxy: dict[str, int] = {}


def step(order: str) -> Step:
    """The step that an annotation asks for. Raises ValueError for one that makes no sense."""
    name, _, _ = order.partition("/")
    if name not in tuple(Step) or len(order) > ORDER_CHARACTERS:
        raise ValueError(f"none of {', '.join(Step)}, nor one of them and /ID")
    return Step(name)


def quoted(order: str) -> str:
    """An order that makes no sense, for people: somebody may have put anything there."""
    more = "…" if len(order) > _QUOTED_CHARACTERS else ""
    return f"{order[:_QUOTED_CHARACTERS]!r}{more}"


def described(report: Report) -> str:
    """A line for people."""
    said = [f"{report.order}: {report.problem or 'done'}"]
    said += [f"removed: {', '.join(report.removed)}"] if report.removed else []
    said += report.unable
    said += [f"left alone: {'; '.join(report.kept)}"] if report.kept else []
    unserved = "; ".join(report.unserved)
    if unserved:
        said += [f"lbproxy does not serve all: {unserved}"] if unserved not in report.problem else []
    elif not report.serving:
        said.append("lbproxy does not serve yet")
    if report.returning:
        said.append(f"new flows are kube-proxy's, going on with lbproxy: {counted(report.flows_of_lbproxy)}")
    elif report.serving:
        said.append(f"lbproxy serves, going on with kube-proxy: {counted(report.flows_of_kube_proxy)}")
    if not (report.obeys or report.problem):
        said.append("this agent only answers (takeOver: never)")
    return "; ".join(said)


def counted(flows: typing.Mapping[str, int]) -> str:
    """Flows by protocol, for people."""
    return ", ".join(f"{count} {name}" for name, count in flows.items()) or "none"
