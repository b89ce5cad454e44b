"""Looks for what kube-proxy left in the kernel, and removes it when told to.

What is in nf_tables (nftables mode, and iptables-nft) is found and removed over netlink, without
any tool. iptables-legacy and sets need their tools; where one is missing, what it would have
removed is named, and stays. What the tools themselves report is a failure, and so is what is still
there though they report none.
"""

import contextlib
import errno
import functools
import itertools
import os
import shutil
import socket
import subprocess
import time
import typing
from collections.abc import Callable, Mapping, Sequence

from lbproxy.core import inventory, leftovers, model, outdated
from lbproxy.core import ipvs as told
from lbproxy.kernel import ipvs, legacy_tables, nf_tables

_TIMEOUT_S: typing.Final = 120.0
_LOCK_WAIT_S: typing.Final = "30"  # for /run/xtables.lock (CO-6)
_ATTEMPTS: typing.Final = 5  # to remove chains while others change theirs
# nf_tables lets go of the sets of rules that are gone a moment later, in the background.
_SETS_S: typing.Final = 2.0
_LOOK_AGAIN_S: typing.Final = 0.05
# So long may a kube-proxy take for what has changed, which it writes once a second by default.
_CURRENT_S: typing.Final = 10.0
_CURRENT_PAUSE_S: typing.Final = 0.5


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


class _KubeProxyIsHereError(Exception):
    """It has come back, and what is here now may be what it has just written."""


class Cleanup:
    """What was removed, what could not be, what needs a tool that is not there, and what others' stays.

    Where things change while they are removed, `kube_proxy_here` is asked why they may be kube-proxy's again.
    """

    def __init__(self, kube_proxy_here: Callable[[], str] = lambda: "") -> None:
        self._kube_proxy_here = kube_proxy_here
        self.removed: list[str] = []
        self.failed: list[str] = []
        self.unable: list[str] = []
        self.kept: list[str] = []

    def all(self) -> None:
        """Remove everything that is kube-proxy's, whatever mode it ran in."""
        try:
            for flavour in _FLAVOURS:
                self._nft_chains(flavour)
            missing = [flavour.legacy for flavour in _FLAVOURS if not self._legacy_chains(flavour)]
            if missing:
                self.unable.append(_unable(missing))
            self._nft_tables()
            self._ipvs()
            # Rules that match them are gone by now.
            self._ipsets()
        except _KubeProxyIsHereError as here:
            self.failed.append(f"nothing more is removed: {here}")

    def _nft_chains(self, flavour: _Flavour) -> None:
        chains = jumps = 0
        try:
            there = nf_tables.tables()
        except OSError as error:
            self.failed.append(f"{flavour.nft}: {_why(error)}")
            return
        try:
            for table in leftovers.TABLES:
                if (flavour.nft_family, table) not in there:
                    continue
                try:
                    gone = self._without_chains(flavour.nft_family, table)
                except OSError as error:
                    self.failed.append(f"{flavour.nft}, table {table}: {_why(error)}")
                else:
                    chains, jumps = chains + len(gone.own), jumps + len(gone.jumps)
                    self._keep(flavour.nft, table, gone)
        finally:
            if chains:
                self.removed.append(_chains(flavour.nft, chains, jumps))

    def _keep(self, tool: str, table: str, choice: leftovers.Choice) -> None:
        if said := leftovers.kept(tool, table, choice):
            self.kept.append(said)

    def _without_chains(self, family: str, table: str) -> leftovers.Choice:
        """Remove kube-proxy's chains from a table; what they were, and what stays. Raises OSError."""
        for attempt in itertools.count(1):
            if attempt > 1 and (here := self._kube_proxy_here()):
                raise _KubeProxyIsHereError(here)
            since = nf_tables.generation()
            found = leftovers.chosen(nf_tables.chains(family, table), _nft_rules(family, table))
            leading = [nf_tables.Rule(one.chain, int(one.which), one.target) for one in found.jumps]
            try:
                nf_tables.delete_chains(family, table, found.own, leading, since)
            except OSError as error:
                if error.errno != errno.ERESTART or attempt == _ATTEMPTS:
                    raise
            else:
                return found
        raise AssertionError

    def _legacy_chains(self, flavour: _Flavour) -> bool:
        """Remove what iptables-legacy has, if anything; whether there is a tool for it."""
        try:
            found = _in_legacy(flavour)
            for table, choice in found.items():
                self._keep(flavour.legacy, table, choice)
            if not any(choice.own for choice in found.values()):
                return True
            tool = _tool_of_old(flavour)
            if tool is None:
                return False
            failed = len(self.failed)
            removal = leftovers.removal(self._run(f"{tool}-save") or "")
            if removal.script:
                self._run(f"{tool}-restore", "-w", _LOCK_WAIT_S, "--noflush", given=removal.script)
            if len(self.failed) > failed:
                return True
            if _legacy(flavour):
                self.failed.append(f"{tool}: kube-proxy's chains are still there, and it reports no error")
            else:
                self.removed.append(_chains(tool, removal.chains, removal.jumps))
        except OSError as error:
            self.failed.append(f"{flavour.legacy}: {_why(error)}")
        return True

    def _nft_tables(self) -> None:
        try:
            there = nf_tables.tables()
        except OSError as error:
            self.failed.append(f"nftables: {_why(error)}")
            return
        for family, table in leftovers.nft_tables(there):
            what = f"nftables: table {family} {table}"
            try:
                nf_tables.delete_table(family, table)
            except OSError as error:
                self.failed.append(f"{what}: {_why(error)}")
            else:
                self.removed.append(what)

    def _ipvs(self) -> None:
        index = ipvs.device()
        if index is None:
            # Virtual servers without kube-proxy's device are somebody else's.
            return
        try:
            count, others = ipvs.remove()
        except OSError as error:
            # The device stays: it says which ones are kube-proxy's.
            self.failed.append(f"IPVS: the virtual servers: {_why(error)}")
            return
        if count:
            self.removed.append(f"IPVS: {count} virtual servers")
        if others:
            self.kept.append(f"IPVS: {told.others(others)}")
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
        until = time.monotonic() + _SETS_S
        while True:
            used = leftovers.ipsets(self._run("ipset", "list", "-terse") or "")
            if not any(used.values()) or time.monotonic() > until:
                break
            time.sleep(_LOOK_AGAIN_S)
        failed = len(self.failed)
        unused = [name for name, is_used in used.items() if not is_used]
        for name in unused:
            self._run("ipset", "destroy", name)
        if unused and len(self.failed) == failed:
            self.removed.append(f"ipset: {len(unused)} sets")
        if len(used) > len(unused):
            in_use = ", ".join(name for name, is_used in used.items() if is_used)
            self.kept.append(f"ipset: {in_use}: rules that are not only kube-proxy's use them")

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
                    found.append(_named(name))
    with contextlib.suppress(OSError):
        tables = leftovers.nft_tables(nf_tables.tables())
        found += [f"nftables table {family} {table}" for family, table in tables]
    if ipvs.in_use():
        found.append(f"IPVS device {leftovers.IPVS_DEVICE}")
    return found


