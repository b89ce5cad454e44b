"""What is done with a node on its way: whatever happens in between, somebody serves it all the time."""

import dataclasses
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.core import migration
from lbproxy.core import migration_plan as plan

READY, STARTING = plan.Pod("pod", True), plan.Pod("pod", False)
SERVES = {"serving": True}
Target = plan.Target


def view(
    label: str = "", order: str = "", kube_proxy: plan.Pod | None = READY, **more: typing.Any
) -> plan.View:
    report = migration.Report(order, **more.pop("report")) if "report" in more else None
    return plan.View("n1", label, order, kube_proxy, more.pop("lbproxy", None), report)


@pytest.mark.parametrize(
    ("found", "kind", "said"),
    [
        (view(), plan.SetLabel, "both"),
        (view("elsewhere"), plan.SetLabel, "both"),
        (view("both"), plan.Wait, "there is a pod of lbproxy"),
        (view("both", lbproxy=STARTING), plan.Wait, "ready"),
        (view("both", lbproxy=READY), plan.Give, "status"),
        (view("both", "take-over/1", lbproxy=READY, report=SERVES), plan.Give, "status"),
        (view("both", "status/1", lbproxy=READY), plan.Wait, "answers"),
        (view("both", "status/1", lbproxy=READY, report={"serving": False}), plan.Wait, "does not serve"),
        (view("both", "status/1", lbproxy=READY, report={"problem": "EPERM"}), plan.Wait, "EPERM"),
        (view("both", "status/1", lbproxy=READY, report=SERVES), plan.SetLabel, "lbproxy"),
        (view("lbproxy", lbproxy=READY), plan.Wait, "leaves"),
        (view("lbproxy", lbproxy=None, kube_proxy=None), plan.Wait, "there is a pod"),
        (view("lbproxy", kube_proxy=None, lbproxy=READY), plan.Give, "take-over"),
        (view("lbproxy", "take-over/2", None, lbproxy=READY, report={"problem": "no"}), plan.Wait, "no"),
        (
            view("lbproxy", "take-over/2", None, lbproxy=READY, report={"kube_proxy_rules": ("x",)}),
            plan.Wait,
            "stay away: x",
        ),
        (
            view("lbproxy", "take-over/2", None, lbproxy=READY, report={**SERVES, "unable": ("legacy",)}),
            plan.Done,
            "until the node boots",
        ),
        (view("lbproxy", "take-over/2", None, lbproxy=READY, report=SERVES), plan.Done, "lbproxy serves"),
    ],
)  # fmt: skip
def test_the_way_there(found: plan.View, kind: type, said: str) -> None:
    move = plan.next_move(found, Target.LBPROXY, leave_flows=False)
    assert isinstance(move, kind)
    assert said in str(tuple(move))


BACK = {"serving": True, "returning": True}
FLOWS = {**BACK, "flows_of_lbproxy": {"TCP": 2}}


@pytest.mark.parametrize(
    ("found", "leave", "kind", "said"),
    [
        (view("lbproxy", kube_proxy=None, lbproxy=READY), False, plan.SetLabel, "both"),
        (view("both", kube_proxy=None, lbproxy=READY), False, plan.Wait, "there is a pod of kube-proxy"),
        (view("both", kube_proxy=STARTING, lbproxy=READY), False, plan.Wait, "ready"),
        (view("both", lbproxy=READY), False, plan.Give, "return"),
        (view("both", "return/1", lbproxy=READY), False, plan.Wait, "answers by an Event"),
        (view("both", "return/1", lbproxy=READY, report={"problem": "no"}), False, plan.Wait, "no"),
        (view("both", "return/1", lbproxy=READY, report=FLOWS), False, plan.Done, "2 TCP"),
        (view("both", "return/1", lbproxy=READY, report=FLOWS), True, plan.SetLabel, "2 TCP"),
        (view("both", "return/1", lbproxy=READY, report=BACK), False, plan.SetLabel, "none"),
        (view("", lbproxy=READY), False, plan.Wait, "leaves"),
        (view(""), False, plan.Done, "kube-proxy serves"),
        (view("", kube_proxy=STARTING), False, plan.Wait, "ready"),
    ],
)  # fmt: skip
def test_the_way_back(found: plan.View, leave: bool, kind: type, said: str) -> None:
    move = plan.next_move(found, Target.KUBE_PROXY, leave_flows=leave)
    assert isinstance(move, kind)
    assert said in str(tuple(move))


