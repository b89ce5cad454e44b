"""`lbproxy services`, `backends`, `status` and `maps`: what the kernel holds, with or without an agent."""

import argparse
import contextlib
import pathlib
from collections.abc import Iterator, Sequence

import msgspec

from lbproxy import errors, noting
from lbproxy.commands import render, status
from lbproxy.core import inventory, listing, model, notes, wording
from lbproxy.kernel import inspection

# How many frontends or backends of a service the table names, where no service is asked for by name.
_FEW = 3


def main(args: argparse.Namespace) -> int:
    """Show what `args.command` names; returns the exit status. Raises AgentError where nothing is pinned."""
    root: pathlib.Path = args.bpffs
    wanted = _wanted(args)
    noted = noting.read(root)
    with contextlib.closing(inspection.open_maps(root)) as opened:
        match args.command:
            case "services":
                return _services(opened, wanted, noted, args.output)
            case "backends":
                return _backends(opened, wanted, noted, args.output)
            case "status":
                return status.show(root, opened, args.output)
            case "maps":
                return status.show_maps(opened, args.output)
    raise ValueError(args.command)


def _wanted(args: argparse.Namespace) -> listing.Filter:
    """What the arguments choose. Raises ConfigError."""
    namespace = args.namespace
    if namespace is not None and (not namespace or "/" in namespace):
        raise errors.ConfigError(f"-n: {namespace!r} is not a NAMESPACE")
    if args.name is None:
        return listing.Filter(namespace)
    try:
        wanted = listing.named(args.name)
    except ValueError as error:
        raise errors.ConfigError(str(error)) from error
    if None not in (namespace, wanted.namespace) and namespace != wanted.namespace:
        raise errors.ConfigError(f"{args.name} is not in the namespace {namespace}")
    return wanted._replace(namespace=wanted.namespace or namespace)


def _must_exist(found: Sequence[object], wanted: listing.Filter, what: str) -> None:
    if found or wanted == listing.EVERYTHING:
        return
    if wanted.name is None:
        raise errors.AgentError(f"no {what} in the namespace {wanted.namespace} here")
    name = f"{wanted.namespace}/{wanted.name}" if wanted.namespace else wanted.name
    raise errors.AgentError(f"no {what} of a Service {name} here")


def _services(opened: inventory.Rows, wanted: listing.Filter, noted: notes.Notes, form: str) -> int:
    found = listing.services(inventory.read(opened), inventory.node_ports(opened), wanted, noted)
    _must_exist(found, wanted, "ports")
    limit = None if wanted.name else _FEW
    render.show(found, form, lambda: (*_services_table(found, limit), *_unnoted(noted)))
    return 0


def _services_table(found: Sequence[listing.ServicePort], limit: int | None) -> Iterator[render.Table | str]:
    columns = ("SERVICE", "FRONTENDS", "BACKENDS", "USABLE", "ALGORITHM", "CONNECTIONS", "REFUSED", "PROBE")
    rows = []
    for port in found:
        port_name = f"{port.port_name}/{port.protocol}" if port.port_name else port.protocol
        usable = sum(1 for backend in port.backends if backend.usable)
        rows.append(
            (
                render.Cell(
                    f"{port.namespace}/{port.name}:{port_name}",
                    full=f"{port.namespace}/{port.name}\n{port_name}",
                ),
                _few([_frontend_text(frontend) for frontend in port.frontends], limit),
                _few([listing.place(backend.ip, backend.port) for backend in port.backends], limit),
                _usable_cell(port, usable),
                port.algorithm,
                port.connections,
                port.refused,
                _probe_cell(port.probe),
            )
        )
    yield render.Table(columns, rows)
    if any(port.protocol == model.Protocol.SCTP.name for port in found):
        yield ""
        yield f"SCTP is served packet by packet: {listing.NO_SCTP}."
    probes = [(port, port.probe) for port in found if port.probe is not None]
    for why in {probe.off for _, probe in probes} - {""}:
        yield ""
        yield f"Probes are asked for and not made: {why}."
    invalid = {f"{port.namespace}/{port.name}: {probe.invalid}" for port, probe in probes if probe.invalid}
    if invalid:
        yield ""
    yield from _lines(sorted(invalid), "Services whose annotations are not understood")


def _unnoted(noted: notes.Notes) -> Iterator[str]:
    if noted.left_out:
        yield ""
        yield f"{noted.left_out} more ports, backends or rejections have no room in the agent's notes."


def _probe_cell(asked: listing.Probe | None) -> render.Cell:
    if asked is None:
        return render.Cell("")
    if asked.invalid:
        return render.Cell("invalid", render.Color.BAD)
    kind = asked.asks.partition(" ")[0]
    if asked.off:
        return render.Cell(f"{kind},off", render.Color.WARNING, f"{asked.asks}\noff")
    return render.Cell(kind, full=asked.asks)


def _usable_cell(port: listing.ServicePort, usable: int) -> render.Cell:
    if port.all_unhealthy:
        return render.Cell(f"{usable}/{len(port.backends)},all-unhealthy", render.Color.BAD)
    return render.Cell(f"{usable}/{len(port.backends)}", None if usable else render.Color.BAD)


def _frontend_text(frontend: listing.Frontend) -> str:
    if isinstance(frontend.addresses, msgspec.UnsetType):
        return f"{frontend.type}={listing.place(frontend.ip, frontend.port)}"
    return f"{frontend.type}=*:{frontend.port}"


