"""Questions that the socket hooks and the packet path ask of a connection, over the same rows."""

import collections
import enum
import ipaddress
import typing

import msgspec

from lbproxy import abi
from lbproxy.core import addresses, inventory, left_out, listing, model, notes, tables


class Client(enum.StrEnum):
    """Who connects: also said where no address says it."""

    POD = "pod"
    NODE = "node"
    OUTSIDE = "outside"


class Verdict(enum.StrEnum):
    """What becomes of the connection."""

    BALANCED = "balanced"
    REFUSED = "refused"
    DROPPED = "dropped"
    UNTOUCHED = "untouched"


class Target(typing.NamedTuple):
    """Where the connection goes, as the application names it."""

    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int
    protocol: model.Protocol

    @property
    def packed(self) -> bytes:
        """The address as maps have it."""
        return addresses.packed(self.address)

    @property
    def family(self) -> model.Family:
        """The family of its packets: an IPv4-mapped address is IPv4."""
        return addresses.family_of(self.packed)

    def __str__(self) -> str:
        return f"{listing.place(addresses.text(self.packed), self.port)}/{self.protocol.name}"


class Sender(typing.NamedTuple):
    """Who connects; `here` says that a socket of this node does, `address` is None where nobody said it."""

    kind: Client
    here: bool
    address: bytes | None = None

    @property
    def text(self) -> str:
        """Its address, or what stands for it."""
        return addresses.text(self.address) if self.address is not None else str(self.kind)


class Hooks(typing.NamedTuple):
    """Where programs run.

    `cgroup` is whose processes are served, `broken` the programs that are not attached
    there; `uplinks` and `others` are the devices that packets are served on.
    """

    cgroup: str
    broken: frozenset[str]
    uplinks: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


class Step(msgspec.Struct, frozen=True):
    """One question that the kernel asks, and the answer."""

    step: str
    result: str


class Choice(msgspec.Struct, frozen=True):
    """A backend that the connection may go to, and how likely, in percent."""

    ip: str
    port: int
    node: str
    zone: str
    state: str
    percent: float


class End(Exception):  # noqa: N818 - how a step says that it was the last one
    """The connection's way ends with this step."""

    def __init__(self, verdict: Verdict, reason: str) -> None:
        super().__init__(reason)
        self.verdict = verdict
        self.reason = reason


_AFFINITY_KEY: typing.Final = abi.LAYOUTS["affinity_key"]
_AFFINITY: typing.Final = abi.LAYOUTS["affinity"]


def begins_nothing(rows: inventory.Rows, *, by_socket: bool) -> str:
    """Why lbproxy begins no flow now, which another proxy gets; empty where it does."""
    if inventory.is_set(rows, tables.Handover.RETURN):
        return "the node is given back (`lbproxy migrate return`): nothing new is begun"
    if not by_socket and inventory.is_set(rows, tables.Handover.LEARN):
        return "what another proxy has begun is being found out: what begins meanwhile counts to it"
    return ""


