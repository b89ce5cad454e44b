"""What is done with a node on its way: whatever happens in between, somebody serves it all the time."""

import dataclasses
import typing
import unittest.mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.core import migration
from lbproxy.core import migration_plan as plan

READY, STARTING = plan.Pod("pod", True), plan.Pod("pod", False)
SERVES = {"serving": True, "obeys": True}
RETURNING = {**SERVES, "returning": True}
REFUSED = {**RETURNING, "problem": "another process has port 10256"}
PROBLEM = {**SERVES, "problem": "no"}
WRITTEN_AGAIN = {**SERVES, "kube_proxy_rules": ("x",)}
NEVER = {"serving": True, "obeys": False}
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
        (view("both", "status/1", lbproxy=READY, report={"obeys": True}), plan.Wait, "does not serve"),
        (view("both", "status/1", lbproxy=READY, report={**SERVES, "problem": "EPERM"}), plan.Wait, "EPERM"),
        (view("both", "status/1", lbproxy=READY, report=SERVES), plan.SetLabel, "lbproxy"),
        (view("both", "status/1", lbproxy=READY, report=RETURNING), plan.Give, "resume"),
        (view("both", "resume/2", lbproxy=READY), plan.Wait, "answers"),
        (view("both", "resume/2", lbproxy=READY, report=RETURNING), plan.Wait, "goes on leaving"),
        (view("both", "resume/2", lbproxy=READY, report=PROBLEM), plan.Wait, "no"),
        (view("both", "resume/2", lbproxy=READY, report=SERVES), plan.SetLabel, "lbproxy"),
        (view("both", "status/1", lbproxy=READY, report=NEVER), plan.Refuse, "when-told"),
        (view("lbproxy", lbproxy=READY), plan.Wait, "leaves"),
        (view("lbproxy", lbproxy=None, kube_proxy=None), plan.Wait, "there is a pod"),
        (view("lbproxy", kube_proxy=None, lbproxy=READY), plan.Give, "take-over"),
        (view("lbproxy", "take-over/2", None, lbproxy=READY, report=PROBLEM), plan.Wait, "no"),
        (view("lbproxy", "take-over/2", None, lbproxy=READY, report=REFUSED), plan.Give, "resume"),
        (view("lbproxy", "resume/3", None, lbproxy=READY), plan.Wait, "answers"),
        (view("lbproxy", "resume/3", None, lbproxy=READY, report=RETURNING), plan.Wait, "goes on leaving"),
        (view("lbproxy", "resume/3", None, lbproxy=READY, report=SERVES), plan.Give, "take-over"),
        (view("lbproxy", "take-over/2", None, lbproxy=READY, report=NEVER), plan.Refuse, "when-told"),
        (
            view("lbproxy", "take-over/2", None, lbproxy=READY, report=WRITTEN_AGAIN),
            plan.Wait,
            "stay away: x",
        ),
        (
            view("lbproxy", "take-over/2", None, lbproxy=READY, report={**SERVES, "unable": ("legacy",)}),
            plan.Done,
                "rules-stay",
            ),
            (
                view("lbproxy", "take-over/2", None, lbproxy=READY, report={**SERVES, "kept": ("theirs",)}),
                plan.Done,
                "none; left alone: theirs', <Outcome.FINISHED",
            ),
        (view("lbproxy", "take-over/2", None, lbproxy=READY, report=SERVES), plan.Done, "lbproxy serves"),
    ],
)  # fmt: skip
def test_the_way_there(found: plan.View, kind: type, said: str) -> None:
    move = plan.next_move(found, Target.LBPROXY)
    assert isinstance(move, kind)
    assert said in str(tuple(move))


FLOWS = {**RETURNING, "flows_of_lbproxy": {"TCP": 2}}


