"""`lbproxy trace`: follow connections live through lbproxy's hooks, with observers of its own.

The datapath is not touched and knows nothing of it. What can be told is bounded: by a number
of events, by a time, and in the kernel by a rate for each CPU.
"""

import argparse
import contextlib
import ipaddress
import pathlib
import signal
import time
import types
import typing
from collections.abc import Iterator

import msgspec

from lbproxy import errors, kernel_clock
from lbproxy.commands import explain, output
from lbproxy.config import kinds
from lbproxy.core import (
    addresses,
    explanation,
    inventory,
    known_flow,
    listing,
    model,
    tables,
    walk,
)
from lbproxy.core import trace_events as events
from lbproxy.core import trace_story as story
from lbproxy.kernel import identity, inspection, maps, netns_addresses, node, observers
from lbproxy.trace import flags

_POLL_S: typing.Final = 0.1
_REASONS: typing.Final = 20  # connections that are explained: each is a look through all tables


class Scope(typing.NamedTuple):
    """Whose connections are followed, in the kernel's terms and in words."""

    filter: events.Filter
    services: tuple[int, ...]
    netns: tuple[int, ...]
    words: str


def main(args: argparse.Namespace) -> int:
    """Trace as `args` say; 0 however the connections fared. Raises AgentError, UnsupportedKernel."""
    root: pathlib.Path = args.bpffs
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(contextlib.closing(inspection.open_maps(root)))
        known = inspection.pinned(root)
        scope = _scope(args, opened)
        seen = _Book(root, known, opened)
        stop = stack.enter_context(_stopped())
        watching = observers.Observers(root, known, scope.filter.pack(), scope.services, scope.netns)
        stack.enter_context(watching)
        screen = _Json() if args.output == "json" else _Table()
        screen.begin(scope, watching, seen, args)
        told = _Told(story.Story(seen), screen, args.count)
        _watch(watching, told, stop, args.seconds)
        _end(told, watching, seen, screen)
    return 0


def _watch(watching: observers.Observers, told: "_Told", stop: "_Stop", seconds: float) -> None:
    ring = watching.ring()
    end = time.monotonic() + seconds
    while not (told.full or stop.asked or watching.outlived()) and (left := end - time.monotonic()) > 0:
        for row in ring.poll(min(_POLL_S, left)):
            told.event(row)
        told.settle(kernel_clock.monotonic_ns())
        output.flush()
    # Whoever ends it has seen his connection end: that is told, too.
    for row in ring.rest():
        told.event(row)


def _end(told: "_Told", watching: observers.Observers, seen: "_Book", screen: "_Screen") -> None:
    told.settle(None)
    for connection in told.story.connections:
        screen.outcome(seen.explained(told.story.outcome(connection), connection))
    screen.end(told.count, watching.lost(), full=told.full)
    output.flush()
    if watching.outlived():
        raise errors.AgentError(
            "the datapath was replaced meanwhile, and the new one is not watched: start again"
        )


class _Told:
    """What has been told, so many lines at most."""

    def __init__(self, story_: story.Story, screen: "_Screen", most: int) -> None:
        self.story = story_
        self.count = 0
        self._screen = screen
        self._most = most

    @property
    def full(self) -> bool:
        return self.count >= self._most

    def event(self, row: bytes) -> None:
        if not self.full:
            self._show(self.story.hear(events.unpack(row)))

    def settle(self, now_ns: int | None) -> None:
        self._show(self.story.settle(now_ns))

    def _show(self, lines: list[story.Line]) -> None:
        for line in lines:
            self.count += 1
            self._screen.line(line)


class _Stop:
    """Whether somebody wants it to end."""

    asked = False


@contextlib.contextmanager
def _stopped() -> Iterator[_Stop]:
    """Note SIGINT and SIGTERM instead of dying: there is a summary to show."""
    stop = _Stop()

    def ask(_number: int, _frame: types.FrameType | None) -> None:
        stop.asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- whose connections ---


def _scope(args: argparse.Namespace, rows: maps.BpfMaps) -> Scope:
    words = []
    chosen = events.Filter(rate=args.rate, every_packet=args.every_packet)
    services: tuple[int, ...] = ()
    netns: tuple[int, ...] = ()
    if args.service:
        services = tuple(_services(args.service, rows))
        chosen = chosen._replace(by_service=True)
        words.append(f"to {args.service}")
    if args.destination:
        target: flags.TracedDestination = args.destination
        chosen = chosen._replace(
            to=addresses.packed(target.address),
            port=target.port or 0,
            protocol=target.protocol.value if target.protocol else 0,
        )
        words.append(f"to {target}")
    if args.source:
        source, netns = _from(args.source, rows)
        chosen = chosen._replace(by_source=True, source=source)
        words.append(f"from {args.source}")
    return Scope(chosen, services, netns, " ".join(words) or "to any service")