def _few(items: Sequence[str], limit: int | None) -> render.Cell:
    """A cell of items: one a line on a terminal, one word elsewhere; the rest is a number."""
    shown = list(items)
    if limit is not None and len(items) > limit:
        shown = [*items[:limit], f"+{len(items) - limit}"]
    return render.Cell(",".join(shown), full="\n".join(shown))


_STATE_COLORS = {
    "active": render.Color.GOOD,
    "terminating": render.Color.WARNING,
    "serving": render.Color.WARNING,
    "unready": render.Color.BAD,
    "draining": render.Color.WARNING,
    "unhealthy": render.Color.BAD,
}


def _backends(opened: inventory.Rows, wanted: listing.Filter, noted: notes.Notes, form: str) -> int:
    found = listing.backends(inventory.read(opened), wanted, noted)
    _must_exist(found, wanted, "backends")
    render.show(found, form, lambda: (*_backends_table(found), *_unnoted(noted)))
    return 0


def _backends_table(found: Sequence[listing.BackendOfService]) -> Iterator[render.Table | str]:
    columns = (
        "BACKEND",
        "PROTOCOL",
        "SERVICE",
        "STATE",
        "USABLE",
        "NODE",
        "ZONE",
        "WEIGHT",
        "CONNECTIONS",
        "OPEN",
        "FAILED",
        "RTT",
        "HEALTH",
        "PROBE",
    )
    yield render.Table(
        columns,
        [
            (
                listing.place(backend.ip, backend.port),
                backend.protocol,
                _service_text(backend),
                render.Cell(backend.state, _STATE_COLORS[backend.state]),
                ",".join(backend.sets),
                backend.node,
                backend.zone,
                backend.weight,
                backend.connections,
                "" if backend.open_connections is None else backend.open_connections,
                _failed(backend),
                f"{rtt_ms:.2f}ms" if (rtt_ms := backend.tcp.rtt_ms or backend.tcp_elsewhere.rtt_ms) else "",
                ",".join(backend.health),
                _probed_cell(backend.probe),
            )
            for backend in found
        ],
        right=("OPEN", "FAILED", "RTT"),
    )
    troubled = [
        f"{_backend_text(backend)}: {_trouble_text(backend.probe)}"
        for backend in found
        if backend.probe is not None and backend.probe.since
    ]
    if troubled:
        yield ""
    yield from _lines(troubled, "whose probes fail")
    # Why backends are not asked is the same of many.
    others = [(backend, backend.probe) for backend in found if backend.probe is not None]
    for state in (listing.NOT_ASKED, listing.OFF):
        of_state = [(backend, probe.reason) for backend, probe in others if probe.state == state]
        for why in dict.fromkeys(reason for _, reason in of_state):
            first, *more = (backend for backend, reason in of_state if reason == why)
            yield ""
            yield f"{state}: {_one_of(first, more)}: {why}"
    if unseen := [backend for backend in found if backend.not_seen]:
        yield ""
        yield (
            f"not seen: how connections by DSR to {_one_of(unseen[0], unseen[1:])} fare: "
            "backends of other nodes answer past this one, and are counted there"
        )


_LINES = 20  # below a table, of one kind


def _lines(lines: Sequence[str], of_what: str) -> Iterator[str]:
    return wording.first(lines, len(lines), _LINES, f"{of_what}: -o json")


def _one_of(first: listing.BackendOfService, others: Sequence[listing.BackendOfService]) -> str:
    more = f" and {len(others)} more" if others else ""
    return f"{_backend_text(first)}{more}"


def _backend_text(backend: listing.BackendOfService) -> str:
    return f"{listing.place(backend.ip, backend.port)} of {_service_text(backend)}"


_PROBE_COLORS = {
    listing.UP: render.Color.GOOD,
    listing.FAILING: render.Color.WARNING,
    listing.DOWN: render.Color.BAD,
    listing.NOT_ASKED: None,
    listing.OFF: render.Color.WARNING,
}


def _probed_cell(of: listing.BackendProbe | None) -> render.Cell:
    if of is None:
        return render.Cell("")
    counted = f",{of.in_a_row}/{of.needed}" if of.since else ""
    return render.Cell(f"{of.state}{counted}", _PROBE_COLORS[of.state])


def _trouble_text(of: listing.BackendProbe) -> str:
    if of.state == listing.FAILING:
        return f"failing since {of.since}, {of.in_a_row} of {of.needed} times in a row: {of.reason}"
    passed = f"; passed {of.in_a_row} of {of.needed} times since" if of.in_a_row else ""
    return f"down, failing since {of.since}: {of.reason}{passed}"


def _failed(of: listing.BackendOfService) -> render.Cell:
    """How many connections failed; nothing where none was seen that could."""
    both = (of.tcp, of.tcp_elsewhere)
    count = sum(tcp.refused + tcp.unanswered + tcp.reset + tcp.lost for tcp in both)
    seen = of.protocol == model.Protocol.TCP.name and not of.not_seen
    if not count and not seen and not any(tcp.established for tcp in both):
        return render.Cell("")
    return render.Cell(str(count), render.Color.BAD if count else None)


def _service_text(backend: listing.BackendOfService) -> str:
    if not backend.name:
        return ""
    port = f":{backend.port_name}" if backend.port_name else ""
    return f"{backend.namespace}/{backend.name}{port}"
