"""The renderer of the tests does as helm does, and refuses what it does not know."""

import pathlib
import typing

import pytest

from deploy.chart import tree
from tests import helming

DATA: typing.Final = {
    "text": "a: b", "none": None, "empty": {}, "yes": True, "no": False, "count": 7, "list": ["x"],
    "inner": {"b": "2", "a": "1"},
}  # fmt: skip


def run(text: str, data: helming.Values = DATA) -> str:
    definitions: dict[str, typing.Any] = {}
    body = helming._Parser(text, definitions).body()
    return helming._Run(definitions, data).text(body)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("a {{ .text }} b", "a a: b b"),
        ("a {{- .text -}} b", "aa: bb"),
        ("a\n{{- /* nothing */ -}}\nb", "ab"),
        ("{{ .none }}{{ .yes }}{{ .no }}", "truefalse"),
        ('{{ "a}}b" }}', "a}}b"),
        ('{{ .missing | default "x" }}{{ .no | default true }}', "xtrue"),
        ("{{ .count | int }}", "7"),
        ("{{ if .empty }}a{{ else }}b{{ end }}{{ if .inner }}c{{ end }}", "bc"),
        ("{{ with .inner }}{{ .a }}{{ $.count | int }}{{ end }}{{ with .none }}x{{ end }}", "17"),
        ("{{ range $key, $value := .inner }}{{ $key }}{{ $value }} {{ end }}", "a1 b2 "),
        ("{{ range $key, $value := .none }}x{{ end }}", ""),
        ("{{ $x := .text }}{{ if .yes }}{{ $x := .list | toYaml }}{{ $x }}{{ end }}{{ $x }}", "- xa: b"),
        ("{{ toYaml .inner | nindent 2 }}", "\n  a: '1'\n  b: '2'"),
        ("{{ toYaml .empty }}", "{}"),
        ('{{ define "x" }}<{{ .a }}>{{ end }}{{ include "x" .inner }}', "<1>"),
        ('{{ (include "x" .) | quote }}{{ define "x" }}"{{ end }}', '"\\""'),
        ('{{ printf "%s-%s" .text (.count | int | quote) }}', 'a: b-"7"'),
        ('{{ and .yes .inner.a }}{{ or .no .none "z" }}{{ not .no }}{{ ne .text "a" }}', "1ztruetrue"),
        ('{{ dig "a" "x" .inner }}{{ dig "q" "x" .inner }}{{ dig "a" "b" "x" .inner }}', "1xx"),
        ('{{ $y := deepCopy .inner }}{{ $_ := set $y "a" "3" }}{{ $y.a }}{{ .inner.a }}', "31"),
    ],
)
def test_it_renders(text: str, printed: str) -> None:
    assert run(text) == printed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ .count }}", "printed as it is: 7"),
        ("{{ .inner }}", "printed as it is"),
        ("{{ .none.a }}", "nil pointer"),
        ("{{ .text.a }}", "no mapping"),
        ("{{ $x }}", "no variable"),
        ("{{ lookup .text }}", "no function lookup"),
        ('{{ include "x" . }}', "no template 'x'"),
        ("{{ if .yes }}", "no end"),
        ("{{ end }}", "without a beginning"),
        ("{{ if .yes }}{{ else if .no }}{{ end }}", "not known here: else if"),
        ("{{ .text", "can not be read"),
        ("{{ (.text }}", "not closed"),
        ("{{ 1.5 }}", "not known in a template"),
        ("{{ .text .text }}", "takes no arguments"),
        ('{{ .text | "x" }}', "a pipe into"),
        ('{{ printf "%d" .text }}', "printf of more than strings"),
        ('{{ required "say so" .none }}', "^say so$"),
        ('{{ fail "no" }}', "^no$"),
    ],
)
def test_it_refuses(text: str, said: str) -> None:
    with pytest.raises(helming.ChartError, match=said):
        run(text)


def test_a_key_twice_is_refused() -> None:
    with pytest.raises(helming.ChartError, match="a key twice"):
        helming.load("a: {b: 1, b: 2}")


def test_values_are_laid_over_defaults_as_helm_does() -> None:
    defaults = {"a": {"b": 1, "c": 2}, "list": [1], "gone": {"x": 1}}
    given: helming.Values = {"a": {"c": 3, "d": None}, "list": [], "gone": None}
    assert helming.coalesce(defaults, given) == {"a": {"b": 1, "c": 3, "d": None}, "list": []}
    assert defaults["a"] == {"b": 1, "c": 2}


# --- writing templates ---


def test_a_tree_is_written_as_a_template(tmp_path: pathlib.Path) -> None:
    written = tree.write(
        {
            "plain": ["- x", 1, None, {"a": [{"b": "yes"}], "c": {}}],
            "text": tree.Text(".text | quote"),
            "block": tree.Block("toYaml .inner"),
            "file": tree.Literal(".text"),
            "there": tree.When(".yes", {"a": 1}),
            "gone": tree.When(".no", {"a": 1}),
            "items": [tree.When(".no", {"a": 1}), tree.When(".yes", {"a": 1, "b": 2})],
            "more": [{"a": 1}, tree.Spread(".list"), tree.Spread(".empty")],
            "spread": {"z": 1, tree.Spread(".inner"): None, tree.Spread(".empty"): None},
            "lines": {tree.Lines("toYaml .inner"): None},
        }
    )
    assert helming.load(run(written)) == [
        {
            "plain": ["- x", 1, None, {"a": [{"b": "yes"}], "c": {}}],
            "text": "a: b",
            "block": {"a": "1", "b": "2"},
            "file": "a: b\n",
            "there": {"a": 1},
            "items": [{"a": 1, "b": 2}],
            "more": [{"a": 1}, "x"],
            "spread": {"z": 1, "a": "1", "b": "2"},
            "lines": {"a": "1", "b": "2"},
        }
    ]


@pytest.mark.parametrize("text", ["{{ .x }}", "two\nlines"])
def test_a_scalar_that_a_template_would_change_is_not_written(text: str) -> None:
    with pytest.raises(AssertionError, match="no scalar"):
        tree.scalar(text)
