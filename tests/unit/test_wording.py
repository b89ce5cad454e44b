"""What is said of many things."""

import pytest

from lbproxy.core import wording


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], ""),
        (["a"], "a"),
        (["a", "b"], "a, b"),
        (["a", "b", "c"], "a, b and 1 more"),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, "a, b and 2 more"),
    ],
)
def test_of_many_names_a_few_are_said(names: list[str] | dict[str, int], said: str) -> None:
    assert wording.few(names, 2) == said


def test_of_many_lines_the_first_are_and_no_other_is_made() -> None:
    made = iter("abcd")
    assert list(wording.first(made, 4, 2, "letters")) == ["a", "b", "and 2 more letters"]
    assert next(made) == "c"
    assert list(wording.first("ab", 2, 2, "letters")) == ["a", "b"]


def test_what_others_have_written_has_an_end_and_no_other_characters() -> None:
    assert wording.quote("é\n") == r"'\xe9\n'"
    assert wording.quote("x" * 78) == f"'{'x' * 78}'"
    assert wording.quote("x" * 79) == f"'{'x' * 75}..."
