"""Short connections from outside to NodePorts, against the same pods dialled directly.

Rounds as in `ratios`:

| variant | the client outside dials | who answers |
|---|---|---|
| bare, bare/again | a pod's address, by way of its node, where nothing is programmed | that pod |
| NAME/local | a NodePort of externalTrafficPolicy Local | a pod of this node, that sees the client |
| NAME/masqueraded | a NodePort of policy Cluster | the same pod, and sees the node |
| bare/elsewhere | a pod's address, by way of its node, where nothing is programmed | that pod |
| NAME/remote | a NodePort of policy Cluster | a pod of another node, and sees the first node |
| lbproxy/dsr | the same with `lbproxy.io/mode: dsr` | a pod of another node, which answers the client |

The node of `remote`'s pod has nothing programmed, whoever the contestant is.
"""

import collections.abc
import time

from benchmarks import arena, cluster, contestants, ratios, results, rounds

_READY_S = 40.0


def variants(names: list[str]) -> tuple[str, ...]:
    """List the variants of a round, for these contestants."""
    listed = []
    for name in names:
        listed += [f"{name}/{what}" for what in ("local", "masqueraded", "remote")]
        listed += [f"{name}/dsr"] * (name == contestants.Lbproxy.name)
    return rounds.with_bare([*listed, "bare/elsewhere"])


def way(at: arena.Arena, variant: str, _number: int = 0) -> rounds.Way:
    """Return who serves, and what the client outside dials."""
    name, _, what = variant.partition("/")
    site = at.sites[name]
    here = site.servers[0]
    if variant in ratios.BARE:
        return rounds.Way(here, arena.OUTSIDE, at.lab[here].ipv4, arena.DIRECT_PORT)
    if what == "elsewhere":
        return rounds.Way(at.far, arena.OUTSIDE, at.lab[at.far].ipv4, arena.DIRECT_PORT)
    server = {"remote": at.far, "dsr": at.peer}.get(what, here)
    return rounds.Way(server, arena.OUTSIDE, at.lab[site.node].ipv4, cluster.NODE_PORTS[what])


def measure(
    at: arena.Arena,
    names: list[str],
    count: int,
    seconds: float,
    before_each: collections.abc.Callable[[], None],
) -> list[results.Round]:
    """Run the rounds, once all NodePorts answer; VariantError as in `rounds.measure`."""
    listed = variants(names)
    for variant in listed:
        _until_served(at, variant)
    return rounds.measure(
        at, listed, lambda variant, number: way(at, variant, number), "short", count, seconds, before_each
    )


def _until_served(at: arena.Arena, variant: str) -> None:
    chosen = way(at, variant)
    serving = at.lab.serve(chosen.server, arena.PORTS, cpu=at.cpu)
    try:
        deadline = time.monotonic() + _READY_S
        while True:
            client = at.lab.client(
                chosen.client, "short", chosen.address, chosen.port, count=1, timeout_s=1.0
            )
            seen = client.result()
            if seen.servers == {chosen.server: 1}:
                return
            if time.monotonic() > deadline:
                said = seen.servers or seen.failures
                raise rounds.VariantError(variant, f"{chosen.address}:{chosen.port} gives {said}")
            time.sleep(0.2)
    finally:
        serving.stop()