def _services(wanted: str, rows: maps.BpfMaps) -> Iterator[int]:
    """The numbers of a Service's ports. Raises AgentError where there are none."""
    name, _, port = wanted.partition(":")
    named = listing.named(name)
    found = [
        one
        for one in inventory.read(rows).ports
        if named.takes(one.key.service)
        and (
            not port
            or port == one.key.port_name
            or port in {str(frontend.port) for frontend in one.frontends}
        )
    ]
    if not found:
        raise errors.AgentError(f"no ports of a Service {wanted} here: see `lbproxy services`")
    if len(found) > events.SERVICES:
        raise errors.AgentError(f"{wanted} has more than {events.SERVICES} ports: name one of them")
    return (one.id for one in found)


def _from(source: str, rows: maps.BpfMaps) -> tuple[bytes | None, tuple[int, ...]]:
    """An address, and the namespaces that have it: a socket that dials has no address yet."""
    if source == walk.Client.NODE:
        return None, (inventory.node_ports(rows).host_netns,)
    packed = addresses.packed(kinds.parse_ip(source))
    return packed, netns_addresses.having(packed)[: events.NAMESPACES]


# --- what things are called, and why ---


class _Book:
    """The tables, asked as they are now."""

    def __init__(self, root: pathlib.Path, known: identity.Identity, rows: maps.BpfMaps) -> None:
        self._rows = rows
        self._known = known
        self._node_ports = inventory.node_ports(rows)
        self._elsewhere = self._node_ports.host_netns not in (0, node.netns_cookie())
        self.devices = inspection.attached_devices(root, self._node_ports.host_netns)
        self._names = {one.ifindex: one.name for one in self.devices}
        self._hooks = explain.hooks(root, known, self.devices)
        self._backends: dict[events.End, str] | None = None
        self._reasons: dict[tuple[str, str], str] = {}

    def service(self, end: events.End, protocol: int) -> str:
        """The service port that an address and port belong to; empty for none."""
        port = end.port.to_bytes(2, "big")
        found = inventory.frontend_at(self._rows, end.address, port, protocol, self._on_node)
        if found is None:
            return ""
        named = inventory.port_key(self._rows, found.service)
        if named is None:
            return f"service {found.service}"
        port_name = f":{named.port_name}" if named.port_name else ""
        return f"{named.service.namespace}/{named.service.name}{port_name}"

    def _on_node(self, address: bytes) -> bool:
        return address in self._node_ports.local or addresses.is_loopback(address)

    def backend(self, end: events.End) -> str:
        """The node that a backend is on, and its state where that is not active."""
        if self._backends is None or end not in self._backends:
            found = inventory.read(self._rows)
            every = [*found.orphans, *(one for port in found.ports for one in port.backends)]
            self._backends = {events.End(one.address, one.port): _where(one) for one in every}
        return self._backends.setdefault(end, "")

    def device(self, ifindex: int) -> str:
        """A device's name, or number."""
        return self._names.get(ifindex, str(ifindex))

    def owner(self, netns: int) -> str:
        """Whose a network namespace is."""
        return "on the node" if netns == self._node_ports.host_netns else "in a pod"

    def begins_nothing(self, *, by_socket: bool) -> str:
        """Why lbproxy begins no flow now; empty where it does."""
        return walk.begins_nothing(self._rows, by_socket=by_socket)

    def explained(self, outcome: story.Outcome, of: story.Connection) -> story.Outcome:
        """An outcome with what the tables say of it now."""
        outcome = msgspec.structs.replace(outcome, flow=self._flow(of))
        if not of.is_of_lbproxy or of.protocol not in set(model.Protocol):
            return outcome
        client = walk.Client.NODE if of.owner == "on the node" else walk.Client.POD
        if of.source and not of.by_socket:
            source, port = addresses.text(of.source.address), of.source.port
        else:
            source, port = client.value, 0
        return msgspec.structs.replace(outcome, reason=self._reason(source, port, of, outcome.verdict))

    def _reason(self, source: str, port: int, of: story.Connection, verdict: str) -> str:
        target = walk.Target(
            ipaddress.ip_address(addresses.text(of.dialled.address)),
            of.dialled.port,
            model.Protocol(of.protocol),
        )
        asked = (source, str(target))
        if asked not in self._reasons:
            if len(self._reasons) >= _REASONS:
                return ""
            now_s = int(kernel_clock.monotonic_s())
            told = explanation.explain(self._rows, self._hooks, source, target, now_s, source_port=port)
            agreed = told.verdict == verdict
            self._reasons[asked] = told.reason if agreed else f"now it would be {told.verdict}: {told.reason}"
        return self._reasons[asked]

    def _flow(self, of: story.Connection) -> str:
        """The row of a flow where it comes in, in words; empty where it has none."""
        if of.source is None or of.by_socket:
            return ""
        settings = inventory.settings(self._rows)
        ends = known_flow.Ends(*of.source, *of.dialled, of.protocol)
        found = known_flow.find(self._rows, ends, settings, kernel_clock.monotonic_s())
        return known_flow.in_words(found, of.protocol, settings) if found is not None else ""


