"""What is made of a run: figures and verdicts, tables, the Markdown, the page, the pictures."""

import html
import html.parser
import itertools
import math
import pathlib
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import (
    answers,
    comparison,
    elsewhere,
    figures,
    packet_rows,
    page,
    plot,
    remarks,
    report,
    results,
    rows,
    sections,
    tables,
    targets,
    verdicts,
)
from benchmarks.figure import CONTROL, LBPROXY, Figure, Group, number
from tests.unit import benchmark_run


@pytest.fixture
def found() -> results.Results:
    return benchmark_run.made()


def pick(
    found: results.Results, group: Group, what: str, services: int = 10_000, column: str = LBPROXY
) -> Figure:
    [one] = [
        each
        for each in figures.figures(found)
        if (each.group, each.what, each.services, each.column) == (group, what, services, column)
    ]
    return one


OTHERS = benchmark_run.OTHERS
SERVICE, DIRECT = figures.WAYS["service"], figures.WAYS["direct"]


# --- figures and verdicts ---


def test_each_contestant_has_its_figure_beside_the_others(found: results.Results) -> None:
    for name, column in benchmark_run.SERVICE.items():
        for services, ratio in zip(benchmark_run.SIZES, column, strict=True):
            assert pick(found, Group.SHORT, SERVICE, services, name).value == pytest.approx(ratio, abs=0.002)
    assert pick(found, Group.SHORT, SERVICE, column=CONTROL).value == pytest.approx(1, abs=0.002)


def test_only_lbproxy_is_judged(found: results.Results) -> None:
    judged = [one for one in figures.figures(found) if one.target is not None]
    assert {one.column for one in judged if one.group is not Group.VERSUS} == {LBPROXY}
    # Of the ratios to others, kube-proxy's iptables mode is what the target names.
    assert {one.column for one in judged if one.group is Group.VERSUS} == {"iptables"}


@pytest.mark.parametrize(
    ("group", "what", "services", "verdict"),
    [
        (Group.SHORT, SERVICE, 1_000, "met"),
        (Group.SHORT, SERVICE, 10_000, "missed by 0.020"),
        (Group.PROGRAMMING, "quiet, p50", 1, "met"),
        (Group.FAILED, "during restarts", 10_000, "met"),
        (Group.FAILED, "during upgrades", 10_000, "met"),
        (Group.FAILED, "during first starts", 10_000, ""),
        (Group.MEMORY, figures.RESIDENT, 10_000, "missed by 3 MB"),
        (Group.MEMORY, figures.KERNEL_MEMORY, 10_000, "met"),
        (Group.CPU, "at 1 change a second", 10_000, "met"),
    ],
)
def test_a_figure_stands_beside_its_target(
    found: results.Results, group: Group, what: str, services: int, verdict: str
) -> None:
    assert pick(found, group, what, services).verdict == verdict


def test_node_ports_are_held_against_the_others_of_the_same_rounds(found: results.Results) -> None:
    local = figures.WAYS["local"]
    first = pick(found, Group.VERSUS, local, 1, "iptables")
    assert first.value == pytest.approx(0.9 / 0.7, rel=0.01)
    assert (str(first.target), first.verdict) == ("≥ 1.2", "met")
    # kube-proxy can only masquerade where lbproxy has the pod answer by itself.
    dsr = pick(found, Group.VERSUS, figures.WAYS["dsr"], 10_000, "iptables")
    assert dsr.value == pytest.approx(0.75 / 0.4, rel=0.01)
    assert dsr.verdict.startswith("missed by 0.1")
    # No proxy at all reaches that much of it: there no target above 2.25 could be met.
    limits = [pick(found, Group.VERSUS, figures.WAYS[way], 10_000, CONTROL).value for way in ("local", "dsr")]
    assert limits == [pytest.approx(1.0 / 0.4, rel=0.01), pytest.approx(0.9 / 0.4, rel=0.01)]
    assert pick(found, Group.OUTSIDE, figures.WAYS["remote"]).value == pytest.approx(0.7 / 0.9, rel=0.01)


