"""What is made of the table of values: values.yaml, its schema, and the table of the README."""

import textwrap
import typing
from collections.abc import Iterator

import yaml

from deploy.chart import schema
from deploy.chart.values import Value

_WIDTH: typing.Final = 108


def values_yaml(values: list[Value]) -> str:
    """The text of values.yaml."""
    return "# Made by `make chart`. README.md has the same as a table.\n" + "".join(
        f"{line}\n" for line in _yaml(_nested(values), 0)
    )


Nested = dict[str, typing.Any]  # of Nested and Value


def _nested(values: list[Value]) -> Nested:
    root: Nested = {}
    for value in values:
        *parents, last = value.path.split(".")
        place = root
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return root


def _yaml(nested: Nested, depth: int) -> Iterator[str]:
    pad = " " * depth
    for key, value in nested.items():
        if not depth:
            yield ""
        if isinstance(value, Value):
            yield from _comment(value.help, depth)
            text = yaml.safe_dump({key: value.default}, sort_keys=False, width=_WIDTH, allow_unicode=True)
            yield from (f"{pad}{line}" for line in text.splitlines())
            for line in value.more:
                yield from _comment(line, depth + 2, hanging="  ")
        else:
            yield f"{pad}{key}:"
            yield from _yaml(value, depth + 2)


def _comment(text: str, depth: int, hanging: str = "") -> Iterator[str]:
    start = f"{' ' * depth}# "
    yield from textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=start,
        subsequent_indent=start + hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def values_schema(values: list[Value], kubernetes: schema.Kubernetes) -> str:
    """The text of values.schema.json."""
    found: schema.Schema = {
        "$schema": schema.DIALECT,
        "title": "Values of the lbproxy chart",
        **_schema(_nested(values)),
        "definitions": {
            "KubeProxyConfiguration": schema.kube_proxy_settings(),
            "LbproxyConfiguration": schema.own_settings(),
            **kubernetes.definitions,
        },
    }
    # What helm itself puts there for charts that have this one below them.
    found["properties"]["global"] = {"type": "object"}
    return schema.write(found)


def _schema(nested: Nested) -> schema.Schema:
    return schema.group(
        {
            key: {**({"description": value.help} if value.help else {}), **value.schema}
            if isinstance(value, Value)
            else _schema(value)
            for key, value in nested.items()
        }
    )


def table(values: list[Value]) -> str:
    """The values as a table of Markdown."""
    rows = [
        f"| `{value.path}` | {_cell(value.default)} | {value.help.replace('|', chr(92) + '|')} |"
        for value in values
    ]
    return "\n".join(("| value | default | meaning |", "|---|---|---|", *rows)) + "\n"


def _cell(default: object) -> str:
    text = yaml.safe_dump(default, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...")
    return "" if default in ("", {}, []) else f"`{text}`"