def _where(backend: inventory.Backend) -> str:
    parts = [f"on {backend.node}"] if backend.node else []
    if backend.state is not tables.BackendState.ACTIVE:
        parts.append(listing.state_name(backend.state))
    return ", ".join(parts)


# --- how it is shown ---


class _Screen(typing.Protocol):
    def begin(
        self, scope: Scope, watching: observers.Observers, seen: _Book, args: argparse.Namespace
    ) -> None: ...

    def line(self, line: story.Line) -> None: ...

    def outcome(self, outcome: story.Outcome) -> None: ...

    def end(self, count: int, lost: int, *, full: bool) -> None: ...


def _notes(watching: observers.Observers, seen: _Book) -> Iterator[str]:
    """What can not be seen."""
    yield from watching.problems
    if not watching.watched:
        yield "no packets: the packet path is attached to no device that can be seen from here"
    for device in seen.devices:
        if device.xdp:
            yield f"{device.name}: packets that XDP sends on at once are not seen (--xdp)"


class _Table:
    """Lines for people, as they come."""

    def begin(
        self, scope: Scope, watching: observers.Observers, seen: _Book, args: argparse.Namespace
    ) -> None:
        """Say what is looked at."""
        devices = ", ".join(seen.device(one) for one in sorted(watching.watched)) or "no device"
        output.write(
            f"tracing connections {scope.words}, at sockets and at {devices}: "
            f"{args.count} lines or {args.seconds:g} s, Ctrl-C ends"
        )
        for note in _notes(watching, seen):
            output.write(f"note: {note}")
        output.write(f"{'SECONDS':>10}  {'ID':<4} {'WHERE':<12} WHAT")
        output.flush()

    def line(self, line: story.Line) -> None:
        """Print one."""
        output.write(f"{line.time_s:10.6f}  {f'#{line.connection}':<4} {line.where:<12} {line.text}")

    def outcome(self, outcome: story.Outcome) -> None:
        """Print what became of a connection; the first is preceded by a blank line."""
        if outcome.connection == 1:
            output.write("")
        name = f" ({outcome.service})" if outcome.service else ""
        output.write(
            f"#{outcome.connection} {outcome.source} → {outcome.destination}/{outcome.protocol}{name}: "
            f"{outcome.verdict}: {outcome.text}"
        )
        for what, more in (("why", outcome.reason), ("flow", outcome.flow)):
            if more:
                output.write(f"   {what}: {more}")

    def end(self, count: int, lost: int, *, full: bool) -> None:
        """Print the sum."""
        why = "; there may be more, see --count" if full else ""
        output.write(f"\n{count} lines, {lost} events lost{why}")


class _Json:
    """A JSON object a line."""

    def begin(
        self, scope: Scope, watching: observers.Observers, seen: _Book, args: argparse.Namespace
    ) -> None:
        """Say what is looked at."""
        devices = [seen.device(one) for one in sorted(watching.watched)]
        told = {"event": "begin", "scope": scope.words, "devices": devices}
        self._write(told | {"notes": list(_notes(watching, seen))})
        output.flush()

    def line(self, line: story.Line) -> None:
        """Print one."""
        self._write(line)

    def outcome(self, outcome: story.Outcome) -> None:
        """Print one."""
        self._write({"event": "verdict", **msgspec.to_builtins(outcome)})

    def end(self, count: int, lost: int, *, full: bool) -> None:
        """Print the sum."""
        self._write({"event": "end", "lines": count, "lost": lost, "full": full})

    def _write(self, value: object) -> None:
        output.write(msgspec.json.encode(value).decode())