def test_the_controls_noise_grows_with_the_ratio_to_another(found: results.Results) -> None:
    ours, theirs = 0.9, 0.3
    made = [
        results.Round(
            {
                "bare": benchmark_run.run(100 * (1 + wobble)),
                "bare/again": benchmark_run.run(100 * (1 - wobble)),
                "lbproxy/local": benchmark_run.run(100 * ours),
                "iptables/local": benchmark_run.run(100 * theirs),
            }
        )
        for wobble in (0.1, -0.1, 0.05, -0.05)
    ]
    found.traffic = [results.Traffic(1, "outside", "short", 0.2, made)]
    control = pick(found, Group.OUTSIDE, figures.WAYS["local"], 1, CONTROL)
    versus = pick(found, Group.VERSUS, figures.WAYS["local"], 1, "iptables")
    assert control.margin > 0
    assert versus.margin == pytest.approx(control.margin * ours / theirs)


@pytest.mark.parametrize(("services", "bound"), [(1, 1.2), (10_000, 2), (30_000, 2), (1_000, None)])
def test_a_node_ports_target_is_of_few_and_of_many_services(services: int, bound: float | None) -> None:
    target = targets.node_port(services)
    assert (target.bound if target else None) == bound


def test_a_verdict_that_noise_could_turn_says_so(found: results.Results) -> None:
    speeds = {"bare": 1.0, "bare/again": 1.0, "lbproxy/service": 0.965}
    steady, loud = (benchmark_run.rounds(speeds, noise=noise) for noise in (0.1, 5.0))
    found.traffic = [results.Traffic(1, "pod", "short", 0.3, steady)]
    assert pick(found, Group.SHORT, SERVICE, 1).verdict == "missed by 0.005"
    found.traffic = [results.Traffic(1, "pod", "short", 0.3, loud)]
    assert ", give or take 0.0" in pick(found, Group.SHORT, SERVICE, 1).verdict


def test_the_controls_noise_is_that_of_every_ratio(found: results.Results) -> None:
    # The service runs agree with bare exactly; the two bare ones do not with each other.
    made = [
        results.Round(
            {
                "bare": benchmark_run.run(100 * (1 + wobble)),
                "bare/again": benchmark_run.run(100 * (1 - wobble)),
                "lbproxy/service": benchmark_run.run(100),
            }
        )
        for wobble in (0.1, -0.1, 0.05, -0.05)
    ]
    found.traffic = [results.Traffic(1, "pod", "short", 0.3, made)]
    ours, control = (pick(found, Group.SHORT, SERVICE, 1, column) for column in (LBPROXY, CONTROL))
    assert ours.low == ours.high == 1
    assert ours.margin == control.margin > 0.1


def test_changes_that_never_showed_have_a_figure_too(found: results.Results) -> None:
    found.programming = [results.Programming(LBPROXY, 10_000, 0, [], lost=30, failed=0)]
    one = pick(found, Group.PROGRAMMING, "quiet, p99")
    assert (one.value, one.text, one.verdict) == (math.inf, "never", "missed by never")
    assert "30 never seen" in report.page(found)


def test_generated_rules_have_no_agents_figures(found: results.Results) -> None:
    generated = [one for one in figures.figures(found) if one.column in benchmark_run.OTHERS]
    assert {one.what for one in generated if one.group is Group.MEMORY} == {figures.KERNEL_MEMORY}
    assert not [one for one in generated if one.group is Group.CPU]


