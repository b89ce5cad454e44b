"""What a Service's annotations say of probes: what to ask its backends, how often, and when to believe it.

    lbproxy.io/probe: http:/healthz
    lbproxy.io/probe-settings: interval=2s,fall=2,status=200-299

core.port_probes reads lines that name ports, and has this module read what they say.

Text that is not understood means no probe at all: with half of what was meant,
backends would be asked the wrong thing and found down.
"""

import enum
import re
import typing
from collections.abc import Callable, Mapping

import msgspec

LONGEST_TEXT: typing.Final = 1024  # of a path, of a name
LONGEST_PAYLOAD_BYTES: typing.Final = 512


class Kind(enum.StrEnum):
    """What a probe speaks; it passes with a connection, an expected answer, or any at all (UDP)."""

    TCP = "tcp"
    HTTP = "http"
    HTTPS = "https"
    GRPC = "grpc"
    UDP = "udp"


class Tls(enum.StrEnum):
    """What is asked of a backend's certificate."""

    UNVERIFIED = "unverified"
    VERIFY = "verify"


class Probe(msgspec.Struct, frozen=True, gc=False):
    """A probe of all backends of a Service. Equal probes of one address and port are made once."""

    kind: Kind
    text: str = ""  # the path of HTTP, the service of gRPC
    payload: bytes = b""  # of UDP
    expect: bytes = b""  # what the answer to it begins with
    host: str = ""  # empty: the backend's address
    server_name: str = ""
    lowest_status: int = 200
    highest_status: int = 399
    interval_s: float = 5.0
    timeout_s: float = 1.0
    rise: int = 2  # results in a row that make a backend usable again
    fall: int = 3  # and that make it unusable
    jitter: float = 0.2  # how much later than the interval a probe may be, as a share of it
    port: int = 0  # 0: the backend's own
    panic: float = 0.0  # a smaller share of healthy backends than this is not believed
    tls: Tls | None = None  # None: TLS only where the kind says so, unverified

    @property
    def over_tls(self) -> bool:
        """Whether it is asked through TLS."""
        return self.kind is Kind.HTTPS or self.tls is not None

    @property
    def protocol(self) -> str:
        """The protocol of the ports that can be asked."""
        return "UDP" if self.kind is Kind.UDP else "TCP"

    def suits(self, protocol: str) -> bool:
        """Whether it can be asked at backends' own ports; one with a port of its own can at any."""
        return bool(self.port) or protocol == self.protocol


class ProbeError(ValueError):
    """The text is no probe; says why in a few words, without a full stop."""


class SettingsError(ProbeError):
    """It is the settings that are wrong."""


class Setting(typing.NamedTuple):
    """One setting: what it is of, how its value is read into fields of Probe, and what it means."""

    kinds: tuple[Kind, ...]
    default: str
    read: Callable[[str], dict[str, typing.Any]]
    help: str


def parse(probe_text: str, *settings_texts: str) -> Probe:
    """Read a probe and its settings; what stands in a later text goes before. Raises ProbeError."""
    word, colon, subject = probe_text.partition(":")
    if word not in _SUBJECTS:
        raise ProbeError(f"begins with none of {', '.join(_SUBJECTS)}")
    kind = Kind(word)
    fields = _SUBJECTS[kind](subject) if colon else _without_subject(kind)
    for text in settings_texts:
        fields = {**fields, **_settings(kind, text)}
    found = Probe(kind, **fields)
    if found.server_name and not found.over_tls:
        raise SettingsError("server-name= is for TLS: with tls=unverified or tls=verify")
    return found


def describe(asked: Probe) -> str:
    """A probe in few words; what UDP sends is left out."""
    what = f"{asked.kind}:{asked.text}" if asked.text else str(asked.kind)
    where = f" at port {asked.port}" if asked.port else ""
    tls = f" with tls={asked.tls}" if asked.tls else ""
    return f"{what}{where}{tls} every {asked.interval_s:g}s"


