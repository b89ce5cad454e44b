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

from lbproxy.kernel import netlink, nf_tables

_log = logging.getLogger(__name__)

NAME: typing.Final = "lbproxy-handover"
_COMMENT: typing.Final = b"keeps connections that kube-proxy began alive; removed when they have ended"

_INET: typing.Final = nf_tables.family("inet")
# Of linux/netfilter/nf_tables.h, and of no use to others.
_TABLE_USERDATA, _CHAIN_TYPE = 6, 7
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_CT_REGISTER, _CT_KEY = 1, 2
_REGISTER_1, _STATE = 1, 0
_NAT_CHAINS: typing.Final = (("prerouting", 0, -100), ("postrouting", 4, 100))


class Keeper:
    """Has the table there while it is needed."""

    def __init__(self) -> None:
        self._kept = False
        self._said = ""

    def keep(self, *, needed: bool) -> str:
        """Make it, also where somebody has removed it since, or remove it.

        Returns why it can not be made, as where the kernel has no nf_tables; the log has that once.
        """
        try:
            if not needed:
                remove()
            elif make() and self._kept:
                _log.warning("made table inet %s again, which somebody has removed", NAME)
        except OSError as error:
            if not needed:
                return ""
            problem = f"cannot make table inet {NAME}: {error.strerror}"
            if problem != self._said:
                _log.warning(
                    "%s; until the flows that kube-proxy began have ended, do not remove the last rules that "
                    "use connection tracking",
                    problem,
                )
            self._said = problem
            return problem
        self._kept, self._said = needed, ""
        return ""


def exists() -> bool:
    """Whether it is there, in the network namespace of the thread that asks; not where one may not look."""
    try:
        return _is_there()
    except PermissionError:
        return False


def _is_there() -> bool:
    """The same, but PermissionError where one may not look."""
    try:
        with nf_tables.opened() as socket:
            socket.request(nf_tables.GET_TABLE, _INET + nf_tables.text(nf_tables.TABLE_NAME, NAME))
    except PermissionError:
        raise
    except OSError:
        return False
    return True


def make() -> bool:
    """Make it; whether it was not there. Raises OSError."""
    if exists():
        return False
    table = nf_tables.text(nf_tables.TABLE_NAME, NAME) + _comment(_COMMENT)
    requests = [(nf_tables.NEW_TABLE, nf_tables.CREATE, _INET + table)]
    for name, number, priority in _NAT_CHAINS:
        hook = _number(_HOOK_NUMBER, number) + _number(_HOOK_PRIORITY, priority)
        chain = nf_tables.text(nf_tables.CHAIN_TABLE, NAME) + nf_tables.text(nf_tables.CHAIN_NAME, name)
        chain += netlink.attribute(nf_tables.CHAIN_HOOK, [hook]) + nf_tables.text(_CHAIN_TYPE, "nat")
        requests.append((nf_tables.NEW_CHAIN, nf_tables.CREATE, _INET + chain))
    tracked = nf_tables.text(nf_tables.CHAIN_TABLE, NAME) + nf_tables.text(nf_tables.CHAIN_NAME, "tracked")
    requests.append((nf_tables.NEW_CHAIN, nf_tables.CREATE, _INET + tracked))
    look = [_number(_CT_REGISTER, _REGISTER_1), _number(_CT_KEY, _STATE)]
    expression = [
        nf_tables.text(nf_tables.EXPRESSION_NAME, "ct"),
        netlink.attribute(nf_tables.EXPRESSION_DATA, look),
    ]
    rule = nf_tables.text(nf_tables.RULE_TABLE, NAME) + nf_tables.text(nf_tables.RULE_CHAIN, "tracked")
    rule += netlink.attribute(
        nf_tables.RULE_EXPRESSIONS, [netlink.attribute(nf_tables.LIST_ELEMENT, expression)]
    )
    requests.append((nf_tables.NEW_RULE, nf_tables.CREATE | nf_tables.APPEND, _INET + rule))
    with nf_tables.opened() as socket:
        socket.batch(nf_tables.SUBSYSTEM, requests)
    return True


def remove() -> bool:
    """Remove it; whether it was there. Raises OSError, also where one may not look."""
    if not _is_there():
        return False
    try:
        nf_tables.delete_table("inet", NAME)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    return True


def _number(number: int, value: int) -> bytes:
    return netlink.attribute(number, value.to_bytes(4, "big", signed=True))


def _comment(text: bytes) -> bytes:
    """The comment that `nft list` shows: type 0, length and text of libnftnl's user data."""
    return netlink.attribute(_TABLE_USERDATA, bytes([0, len(text) + 1]) + text + b"\0")
