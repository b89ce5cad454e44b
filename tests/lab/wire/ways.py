"""The Services of the wire tests, with one backend each.

`near` is a pod of n1 and `far` one of n2, both masqueraded; `kept` is the near pod
again, which sees its client (externalTrafficPolicy: Local).
"""

import typing

import pytest

from lbproxy.lab import cluster
from tests.lab import manifests

TARGET, DEAD, SCTP_PORT = 9000, 9001, 36412
BACKENDS = ("n1/p2", "n2/p1")


class Way(typing.NamedTuple):
    """A Service with one backend, and whether its clients are masqueraded."""

    number: int
    name: str
    backend: str
    masqueraded: bool

    @property
    def node_port(self) -> int:
        return 30080 + self.number

    @property
    def dead_port(self) -> int:
        """A NodePort whose target nobody listens at."""
        return 30180 + self.number

    @property
    def ports(self) -> list[manifests.Port]:
        number = self.node_port
        return [
            manifests.HTTP._replace(node_port=number, target=TARGET),
            manifests.DNS._replace(node_port=number, target=TARGET),
            manifests.Port("sctp", "SCTP", SCTP_PORT, number, TARGET),
            manifests.Port("dead", "TCP", 81, self.dead_port, DEAD),
            manifests.Port("dead-dns", "UDP", 81, self.dead_port, DEAD),
        ]

    def objects(self, lab: cluster.Lab) -> list[manifests.Object]:
        policy: manifests.Object = {} if self.masqueraded else {"externalTrafficPolicy": "Local"}
        return [
            manifests.service(self.name, self.number, ports=self.ports, **policy),
            *manifests.slices(self.name, [lab[self.backend]], ports=self.ports),
        ]


WAYS = (
    Way(1, "near", "n1/p2", True),
    Way(2, "far", "n2/p1", True),
    Way(3, "kept", "n1/p2", False),
)
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
NOBODYS_PORT = 30090  # of a Service without backends
NOBODY = [manifests.HTTP.on_node_port(NOBODYS_PORT), manifests.DNS.on_node_port(NOBODYS_PORT)]
# The ends, where checksums can be left to the device, and the devices behind the node that then make them.
ENDS = (("outside", "eth0"), *((pod, "eth0") for pod in BACKENDS))
LAST_HOPS = (("fabric", "outside"), ("n1", "pod3"), ("n2", "pod2"))
who_sums = pytest.mark.parametrize("devices", [ENDS, LAST_HOPS], ids=["by the sender", "behind the node"])
families = pytest.mark.parametrize("family", [4, 6])
