"""What `helm template` makes of the chart in deploy/helm, as far as that uses Go's templates.

Not helm, which no package index has from its makers. Whatever is not known here fails, and so does what
helm's own engine does oddly: a number that is printed may come out as 1e+06 there. Where a real helm is at
hand, `unit/test_chart_helm.py` compares.
"""

import copy
import dataclasses
import hashlib
import json
import pathlib
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence

import jsonschema
import yaml

Value = typing.Any
Values = dict[str, Value]


class ChartError(Exception):
    """A template that can not be rendered, or values that it refuses."""


class _Strict(yaml.CSafeLoader):
    """Refuses a key that is given twice, as API servers do."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[typing.Hashable, Value]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise ChartError(f"a key twice in {keys}")
        return super().construct_mapping(node, deep)


def load(text: str) -> list[Values]:
    """The documents of YAML text, each key once."""
    return [document for document in yaml.load_all(text, _Strict) if document is not None]


class Chart:
    """A chart's folder."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        (self.about,) = load((folder / "Chart.yaml").read_text())
        (self.defaults,) = load((folder / "values.yaml").read_text())
        self.schema: Values = json.loads((folder / "values.schema.json").read_text())
        self.definitions: dict[str, Sequence[Node]] = {}
        self.bodies: dict[str, Sequence[Node]] = {}
        for path in sorted((folder / "templates").iterdir()):
            self.bodies[path.name] = _Parser(path.read_text(), self.definitions).body()

    def values(self, given: Mapping[str, Value]) -> Values:
        """The values that templates see; raises ChartError with each that the schema refuses."""
        found = coalesce(self.defaults, given)
        refused = jsonschema.Draft7Validator(self.schema).iter_errors(found)
        told = [f"at '/{'/'.join(map(str, each.absolute_path))}': {each.message}" for each in refused]
        if told:
            raise ChartError("\n".join(told))
        return found

    def render(
        self, given: Mapping[str, Value], name: str = "lbproxy", namespace: str = "kube-system"
    ) -> dict[str, str]:
        """The text that each template comes to, by its file."""
        data = _Known(
            Values=self.values(given),
            Chart=_Known(
                Name=self.about["name"], Version=self.about["version"], AppVersion=self.about["appVersion"]
            ),
            Release=_Known(Name=name, Namespace=namespace, Service="Helm"),
            Files=_Known(Get=lambda path: (self.folder / path).read_text()),
        )
        return {
            file: _Run(self.definitions, data).text(body)
            for file, body in self.bodies.items()
            if not file.startswith("_")
        }

    def objects(
        self, given: Mapping[str, Value], name: str = "lbproxy", namespace: str = "kube-system"
    ) -> list[Values]:
        """The objects that helm would send."""
        texts = self.render(given, name, namespace)
        return [each for file, text in texts.items() if file.endswith(".yaml") for each in load(text)]


def coalesce(defaults: Mapping[str, Value], given: Mapping[str, Value]) -> Values:
    """Lay what is given over the defaults; null takes a default away."""
    found = copy.deepcopy(dict(defaults))
    for key, value in given.items():
        if value is None and key in found:
            del found[key]
        elif isinstance(value, Mapping) and isinstance(found.get(key), dict):
            found[key] = coalesce(found[key], value)
        else:
            found[key] = copy.deepcopy(value)
    return found


# --- reading templates ---


@dataclasses.dataclass(frozen=True, slots=True)
class Words:
    """Text between actions."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Print:
    """An expression whose value is printed."""

    expression: "Expression"


@dataclasses.dataclass(frozen=True, slots=True)
class Set:
    """`$name := expression`."""

    name: str
    expression: "Expression"


@dataclasses.dataclass(frozen=True, slots=True)
class Branch:
    """`if` and `with`."""

    moves: bool  # with: the dot is the value
    condition: "Expression"
    body: Sequence["Node"]
    otherwise: Sequence["Node"]


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """`range $key, $value := expression`, over a mapping."""

    key: str
    value: str
    expression: "Expression"
    body: Sequence["Node"]


Node = Words | Print | Set | Branch | Range


@dataclasses.dataclass(frozen=True, slots=True)
class Constant:
    """A string, number, true or false."""

    value: Value


@dataclasses.dataclass(frozen=True, slots=True)
class Path:
    """`.a.b`, `$x.a`, `$`; with `start` None from the dot."""

    start: str | None
    fields: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A function, or what a path leads to, with arguments."""

    callee: "str | Path"
    arguments: tuple["Expression", ...]


Expression = Constant | Path | Call

_ACTION: typing.Final = re.compile(
    r"(?:\s*\{\{-(?=\s)|\{\{)\s*(/\*.*?\*/|(?:\"(?:\\.|[^\"\\])*\"|[^}\"])*?)\s*(?:(?<=\s)-\}\}\s*|\}\})",
    re.DOTALL,
)
_TOKEN: typing.Final = re.compile(
    r'\s*(?:(?P<string>"(?:\\.|[^"\\])*")|(?P<number>-?[0-9]+(?![\w.]))|(?P<sign>:=|[|(),])'
    r"|(?P<path>(?:\$\w*|(?=\.))(?:\.\w+)*\.?)|(?P<word>[A-Za-z]\w*))"
)


