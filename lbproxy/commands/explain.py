"""`lbproxy explain`: what the kernel would do with a connection now, step by step."""

import argparse
import contextlib
import pathlib
from collections.abc import Iterable, Iterator

from lbproxy import errors, kernel_clock, noting
from lbproxy.commands import render
from lbproxy.config import kinds
from lbproxy.core import addresses, explanation, inventory, listing, walk
from lbproxy.core import devices as roles
from lbproxy.kernel import identity, inspection, netns_addresses


def main(args: argparse.Namespace) -> int:
    """Explain `args.source` to `args.destination`; 0 whatever the verdict. Raises AgentError, ConfigError."""
    root: pathlib.Path = args.bpffs
    target = walk.Target(*args.destination)
    source, port = _split(args.source)
    _check(source, target)
    with contextlib.closing(inspection.open_maps(root)) as rows:
        devices = inspection.attached_devices(root, inventory.node_ports(rows).host_netns)
        seen = hooks(root, inspection.pinned(root), devices)
        own = _namespaces(source)
        now_s = int(kernel_clock.monotonic_s())
        found = explanation.explain(rows, seen, source, target, now_s, own, port, noting.read(root))
        found = explanation.with_neighbours(rows, target, found)
    render.show(found, args.output, lambda: _present(found))
    return 0


def hooks(root: pathlib.Path, known: identity.Identity, devices: Iterable[inspection.Device]) -> walk.Hooks:
    """Where the programs are attached, and what is missing."""
    broken = frozenset(hook.name for hook in inspection.hooks(root, known) if not hook.attached)
    serving = [one for one in devices if not one.problem]
    uplinks = tuple(_called(one) for one in serving if one.role is roles.Role.UPLINK)
    inside = (roles.Role.POD, roles.Role.INSIDE)
    others = tuple(_called(one) for one in serving if one.role in inside)
    return walk.Hooks(known.cgroup, broken, uplinks, others)


def _split(source: str) -> tuple[str, int]:
    """An address, or who it is, and the port; 0 where none is given."""
    try:
        address, port, _ = kinds.parse_destination(source)
    except ValueError:
        return source, 0
    return str(address), port


def _check(source: str, target: walk.Target) -> None:
    """Raise ConfigError where no connection can come from `source`, or none to `target`."""
    packed = addresses.parse(source)
    if packed is None:
        return
    if packed in (addresses.IPV4_ZERO, addresses.IPV6_ZERO):
        raise errors.ConfigError(f"--from: nobody connects from {source}: it stands for any address")
    family = addresses.family_of(packed)
    if family is not target.family:
        raise errors.ConfigError(
            f"--from {source} is IPv{family.value} and --to {target} is IPv{target.family.value}: "
            "a connection has one family"
        )


def _namespaces(source: str) -> tuple[int, ...]:
    """The network namespaces here that have an address; none for a `Client`, or where none can be entered."""
    packed = addresses.parse(source)
    return netns_addresses.having(packed) if packed is not None else ()


def _called(device: inspection.Device) -> str:
    if device.name != str(device.ifindex):
        return device.name
    return f"number {device.ifindex} (seen from another network namespace)"


_COLORS = {
    walk.Verdict.BALANCED.value: render.Color.GOOD,
    walk.Verdict.REFUSED.value: render.Color.BAD,
    walk.Verdict.DROPPED.value: render.Color.BAD,
    walk.Verdict.UNTOUCHED.value: render.Color.WARNING,
}


def _present(found: explanation.Explanation) -> Iterator[render.Table | str]:
    steps: list[render.Row] = [(str(n), step.step, step.result) for n, step in enumerate(found.steps, 1)]
    verdict = render.Cell(found.verdict, _COLORS[found.verdict])
    yield render.Table(("STEP", "QUESTION", "ANSWER"), [*steps, ("=", verdict, found.reason)], prose=True)
    yield from _backends(found)


_FEW = 10  # backends that are left out and named


def _backends(found: explanation.Explanation) -> Iterator[render.Table | str]:
    if found.backends:
        yield ""
        yield render.Table(
            ("BACKEND", "SHARE", "STATE", "NODE", "ZONE"),
            [
                (listing.place(b.ip, b.port), f"{b.percent:.2f}%", b.state, b.node, b.zone)
                for b in found.backends
            ],
        )
    if found.left_out:
        yield ""
        rows = [
            (listing.place(one.ip, one.port), one.state, one.node, one.why) for one in found.left_out[:_FEW]
        ]
        yield render.Table(("LEFT OUT", "STATE", "NODE", "WHY"), rows, prose=True)
        if len(found.left_out) > _FEW:
            yield f"and {len(found.left_out) - _FEW} more: `lbproxy backends`"
