import base64
import datetime
import json
import pathlib
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
import yaml

from lbproxy import errors
from lbproxy.kube import client, credentials, slim
from lbproxy.lab import apiserver
from tests.kube import objects
from tests.kube.certificates import Authority

SERVICES = "/api/v1/services"


@pytest.fixture
def authority(tmp_path: pathlib.Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
async def tls_server(authority: Authority) -> AsyncIterator[apiserver.ApiServer]:
    """A server that wants a token or a client certificate."""
    context = authority.server_context(authority.pair("server"), client_certificates=True)
    async with apiserver.ApiServer(tls=context, tokens=["good"]) as server:
        server.store.put(objects.service("web"))
        yield server


def kubeconfig(
    folder: pathlib.Path, server: str, user: dict[str, Any], cluster: dict[str, Any] | None = None
) -> str:
    path = folder / "kubeconfig"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "lab", "user": "agent"}}],
        "clusters": [{"name": "lab", "cluster": {"server": server, **(cluster or {})}}],
        "users": [{"name": "agent", "user": user}],
    }
    path.write_text(yaml.safe_dump(config))
    return str(path)


def exec_plugin(folder: pathlib.Path, body: str) -> dict[str, Any]:
    """A user whose credential is printed by a script: `body` makes `status`, `runs` counts from 1."""
    script = folder / "plugin.py"
    count = folder / "runs"
    script.write_text(
        "import datetime, json, pathlib, sys\n"
        f"count = pathlib.Path({str(count)!r})\n"
        "runs = int(count.read_text() or 0) + 1 if count.exists() else 1\n"
        "count.write_text(str(runs))\n"
        f"{body}\n"
        "print(json.dumps({'apiVersion': 'client.authentication.k8s.io/v1', 'kind': 'ExecCredential',"
        " 'status': status}))\n"
    )
    return {
        "exec": {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": sys.executable,
            "args": [str(script)],
            "interactiveMode": "Never",
        }
    }


async def listed(api: client.Client) -> list[str]:
    """The names of the Services that the server shows us."""
    try:
        body = json.loads(await api.get(SERVICES, {}))
        return [item["metadata"]["name"] for item in body["items"]]
    finally:
        await api.close()


async def refused(api: client.Client) -> str:
    """What is said about a request that must fail: one line."""
    try:
        with pytest.raises(client.ClientError) as caught:
            await api.get(SERVICES, {})
    finally:
        await api.close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def test_a_token(tls_server: apiserver.ApiServer, authority: Authority, tmp_path: pathlib.Path) -> None:
    trust = {"certificate-authority": str(authority.certificate)}
    path = kubeconfig(tmp_path, tls_server.url, {"token": "good"}, trust)
    assert await listed(await client.connect(path)) == ["web"]
    assert tls_server.requests[-1].authorization == "Bearer good"


async def test_data_within_the_kubeconfig(
    tls_server: apiserver.ApiServer, authority: Authority, tmp_path: pathlib.Path
) -> None:
    pair = authority.pair("agent")

    def data(path: pathlib.Path) -> str:
        return base64.b64encode(path.read_bytes()).decode()

    user = {"client-certificate-data": data(pair.certificate), "client-key-data": data(pair.key)}
    trust = {"certificate-authority-data": data(authority.certificate)}
    assert await listed(await client.connect(kubeconfig(tmp_path, tls_server.url, user, trust))) == ["web"]
    assert tls_server.requests[-1].authorization == ""


async def test_a_client_certificate(
    tls_server: apiserver.ApiServer, authority: Authority, tmp_path: pathlib.Path
) -> None:
    pair = authority.pair("agent")
    user = {"client-certificate": str(pair.certificate), "client-key": str(pair.key)}
    trust = {"certificate-authority": str(authority.certificate)}
    assert await listed(await client.connect(kubeconfig(tmp_path, tls_server.url, user, trust))) == ["web"]


