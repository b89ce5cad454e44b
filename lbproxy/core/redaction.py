"""What is taken out of a text before somebody else reads it: what looks like a secret, and on demand names.

Secrets that are known are hidden by `lbproxy.secrecy`; these are forms that secrets have. Names and
addresses become pseudonyms, the same one wherever they stand: a report still tells which is which.
"""

import ipaddress
import re
import typing
from collections.abc import Callable, Iterable, Mapping

from lbproxy.core import addresses

HIDDEN: typing.Final = "(hidden)"

_SECRETS: typing.Final = (
    # A private key or certificate in PEM, also where its lines are joined or it is cut off.
    re.compile(r"-----BEGIN [A-Z ]+-----.*?(?:-----END [A-Z ]+-----|\Z)", re.DOTALL),
    # A JSON Web Token, such as those of ServiceAccounts.
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?"),
    re.compile(r"(?<=\bBearer )\S+", re.IGNORECASE),
    re.compile(r"(?<=\bBasic )[A-Za-z0-9+/=]{8,}", re.IGNORECASE),
    # token=…, "password": "…", --client-key-data … and the like.
    re.compile(
        r"(?<![\w])(?P<name>[\w-]*(?:token|password|passwd|secret|api[-_]?key|key[-_]data|credential)s?)"
        r"(?P<between>\"?\s*[=:]\s*\"?|\s+(?=[\w+/=.-]{16,}))(?P<value>[^\s\",;]+)",
        re.IGNORECASE,
    ),
)


def scrubbed(text: str) -> str:
    """The text without whatever has the form of a secret."""
    for pattern in _SECRETS[:-1]:
        text = pattern.sub(HIDDEN, text)
    return _SECRETS[-1].sub(lambda found: f"{found['name']}{found['between']}{HIDDEN}", text)


_SECRET_NAME: typing.Final = re.compile(
    r"token|passw|secret|api[-_]?key|key[-_]data|credential", re.IGNORECASE
)