class _Parser:
    """Reads one file; its `define`s go to `definitions`."""

    def __init__(self, text: str, definitions: dict[str, Sequence[Node]]) -> None:
        self._pieces = list(self._split(text))
        self._at = 0
        self._definitions = definitions

    @staticmethod
    def _split(text: str) -> Iterator[Words | str]:
        """Text and the insides of actions, in turn."""
        end = 0
        for found in _ACTION.finditer(text):
            yield Words(text[end : found.start()])
            yield found[1].strip()
            end = found.end()
        rest = text[end:]
        if "{{" in rest or "}}" in rest:
            raise ChartError(f"an action that can not be read: {rest[:80]}")
        yield Words(rest)

    def body(self) -> Sequence[Node]:
        """The whole file."""
        nodes, end = self._until()
        if end:
            raise ChartError(f"{end} without a beginning")
        return nodes

    def _until(self) -> tuple[Sequence[Node], str]:
        """Nodes up to `end` or `else`, and which it was; "" at the end of the file."""
        nodes: list[Node] = []
        while self._at < len(self._pieces):
            piece = self._pieces[self._at]
            self._at += 1
            if isinstance(piece, Words):
                nodes.append(piece)
            elif piece in ("end", "else"):
                return nodes, piece
            elif not piece.startswith("/*"):
                node = self._action(piece)
                nodes += [node] if node else []
        return nodes, ""

    def _action(self, text: str) -> Node | None:
        keyword, _, rest = text.partition(" ")
        match keyword:
            case "define":
                self._definitions[json.loads(rest)] = self._block()
                return None
            case "if" | "with":
                condition = _Tokens(rest).whole()
                body, end = self._until()
                otherwise = self._block() if end == "else" else []
                if not end:
                    raise ChartError(f"{text}: no end")
                return Branch(keyword == "with", condition, body, otherwise)
            case "else":
                raise ChartError(f"not known here: {text}")
            case "range":
                names, _, of = rest.partition(":=")
                key, value = (name.strip() for name in names.split(","))
                return Range(key, value, _Tokens(of).whole(), self._block())
        if declared := re.match(r"(\$\w+)\s*:=", text):
            return Set(declared[1], _Tokens(text[declared.end() :]).whole())
        return Print(_Tokens(text).whole())

    def _block(self) -> Sequence[Node]:
        body, end = self._until()
        if end != "end":
            raise ChartError(f"a block ends with {end or 'the file'}")
        return body


class _Tokens:
    """Reads the expression of an action."""

    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        end = 0
        while text[end:].strip():
            found = _TOKEN.match(text, end)
            if not found or not found.lastgroup:
                raise ChartError(f"not known in a template: {text[end:]}")
            self._tokens.append((found.lastgroup, found[found.lastgroup]))
            end = found.end()

    def whole(self) -> Expression:
        """The expression, which has to be all there is."""
        found = self._pipeline()
        if self._tokens:
            raise ChartError(f"left over: {self._tokens}")
        return found

    def _pipeline(self) -> Expression:
        found = self._command()
        while self._tokens and self._tokens[0] == ("sign", "|"):
            self._tokens.pop(0)
            after = self._command()
            if isinstance(after, Constant) or (isinstance(after, Path) and after.start is None):
                raise ChartError(f"a pipe into {after}")
            callee, arguments = (after.callee, after.arguments) if isinstance(after, Call) else (after, ())
            found = Call(callee, (*arguments, found))
        return found

    def _command(self) -> Expression:
        kind, text = self._tokens[0] if self._tokens else ("", "nothing")
        callee: str | Path
        if kind == "word" and text not in ("true", "false"):
            self._tokens.pop(0)
            callee = text
        else:
            first = self._operand()
            if not isinstance(first, Path):
                return first
            callee = first
        arguments = []
        while self._tokens and self._tokens[0] not in (("sign", "|"), ("sign", ")")):
            arguments.append(self._operand())
        if isinstance(callee, Path) and not arguments:
            return callee
        return Call(callee, tuple(arguments))

    def _operand(self) -> Expression:
        if not self._tokens:
            raise ChartError("an action without an expression")
        kind, text = self._tokens.pop(0)
        match kind, text:
            case "string", _:
                return Constant(json.loads(text))
            case "number", _:
                return Constant(int(text))
            case "word", ("true" | "false"):
                return Constant(text == "true")
            case "word", _:
                return Call(text, ())
            case "path", _:
                start, *fields = text.split(".")
                return Path(start or None, tuple(filter(None, fields)))
            case "sign", "(":
                inner = self._pipeline()
                if not self._tokens or self._tokens.pop(0) != ("sign", ")"):
                    raise ChartError("a bracket is not closed")
                return inner
        raise ChartError(f"not known here: {text}")


# --- running them ---


class _Known(dict[str, Value]):
    """What helm gives templates: a name that is not in it is an error, unlike in values."""

    def __missing__(self, key: str) -> Value:
        raise ChartError(f"not known here: .{key}")


class _Int(int):
    """A whole number that `int` has made, which prints as one."""