def test_failures_are_counted_wherever_they_happened(found: results.Results) -> None:
    assert rows.failures(found) == 0
    found.traffic[0].rounds[0].runs["lbproxy/service"] = benchmark_run.run(90, failed=2)
    found.traffic[0].rounds[0].runs["bare"] = benchmark_run.run(90, failed=1)
    found.programming.append(results.Programming(LBPROXY, 10_000, 10, [1.0], lost=3, failed=4))
    found.starts.append(results.Start(LBPROXY, 10_000, "adopted", 0.5, 1.0, 5, 1000, []))
    # What a kube-proxy loses is a finding and no fault of the run.
    found.starts.append(results.Start("iptables", 10_000, "adopted", 0.5, 1.0, 7, 1000, []))
    assert rows.failures(found) == 15
    said = [each.text for each in remarks.remarks(found)]
    assert "15 failures." in said
    assert any("7 of generated iptables rules" in text for text in said)
    assert pick(found, Group.FAILED, "during restarts").verdict == "missed by 5"
    assert "2 (ECONNREFUSED 2)" in report.page(found)


@given(st.floats(0, 1e9))
def test_a_number_is_short(value: float) -> None:
    assert len(number(value, "ms")) <= len("1,000,000,000")


# --- labels ---


def test_generated_rules_are_called_so_wherever_they_stand(found: results.Results) -> None:
    called = "generated iptables rules, v1.8.9 (nf_tables)"
    assert rows.headings(found)["iptables"] == called
    for group in (Group.SHORT, Group.PROGRAMMING, Group.MEMORY, Group.START):
        listed = [one for one in figures.figures(found) if one.group is group]
        assert called in rows.table(listed, rows.headings(found)).head
    for text in (report.summary_section(found), report.page(found)):
        assert "No kube-proxy ran" in text
        assert "no kube-proxy ran" in text
    assert called in page.render(found)
    assert called in plot.labels(found).values()


def test_a_real_kube_proxy_is_not_called_generated(found: results.Results) -> None:
    label = "kube-proxy v1.36.0, iptables mode (iptables v1.8.9 (nf_tables))"
    found.contestants = [
        found.contestants[0],
        results.Contestant("iptables", label, True, {"version": "v1.36.0"}),
    ]
    found.traffic = [results.Traffic(1, "pod", "short", 0.3, benchmark_run.rounds(
        {"bare": 1, "bare/again": 1, "lbproxy/service": 1, "iptables/service": 0.8}
    ))]  # fmt: skip
    for text in (report.summary_section(found), report.page(found), page.render(found)):
        assert label in text
        assert "generated" not in text.replace("nftables rules", "")


def test_a_real_kube_proxys_figures_stand_beside_generated_rules_as_measured_elsewhere(
    found: results.Results,
) -> None:
    for text in (report.page(found), read(page.render(found)).text):
        assert elsewhere.HEADING in text
        assert "on another machine" in text
        assert "4,540 / 4,778" in text
    assert elsewhere.HEADING not in report.summary_section(found)
    found.contestants = found.contestants[:1]
    assert elsewhere.HEADING not in report.page(found) + page.render(found)


def test_generated_rules_stand_beside_real_ones_of_a_machine_of_the_same_kind(
    found: results.Results,
) -> None:
    real = benchmark_run.made()
    real.contestants = [msgspec.structs.replace(each, real=True) for each in real.contestants]
    known = elsewhere.alike(found, real)
    assert known is not None
    assert known.most == 0
    assert len(known.table.rows) == 2 * len(benchmark_run.SIZES)
    iptables, as_real, *_ = (cell.text for cell in known.table.rows[0][2:])
    assert iptables == as_real == pick(found, Group.SHORT, SERVICE, 1, "iptables").text
    real.traffic[0] = msgspec.structs.replace(
        real.traffic[0],
        rounds=benchmark_run.rounds({"bare": 1, "bare/again": 1, "iptables/service": 0.405}),
    )
    known = elsewhere.alike(found, real)
    assert known is not None
    assert known.most == pytest.approx(0.405, abs=0.01)
    real.machine["kernel"] = "another"
    assert elsewhere.alike(found, real) is None


