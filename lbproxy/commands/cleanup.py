"""`lbproxy cleanup`: leave no trace in the kernel, and with --kube-proxy none of kube-proxy either.

Removing the pins detaches programs and frees maps.
"""

import argparse
import os
import pathlib
import sys

from lbproxy import errors, leftovers, noting
from lbproxy.commands import output
from lbproxy.kernel import anchor, bpffs, bytecode, datapath, hooks, inspection

_FOLDERS = ("links", "programs", "maps")


def main(args: argparse.Namespace) -> int:
    """Remove what is pinned under `args.bpffs`, and on demand what kube-proxy left (CLI-5).

    Raises AgentError where an agent runs on it, unless kube-proxy's is to be removed.
    """
    root: pathlib.Path = args.bpffs
    output.write(_remove(root, beside_agent=args.kube_proxy))
    if not inspection.agent(root).running and _remove_anchor():
        output.write(f"removed table inet {anchor.NAME}: what kube-proxy began is no longer kept alive by it")
    return _remove_kube_proxys() if args.kube_proxy else 0


def _remove_anchor() -> bool:
    try:
        return anchor.remove()
    except PermissionError as error:
        why = f"{error.strerror}: that needs CAP_NET_ADMIN"
        raise errors.AgentError(f"cannot tell whether table inet {anchor.NAME} is there: {why}") from error
    except OSError as error:
        raise errors.AgentError(f"cannot remove table inet {anchor.NAME}: {error.strerror}") from error


def _remove_kube_proxys() -> int:
    done = leftovers.Cleanup()
    done.all()
    for what in done.removed:
        output.write(f"removed what kube-proxy left: {what}")
    for what in done.kept:
        output.write(f"left alone: {what}")
    left = [*done.failed, *done.unable] or [f"{what} is still there" for what in leftovers.present()]
    if not (done.removed or left):
        output.write(f"nothing to remove: kube-proxy has left nothing{' else' if done.kept else ''}")
    for what in left:
        print(f"lbproxy: error: {what}", file=sys.stderr)
    return 1 if left else 0


def _remove(root: pathlib.Path, *, beside_agent: bool) -> str:
    try:
        if not _is_there(root):
            return f"nothing to remove: there is nothing at {root}"
        if not bpffs.is_bpffs(root):
            return f"nothing to remove: {root} holds no lbproxy datapath"
        agent = inspection.agent(root)
        if agent.running and beside_agent:
            # Taking over from kube-proxy: the agent serves while the old rules go.
            return f"left alone: an lbproxy agent runs on {root}"
        if agent.running:
            pid = f" (pid {agent.pid})" if agent.pid else ""
            raise errors.AgentError(f"an lbproxy agent{pid} runs on {root}: stop it first")
        lock = bpffs.lock(root)
        try:
            strange = sorted(path.name for path in root.iterdir() if not _ours(path))
            if strange:
                raise errors.AgentError(
                    f"{root} holds what is not lbproxy's, such as {strange[0]}: left alone"
                )
            counts = _counts(root)
            bpffs.remove(root)
            bytecode.forget()
        finally:
            os.close(lock)
    except PermissionError as error:
        why = f"{error.strerror}: lbproxy must be root"
        raise errors.AgentError(f"may not look at what is in {root}: {why}") from error
    except OSError as error:
        raise errors.AgentError(f"cannot remove {root}: {error.strerror}") from error
    return f"removed {root}: {', '.join(counts) or 'no pins in it'}"


def _is_there(root: pathlib.Path) -> bool:
    """Whether there is anything at a path. Raises PermissionError where one may not look into it."""
    try:
        os.scandir(root).close()
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        return True
    return True


def _ours(path: pathlib.Path) -> bool:
    known = (*datapath.NAMES, noting.PIN)
    # A bpffs shows iterators of its own, such as maps.debug, in its root.
    return path.name.removeprefix(hooks.NEW) in known or path.name.endswith(".debug")


def _counts(root: pathlib.Path) -> list[str]:
    found = ((name, sum(1 for path in (root / name).rglob("*") if not path.is_dir())) for name in _FOLDERS)
    return [f"{count} {name}" for name, count in found if count]
