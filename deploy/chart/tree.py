"""Kubernetes objects with holes, written as Helm templates.

An object is the nested dicts and lists that YAML makes of it. In places stand the nodes below instead of
values; what surrounds them is written as it is.
"""

import dataclasses
import typing
from collections.abc import Iterable, Iterator

import yaml

Tree = typing.Any  # dict, list, a scalar, or a node


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """A scalar that an expression makes, e.g. `include "lbproxy.image" .`."""

    expression: str


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """Lines of YAML that an expression makes, below their key."""

    expression: str


@dataclasses.dataclass(frozen=True, slots=True)
class Literal:
    """A text of many lines that an expression makes: a file in a ConfigMap."""

    expression: str


@dataclasses.dataclass(frozen=True, slots=True)
class When:
    """A value that is there, with its key or as an item of a list, only where a condition holds."""

    condition: str
    value: Tree


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """More entries, from a value that may be empty, for the mapping it is a key of or the list it is in."""

    value: str


@dataclasses.dataclass(frozen=True, slots=True)
class Lines:
    """More entries for the mapping that it is the key of, from an expression."""

    expression: str


def write(tree: Tree) -> str:
    """The template of an object."""
    return "".join(f"{line}\n" for line in _lines(tree, 0))


def scalar(value: object) -> str:
    """A number, a string, true or null, on one line of YAML."""
    text: str = yaml.safe_dump(value, width=10**6, allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...")
    assert "\n" not in text and "{{" not in text, f"no scalar that a template can hold: {text}"  # noqa: PT018
    return text


def _lines(tree: Tree, depth: int) -> Iterator[str]:
    if isinstance(tree, list):
        for item in tree:
            match item:
                case When(condition, value):
                    yield from _between(f"if {condition}", _item(value, depth), depth)
                case Spread(value):
                    yield from _spread(value, depth)
                case _:
                    yield from _item(item, depth)
        return
    for key, value in tree.items():
        match key, value:
            case Spread(more), _:
                yield from _spread(more, depth)
            case Lines(expression), _:
                yield f"{' ' * depth}{{{{- {expression} | nindent {depth} }}}}"
            case _, When(condition, inner):
                yield from _between(f"if {condition}", _entry(key, inner, depth), depth)
            case _:
                yield from _entry(key, value, depth)


def _spread(value: str, depth: int) -> Iterator[str]:
    inner = f"{' ' * depth}{{{{- toYaml . | nindent {depth} }}}}"
    yield from _between(f"with {value}", [inner], depth)


def _between(opening: str, lines: Iterable[str], depth: int) -> Iterator[str]:
    pad = " " * depth
    yield f"{pad}{{{{- {opening} }}}}"
    yield from lines
    yield f"{pad}{{{{- end }}}}"


def _entry(key: str, value: Tree, depth: int) -> Iterator[str]:
    start = f"{' ' * depth}{scalar(key)}:"
    match value:
        case Text(expression):
            yield f"{start} {{{{ {expression} }}}}"
        case Block(expression):
            yield start
            yield f"{' ' * (depth + 2)}{{{{- {expression} | nindent {depth + 2} }}}}"
        case Literal(expression):
            yield f"{start} |"
            yield f"{' ' * (depth + 2)}{{{{- {expression} | nindent {depth + 2} }}}}"
        case dict() | list() if value:
            yield start
            yield from _lines(value, depth + 2)
        case _:
            yield f"{start} {scalar(value)}"


def _item(value: Tree, depth: int) -> Iterator[str]:
    pad = " " * depth
    if isinstance(value, Text):
        yield f"{pad}- {{{{ {value.expression} }}}}"
        return
    if not (isinstance(value, dict | list) and value):
        yield f"{pad}- {scalar(value)}"
        return
    first, *others = _lines(value, depth + 2)
    assert not first.lstrip().startswith("{{"), f"an item that begins with an action: {first}"
    yield f"{pad}- {first[depth + 2 :]}"
    yield from others