def test_without_a_real_run_of_such_a_machine_nothing_is_said(found: results.Results) -> None:
    assert not elsewhere.remark(found)
    assert elsewhere.HEADING_ALIKE not in report.page(found) + page.render(found)


def test_the_committed_run_was_held_against_a_real_kube_proxy() -> None:
    committed = results.read(results.DIRECTORY / "full.json")
    known = elsewhere.alike(committed)
    assert known is not None
    assert known.most < 0.05
    assert elsewhere.remark(committed) in report.README.read_text()


def test_the_name_of_a_release_is_no_backend() -> None:
    of = results.Contestant("nftables", "x", False, {"tool": "nftables v1.0.6 (Lester Gooch #5)"})
    assert rows.heading(of) == "generated nftables rules, v1.0.6"


def test_a_label_that_forgets_to_say_generated_is_completed() -> None:
    of = results.Contestant("nftables", "rules of 1.36", False)
    assert rows.heading(of) == "generated nftables rules"
    assert "no kube-proxy ran" in rows.described(of)


# --- tables ---


def test_a_table_has_a_line_for_each_size_and_a_column_for_each_contestant(found: results.Results) -> None:
    listed = [one for one in figures.figures(found) if one.group is Group.SHORT]
    table = rows.table(listed, rows.headings(found), spreads=False)
    assert table.head[:5] == ("what", "services", "lbproxy", "target", "verdict")
    assert table.head[-1] == "bare again ÷ bare"
    assert all(len(row) == len(table.head) for row in table.rows)
    assert [row[1].text for row in table.rows] == ["1", "1,000", "10,000"] * 2
    assert [row[0].text for row in table.rows[:4]] == [SERVICE] * 3 + [DIRECT]
    assert table.rows[0][2].look is tables.Look.FIGURE
    assert table.rows[2][4] == tables.Cell("missed by 0.020", tables.Look.MISSED)


def test_lines_are_named_by_what_tells_them_apart(found: results.Results) -> None:
    table = rows.table(sections.headlines(found)[Group.OTHERS], rows.headings(found))
    assert [row[0].text for row in table.rows] == [
        figures.MODES[mode] for mode in ("established", "udp-established", "udp-new", "bulk")
    ]


def test_kinds_of_starts_are_told_apart(found: results.Results) -> None:
    table = rows.table(sections.headlines(found)[Group.START], rows.headings(found))
    assert {row[0].text for row in table.rows} == set(figures.STARTS.values())


def test_markdown_escapes_what_would_break_a_table() -> None:
    table = tables.Table(
        ("a|b", "c"), [(tables.Cell("x|<y>"), tables.Cell("1", tables.Look.FIGURE, "2 – 3"))]
    )
    assert tables.markdown(table).splitlines() == [
        r"| a\|b | c |",
        "|---|---|",
        r"| x\|&lt;y> | **1** (2 – 3) |",
    ]


def test_readme_shows_what_the_product_is_chosen_for(found: results.Results) -> None:
    shown = sections.headlines(found)
    assert list(shown) == [
        Group.SHORT, Group.VERSUS, Group.OTHERS, Group.PATHS, Group.PROGRAMMING,
        Group.START, Group.FAILED, Group.MEMORY, Group.CPU,
    ]  # fmt: skip
    assert {one.services for group in (Group.OTHERS, Group.PATHS) for one in shown[group]} == {10_000}
    text = report.summary_section(found)
    places = [text.index(f"**{each}.**") for each in (verdicts.HEADING, *shown)]
    assert places == sorted(places)


def test_no_missed_target_is_left_out_of_the_count(found: results.Results) -> None:
    judged = [one for one in figures.figures(found) if one.target is not None]
    lines = [line for line in packet_rows.lines(found) if line.target is not None]
    missed = [one for one in judged if not one.met]
    of_lines = sum(line.target is not None and line.target.missed_by(line.worst) > 0 for line in lines)
    assert missed
    assert of_lines
    *_, total = verdicts.table(found).rows
    met = len(judged) + len(lines) - len(missed) - of_lines
    near = sum(0 < one.missed_by <= one.margin < math.inf and not one.warning for one in missed)
    assert [cell.text for cell in total[1:]] == [str(met), str(len(missed) + of_lines), str(near)]
    for text in (report.summary_section(found), report.page(found), html.unescape(page.render(found))):
        assert verdicts.SAID.partition("*")[0] in text