def removable(found: Sequence[str]) -> list[str]:
    """What of it can be removed here; `found` is what `present` has said."""
    stays = [_named(flavour) for flavour in without_tool(found)]
    return [one for one in found if one not in stays]


def without_tool(found: Sequence[str]) -> list[str]:
    """The flavours of iptables whose rules nothing here can remove; `found` is what `present` has said."""
    there = (one for one in _FLAVOURS if _named(one.legacy) in found)
    return [flavour.legacy for flavour in there if _tool_of_old(flavour) is None]


def staying(found: Sequence[str]) -> list[str]:
    """What of it nothing here can remove, and what to do about that; `found` is what `present` has said."""
    missing = without_tool(found)
    return [_unable(missing)] if missing else []


def kept() -> list[str]:
    """Which chains are to stay though they are kube-proxy's, and why."""
    found = []
    for flavour in _FLAVOURS:
        for tool, look in ((flavour.nft, _in_nft), (flavour.legacy, _in_legacy)):
            with contextlib.suppress(OSError):
                found += [leftovers.kept(tool, table, choice) for table, choice in look(flavour).items()]
    return [said for said in found if said]


def lacking(rows: inventory.Rows) -> str:
    """What kube-proxy's rules lack for new flows to be left to them; empty where they can be.

    Each family that lbproxy has backends of has to have a Service in what is in force: some of that is there
    before the first of them is, and some may be there though kube-proxy is long gone. In iptables-legacy
    above all, where a kube-proxy that uses nf_tables sees nothing, and lbproxy may have no tool to remove it:
    what is there alone has to be of what is served now, too. Raises OSError where that can not be asked.
    """
    ours, theirs = inventory.families(rows), _in_force()
    if ours - theirs.keys() or not theirs:
        missing = " and ".join(f"IPv{family.value}" for family in sorted(ours - theirs.keys()))
        of = f" of {missing}" if missing else ""
        return f"kube-proxy's rules have no Service{of} yet: nobody would serve new flows"
    for flavour in _FLAVOURS:
        alone = _family(flavour) in ours and theirs[_family(flavour)] == {flavour.legacy}
        if alone and (stale := _stale(rows, flavour)):
            more = f" and {len(stale) - 1} more service ports" if len(stale) > 1 else ""
            return (
                f"kube-proxy's rules are in {flavour.legacy} alone, and an earlier one's: for "
                f"{stale[0]}{more} they lead to no endpoint, or to one that is gone"
            )
    return ""


def serving() -> frozenset[model.Family]:
    """The families of which kube-proxy has a Service in force. Raises OSError."""
    return frozenset(_in_force())


