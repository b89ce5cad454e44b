"""What is never said: tokens, passwords and keys, whoever makes the text that they turn up in.

Who reads a secret says so with `keep`. Whatever is logged, served or sent to the API
server goes through `without`: a server may answer with what it was asked, and a plugin complain
with what it was given. The password of a URL is told by its form.
"""

import re
import typing
from collections.abc import Iterator, Mapping

HIDDEN: typing.Final = "(hidden)"
_KEPT: typing.Final = 64  # tokens are renewed every hour or so: old ones are worth nothing
_SHORTEST: typing.Final = 5  # what is shorter may be a part of any word
_USER_OF_URL: typing.Final = re.compile(r"(?<=://)[^/?#\s@]*(?:@[^/?#\s@]*)*@")
_FIELDS: typing.Final = ("token", "password", "client-key-data")
_SECRET_BY_NAME: typing.Final = re.compile("token|secret|pass|key|cred|auth", re.IGNORECASE)
_kept: dict[str, None] = {}  # the oldest first


def keep(secret: str) -> None:
    """Never say this again. What goes before a token in a header is no part of it."""
    secret = secret.strip().rpartition(" ")[2]
    if len(secret) >= _SHORTEST:
        _kept.pop(secret, None)
        _kept[secret] = None
        while len(_kept) > _KEPT:
            del _kept[next(iter(_kept))]


def keep_kubeconfig(content: object) -> None:
    """Never say what a kubeconfig, as YAML has it, holds of secrets, those of its plugins included."""
    for secret in _of_kubeconfig(content):
        keep(secret)


def without(text: str) -> str:
    """The text, with nothing in it that is to be kept."""
    text = _USER_OF_URL.sub("", text)
    # The longest first: one may be a part of another.
    for secret in sorted(_kept, key=len, reverse=True):
        if secret in text:
            text = text.replace(secret, HIDDEN)
    return text


def _of_kubeconfig(content: object) -> Iterator[str]:
    for named in _list(_field(content, "users")):
        user = _field(named, "user")
        plugin, provider = _field(user, "exec"), _field(_field(user, "auth-provider"), "config")
        values = [_field(user, name) for name in _FIELDS]
        values += [
            _field(one, "value")
            for one in _list(_field(plugin, "env"))
            if _SECRET_BY_NAME.search(str(_field(one, "name")))
        ]
        values += provider.values() if isinstance(provider, Mapping) else ()
        yield from (value for value in values if isinstance(value, str))


def _field(of: object, name: str) -> typing.Any:
    return of.get(name) if isinstance(of, Mapping) else None


def _list(value: object) -> list[typing.Any]:
    return value if isinstance(value, list) else []
