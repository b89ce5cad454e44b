"""`lbproxy migrate`: from kube-proxy to lbproxy and back, on this node, without breaking a connection.

The agent does what is hard, and by itself: when it starts it leaves to kube-proxy what kube-proxy
has begun (`handover`). What is left is to remove kube-proxy's rules once it is gone, and for the
way back to stop beginning flows, and to see when the last one has ended.
"""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Iterator, Mapping

import msgspec

from lbproxy import errors, leftovers, noting
from lbproxy.commands import render
from lbproxy.core import inventory, ipvs, migration, tables
from lbproxy.core import leftovers as kube_proxys
from lbproxy.kernel import anchor, inspection, maps
from lbproxy.kernel import ipvs as virtual
from lbproxy.migrate import flags, taking_over


class Status(msgspec.Struct, frozen=True):
    """How far the way is. Flows are of packets; sockets go on by themselves, whoever balances."""

    agent_running: bool
    returning: bool  # no flow is begun any more
    learning: bool  # the agent is about to take over
    unserved: list[str]  # why it does not serve all that kube-proxy's rules would
    kube_proxy_running: bool
    kube_proxy_rules: list[str]  # what of kube-proxy is in force
    not_removable: list[str]  # what of it nothing here can remove, and what to do about that
    not_looked_for: list[str]  # what of it may not be looked for
    ipvs_mode: ipvs.Found | None  # where kube-proxy ran in IPVS mode
    kept_alive: bool  # by the table inet lbproxy-handover
    flows_of_kube_proxy: dict[str, int]  # to addresses that lbproxy serves, by protocol
    flows_of_lbproxy: dict[str, int]
    sockets_of_lbproxy: int


class TakenOver(msgspec.Struct, frozen=True):
    """What `take-over` has done, or would do."""

    dry_run: bool
    flows_of_kube_proxy: dict[str, int]  # that go on
    removed: list[str]  # with dry_run: what would be
    resumed: bool  # new flows are lbproxy's again, which they were not
    kept: list[str]  # what others use of it, or have beside it, and why; with dry_run: as far as it is seen
    problems: list[str]  # with dry_run: what of the rules nothing here can remove
    not_looked_for: list[str]


class GivenBack(msgspec.Struct, frozen=True):
    """What `return` has done, or would do."""

    dry_run: bool
    flows_of_lbproxy: dict[str, int]  # that go on
    reserved_ports: int  # which kube-proxy is kept from
    problem: str


def main(args: argparse.Namespace) -> int:
    """Do what `args.step` names; returns the exit status. Raises LbproxyError."""
    flags.check(args)
    if args.step == "cluster":
        from lbproxy.migrate import cluster  # noqa: PLC0415 - not for a node

        return cluster.main(args)
    with contextlib.closing(inspection.open_maps(args.bpffs)) as opened:
        match args.step:
            case "status":
                found = read(args.bpffs, opened)
                render.show(found, args.output, lambda: _present(found))
                return 0
            case "take-over":
                return _take_over(args, opened)
            case "return":
                return _return(args, opened)
    raise ValueError(args.step)


def read(root: pathlib.Path, opened: maps.BpfMaps) -> Status:
    """Look at everything. Raises AgentError where the kernel can not be asked."""
    found, rules = taking_over.flows(opened), leftovers.present()
    return Status(
        inspection.agent(root).running,
        inventory.is_set(opened, tables.Handover.RETURN),
        inventory.is_set(opened, tables.Handover.LEARN),
        list(noting.read(root).unserved),
        bool(taking_over.kube_proxies()),
        rules,
        leftovers.staying(rules),
        leftovers.unseen(),
        virtual.look(),
        anchor.exists(),
        found.of_kube_proxy,
        found.of_lbproxy,
        sum(1 for _, row in opened.rows("sockets") if any(row[:8])),
    )


def _take_over(args: argparse.Namespace, opened: maps.BpfMaps) -> int:
    found = read(args.bpffs, opened)
    if not found.agent_running:
        raise errors.AgentError(
            "no lbproxy agent runs here: start one first; it leaves open connections alone"
        )
    if found.learning:
        raise errors.AgentError("the agent is not ready yet: try again when /healthz says 200")
    if running := taking_over.kube_proxies():
        pids = ", ".join(map(str, running))
        raise errors.AgentError(
            f"kube-proxy runs here (pid {pids}), and would write its rules again: {kube_proxys.HOW_TO_STOP}"
        )
    if found.unserved and not args.force:
        raise errors.AgentError(
            f"lbproxy does not serve all that kube-proxy's rules do: {'; '.join(found.unserved)}. --force "
            "removes them all the same"
        )
    if (problem := ipvs.obstacle(found.ipvs_mode)) and not args.force:
        raise errors.AgentError(f"{problem}. --force removes them all the same")
    flows = found.flows_of_kube_proxy
    if args.dry_run:
        said = TakenOver(
            True,
            flows,
            leftovers.removable(found.kube_proxy_rules),
            found.returning,
            _to_be_kept(found),
            found.not_removable,
            found.not_looked_for,
        )
        render.show(said, args.output, lambda: _present_taken_over(said, flows))
        return 0
    done = taking_over.take_over_beside(opened)
    said = TakenOver(
        False,
        taking_over.flows(opened).of_kube_proxy,
        list(done.removed),
        found.returning,
        list(done.kept),
        [*done.failed, *done.unable, *(f"{what} is still there" for what in done.left)],
        found.not_looked_for,
    )
    render.show(said, args.output, lambda: _present_taken_over(said, flows))
    for what in said.problems:
        print(f"lbproxy: error: {what}", file=sys.stderr)
    return 1 if said.problems else 0