def _in_force() -> dict[model.Family, set[str]]:
    """By what kube-proxy has a Service in force, by family. Raises OSError."""
    found: dict[model.Family, set[str]] = {family: {leftovers.IPVS_DEVICE} for family in ipvs.families()}
    nat = leftovers.SERVICES_TABLE
    for flavour in _FLAVOURS:
        of = flavour.nft_family
        legacy = legacy_tables.read(flavour.family, nat)
        by = {
            leftovers.NFT_NAME: leftovers.nft_serves(nf_tables.chains(of, leftovers.NFT_NAME)),
            flavour.nft: leftovers.serve(nf_tables.chains(of, nat), _nft_rules(of, nat)),
            flavour.legacy: leftovers.serve(legacy.chains, _legacy_rules(legacy)),
        }
        if any(by.values()):
            found.setdefault(_family(flavour), set()).update(name for name, serves in by.items() if serves)
    return found


def _stale(rows: inventory.Rows, flavour: _Flavour) -> list[model.PortKey]:
    """Service ports for which iptables-legacy has rules of another time, though they were given some.

    What a kube-proxy is late with is another thing with each look; of a port that it has left, never.
    """
    until = time.monotonic() + _CURRENT_S
    found: dict[model.PortKey, frozenset[str]] | None = None
    while True:
        legacy = legacy_tables.read(flavour.family, leftovers.SERVICES_TABLE)
        now = outdated.outdated(_legacy_rules(legacy), outdated.ports(rows, _family(flavour)))
        found = now if found is None else {key: to for key, to in found.items() if now.get(key) == to}
        if not found or time.monotonic() > until:
            return list(found)
        time.sleep(_CURRENT_PAUSE_S)


def _family(flavour: _Flavour) -> model.Family:
    return model.Family.IPV4 if flavour.family == socket.AF_INET else model.Family.IPV6


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
    """Whether any chain of kube-proxy's is to go. Raises OSError."""
    if nf_tables.has_chain(flavour.nft_family, leftovers.CANARY_TABLE, leftovers.CANARY):
        return True
    return any(choice.own for choice in _in_nft(flavour).values())


def _in_nft(flavour: _Flavour) -> dict[str, leftovers.Choice]:
    """What of it iptables-nft has, by table. Raises OSError."""
    family, there = flavour.nft_family, nf_tables.tables()
    found = {name: nf_tables.chains(family, name) for name in leftovers.TABLES if (family, name) in there}
    return _choices(found, functools.partial(_nft_rules, family))


def _legacy(flavour: _Flavour) -> bool:
    """Whether any chain of kube-proxy's is to go. Raises OSError."""
    return any(choice.own for choice in _in_legacy(flavour).values())


def _in_legacy(flavour: _Flavour) -> dict[str, leftovers.Choice]:
    """What of it iptables-legacy has, by table. Raises OSError."""
    found = {name: legacy_tables.read(flavour.family, name) for name in leftovers.TABLES}
    chains = {name: table.chains for name, table in found.items()}
    return _choices(chains, lambda name: _legacy_rules(found[name]))


def _choices(
    chains: Mapping[str, Mapping[str, bool]], rules: Callable[[str], Sequence[leftovers.Rule]]
) -> dict[str, leftovers.Choice]:
    # There may be very many rules, but of those that others need few.
    return {
        table: leftovers.chosen(there, rules(table))
        for table, there in chains.items()
        if leftovers.named(there)
    }


def _nft_rules(family: str, table: str) -> list[leftovers.Rule]:
    found = nf_tables.jumps(family, table, leftovers.PREFIX)
    return [leftovers.Rule(one.chain, str(one.handle), one.target) for one in found]


def _legacy_rules(table: legacy_tables.Table) -> list[leftovers.Rule]:
    return [leftovers.Rule(one.chain, str(one.at), one.target) for one in table.jumps]


def _tool_of_old(flavour: _Flavour) -> str | None:
    return next((tool for tool in (flavour.legacy, flavour.plain) if _is_legacy(tool)), None)


def _is_legacy(tool: str) -> bool:
    """Whether this is there and iptables of old: the plain name is mostly that of nf_tables' by now."""
    if not all(shutil.which(f"{tool}-{what}") for what in ("save", "restore")):
        return False
    try:
        return "(legacy)" in _output((f"{tool}-restore", "--version"))
    except (OSError, subprocess.SubprocessError):
        return False


def _why(error: OSError) -> str:
    why = error.strerror or str(error) or type(error).__name__
    if error.errno == errno.EBUSY:
        return f"a map or rule of somebody else leads to a chain of kube-proxy's, so all of it stays ({why})"
    return why


def _named(tool: str) -> str:
    return f"{tool} chains"


def _unable(missing: Sequence[str]) -> str:
    return f"{leftovers.stays(missing)}: {leftovers.BY_HAND}"


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
