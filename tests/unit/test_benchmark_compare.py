"""Two runs beside each other: what is better, what is worse, what is noise; and the command."""

import json
import math
import os
import pathlib
import subprocess
import sys
import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import compare, figures, results
from benchmarks.compare import Verdict
from benchmarks.figure import LBPROXY, Figure, Group
from lbproxy import cli as command
from lbproxy import errors
from lbproxy.commands import bench, render
from tests.unit import benchmark_run

UNITS = ("", "MB", "ms", "µs", "ns", "/s", "s", "%", "failed")
VALUES = st.one_of(st.floats(0, 1e6), st.just(math.inf))


def figure(value: float, margin: float, count: int, unit: str, more_is_better: bool) -> Figure:
    return Figure(
        Group.SHORT, "topic", "what", 1, LBPROXY, value, value, value, count, margin, unit, more_is_better
    )


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Figure, Figure]:
    unit, more_is_better = draw(st.sampled_from(UNITS)), draw(st.booleans())
    one, other = (
        figure(draw(VALUES), draw(st.floats(0, 10)), draw(st.integers(1, 50)), unit, more_is_better)
        for _ in range(2)
    )
    return one, other


def verdicts(compared: compare.Comparison) -> dict[tuple[str, str, int, str], Verdict]:
    return {
        (each.about, each.what, each.services, each.contestant): each.verdict for each in compared.changes
    }


def slower(found: results.Results, by: float) -> None:
    """Have lbproxy's connections through a service of the first traffic take longer."""
    first = found.traffic[0]
    for each in first.rounds:
        run = each.runs["lbproxy/service"]
        each.runs["lbproxy/service"] = msgspec.structs.replace(run, rate_per_s=run.rate_per_s * by)


# --- figures ---


@given(pairs())
def test_what_is_worse_one_way_is_better_the_other_way(pair: tuple[Figure, Figure]) -> None:
    turned = {Verdict.WORSE: Verdict.BETTER, Verdict.BETTER: Verdict.WORSE, Verdict.SAME: Verdict.SAME}
    one, other = pair
    assert compare.judge(other, one) is turned[compare.judge(one, other)]


@given(pairs(), st.floats(0, 1))
def test_nothing_is_worse_than_itself(pair: tuple[Figure, Figure], drift: float) -> None:
    assert compare.judge(pair[0], pair[0], drift) is Verdict.SAME


@given(pairs(), st.floats(0, 1))
def test_a_machine_that_drifts_hides_differences_and_makes_none(
    pair: tuple[Figure, Figure], drift: float
) -> None:
    calm, drifting = compare.judge(*pair), compare.judge(*pair, drift)
    assert drifting in (calm, Verdict.SAME)


@pytest.mark.parametrize(
    ("unit", "more_is_better", "before", "after", "margin", "verdict"),
    [
        ("", True, 0.97, 0.90, 0.01, Verdict.WORSE),
        ("", True, 0.97, 0.95, 0.011, Verdict.SAME),  # the margins overlap
        ("", True, 0.97, 0.965, 0.0, Verdict.SAME),  # less than what always differs
        ("", True, 0.90, 0.97, 0.01, Verdict.BETTER),
        ("ms", False, 3.0, 4.0, 0.2, Verdict.WORSE),
        ("ms", False, 4.0, 3.0, 0.2, Verdict.BETTER),
        ("ms", False, 3.0, math.inf, 0.2, Verdict.WORSE),
        ("failed", False, 0, 1, 0.0, Verdict.WORSE),
        ("%", False, 0.1, 0.3, 0.0, Verdict.SAME),
        ("MB", False, 80, 90, 0.0, Verdict.WORSE),
    ],
)
def test_which_way_is_better_depends_on_the_figure(
    unit: str, more_is_better: bool, before: float, after: float, margin: float, verdict: Verdict
) -> None:
    one, other = (figure(value, margin, 30, unit, more_is_better) for value in (before, after))
    assert compare.judge(one, other) is verdict


def test_a_few_samples_do_not_prove_a_start_slower() -> None:
    one, other = (figure(value, 0.0, 1, "s", False) for value in (1.0, 1.12))
    assert compare.judge(one, other) is Verdict.SAME
    one, other = (figure(value, 0.0, 9, "s", False) for value in (1.0, 1.12))
    assert compare.judge(one, other) is Verdict.WORSE