def _to_be_kept(found: Status) -> list[str]:
    others = found.ipvs_mode.others if found.ipvs_mode else ()
    return [*leftovers.kept(), *([f"IPVS: {ipvs.others(others)}"] if others else [])]


def _present_taken_over(said: TakenOver, before: Mapping[str, int]) -> Iterator[render.Table | str]:
    yield f"connections that kube-proxy began, and that stay as they are: {migration.counted(before)}"
    if said.resumed:
        yield "would begin new flows again" if said.dry_run else "new flows are lbproxy's again"
    for what in said.removed:
        yield f"{'would remove' if said.dry_run else 'removed'}: {what}"
    if not said.removed and not said.problems:
        yield "nothing of kube-proxy's is there to be removed"
    for what in said.kept:
        yield f"{'would leave alone' if said.dry_run else 'left alone'}: {what}"
    if said.dry_run:
        yield from said.problems
    if said.dry_run or said.problems:
        return
    for what in said.not_looked_for:
        yield f"not looked for, for want of rights: {what}"
    still = migration.counted(said.flows_of_kube_proxy)
    yield f"taken over. Connections that kube-proxy began and that go on: {still}"


def _return(args: argparse.Namespace, opened: maps.BpfMaps) -> int:
    found = read(args.bpffs, opened)
    if not args.force and (problem := _lacking(opened)):
        raise errors.AgentError(
            f"{problem}: start kube-proxy first, beside lbproxy (ports 10256 and 10249 it gets when lbproxy "
            "ends), and wait until its rules are there; --force where they are"
        )
    ours = found.flows_of_lbproxy
    done = None if args.dry_run else taking_over.give_back(opened)
    if done and done.problem:
        print(f"lbproxy: {done.problem}", file=sys.stderr)
    said = GivenBack(args.dry_run, ours, done.reserved if done else 0, done.problem if done else "")
    render.show(said, args.output, lambda: _present_given_back(said))
    return 0


def _lacking(opened: maps.BpfMaps) -> str:
    try:
        return leftovers.lacking(opened)
    except OSError as error:
        return f"kube-proxy's rules could not be looked for: {error.strerror or error}"


def _present_given_back(said: GivenBack) -> Iterator[render.Table | str]:
    ours = migration.counted(said.flows_of_lbproxy)
    if said.dry_run:
        yield f"would begin no flow any more, and leave new ones to kube-proxy; going on: {ours}"
        return
    if said.reserved_ports and not said.problem:
        ports = f"{said.reserved_ports} ports that flows are masqueraded with"
        yield f"{ports} are reserved in the connection tracker"
    yield "new flows are kube-proxy's from now on, also after a restart of the agent"
    yield f"what goes on with lbproxy: {ours}; `lbproxy migrate status` says when it has ended"
    yield "then stop the agent and run: lbproxy cleanup. `lbproxy migrate take-over` changes your mind"


def _present(found: Status) -> Iterator[render.Table | str]:
    if found.returning:
        state = "returning: new flows are kube-proxy's"
        if not found.flows_of_lbproxy:
            state += "; none of lbproxy's is left: stop the agent, then lbproxy cleanup"
    elif found.learning:
        state = "the agent is about to take over"
    elif found.kube_proxy_running or found.kube_proxy_rules:
        state = "lbproxy serves new flows; kube-proxy's rules are to go: lbproxy migrate take-over"
    else:
        state = "lbproxy serves"
    if found.unserved:
        state += f"; not all of it: {'; '.join(found.unserved)}"
    rules = ", ".join(found.kube_proxy_rules) or "none"
    if found.not_looked_for:
        rules += f" (not looked for: {', '.join(found.not_looked_for)})"
    yield render.Table(
        ("WHAT", "HOW IT IS"),
        [
            ("state", state),
            ("agent", "runs" if found.agent_running else "does not run"),
            ("kube-proxy", "runs" if found.kube_proxy_running else "does not run here, or is not seen"),
            ("kube-proxy's rules", rules),
            *(("not removable here", what) for what in found.not_removable),
            *([("IPVS", ipvs.described(found.ipvs_mode))] if found.ipvs_mode else []),
            ("connections kube-proxy began", migration.counted(found.flows_of_kube_proxy)),
            (
                "kept alive without its rules",
                f"yes, by table inet {anchor.NAME}" if found.kept_alive else "no",
            ),
            ("flows lbproxy translates", migration.counted(found.flows_of_lbproxy)),
            ("sockets led to a backend", found.sockets_of_lbproxy),
        ],
        prose=True,
    )
