"""What the Maglev benchmark makes of tables, and its page."""

import itertools
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import maglev, maglev_rows, progress, report, results
from lbproxy.core import maglev as tables

TABLES = st.lists(st.integers(0, 9), min_size=1, max_size=50)


def test_each_size_has_a_slot_for_every_backend_and_lbproxys_own_is_among_them() -> None:
    assert maglev.sizes(3) == maglev.SIZES
    assert maglev.sizes(1_000) == (1_021, 4_093, 16_381, 65_521, 65_537)
    assert all(tables.size(backends) in maglev.sizes(backends) for backends in maglev.BACKENDS)


@pytest.mark.parametrize(
    ("backends", "counts"), [(3, (1,)), (10, (1,)), (100, (1, 5, 10)), (1_000, (1, 10, 50, 100))]
)
def test_only_whole_backends_leave(backends: int, counts: tuple[int, ...]) -> None:
    assert maglev.leaving(backends) == counts


def test_thresholds_are_where_one_backend_less_has_a_smaller_table() -> None:
    assert maglev.thresholds(1_000) == (3, 11, 41, 164)
    assert maglev.thresholds(40) == (3, 11)


def test_loads_are_shares_of_what_a_weight_is_due() -> None:
    assert maglev.loads([0, 0, 0, 1], [1, 1]) == (1.5, 0.5)
    assert maglev.loads([0, 0, 1], [2, 1]) == (1, 1)
    assert maglev.loads([0, 0, 0, 0], [1, 1]) == (2, 0)


def test_only_slots_whose_backend_stays_can_move() -> None:
    assert maglev.moved([0, 1, 2, 1], [1, 1, 2, 1], {0}) == 0
    assert maglev.moved([0, 1, 2, 1], [1, 2, 2, 1], {0}) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="shorter"):
        maglev.moved([0, 1], [0], {1})


@given(TABLES, st.data())
def test_the_least_possible_change_moves_nothing(before: list[int], data: st.DataObject) -> None:
    before = [*before, 10]  # who stays
    gone = data.draw(st.sets(st.integers(0, 9)))
    after = [data.draw(st.integers(10, 19)) if backend in gone else backend for backend in before]
    assert maglev.moved(before, after, gone) == 0


@given(TABLES)
def test_if_all_slots_change_hands_all_have_moved(before: list[int]) -> None:
    assert maglev.moved(before, [backend + 1 for backend in before], set()) == 1


