"""Secrets are hidden in whatever text they turn up."""

import collections.abc

import pytest

from lbproxy import secrecy


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrecy, "_kept", {})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://host:6443/api?a=b@c", "https://host:6443/api?a=b@c"),
        ("https://user:pass@host:6443/api", "https://host:6443/api"),
        ("at http://user@host, https://p%40s:w@rd@[::1]:1", "at http://host, https://[::1]:1"),
        ("mail me@host or https://host", "mail me@host or https://host"),
        ("https://:only-password@host", "https://host"),
    ],
)
def test_the_user_of_a_url_goes(text: str, told: str) -> None:
    assert secrecy.without(text) == told


def test_what_is_kept_is_hidden_wherever_it_is() -> None:
    secrecy.keep("Bearer abcdef")
    secrecy.keep(" abcdefghi\n")
    assert secrecy.without("(abcdef) 'abcdefghi' Bearer x") == "((hidden)) '(hidden)' Bearer x"


def test_what_is_too_short_is_no_secret() -> None:
    secrecy.keep("abcd")
    secrecy.keep("")
    assert secrecy.without("abcd") == "abcd"


def test_the_oldest_is_forgotten_in_the_end() -> None:
    for number in range(1000):
        secrecy.keep(f"token-{number:04}")
        secrecy.keep("token-used-always")
    told = secrecy.without("token-0000 token-0999 token-used-always")
    assert told == f"token-0000 {secrecy.HIDDEN} {secrecy.HIDDEN}"


def secrets_of(text: str) -> set[str]:
    return {word for word in text.split() if secrecy.without(word) != word}


def test_a_kubeconfig_is_searched_for_secrets() -> None:
    user = {
        "token": "the-token",
        "password": "the-password",
        "client-key-data": "the-key-data",
        "client-key": "/the/path",
        "auth-provider": {"config": {"id-token": "the-id-token", "expiry": None}},
        "exec": {
            "env": [{"name": "API_TOKEN", "value": "the-env"}, {"name": "REGION", "value": "the-region"}]
        },
    }
    secrecy.keep_kubeconfig({"users": [{"name": "the-name", "user": user}, "nonsense", {"user": 1}]})
    text = "the-token the-password the-key-data /the/path the-id-token the-env the-region the-name"
    assert secrets_of(text) == {"the-token", "the-password", "the-key-data", "the-id-token", "the-env"}


@pytest.mark.parametrize("content", [None, [], "text", {"users": 1}, {"users": [{"user": {"exec": []}}]}])
def test_a_kubeconfig_that_is_none_has_no_secrets(content: collections.abc.Sequence[object] | None) -> None:
    secrecy.keep_kubeconfig(content)
    assert secrecy.without("text users user exec") == "text users user exec"
