"""Fields that objects of several kinds have: checked, and shared where thousands repeat them."""

import re
import sys

from lbproxy.core import identity, model
from lbproxy.core.wording import quote

LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
SUBDOMAIN = re.compile(r"(?=.{1,253}\Z)[a-z0-9](?:[-.a-z0-9]*[a-z0-9])?")
FAMILIES = {"IPv4": model.Family.IPV4, "IPv6": model.Family.IPV6}
_PROTOCOLS = {None: model.Protocol.TCP} | {protocol.name: protocol for protocol in model.Protocol}


class FieldError(ValueError):
    """An object can not be understood; the text names the field."""


def namespace(text: str | None) -> str:
    """`metadata.namespace`, or what is meant without one. Raises FieldError."""
    if not text:
        return identity.DEFAULT_NAMESPACE
    if not LABEL.fullmatch(text):
        raise FieldError(f"metadata.namespace: {quote(text)} is not a DNS label of at most 63 characters")
    return sys.intern(text)


def name(text: str, pattern: re.Pattern[str]) -> str:
    """`metadata.name`, which has to be a LABEL or a SUBDOMAIN. Raises FieldError."""
    if not pattern.fullmatch(text):
        what = "DNS label of at most 63" if pattern is LABEL else "DNS subdomain of at most 253"
        raise FieldError(f"metadata.name: {quote(text)} is not a {what} characters")
    # Services are named again by their slices; the names of slices do not repeat.
    return sys.intern(text) if pattern is LABEL else text


def protocol(field: str, text: str | None) -> model.Protocol:
    """That of a port; `field` says which. Raises FieldError."""
    found = _PROTOCOLS.get(text)
    if found is None:
        raise FieldError(f"{field}.protocol: {quote(text)} is not TCP, UDP or SCTP")
    return found


def port_number(field: str, number: int) -> int:
    """The number, where it is one. Raises FieldError."""
    if not 1 <= number <= 65535:
        raise FieldError(f"{field}: {number} is not in 1..65535")
    return number


def interned(text: str | None) -> str:
    """Share one object for a name that thousands of endpoints repeat."""
    if not text:
        return ""
    return sys.intern(text) if text.isascii() else sys.intern(text.encode("ascii", "replace").decode())
