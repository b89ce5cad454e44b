"""A manifest file's bytes → events: YAML of many documents, JSON, Lists of either.

Documents are cut apart before they are parsed, and those that have not changed
since the last time are not parsed again: YAML takes 0.2 ms a document.
"""

import hashlib
import re
import typing
from collections.abc import Iterator, Mapping

import msgspec
import yaml

from lbproxy.core import decode, events, identity
from lbproxy.kube import credentials

# The API group of each kind: elsewhere the same name means something else.
GROUPS = {events.Kind.SERVICE: "", events.Kind.ENDPOINT_SLICE: "discovery.k8s.io", events.Kind.NODE: ""}

_DOCUMENT_START = re.compile(rb"^(?=---(?:\s|$))", re.MULTILINE)
# The parser calls itself for each level of nesting and has no bound of its own.
DEEPEST = 400  # levels; an object of the API has about twenty
# No line that starts with less than this, no more brackets than this: not too deep, which saves counting.
_SHALLOW = DEEPEST // 4
_DEEP_INDENT = re.compile(rb"[ \t\0?:-]{%d}" % _SHALLOW)
_DIRECTIVE = re.compile(rb"^%", re.MULTILINE)
# What constructors raise for a scalar that is not what its tag says: `!!bool x`, `!!int ""`, …
_UNCONSTRUCTIBLE = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_BYTE_OFFSET = re.compile(r"\(byte (\d+)\)")


class Malformed(ValueError):  # noqa: N818
    """A file can not be parsed; the text names the line."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(credentials.one_line(f"line {line}: {reason}"))


class Item(typing.NamedTuple):
    """An object of a document; `event` is None where its kind is none that lbproxy reads."""

    kind: str
    event: events.Upsert | events.Rejected | None


class Document(typing.NamedTuple):
    """A document of a file: the line it starts on, counted from 1, and what is in it."""

    line: int
    items: tuple[Item, ...]


Cache = Mapping[bytes, tuple[Item, ...]]


class Loaded(typing.NamedTuple):
    """A file's documents, and what to hand to the next `load` of the same file."""

    documents: tuple[Document, ...]
    cache: Cache


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Leaves timestamps the strings that the API has them as."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


class _ListHead(msgspec.Struct):
    kind: typing.Any = None
    items: list[msgspec.Raw] | None = None  # of YAML: what the parser made of each


def load(data: bytes, *, json: bool, cache: Cache) -> Loaded:
    """Parse and decode a file; raises `Malformed` where any part of it can not be parsed."""
    try:
        return _load(data, json=json, cache=cache)
    except RecursionError as error:
        raise Malformed(1, "nested too deeply, or in itself") from error


def _load(data: bytes, *, json: bool, cache: Cache) -> Loaded:
    if json or data.lstrip()[:1] in (b"{", b"["):
        try:
            documents = [Document(1, tuple(_items(raw, ""))) for raw in _json_values(data)]
            return Loaded(tuple(documents), {})
        except Malformed:
            # YAML may start with a brace too.
            if json:
                raise
    documents = []
    parsed: dict[bytes, tuple[Item, ...]] = {}
    line = 1
    for piece in [data] if _DIRECTIVE.search(data) else _DOCUMENT_START.split(data):
        digest = hashlib.blake2b(piece, digest_size=16).digest()
        items = cache.get(digest) or parsed.get(digest)
        if items is None:
            items = tuple(_yaml_items(piece, line))
        parsed[digest] = items
        documents.append(Document(line, items))
        line += piece.count(b"\n")
    return Loaded(tuple(documents), parsed)


def _json_values(data: bytes) -> list[msgspec.Raw]:
    """Return the file's value, or its values where each stands on a line of its own."""
    decoder = msgspec.json.Decoder(msgspec.Raw)
    try:
        return [decoder.decode(data)]
    except (msgspec.MsgspecError, RecursionError) as error:
        try:
            return decoder.decode_lines(data)
        except (msgspec.MsgspecError, RecursionError):
            offset = _BYTE_OFFSET.search(str(error))
            line = data.count(b"\n", 0, int(offset[1])) + 1 if offset else 1
            raise Malformed(line, f"malformed JSON: {error}") from error


