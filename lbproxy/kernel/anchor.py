"""A table of nf_tables that keeps the kernel translating what it has begun to translate.

Netfilter counts who uses its tracker and its translation in a network namespace, and takes
both out when the last one goes, under the feet of the connections that live by them. Found
out with Linux 6.18: `nft delete table ip kube-proxy` stops translation, and the last rules
of iptables stop tracking, whichever flavour. So this table uses both, and does nothing else:

    table inet lbproxy-handover {
        chain prerouting { type nat hook prerouting priority dstnat; }
        chain postrouting { type nat hook postrouting priority srcnat; }
        chain tracked { ct state; }     # never jumped to
    }

It is there while flows of another proxy are, and `lbproxy cleanup` removes it.
"""

import errno
import logging
import typing

from lbproxy.kernel import netlink

_log = logging.getLogger(__name__)

NAME: typing.Final = "lbproxy-handover"
_COMMENT: typing.Final = b"keeps connections that kube-proxy began alive; removed when they have ended"

_NETLINK_NETFILTER: typing.Final = 12
_NF_TABLES: typing.Final = 10
_NEW_TABLE, _GET_TABLE, _DEL_TABLE, _NEW_CHAIN, _NEW_RULE = (
    _NF_TABLES << 8 | number for number in (0, 1, 2, 3, 6)
)
_CREATE: typing.Final = 0x400
_APPEND: typing.Final = 0x800
_INET: typing.Final = bytes([1, 0, 0, 0])  # nfgenmsg: NFPROTO_INET
# Of linux/netfilter/nf_tables.h.
_TABLE_NAME, _TABLE_USERDATA = 1, 6
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_TYPE = 1, 3, 4, 7
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS = 1, 2, 4
_LIST_ELEMENT, _EXPRESSION_NAME, _EXPRESSION_DATA = 1, 1, 2
_CT_REGISTER, _CT_KEY = 1, 2
_REGISTER_1, _STATE = 1, 0
_NAT_CHAINS: typing.Final = (("prerouting", 0, -100), ("postrouting", 4, 100))


class Keeper:
    """Has the table there while it is needed."""

    def __init__(self) -> None:
        self._there: bool | None = None
        self._said = False

    def keep(self, *, needed: bool) -> None:
        """Make or remove it. Where the kernel has no nf_tables, a warning says so, once."""
        if needed == self._there:
            return
        try:
            make() if needed else remove()
        except OSError as error:
            if needed and not self._said:
                _log.warning(
                    "cannot make table inet %s: %s; until the flows that kube-proxy began have ended, do "
                    "not remove the last rules that use connection tracking",
                    NAME,
                    error.strerror,
                )
                self._said = True
            return
        self._there = needed


def exists() -> bool:
    """Whether it is there, in the network namespace of the thread that asks."""
    try:
        with netlink.Netlink(_NETLINK_NETFILTER) as socket:
            socket.request(_GET_TABLE, _INET + _text(_TABLE_NAME, NAME))
    except OSError:
        return False
    return True


def make() -> None:
    """Make it, unless it is there. Raises OSError."""
    if exists():
        return
    requests = [(_NEW_TABLE, _CREATE, _INET + _text(_TABLE_NAME, NAME) + _comment(_COMMENT))]
    for name, number, priority in _NAT_CHAINS:
        hook = _number(_HOOK_NUMBER, number) + _number(_HOOK_PRIORITY, priority)
        chain = _text(_CHAIN_TABLE, NAME) + _text(_CHAIN_NAME, name)
        chain += netlink.attribute(_CHAIN_HOOK, [hook]) + _text(_CHAIN_TYPE, "nat")
        requests.append((_NEW_CHAIN, _CREATE, _INET + chain))
    tracked = _text(_CHAIN_TABLE, NAME) + _text(_CHAIN_NAME, "tracked")
    requests.append((_NEW_CHAIN, _CREATE, _INET + tracked))
    look = [_number(_CT_REGISTER, _REGISTER_1), _number(_CT_KEY, _STATE)]
    expression = [_text(_EXPRESSION_NAME, "ct"), netlink.attribute(_EXPRESSION_DATA, look)]
    rule = _text(_RULE_TABLE, NAME) + _text(_RULE_CHAIN, "tracked")
    rule += netlink.attribute(_RULE_EXPRESSIONS, [netlink.attribute(_LIST_ELEMENT, expression)])
    requests.append((_NEW_RULE, _CREATE | _APPEND, _INET + rule))
    with netlink.Netlink(_NETLINK_NETFILTER) as socket:
        socket.batch(_NF_TABLES, requests)


def remove() -> bool:
    """Remove it; whether it was there. Raises OSError."""
    if not exists():
        return False
    with netlink.Netlink(_NETLINK_NETFILTER) as socket:
        try:
            socket.batch(_NF_TABLES, [(_DEL_TABLE, 0, _INET + _text(_TABLE_NAME, NAME))])
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return False
    return True


def _text(number: int, value: str) -> bytes:
    return netlink.attribute(number, value.encode() + b"\0")


def _number(number: int, value: int) -> bytes:
    return netlink.attribute(number, value.to_bytes(4, "big", signed=True))


def _comment(text: bytes) -> bytes:
    """The comment that `nft list` shows: type 0, length and text of libnftnl's user data."""
    return netlink.attribute(_TABLE_USERDATA, bytes([0, len(text) + 1]) + text + b"\0")
