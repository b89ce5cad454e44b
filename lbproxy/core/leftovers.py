"""What of a node's packet filter is kube-proxy's, and how to take that away and nothing else.

The kubelet's chains stay: KUBE-IPTABLES-HINT, KUBE-KUBELET-CANARY, KUBE-MARK-DROP, and
KUBE-FIREWALL, which both have (CO-1). So does a chain that somebody else's rules use, with all that
makes it work: a mark that KUBE-MARK-MASQ sets for a CNI's host ports is KUBE-POSTROUTING's to act on.
"""

import re
import shlex
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lbproxy.core import migration

HOW_TO_STOP: typing.Final = (
    "lbproxy migrate cluster --to lbproxy --node NODE takes it off this node, and off no other: once its "
    f"DaemonSet looks at the label {migration.LABEL}, a Node with {migration.LABEL}=lbproxy is without it"
)
# In iptables mode, but not in IPVS mode, in a table with next to nothing else in it.
CANARY: typing.Final = "KUBE-PROXY-CANARY"
CANARY_TABLE: typing.Final = "mangle"
PREFIX: typing.Final = "KUBE-"  # of the names of all its chains
TABLES: typing.Final = ("mangle", "nat", "filter")  # of iptables, that it has chains in
SERVICES_TABLE: typing.Final = "nat"
NFT_NAME: typing.Final = "kube-proxy"
NFT_CHAIN: typing.Final = "service-"
NFT_TABLES: typing.Final = (("ip", NFT_NAME), ("ip6", NFT_NAME))
IPVS_DEVICE: typing.Final = "kube-ipvs0"
BY_HAND: typing.Final = (
    "reboot the node, or remove them on it by hand, as in docs/migration.md under Rules in iptables-legacy"
)

_CHAIN: typing.Final = re.compile(
    r"KUBE-(?:(?:SVC|SVL|SEP|FW|EXT|XLB)-[A-Z2-7]{16}"
    r"|SERVICES|EXTERNAL-SERVICES|NODEPORTS|POSTROUTING|MARK-MASQ|FORWARD|PROXY-FIREWALL|PROXY-CANARY"
    r"|LOAD-BALANCER|NODE-PORT|SOURCE-RANGES-FIREWALL|IPVS-FILTER|IPVS-OUT-FILTER)"
)
_SERVICES: typing.Final = "KUBE-SERVICES"
_OF_A_SERVICE: typing.Final = ("KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-")
# Where built-in chains lead to: of all rules that are not in its own chains only these are kube-proxy's.
_ENTRIES: typing.Final = frozenset(
    {
        _SERVICES, "KUBE-EXTERNAL-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-FORWARD",
        "KUBE-PROXY-FIREWALL", "KUBE-NODE-PORT", "KUBE-IPVS-FILTER", "KUBE-IPVS-OUT-FILTER",
    }
)  # fmt: skip
# Who marks, and who masquerades what is marked: no rule leads from one to the other.
_MARKS, _MASQUERADES = "KUBE-MARK-MASQ", "KUBE-POSTROUTING"
_IPSET: typing.Final = re.compile(
    r"KUBE-(?:6-)?(?:LOOP-BACK|CLUSTER-IP|EXTERNAL-IP|EXTERNAL-IP-LOCAL|LOAD-BALANCER|IPVS-IPS"
    r"|LOAD-BALANCER-(?:LOCAL|FW|SOURCE-IP|SOURCE-CIDR)|NODE-PORT-(?:LOCAL-)?(?:TCP|UDP|SCTP-HASH)"
    r"|HEALTH-CHECK-NODE-PORT)"
)


class Removal(typing.NamedTuple):
    """Input for `iptables-restore --noflush`, empty where nothing is to go, and what it removes."""

    script: str
    chains: int
    jumps: int


class Choice(typing.NamedTuple):
    """Of a table: which chains are to go, and rules of built-in chains that lead to them; and what stays.

    `kept` has chains that kube-proxy's names say are its own, and `users` the chains whose rules need them.
    """

    own: list[str]
    jumps: list["Rule"]
    kept: list[str]
    users: list[str]


class Rule(typing.NamedTuple):
    """A rule of a chain that leads to another one; `which` tells it from others: its text, or a number."""

    chain: str
    which: str
    target: str


def removal(saved: str) -> Removal:
    """Say how to remove kube-proxy's chains from what `iptables-save` printed."""
    script: list[str] = []
    chains = jumps = 0
    for table, lines in _tables(saved):
        own, deleted, _, _ = _of_kube_proxy(lines)
        if not own:
            continue
        chains, jumps = chains + len(own), jumps + len(deleted)
        script += [f"*{table}", *(f":{chain} - [0:0]" for chain in own)]
        script += [f"-D {rule.chain} {rule.which}" for rule in deleted]
        script += [*(f"-X {chain}" for chain in own), "COMMIT"]
    return Removal("".join(f"{line}\n" for line in script), chains, jumps)