async def test_a_client_certificate_is_read_again_once_it_is_refused(
    tls_server: apiserver.ApiServer, authority: Authority, tmp_path: pathlib.Path
) -> None:
    pair, rotated = authority.pair("agent"), authority.pair("rotated")
    user = {"client-certificate": str(pair.certificate), "client-key": str(pair.key)}
    trust = {"certificate-authority": str(authority.certificate)}
    api = await client.connect(kubeconfig(tmp_path, tls_server.url, user, trust))
    await api.get(SERVICES, {})
    rotated.certificate.rename(pair.certificate)
    rotated.key.rename(pair.key)
    tls_server.faults.fail, tls_server.faults.fail_status = 1, 401
    assert await listed(api) == ["web"]
    assert [request.certificate for request in tls_server.requests] == ["agent", "agent", "rotated"]


async def test_a_token_file_is_read_again_once_the_token_is_refused(
    tls_server: apiserver.ApiServer, authority: Authority, tmp_path: pathlib.Path
) -> None:
    token = tmp_path / "token"
    token.write_text("good")
    trust = {"certificate-authority": str(authority.certificate)}
    api = await client.connect(kubeconfig(tmp_path, tls_server.url, {"tokenFile": str(token)}, trust))
    await api.get(SERVICES, {})
    tls_server.tokens = {"rotated"}
    token.write_text("rotated")
    assert await listed(api) == ["web"]


async def test_an_exec_plugin_is_asked_again_when_its_token_is_about_to_expire(
    server: apiserver.ApiServer, tmp_path: pathlib.Path
) -> None:
    server.tokens = {"token-1", "token-2", "token-3"}
    body = (
        "minutes = 1 if runs == 1 else 60\n"
        "expiry = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=minutes)\n"
        "status = {'token': f'token-{runs}', 'expirationTimestamp': expiry.isoformat()}\n"
    )
    api = await client.connect(kubeconfig(tmp_path, server.url, exec_plugin(tmp_path, body)))
    await api.get(SERVICES, {})
    await api.get(SERVICES, {})
    await api.close()
    assert [request.authorization for request in server.requests] == ["Bearer token-2"] * 2
    assert (tmp_path / "runs").read_text() == "2"


async def test_an_exec_plugin_without_expiry_is_asked_again_once_its_token_is_refused(
    server: apiserver.ApiServer, tmp_path: pathlib.Path
) -> None:
    server.tokens = {"token-1"}
    user = exec_plugin(tmp_path, "status = {'token': f'token-{runs}'}")
    api = await client.connect(kubeconfig(tmp_path, server.url, user))
    await api.get(SERVICES, {})
    server.tokens = {"token-2"}
    await api.get(SERVICES, {})
    await listed(api)
    assert (tmp_path / "runs").read_text() == "2"


async def test_an_exec_plugin_may_give_a_certificate(
    tls_server: apiserver.ApiServer, authority: Authority, tmp_path: pathlib.Path
) -> None:
    pair = authority.pair("agent")
    body = (
        f"read = lambda path: pathlib.Path(path).read_text()\n"
        f"status = {{'clientCertificateData': read({str(pair.certificate)!r}),"
        f" 'clientKeyData': read({str(pair.key)!r})}}"
    )
    trust = {"certificate-authority": str(authority.certificate)}
    path = kubeconfig(tmp_path, tls_server.url, exec_plugin(tmp_path, body), trust)
    assert await listed(await client.connect(path)) == ["web"]


