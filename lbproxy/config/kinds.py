"""The kinds of value that flags and configuration files hold.

Each reads the text of a flag and the value of a YAML field, and writes the
latter. Readers raise ValueError with the rest of a sentence: "is not …".
"""

import dataclasses
import decimal
import enum
import ipaddress
import pathlib
import re
import typing
from collections.abc import Callable, Mapping, Sequence

from lbproxy.config import config
from lbproxy.core import model

T = typing.TypeVar("T")
E = typing.TypeVar("E", bound=enum.Enum)
Schema = Mapping[str, object]  # JSON Schema, draft 7

PRIMARY = "primary"
MAX_ROWS = 2**30
_MAX_SERVICES: typing.Final = 1 << 24  # a flow's row has three bytes for its service
# Coarser than the readers below, which have the last word.
_IP_PATTERN: typing.Final = r"[0-9]+(\.[0-9]+){3}|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*"
_LISTEN_PATTERN: typing.Final = (
    r"^([0-9]+(\.[0-9]+){3}(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?"
    r"|[0-9A-Fa-f.]*(:[0-9A-Fa-f.]*){2,})?$"
)


@dataclasses.dataclass(frozen=True, slots=True)
class ValueType(typing.Generic[T]):
    """How one kind of value is written: `parse` reads a flag's text, `decode` a YAML value.

    `schema` is what JSON Schema can say of the YAML value; it refuses nothing that `decode` takes.
    """

    metavar: str
    parse: Callable[[str], T]
    decode: Callable[[object], T]
    encode: Callable[[T], object] = str
    joins: bool = False  # a repeated flag adds to the list; otherwise the last one counts
    schema: Schema = dataclasses.field(default_factory=lambda: {"type": "string"}, hash=False)


def _expect_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{_show(value)} is not a string")
    return value


def _show(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)


def _text_type(
    metavar: str,
    parse: Callable[[str], T],
    encode: Callable[[T], object] = str,
    pattern: str = "",
    names: Sequence[str] = (),
) -> ValueType[T]:
    """A type that files hold as a string in the same syntax as the flag.

    A schema knows it by a pattern, or by all the strings that there are.
    """
    schema: dict[str, object] = {"enum": [*names]} if names else {"type": "string"}
    if pattern:
        schema["pattern"] = pattern
    return ValueType(metavar, parse, lambda value: parse(_expect_text(value)), encode, schema=schema)


def _list_type(
    metavar: str, parse: Callable[[str], T], encode: Callable[[T], object] = str, pattern: str = ""
) -> ValueType[tuple[T, ...]]:
    """A comma-separated list as a flag, a YAML list in a file."""

    def parse_list(text: str) -> tuple[T, ...]:
        return tuple(parse(item.strip()) for item in text.split(",") if item.strip())

    def decode_list(value: object) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{_show(value)} is not a list")
        return tuple(parse(_expect_text(item)) for item in value)

    item: dict[str, object] = {"type": "string"}
    if pattern:
        item["pattern"] = pattern
    schema = {"type": "array", "items": item}
    return ValueType(
        metavar, parse_list, decode_list, lambda items: [encode(item) for item in items], True, schema
    )


def _parse_bool(text: str) -> bool:
    # The spellings that Go's strconv.ParseBool takes.
    if text in ("1", "t", "T", "true", "TRUE", "True"):
        return True
    if text in ("0", "f", "F", "false", "FALSE", "False"):
        return False
    raise ValueError(f"{text!r} is not true or false")


def _decode_bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{_show(value)} is not true or false")
    return value


def integer(low: int, high: int = 2**31 - 1) -> ValueType[int]:
    """A whole number from `low` to `high`."""

    def check(number: int) -> int:
        if not low <= number <= high:
            raise ValueError(f"{number} is not in {low} to {high}")
        return number

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
            raise ValueError(f"{text!r} is not a whole number")
        return check(int(text))

    def decode(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{_show(value)} is not a whole number")
        return check(value)

    schema = {"type": "integer", "minimum": low, "maximum": high}
    return ValueType("N", parse, decode, int, schema=schema)


def _parse_number(text: str) -> float:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}(\.[0-9]*)?", text):
        raise ValueError(f"{text!r} is not a number")
    return float(text)