class Walk:
    """One connection on its way; what the two paths have in common."""

    def __init__(
        self,
        rows: inventory.Rows,
        hooks: Hooks,
        target: Target,
        now_s: int,
        noted: notes.Notes = notes.NOTHING,
    ) -> None:
        self._probed = listing.Probed(noted)
        self.rows = rows
        self.hooks = hooks
        self.target = target
        self.now_s = now_s
        self.node_ports = inventory.node_ports(rows)
        self.settings = inventory.settings(rows)
        self.steps: list[Step] = []
        self.chosen: list[tuple[inventory.Backend, float]] = []  # with percent
        self.left_out: tuple[left_out.LeftOut, ...] = ()
        self.service = ""
        self.key = tables.FrontendKey(b"", b"", 0, 0)  # of the frontend that was found

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The backends that it may go to."""
        return tuple(_choice(backend, percent) for backend, percent in self.chosen)

    def say(self, step: str, result: str) -> None:
        """Note an answer."""
        self.steps.append(Step(step, result))

    def ending(self, step: str, result: str, verdict: Verdict, reason: str) -> End:
        """Note the last answer."""
        self.say(step, result)
        return End(verdict, reason)

    # --- which frontend, if any: frontend.h ---

    def find_frontend(self, sender: Sender) -> tables.Frontend:
        """The frontend that is dialled. Raises End where there is none."""
        target = self.target
        exact = self.lookup(target.packed, tables.SCOPE_ADDRESS)
        if exact is not None:
            kind = tables.FrontendKind(exact.kind).label
            self.say("frontend", f"{target} is {_a(kind)} {kind} of {self._named(exact)}")
            return exact
        self.say("frontend", f"{target} is no ClusterIP, external or load balancer IP of a Service")
        zero = addresses.IPV4_ZERO if target.family is model.Family.IPV4 else addresses.IPV6_ZERO
        row = self.lookup(zero, tables.SCOPE_NODE_PORT)
        if row is None:
            port = f"{target.port}/{target.protocol.name}"
            text = f"{port} is no NodePort of an IPv{target.family.value} Service"
            raise self.ending("node port", text, Verdict.UNTOUCHED, NOT_A_SERVICE)
        self.say("node port", f"{target.port}/{target.protocol.name} is a NodePort of {self._named(row)}")
        self._node_address(sender.kind)
        return row

    def _node_address(self, client: Client) -> None:
        packed, text = self.target.packed, str(self.target.address)
        # connect() takes 0.0.0.0 for 127.0.0.1.
        if packed in addresses.LOOPBACK_IPV4 or packed == addresses.IPV4_ZERO:
            if not self.node_ports.loopback:
                answer = "NodePorts are not served on 127.0.0.0/8"
                raise self.ending("address", answer, Verdict.UNTOUCHED, NOT_A_SERVICE)
            if client is not Client.NODE:
                where = "in a pod" if client is Client.POD else "from outside"
                answer = f"{text} {where} is not this node: NodePorts on 127.0.0.0/8 are the node's own"
                raise self.ending("address", answer, Verdict.UNTOUCHED, NOT_A_SERVICE)
            self.say("address", f"{text} is loopback, and the node itself connects")
        elif packed not in self.node_ports.addresses:
            whose = "this node's, but NodePorts are not served on it"
            answer = f"{text} is {whose if packed in self.node_ports.local else 'no address of this node'}"
            raise self.ending("address", answer, Verdict.UNTOUCHED, NOT_A_SERVICE)
        else:
            self.say("address", f"NodePorts are served on {text}")

    def lookup(self, address: bytes, scope: int) -> tables.Frontend | None:
        """A frontend's row."""
        port = self.target.port.to_bytes(2, "big")
        self.key = tables.FrontendKey(address, port, self.target.protocol, scope)
        row = self.rows.row(tables.Table.FRONTENDS, self.key.pack())
        return tables.frontend(row) if row is not None else None

    def _named(self, frontend: tables.Frontend) -> str:
        key = inventory.port_key(self.rows, frontend.service)
        self.service = str(key) if key is not None else f"service {frontend.service}"
        return self.service

    def handover(self, *, by_socket: bool) -> None:
        """End here where what begins now is left to another proxy: lbproxy comes after it, or goes."""
        if answer := begins_nothing(self.rows, by_socket=by_socket):
            returning = inventory.is_set(self.rows, tables.Handover.RETURN)
            whom = "the proxy that comes next" if returning else "the proxy that was here before"
            raise self.ending("handover", answer, Verdict.UNTOUCHED, f"it is left to {whom}")
        learning = inventory.is_set(self.rows, tables.Handover.LEARN)
        if learning and self.target.protocol is model.Protocol.UDP:
            self.say("handover", "what unconnected sockets begin is left to the proxy that was here before")

    # --- who may use it, and which of its sets: client.h, socket_client.h ---

    def for_client(self, frontend: tables.Frontend, sender: Sender) -> tables.Frontend:
        """The frontend itself, or what clients outside have in its place (ETP-3 to ETP-6)."""
        if not frontend.flags & tables.FrontendFlag.EXTERNAL_LOCAL:
            return frontend
        if sender.kind is not Client.OUTSIDE:
            whom = "the node itself" if sender.kind is Client.NODE else "pods"
            self.say("policy", f"externalTrafficPolicy is Local, which {whom} need not keep to")
            return frontend
        outside = self.lookup(self.key.addr, self.key.scope | tables.SCOPE_OUTSIDE)
        if outside is None:
            answer = "externalTrafficPolicy is Local, but there is no row for clients outside"
            raise self.ending("policy", answer, Verdict.DROPPED, "the service is changing at this moment")
        self.say("policy", "externalTrafficPolicy is Local: clients outside have the backends on this node")
        return outside

    def admit(self, frontend: tables.Frontend, sender: Sender) -> None:
        """Keep to the source ranges. Raises End where they do not have the client in."""
        if not frontend.flags & tables.FrontendFlag.SOURCE_RANGES:
            return
        if not frontend.slot_count and not frontend.flags & tables.FrontendFlag.DROP:
            return  # Nobody at all serves it: that is told to everyone (SR-10).
        if sender.address is None:
            self.say(
                "source ranges",
                f"only for {', '.join(self._ranges(frontend.service))}: taken to be one of these; "
                "ask with the client's own address",
            )
            return
        service = frontend.service.to_bytes(4, "big")
        key = tables.SourceRangeKey(32 + 128, service, sender.address)
        if self.rows.row(tables.Table.SOURCE_RANGES, key.pack()) is not None:
            self.say("source ranges", f"{sender.text} is in one")
            return
        answer = f"{sender.text} is in none of {', '.join(self._ranges(frontend.service))}"
        reason = "loadBalancerSourceRanges do not have this client in: its packets are dropped"
        raise self.ending("source ranges", answer, Verdict.DROPPED, reason)

    def _ranges(self, service: int) -> list[str]:
        found = (port.source_ranges for port in inventory.read(self.rows).ports if port.id == service)
        return [str(network) for networks in found for network in networks]

    # --- which backend: select.h ---

    def usable(self, frontend: tables.Frontend, refused: str) -> None:
        """End here where the frontend's set is empty, and say why it is."""
        local = frontend.sets == tables.BackendSet.LOCAL
        from_where = "the backends on this node (Local)" if local else "all backends (Cluster)"
        known = [one for one in self.backends() if one.service == frontend.service]
        if frontend.slot_count:
            self.say("backends", f"a choice among {from_where}")
            self._probes_off(frontend)
            self._health(frontend, known)
            return
        found = collections.Counter(map(listing.state_of, known))
        states = ", ".join(f"{count} {state}" for state, count in sorted(found.items()))
        text = f"none usable among {from_where}; known are {states}" if states else "the service has none"
        self.left_out = left_out.left_out(known, (), frontend.sets)
        if frontend.flags & tables.FrontendFlag.DROP:
            reason = "there are backends, but none that the traffic policy allows on this node: it times out"
            raise self.ending("backends", text, Verdict.DROPPED, reason)
        raise self.ending("backends", text, Verdict.REFUSED, refused)

    def _probes_off(self, frontend: tables.Frontend) -> None:
        key = inventory.port_key(self.rows, frontend.service)
        asked = self._probed.port(key) if key is not None else None
        if asked is not None and asked.off:
            self.say("probes", f"{asked.asks} is asked for, and not made: {asked.off}")
        if asked is not None and asked.invalid:
            self.say("probes", f"none is made: {asked.invalid}")

    def _health(self, frontend: tables.Frontend, known: typing.Collection[inventory.Backend]) -> None:
        ill = [one for one in known if one.health and one.state is not tables.BackendState.DRAINING]
        if not ill:
            return
        if any(one.sets & frontend.sets for one in ill):
            healthy = any(one.sets & frontend.sets and not one.health for one in known)
            which = (
                "more of this choice are unhealthy than panic= allows"
                if healthy
                else ("every backend of this choice is unhealthy")
            )
            self.say("health", f"{which}: all of them are used")
            return
        named = [listing.place(addresses.text(one.address), one.port) for one in ill]
        key = inventory.port_key(self.rows, frontend.service)
        why = []
        for one in ill:
            found = self._probed.backend(key, one, frontend.sets) if key is not None else None
            said = ",".join(listing.health_names(one.health))
            failed = found is not None and found.since
            why.append(f"{said}: {found.reason}, since {found.since}" if found and failed else said)
        left_out = ", ".join(f"{place} ({reason})" for place, reason in zip(named, why, strict=True))
        self.say("health", f"left out as unhealthy: {left_out}")

    def remembered(self, frontend: tables.Frontend, client: bytes | None, by_netns: bool, who: str) -> bool:
        """Whether session affinity decides; `client` is what its row is found by, None where unknown."""
        if not frontend.affinity_s:
            return False
        if client is None:
            self.say(
                "affinity",
                f"{who} stays with its backend for {frontend.affinity_s} s; "
                "which one this is cannot be told from here, so it counts as new",
            )
            return False
        row = self.affinity(frontend, client, by_netns=by_netns)
        if row is None:
            self.say("affinity", f"{who} has not connected here before")
            return False
        number, started_s = _AFFINITY.unpack(row)
        age_s = (self.now_s - started_s) & 0xFFFFFFFF
        if age_s >= frontend.affinity_s:
            self.say(
                "affinity", f"expired: {age_s} s since the last connection, {frontend.affinity_s} s kept"
            )
            return False
        backend = inventory.backend(self.rows, number)
        if backend is None or backend.service != frontend.service or not backend.sets & frontend.sets:
            self.say("affinity", "the remembered backend is not usable any more")
            return False
        place = listing.place(addresses.text(backend.address), backend.port)
        self.say("affinity", f"{place} for another {frontend.affinity_s - age_s} s, longer if used")
        self.chosen = [(backend, 100.0)]
        return True

    def affinity(self, frontend: tables.Frontend, client: bytes, *, by_netns: bool) -> bytes | None:
        """The row of a client that session affinity remembers."""
        return self.rows.row("affinity", _AFFINITY_KEY.pack(client, frontend.service, by_netns))

    def draw(self, frontend: tables.Frontend, hashed: str) -> None:
        """Say how likely each backend is: a slot is drawn evenly, or by a hash of `hashed`, or two are."""
        maglev = frontend.flags & tables.FrontendFlag.MAGLEV
        least = frontend.flags & tables.FrontendFlag.LEAST_CONN
        how = f"a hash of {hashed} picks one of" if maglev else "one is drawn at random of"
        count = frontend.slot_count
        said = f"{how} {count} {'Maglev slots' if maglev else 'slots'}"
        if least:
            said = f"of two of {count} slots, drawn at random, the backend with fewer open for its weight"
        self.say("slot", said)
        of_backend = collections.Counter(self._slot_ids(frontend))
        dead = 0
        chosen: dict[int, inventory.Backend] = {}
        for number, slots in of_backend.items():
            backend = inventory.backend(self.rows, number)
            if backend is None or backend.service != frontend.service:
                dead += slots
            else:
                chosen[number] = backend
        if dead:
            self.say("slot", f"{dead} of {count} slots lead to no backend: such connections are refused")
        shares = {number: of_backend[number] / count for number in chosen}
        if least and count > 1:
            shares = _shares_of_two({n: of_backend[n] for n in chosen}, count, chosen)
        in_order = sorted(chosen, key=lambda n: (-shares[n], chosen[n].address, chosen[n].port))
        self.chosen = [(chosen[number], round(100 * shares[number], 2)) for number in in_order]
        known = [one for one in self.backends() if one.service == frontend.service]
        self.left_out = left_out.left_out(known, of_backend, frontend.sets)
        if not chosen:
            raise End(Verdict.REFUSED, "no slot leads to a backend; counted as bad_slot")

    def _slot_ids(self, frontend: tables.Frontend) -> typing.Iterator[int]:
        for first in range(0, frontend.slot_count, tables.SLOTS_PER_BLOCK):
            block = frontend.block + first // tables.SLOTS_PER_BLOCK
            row = memoryview(
                self.rows.row(tables.Table.SLOTS, tables.row_key(block)) or bytes(tables.BLOCK_SIZE)
            )
            yield from row.cast("I")[: frontend.slot_count - first]

    def backends(self) -> typing.Iterator[inventory.Backend]:
        """Every backend."""
        found = inventory.read(self.rows)
        yield from found.orphans
        for port in found.ports:
            yield from port.backends


NOT_A_SERVICE: typing.Final = "not a service address: left alone"


def _shares_of_two(
    slots: typing.Mapping[int, int], count: int, backends: typing.Mapping[int, inventory.Backend]
) -> dict[int, float]:
    """How likely each backend is to be chosen as things are now, when two of so many slots are drawn.

    The second one is chosen if it has less open for its weight, the first one otherwise (select.h).
    """
    load = {number: (one.open or 0) / max(1, one.weight) for number, one in backends.items()}
    pairs = count * (count - 1)
    shares = {}
    for number, mine in slots.items():
        more = sum(n for other, n in slots.items() if load[other] > load[number])
        alike = sum(n for other, n in slots.items() if other != number and load[other] == load[number])
        # Drawn first or second with one that has more; first with one alike, or with a slot of its own.
        shares[number] = (2 * mine * more + mine * alike + mine * (mine - 1)) / pairs
    return shares


def _a(word: str) -> str:
    return "an" if word[0] in "AEIOU" else "a"


def _choice(backend: inventory.Backend, percent: float) -> Choice:
    return Choice(
        addresses.text(backend.address),
        backend.port,
        backend.node,
        backend.zone,
        listing.state_of(backend),
        percent,
    )