async def test_in_a_pod(
    tls_server: apiserver.ApiServer,
    authority: Authority,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token = tmp_path / "token"
    token.write_text("good\n")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", tls_server.url.rpartition(":")[2])
    api = await client.connect(token_file=str(token), ca_file=str(authority.certificate))
    await api.get(SERVICES, {})
    tls_server.tokens = {"rotated"}
    token.write_text("rotated\n")
    assert await listed(api) == ["web"]


async def test_a_token_file_that_is_found_empty_is_read_again_with_the_next_request(
    tls_server: apiserver.ApiServer,
    authority: Authority,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token = tmp_path / "token"
    token.write_text("good")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", tls_server.url.rpartition(":")[2])
    # The library looks at the file once a minute.
    slim.load()
    period = "kubernetes_asyncio.config.incluster_config.TOKEN_REFRESH_PERIOD"
    monkeypatch.setattr(period, datetime.timedelta())
    api = await client.connect(token_file=str(token), ca_file=str(authority.certificate))
    token.write_text("")
    with pytest.raises(client.ClientError, match=str(token)):
        await api.get(SERVICES, {})
    token.write_text("good")
    assert await listed(api) == ["web"]


async def test_master_overrides_the_server_and_keeps_the_credentials(
    server: apiserver.ApiServer, tmp_path: pathlib.Path
) -> None:
    server.tokens = {"good"}
    path = kubeconfig(tmp_path, "http://192.0.2.1:1", {"token": "good"})
    assert await listed(await client.connect(path, master=f"{server.url}/")) == []


async def test_the_user_of_a_url_is_a_credential_where_there_is_no_other(
    server: apiserver.ApiServer, tmp_path: pathlib.Path
) -> None:
    server.store.put(objects.service("web"))
    url = server.url.replace("://", "://some:p%40ss@")
    for api in (
        await client.connect(master=url),
        await client.connect(kubeconfig(tmp_path, url, {"token": "good"})),
    ):
        assert api.host == server.url
        assert await listed(api) == ["web"]
    basic = base64.b64encode(b"some:p@ss").decode()
    assert [one.authorization for one in server.requests] == [f"Basic {basic}", "Bearer good"]


async def test_posting(server: apiserver.ApiServer) -> None:
    api = await client.connect(master=server.url)
    await api.post("/api/v1/namespaces/default/services", objects.service("new"))
    assert await listed(api) == ["new"]


async def test_401_says_which_credential(server: apiserver.ApiServer, tmp_path: pathlib.Path) -> None:
    server.tokens = {"good"}
    path = kubeconfig(tmp_path, server.url, {"token": "bad"})
    assert await refused(await client.connect(path)) == (
        f"{server.url}: 401 Unauthorized: the token of user 'agent' in {path} is not accepted"
    )
    assert "a request without credentials" in await refused(await client.connect(master=server.url))


async def test_500_says_what_the_server_says(server: apiserver.ApiServer) -> None:
    server.faults.fail = 1
    assert await refused(await client.connect(master=server.url)) == (
        f"{server.url}: GET {SERVICES}: 500 Internal Server Error: injected failure"
    )


async def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert await refused(await client.connect(master=url)) == f"{url}: connection refused"


async def test_every_request_is_observed(server: apiserver.ApiServer) -> None:
    seen: list[tuple[str, str, str]] = []

    def observed(method: str, code: str, host: str, took_s: float) -> None:
        assert took_s >= 0
        seen.append((method, code, host))

    api = await client.connect(master=server.url, observed=observed)
    await api.get(SERVICES, {})
    server.faults.fail = 1
    with pytest.raises(client.ClientError):
        await api.get(SERVICES, {})
    await api.close()
    nobody = await client.connect(master="http://127.0.0.1:1", observed=observed)
    with pytest.raises(client.ClientError):
        await nobody.get(SERVICES, {})
    await nobody.close()
    host = server.url.removeprefix("http://")
    assert seen == [
        ("GET", "200", host),
        ("GET", "500", host),
        ("GET", "<error>", "127.0.0.1:1"),
    ]


async def test_no_such_host() -> None:
    assert "no such host: nowhere.invalid" in await refused(
        await client.connect(master="http://nowhere.invalid:1")
    )


async def test_a_certificate_of_another_authority(
    tls_server: apiserver.ApiServer, tmp_path: pathlib.Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    trust = {"certificate-authority": str(stranger.certificate)}
    said = await refused(await client.connect(kubeconfig(tmp_path, tls_server.url, {"token": "good"}, trust)))
    assert said.startswith(f"{tls_server.url}: TLS: ")
    assert str(stranger.certificate) in said


async def test_a_certificate_for_another_host(authority: Authority, tmp_path: pathlib.Path) -> None:
    context = authority.server_context(authority.pair("elsewhere", "192.0.2.1"))
    async with apiserver.ApiServer(tls=context) as server:
        trust = {"certificate-authority": str(authority.certificate)}
        said = await refused(await client.connect(kubeconfig(tmp_path, server.url, {}, trust)))
    assert "TLS" in said
    assert "127.0.0.1" in said


async def test_tls_to_a_server_without(server: apiserver.ApiServer) -> None:
    url = server.url.replace("http:", "https:")
    assert f"{url}: TLS: " in await refused(await client.connect(master=url))


async def test_a_reply_that_breaks_off(server: apiserver.ApiServer) -> None:
    api = await client.connect(master=server.url)

    async def read() -> None:
        async with api.stream(SERVICES, {"watch": "true", "resourceVersion": "1"}, 60) as pieces:
            server.drop_after("services", b'{"half')
            async for _ in pieces:
                pass

    with pytest.raises(client.ClientError, match="broke in the middle"):
        await read()
    await api.close()


@pytest.mark.parametrize(
    ("content", "master", "said"),
    [
        (None, "", "--kubeconfig: {path}: No such file or directory"),
        ("clusters: [", "", "--kubeconfig: {path}: malformed YAML"),
        ("just text", "http://x", "--kubeconfig: {path}: not a usable kubeconfig"),
        ("{clusters: []}", "x:6443", "'x:6443' is not an http:// or https:// URL"),
        ("{clusters: []}", "https://[::1:6443", "'https://[::1:6443': "),
        ("{clusters: []}", "https://x:no", "'https://x:no': "),
    ],
)
def test_what_shows_before_anything_is_set_up(
    tmp_path: pathlib.Path, content: str | None, master: str, said: str
) -> None:
    path = tmp_path / "kubeconfig"
    if content is not None:
        path.write_text(content)
    with pytest.raises(errors.ConfigError) as caught:
        credentials.check(str(path), master)
    assert str(caught.value).startswith(said.format(path=path))
    path.write_text("{clusters: []}")
    credentials.check(str(path), "http://x")
    credentials.check("", "http://x")
    with pytest.raises(errors.ConfigError, match="no API server: not in a pod"):
        credentials.check("", "")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("clusters: [", "malformed YAML"),
        ("", "not a usable kubeconfig"),
        ("just text", "not a usable kubeconfig"),
        ("{apiVersion: v1, kind: Config, clusters: [], contexts: [], users: []}", "current-context"),
        ("{current-context: x, clusters: [], contexts: [], users: []}", "name x"),
    ],
)
async def test_a_kubeconfig_that_is_none(tmp_path: pathlib.Path, content: str, said: str) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(content)
    with pytest.raises(errors.ConfigError) as caught:
        await client.connect(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("user", "cluster", "said"),
    [
        ({"client-certificate": "/none.crt", "client-key": "/none.key"}, {}, "/none.crt"),
        ({"token": "t"}, {"certificate-authority-data": "abc"}, "base64"),
        ({"token": "t"}, {"certificate-authority": "/none/ca.crt"}, "/none/ca.crt"),
        ({"token": "t"}, {"certificate-authority": __file__}, "TLS files"),
        ({"exec": {"command": "/none/plugin", "apiVersion": "v1"}}, {}, "/none/plugin"),
        ({"exec": {"command": "false", "apiVersion": "v1"}}, {}, "exec: process returned 1"),
        ({"exec": {"command": "echo", "apiVersion": "v1"}}, {}, "exec: failed to decode"),
    ],
)
async def test_credentials_that_can_not_be_used(
    tmp_path: pathlib.Path, user: dict[str, Any], cluster: dict[str, Any], said: str
) -> None:
    path = kubeconfig(tmp_path, "https://127.0.0.1:1", user, cluster)
    with pytest.raises(errors.ConfigError, match=said) as caught:
        await client.connect(path)
    assert "\n" not in str(caught.value)


async def test_nothing_to_connect_to(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(errors.ConfigError, match="not in a pod, and no --kubeconfig"):
        await client.connect()
    with pytest.raises(errors.ConfigError, match="No such file"):
        await client.connect(str(tmp_path / "none"))
    with pytest.raises(errors.ConfigError, match="not an http:// or https:// URL"):
        await client.connect(master="192.0.2.1:6443")