def _settings(kind: Kind, text: str) -> dict[str, typing.Any]:
    fields: dict[str, typing.Any] = {}
    given = set()
    parts = [part.strip() for part in text.split(",")]
    if not parts[-1]:
        parts.pop()  # a comma at the end, or no text
    for part in parts:
        if not part:
            raise SettingsError("a comma without a setting in front")
        name, equals, value = part.partition("=")
        setting = SETTINGS.get(name)
        if setting is None or not equals:
            raise SettingsError(f"{_shown(part)} is none of {', '.join(f'{known}=' for known in SETTINGS)}")
        if kind not in setting.kinds:
            raise SettingsError(f"{name}= is not for {kind}")
        if name in given:
            raise SettingsError(f"{name}= stands twice")
        given.add(name)
        try:
            fields |= setting.read(value)
        except ValueError as error:
            raise SettingsError(f"{name}={_shown(value)}: {error}") from None
    return fields


# --- values: each raises ValueError with what was expected ---


def _without_subject(kind: Kind) -> dict[str, typing.Any]:
    if kind in (Kind.TCP, Kind.GRPC):
        return {}
    if kind is Kind.UDP:
        raise ProbeError("udp needs something to send: udp:ping")
    return {"text": "/"}


def _no_subject(_text: str) -> dict[str, typing.Any]:
    raise ProbeError("tcp asks for nothing: it is tcp alone")


def _path(text: str) -> dict[str, typing.Any]:
    if not text.startswith("/") or not _PRINTABLE.fullmatch(text) or len(text) > LONGEST_TEXT:
        raise ProbeError("the path has no / in front, or is not short printable ASCII")
    return {"text": text}


def _grpc_service(text: str) -> dict[str, typing.Any]:
    if (text and not _PRINTABLE.fullmatch(text)) or len(text) > LONGEST_TEXT:
        raise ProbeError("the service is not short printable ASCII")
    return {"text": text}


def _payload(text: str) -> dict[str, typing.Any]:
    try:
        payload = _bytes(text)
    except ValueError as error:
        raise ProbeError(f"what to send: {error}") from None
    if not payload:
        raise ProbeError("udp needs something to send: udp:ping")
    return {"payload": payload}


def _bytes(text: str) -> bytes:
    r"""Read printable ASCII, in which \xNN stands for any byte and \\ for a backslash."""
    parts = _ESCAPES.findall(text)
    if "".join(parts) != text:
        raise ValueError(r"other than printable ASCII, \xNN and \\")
    found = b"".join(
        bytes.fromhex(part[2:]) if part.startswith("\\x") else part[-1:].encode() for part in parts
    )
    if len(found) > LONGEST_PAYLOAD_BYTES:
        raise ValueError(f"more than {LONGEST_PAYLOAD_BYTES} bytes")
    return found


def _duration(field: str, least_s: float, most_s: float) -> Callable[[str], dict[str, typing.Any]]:
    def read(text: str) -> dict[str, typing.Any]:
        found = _DURATION.fullmatch(text)
        if found is None:
            raise ValueError("not a time such as 5s, 500ms or 1m")
        seconds = float(found[1]) * _UNITS_S[found[2]]
        if not least_s <= seconds <= most_s:
            raise ValueError(f"not in {least_s:g}s..{most_s:g}s")
        return {field: seconds}

    return read


def _count(field: str, least: int, most: int) -> Callable[[str], dict[str, typing.Any]]:
    def read(text: str) -> dict[str, typing.Any]:
        number = int(text) if _DIGITS.fullmatch(text) else -1
        if not least <= number <= most:
            raise ValueError(f"not in {least}..{most}")
        return {field: number}

    return read


def _percentage(field: str) -> Callable[[str], dict[str, typing.Any]]:
    def read(text: str) -> dict[str, typing.Any]:
        digits = text.removesuffix("%")
        if digits == text or not _DIGITS.fullmatch(digits) or int(digits) > 100:
            raise ValueError("not a share such as 20%")
        return {field: int(digits) / 100}

    return read


def _host(field: str, pattern: re.Pattern[str]) -> Callable[[str], dict[str, typing.Any]]:
    def read(text: str) -> dict[str, typing.Any]:
        if not pattern.fullmatch(text):
            raise ValueError("not a host's name")
        return {field: text}

    return read


