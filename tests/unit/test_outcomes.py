"""Counts of what became of connections."""

from hypothesis import given
from hypothesis import strategies as st

from lbproxy import abi
from lbproxy.core import outcomes, tables
from lbproxy.kernel import fake
from tests import installing

_COUNTS = st.integers(0, 2**32 - 1)
_GAINS = st.integers(0, 2**31)


def made(*numbers: int) -> outcomes.Outcomes:
    return outcomes.Outcomes._make(numbers)


@given(st.lists(_COUNTS, min_size=5, max_size=5), st.lists(_GAINS, min_size=5, max_size=5), _GAINS)
def test_what_was_counted_since_is_right_across_a_wrap(then: list[int], more: list[int], us: int) -> None:
    now = [(count + gain) % 2**32 for count, gain in zip(then, more, strict=True)]
    since = made(us + 7, *now, 12).since(made(7, *then, 99))
    assert since == made(us, *more, 12)


def test_sums() -> None:
    fared = outcomes.Outcomes(6_000, established=3, refused=1, unanswered=2, resets=4, lost=8)
    assert (fared.failed, fared.attempts, fared.handshake_s) == (15, 6, 0.002)
    assert outcomes.Outcomes().handshake_s == 0


def test_rows_are_read_by_backend() -> None:
    maps = fake.FakeMaps(installing.SIZES)
    fared = outcomes.Outcomes(1, 2, 3, 4, 5, 6, 7)
    row = abi.LAYOUTS["backend_health"].pack(*fared)
    here, elsewhere = outcomes.keys(9)
    maps.apply([tables.Put(tables.Table.BACKEND_HEALTH, here, row)])
    assert outcomes.of_backend(maps, 9) == outcomes.Fared(node=fared)
    assert outcomes.of_backend(maps, 8) == outcomes.Fared()
    assert outcomes.every(maps) == {9: outcomes.Fared(node=fared)}
    maps.apply([tables.Put(tables.Table.BACKEND_HEALTH, elsewhere, row)])
    assert outcomes.of_node(maps, 9) == fared
    assert outcomes.of_backend(maps, 9) == outcomes.Fared(fared, fared)
    assert outcomes.every(maps) == {9: outcomes.Fared(fared, fared)}
    assert outcomes.Fared(fared, fared).everyone == outcomes.Outcomes(2, 4, 6, 8, 10, 12, 7)
    assert outcomes.Fared(elsewhere=fared).everyone == fared


def test_counts_that_went_back_are_told_from_those_that_wrapped() -> None:
    assert made(0, 5, 5, 5, 5, 5, 0).is_before(made(0, 5, 5, 6, 5, 5, 0))
    assert not made(0, 5, 5, 5, 5, 5, 0).is_before(made(9, 5, 5, 4, 2**32 - 1, 5, 9))
