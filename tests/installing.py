"""Services put into maps as the agent does it, for tests of what reads them back."""

import typing

from lbproxy.core import addresses, health, ledger, model, node_rows, plan, port_probes, quarantine
from lbproxy.core import probe as probe_
from lbproxy.kernel import maps
from tests import serving

NODE = "node-1"
ZONE = "zone-a"

SIZES: typing.Final = serving.sizes(
    slots=512, backends=256, services=64, localities=16, node_addresses=8, sockets=256
)


def address(text: str) -> bytes:
    packed = addresses.parse(text)
    assert packed is not None, text
    return packed


def endpoint(
    ip: str, node: str = NODE, zone_hints: tuple[str, ...] = (), **fields: typing.Any
) -> model.Endpoint:
    """A ready endpoint, unless `fields` say otherwise."""
    location = model.Location(node, ZONE, zone_hints)
    values = {"ready": True, "serving": True, "terminating": False, "location": location}
    return model.Endpoint(address=address(ip), **{**values, **fields})


class Installer:
    """An agent's ledger over some maps; time stands still until `expire`."""

    def __init__(self, into: maps.Maps, capacity: ledger.Capacity) -> None:
        self.maps = into
        self.ledger = ledger.Ledger(capacity)
        self.health = health.HealthBook()

    def service(
        self,
        name: str,
        cluster_ips: typing.Sequence[str],
        endpoints: typing.Sequence[model.Endpoint],
        *,
        port: int = 80,
        target_port: int = 8080,
        node_port: int = 0,
        protocol: model.Protocol = model.Protocol.TCP,
        port_name: str = "http",
        external: typing.Sequence[str] = (),
        load_balancer: typing.Sequence[str] = (),
        affinity_s: int = 0,
        internal_local: bool = False,
        external_local: bool = False,
        algorithm: model.Algorithm = model.Algorithm.RANDOM,
        source_ranges: typing.Sequence[str] = (),
        mode: model.PacketMode | None = None,
        weights: model.Weights | None = None,
        probe: probe_.Probe | None = None,
        zone_spill_over: float = 0.0,
    ) -> None:
        """Write a Service of one port, with a slice for each family of its endpoints."""
        full = model.ServiceName(*name.split("/"))
        service = model.Service(
            full,
            tuple(map(address, cluster_ips)),
            tuple(map(address, external)),
            tuple(map(address, load_balancer)),
            (model.ServicePort(port_name, protocol, port, node_port),),
            affinity_s,
            internal_local,
            external_local,
            algorithm,
            tuple(
                model.SourceRange(one.base, one.prefix_length)
                for one in map(addresses.parse_cidr, source_ranges)
                if one is not None
            ),
            mode=mode,
            weights=weights,
            probes=port_probes.PortProbes(probe) if probe is not None else None,
            zone_spill_over=zone_spill_over,
        )
        slices = [
            model.EndpointSlice(
                full.namespace,
                f"{full.name}-{family}",
                full,
                family,
                (model.SlicePort(port_name, protocol, target_port),),
                tuple(one for one in endpoints if addresses.family_of(one.address) is family),
                0.0,
            )
            for family in model.Family
        ]
        defaults = plan.Defaults(model.Algorithm.RANDOM)
        self._change(full, plan.plan_service(service, slices, NODE, ZONE, defaults, self.health))

    def remove(self, name: str) -> None:
        """Remove a Service; its backends drain until `expire`."""
        self._change(model.ServiceName(*name.split("/")), [])

    def expire(self) -> None:
        """Clear what was removed."""
        self.maps.apply(self.ledger.expire(quarantine.RECYCLE_AFTER_S))

    def node(
        self,
        *local: str,
        loopback: bool = True,
        host_netns: int = 0,
        rules: node_rows.PacketRules = node_rows.NO_RULES,
    ) -> None:
        """Write this node's addresses, all of which serve NodePorts, and what is configured."""
        facts = node_rows.NodeFacts(tuple(map(address, local)), (), host_netns)
        want = node_rows.node_rows(facts, [], loopback, len(local), rules)
        self.maps.apply(node_rows.node_writes(want, dict(self.maps.rows("node_addresses"))))

    def _change(self, name: model.ServiceName, ports: typing.Sequence[plan.PortPlan]) -> None:
        change = self.ledger.change({name: ports}, 0.0)
        assert change.refused == {}
        self.maps.apply(change.writes)