def test_whatever_failed_misses_its_target_and_is_no_noise(found: results.Results) -> None:
    before = verdicts.counts(found)
    start = next(each for each in found.starts if (each.contestant, each.how) == (LBPROXY, "adopted"))
    found.starts[found.starts.index(start)] = msgspec.structs.replace(start, failed=1)
    what = str(Group.FAILED)
    now = verdicts.counts(found)[what]
    assert (now.met, now.missed, now.in_noise) == (before[what].met - 1, before[what].missed + 1, 0)


def test_direct_traffic_of_every_kind_has_a_target(found: results.Results) -> None:
    direct = [
        one
        for one in figures.figures(found)
        if (one.what, one.column) == (DIRECT, LBPROXY) and one.group is not Group.ALIKE
    ]
    assert {one.target for one in direct} == {targets.DIRECT}
    assert {one.topic.partition(",")[0] for one in direct} == set(figures.MODES.values())


def test_the_long_page_has_every_figure(found: results.Results) -> None:
    text = report.page(found)
    for one in figures.figures(found):
        assert one.text in text
        assert one.note in text
    assert "### BPF maps" in text
    assert "p99 µs" in text


def test_a_figure_of_a_family_that_was_not_measured_stays_empty(found: results.Results) -> None:
    found.packets = [each for each in found.packets if each.family == 4]
    table = packet_rows.table(packet_rows.lines(found))
    assert table.head[4:8] == ("IPv4 TCP", "IPv6 TCP", "IPv4 UDP", "IPv6 UDP")
    assert [cell.text for cell in table.rows[0][4:8]] == ["15", "", "15", ""]


# --- remarks ---


def test_what_makes_figures_worth_less_is_said(found: results.Results) -> None:
    assert [each.text[:20] for each in remarks.remarks(found) if each.warning] == ["No kube-proxy ran: i"]
    assert any(each.text.startswith("A quiet machine") for each in remarks.remarks(found))
    found.complete = False
    found.profile = "smoke"
    found.software["dirty"] = "true"
    found.others_during_packets = [0.2]
    noisy = benchmark_run.rounds({"bare": 1, "bare/again": 1, "lbproxy/service": 1}, noise=20)
    found.traffic = [results.Traffic(1, "pod", "short", 0.3, noisy)]
    said = "\n".join(each.text for each in remarks.remarks(found) if each.warning)
    for words in ("did not finish", "smoke", "noisy", "single packets: other processes had up to 20%"):
        assert words in said
    assert "uncommitted" in remarks.remarks(found)[0].text


def test_a_step_that_failed_is_told_of(found: results.Results) -> None:
    found.failed = [results.Failed("1,000 services: iptables: first start", "it ended:\nno luck")]
    [said] = [each for each in remarks.remarks(found) if "first start" in each.text]
    assert said.warning
    assert said.text.endswith("iptables: first start: it ended: no luck")


def test_a_generator_whose_cpu_others_had_too_is_told_of(found: results.Results) -> None:
    assert remarks.cpu_share(found) == pytest.approx(1)
    assert not any("Others computed" in each.text for each in remarks.remarks(found))
    for each in found.traffic[0].rounds:
        run = each.runs["bare"]
        each.runs["bare"] = msgspec.structs.replace(run, cpu_us=0.5 * run.cpu_us)
    assert remarks.cpu_share(found) == pytest.approx(0.5)
    assert any(each.warning and "Others computed" in each.text for each in remarks.remarks(found))