def test_an_answer_to_another_order_is_none() -> None:
    found = view("both", "status/2", lbproxy=READY)._replace(
        report=migration.Report("status/1", serving=True)
    )
    assert isinstance(plan.next_move(found, Target.LBPROXY, leave_flows=False), plan.Wait)


@dataclasses.dataclass
class World:
    """A node, its two pods and its agent, all of which take their time."""

    label: str = ""
    order: str = ""
    kube_proxy: plan.Pod | None = READY
    lbproxy: plan.Pod | None = None
    rules: bool = True
    serving: bool = False  # lbproxy's programs, which stay when its pod leaves
    returned: bool = False
    report: migration.Report | None = None
    orders: int = 0

    def check(self) -> None:
        """New flows are somebody's, and whoever looks after them is there or about to be."""
        assert (self.serving and not self.returned) or self.rules
        # Rules that nobody keeps up to date serve what was, so not for longer than lbproxy is there.
        assert self.kube_proxy or self.lbproxy

    def happens(self, what: str) -> None:
        heeds = {"": (True, False), "both": (True, True), "lbproxy": (False, True)}[self.label]
        match what:
            case "kube-proxy's pod":
                if not heeds[0]:
                    self.kube_proxy = None
                elif self.kube_proxy is None:
                    self.kube_proxy = STARTING
                else:
                    self.kube_proxy = READY
            case "kube-proxy's rules":
                self.rules = self.rules or self.kube_proxy is not None
            case "lbproxy's pod":
                if not heeds[1]:
                    self.lbproxy = None
                elif self.lbproxy is None:
                    self.lbproxy = STARTING
                elif self.serving:
                    self.lbproxy = READY
            case "lbproxy serves":
                self.serving = self.serving or self.lbproxy is not None
            case "the agent answers" if self.lbproxy and self.serving and self.order:
                self.report = self._carry_out(migration.step(self.order))

    def _carry_out(self, step: migration.Step) -> migration.Report:
        problem = ""
        if step is migration.Step.TAKE_OVER:
            self.rules = self.returned = False
        elif step is migration.Step.RETURN:
            self.returned = self.returned or self.rules
            problem = "" if self.rules else "no rules"
        rules = ("rules",) if self.rules else ()
        return migration.Report(
            self.order, problem, serving=True, returning=self.returned, kube_proxy_rules=rules
        )

    def move(self, target: plan.Target) -> plan.Move:
        report = self.report if self.report and self.report.order == self.order else None
        seen = plan.View("n1", self.label, self.order, self.kube_proxy, self.lbproxy, report)
        move = plan.next_move(seen, target, leave_flows=False)
        if isinstance(move, plan.SetLabel):
            self.label, self.order = move.value, ""
        elif isinstance(move, plan.Give):
            self.orders += 1
            self.order = f"{move.step}/{self.orders}"
        elif isinstance(move, plan.Done):
            self.order = ""
        return move


HAPPENINGS = (
    "kube-proxy's pod", "kube-proxy's rules", "lbproxy's pod", "lbproxy serves", "the agent answers",
)  # fmt: skip