def _decode_number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{_show(value)} is not a number")
    return float(value)


_UNIT_NS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "μs": 1_000,
    "ms": 1_000_000,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
# A whole one, in what all dialects of patterns have in common.
_DURATION_PATTERN = r"^[+-]?(([0-9]+(\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h))+$|^[+-]?0$"
_DURATION_SCHEMA: Schema = {  # a number of a file is 0
    "type": ["string", "integer"], "pattern": _DURATION_PATTERN, "minimum": 0, "maximum": 0,
}  # fmt: skip


def parse_duration_s(text: str) -> float:
    """Read a duration as Go writes it ("1m30s", "1.5h", "0") into seconds; negative ones are refused."""
    if text in ("0", "+0", "-0"):
        return 0.0
    body = text.removeprefix("-").removeprefix("+")
    end, total_ns = 0, decimal.Decimal(0)
    for part in _DURATION_PART.finditer(body):
        if part.start() != end:
            break
        end = part.end()
        total_ns += decimal.Decimal(part[1]) * _UNIT_NS[part[2]]
    if end == 0 or end != len(body) or total_ns >= 2**63:
        raise ValueError(f"{text!r} is not a duration like 30s, 1m30s or 0")
    if text.startswith("-") and total_ns:
        raise ValueError(f"{text!r} is negative")
    return float(total_ns.to_integral_value() / 10**9)


def format_duration(duration_s: float) -> str:
    """Write seconds as `parse_duration_s` reads them, to the nanosecond."""
    left_ns = round(duration_s * 10**9)
    text = ""
    for unit in ("h", "m"):
        count, left_ns = divmod(left_ns, _UNIT_NS[unit])
        text += f"{count}{unit}" if count else ""
    seconds = decimal.Decimal(left_ns) / 10**9
    return text + (f"{seconds.normalize():f}s" if seconds or not text else "")


def _decode_duration_s(value: object) -> float:
    if value == 0 and not isinstance(value, bool):
        return 0.0
    return parse_duration_s(_expect_text(value))


def _decode_flush_s(value: object) -> float:
    # logging.flushFrequency alone may also be a number of nanoseconds.
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value / 10**9
    return _decode_duration_s(value)


def _positive_s(parsed_s: float) -> float:
    if not parsed_s:
        raise ValueError("0 is too short")
    return parsed_s


def parse_port_range(text: str) -> tuple[int, int] | None:
    """Read FIRST-LAST; nothing means None."""
    if not text:
        return None
    match = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", text)
    if not match:
        raise ValueError(f"{text!r} is not FIRST-LAST like 50000-59999")
    first, last = int(match[1]), int(match[2])
    if not 1 <= first <= last <= 65535:
        raise ValueError(f"{text!r} is not in 1-65535, the first before the last")
    return first, last


def parse_ip(text: str) -> config.IPAddress:
    """Read an IP address without a zone."""
    try:
        if "%" in text:
            raise ValueError
        return ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an IP address") from None


def parse_cidr(text: str) -> config.IPNetwork:
    """Read address/length; bits beyond the length are dropped, as Go's ParseCIDR does."""
    try:
        if not re.fullmatch(r"[^/%]+/[0-9]{1,3}", text):
            raise ValueError
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"{text!r} is not a CIDR like 10.0.0.0/8 or 2001:db8::/32") from None


def _parse_node_port_range(text: str) -> config.IPNetwork | str:
    return text if text == PRIMARY else parse_cidr(text)


