"""Looks for what kube-proxy left in the kernel, and removes it when told to.

A tool that is not installed, or a table that does not exist, is no failure: then
there is nothing to remove with it. What the tools themselves report is.
"""

import os
import pathlib
import shutil
import socket
import subprocess
import typing

from lbproxy.core import leftovers

_TIMEOUT_S: typing.Final = 120.0
_LOCK_WAIT_S: typing.Final = "30"  # for /run/xtables.lock (CO-6)
_PROC: typing.Final = pathlib.Path("/proc/net")


class _Tool(typing.NamedTuple):
    """One of the families and flavours of iptables; `names` is the file with its tables."""

    name: str
    names: pathlib.Path | None


_FLAVOURS: typing.Final = (
    _Tool("iptables-nft", None),
    _Tool("ip6tables-nft", None),
    _Tool("iptables-legacy", _PROC / "ip_tables_names"),
    _Tool("ip6tables-legacy", _PROC / "ip6_tables_names"),
)
_PLAIN: typing.Final = (_Tool("iptables", None), _Tool("ip6tables", None))


class Cleanup:
    """What was removed, and what could not be."""

    def __init__(self) -> None:
        self.removed: list[str] = []
        self.failed: list[str] = []

    def all(self) -> None:
        """Remove everything that is kube-proxy's, whatever mode it ran in."""
        for tool in _installed():
            self._iptables(tool)
        self._nftables()
        self._ipvs()
        # Rules that match them are gone by now.
        self._ipsets()

    def _iptables(self, tool: _Tool) -> None:
        if not _has_table(tool):
            return
        saved = self._run(f"{tool.name}-save")
        found = leftovers.removal(saved or "")
        if found.script:
            what = f"{tool.name}: {found.chains} chains and {found.jumps} rules that lead to them"
            self._do(what, f"{tool.name}-restore", "-w", _LOCK_WAIT_S, "--noflush", given=found.script)

    def _nftables(self) -> None:
        if not shutil.which("nft"):
            return
        for family, table in leftovers.nft_tables(self._run("nft", "list", "tables") or ""):
            self._do(f"nftables: table {family} {table}", "nft", "delete", "table", family, table)

    def _ipvs(self) -> None:
        index = {name: number for number, name in socket.if_nameindex()}.get(leftovers.IPVS_DEVICE)
        if index is None:
            # Virtual servers without kube-proxy's device are somebody else's.
            return
        if shutil.which("ipvsadm"):
            self._do("IPVS: the virtual servers", "ipvsadm", "--clear")
        import pyroute2  # noqa: PLC0415 - large, and seldom needed

        try:
            with pyroute2.IPRoute() as route:
                route.link("del", index=index)
        except (OSError, pyroute2.NetlinkError) as error:
            self.failed.append(f"device {leftovers.IPVS_DEVICE}: {error}")
        else:
            self.removed.append(f"IPVS: device {leftovers.IPVS_DEVICE}")

    def _ipsets(self) -> None:
        if not shutil.which("ipset"):
            return
        sets = leftovers.ipsets(self._run("ipset", "list", "-n") or "")
        failed = len(self.failed)
        for name in sets:
            self._run("ipset", "destroy", name)
        if sets and len(self.failed) == failed:
            self.removed.append(f"ipset: {len(sets)} sets")

    def _do(self, what: str, *argv: str, given: str = "") -> None:
        if self._run(*argv, given=given) is not None:
            self.removed.append(what)

    def _run(self, *argv: str, given: str = "") -> str | None:
        """What a tool prints; None, with the reason among the failures, where it fails."""
        try:
            return _output(argv, given)
        except subprocess.CalledProcessError as error:
            said = (error.stderr or "").strip().splitlines()
            self.failed.append(f"{' '.join(argv)}: {said[-1] if said else f'status {error.returncode}'}")
        except (OSError, subprocess.TimeoutExpired) as error:
            self.failed.append(f"{' '.join(argv)}: {error}")
        return None


def present() -> list[str]:
    """Name what kube-proxy has left, by its modes; looked for where that costs little."""
    found = []
    for tool in _installed():
        if _has_table(tool, leftovers.CANARY_TABLE) and f":{leftovers.CANARY} " in _said(
            f"{tool.name}-save", "-t", leftovers.CANARY_TABLE
        ):
            found.append(f"{tool.name} chains")
    if shutil.which("nft"):
        tables = leftovers.nft_tables(_said("nft", "list", "tables"))
        found += [f"nftables table {family} {table}" for family, table in tables]
    if any(name == leftovers.IPVS_DEVICE for _, name in socket.if_nameindex()):
        found.append(f"IPVS device {leftovers.IPVS_DEVICE}")
    return found


def unseen() -> list[str]:
    """What `present` can not look into, since the tools for it are not installed."""
    found = [] if _installed() else ["iptables"]
    return found if shutil.which("nft") else [*found, "nftables"]


def _installed() -> list[_Tool]:
    """The tools there are; by their plain names only where there are no others."""
    flavoured = [tool for tool in _FLAVOURS if shutil.which(f"{tool.name}-save")]
    return flavoured or [tool for tool in _PLAIN if shutil.which(f"{tool.name}-save")]


def _has_table(tool: _Tool, table: str = "") -> bool:
    """Whether the kernel has tables of a tool already: asking the legacy one would load their modules."""
    if tool.names is None:
        return True
    try:
        names = tool.names.read_text().split()
    except OSError:
        return False
    return table in names if table else bool(names)


def _said(*argv: str) -> str:
    try:
        return _output(argv)
    except (OSError, subprocess.SubprocessError):
        return ""


def _output(argv: typing.Sequence[str], given: str = "") -> str:
    done = subprocess.run(
        argv,
        input=given,
        capture_output=True,
        text=True,
        check=True,
        timeout=_TIMEOUT_S,
        env={**os.environ, "LC_ALL": "C"},
        errors="surrogateescape",
    )
    return done.stdout