@given(TABLES, st.integers(0, 15))
def test_a_flow_finds_its_slot_as_the_programs_do(table: list[int], bits: int) -> None:
    """They scale a hash of 32 bits: `slot_of_table` in bpf/select.h."""
    flows = 1 << bits
    found = maglev.by_flow(table, flows)
    hashes = range(0, 1 << 32, (1 << 32) // flows)
    assert found == [table[(number * len(table)) >> 32] for number in hashes]


def test_every_repeat_is_a_sample_of_each_figure() -> None:
    ticks = itertools.count(step=2_000_000)
    found = maglev.measure(1_021, 100, 3, clock=lambda: next(ticks))
    assert (found.slots, found.backends, found.chosen) == (1_021, 100, False)
    assert found.build_ms == [2.0] * 3
    assert {count: len(shares) for count, shares in found.moved.items()} == {1: 3, 5: 3, 10: 3}
    # 1,021 slots among 100 are 10 or 11 each.
    assert (found.most, found.least) == pytest.approx((11 / 10.21, 10 / 10.21))
    # What `tables.table` promises of weights that sum up to 265, the least of them 1.
    assert 1 - 100 / 1_021 < found.weighted_least <= 1 <= found.weighted_most <= 1 + 265 / 1_021
    assert all(0 < share < 0.25 for shares in found.moved.values() for share in shares)
    assert maglev.measure(1_021, 10, 1).chosen


def test_repeats_draw_other_backends_and_a_second_run_the_same_ones() -> None:
    once, again = (maglev.measure(1_021, 100, 3, clock=lambda: 0) for _ in range(2))
    assert once == again
    assert len(set(once.moved[10])) > 1


def test_a_smaller_table_moves_most_flows() -> None:
    found = maglev.resize(11, 2)
    assert (found.backends, found.slots, found.slots_after) == (11, 4_093, 1_021)
    # Two tables that know nothing of each other agree on one flow in ten.
    assert found.moved == [pytest.approx(0.9, abs=0.03)] * 2


# --- steps and the page ---


@pytest.fixture
def found() -> results.Results:
    return results.Results(
        profile="quick",
        started="2025-01-01T10:00:00+00:00",
        machine={"cpu": "A CPU", "cpus": "2", "memory": "4 GB", "virtual": "yes", "kernel": "6.1"},
        software={"commit": "0123456789abcdef", "dirty": "false", "python": "3.11"},
        settings={},
        maglev=[
            results.Maglev(16_381, 100, True, [5.0, 6.0, 7.0], 1.001, 0.995, 1.003, 0.997, {1: [0.01, 0.02]}),
            results.Maglev(
                65_537, 1_000, False, [30.0], 1.007, 0.992, 1.017, 0.99,
                {1: [0.001], 10: [0.01, 0.03], 50: [0.03], 100: [0.05]},
            ),
        ],
        maglev_resized=[results.Resized(41, 16_381, 4_093, [0.974, 0.976, 0.975])],
    )  # fmt: skip


def line(page: str, start: str) -> list[str]:
    (only,) = [text for text in page.splitlines() if text.startswith(start)]
    return [cell.strip() for cell in only.strip("|").split("|")]


def test_the_page_has_a_line_for_each_table_and_marks_lbproxys_own_size(found: results.Results) -> None:
    page = report.page(found)
    assert line(page, "| 100 |") == [
        "100", "**16,381**", "6.00 (5.50 – 6.50)", "1.001", "0.995", "1.003", "0.997",
        "1.50% (2.00%)", "", "", "",
    ]  # fmt: skip
    assert line(page, "| 1,000 |")[7:] == ["0.10% (0.10%)", "2.00% (3.00%)", "3.00% (3.00%)", "5.00% (5.00%)"]
    assert line(page, "| 41 → 40 |") == ["41 → 40", "16,381 → 4,093", "**97.5%** (97.6%)"]


def test_the_papers_figures_stand_beside_those_of_the_same_table(found: results.Results) -> None:
    page = report.page(found)
    assert line(page, "| most − least")[1:] == ["at most 1% (section 3.4)", "at most 0.60%"]
    assert line(page, "| most loaded backend above")[2] == "0.7%"
    assert line(page, "| build |")[1:] == ["1.8 ms", "30.0 ms"]
    # A tenth left, and of the rest a twentieth moved: 0.1 + 0.9 × 0.05.
    assert line(page, "| slots that change")[2] == "2.98%, 7.85%, 14.5%"


def test_a_run_that_has_only_begun_has_what_there_is(found: results.Results) -> None:
    found.maglev, found.maglev_resized = found.maglev[:1], []
    page = report.page(found)
    assert "### Maglev" in page
    assert "→ 40" not in page
    assert "| build |" not in page
    found.maglev = []
    assert "### Maglev" not in report.page(found)


def test_the_file_keeps_every_sample(found: results.Results, tmp_path: pathlib.Path) -> None:
    results.write(found, tmp_path / "run.json")
    assert results.read(tmp_path / "run.json") == found


def test_there_is_a_step_for_each_number_of_backends(
    found: results.Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maglev, "BACKENDS", (3, 20))
    monkeypatch.setattr(maglev, "SIZES", (251,))
    found.maglev, found.maglev_resized = [], []
    steps = maglev.steps(2, found)
    assert all(isinstance(step, progress.Step) and step.expected_s > 0 for step in steps)
    said = [step.action() for step in steps]
    assert [(each.backends, each.slots) for each in found.maglev] == [
        (3, 251), (3, 1_021), (20, 251), (20, 4_093),
    ]  # fmt: skip
    assert [each.backends for each in found.maglev_resized] == [3, 11]
    assert said[0].startswith("1,021 slots in ")
    assert maglev_rows.section(found)