def _status(text: str) -> dict[str, typing.Any]:
    found = _STATUS.fullmatch(text)
    lowest, highest = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 200 <= lowest <= highest <= 599:
        raise ValueError("no status or range in 200-599")
    return {"lowest_status": lowest, "highest_status": highest}


def _tls(text: str) -> dict[str, typing.Any]:
    if text == "none":
        raise ValueError("https is always TLS, and grpc is not where tls= is left out")
    if text not in tuple(Tls):
        raise ValueError(f"neither {' nor '.join(Tls)}")
    return {"tls": Tls(text)}


def _expect(text: str) -> dict[str, typing.Any]:
    return {"expect": _bytes(text)}


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 40 else f"{text[:37]}...")


_PRINTABLE: typing.Final = re.compile(r"[!-~]+")
_ESCAPES: typing.Final = re.compile(r"\\x[0-9a-fA-F]{2}|\\\\|[ -\[\]-~]")
_DURATION: typing.Final = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)(ms|s|m)")
_DIGITS: typing.Final = re.compile(r"[0-9]{1,6}")
_STATUS: typing.Final = re.compile(r"([0-9]{3})(?:-([0-9]{3}))?")
_LABEL: typing.Final = r"[A-Za-z0-9](?:[-A-Za-z0-9_]{0,61}[A-Za-z0-9])?"
_NAME: typing.Final = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
_NAME_AND_PORT: typing.Final = re.compile(rf"(?=.{{1,259}}\Z){_LABEL}(?:\.{_LABEL})*(?::[0-9]{{1,5}})?")
_UNITS_S: typing.Final = {"ms": 0.001, "s": 1.0, "m": 60.0}
_SUBJECTS: typing.Final[Mapping[str, Callable[[str], dict[str, typing.Any]]]] = {
    Kind.TCP: _no_subject,
    Kind.HTTP: _path,
    Kind.HTTPS: _path,
    Kind.GRPC: _grpc_service,
    Kind.UDP: _payload,
}
_ALL: typing.Final = tuple(Kind)
_WEB: typing.Final = (Kind.HTTP, Kind.HTTPS)

SETTINGS: typing.Final[Mapping[str, Setting]] = {
    "interval": Setting(
        _ALL, "5s", _duration("interval_s", 1.0, 3600.0), "from one probe to the next; 1s to 3600s"
    ),
    "timeout": Setting(
        _ALL, "1s", _duration("timeout_s", 0.05, 60.0), "a probe that takes longer has failed; 0.05s to 60s"
    ),
    "rise": Setting(
        _ALL, "2", _count("rise", 1, 100), "so many passed in a row make a backend usable again; 1 to 100"
    ),
    "fall": Setting(_ALL, "3", _count("fall", 1, 100), "so many failed in a row take it out; 1 to 100"),
    "jitter": Setting(
        _ALL,
        "20%",
        _percentage("jitter"),
        "each pause is longer by up to this share, drawn anew: nodes do not ask in step; 0% to 100%",
    ),
    "port": Setting(
        _ALL,
        "the backend's",
        _count("port", 1, 65535),
        "ask at this port of the backend's address; 1 to 65535",
    ),
    "panic": Setting(
        _ALL,
        "0%",
        _percentage("panic"),
        "where a smaller share than this is healthy, all are used: no verdict is believed then; 0% to 100%",
    ),
    "host": Setting(
        (*_WEB, Kind.GRPC),
        "the address",
        _host("host", _NAME_AND_PORT),
        "the Host header, or :authority of gRPC",
    ),
    "status": Setting(_WEB, "200-399", _status, "the status, or range of them, that passes"),
    "tls": Setting(
        (Kind.HTTPS, Kind.GRPC),
        "https: unverified; grpc: no TLS",
        _tls,
        "`unverified`: any certificate will do; `verify`: one that is in force, for `server-name`, "
        "by an authority that the agent knows",
    ),
    "server-name": Setting(
        (Kind.HTTPS, Kind.GRPC),
        "none",
        _host("server_name", _NAME),
        "the name asked for in TLS (SNI), that `tls=verify` wants in the certificate; without one it "
        "wants the address",
    ),
    "expect": Setting((Kind.UDP,), "anything", _expect, "what the answer begins with"),
}
"""Every setting by its name in the annotation; docs/health.md has the same table."""
