"""Probes over TLS that verify certificates, of real servers with each thing that can be wrong with one."""

import asyncio
import pathlib
import ssl
import typing

import pytest

from lbproxy import agent, errors
from lbproxy.core import probe, probing
from lbproxy.probes import asking, trust
from tests import polling
from tests.kube import certificates
from tests.probes import servers
from tests.unit import test_grpc_health

Kind = probe.Kind
PASSED = probing.Result(passed=True)
VERIFY, UNVERIFIED = probe.Tls.VERIFY, probe.Tls.UNVERIFIED
NAME = "web.example"
ANSWERS: typing.Final = {
    Kind.HTTPS: b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
    Kind.GRPC: bytes.fromhex(test_grpc_health.SERVING),
}
PROTOCOLS: typing.Final = {Kind.HTTPS: "http/1.1", Kind.GRPC: "h2"}
TEXTS: typing.Final = {Kind.HTTPS: "/", Kind.GRPC: "shop.Cart"}
BOTH = pytest.mark.parametrize("kind", list(ANSWERS))


@pytest.fixture
def authority(tmp_path: pathlib.Path) -> certificates.Authority:
    return certificates.Authority(tmp_path)


@pytest.fixture
def trusted(authority: certificates.Authority) -> trust.Trust:
    return trust.Trust(authority.certificate)


def asked(kind: probe.Kind, tls: probe.Tls = VERIFY, name: str = NAME, timeout_s: float = 5.0) -> probe.Probe:
    return probe.Probe(kind, TEXTS[kind], server_name=name, tls=tls, timeout_s=timeout_s)


def context(authority: certificates.Authority, kind: probe.Kind, **pair: typing.Any) -> ssl.SSLContext:
    made = authority.server_context(authority.pair("server", **{"names": [NAME], **pair}))
    made.set_alpn_protocols([PROTOCOLS[kind]])
    return made


async def result(
    what: probe.Probe, tls: ssl.SSLContext | None, trusted: trust.Trust, heard: list[bytes] | None = None
) -> probing.Result:
    async with servers.serving(servers.answering(ANSWERS[what.kind], heard), tls=tls) as port:
        return (await asking.ask(servers.target(what, port), trusted)).result


@BOTH
async def test_a_certificate_that_is_right_passes(
    kind: probe.Kind, authority: certificates.Authority, trusted: trust.Trust
) -> None:
    names: list[str | None] = []
    heard: list[bytes] = []
    tls = context(authority, kind)
    tls.sni_callback = lambda _connection, name, _context: names.append(name)
    assert await result(asked(kind), tls, trusted, heard) == PASSED
    assert names == [NAME]
    assert b"lbproxy-probe" in heard[0]


async def test_a_question_of_grpc_says_that_it_came_by_tls(
    authority: certificates.Authority, trusted: trust.Trust
) -> None:
    heard: list[bytes] = []
    await result(asked(Kind.GRPC), context(authority, Kind.GRPC), trusted, heard)
    assert b":scheme" in heard[0]
    assert b"https" in heard[0]


@BOTH
@pytest.mark.parametrize(
    ("pair", "name", "reason"),
    [
        ({"expired": True}, NAME, "TLS: certificate has expired"),
        ({}, "other.example", "TLS: Hostname mismatch, certificate is not valid for 'other.example'"),
        ({"address": "192.0.2.1"}, "", "TLS: IP address mismatch, certificate is not valid for '127.0.0.1'"),
    ],
)
async def test_a_certificate_that_is_wrong_fails_only_where_it_is_verified(
    kind: probe.Kind,
    pair: dict[str, typing.Any],
    name: str,
    reason: str,
    authority: certificates.Authority,
    trusted: trust.Trust,
) -> None:
    tls = context(authority, kind, **pair)
    assert await result(asked(kind, name=name), tls, trusted) == probing.Result(passed=False, reason=reason)
    assert await result(asked(kind, UNVERIFIED, name), tls, trusted) == PASSED


@BOTH
async def test_without_a_name_the_certificate_is_to_be_for_the_address(
    kind: probe.Kind, authority: certificates.Authority, trusted: trust.Trust
) -> None:
    assert await result(asked(kind, name=""), context(authority, kind), trusted) == PASSED


@BOTH
async def test_another_authority_is_not_believed(
    kind: probe.Kind, authority: certificates.Authority, tmp_path: pathlib.Path
) -> None:
    other = trust.Trust(certificates.Authority(tmp_path, "other").certificate)
    found = await result(asked(kind), context(authority, kind), other)
    assert found == probing.Result(passed=False, reason="TLS: self-signed certificate in certificate chain")


@BOTH
async def test_a_server_of_tls_1_3_alone_is_understood(
    kind: probe.Kind, authority: certificates.Authority, trusted: trust.Trust
) -> None:
    tls = context(authority, kind)
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    assert await result(asked(kind), tls, trusted) == PASSED