def parse_listen(text: str) -> config.ListenAddress | None:
    """Read IP:PORT, or a bare IP with port 0 for the default one; nothing means not to listen."""
    if not text:
        return None
    match = re.fullmatch(r"\[(.*)\](?::([0-9]+))?|([^:]*)(?::([0-9]+))?", text)
    host, port = (match[1] or match[3] or "", match[2] or match[4]) if match else (text, None)
    try:
        address = parse_ip(host)
        if match and match[1] is not None and address.version == 4:
            raise ValueError
    except ValueError:
        raise ValueError(f"{text!r} is not an IP:PORT like 0.0.0.0:10256 or [::]:10256") from None
    if port is not None and not (len(port) < 6 and 0 < int(port) < 65536):
        raise ValueError(f"{text!r}: the port is not in 1 to 65535")
    return config.ListenAddress(str(address), int(port or 0))


class Destination(typing.NamedTuple):
    """Where a connection goes."""

    address: config.IPAddress
    port: int
    protocol: model.Protocol

    def __str__(self) -> str:
        return f"{config.ListenAddress(str(self.address), self.port)}/{self.protocol.name}"


def parse_destination(text: str) -> Destination:
    """Read IP:PORT or IP:PORT/PROTOCOL; an IPv6 address is in brackets, the protocol TCP unless given."""
    place, _, protocol = text.partition("/")
    try:
        address = parse_listen(place)
        if address is None or not address.port:
            raise ValueError
        return Destination(parse_ip(address.host), address.port, model.Protocol[protocol.upper() or "TCP"])
    except (ValueError, KeyError):
        raise ValueError(
            f"{text!r} is not an IP:PORT[/PROTOCOL] like 10.96.0.1:443 or [fd00::1]:53/UDP" + mistaken(place)
        ) from None


def mistaken(place: str) -> str:
    """What is likely wrong with a place that could not be read, to be added to a message; or nothing."""
    if _NAME.fullmatch(place):
        return "; it takes an address, not a name"
    if "[" not in place and _IPV6.fullmatch(place):
        return "; an IPv6 address before a port is in brackets"
    return ""


_NAME: typing.Final = re.compile(r"[A-Za-z0-9._-]*[A-Za-z][A-Za-z0-9._-]*(:[^:]*)?")
_IPV6: typing.Final = re.compile(r"[0-9A-Fa-f]*:[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*")


def choice(kind: type[E], default: E | None = None, fold_case: bool = False) -> ValueType[E]:
    """One value of an enumeration; nothing means `default` where there is one."""
    names = [str(member.value) for member in kind]

    def parse(text: str) -> E:
        if not text and default is not None:
            return default
        for member in kind:
            if text == member.value or (fold_case and text.lower() == member.value):
                return member
        raise ValueError(f"{text!r} is not one of {', '.join(names)}")

    taken = [*names, ""] if default is not None else names
    if fold_case:
        return _text_type("|".join(names), parse, lambda member: str(member.value), pattern=_folded(taken))
    return _text_type("|".join(names), parse, lambda member: str(member.value), names=taken)


def _folded(names: Sequence[str]) -> str:
    """A pattern of names in any case, in what all dialects of patterns have in common."""
    letters = ["".join(f"[{c.upper()}{c}]" if c.isalpha() else c for c in name) for name in names]
    return f"^({'|'.join(letters)})$"


def named(values: Mapping[str, T]) -> ValueType[T]:
    """One of a few names that stand for values."""

    def parse(text: str) -> T:
        if text not in values:
            raise ValueError(f"{text!r} is not one of {', '.join(values)}")
        return values[text]

    names = {value: name for name, value in values.items()}
    return _text_type("|".join(values), parse, lambda value: names[value], names=[*values])


def _parse_path(text: str) -> pathlib.Path | None:
    if "\0" in text:
        raise ValueError(f"{text!r} is not a path")
    return pathlib.Path(text) if text else None


