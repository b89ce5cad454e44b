"""API objects to model values: Services, EndpointSlices and Nodes, from JSON bytes or YAML mappings.

A decoder returns an `Upsert`, whose value is None for objects that a service
proxy is to ignore and whose warnings say what was passed over, or raises
`DecodeError` where there is no telling what the object means. What the API
server would default is defaulted here, so that manifests may be as short.
"""

import typing
from collections.abc import Callable, Mapping

import msgspec

from lbproxy.core import (
    decode_node,
    decode_service,
    decode_slice,
    events,
    fields,
    identity,
    unknown_annotations,
    wire,
)
from lbproxy.core.wording import quote


class DecodeError(ValueError):
    """An object could not be understood; `reason` is one line that names the field."""

    def __init__(self, kind: events.Kind, name: events.ObjectName, reason: str, uid: str = "") -> None:
        super().__init__(f"{kind} {name}: {reason}")
        self.kind = kind
        self.name = name
        self.reason = reason
        self.uid = uid

    @property
    def event(self) -> events.Rejected:
        """What to tell the core: the object's last good version stays in force."""
        return events.Rejected(self.kind, self.name, self.reason, self.uid)


def service(raw: identity.Source) -> events.Upsert:
    """Decode a v1 Service; headless, ExternalName and other proxies' Services have no value."""
    return _decode(events.Kind.SERVICE, raw)


def endpoint_slice(raw: identity.Source) -> events.Upsert:
    """Decode a discovery.k8s.io/v1 EndpointSlice; one of no Service or of an unknown type has no value."""
    return _decode(events.Kind.ENDPOINT_SLICE, raw)


def node(raw: identity.Source) -> events.Upsert:
    """Decode a v1 Node."""
    return _decode(events.Kind.NODE, raw)


class _Reader(typing.NamedTuple):
    api_version: str
    wire_type: type[typing.Any]
    decoder: msgspec.json.Decoder[typing.Any]
    build: Callable[[typing.Any, list[str]], events.Upsert]


def written(kind: str, raw: identity.Source) -> events.Upsert:
    """Decode an object that a person wrote: with what the API server would fill in (not ES-4)."""
    return _decode(events.Kind(kind), raw, _fill_in)


def _decode(
    kind: events.Kind, raw: identity.Source, prepare: Callable[[typing.Any], None] = lambda value: None
) -> events.Upsert:
    api_version, wire_type, decoder, build = _READERS[kind]
    warnings: list[str] = []
    try:
        # A raw of some other type is a bug of the caller's: let it raise.
        value = msgspec.convert(raw, wire_type) if isinstance(raw, dict) else decoder.decode(raw)
        if value.api_version not in (None, api_version) or value.kind not in (None, kind):
            raise fields.FieldError(_wrong_type(api_version, kind, value.api_version, value.kind))
        prepare(value)
        upsert = build(value, warnings)
        if (
            kind is events.Kind.SERVICE
            and upsert.value is not None
            and (isinstance(raw, dict) or unknown_annotations.SOUGHT in bytes(raw))
        ):
            unknown_annotations.warn(raw, warnings)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, fields.FieldError) as error:
        who = identity.identify(raw, kind)
        reason = _reason(error)
        if who.api_version not in ("", api_version) or who.kind != kind:
            # The better explanation for whatever does not fit.
            reason = _wrong_type(api_version, kind, who.api_version, who.kind)
        raise DecodeError(kind, who.name, reason, who.uid) from error
    if not warnings:
        return upsert
    return upsert._replace(warnings=tuple(warnings), uid=identity.identify(raw, kind).uid)


def _fill_in(value: wire.Service | wire.EndpointSlice | wire.Node) -> None:
    if isinstance(value, wire.EndpointSlice):
        for port in value.ports or ():
            port.name = port.name or ""
    elif isinstance(value, wire.Service) and value.spec:
        spec = value.spec
        spec.cluster_ips = spec.cluster_ips or ([spec.cluster_ip] if spec.cluster_ip else None)
        families = spec.ip_families or []
        more = (spec.cluster_ips or [])[len(families) :]
        spec.ip_families = families + ["IPv6" if ":" in text else "IPv4" for text in more]


def _wrong_type(api_version: str, kind: str, found_version: str | None, found_kind: str | None) -> str:
    found = f"{found_version or api_version} {found_kind or kind}"
    return f"apiVersion, kind: {quote(found)} is not understood, {api_version} {kind} is"


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"invalid UTF-8: {error.reason}"
    text = " ".join(str(error).replace("`", "").split())
    # msgspec's "Expected int, got str - at $.spec.ports[0].port".
    problem, at, path = text.rpartition(" - at $")
    return f"{path.lstrip('.') or 'object'}: {problem}" if at else text


def _reader(
    api_version: str, wire_type: type[typing.Any], build: Callable[[typing.Any, list[str]], events.Upsert]
) -> _Reader:
    return _Reader(api_version, wire_type, msgspec.json.Decoder(wire_type), build)


_READERS: Mapping[events.Kind, _Reader] = {
    events.Kind.SERVICE: _reader("v1", wire.Service, decode_service.service),
    events.Kind.ENDPOINT_SLICE: _reader(
        "discovery.k8s.io/v1", wire.EndpointSlice, decode_slice.endpoint_slice
    ),
    events.Kind.NODE: _reader("v1", wire.Node, decode_node.node),
}

DECODERS: Mapping[str, Callable[[identity.Source], events.Upsert]] = {
    events.Kind.SERVICE: service,
    events.Kind.ENDPOINT_SLICE: endpoint_slice,
    events.Kind.NODE: node,
}
identify = identity.identify