def test_a_generator_that_is_the_bottleneck_is_told(found: results.Results) -> None:
    assert remarks.own_share(found) == pytest.approx(0.08)
    for each in found.traffic[0].rounds:
        each.runs["bare"] = msgspec.structs.replace(each.runs["bare"], own_share=0.6)
    [said] = [each for each in remarks.remarks(found) if "generator" in each.text]
    assert said.warning
    assert "60%" in said.text


# --- documents ---


def test_a_run_without_any_figures_still_makes_pages(found: results.Results) -> None:
    empty = results.Results("quick", found.started, found.machine, found.software, {})
    assert "did not finish" in report.page(empty)
    assert report.summary_section(empty)
    assert "has no figures of lbproxy" in page.render(empty)


def test_the_report_needs_nothing_but_the_file(found: results.Results, tmp_path: pathlib.Path) -> None:
    results.write(found, tmp_path / "run.json")
    again = results.read(tmp_path / "run.json")
    assert again == found
    assert report.page(again) == report.page(found)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_only_what_is_between_the_markers_changes() -> None:
    once = report.insert(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", "new")
    assert once == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    assert report.insert(once, "new") == once


def test_missing_markers_are_added_at_the_end_and_half_of_them_refused() -> None:
    added = report.insert("# Title\n", "new")
    assert added == f"# Title\n\n## Measured\n\n{report.BEGIN}\nnew\n{report.END}\n"
    with pytest.raises(ValueError, match="both"):
        report.insert(f"x {report.BEGIN}", "new")


@pytest.mark.parametrize(
    ("target", "value", "missed_by"),
    [
        (targets.Target(0.97, at_least=True), 0.98, 0),
        (targets.Target(0.97, at_least=True), 0.97, 0),
        (targets.Target(2, at_least=False, unit="s"), 2.5, 0.5),
        (targets.Target(2, at_least=False, unit="s"), 1, 0),
    ],
)
def test_a_target_says_how_far_a_value_is_on_the_wrong_side(
    target: targets.Target, value: float, missed_by: float
) -> None:
    assert target.missed_by(value) == missed_by


# --- pictures ---


def test_pictures_are_drawn_of_what_there_is(found: results.Results, tmp_path: pathlib.Path) -> None:
    assert [panel.name for panel in plot.panels(found)] == ["rate", "latency", "programming", "memory"]
    plot.draw(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    found.memory, found.programming = [], [results.Programming(LBPROXY, 1, 0, [], lost=1, failed=0)]
    assert [panel.name for panel in plot.panels(found)] == ["rate", "latency"]
    found.traffic = []
    plot.draw(found, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.fixture
def written(
    found: results.Results, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, pathlib.Path]:
    """Have the report write its files elsewhere."""
    files = {
        name: tmp_path / f"written.{name}"
        for name in ("README", "PAGE", "PLOT", "HTML", "BESIDE", "BALANCING")
    }
    for name, path in files.items():
        monkeypatch.setattr(report, name, path)
        path.write_text("old\n")
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "run.json")])
    results.write(found, tmp_path / "run.json")
    return files


