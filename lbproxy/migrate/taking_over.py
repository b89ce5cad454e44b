"""What a node's migration comes to: kube-proxy's rules go, or flows are left to it again.

`lbproxy migrate` does it when somebody at the node says so, the agent when its Node does.
"""

import os
import time
import typing
from collections.abc import Callable

from lbproxy import errors, flow_table, leftovers
from lbproxy.config import config
from lbproxy.core import conntrack, inventory, ipvs, model, tables
from lbproxy.kernel import anchor, maps, surroundings
from lbproxy.kernel import conntrack as tracker
from lbproxy.kernel import ipvs as virtual
from lbproxy.migrate import handover

_BATCH_ROWS: typing.Final = 4096
RESUME_S: typing.Final = 30.0  # the agent looks every second, and reads the tracker twice
_PAUSE_S: typing.Final = 0.1
# How many flows may have begun, and be without a reservation, when kube-proxy begins flows; or rounds of it.
_FEW: typing.Final = 8
_MOST_ROUNDS: typing.Final = 5
_KUBE_PROXY: typing.Final = "kube-proxy"
_PORTS: typing.Final = {config.HEALTHZ_PORT: "healthz", config.METRICS_PORT: "metrics"}  # kube-proxy's too


class Flows(typing.NamedTuple):
    """Flows to addresses that lbproxy serves, by protocol, and by who translates them."""

    of_kube_proxy: dict[str, int]
    of_lbproxy: dict[str, int]


class Removed(typing.NamedTuple):
    """What was removed of kube-proxy's, what failed, what no tool is there for, and what else is in force.

    `kept` says what others use of it, or have beside it, and stays for that.
    """

    removed: tuple[str, ...]
    failed: tuple[str, ...]
    unable: tuple[str, ...]
    left: tuple[str, ...]
    kept: tuple[str, ...]


class Returned(typing.NamedTuple):
    """How many ports were kept from kube-proxy, and why that may be too few."""

    reserved: int
    problem: str


def flows(kernel: maps.Maps) -> Flows:
    """Count them. Raises AgentError where the connection tracker can not be read."""
    try:
        theirs = handover.theirs(kernel, tracker.translated)
    except OSError as error:
        raise errors.AgentError(f"cannot read the connection tracker: {error.strerror}") from error
    counts, _ = flow_table.count(kernel)
    ours: dict[str, int] = {}
    for kind, count in sorted(counts.flows.items()):
        name = model.Protocol(kind.proto).name
        ours[name] = ours.get(name, 0) + count
    return Flows({model.Protocol(proto).name: count for proto, count in sorted(theirs.items())}, ours)


def kube_proxies() -> list[int]:
    """The processes of this network namespace that are kube-proxy, as far as processes are seen from here."""
    return [one.pid for one in surroundings.neighbours() if one.command == _KUBE_PROXY]


def kube_proxys_ports() -> list[str]:
    """Which of kube-proxy's ports another process than this one has, where its processes are not seen."""
    found = []
    for port, what in _PORTS.items():
        listener = surroundings.listener(what, "", "0.0.0.0", port)
        if listener.taken and listener.pid != os.getpid():
            found.append(f"{port} ({what})")
    return found


def kube_proxy_here() -> str:
    """Why kube-proxy seems to be here, to an agent, which would have its ports; empty where it does not."""
    if here := _process_here():
        return here
    ports = " and ".join(kube_proxys_ports())
    return f"another process has port {ports}: kube-proxy still runs here, it seems" if ports else ""


def _process_here() -> str:
    pids = ", ".join(map(str, kube_proxies()))
    return f"kube-proxy runs here (pid {pids})" if pids else ""


def take_over(hand_over: handover.HandOver) -> Removed:
    """Begin new flows, and remove what kube-proxy has left; flows that go on are kept alive before that.

    Raises OSError, and AgentError where nothing may be removed yet, as under connections of IPVS:
    nothing can keep these alive.
    """
    if problem := ipvs.obstacle(virtual.look()):
        raise errors.AgentError(problem)
    hand_over.resume()
    with hand_over.anchored():
        return _remove(kube_proxy_here)


def take_over_beside(kernel: maps.Maps) -> Removed:
    """The same from another process than the agent's, which holds the flows; asks nothing of IPVS."""
    if inventory.is_set(kernel, tables.Handover.RETURN):
        have_resumed(kernel)
    keeper = anchor.Keeper()
    problem = keeper.keep(needed=True)
    if problem and flows(kernel).of_kube_proxy:
        raise errors.AgentError(problem)
    # Its ports may be the agent's.
    done = _remove(_process_here)
    keeper.keep(needed=bool(flows(kernel).of_kube_proxy))
    return done


def _remove(here: Callable[[], str]) -> Removed:
    done = leftovers.Cleanup(here)
    done.all()
    said = (done.removed, done.failed, done.unable, leftovers.removable(leftovers.present()), done.kept)
    return Removed(*map(tuple, said))


def have_resumed(kernel: maps.Maps) -> None:
    """Have the agent, which is another process, end what `return` has begun. Raises AgentError."""
    kernel.apply([tables.handover(tables.Handover.RETURN, tables.Return.ENDS)])
    until_s = time.monotonic() + RESUME_S
    while any(inventory.is_set(kernel, row) for row in (tables.Handover.RETURN, tables.Handover.LEARN)):
        if time.monotonic() > until_s:
            raise errors.AgentError(
                f"the agent has not ended `return` within {RESUME_S:g} s: see its log; it will when it can"
            )
        time.sleep(_PAUSE_S)


def give_back(kernel: maps.Maps) -> Returned:
    """Begin no flow any more, and keep the ports of those that go on from kube-proxy."""
    settings, now = inventory.settings(kernel), flow_table.tick()
    known: set[tuple[int, conntrack.Tuple]] = set()

    def reserve() -> int:
        batches = kernel.batches(tables.Table.FLOWS, _BATCH_ROWS)
        found = (one for batch in batches for one in conntrack.reserved(*batch, now, settings))
        new = {(one.proto, one.ends): one for one in found if (one.proto, one.ends) not in known}
        known.update(new)
        return tracker.reserve(new.values())

    returns = tables.handover(tables.Handover.RETURN, tables.Return.YES)
    count, problem = 0, ""
    try:
        # Before and after: else what begins meanwhile, or what kube-proxy begins at once, had none.
        # Before, until few begin in a round of it: where there are many flows the first takes seconds.
        for _ in range(_MOST_ROUNDS):
            made = reserve()
            count += made
            if made <= _FEW:
                break
        kernel.apply([returns])
        count += reserve()
    except OSError as error:
        problem = f"cannot keep ports from kube-proxy: {error.strerror}"
        # That alone keeps nobody from going back.
        kernel.apply([returns])
    return Returned(count, problem)
