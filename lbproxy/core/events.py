"""What a source of cluster state tells the core.

A source yields `Upsert` and `Delete` in any order and any number of times, and
`Synced` for each kind once its first complete list has been delivered. After a
relist it yields `Delete` for whatever is no longer listed. `Rejected` says that
an object could not be decoded: its last good version stays in force. `Accepted`
takes that back where neither an `Upsert` nor a `Delete` of the object does.
"""

import enum
import typing

from lbproxy.core import model


class Kind(enum.StrEnum):
    """A kind of API object that lbproxy watches."""

    SERVICE = "Service"
    ENDPOINT_SLICE = "EndpointSlice"
    NODE = "Node"
    MANIFEST = "Manifest"  # not of the API: a file of the manifests source, in `Rejected` alone


ObjectName = model.ObjectName


class Upsert(typing.NamedTuple):
    """An object is as given; `value` is None where lbproxy is to ignore it (headless, FQDN, …).

    `warnings` are one line each: what in the object was not as it should be, and
    what is done instead. `uid` is the object's where there are any, and empty otherwise.
    """

    kind: Kind
    name: ObjectName
    value: model.Service | model.EndpointSlice | model.Node | None
    warnings: tuple[str, ...] = ()
    uid: str = ""


class Delete(typing.NamedTuple):
    """An object no longer exists."""

    kind: Kind
    name: ObjectName


class Synced(typing.NamedTuple):
    """Every object of this kind that exists has been delivered."""

    kind: Kind


class Rejected(typing.NamedTuple):
    """An object could not be understood; `reason` is one line that names the field."""

    kind: Kind
    name: ObjectName
    reason: str
    uid: str = ""


def rejection(kind: str, name: object, reason: str) -> str:
    """A rejection in a line."""
    return f"{kind} {name} is rejected, and its last good version in force, if any: {reason}"


class Accepted(typing.NamedTuple):
    """What was rejected under this name is no more: it is as it was before, or was none."""

    kind: Kind
    name: ObjectName


Event = Upsert | Delete | Synced | Rejected | Accepted