@given(
    st.lists(
        st.one_of(st.sampled_from(HAPPENINGS), st.sampled_from(Target), st.just("interrupted")), max_size=60
    ),
    st.sampled_from(Target),
)
def test_somebody_serves_whatever_happens_in_whatever_order(
    happened: list[str | plan.Target], last: plan.Target
) -> None:
    world = World()
    for what in happened:
        if what == "interrupted":
            world.order = ""
        elif isinstance(what, Target):
            world.move(what)
        else:
            world.happens(what)
        world.check()
    for _ in range(20):
        if isinstance(world.move(last), plan.Done):
            break
        for what in HAPPENINGS:
            world.happens(what)
            world.check()
    else:
        raise AssertionError(f"it never gets there: {world}")
    assert world.label == ("lbproxy" if last is Target.LBPROXY else "")
    assert world.rules == (last is Target.KUBE_PROXY)


# --- where DaemonSets run ---


def required(*terms: plan.Term) -> dict[str, typing.Any]:
    return {
        "affinity": {
            "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
        }
    }


def expression(key: str, operator: str, *values: str) -> plan.Term:
    return {"key": key, "operator": operator, "values": list(values)}


@pytest.mark.parametrize(
    ("spec", "labels", "runs"),
    [
        ({}, {}, True),
        ({"nodeSelector": {"os": "linux"}}, {"os": "linux"}, True),
        ({"nodeSelector": {"os": "linux"}}, {}, False),
        (required(), {}, False),
        (required({}), {"a": "1"}, False),
        (required({"matchExpressions": [expression("a", "In", "1", "2")]}), {"a": "2"}, True),
        (required({"matchExpressions": [expression("a", "In", "1")]}), {}, False),
        (required({"matchExpressions": [expression("a", "NotIn", "1")]}), {}, True),
        (required({"matchExpressions": [expression("a", "NotIn", "1")]}), {"a": "1"}, False),
        (required({"matchExpressions": [expression("a", "Exists")]}), {"a": ""}, True),
        (required({"matchExpressions": [expression("a", "DoesNotExist")]}), {"a": ""}, False),
        (required({"matchExpressions": [expression("a", "Gt", "9")]}), {"a": "10"}, True),
        (required({"matchExpressions": [expression("a", "Lt", "9")]}), {"a": "10"}, False),
        (required({"matchExpressions": [expression("a", "Gt", "9")]}), {"a": "x"}, False),
        (
            required({"matchExpressions": [expression("a", "Exists"), expression("b", "Exists")]}),
            {"a": ""},
            False,
        ),
        (
            required(
                {"matchExpressions": [expression("a", "Exists")]},
                {"matchExpressions": [expression("b", "Exists")]},
            ),
            {"b": ""},
            True,
        ),
    ],
)
def test_where_pods_run(spec: dict[str, typing.Any], labels: dict[str, str], runs: bool) -> None:
    assert plan.admits(spec, labels) is runs


EXPRESSIONS = st.builds(
    lambda key, operator, values: expression(key, operator, *values),
    st.sampled_from(("a", "b", migration.LABEL)),
    st.sampled_from(("In", "NotIn", "Exists", "DoesNotExist")),
    st.lists(st.sampled_from(("1", "lbproxy", "both")), min_size=1, max_size=2),
)
TERMS = st.lists(st.builds(lambda found: {"matchExpressions": found}, st.lists(EXPRESSIONS)), max_size=3)
LABELS = st.dictionaries(
    st.sampled_from(("a", "b", migration.LABEL)), st.sampled_from(("1", "lbproxy", "both"))
)


@given(st.none() | TERMS, LABELS)
def test_kube_proxy_keeps_away_from_lbproxys_nodes_and_changes_nothing_else(
    terms: list[plan.Term] | None, labels: dict[str, str]
) -> None:
    before = {} if terms is None else required(*terms)
    after = plan.affinity_patch(plan.staying_away(before))["spec"]["template"]["spec"]
    mine = labels.get(migration.LABEL) == plan.LBPROXY
    assert plan.admits(after, labels) is (plan.admits(before, labels) and not mine)


def test_terms_about_names_stay_what_they_are() -> None:
    by_name = {"matchFields": [expression("metadata.name", "In", "n1")]}
    assert plan.staying_away(required(by_name)) == [{**by_name, "matchExpressions": [plan.STAYS_AWAY]}]
