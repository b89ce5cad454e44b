"""Annotations of a Service that have lbproxy's prefix and are none of its own: typing errors, most likely.

Decoding keeps no annotation but those that are obeyed. So that it costs next to nothing, others are
looked for only in objects that have the prefix anywhere.
"""

import typing

import msgspec

from lbproxy.core import identity, wire
from lbproxy.core.wording import quote

PREFIX: typing.Final = "lbproxy.io/"
KNOWN: typing.Final = frozenset(
    field.encode_name for field in msgspec.structs.fields(wire.ServiceAnnotations)
)

SOUGHT: typing.Final = f'"{PREFIX}'.encode()
"""What JSON has in it where any key begins with the prefix."""

_COMPARED: typing.Final = 64  # characters of a key; what is longer is like none


class _Metadata(msgspec.Struct):
    annotations: dict[str, msgspec.Raw] | None = None


class _Annotated(msgspec.Struct):
    metadata: _Metadata


_DECODER: typing.Final = msgspec.json.Decoder(_Annotated)


def unknown(raw: identity.Source) -> list[str]:
    """Return the keys that lbproxy does not know, in their order. The object is one that can be decoded."""
    if isinstance(raw, dict):
        keys = list(raw["metadata"].get("annotations") or ())
    else:
        keys = list(_DECODER.decode(raw).metadata.annotations or ())
    return [key for key in keys if key.startswith(PREFIX) and key not in KNOWN]


def meant(key: str) -> str:
    """Return the annotation that a key may have been meant for, or nothing."""
    name = key.removeprefix(PREFIX)[:_COMPARED].lower()
    names = sorted(known.removeprefix(PREFIX) for known in KNOWN)
    import difflib  # noqa: PLC0415 - seldom needed

    return "".join(PREFIX + near for near in difflib.get_close_matches(name, names, 1, 0.7))


def warn(raw: identity.Source, warnings: list[str]) -> None:
    """Say what has lbproxy's prefix and is none of its annotations."""
    found = unknown(raw)
    if found:
        likely = meant(found[0])
        advice = f", did you mean {likely}?" if likely else ""
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        warnings.append(
            f"metadata.annotations[{quote(found[0])}]: unknown annotation{advice}{more}: passed over"
        )
