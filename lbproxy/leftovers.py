"""Looks for what kube-proxy left in the kernel, and removes it when told to.

What is in nf_tables (nftables mode, and iptables-nft) is found and removed over netlink, without
any tool. iptables-legacy and sets need their tools; where one is missing, what it would have
removed is named, and stays. What the tools themselves report is a failure.
"""

import contextlib
import errno
import os
import shutil
import socket
import subprocess
import typing

from lbproxy.core import leftovers
from lbproxy.kernel import ipvs, legacy_tables, nf_tables

_TIMEOUT_S: typing.Final = 120.0
_LOCK_WAIT_S: typing.Final = "30"  # for /run/xtables.lock (CO-6)
_ATTEMPTS: typing.Final = 5  # to remove chains while others change theirs


class _Flavour(typing.NamedTuple):
    """iptables for one family: of nf_tables, and of old."""

    family: socket.AddressFamily
    nft_family: str
    nft: str
    legacy: str
    plain: str  # as distributions with only one of them call it


_FLAVOURS: typing.Final = (
    _Flavour(socket.AF_INET, "ip", "iptables-nft", "iptables-legacy", "iptables"),
    _Flavour(socket.AF_INET6, "ip6", "ip6tables-nft", "ip6tables-legacy", "ip6tables"),
)


class Cleanup:
    """What was removed, what could not be, and what is there but needs a tool that is not."""

    def __init__(self) -> None:
        self.removed: list[str] = []
        self.failed: list[str] = []
        self.unable: list[str] = []

    def all(self) -> None:
        """Remove everything that is kube-proxy's, whatever mode it ran in."""
        for flavour in _FLAVOURS:
            self._nft_chains(flavour)
            self._legacy_chains(flavour)
        self._nft_tables()
        self._ipvs()
        # Rules that match them are gone by now.
        self._ipsets()

    def _nft_chains(self, flavour: _Flavour) -> None:
        chains = jumps = 0
        try:
            there = nf_tables.tables()
            for table in leftovers.TABLES:
                if (flavour.nft_family, table) in there:
                    removed = _without_chains(flavour.nft_family, table)
                    chains, jumps = chains + removed[0], jumps + removed[1]
        except OSError as error:
            self.failed.append(f"{flavour.nft}: {error.strerror}")
        if chains:
            self.removed.append(_chains(flavour.nft, chains, jumps))

    def _legacy_chains(self, flavour: _Flavour) -> None:
        try:
            if not _legacy(flavour):
                return
        except OSError as error:
            self.failed.append(f"{flavour.legacy}: {error.strerror}")
            return
        tool = next(
            (tool for tool in (flavour.legacy, flavour.plain) if shutil.which(f"{tool}-restore")), None
        )
        if tool is None:
            self.unable.append(
                f"{flavour.legacy}: kube-proxy's chains, which only {flavour.legacy}-restore can remove, "
                "and it is not installed here"
            )
            return
        found = leftovers.removal(self._run(f"{tool}-save") or "")
        if found.script:
            what = _chains(tool, found.chains, found.jumps)
            self._do(what, f"{tool}-restore", "-w", _LOCK_WAIT_S, "--noflush", given=found.script)

    def _nft_tables(self) -> None:
        try:
            there = nf_tables.tables()
        except OSError as error:
            self.failed.append(f"nftables: {error.strerror}")
            return
        for family, table in leftovers.nft_tables(there):
            what = f"nftables: table {family} {table}"
            try:
                nf_tables.delete_table(family, table)
            except OSError as error:
                self.failed.append(f"{what}: {error.strerror}")
            else:
                self.removed.append(what)

    def _ipvs(self) -> None:
        index = {name: number for number, name in socket.if_nameindex()}.get(leftovers.IPVS_DEVICE)
        if index is None:
            # Virtual servers without kube-proxy's device are somebody else's.
            return
        try:
            if ipvs.flush():
                self.removed.append("IPVS: the virtual servers")
        except OSError as error:
            self.failed.append(f"IPVS: the virtual servers: {error.strerror}")
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
    """Name what kube-proxy has left, by its modes; what can not be asked for is not named."""
    found = []
    for flavour in _FLAVOURS:
        for name, there in ((flavour.nft, _nft), (flavour.legacy, _legacy)):
            with contextlib.suppress(OSError):
                if there(flavour):
                    found.append(f"{name} chains")
    with contextlib.suppress(OSError):
        tables = leftovers.nft_tables(nf_tables.tables())
        found += [f"nftables table {family} {table}" for family, table in tables]
    if any(name == leftovers.IPVS_DEVICE for _, name in socket.if_nameindex()):
        found.append(f"IPVS device {leftovers.IPVS_DEVICE}")
    return found


def serving() -> bool:
    """Whether a Service is in what is in force: some of it is there before the first of them is.

    Raises OSError where that can not be asked.
    """
    kept = ((leftovers.SERVICES_TABLE, leftovers.SERVICE_CHAIN), (leftovers.NFT_NAME, leftovers.NFT_CHAIN))
    for flavour in _FLAVOURS:
        for table, prefix in kept:
            if any(name.startswith(prefix) for name in nf_tables.chains(flavour.nft_family, table)):
                return True
        if legacy_tables.has_chain(
            flavour.family, leftovers.SERVICES_TABLE, leftovers.SERVICE_CHAIN, prefix=True
        ):
            return True
    return any(name == leftovers.IPVS_DEVICE for _, name in socket.if_nameindex())


def unseen() -> list[str]:
    """What `present` may not look into."""
    found = []
    for name, ask in (
        ("iptables", lambda: [_legacy(one) for one in _FLAVOURS]),
        ("nftables", nf_tables.tables),
    ):
        try:
            ask()
        except OSError:
            found.append(name)
    return found


def _nft(flavour: _Flavour) -> bool:
    return nf_tables.has_chain(flavour.nft_family, leftovers.CANARY_TABLE, leftovers.CANARY)


def _legacy(flavour: _Flavour) -> bool:
    return legacy_tables.has_chain(flavour.family, leftovers.CANARY_TABLE, leftovers.CANARY)


def _without_chains(family: str, table: str) -> tuple[int, int]:
    """Remove kube-proxy's chains from a table; how many, and rules that led to them. Raises OSError."""
    for attempt in range(_ATTEMPTS):
        since = nf_tables.generation()
        chains = nf_tables.chains(family, table)
        rules = [
            leftovers.Rule(one.chain, str(one.handle), one.target)
            for one in nf_tables.jumps(family, table, leftovers.PREFIX)
        ]
        own, jumps = leftovers.chosen(chains, rules)
        leading = [nf_tables.Rule(one.chain, int(one.which), one.target) for one in jumps]
        try:
            nf_tables.delete_chains(family, table, own, leading, since)
        except OSError as error:
            if error.errno != errno.ERESTART or attempt + 1 == _ATTEMPTS:
                raise
        else:
            return len(own), len(jumps)
    return 0, 0


def _chains(name: str, chains: int, jumps: int) -> str:
    return f"{name}: {chains} chains and {jumps} rules that lead to them"


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