def test_samples_that_never_come_any_more_are_worse_and_no_noise() -> None:
    one, other = figure(1.0, 0.1, 30, "ms", False), figure(1.01, math.inf, 30, "ms", False)
    assert compare.judge(one, other) is Verdict.WORSE
    assert compare.judge(other, one) is Verdict.BETTER
    never = figure(math.inf, 0.0, 30, "ms", False)
    assert compare.judge(other, never) is Verdict.WORSE


# --- runs ---


def test_a_run_is_the_same_as_itself() -> None:
    compared = compare.compare(benchmark_run.made(), benchmark_run.made())
    assert {each.verdict for each in compared.changes} == {Verdict.SAME}
    assert compared.warnings == []
    assert compared.worse == []


@given(st.floats(0.5, 1.5))
def test_comparing_the_other_way_round_turns_every_verdict(by: float) -> None:
    one, other = benchmark_run.made(), benchmark_run.made()
    for found in (one, other):
        found.traffic, found.packets = found.traffic[:1], []
    slower(other, by)
    there, back = verdicts(compare.compare(one, other)), verdicts(compare.compare(other, one))
    turned = {Verdict.WORSE: Verdict.BETTER, Verdict.BETTER: Verdict.WORSE, Verdict.SAME: Verdict.SAME}
    assert back == {key: turned[verdict] for key, verdict in there.items()}


def test_a_slower_service_is_worse_and_nothing_else_is() -> None:
    after = benchmark_run.made()
    slower(after, 0.9)
    compared = compare.compare(benchmark_run.made(), after)
    assert [(each.what, each.services) for each in compared.worse] == [
        ("short TCP connections, pod → pod of the same node, through a ClusterIP", 1),
        ("short TCP connections, pod → pod of the same node, through a ClusterIP, rate", 1),
    ]
    assert compared.changes[0].target == "≥ 0.97"


def test_what_others_do_decides_nothing() -> None:
    after = benchmark_run.made()
    for each in after.traffic[0].rounds:
        each.runs["iptables/service"] = benchmark_run.run(100.0)
    compared = compare.compare(benchmark_run.made(), after)
    assert [each.contestant for each in compared.changes if each.verdict is Verdict.WORSE]
    assert compared.worse == []


def test_a_slower_machine_is_no_slower_lbproxy() -> None:
    after = benchmark_run.made()
    for traffic in after.traffic:
        for each in traffic.rounds:
            for variant, run in each.runs.items():
                each.runs[variant] = msgspec.structs.replace(
                    run, rate_per_s=run.rate_per_s * 0.7, p50_us=run.p50_us / 0.7, p99_us=run.p99_us / 0.7
                )
    compared = compare.compare(benchmark_run.made(), after)
    assert compared.worse == []
    assert any("bare alone differs by up to 30%" in warning for warning in compared.warnings)


def test_of_other_machines_only_ratios_memory_and_failures_are_compared() -> None:
    after = benchmark_run.made()
    after.machine["cpu"] = "Another CPU"
    slower(after, 0.9)
    compared = compare.compare(benchmark_run.made(), after)
    assert "NOT THE SAME MACHINE: cpu A made-up CPU → Another CPU" in compared.warnings[0]
    assert {each.unit for each in compared.changes} == {"", "MB", "failed"}
    assert len(compared.worse) == 1


def test_what_makes_a_comparison_worth_less_is_said() -> None:
    after = benchmark_run.made()
    after.complete, after.profile = False, "smoke"
    after.software["dirty"] = "true"
    after.contestants[1] = results.Contestant("iptables", "kube-proxy v1.36.0", True)
    said = "\n".join(compare.warnings(benchmark_run.made(), after))
    for words in (
        "did not finish",
        "a smoke run",
        "uncommitted",
        "profile quick → smoke",
        "iptables is not the same",
    ):
        assert words in said


def test_a_ratio_to_another_contestant_than_before_decides_nothing() -> None:
    after = benchmark_run.made()
    after.traffic = [benchmark_run.outside(1, 1.4)]
    before = benchmark_run.made()
    before.traffic = [benchmark_run.outside(1, 0.7)]
    assert {each.contestant for each in compare.compare(before, after).worse} == {"lbproxy ÷ iptables"}
    after.contestants[1] = results.Contestant("iptables", "kube-proxy v1.36.0", True)
    assert compare.compare(before, after).worse == []