@pytest.mark.parametrize(
    ("found", "leave", "kind", "said"),
    [
        (view("lbproxy", kube_proxy=None, lbproxy=READY), False, plan.SetLabel, "both"),
        (view("both", kube_proxy=None, lbproxy=READY), False, plan.Wait, "there is a pod of kube-proxy"),
        (view("both", kube_proxy=STARTING, lbproxy=READY), False, plan.Wait, "ready"),
        (view("both", lbproxy=READY), False, plan.Give, "return"),
        (view("both", "return/1", lbproxy=READY), False, plan.Wait, "answers by an Event"),
        (view("both", "return/1", lbproxy=READY, report=PROBLEM), False, plan.Wait, "no"),
        (view("both", "return/1", lbproxy=READY, report=FLOWS), False, plan.Done, "2 TCP"),
        (view("both", "return/1", lbproxy=READY, report=FLOWS), True, plan.SetLabel, "2 TCP"),
        (view("both", "return/1", lbproxy=READY, report=RETURNING), False, plan.SetLabel, "none"),
        (view("both", "return/1", lbproxy=READY, report=NEVER), False, plan.Refuse, "when-told"),
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
    assert isinstance(plan.next_move(found, Target.LBPROXY), plan.Wait)


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize("lbproxy", [None, STARTING, READY])
def test_where_the_agent_does_not_get_on_the_way_out_needs_none(
    target: plan.Target, lbproxy: plan.Pod | None
) -> None:
    # Ready, but silent: its answer is waited for.
    node = view("both", f"{'status' if target is Target.LBPROXY else 'return'}/1", lbproxy=lbproxy)
    stuck = plan.next_move(node, target)
    assert isinstance(stuck, plan.Wait)
    assert plan.way_out(node, target, stuck.whose) == "--to kube-proxy --node n1 --without-agent"
    assert plan.next_move(node, Target.KUBE_PROXY, without_agent=True) == plan.SetLabel("", unittest.mock.ANY)


def test_without_its_agent_a_node_goes_back_only_to_a_kube_proxy_that_is_ready() -> None:
    world = World(label="lbproxy", kube_proxy=None, lbproxy=STARTING, serving=True)
    moves: list[plan.Move] = []
    while not moves or not isinstance(moves[-1], plan.Done):
        moves.append(world.move(Target.KUBE_PROXY, without_agent=True))
        if world.label == "":
            assert world.kube_proxy == READY
        for what in ("kube-proxy's pod", "kube-proxy's rules", "lbproxy's pod"):
            world.happens(what)
            if what == "lbproxy's pod" and world.lbproxy:
                world.lbproxy = STARTING
        assert len(moves) < 20
    assert moves[-1].outcome is plan.Outcome.CLEANUP_LEFT
    assert plan.CLEANUP in moves[-1].note
    assert not any(isinstance(move, plan.Give) for move in moves)


@pytest.mark.parametrize(
    ("target", "node", "leads"),
    [
        (Target.LBPROXY, view("lbproxy", lbproxy=READY), "--to kube-proxy --node n1"),
        (Target.KUBE_PROXY, view("both", kube_proxy=None, lbproxy=READY), "--to lbproxy --node n1"),
        # Neither is ready: no command makes one so.
        (Target.KUBE_PROXY, view("both", kube_proxy=None, lbproxy=STARTING), ""),
        (Target.KUBE_PROXY, view("", lbproxy=READY), ""),
    ],
)
def test_the_way_out_is_the_other_way_where_its_agent_serves(
    target: plan.Target, node: plan.View, leads: str
) -> None:
    stuck = plan.next_move(node, target)
    assert isinstance(stuck, plan.Wait)
    assert plan.way_out(node, target, stuck.whose) == leads


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
    flows: bool = True  # of lbproxy, that go on
    refuses: bool = False  # take-over: a kube-proxy is to be seen from the agent
    report: migration.Report | None = None
    orders: int = 0

    def check(self) -> None:
        """New flows are somebody's whose backends are of now, not of when its process ended."""
        if self.serving and not self.returned:
            # Its programs come before any rules, also those that no agent keeps up to date.
            assert self.lbproxy
        else:
            assert self.rules
            assert self.kube_proxy

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
            case "the agent sees a kube-proxy":
                self.refuses = True
            case "it sees none":
                self.refuses = self.kube_proxy is not None
            case "the agent answers" if self.lbproxy and self.serving and self.order:
                self.report = self._carry_out(migration.step(self.order))

    def round(self, target: plan.Target) -> plan.Move:
        """The next move, and what comes of it."""
        move = self.move(target)
        self.check()
        for what in HAPPENINGS:
            self.happens(what)
            self.check()
        return move

    def _carry_out(self, step: migration.Step) -> migration.Report:
        problem = ""
        if step is migration.Step.TAKE_OVER and self.refuses:
            problem = "kube-proxy runs here"
        elif step is migration.Step.TAKE_OVER:
            self.rules = self.returned = False
        elif step is migration.Step.RESUME:
            self.returned = False
        elif step is migration.Step.RETURN:
            self.returned = self.returned or self.rules
            problem = "" if self.rules else "no rules"
        rules = ("rules",) if self.rules else ()
        return migration.Report(
            self.order,
            problem,
            obeys=True,
            serving=True,
            returning=self.returned,
            kube_proxy_rules=rules,
            flows_of_lbproxy={"TCP": 1} if self.flows else {},
        )

    def move(self, target: plan.Target, *, without_agent: bool = False) -> plan.Move:
        report = self.report if self.report and self.report.order == self.order else None
        seen = plan.View("n1", self.label, self.order, self.kube_proxy, self.lbproxy, report)
        move = plan.next_move(seen, target, without_agent=without_agent)
        if isinstance(move, plan.SetLabel):
            self.label, self.order = move.value, ""
        elif isinstance(move, plan.Give):
            self.orders += 1
            self.order = f"{move.step}/{self.orders}"
        elif isinstance(move, plan.Done):
            self.order = ""
        return move


HAPPENINGS = (
    "kube-proxy's pod", "kube-proxy's rules", "lbproxy's pod", "lbproxy serves", "it sees none",
    "the agent answers",
)  # fmt: skip


@given(
    st.lists(
        st.one_of(
            st.sampled_from((*HAPPENINGS, "the agent sees a kube-proxy", "interrupted", *Target)),
            # A run, as it mostly goes, until something ends it.
            st.tuples(st.sampled_from(Target), st.integers(2, 12)),
        ),
        max_size=30,
    ),
    st.sampled_from(Target),
)
def test_somebody_serves_whatever_happens_in_whatever_order(
    happened: list[str | plan.Target | tuple[plan.Target, int]], last: plan.Target
) -> None:
    world = World()
    for what in happened:
        match what:
            case "interrupted":
                world.order = ""
            case Target():
                world.move(what)
            case (target, rounds):
                for _ in range(rounds):
                    world.round(target)
                world.order = ""
            case _:
                world.happens(what)
        world.check()
    for _ in range(30):
        move = world.round(last)
        if isinstance(move, plan.Done) and move.outcome is plan.Outcome.FINISHED:
            break
        world.flows = False
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