def scrubbed_value(value: object, clean: Callable[[str], str] = scrubbed) -> typing.Any:
    """JSON with `clean` done to each text in it, and without what has the name of a secret."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {
            str(key): HIDDEN
            if isinstance(one, str) and _SECRET_NAME.search(str(key))
            else scrubbed_value(one, clean)
            for key, one in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [scrubbed_value(one, clean) for one in value]
    return value


_ADDRESS: typing.Final = re.compile(
    r"(?<![\w:.])(?:(?:\d{1,3}\.){3}\d{1,3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?:\.\d{1,3}){0,3})(?![\w.]*\w:|\w)"
)
_MAC: typing.Final = re.compile(r"\b[0-9a-f]{2}(?::[0-9a-f]{2}){5}\b", re.IGNORECASE)
# Too common to say anything of anybody, and too telling to be without.
_PLAIN: typing.Final = frozenset(
    {"default", "kube-system", "kubernetes", "http", "https", "dns", "dns-tcp", ""}
)


# What may be a name: words, joined by dashes and dots; or have one in it, as a pod's has its Deployment's.
_JOINED: typing.Final = re.compile(r"[A-Za-z0-9]+(?:[-.]+[A-Za-z0-9]+)*")
_JOINTS: typing.Final = re.compile(r"([-.]+)")
_LABEL: typing.Final = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"
_NAME: typing.Final = rf"{_LABEL}(?:\.{_LABEL})*"
# Where names stand that no table has: of what found no room, is rejected, or is another proxy's.
_FORMS: typing.Final = (
    re.compile(
        rf"(?<![\w./-])(?P<namespace>{_LABEL})/(?P<service>{_NAME})(?::(?P<port>{_LABEL}))?/(?:TCP|UDP|SCTP)\b"
    ),
    re.compile(rf"\b(?:Service|health check of) (?P<namespace>{_LABEL})/(?P<service>{_NAME})"),
    # The name of a slice is mostly that of its Service, and a word of letters that Kubernetes draws.
    re.compile(
        rf"\bEndpointSlice (?P<namespace>{_LABEL})/(?P<service>[a-z0-9][a-z0-9.-]{{0,252}}?)"
        r"(?:-[bcdfghjklmnpqrstvwxz2456789]{5})?(?![\w.-]*\w)"
    ),
    re.compile(r"\bnamespace=\"(?P<namespace>[^\"]+)\",service=\"(?P<service>[^\"]+)\""),
    re.compile(r"\bzone '(?P<zone>[^']+)'"),
    re.compile(r"\"process\":\"(?P<process>[^\"]+)\""),
    re.compile(r"(?:://|\bhost=\")(?P<host>(?=[\d.]*[A-Za-z])\w[\w.-]*)"),
)


class Pseudonyms:
    """Names and addresses, and what stands for each: given in order of appearance."""

    def __init__(self) -> None:
        self._of: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        self._most_words = 0  # of a name
        self._odd: re.Pattern[str] | None = None  # names that are not words joined by dashes and dots

    @property
    def given(self) -> Mapping[str, str]:
        """What stands for what; not for those who are not to know."""
        return dict(self._of)

    def learn(self, kind: str, names: Iterable[str]) -> None:
        """Have these names replaced by KIND-NUMBER, wherever they stand as words."""
        odd = False
        for name in sorted(set(names) - _PLAIN - self._of.keys()):
            self._give(kind, name)
            if _JOINED.fullmatch(name):
                self._most_words = max(self._most_words, len(_JOINTS.split(name)) // 2 + 1)
            else:
                odd = True
        if odd:
            words = (name for name in self._of if not (_JOINED.fullmatch(name) or _is_address(name)))
            # The longest first: a name may begin another.
            pattern = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
            self._odd = re.compile(rf"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])")

    def learn_from(self, text: str) -> None:
        """Learn the names that a text has in places where only names stand."""
        found: dict[str, set[str]] = {}
        for form in _FORMS:
            for match in form.finditer(text):
                for kind, name in match.groupdict().items():
                    if name and name != "localhost":
                        found.setdefault(kind, set()).add(name)
        for kind, names in found.items():
            self.learn(kind, names)

    def text(self, text: str) -> str:
        """A text with pseudonyms in place of names and addresses."""
        text = _MAC.sub(lambda found: self._give("mac", found[0].lower()), text)
        text = _ADDRESS.sub(lambda found: self._address(found[0]), text)
        if self._odd is not None:
            text = self._odd.sub(lambda found: self._of[found[0]], text)
        # Not one pattern of all names: there are tens of thousands, and it would try each at every word.
        return _JOINED.sub(lambda found: self._joined(found[0]), text) if self._most_words else text

    def _joined(self, text: str) -> str:
        """Words that are joined, with the longest names in them replaced, from the left."""
        parts = _JOINTS.split(text)
        told = []
        at = 0
        while at < len(parts):
            for end in range(min(len(parts), at + 2 * self._most_words - 1), at, -2):
                if (pseudonym := self._of.get("".join(parts[at:end]))) is not None:
                    told.append(pseudonym)
                    break
            else:
                end = at + 1
                told.append(parts[at])
            told += parts[end : end + 1]
            at = end + 1
        return "".join(told)

    def value(self, value: object) -> typing.Any:
        """JSON with pseudonyms in its values; its keys are ours, but for those that are addresses."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self._key(key): self.value(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(one) for one in value]
        return value

    def _key(self, key: object) -> str:
        text = str(key)
        return _ADDRESS.sub(lambda found: self._address(found[0]), text)

    def _address(self, text: str) -> str:
        packed = addresses.parse(text) if ":" not in text else _packed(text)
        if packed is None:
            return text
        plain = ipaddress.ip_address(addresses.text(packed))
        if plain.is_loopback or plain.is_unspecified or plain.is_multicast or _is_mask(str(plain)):
            return text
        return self._give(f"ipv{plain.version}", str(plain))

    def _give(self, kind: str, name: str) -> str:
        if name not in self._of:
            self._counts[kind] = self._counts.get(kind, 0) + 1
            self._of[name] = f"{kind}-{self._counts[kind]}"
        return self._of[name]


def _packed(text: str) -> bytes | None:
    try:
        return addresses.packed(ipaddress.ip_address(text))
    except ValueError:
        return None


def _is_mask(text: str) -> bool:
    return text.startswith("255.")


def _is_address(text: str) -> bool:
    return _packed(text) is not None or bool(_MAC.fullmatch(text))
