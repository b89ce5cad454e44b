"""What is made of a run in which something failed, never came, or was not measured."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import answers, figures, page, plot, ratios, remarks, report, results, rows, sections, stats
from benchmarks.figure import LBPROXY, Figure, Group
from tests.unit import benchmark_run

NOTHING = results.Run(0.0, 0.0, 0.0, 0.0, 0.0, 0, 500, {"ETIMEDOUT": 500})


@pytest.fixture
def found() -> results.Results:
    return benchmark_run.made()


def pick(found: results.Results, group: Group, what: str, services: int, column: str = LBPROXY) -> Figure:
    listed = [*figures.figures(found), *figures.absolutes(found), *figures.failures(found)]
    [one] = [
        each
        for each in listed
        if (each.group, each.what, each.services, each.column) == (group, what, services, column)
        and (group is not Group.RATES or each.topic.endswith(figures.PATHS["pod"]))
    ]
    return one


def replaced(found: results.Results, variant: str, run: results.Run, rounds: int = 99) -> None:
    """Have another run of a variant in so many rounds of the first traffic."""
    for each in found.traffic[0].rounds[:rounds]:
        each.runs[variant] = run


def everything(found: results.Results) -> str:
    """Make all that is made of a run, and return its text."""
    return "\n".join([report.summary_section(found), report.page(found), page.render(found)])


# --- changes that were never seen ---


def changed(latency_ms: list[float], lost: int) -> results.Programming:
    return results.Programming(LBPROXY, 10_000, 0, latency_ms, lost, failed=0)


def test_a_change_never_seen_is_among_the_slowest_and_the_others_keep_their_time(
    found: results.Results,
) -> None:
    found.programming = [changed([1.0] * 29, lost=1)]
    p50, p99 = (pick(found, Group.PROGRAMMING, f"quiet, {share}", 10_000) for share in ("p50", "p99"))
    assert (p50.value, p50.verdict) == (1.0, "not met: 1 never seen")
    assert (p99.value, p99.text) == (math.inf, "never")
    assert not p50.met
    # The last of a thousand is beyond 99 of 100.
    found.programming = [changed([1.0] * 999, lost=1)]
    assert pick(found, Group.PROGRAMMING, "quiet, p99", 10_000).value == 1.0


@pytest.mark.parametrize(("times", "lost"), [([], 3), ([2.0], 3), ([2.0, 3.0], 1)])
def test_changes_never_seen_stand_on_every_page(
    times: list[float], lost: int, found: results.Results
) -> None:
    found.programming = [changed(times, lost)]
    for text in (report.summary_section(found), report.page(found), page.render(found)):
        assert "never" in text
        assert f"{lost} never seen" in text
    [answer] = [one for one in answers.answers(found) if Group.PROGRAMMING in one.groups]
    assert "99 of 100 never (" in answer.sentences[0]


def test_where_no_change_was_made_there_is_no_figure(found: results.Results) -> None:
    found.programming = [changed([], lost=0)]
    found.stand_in = [results.StandIn(10_000, [])]
    assert not [one for one in figures.figures(found) if one.group is Group.PROGRAMMING]
    assert everything(found)


@given(st.lists(st.floats(0, 1e9), max_size=20), st.integers(1, 20), st.floats(0, 1))
def test_a_percentile_of_what_never_came_is_a_number(values: list[float], lost: int, share: float) -> None:
    ms = [*values, *[math.inf] * lost]
    assert not math.isnan(stats.percentile(ms, share))
    assert not math.isnan(stats.summary(ms).margin)
    assert stats.percentile(ms, 1) == math.inf


# --- services that answer nothing ---


def test_a_service_that_answers_nothing_is_the_worst_there_can_be(found: results.Results) -> None:
    replaced(found, "lbproxy/service", NOTHING)
    through = figures.WAYS["service"]
    ratio = pick(found, Group.SHORT, through, 1)
    assert (ratio.value, ratio.met) == (0, False)
    assert "by CPU time 0.000" in ratio.note
    assert "4,000 failed" in ratio.warning
    for share in ("p50", "p99"):
        assert pick(found, Group.RATES, figures.measure("service", share), 1).value == math.inf
    assert "never" in [cell.text for row in sections.rates(found).rows for cell in row]
    assert everything(found)


@pytest.mark.parametrize("variant", ["bare", "bare/again", "lbproxy/service", "lbproxy/direct"])
@pytest.mark.parametrize("rounds", [1, 99])
@pytest.mark.parametrize("zero", [NOTHING, msgspec.structs.replace(benchmark_run.run(100), cpu_us=0.0), None])
def test_pages_are_made_of_runs_with_nothing_in_them(
    variant: str, rounds: int, zero: results.Run | None, found: results.Results
) -> None:
    for each in found.traffic:
        for one in each.rounds[:rounds]:
            if zero is None:
                one.runs.pop(variant, None)
            elif variant in one.runs:
                one.runs[variant] = zero
    assert report.summary_section(found)
    assert report.page(found)
    assert all(answer.question for answer in answers.answers(found))
    assert plot.panels(found)
    assert not [one for one in figures.figures(found) if math.isnan(one.value) or math.isnan(one.margin)]


def test_a_variant_keeps_the_rounds_that_have_it(found: results.Results) -> None:
    first = found.traffic[0]
    del first.rounds[0].runs["lbproxy/service"]
    assert "lbproxy/service" in figures.variants(first)
    assert pick(found, Group.SHORT, figures.WAYS["service"], 1).count == len(first.rounds) - 1


def test_a_round_whose_bare_answered_nothing_says_nothing() -> None:
    made = [
        results.Round({"bare": bare, "bare/again": bare, "lbproxy/service": benchmark_run.run(90)})
        for bare in (benchmark_run.run(100), NOTHING)
    ]
    assert ratios.ratios(made, "lbproxy/service") == [0.9]
    assert ratios.thrift(made, "lbproxy/service") == [pytest.approx(0.9)]
    assert ratios.against(made, "lbproxy/service", "bare") == [0.9]


# --- failures ---


@pytest.mark.parametrize("variant", ["lbproxy/service", "bare"])
def test_a_figure_with_failures_in_it_meets_no_target(variant: str, found: results.Results) -> None:
    before = pick(found, Group.SHORT, figures.WAYS["service"], 1)
    assert before.met
    kept = found.traffic[0].rounds[0].runs[variant]
    replaced(found, variant, msgspec.structs.replace(kept, failed=2, failures={"ECONNRESET": 2}), rounds=1)
    after = pick(found, Group.SHORT, figures.WAYS["service"], 1)
    said = "2 failed" if variant != "bare" else "2 of bare failed"
    assert (after.verdict, after.met) == (f"not met: {said}", False)
    table = rows.table([after], rows.headings(found), spreads=False)
    assert said in table.rows[0][2].more


def test_a_restart_in_which_connections_failed_meets_no_target(found: results.Results) -> None:
    found.starts = [results.Start(LBPROXY, 10_000, "adopted", 0.5, 1.0, 5, 1_000, [])]
    assert pick(found, Group.START, figures.SERVING, 10_000).verdict == "not met: 5 connections failed"


def test_that_nothing_failed_is_said_of_what_was_measured_alone(found: results.Results) -> None:
    def said() -> str:
        [one] = [each.text for each in remarks.remarks(found) if "connection failed" in each.text or
                 "Not measured" in each.text]  # fmt: skip
        return one

    assert said() == "Of lbproxy and of bare, no connection failed and no change went unseen."
    found.programming = [each for each in found.programming if each.contestant != LBPROXY]
    assert "Of lbproxy, no connection failed. Of bare, no connection failed. Not measured" in said()
    assert "changes of lbproxy's services" in said()
    for traffic in found.traffic:
        for each in traffic.rounds:
            for variant in list(each.runs):
                if variant.startswith("lbproxy/"):
                    del each.runs[variant]
    assert said().startswith("Of bare, no connection failed. Not measured")
    assert "connections of lbproxy" in said()
    found.traffic = []
    assert said().startswith("Not measured")


# --- what is not said of others ---


def test_the_cgroups_memory_is_lbproxys_alone_and_says_what_is_in_it(found: results.Results) -> None:
    found.memory += [msgspec.structs.replace(each, contestant="ipvs") for each in found.memory[:3]]
    listed = [one for one in figures.figures(found) if one.what == figures.CGROUP]
    assert {one.column for one in listed} == {LBPROXY}
    assert "compiler, page cache and kernel memory" in listed[0].note
    assert {one.column for one in figures.figures(found) if one.what == figures.RESIDENT} == {LBPROXY, "ipvs"}


@pytest.mark.parametrize(("settings", "said"), [({"packet_services": 30_000}, " 30,000 services"), ({}, "")])
def test_how_many_services_packets_met_is_taken_from_the_run(
    settings: dict[str, int], said: str, found: results.Results
) -> None:
    found.settings = settings
    text = sections.of_packets(found)
    assert f"sizes,{said or ' services'} and" in text
    assert "10,000" not in text
    assert text in report.page(found)