@BOTH
async def test_a_server_without_tls_fails(kind: probe.Kind, trusted: trust.Trust) -> None:
    for tls in (VERIFY, UNVERIFIED):
        async with servers.serving(servers.answering(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
            found = (await asking.ask(servers.target(asked(kind, tls), port), trusted)).result
        assert found == probing.Result(passed=False, reason="TLS: WRONG_VERSION_NUMBER")


async def test_grpc_without_http_2_agreed_on_fails(
    authority: certificates.Authority, trusted: trust.Trust
) -> None:
    none = authority.server_context(authority.pair("server", names=[NAME]))
    expected = probing.Result(passed=False, reason="TLS: does not agree on HTTP/2 (ALPN)")
    assert await result(asked(Kind.GRPC), none, trusted) == expected


@BOTH
async def test_a_handshake_that_hangs_ends_in_time(
    kind: probe.Kind, authority: certificates.Authority, trusted: trust.Trust
) -> None:
    """The server's first flight is there, and nothing comes after half of it."""
    tls, ended = context(authority, kind), asyncio.Event()

    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        handshake = tls.wrap_bio(incoming, outgoing, server_side=True)
        incoming.write(await reader.read(4096))
        with pytest.raises(ssl.SSLWantReadError):
            handshake.do_handshake()
        flight = outgoing.read()
        writer.write(flight[: len(flight) // 2])
        await reader.read()
        ended.set()

    async with servers.serving(half) as port:
        found = (await asking.ask(servers.target(asked(kind, timeout_s=0.1), port), trusted)).result
        # Whoever was asked sees the connection end.
        await asyncio.wait_for(ended.wait(), polling.TIMEOUT_S)
    assert found._replace(blameless=False) == probing.Result(passed=False, reason="no answer in 0.1 s")


async def test_a_file_that_changes_is_read_again(
    authority: certificates.Authority, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "trusted.crt"

    def says(what: bytes) -> None:
        draft = tmp_path / "draft.crt"
        draft.write_bytes(what)
        draft.replace(file)

    says(certificates.Authority(tmp_path, "other").certificate.read_bytes())
    trusted, tls = trust.Trust(file), context(authority, Kind.HTTPS)
    assert not (await result(asked(Kind.HTTPS), tls, trusted)).passed
    says(authority.certificate.read_bytes())
    assert (await result(asked(Kind.HTTPS), tls, trusted)).passed
    for broken in (b"nonsense", b"", b"\0"):
        says(broken)
        assert (await result(asked(Kind.HTTPS), tls, trusted)).passed
        problem = f"{file}: no certificates in it: what it said before stays in force"
        assert caplog.messages[-1] == trusted.problem == problem
    file.unlink()
    for _ in range(2):
        assert (await result(asked(Kind.HTTPS), tls, trusted)).passed
    # Once for each, and not with every probe.
    assert len(caplog.messages) == 4


async def test_where_nobody_is_trusted_a_backend_is_not_to_blame(
    authority: certificates.Authority,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As in an image without the system's bundle: nothing can be said of any certificate."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    tls = context(authority, Kind.HTTPS)
    trusted = trust.Trust()
    for _ in range(2):
        found = await result(asked(Kind.HTTPS), tls, trusted)
        assert found == probing.Result(passed=False, reason=trust.NOBODY, blameless=True)
    assert caplog.messages == [f"probes with tls=verify count for nothing: {trust.NOBODY}"]
    assert await result(asked(Kind.HTTPS, UNVERIFIED), tls, trust.Trust()) == PASSED


async def test_without_a_file_the_systems_authorities_count(
    authority: certificates.Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    assert await result(asked(Kind.HTTPS), context(authority, Kind.HTTPS), trust.Trust()) == PASSED


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (None, "No such file or directory"),
        (b"", "no certificates in it"),
        (b"nonsense", "no certificates in it"),
    ],
)
async def test_an_agent_with_a_bad_file_starts_and_its_probes_count_for_nothing(
    what: bytes | None,
    reason: str,
    authority: certificates.Authority,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a bundle that is emptied would keep every agent from its next start."""
    # Whom the system trusts is not asked: a file is named.
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    file = tmp_path / "ca.crt"
    if what is not None:
        file.write_bytes(what)
    trusted, tls = agent._trust(file), context(authority, Kind.HTTPS)
    assert trusted.problem == f"{file}: {reason}: probes with tls=verify count for nothing"
    found = await result(asked(Kind.HTTPS), tls, trusted)
    assert found == probing.Result(passed=False, reason=trust.NOBODY, blameless=True)
    assert (await result(asked(Kind.HTTPS, UNVERIFIED), tls, trusted)).passed
    draft = tmp_path / "draft.crt"
    draft.write_bytes(authority.certificate.read_bytes())
    draft.replace(file)
    # Also where nobody asks, so that /healthz does not say so for ever.
    assert trusted.problem == ""
    assert (await result(asked(Kind.HTTPS), tls, trusted)).passed


@pytest.mark.parametrize(
    ("path", "reason"), [("folder", "Is a directory"), ("file/ca.crt", "Not a directory")]
)
def test_a_path_that_can_be_no_files_ends_the_start(path: str, reason: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(errors.ConfigError, match=f"^--probe-ca-file: {tmp_path / path}: {reason}$"):
        agent._trust(tmp_path / path)
