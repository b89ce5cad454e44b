"""What a Service's annotation says of outlier ejection: when a backend is left out for failing.

    lbproxy.io/outlier-ejection: "on"
    lbproxy.io/outlier-ejection: failures=10,share=30%,base=1m

Text that is not understood switches nothing on: half of what was meant might eject too much.
"""

import enum
import re
import typing
from collections.abc import Callable, Mapping

import msgspec


class Clients(enum.StrEnum):
    """Whose connections tell: those of this node's sockets, its pods' among them, or everybody's."""

    NODE = "node"
    ALL = "all"


class Ejection(msgspec.Struct, frozen=True, gc=False):
    """How the backends of a Service are judged."""

    failures: int = 5  # in a window, before a backend is looked at
    share_percent: int = 50  # of the ready backends of a service port that may be out at a time
    window_s: float = 10.0
    base_s: float = 30.0  # how long the first time out is
    clients: Clients = Clients.NODE


class EjectionError(ValueError):
    """The text is no such setting; says why in a few words, without a full stop."""


class Setting(typing.NamedTuple):
    """One setting: its default, how its value is read, and what it means."""

    default: str
    read: Callable[[str], dict[str, typing.Any]]
    help: str


def parse(text: str) -> Ejection | None:
    """Read the annotation; None where it says off. Raises EjectionError."""
    word = text.strip().lower()
    if word in _ON or word in _OFF:
        return Ejection() if word in _ON else None
    fields: dict[str, typing.Any] = {}
    given = set()
    for part in (part.strip() for part in text.split(",")):
        name, _, value = part.partition("=")
        setting = SETTINGS.get(name)
        if setting is None:
            raise EjectionError(f"neither on nor off, nor made of {', '.join(f'{one}=' for one in SETTINGS)}")
        if name in given:
            raise EjectionError(f"{name}= stands twice")
        given.add(name)
        try:
            fields |= setting.read(value)
        except ValueError as error:
            raise EjectionError(f"{name}={error}") from None
    return Ejection(**fields)


# --- values: each raises ValueError with what was expected ---


def _count(text: str) -> dict[str, typing.Any]:
    if not _NUMBER.fullmatch(text) or not 1 <= int(text) <= 10_000:
        raise ValueError(" is not in 1..10000")
    return {"failures": int(text)}


def _share(text: str) -> dict[str, typing.Any]:
    digits = text.removesuffix("%")
    if digits == text or not _NUMBER.fullmatch(digits) or not 1 <= int(digits) <= 100:
        raise ValueError(" is no share from 1% to 100%")
    return {"share_percent": int(digits)}


def _time(field: str, least_s: float, most_s: float) -> Callable[[str], dict[str, typing.Any]]:
    def read(text: str) -> dict[str, typing.Any]:
        found = _TIME.fullmatch(text)
        seconds = float(found[1]) * _UNITS_S[found[2]] if found else -1.0
        if not least_s <= seconds <= most_s:
            raise ValueError(f" is no time from {least_s:g}s to {most_s:g}s")
        return {field: seconds}

    return read


def _clients(text: str) -> dict[str, typing.Any]:
    if text not in tuple(Clients):
        raise ValueError(f" is neither {' nor '.join(Clients)}")
    return {"clients": Clients(text)}


_ON: typing.Final = ("on", "true")
_OFF: typing.Final = ("off", "false")
_NUMBER: typing.Final = re.compile(r"[0-9]{1,6}")
_TIME: typing.Final = re.compile(r"([0-9]{1,6})(s|m)")
_UNITS_S: typing.Final = {"s": 1.0, "m": 60.0}

SETTINGS: typing.Final[Mapping[str, Setting]] = {
    "failures": Setting("5", _count, "so many failures within the window, at least; 1 to 10000"),
    "share": Setting(
        "50%",
        _share,
        "at most this share of the ready backends is out at a time (one always may, all never); 1% to 100%",
    ),
    "window": Setting("10s", _time("window_s", 2.0, 300.0), "how far back failures count; 2s to 300s"),
    "base": Setting(
        "30s",
        _time("base_s", 1.0, 3600.0),
        "how long the first time out is (each further one is twice as long); 1s to 3600s",
    ),
    "clients": Setting(
        "node",
        _clients,
        "whose connections tell: `node`, those of this node's processes and pods; `all`, those of clients "
        "elsewhere as well, as far as they come through this node",
    ),
}
"""Every setting by its name in the annotation; docs/health.md has the same table."""
