"""The objects of the API server stand-in: versioned, selectable, with a history to watch.

Each object is kept as the bytes that are sent, so that a list of 30,000 is a
join and an event to many watchers is serialised once.
"""

import bisect
import typing
from collections.abc import Callable, Iterator

import msgspec


class Resource(typing.NamedTuple):
    """A kind of object and where the API serves it."""

    kind: str
    api_version: str
    plural: str
    namespaced: bool

    @property
    def root(self) -> str:
        """The path that the group's resources lie under."""
        return f"/api/{self.api_version}" if "/" not in self.api_version else f"/apis/{self.api_version}"


RESOURCES = {
    resource.plural: resource
    for resource in (
        Resource("Service", "v1", "services", True),
        Resource("EndpointSlice", "discovery.k8s.io/v1", "endpointslices", True),
        Resource("Node", "v1", "nodes", False),
        Resource("Pod", "v1", "pods", True),
        Resource("DaemonSet", "apps/v1", "daemonsets", True),
        Resource("ServiceCIDR", "networking.k8s.io/v1", "servicecidrs", False),
        Resource("Event", "events.k8s.io/v1", "events", True),
    )
}
PLURALS = {resource.kind: resource.plural for resource in RESOURCES.values()}

Object = dict[str, typing.Any]
Key = tuple[str, str]


class Stored(typing.NamedTuple):
    """An object as it is sent, and what selectors ask about it."""

    raw: bytes
    labels: dict[str, str]
    fields: dict[str, str]


class Change(typing.NamedTuple):
    """One step of a resource's history; `before` or `after` is None where there was no object."""

    version: int
    key: Key
    before: Stored | None
    after: Stored | None


class Gone(Exception):  # noqa: N818
    """The history that was asked for has been compacted away."""


class Conflict(Exception):  # noqa: N818
    """The object has changed since whoever wants to change it has seen it."""


class Selector(typing.NamedTuple):
    """A label and a field selector: `(key, operator, value)` each, all of which must hold."""

    labels: tuple[tuple[str, str, str], ...] = ()
    fields: tuple[tuple[str, str, str], ...] = ()

    def admits(self, stored: Stored | None) -> bool:
        """Whether there is an object and it is selected."""
        return (
            stored is not None
            and all(_holds(stored.labels, *term) for term in self.labels)
            and all(_holds(stored.fields, *term) for term in self.fields)
        )


def selector(labels: str, fields: str) -> Selector:
    """Parse `a=b,c!=d,e,!f`: equality, inequality, existence and absence. Raises `ValueError`."""
    return Selector(tuple(_terms(labels)), tuple(_terms(fields)))


def _terms(text: str) -> Iterator[tuple[str, str, str]]:
    for term in filter(None, text.split(",")):
        if "!=" in term:
            key, _, value = term.partition("!=")
            yield key, "!=", value
        elif "=" in term:
            key, _, value = term.partition("=")
            yield key, "=", value.removeprefix("=")
        elif term.startswith("!"):
            yield term[1:], "absent", ""
        elif " " in term or "(" in term:
            raise ValueError(f"selector term {term!r} is not understood")
        else:
            yield term, "present", ""


def _holds(values: dict[str, str], key: str, operator: str, value: str) -> bool:
    match operator:
        case "=":
            return values.get(key) == value
        case "!=":
            return values.get(key) != value
        case "absent":
            return key not in values
        case _:
            return key in values