def test_a_report_of_a_run_with_nothing_to_draw_removes_the_picture_of_another(
    found: results.Results, written: dict[str, pathlib.Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main() == 0
    assert "benchmarks.png" in written["README"].read_text()
    assert written["PLOT"].name in capsys.readouterr().out
    assert written["PLOT"].read_bytes().startswith(b"\x89PNG")
    empty = results.Results("quick", found.started, found.machine, found.software, {})
    results.write(empty, written["PLOT"].with_name("run.json"))
    assert report.main() == 0
    assert not written["PLOT"].exists()
    assert "benchmarks.png" not in written["README"].read_text()
    assert written["PLOT"].name not in capsys.readouterr().out


def test_a_run_without_one_slow_backend_leaves_what_stands_there(
    found: results.Results, written: dict[str, pathlib.Path]
) -> None:
    assert report.main() == 0
    before = written["BALANCING"].read_text()
    assert "least-connections" in before
    found.balancing = []
    results.write(found, written["PLOT"].with_name("run.json"))
    assert report.main() == 0
    assert written["BALANCING"].read_text() == before


PAGES = {
    report.README: report.summary_section,
    report.PAGE: report.page,
    report.BESIDE: report.beside,
    report.BALANCING: report.slow_backend,
}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_pages_are_those_of_the_committed_run(path: pathlib.Path) -> None:
    committed = results.read(results.DIRECTORY / "full.json")
    text = path.read_text()
    assert report.insert(text, PAGES[path](committed)) == text, "make report"


def test_the_browsers_page_is_that_of_the_committed_run() -> None:
    committed = results.read(results.DIRECTORY / "full.json")
    # Its pictures have ids that are drawn by lot.
    without = [re.sub(r"<figure>.*?</figure>", "", text, flags=re.DOTALL) for text in (
        report.HTML.read_text(), page.render(committed)
    )]  # fmt: skip
    assert without[0] == without[1], "make report"


def test_who_chooses_finds_the_same_figures_as_everywhere(found: results.Results) -> None:
    table = comparison.table(found)
    lines = {line[0].text: [cell.text for cell in line[1:]] for line in table.rows}
    of = lines["short connections through a ClusterIP ÷ no proxy, 1 service"]
    assert of == [pick(found, Group.SHORT, SERVICE, 1, column).text for column in ("lbproxy", *OTHERS)]
    ratios = [
        one.value
        for one in figures.figures(found)
        if (one.group, one.services, one.column) == (Group.VERSUS, 1, "iptables")
    ]
    ours, iptables, _ = lines["NodePort from outside, 1 service, rate of lbproxy ÷ theirs"]
    assert (ours, iptables) == ("–", f"{number(min(ratios), '')} to {number(max(ratios), '')}")
    assert "64k known flows in turn 241" in comparison.of_packets(found)
    found.packets = []
    assert not comparison.of_packets(found)


def test_a_picture_without_its_page_says_what_it_is_of(
    found: results.Results, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plot.origin(found) == "2026-01-02 03:04 UTC, commit 0123456789, profile quick"
    drawn = []
    for commit in ("aaa", "aaa", "bbb"):
        found.software["commit"] = commit
        plot.draw(found, tmp_path / "plot.png")
        drawn.append((tmp_path / "plot.png").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]
    found.profile, found.complete, found.software["dirty"] = "smoke", False, "true"
    assert plot.origin(found).endswith(
        "uncommitted changes, profile smoke · smoke: means nothing · incomplete"
    )


def test_the_control_is_called_what_it_is(found: results.Results) -> None:
    said = "bare again ÷ bare: how far two runs of the same are apart"
    assert said in read(page.render(found)).text
    assert plot.labels(found)[CONTROL] == said
    assert f"{said}: " in plot.panels(found)[0].alt
    assert "control" not in plot.panels(found)[0].alt


def test_a_contestant_has_one_colour_and_no_other_has_it(found: results.Results) -> None:
    found.contestants.append(results.Contestant("ipvs", "IPVS", True))
    colours = plot.colours(found)
    assert {*rows.headings(found), "bare", CONTROL} == set(colours)
    assert len(set(colours.values())) == len(colours)


# --- the page ---

_VOID = {"meta", "path", "use", "rect", "br", "hr", "img", "link", "input"}


class Reader(html.parser.HTMLParser):
    """Follows the tags of a page: those that are open, every id, the text that is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.levels: list[int] = []
        self.words: list[str] = []
        self.labels: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.levels.append(int(tag[1]))
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href"):
                self.links.append(value or "")
            if name == "aria-label":
                self.labels.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        assert not self.open or self.open[-1] != "script"
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_is_whole_and_needs_nothing_but_itself(found: results.Results) -> None:
    text = page.render(found)
    reader = read(text)
    assert text.startswith("<!DOCTYPE html>")
    assert len(text.encode()) < 1_000_000
    assert len(set(reader.ids)) == len(reader.ids)
    assert all(link.startswith("#") and link[1:] in reader.ids for link in reader.links)
    assert "url(http" not in text
    assert "@import" not in text
    assert reader.levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(reader.levels))
    assert "prefers-color-scheme: dark" in text


def test_the_page_has_every_figure_and_label(found: results.Results) -> None:
    text = read(page.render(found)).text
    for one in figures.figures(found):
        assert one.text in text
        assert one.verdict in text
        assert one.note in text
        assert one.group in text
    for known in (found.machine, found.software, found.settings):
        for name, value in known.items():
            assert name in text
            assert str(value) in text
    for each in found.contestants:
        assert rows.heading(each) in text
        assert rows.described(each) in text
    for remark in remarks.remarks(found):
        assert remark.text in text
    for words in sections.not_shown(found):
        assert words in text


def test_warnings_come_before_anything_that_is_measured(found: results.Results) -> None:
    found.profile, found.complete = "smoke", False
    found.traffic[0].rounds[0].runs["lbproxy/service"] = benchmark_run.run(90, failed=2)
    warnings = [each.text for each in remarks.remarks(found) if each.warning]
    assert len(warnings) >= 4
    text = page.render(found)
    assert text.count('class="warning"') == len(warnings)
    assert text.rindex('class="warning"') < text.index("<nav")
    for document in (report.summary_section(found), report.page(found)):
        assert all(document.index(f"**{each}**") < document.index("|---") for each in warnings)


def test_generated_rules_are_called_no_lower_bound_of_a_change(found: results.Results) -> None:
    for text in (report.summary_section(found), report.page(found), page.render(found)):
        assert "loading alone was measured" in text
        assert "no lower bound" in text
        assert "--kube-proxy PATH" in text
    found.contestants = found.contestants[:1]
    assert "no lower bound" not in report.page(found)


def test_what_is_said_of_a_connections_cost_is_said_of_its_way(found: results.Results) -> None:
    said = "\n".join(answers.answers(found)[0].sentences)
    for words in ("to a pod of the same node, lbproxy", "From a pod to a pod of another node", "From a node"):
        assert words in said
    assert CONTROL not in said


def test_the_page_answers_what_is_asked(found: results.Results) -> None:
    text = read(page.render(found)).text
    for answer in answers.answers(found):
        assert answer.sentences
        for sentence in answer.sentences:
            assert sentence in text
    assert "How far can I trust this run?" in text
    assert "0 connections failed of 12,000 in 3 starts" in text


def test_pictures_say_in_words_what_they_show(found: results.Results) -> None:
    reader = read(page.render(found))
    for panel in plot.panels(found):
        assert panel.alt in reader.labels
    assert "generated" in reader.text
    assert "0.950 at 10,000" in plot.panels(found)[0].alt


def test_pictures_take_the_pages_colours(found: results.Results) -> None:
    text = page.render(found)
    body = text[text.index("<main>") :]
    assert "var(--lbproxy)" in body
    for colour in plot.colours(found).values():
        assert colour not in body
        assert f": {colour};" in text[: text.index("<main>")]


def test_nothing_of_a_run_is_taken_for_markup(found: results.Results) -> None:
    nasty = '<script>alert("&")</script>'
    found.machine["cpu"] = found.software["compiler"] = found.settings["x"] = nasty
    found.profile = nasty
    found.contestants.append(results.Contestant("ipvs", nasty, True, {"a": nasty}))
    found.traffic = [results.Traffic(1, "pod", nasty, 0.3, benchmark_run.rounds(
        {"bare": 1, "bare/again": 1, "lbproxy/service": 1, "ipvs/service": 0.8}
    ))]  # fmt: skip
    text = page.render(found)
    assert "<script" not in text
    assert nasty in read(text).text