class _Run:
    """One run of a template with its data."""

    def __init__(self, definitions: Mapping[str, Sequence[Node]], data: Value) -> None:
        self._definitions = definitions
        self._data = data

    def text(self, body: Sequence[Node]) -> str:
        """What a body prints."""
        return "".join(self._nodes(body, self._data, {"$": self._data}))

    def _nodes(self, body: Sequence[Node], dot: Value, outer: Mapping[str, Value]) -> Iterator[str]:
        names = dict(outer)
        for node in body:
            match node:
                case Words(text):
                    yield text
                case Print(expression):
                    yield _printed(self._value(expression, dot, names))
                case Set(name, expression):
                    names[name] = self._value(expression, dot, names)
                case Branch(moves, condition, inside, otherwise):
                    value = self._value(condition, dot, names)
                    if value or isinstance(value, _Known):
                        yield from self._nodes(inside, value if moves else dot, names)
                    else:
                        yield from self._nodes(otherwise, dot, names)
                case Range(key, value_name, expression, inside):
                    found = self._value(expression, dot, names) or {}
                    if not isinstance(found, dict):
                        raise ChartError(f"a range over {found!r}")
                    for each in sorted(found):
                        yield from self._nodes(
                            inside, found[each], {**names, key: each, value_name: found[each]}
                        )

    def _value(self, expression: Expression, dot: Value, names: Mapping[str, Value]) -> Value:
        match expression:
            case Constant(value):
                return value
            case Path(start, fields):
                if start is not None and start not in names:
                    raise ChartError(f"no variable {start}")
                return _follow(dot if start is None else names[start], fields)
            case Call(callee, arguments):
                given = [self._value(each, dot, names) for each in arguments]
                if isinstance(callee, Path):
                    called = self._value(callee, dot, names)
                    if not callable(called):
                        raise ChartError(f"{callee} takes no arguments")
                    return called(*given)
                if callee == "include":
                    name, data = given
                    if name not in self._definitions:
                        raise ChartError(f"no template {name!r}")
                    return _Run(self._definitions, data).text(self._definitions[name])
                if callee not in _FUNCTIONS:
                    raise ChartError(f"no function {callee} here")
                return _FUNCTIONS[callee](*given)


def _follow(value: Value, fields: Sequence[str]) -> Value:
    for field in fields:
        if not isinstance(value, dict):
            raise ChartError(f"nil pointer or no mapping: .{field} of {value!r}")
        value = value[field] if isinstance(value, _Known) else value.get(field)
    return value


def _printed(value: Value) -> str:
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case str():
            return value
        case _Int():
            return str(value)
    raise ChartError(f"printed as it is: {value!r}; say toYaml, int or quote")


def _to_yaml(value: Value) -> str:
    text: str = yaml.dump(value, Dumper=yaml.CSafeDumper, sort_keys=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _from_yaml(text: str) -> Values:
    (found,) = load(text) or [{}]
    return found


def _indent(width: int, text: str) -> str:
    return " " * width + text.replace("\n", "\n" + " " * width)


def _format(text: str, *given: str) -> str:
    if re.sub("%s", "", text).count("%") or not all(isinstance(each, str) for each in given):
        raise ChartError(f"a printf of more than strings: {text}")
    return text % given


def _quote(value: Value) -> str:
    return json.dumps(_printed(value), ensure_ascii=False)


def _required(text: str, value: Value) -> Value:
    if value in (None, ""):
        raise ChartError(text)
    return value


def _fail(text: str) -> str:
    raise ChartError(text)


def _set(mapping: Values, key: str, value: Value) -> Values:
    mapping[key] = value
    return mapping


def _dict(*given: Value) -> Values:
    return dict(zip(given[::2], given[1::2], strict=True))


def _dig(*given: Value) -> Value:
    *keys, default, place = given
    for key in keys:
        if not isinstance(place, dict) or key not in place:
            return default
        place = place[key]
    return place


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[0] if found else ""


_FUNCTIONS: typing.Final[Mapping[str, Callable[..., Value]]] = {
    "toYaml": _to_yaml,
    "fromYaml": _from_yaml,
    "indent": _indent,
    "nindent": lambda width, text: "\n" + _indent(width, text),
    "printf": _format,
    "quote": _quote,
    "int": _Int,
    "default": lambda default, value=None: value or default,
    "required": _required,
    "fail": _fail,
    "set": _set,
    "dict": _dict,
    "dig": _dig,
    "ternary": lambda yes, no, which: yes if which else no,
    "omit": lambda mapping, *keys: {key: value for key, value in mapping.items() if key not in keys},
    "deepCopy": copy.deepcopy,
    "sha256sum": lambda text: hashlib.sha256(text.encode()).hexdigest(),
    "trunc": lambda length, text: text[:length],
    "replace": lambda before, after, text: text.replace(before, after),
    "trimSuffix": lambda suffix, text: text.removesuffix(suffix),
    "hasPrefix": lambda prefix, text: text.startswith(prefix),
    "regexFind": _find,
    "eq": lambda first, second: first == second,
    "ne": lambda first, second: first != second,
    "not": lambda value: not value,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
}