class Store:
    """Objects of every resource under one growing version, and what changed since a version."""

    def __init__(self, history: int = 100_000) -> None:
        self.version = 1
        self.objects: dict[str, dict[Key, Stored]] = {plural: {} for plural in RESOURCES}
        self.watchers: dict[str, set[Callable[[Change], None]]] = {plural: set() for plural in RESOURCES}
        self._history: dict[str, list[Change]] = {plural: [] for plural in RESOURCES}
        self._compacted: dict[str, int] = dict.fromkeys(RESOURCES, 0)
        self._limit = history

    def put(self, obj: Object) -> Object:
        """Create or replace an object; returns it with its new version and uid."""
        resource = RESOURCES[PLURALS[obj["kind"]]]
        metadata = dict(obj.get("metadata") or {})
        if resource.namespaced:
            metadata.setdefault("namespace", "default")
        key = (metadata.get("namespace", "") if resource.namespaced else "", metadata["name"])
        self.version += 1
        metadata.setdefault("uid", f"uid-{resource.plural}-{'-'.join(filter(None, key))}")
        metadata["resourceVersion"] = str(self.version)
        if resource.plural == "daemonsets":
            before = self.objects["daemonsets"].get(key)
            was: Object = msgspec.json.decode(before.raw) if before else {"metadata": {}}
            changed = was.get("spec") != obj.get("spec")
            metadata["generation"] = was["metadata"].get("generation", 0) + changed
        # These two first: see `list_item`.
        head = {"apiVersion": obj.get("apiVersion", resource.api_version), "kind": obj["kind"]}
        obj = {**head, **obj, "metadata": metadata}
        self._record(resource.plural, key, _stored(obj))
        return obj

    def get(self, plural: str, key: Key) -> Object:
        """Return an object; `KeyError` where there is none."""
        found: Object = msgspec.json.decode(self.objects[plural][key].raw)
        return found

    def patch(self, plural: str, key: Key, merge: Object) -> Object:
        """Apply a JSON merge patch (RFC 7386) to an object; `KeyError` where there is none.

        Raises `Conflict` where the patch names another version than the object's.
        """
        found = self.get(plural, key)
        version = (merge.get("metadata") or {}).get("resourceVersion")
        if version not in (None, found["metadata"]["resourceVersion"]):
            raise Conflict
        return self.put(merged(found, merge))

    def delete(self, plural: str, key: Key) -> None:
        """Remove an object; `KeyError` where there is none."""
        obj = self.get(plural, key)
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        self._record(plural, key, None, _stored(obj))

    def plant(self, plural: str, key: Key, raw: bytes) -> None:
        """Store any bytes as an object, well formed or not, as a broken server would send them."""
        self.version += 1
        self._record(plural, key, Stored(raw, {}, {}))

    def compact(self) -> None:
        """Forget all history, so that a watch from any earlier version is refused with 410."""
        # A version that nobody has seen yet, or a watch from the last change would still be served.
        self.version += 1
        for plural, history in self._history.items():
            history.clear()
            self._compacted[plural] = self.version

    def since(self, plural: str, version: int) -> list[Change]:
        """Return the changes after a version. Raises `Gone` where they are no longer known."""
        if version < self._compacted[plural]:
            raise Gone
        history = self._history[plural]
        return history[bisect.bisect_right(history, version, key=lambda change: change.version) :]

    def _record(self, plural: str, key: Key, after: Stored | None, last: Stored | None = None) -> None:
        objects = self.objects[plural]
        # A deletion is sent with the object's last state under the version of the deletion.
        change = Change(self.version, key, last or objects.get(key), after)
        if after is None:
            del objects[key]
        else:
            objects[key] = after
        history = self._history[plural]
        history.append(change)
        if len(history) > self._limit:
            del history[: self._limit // 2]
            self._compacted[plural] = history[0].version - 1
        for tell in tuple(self.watchers[plural]):
            tell(change)


def list_item(resource: Resource, stored: Stored) -> bytes:
    """Return an object as it stands in a list: there, a real API server leaves its kind out."""
    head = f'{{"apiVersion":"{resource.api_version}","kind":"{resource.kind}",'.encode()
    return b"{" + stored.raw[len(head) :] if stored.raw.startswith(head) else stored.raw


def event_line(change: Change, chosen: Selector) -> bytes:
    """Return the line a watcher with this selector is sent, empty where it is not concerned.

    An object that begins or ceases to be selected is added or deleted, as far as the watcher can tell.
    """
    was, now = chosen.admits(change.before), chosen.admits(change.after)
    if now:
        assert change.after is not None
        return _line(b"MODIFIED" if was else b"ADDED", change.after.raw)
    if was:
        last = change.after or change.before
        assert last is not None
        return _line(b"DELETED", last.raw)
    return b""


def _line(kind: bytes, raw: bytes) -> bytes:
    return b'{"type":"' + kind + b'","object":' + raw + b"}\n"


def merged(target: typing.Any, patch: typing.Any) -> typing.Any:
    """Return the target with a JSON merge patch applied: null removes, objects merge, the rest replaces."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


def _stored(obj: Object) -> Stored:
    metadata = obj["metadata"]
    fields = {"metadata.name": metadata["name"], "metadata.namespace": metadata.get("namespace", "")}
    spec = obj.get("spec")
    if isinstance(spec, dict):
        fields["spec.clusterIP"] = str(spec.get("clusterIP", ""))
        fields["spec.type"] = str(spec.get("type", ""))
        fields["spec.nodeName"] = str(spec.get("nodeName", ""))
    fields["reason"] = str(obj.get("reason", ""))
    labels = metadata.get("labels")
    return Stored(msgspec.json.encode(obj), labels if isinstance(labels, dict) else {}, fields)