def ipsets(listed: str) -> dict[str, bool]:
    """Choose kube-proxy's sets from what `ipset list -terse` printed, and say whether rules use each."""
    found: dict[str, bool] = {}
    name = ""
    for line in listed.splitlines():
        what, _, value = line.partition(": ")
        if what == "Name":
            name = value
        elif what == "References" and _IPSET.fullmatch(name):
            found[name] = value != "0"
    return found


def nft_tables(there: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Choose kube-proxy's tables from those of nf_tables, by family and name."""
    found = set(there)
    return [table for table in NFT_TABLES if table in found]


def stays(flavours: Sequence[str]) -> str:
    """That no tool is there for what these have of kube-proxy's, and what that means; see BY_HAND."""
    tools = " and ".join(f"{one}-restore" for one in flavours)
    return (
        f"kube-proxy's rules of {' and '.join(flavours)} stay, and a Service that is deleted stays reachable "
        f"through them, since {tools} can not be found here"
    )


def named(chains: Mapping[str, bool]) -> list[str]:
    """The chains of a table that kube-proxy's names say are its own, whoever uses them.

    `chains` says which there are, and whether each is built in.
    """
    return [name for name, built_in in chains.items() if not built_in and _CHAIN.fullmatch(name)]


def chosen(chains: Mapping[str, bool], rules: Sequence[Rule]) -> Choice:
    """Choose among the chains of a table; `rules` are at least those that lead to chains of kube-proxy's."""
    all_own = dict.fromkeys(named(chains))
    # A chain that others need goes on doing for them what it did.
    foreign = [rule for rule in rules if rule.chain not in all_own and not _enters(chains, rule)]
    users = list(dict.fromkeys(rule.chain for rule in foreign if rule.target in all_own))
    needed = [rule.target for rule in foreign]
    own = dict(all_own)
    while needed:
        kept = needed.pop()
        if kept in own:
            del own[kept]
            needed += [rule.target for rule in rules if rule.chain == kept]
            if kept == _MARKS:
                needed.append(_MASQUERADES)
    jumps = [rule for rule in rules if _enters(chains, rule) and rule.target in own]
    return Choice(list(own), jumps, [chain for chain in all_own if chain not in own], users)


def kept(tool: str, table: str, choice: Choice) -> str:
    """What stays of a table, and why; empty where nothing does."""
    if not choice.kept:
        return ""
    chains, users = (", ".join(sorted(names)) for names in (choice.kept, choice.users))
    return f"{tool}, table {table}: {chains}, since rules in {users} use that"


def serve(chains: Mapping[str, bool], rules: Iterable[Rule]) -> bool:
    """Whether a Service is reached in the nat table of iptables; what nothing leads to may be stale."""
    rules = list(rules)
    entered = any(rule.target == _SERVICES and _enters(chains, rule) for rule in rules)
    return entered and any(
        rule.chain == _SERVICES and rule.target.startswith(_OF_A_SERVICE) for rule in rules
    )


def nft_serves(chains: Mapping[str, bool]) -> bool:
    """Whether a Service is reached in the table of nftables mode; its services are led to by maps."""
    return any(chains.values()) and any(name.startswith(NFT_CHAIN) for name in chains)


def _enters(chains: Mapping[str, bool], rule: Rule) -> bool:
    return chains.get(rule.chain, False) and rule.target in _ENTRIES


def _tables(saved: str) -> Iterator[tuple[str, list[str]]]:
    table, lines = "", list[str]()
    for line in saved.splitlines():
        if line.startswith("*"):
            table, lines = line[1:], []
        elif line == "COMMIT":
            yield table, lines
        else:
            lines.append(line)


def _of_kube_proxy(lines: Iterable[str]) -> Choice:
    chains: dict[str, bool] = {}
    rules = []
    for line in lines:
        if line.startswith(":"):
            chain, policy = line[1:].split()[:2]
            chains[chain] = policy != "-"
        elif line.startswith("-A ") and f" {PREFIX}" in line:
            chain, text = line[3:].split(" ", 1)
            rules.append(Rule(chain, text, _target(text)))
    return chosen(chains, rules)


def _target(rule: str) -> str:
    words = shlex.split(rule)
    return next((words[at + 1] for at, word in enumerate(words[:-1]) if word in ("-j", "-g")), "")
