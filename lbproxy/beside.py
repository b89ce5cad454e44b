"""Says what else is at work on this node: kube-proxy's rules, another lbproxy."""

import logging
import pathlib

from lbproxy import cgroup2

_log = logging.getLogger(__name__)


def tell_leftovers() -> None:
    """Say what kube-proxy has left (CLI-6); that it is to go is for somebody else to decide."""
    from lbproxy import leftovers  # noqa: PLC0415 - needed once

    if found := leftovers.present():
        goes = leftovers.removable(found)
        how = "; once it no longer runs here, remove them with: lbproxy migrate take-over" if goes else ""
        _log.warning("kube-proxy's rules are still in force beside ours: %s%s", ", ".join(found), how)
        for said in leftovers.staying(found):
            _log.warning("%s", said)


def tell_another(root: pathlib.Path, cgroup: pathlib.Path) -> None:
    """Say that another lbproxy balances the same sockets."""
    if said := another(root, cgroup):
        _log.error("%s", said)


def another(root: pathlib.Path, cgroup: pathlib.Path) -> str:
    """What is said of another lbproxy that balances the same sockets; empty where none is seen."""
    from lbproxy.core.preflight import owners  # noqa: PLC0415 - needed once
    from lbproxy.kernel import attached  # noqa: PLC0415

    try:
        mount = cgroup2.mount_point() or cgroup
        others = attached.at_cgroup(cgroup, mount, attached.own_programs(root))
    except OSError:
        return ""
    theirs = [one for one in others if one.owner == owners.LBPROXY]
    if not theirs:
        return ""
    hooks = ", ".join(sorted({one.hook for one in theirs}))
    return (
        f"another lbproxy's programs are at {hooks} of {theirs[0].place}: both balance the same sockets; "
        "stop that one and remove it with: lbproxy cleanup --bpffs PATH (lbproxy preflight names it)"
    )