def _rows_schema() -> Schema:
    rows = {"type": "integer", "minimum": 1, "maximum": MAX_ROWS}
    exact = {
        "sockets": {"enum": [2**power for power in range(MAX_ROWS.bit_length())]},
        "services": rows | {"maximum": _MAX_SERVICES},
    }
    names = [field.name for field in dataclasses.fields(config.MapRows)]
    properties = {name: exact.get(name, rows) for name in names}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _check_rows(rows: Mapping[str, object]) -> dict[str, int]:
    names = [field.name for field in dataclasses.fields(config.MapRows)]
    checked = {}
    for name, count in rows.items():
        if name not in names:
            raise ValueError(f"{name!r} is not one of {', '.join(names)}")
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_ROWS:
            raise ValueError(f"{name}: {_show(count)} is not a row count in 1 to {MAX_ROWS}")
        if name == "sockets" and count.bit_count() != 1:
            raise ValueError(f"sockets: {count} is not a power of two")
        if name == "services" and count > _MAX_SERVICES:
            raise ValueError(f"services: {count} is more than {_MAX_SERVICES}")
        checked[name] = count
    return checked


def _split_pairs(text: str) -> dict[str, str]:
    pairs = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise ValueError(f"{item!r} is not NAME=VALUE")
        pairs[key.strip()] = value.strip()
    return pairs


def _parse_rows(text: str) -> dict[str, int]:
    pairs = _split_pairs(text)
    return _check_rows({k: int(v) if re.fullmatch("[0-9]{1,18}", v) else v for k, v in pairs.items()})


def _decode_mapping(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{_show(value)} is not a mapping")
    return {_expect_text(key): item for key, item in value.items()}


def _decode_gates(value: object) -> dict[str, bool]:
    return {name: _decode_bool(item) for name, item in _decode_mapping(value).items()}


TEXT = _text_type("TEXT", str)
NAME = _text_type("NAME", lambda text: text.strip())
PATH = _text_type("PATH", _parse_path, lambda path: str(path or ""))
BOOL = ValueType("true|false", _parse_bool, _decode_bool, bool, schema={"type": "boolean"})
NUMBER = ValueType("N", _parse_number, _decode_number, float, schema={"type": "number"})
DURATION = ValueType(
    "DURATION", parse_duration_s, _decode_duration_s, format_duration, schema=_DURATION_SCHEMA
)
POSITIVE_DURATION = ValueType(
    "DURATION",
    lambda text: _positive_s(parse_duration_s(text)),
    lambda value: _positive_s(_decode_duration_s(value)),
    format_duration,
    schema=_DURATION_SCHEMA,
)
FLUSH_INTERVAL = ValueType(
    "DURATION",
    parse_duration_s,
    _decode_flush_s,
    format_duration,
    schema={"type": ["string", "integer"], "pattern": _DURATION_PATTERN, "minimum": 0},
)
LISTEN = _text_type("IP:PORT", parse_listen, lambda address: str(address or ""), pattern=_LISTEN_PATTERN)
PORT_RANGE = _text_type(
    "FIRST-LAST",
    parse_port_range,
    lambda ports: f"{ports[0]}-{ports[1]}" if ports else "",
    pattern="^([0-9]{1,5}-[0-9]{1,5})?$",
)
IP = _text_type("IP", parse_ip, pattern=f"^({_IP_PATTERN})$")
IPS = _list_type("IP", parse_ip, pattern=f"^({_IP_PATTERN})$")
CIDRS = _list_type("CIDR", parse_cidr, pattern=f"^({_IP_PATTERN})/[0-9]{{1,3}}$")
NODE_PORT_RANGES = _list_type(
    "CIDR", _parse_node_port_range, pattern=f"^({PRIMARY}|({_IP_PATTERN})/[0-9]{{1,3}})$"
)
NAMES = _list_type("NAME", str)
MAP_ROWS: ValueType[dict[str, int]] = ValueType(
    "NAME=N", _parse_rows, lambda value: _check_rows(_decode_mapping(value)), dict, True, _rows_schema()
)
GATES: ValueType[dict[str, bool]] = ValueType(
    "NAME=BOOL",
    lambda text: {name: _parse_bool(value) for name, value in _split_pairs(text).items()},
    _decode_gates,
    dict,
    True,
    {"type": "object", "additionalProperties": {"type": "boolean"}},
)
ANY: ValueType[object] = ValueType("TEXT", str, lambda value: value, lambda value: value, schema={})
