"""Tables, chains and rules of nf_tables over netlink: no tool is needed, and nothing but CAP_NET_ADMIN.

iptables-nft keeps its rules here too: a table of iptables is one of nf_tables, its chains are
chains, and a jump is the verdict of an "immediate" expression. All this is of the network namespace
of the thread that asks.
"""

import errno
import typing
from collections.abc import Iterable, Iterator

from lbproxy.kernel import netlink

_NETLINK_NETFILTER: typing.Final = 12
SUBSYSTEM: typing.Final = 10
(
    NEW_TABLE, GET_TABLE, _DEL_TABLE, NEW_CHAIN, GET_CHAIN, _DEL_CHAIN, NEW_RULE, _GET_RULE, _DEL_RULE,
) = (SUBSYSTEM << 8 | number for number in range(9))  # fmt: skip
_GET_GENERATION: typing.Final = SUBSYSTEM << 8 | 16
CREATE: typing.Final = 0x400
APPEND: typing.Final = 0x800
# Of linux/netfilter/nf_tables.h.
TABLE_NAME: typing.Final = 1
CHAIN_TABLE, CHAIN_NAME, CHAIN_HOOK = 1, 3, 4
RULE_TABLE, RULE_CHAIN, _RULE_HANDLE, RULE_EXPRESSIONS = 1, 2, 3, 4
LIST_ELEMENT, EXPRESSION_NAME, EXPRESSION_DATA = 1, 1, 2
_IMMEDIATE_DATA, _DATA_VERDICT, _VERDICT_CHAIN = 2, 2, 2
_GENERATION_ID: typing.Final = 1
_FAMILIES: typing.Final = {"inet": 1, "ip": 2, "ip6": 10}
_NAMES: typing.Final = {number: name for name, number in _FAMILIES.items()}
_HEADER_BYTES: typing.Final = 4  # nfgenmsg
_ABSENT: typing.Final = (errno.ENOENT, errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT)


class Rule(typing.NamedTuple):
    """A rule that leads to another chain; `handle` tells it from others of its table."""

    chain: str
    handle: int
    target: str


def opened() -> netlink.Netlink:
    """A socket to ask netfilter, to be used in a `with`. Raises OSError."""
    return netlink.Netlink(_NETLINK_NETFILTER)


def family(name: str) -> bytes:
    """The fixed part of a message (nfgenmsg) about tables of "ip", "ip6" or "inet"."""
    return bytes([_FAMILIES[name], 0, 0, 0])


def text(number: int, value: str) -> bytes:
    """An attribute that is a name."""
    return netlink.attribute(number, value.encode(errors="surrogateescape") + b"\0")


def generation() -> int:
    """A number that changes with every change of whatever is in here. Raises OSError."""
    with opened() as asked:
        answer = asked.get(_GET_GENERATION, bytes(_HEADER_BYTES))
    return int.from_bytes(netlink.attributes(answer[_HEADER_BYTES:])[_GENERATION_ID], "big")


def tables() -> list[tuple[str, str]]:
    """Family and name of each table; none where the kernel has no nf_tables. Raises OSError."""
    found = []
    for answer in _dump(GET_TABLE, bytes(_HEADER_BYTES)):
        if answer[0] in _NAMES:
            name = _said(netlink.attributes(answer[_HEADER_BYTES:])[TABLE_NAME])
            found.append((_NAMES[answer[0]], name))
    return found


def has_chain(of: str, table: str, chain: str) -> bool:
    """Whether a table of a family has a chain. Raises OSError where that can not be asked."""
    asked_for = text(CHAIN_TABLE, table) + text(CHAIN_NAME, chain)
    try:
        with opened() as asked:
            asked.request(GET_CHAIN, family(of) + asked_for)
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise
    return True


def chains(of: str, table: str) -> dict[str, bool]:
    """The chains of a table, and whether the kernel calls each by itself. Raises OSError."""
    found = {}
    for answer in _dump(GET_CHAIN, family(of)):
        given = netlink.attributes(answer[_HEADER_BYTES:])
        if _said(given[CHAIN_TABLE]) == table:
            found[_said(given[CHAIN_NAME])] = CHAIN_HOOK in given
    return found


def jumps(of: str, table: str, prefix: str) -> Iterator[Rule]:
    """The rules of a table that lead to chains whose names begin so. Raises OSError."""
    sought = prefix.encode()
    with opened() as asked:
        for answer in asked.dump(_GET_RULE, family(of) + text(RULE_TABLE, table)):
            # There may be hundreds of thousands of rules, most of them of no interest.
            if sought not in answer:
                continue
            given = netlink.attributes(answer[_HEADER_BYTES:])
            if _said(given[RULE_TABLE]) != table:
                continue
            target = _target(given.get(RULE_EXPRESSIONS, b""))
            if target.startswith(prefix):
                handle = int.from_bytes(given[_RULE_HANDLE], "big")
                yield Rule(_said(given[RULE_CHAIN]), handle, target)


def delete_table(of: str, name: str) -> None:
    """Delete a table with all that is in it. Raises OSError."""
    with opened() as asked:
        asked.batch(SUBSYSTEM, [(_DEL_TABLE, 0, family(of) + text(TABLE_NAME, name))])


def delete_chains(of: str, table: str, own: Iterable[str], rules: Iterable[Rule], since: int) -> None:
    """Delete chains with their rules, and rules of others that lead to them, all at once.

    Raises OSError; with ERESTART where anything has changed since that generation.
    """
    own = list(own)
    head = family(of)
    requests = []
    for rule in rules:
        which = text(RULE_TABLE, table) + text(RULE_CHAIN, rule.chain)
        handle = netlink.attribute(_RULE_HANDLE, rule.handle.to_bytes(8, "big"))
        requests.append((_DEL_RULE, 0, head + which + handle))
    # All rules first: a chain that a rule leads to can not go.
    requests += [(_DEL_RULE, 0, head + text(RULE_TABLE, table) + text(RULE_CHAIN, one)) for one in own]
    requests += [(_DEL_CHAIN, 0, head + text(CHAIN_TABLE, table) + text(CHAIN_NAME, one)) for one in own]
    with opened() as asked:
        asked.batch(SUBSYSTEM, requests, since)


def _dump(kind: int, request: bytes) -> list[bytes]:
    """All messages that answer; none where the kernel has nothing of the kind. Raises OSError."""
    try:
        with opened() as asked:
            return list(asked.dump(kind, request))
    except OSError as error:
        if error.errno in _ABSENT:
            return []
        raise


def _target(expressions: bytes) -> str:
    for _, element in netlink.each_attribute(expressions):
        expression = netlink.attributes(element)
        if _said(expression.get(EXPRESSION_NAME, b"")) != "immediate":
            continue
        data = netlink.attributes(expression.get(EXPRESSION_DATA, b"")).get(_IMMEDIATE_DATA, b"")
        verdict = netlink.attributes(netlink.attributes(data).get(_DATA_VERDICT, b""))
        if _VERDICT_CHAIN in verdict:
            return _said(verdict[_VERDICT_CHAIN])
    return ""


def _said(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="surrogateescape")
