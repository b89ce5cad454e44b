"""A discovery.k8s.io/v1 EndpointSlice to its model."""

import datetime
import functools
import sys
from collections.abc import Sequence

import msgspec

from lbproxy.core import addresses, events, fields, model, wire
from lbproxy.core.wording import quote


def endpoint_slice(value: wire.EndpointSlice, warnings: list[str]) -> events.Upsert:
    """One of no Service or of an unknown type has no value. Raises FieldError."""
    metadata = value.metadata
    labels = metadata.labels
    namespace = fields.namespace(metadata.namespace)
    name = events.ObjectName(namespace, fields.name(metadata.name, fields.SUBDOMAIN))
    family = fields.FAMILIES.get(value.address_type or "")
    if labels is None or not labels.service_name or labels.headless is not msgspec.UNSET or family is None:
        return events.Upsert(events.Kind.ENDPOINT_SLICE, name, None)
    trigger_time = metadata.annotations.trigger_time if metadata.annotations else None
    return events.Upsert(
        events.Kind.ENDPOINT_SLICE,
        name,
        model.EndpointSlice(
            namespace=name.namespace,
            name=name.name,
            service=model.ServiceName(name.namespace, sys.intern(labels.service_name)),
            family=family,
            ports=_slice_ports(value.ports or (), warnings),
            endpoints=_endpoints(value.endpoints or (), family, warnings),
            trigger_time_s=_unix_time_s(trigger_time) if isinstance(trigger_time, str) else 0.0,
        ),
    )


def _slice_ports(ports: Sequence[wire.SlicePort], warnings: list[str]) -> tuple[model.SlicePort, ...]:
    result = []
    for index, port in enumerate(ports):
        if port.name is None:
            warnings.append(f'ports[{index}].name: missing: passed over (an unnamed port has the name "")')
        elif port.port:
            number = fields.port_number(f"ports[{index}].port", port.port)
            protocol = fields.protocol(f"ports[{index}]", port.protocol)
            result.append(model.SlicePort(sys.intern(port.name), protocol, number))
    return _shared_slice_ports(tuple(result))


def _endpoints(
    endpoints: Sequence[wire.Endpoint], family: model.Family, warnings: list[str]
) -> tuple[model.Endpoint, ...]:
    result = []
    bad = []
    for index, endpoint in enumerate(endpoints):
        if not endpoint.addresses:
            continue
        address = addresses.parse(endpoint.addresses[0])
        if address is None or addresses.family_of(address) is not family:
            bad.append(index)
            continue
        if why := addresses.special(address):
            field = f"endpoints[{index}].addresses[0]"
            raise fields.FieldError(
                f"{field}: {quote(endpoint.addresses[0])} is {why}: the API server refuses it"
            )
        ready, serving, terminating = True, True, False
        if endpoint.conditions is not None:
            conditions = endpoint.conditions
            ready = conditions.ready is not False
            serving = conditions.serving is not False
            terminating = conditions.terminating is True
        hints = endpoint.hints
        result.append(
            model.Endpoint(
                address,
                ready,
                serving,
                terminating,
                _shared_location(
                    fields.interned(endpoint.node_name),
                    fields.interned(endpoint.zone),
                    _hinted(hints.for_zones) if hints else (),
                    _hinted(hints.for_nodes) if hints else (),
                ),
            )
        )
    if bad:
        text = quote((endpoints[bad[0]].addresses or [""])[0])
        more = f", nor {len(bad) - 1} more" if len(bad) > 1 else ""
        warnings.append(
            f"endpoints[{bad[0]}].addresses[0]: {text} is not an IPv{family.value} address{more}: passed over"
        )
    return tuple(result)


def _hinted(hints: Sequence[wire.Hint] | None) -> tuple[str, ...]:
    return tuple([fields.interned(hint.name) for hint in hints]) if hints else ()


def _unix_time_s(rfc3339: str) -> float:
    """Return 0 where the text is no time with an offset (NPL-1)."""
    try:
        time = datetime.datetime.fromisoformat(rfc3339)
    except ValueError:
        return 0.0
    return time.timestamp() if time.tzinfo else 0.0


# A relist compares every probe with the one that is known: the same object is equal at once.
@functools.lru_cache(1024)
def _shared_slice_ports(ports: tuple[model.SlicePort, ...]) -> tuple[model.SlicePort, ...]:
    return ports


@functools.lru_cache(8192)
def _shared_location(
    node_name: str, zone: str, zone_hints: tuple[str, ...], node_hints: tuple[str, ...]
) -> model.Location:
    return model.Location(node_name, zone, zone_hints, node_hints)
