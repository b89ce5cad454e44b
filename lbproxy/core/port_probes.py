"""Which probe each port of a Service is asked by: one for all of them, or lines that name ports.

    lbproxy.io/probe: |
      web      http:/healthz
      metrics  none
    lbproxy.io/probe-settings: |
      interval=2s
      web      fall=2,status=200

A line without a name is for all ports that no line names; where there is none, these are not probed.
"""

import re
import typing
from collections.abc import Iterator, Mapping

import msgspec

from lbproxy.core import probe

NONE: typing.Final = "none"  # of a port that is not to be probed
_SENDS: typing.Final = f"{probe.Kind.UDP}:"

# What no probe and no setting begins with: those have a colon or an equals sign, or are one word.
_NAMED: typing.Final = re.compile(r"\s*([a-z0-9-]{1,63})\s+(\S.*)")


class PortProbes(msgspec.Struct, frozen=True, gc=False):
    """The probes of a Service. Equal text is one object, so to compare two costs nothing."""

    others: probe.Probe | None = None  # of ports that are not in `named`
    named: tuple[tuple[str, probe.Probe | None], ...] = ()  # in order of names; None: not asked
    shared: bool = False  # whether some of those are asked as all others are, with settings of their own

    def of(self, port_name: str) -> probe.Probe | None:
        """The probe of a port, whatever its protocol is."""
        for name, found in self.named:
            if name == port_name:
                return found
        return self.others

    def __iter__(self) -> Iterator[probe.Probe]:
        """All there are."""
        return (found for found in (self.others, *(found for _, found in self.named)) if found is not None)


def parse(asked_text: str, settings_text: str = "") -> PortProbes:
    """Read both annotations. Raises probe.ProbeError."""
    asked = _lines(asked_text)
    try:
        settings = _lines(settings_text)
    except probe.ProbeError as error:
        raise probe.SettingsError(*error.args) from None
    common = settings.get("", "")
    for_others = asked.get("", NONE if asked else "")
    others = None if for_others == NONE else _one("", for_others, common)
    named: dict[str, probe.Probe | None] = {}
    for name in sorted({*asked, *settings} - {""}):
        text = asked.get(name, asked.get(""))
        if text is None:
            raise probe.SettingsError(f"port {name}: settings, and no probe")
        if text == NONE and name in settings:
            raise probe.SettingsError(f"port {name}: settings, and it is not to be probed")
        named[name] = None if text == NONE else _one(name, text, common, settings.get(name, ""))
    return PortProbes(others, tuple(named.items()), shared=not {*settings, ""} <= {*asked, ""})


def _one(name: str, text: str, *settings: str) -> probe.Probe:
    try:
        return probe.parse(text, *settings)
    except probe.ProbeError as error:
        raise type(error)(f"port {name}: {error}" if name else str(error)) from None


def names(text: str) -> set[str]:
    """The ports that an annotation names. Raises probe.ProbeError."""
    return {*_lines(text)} - {""}


def _lines(text: str) -> Mapping[str, str]:
    """What stands behind each name; behind none, what is for all other ports.

    Blanks around it are nobody's, but for those that a probe of UDP is to send.
    """
    found: dict[str, str] = {}
    for line in (line.strip("\r").lstrip() for line in text.split("\n")):
        if not line:
            continue
        named = _NAMED.fullmatch(line)
        name, said = (named[1], named[2]) if named else ("", line)
        if not said.startswith(_SENDS):
            said = said.rstrip()
        if name in found:
            raise probe.ProbeError(f"two lines for port {name}" if name else "two lines for all ports")
        found[name] = said
    return found