def test_what_only_the_first_run_has_measured_is_listed_and_missed() -> None:
    after = benchmark_run.made()
    after.cpu = []
    there = compare.compare(benchmark_run.made(), after)
    assert {each.verdict for each in there.changes} == {Verdict.SAME, Verdict.GONE}
    assert {each.after for each in there.changes if each.verdict is Verdict.GONE} == {None}
    assert there.worse == []
    said = "\n".join(map(str, compare.shown(there, everything=False)))
    assert "2 only in the first" in said
    assert "2 figures of lbproxy are only in the first run: CPU, at rest, services: 10,000; CPU" in said
    assert not there.passes
    back = compare.compare(after, benchmark_run.made())
    assert {each.verdict for each in back.changes} == {Verdict.SAME, Verdict.NEW}
    assert back.passes


def test_many_missing_figures_are_named_in_one_line() -> None:
    after = benchmark_run.made()
    after.traffic = []
    [said] = compare.compare(benchmark_run.made(), after).objections
    assert said.endswith(" more")
    assert len(said) < 600


def test_whoever_was_not_measured_again_is_not_missed() -> None:
    after = benchmark_run.made()
    after.contestants = after.contestants[:1]
    for traffic in after.traffic:
        for each in traffic.rounds:
            for variant in list(each.runs):
                if variant.startswith(benchmark_run.OTHERS):
                    del each.runs[variant]
    after.programming = [each for each in after.programming if each.contestant == LBPROXY]
    after.starts = [each for each in after.starts if each.contestant == LBPROXY]
    after.memory = [each for each in after.memory if each.contestant == LBPROXY]
    compared = compare.compare(benchmark_run.made(), after)
    assert "lbproxy ÷ iptables" in {each.contestant for each in compared.changes}
    assert compared.passes


def failing(found: results.Results, variant: str, number: int) -> None:
    """Have connections of a variant fail in the first traffic, beside as many that are answered as ever."""
    runs = found.traffic[0].rounds[0].runs
    runs[variant] = msgspec.structs.replace(runs[variant], failed=number, failures={"ECONNREFUSED": number})


@pytest.mark.parametrize(("variant", "who"), [("lbproxy/service", LBPROXY), ("bare", "bare")])
def test_one_more_failed_connection_of_lbproxy_or_bare_is_worse(variant: str, who: str) -> None:
    before, after = benchmark_run.made(), benchmark_run.made()
    failing(before, variant, 1)
    failing(after, variant, 300)
    compared = compare.compare(before, after)
    assert [(each.contestant, each.before, each.after) for each in compared.worse] == [(who, 1, 300)]
    assert not compared.passes
    assert compare.compare(after, before).passes
    after.machine["cpu"] = "Another CPU"
    assert len(compare.compare(before, after).worse) == 1


def test_failed_connections_of_others_decide_nothing() -> None:
    after = benchmark_run.made()
    failing(after, "iptables/service", 300)
    assert compare.compare(benchmark_run.made(), after).passes


@pytest.mark.parametrize("lost", [1, 30])
def test_changes_never_seen_are_worse(lost: int) -> None:
    after = benchmark_run.made()
    ours = after.programming[0]
    kept = ours.latency_ms[lost:]
    after.programming[0] = msgspec.structs.replace(ours, latency_ms=kept, lost=lost)
    compared = compare.compare(benchmark_run.made(), after)
    worse = {each.what.rpartition(", ")[2]: each.after for each in compared.worse}
    assert worse["changes never seen"] == lost
    assert worse["p99"] == math.inf
    assert "never" in "\n".join(render.plain(part) for part in compare.shown(compared, everything=True))


def test_an_agent_that_answers_nothing_is_worse_and_nothing_of_it_better() -> None:
    nothing = results.Run(0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, {})
    after = benchmark_run.made()
    for each in after.traffic[0].rounds:
        each.runs["lbproxy/service"] = nothing
    for before, other, verdict in (
        (benchmark_run.made(), after, Verdict.WORSE),
        (after, benchmark_run.made(), Verdict.BETTER),
    ):
        compared = compare.compare(before, other)
        differing = [each for each in compared.changes if each.decides and each.verdict is not Verdict.SAME]
        assert {each.verdict for each in differing} == {verdict}
        assert {each.what.rpartition(", ")[2] for each in differing} >= {"rate", "p50", "p99"}
        assert list(compare.shown(compared, everything=True))


def test_runs_in_which_bare_answered_nothing_can_be_compared() -> None:
    nothing = results.Run(0.0, 0.0, 0.0, 0.0, 0.0, 0, 9, {"EIO": 9})
    after = benchmark_run.made()
    for each in after.traffic[0].rounds:
        each.runs["bare"] = nothing
    assert not compare.compare(benchmark_run.made(), after).passes
    assert compare.compare(after, after).worse == []


