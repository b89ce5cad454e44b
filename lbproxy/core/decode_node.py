"""A v1 Node to its model."""

from lbproxy.core import addresses, events, fields, model, wire

_AUTOSCALER_TAINT = "ToBeDeletedByClusterAutoscaler"


def node(value: wire.Node, _warnings: list[str]) -> events.Upsert:
    """Addresses, zone and podCIDRs, and whether load balancers are to use it. Raises FieldError."""
    metadata = value.metadata
    name = events.ObjectName("", fields.name(metadata.name, fields.SUBDOMAIN))
    spec = value.spec or wire.NodeSpec()
    listed = (value.status and value.status.addresses) or ()
    parsed = [
        addresses.parse(entry.address or "")
        for wanted in ("InternalIP", "ExternalIP")
        for entry in listed
        if entry.type == wanted
    ]
    return events.Upsert(
        events.Kind.NODE,
        name,
        model.Node(
            name=name.name,
            addresses=tuple(dict.fromkeys(address for address in parsed if address)),
            zone=fields.interned(metadata.labels.zone) if metadata.labels else "",
            pod_cidrs=tuple(spec.pod_cidrs or ([spec.pod_cidr] if spec.pod_cidr else ())),
            eligible=metadata.deletion_timestamp is None
            and all(taint.key != _AUTOSCALER_TAINT for taint in spec.taints or ()),
            deleting=metadata.deletion_timestamp is not None,
            migrate=str(metadata.annotations.migrate or "") if metadata.annotations else "",
            proxy=str(metadata.labels.proxy or "") if metadata.labels else "",
        ),
    )
