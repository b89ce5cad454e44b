"""Compares what probes bring back with what the oracle says, and shows the difference."""

import collections
import collections.abc
import ipaddress
import itertools
import typing

from tests.lab.contract import book, oracle

TIMEOUT, REFUSED = "ETIMEDOUT", "ECONNREFUSED"
Outcomes = collections.Counter[tuple[str, str]]  # by outcome and the client address that the server saw

# What is not as kube-proxy does it, on purpose.
EXPLAINED = {
    "sockets are not masqueraded": (
        "MASQ-2 MASQ-3 MASQ-5",
        "A connection of a pod or of the node is led to its backend before there is a packet: it has the "
        "client's own address as its source, and its answers need no way back through this node.",
    ),
    "either mode": (
        "REJ-3 SR-10 CIP-4",
        "Where kube-proxy's iptables and nftables modes differ, either is right.",
    ),
}


class Expectation(typing.NamedTuple):
    """What must come of dialling a target."""

    verdict: oracle.Verdict
    servers: dict[str, frozenset[str]]  # who may answer, and which client addresses they may see
    errors: frozenset[str]  # how it may fail, where nobody is to answer

    @property
    def may_be_quiet(self) -> bool:
        return TIMEOUT in self.errors

    @property
    def text(self) -> str:
        """Write it for people."""
        if not self.servers:
            return f"{self.verdict.kind}: {' or '.join(sorted(self.errors))}"
        return f"{self.verdict.kind}: " + ", ".join(
            f"{server} sees {' or '.join(sorted(seen))}" for server, seen in sorted(self.servers.items())
        )


class Mismatch(typing.NamedTuple):
    """A line of the report."""

    scenario: str
    client: str
    target: str
    expected: str
    got: str
    why: str

    def __str__(self) -> str:
        return (
            f"{self.scenario}: from {self.client} to {self.target}: {self.why}\n"
            f"    expected {self.expected}\n    got      {self.got}"
        )


class Judge:
    """Knows what must come of a probe: from the oracle, and from who listens where in the lab."""

    def __init__(self, truth: oracle.Oracle, listening: dict[str, set[int]]) -> None:
        self._truth = truth
        self._listening = listening
        self._places = {
            address: place.name for place in book.PLACES.values() for address in place.addresses
        } | dict.fromkeys(book.BRIDGE.values(), "n1")

    def expect(self, client: book.Client, target: book.Target) -> Expectation:
        """Return what must come of a probe."""
        source = self._source(client, target)
        verdict = self._truth.verdict(
            oracle.Probe(source, target.address, target.port, target.protocol, client.device)
        )
        if verdict.kind is oracle.Kind.SERVED:
            servers = {
                f"{self._places[one.address]}@{one.port}": self._seen(
                    client, target.family, source, one, one in verdict.masqueraded
                )
                for one in verdict.backends
            }
            return Expectation(verdict, servers, frozenset())
        if verdict.kind is oracle.Kind.UNTOUCHED and (server := self._stranger(client, target)):
            return Expectation(verdict, {server: frozenset({source})}, frozenset())
        errors = {one for kind in {verdict.kind, *verdict.also} for one in self._errors(kind, target)}
        return Expectation(verdict, {}, frozenset(errors))

    def compare(self, client: book.Client, expected: Expectation, got: Outcomes) -> str:
        """Say what is wrong; "" where nothing is."""
        errors = {outcome for outcome, seen in got if not seen}
        servers = {outcome for outcome, seen in got if seen}
        if not expected.servers:
            return "" if not servers and errors <= expected.errors else "it fails otherwise, or not at all"
        if errors:
            return "it fails"
        if expected.verdict.affinity:
            if not servers <= expected.servers.keys():
                return "a wrong backend"
            if len(servers) > 1:
                return "no affinity"
        elif servers != expected.servers.keys():
            return "a wrong set of backends"
        if any(seen not in expected.servers[outcome] for outcome, seen in got):
            return "a wrong source address"
        return ""

    def _source(self, client: book.Client, target: book.Target) -> str:
        if client is book.NODE:
            if self._places.get(target.address) == "n1":
                return target.address
            if ipaddress.ip_address(target.address).is_loopback:
                return "127.0.0.1" if target.family == 4 else "::1"
        return book.PLACES[client.place].address(target.family)

    def _seen(
        self, client: book.Client, family: int, source: str, backend: oracle.Backend, masqueraded: bool
    ) -> frozenset[str]:
        place = book.PLACES[self._places[backend.address]]
        node = book.PLACES["n1"].address(family)
        if client is book.NODE:
            return frozenset({node, book.BRIDGE[family]})
        if client.socket or not masqueraded:
            return frozenset({source})
        return frozenset({book.BRIDGE[family] if place.node == "n1" else node})  # MASQ-6

    def _stranger(self, client: book.Client, target: book.Target) -> str:
        """Who has an address that is no service's, and listens there."""
        place = self._places.get(target.address, "")
        return f"{place}@{target.port}" if target.port in self._listening.get(place, ()) else ""

    def _errors(self, kind: oracle.Kind, target: book.Target) -> set[str]:
        if kind is oracle.Kind.REJECT:
            return {REFUSED}
        if kind is oracle.Kind.DROP:
            return {TIMEOUT}
        if not ipaddress.ip_address(target.address).is_loopback and target.address not in self._places:
            return {TIMEOUT}
        # Nobody listens there; an unconnected socket is not told.
        return {REFUSED} if target.protocol == "TCP" else {REFUSED, TIMEOUT}


def outcomes(found: collections.abc.Iterable[tuple[str, str, int]]) -> Outcomes:
    """Read what the prober wrote."""
    return Outcomes({(outcome, seen): count for outcome, seen, count in found})


def text(found: Outcomes) -> str:
    """Write outcomes for people."""
    return ", ".join(
        f"{count} × {outcome}" + (f" sees {seen}" if seen else "")
        for (outcome, seen), count in sorted(found.items())
    )


def unfaithful(
    scenario: str,
    client: str,
    probes: collections.abc.Sequence[tuple[book.Target, Expectation, Outcomes]],
) -> collections.abc.Iterator[Mismatch]:
    """Tell a client of a service with affinity that meets another backend at another address (AFF-2)."""
    for (target, expected, got), (other, same, found) in itertools.pairwise(probes):
        if expected.servers.keys() != same.servers.keys():
            continue
        first, second = ({outcome for outcome, seen in one if seen} for one in (got, found))
        if len(first) == len(second) == 1 and first != second:
            yield Mismatch(
                scenario,
                client,
                f"{target} and {other}",
                "the same backend",
                f"{first} and {second}",
                "no affinity",
            )