def test_every_figure_has_a_name_of_its_own() -> None:
    found = benchmark_run.made()
    listed = figures.figures(found) + figures.absolutes(found)
    assert len({one.key for one in listed}) == len(listed)


# --- the command ---


@pytest.fixture
def files(tmp_path: pathlib.Path) -> tuple[str, str]:
    after = benchmark_run.made()
    slower(after, 0.9)
    results.write(benchmark_run.made(), tmp_path / "a.json")
    results.write(after, tmp_path / "b.json")
    return str(tmp_path / "a.json"), str(tmp_path / "b.json")


def test_the_exit_status_says_whether_something_is_worse(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(files) == 1
    said = capsys.readouterr().out
    assert "worse" in said
    assert "-10.0%" in said
    assert "2 worse" in said
    assert compare.main(files[::-1]) == 0
    assert "2 better" in capsys.readouterr().out
    assert compare.main([files[0], files[0]]) == 0
    assert "worse" not in capsys.readouterr().out


def test_all_shows_what_is_the_same_and_what_others_did(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([files[0], files[0], "--all"]) == 0
    said = capsys.readouterr().out
    assert "nftables" in said
    assert "control" in said


def test_json_has_everything(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([*files, "-o", "json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"warnings", "changes", "objections"}
    assert said["changes"][0]["verdict"] == "worse"
    assert said["changes"][0]["before"] == pytest.approx(0.975, abs=0.002)


@pytest.mark.parametrize("content", ["{", "{}", "[]", None])
def test_files_that_are_no_runs_have_a_status_of_their_own(
    content: str | None, files: tuple[str, str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.json"
    if content is not None:
        bad.write_text(content)
    assert compare.main([files[0], str(bad)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lbproxy: error: ")
    assert "bad.json" in said


def test_a_run_of_another_schema_cannot_be_compared(
    files: tuple[str, str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = benchmark_run.made()
    found.schema = results.SCHEMA + 1
    results.write(found, tmp_path / "new.json")
    assert compare.main([files[0], str(tmp_path / "new.json")]) == 2
    assert "schema" in capsys.readouterr().err


def test_a_run_that_did_not_finish_does_not_pass(
    files: tuple[str, str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = benchmark_run.made()
    found.complete = False
    results.write(found, tmp_path / "half.json")
    assert compare.main([files[0], str(tmp_path / "half.json")]) == 1
    assert (
        "it cannot be known that nothing is worse: the second run did not finish." in capsys.readouterr().out
    )
    # What the first lacks cannot have got worse.
    assert compare.main([str(tmp_path / "half.json"), files[0]]) == 0


@pytest.mark.parametrize("form", ["table", "json"])
def test_a_reader_that_has_had_enough_gets_no_traceback(form: str, files: tuple[str, str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    argv = [sys.executable, "-m", "benchmarks.compare", *files, "--all", "-o", form]
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(argv, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    made: list[tuple[list[str], dict[str, str]]] = []

    def execve(program: str, argv: list[str], environment: dict[str, str]) -> typing.NoReturn:
        assert program == sys.executable
        made.append((argv[3:], environment))
        raise SystemExit(7)

    monkeypatch.setattr("os.execve", execve)
    return made


@pytest.mark.parametrize("name", bench.COMMANDS)
def test_the_command_hands_over_to_the_checkouts_programs(
    name: str, executed: list[tuple[list[str], dict[str, str]]]
) -> None:
    with pytest.raises(SystemExit):
        command.main(["bench", name, "--help", "x_y.json"])
    [(argv, environment)] = executed
    assert argv == [f"benchmarks.{name}", "--help", "x_y.json"]
    checkout = pathlib.Path(environment["PYTHONPATH"].partition(":")[0])
    assert (checkout / "benchmarks" / f"{name}.py").exists()


def test_an_installed_package_says_that_it_has_no_benchmarks(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.AgentError, match="in a checkout") as caught:
        bench.main(["run"], tmp_path)
    assert caught.value.exit_status == 1
    assert len(caught.value.lines()) == 1


def test_help_teaches_and_a_wrong_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["bench", "--help"])
    assert ended.value.code == 0
    assert "compare before.json after.json" in capsys.readouterr().out
    assert command.main(["bench", "comprae"]) == 2
    assert "did you mean compare?" in capsys.readouterr().err
    assert command.main(["bench"]) == 2