def _yaml_items(piece: bytes, first_line: int) -> Iterator[Item]:
    try:
        for value in _yaml_values(piece, first_line):
            yield from _items(value, "")
    except RecursionError as error:
        raise Malformed(first_line, "malformed YAML: nested too deeply, or in itself") from error


def _yaml_values(piece: bytes, first_line: int) -> list[typing.Any]:
    try:
        if _may_be_deep(piece):
            _check_depth(piece)
        return [value for value in yaml.load_all(piece, Loader=_Loader) if value is not None]
    except yaml.MarkedYAMLError as error:
        line = first_line + (error.problem_mark.line if error.problem_mark else 0)
        raise Malformed(line, f"malformed YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line = first_line + piece.count(b"\n", 0, error.position)
        raise Malformed(line, f"malformed YAML: {error.reason}") from error
    except _UNCONSTRUCTIBLE as error:
        told = isinstance(error, yaml.YAMLError | ValueError)
        reason = str(error) if told else "a value that its tag does not allow"
        raise Malformed(first_line, f"malformed YAML: {reason}") from error


def _may_be_deep(piece: bytes) -> bool:
    """Whether the nesting has to be counted: a bracket opens two levels at most, so does a column."""
    return piece.count(b"[") + piece.count(b"{") >= _SHALLOW or _DEEP_INDENT.search(piece) is not None


def _check_depth(piece: bytes) -> None:
    depth = 0
    for event in yaml.parse(piece, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                mark: typing.Any = event.start_mark
                reason = f"nested too deeply: more than {DEEPEST} levels"
                raise yaml.MarkedYAMLError(problem=reason, problem_mark=mark)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _items(value: typing.Any, listed_as: str) -> Iterator[Item]:
    """Decode an object, or each of a List's; `listed_as` is the kind of a typed list around it."""
    if not isinstance(value, dict | list) and _first_byte(value) not in (b"{", b"["):
        name = events.ObjectName("", identity.UNNAMED)
        yield Item("", events.Rejected(events.Kind.MANIFEST, name, "a document that is not an object"))
        return
    listed = _listed(value)
    if listed is None:
        yield _item(value, listed_as)
        return
    for item in listed.items or ():
        yield from _items(item, listed.kind.removesuffix("List"))


def _first_byte(value: typing.Any) -> bytes:
    return bytes(memoryview(value)[:64]).lstrip()[:1] if isinstance(value, msgspec.Raw) else b""


def _listed(value: typing.Any) -> _ListHead | None:
    """Return what a List, a typed list or an array holds, None for anything else."""
    try:
        if isinstance(value, list):
            return _ListHead("List", value)
        if isinstance(value, dict):
            head = _ListHead(value.get("kind"), value.get("items"))
        elif _first_byte(value) == b"[":
            return _ListHead("List", msgspec.json.decode(value, type=list[msgspec.Raw]))
        else:
            head = msgspec.json.decode(value, type=_ListHead)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    named_so = isinstance(head.kind, str) and head.kind.endswith("List")
    return head if named_so and isinstance(head.items, list) else None


def _item(value: identity.Source, listed_as: str) -> Item:
    who = identity.identify(value, listed_as)
    group, slash, _ = who.api_version.partition("/")
    if who.kind not in GROUPS or (
        who.api_version and GROUPS[events.Kind(who.kind)] != (group if slash else "")
    ):
        return Item(f"{who.api_version} {who.kind}".strip(), None)
    try:
        return Item(who.kind, decode.written(who.kind, value))
    except decode.DecodeError as error:
        return Item(who.kind, error.event)
