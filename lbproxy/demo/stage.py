"""Where the demo plays: the lab, its objects, and the addresses of its Services."""

import pathlib

from lbproxy.demo import objects
from lbproxy.lab import cluster, topology

CLIENT = "n1/client"
NODE = "n1"
# The client's own node has two, so that both ways show: across the bridge, and to another node.
BACKENDS = {"shop-1": "n1", "shop-2": "n1", "shop-3": "n2", "shop-4": "n2"}
LEAVING = "shop-3"

SHOP = {4: "10.96.0.80", 6: "fd00:96::80"}
EMPTY = {4: "10.96.0.81"}
SINGLE = {4: "10.96.0.82"}
SINGLE_BACKEND = "shop-1"
NODE_PORT = 30080
SERVICE_PORT = 80
TARGET_PORT = 8080
SINGLE_PORT = 9090

_SERVED: tuple[objects.Port, ...] = (("ask", "TCP", SERVICE_PORT), ("ask-udp", "UDP", SERVICE_PORT))
_TARGETS: tuple[objects.Port, ...] = (("ask", "TCP", TARGET_PORT), ("ask-udp", "UDP", TARGET_PORT))
_ONE_SERVED: tuple[objects.Port, ...] = (("ask", "TCP", SERVICE_PORT),)
_ONE_TARGET: tuple[objects.Port, ...] = (("ask", "TCP", SINGLE_PORT),)


def nodes() -> tuple[topology.NodeSpec, ...]:
    """Describe two nodes: the client and two backends on the first, two backends on the second."""
    pods: dict[str, list[str]] = {NODE: ["client"]}
    for name, node in BACKENDS.items():
        pods.setdefault(node, []).append(name)
    return tuple(topology.NodeSpec(node, names) for node, names in pods.items())


def place(backend: str) -> str:
    """Return the lab's name of a backend's pod."""
    return f"{BACKENDS[backend]}/{backend}"


class Manifests:
    """The folder the agent follows."""

    def __init__(self, lab: cluster.Lab) -> None:
        """Write everything, with every backend in its slices."""
        self._lab = lab
        self.folder = lab.workdir / "manifests"
        self.folder.mkdir()
        nodes_found = {place.node for place in lab.places.values() if place.node}
        objects.write(
            self.folder / "nodes.yaml",
            [objects.node(name, lab[name].addresses) for name in sorted(nodes_found)],
        )
        single = [(lab[place(SINGLE_BACKEND)].ipv4, BACKENDS[SINGLE_BACKEND])]
        objects.write(
            self.folder / "others.yaml",
            [
                objects.service("empty", EMPTY, _ONE_SERVED),
                objects.service("single", SINGLE, _ONE_SERVED),
                objects.endpoint_slice("single", 4, _ONE_TARGET, single),
            ],
        )
        self.list_shop(tuple(BACKENDS))

    def list_shop(self, backends: tuple[str, ...]) -> None:
        """Let the shop's slices hold just these backends, from one moment to the next."""
        slices = [
            objects.endpoint_slice(
                "shop",
                family,
                _TARGETS,
                [(self._lab[place(name)].address(family), BACKENDS[name]) for name in backends],
            )
            for family in SHOP
        ]
        objects.write(self.shop, [objects.service("shop", SHOP, _SERVED, NODE_PORT), *slices])

    @property
    def shop(self) -> pathlib.Path:
        """The file with the Service that is shown."""
        return self.folder / "shop.yaml"
