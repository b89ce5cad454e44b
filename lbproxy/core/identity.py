"""What an API object is called, found even where the rest of it is malformed or cut off."""

import re
import typing

import msgspec

from lbproxy.core import events, wire

Source = bytes | bytearray | memoryview | msgspec.Raw | dict[str, typing.Any]
"""An object as the API server sent it (JSON), or as a YAML parser returned it."""

UNNAMED = "(unnamed)"  # no object can be called so

DEFAULT_NAMESPACE = "default"

_DECODER = msgspec.json.Decoder(wire.Object)
_METADATA = re.compile(rb'"metadata"\s*:\s*\{')
_SCANNED_BYTES = 4096
_LONGEST_NAME = 253


class Identity(typing.NamedTuple):
    """An object's name and version; fields that could not be found are empty, a name is `UNNAMED`."""

    api_version: str
    kind: str
    name: events.ObjectName
    uid: str
    resource_version: str


def identify(raw: Source, kind: str = "") -> Identity:
    """Name an object without decoding it, as well as its state allows; never fails.

    `kind` is what it is if it does not say so itself: the items of a list do not.
    """
    try:
        head = msgspec.convert(raw, wire.Object) if isinstance(raw, dict) else _DECODER.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        head = _from_mapping(raw) if isinstance(raw, dict) else _from_text(bytes(raw))
    metadata = head.metadata or wire.ObjectMeta()
    kind = _printable(head.kind) or kind
    namespace = "" if kind == events.Kind.NODE else _printable(metadata.namespace) or DEFAULT_NAMESPACE
    return Identity(
        _printable(head.api_version),
        kind,
        events.ObjectName(namespace, _printable(metadata.name) or UNNAMED),
        _printable(metadata.uid),
        _printable(metadata.resource_version),
    )


def _from_mapping(raw: dict[str, typing.Any]) -> wire.Object:
    metadata = raw.get("metadata")
    found = metadata if isinstance(metadata, dict) else {}
    return wire.Object(
        api_version=raw.get("apiVersion"),
        kind=raw.get("kind"),
        metadata=wire.ObjectMeta(
            found.get("name"), found.get("namespace"), found.get("uid"), found.get("resourceVersion")
        ),
    )


def _from_text(raw: bytes) -> wire.Object:
    """Pick fields out of what is not JSON; API servers write an object's name before its labels."""
    metadata = _METADATA.search(raw)
    tail = raw[metadata.end() :][:_SCANNED_BYTES] if metadata else b""
    return wire.Object(
        api_version=_scan(raw[:_SCANNED_BYTES], b"apiVersion"),
        kind=_scan(raw[:_SCANNED_BYTES], b"kind"),
        metadata=wire.ObjectMeta(
            _scan(tail, b"name"),
            _scan(tail, b"namespace"),
            _scan(tail, b"uid"),
            _scan(tail, b"resourceVersion"),
        ),
    )


def _scan(raw: bytes, field: bytes) -> str:
    found = re.search(rb'"%s"\s*:\s*"([^"]*)"' % field, raw)
    return found[1].decode(errors="replace") if found else ""


def _printable(value: object) -> str:
    """Text that is safe in one line of a log, whatever was in the object."""
    text = value if isinstance(value, str) else str(value) if isinstance(value, int) else ""
    return (text if text.isascii() and text.isprintable() else ascii(text)[1:-1])[:_LONGEST_NAME]
