"""Speak to the API server through kubernetes_asyncio's transport.

Bodies stay raw bytes. Whatever goes wrong becomes a `ClientError` of one line
that says who was asked and what to look at.
"""

import asyncio
import contextlib
import os
import ssl
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping

import aiohttp
import msgspec

from lbproxy import errors, secrecy
from lbproxy.kube import credentials, slim

CONNECT_TIMEOUT_S = 10.0
REPLY_TIMEOUT_S = 30.0
FAILED = "<error>"  # as client-go has it where there was no answer


class ClientError(errors.LbproxyError):
    """A request failed; `status` is the HTTP status, 0 where there was no answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(credentials.one_line(message))
        self.status = status


class Stalled(ClientError):  # noqa: N818
    """A stream has been silent for longer than it may be."""


class Status(msgspec.Struct):
    """What the API server says about a failure."""

    message: str = ""
    reason: str = ""
    code: int = 0


# Told of each request: method, status or FAILED, server, and the seconds until the answer began.
Observed = Callable[[str, str, str, float], None]


class Client:
    """Requests to one API server through one connection pool; made by `connect`."""

    def __init__(
        self,
        origin: credentials.Origin,
        loaded: credentials.Loaded,
        user_agent: str,
        observed: Observed = lambda _method, _code, _host, _took_s: None,
    ) -> None:
        self._origin = origin
        self._observed = observed
        self._user_agent = user_agent
        self._renewing = asyncio.Lock()
        self._renewals = 0
        self._adopt(loaded)

    @property
    def host(self) -> str:
        """The API server's URL, without the user that may be in it."""
        return secrecy.without(str(self._api.configuration.host))

    async def close(self) -> None:
        """Close every connection."""
        await self._api.close()

    async def get(self, path: str, query: Mapping[str, str]) -> bytes:
        """Return the whole body of a GET, or raise `ClientError`."""
        async with self._request("GET", path, query, None, REPLY_TIMEOUT_S) as response:
            return await response.read()

    @contextlib.asynccontextmanager
    async def stream(
        self, path: str, query: Mapping[str, str], idle_timeout_s: float
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Yield the body of a GET as it arrives, in pieces of any size.

        `Stalled` is raised where nothing arrives for `idle_timeout_s`, and
        `ClientError` where the connection breaks, inside the caller's loop.
        """
        async with self._request("GET", path, query, None, idle_timeout_s) as response:
            yield response.content.iter_any()

    async def post(self, path: str, body: Mapping[str, object]) -> None:
        """Create an object, or raise `ClientError`."""
        async with self._request("POST", path, {}, body, REPLY_TIMEOUT_S) as response:
            await response.read()

    @contextlib.asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Mapping[str, object] | None,
        read_timeout_s: float,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        answered = False
        try:
            response = await self._send(method, path, query, body, read_timeout_s)
            try:
                if not response.ok:
                    raise self._refusal(method, path, response, await response.read())
                answered = True
                yield response
            finally:
                # Not release(): the rest of an unfinished stream would be waited for.
                response.close()
        except TimeoutError as error:
            if answered:
                raise Stalled(f"{self.host}: {path}: silent for {read_timeout_s:g} s") from error
            raise ClientError(f"{self.host}: no answer within {read_timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ClientError(f"{self.host}: {self._cause(error)}") from error

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Mapping[str, object] | None,
        read_timeout_s: float,
    ) -> aiohttp.ClientResponse:
        """Send one request; once more with credentials read afresh where they were refused."""
        renewals = self._renewals
        response = await self._call(method, path, query, body, read_timeout_s)
        if response.status != 401:
            return response
        refusal = self._refusal(method, path, response, await response.read())
        if not await self._renew(renewals):
            raise refusal
        return await self._call(method, path, query, body, read_timeout_s)

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Mapping[str, object] | None,
        read_timeout_s: float,
    ) -> aiohttp.ClientResponse:
        started_s, code = time.monotonic(), FAILED
        try:
            response = await self._ask(path, method, query, body, read_timeout_s)
            code = str(response.status)
        finally:
            host = urllib.parse.urlsplit(self.host).netloc
            self._observed(method, code, host, time.monotonic() - started_s)
        return response

    async def _ask(
        self,
        path: str,
        method: str,
        query: Mapping[str, str],
        body: Mapping[str, object] | None,
        read_timeout_s: float,
    ) -> aiohttp.ClientResponse:
        response: aiohttp.ClientResponse = await self._api.call_api(
            path,
            method,
            query_params=list(query.items()),
            header_params={"Accept": "application/json"},
            body=body,
            auth_settings=["BearerToken"],
            _preload_content=False,
            _request_timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=read_timeout_s
            ),
        )
        return response

    def _adopt(self, loaded: credentials.Loaded) -> None:
        try:
            self._api = slim.load().client.ApiClient(loaded.configuration)
        except (OSError, ssl.SSLError) as error:
            raise errors.ConfigError(f"{loaded.configuration.host}: TLS files: {error}") from error
        self._api.user_agent = self._user_agent
        self._credential = loaded.credential

    async def _renew(self, seen: int) -> bool:
        """Read the credentials again, once for all requests that were refused with the same ones.

        Tokens in files, exec plugins and client certificates are replaced while
        we run; the library reads most of them only once.
        """
        async with self._renewing:
            if self._renewals != seen:
                return True
            try:
                loaded = await credentials.load(self._origin)
                old = self._api
                if loaded.configuration.cert_file or old.configuration.cert_file:
                    self._adopt(loaded)
                    await old.close()
                else:
                    # Same transport: streams that are open need not end for a new token.
                    old.configuration.api_key.clear()
                    old.configuration.api_key.update(loaded.configuration.api_key)
                    old.configuration.refresh_api_key_hook = loaded.configuration.refresh_api_key_hook
            except errors.ConfigError:
                return False
            self._renewals += 1
            return True

    def _refusal(self, method: str, path: str, response: aiohttp.ClientResponse, body: bytes) -> ClientError:
        if response.status == 401:
            return ClientError(f"{self.host}: 401 Unauthorized: {self._credential} is not accepted", 401)
        try:
            said = msgspec.json.decode(body, type=Status).message
        except (msgspec.MsgspecError, UnicodeDecodeError):
            said = body[:200].decode(errors="replace")
        answer = f"{response.status} {response.reason}"
        return ClientError(f"{self.host}: {method} {path}: {answer}: {said}".rstrip(": "), response.status)

    def _cause(self, error: Exception) -> str:
        match error:
            case aiohttp.ClientConnectorCertificateError():
                cause = getattr(error.certificate_error, "verify_message", "") or str(error.certificate_error)
                ca = self._api.configuration.ssl_ca_cert or "the system's CA certificates"
                return f"TLS: {cause} (checked against {ca})"
            case aiohttp.ClientSSLError() | ssl.SSLError():
                return f"TLS: {getattr(error, 'os_error', error)}"
            case aiohttp.ClientConnectorDNSError():
                return f"no such host: {error.host}"
            case aiohttp.ClientConnectorError():
                return (os.strerror(error.errno) if error.errno else str(error)).lower()
            case aiohttp.ClientPayloadError():
                return "the connection broke in the middle of a reply"
            case _:
                return str(error) or type(error).__name__


async def connect(
    kubeconfig: str = "",
    master: str = "",
    *,
    user_agent: str = "lbproxy",
    token_file: str = credentials.IN_CLUSTER_TOKEN,
    ca_file: str = credentials.IN_CLUSTER_CA,
    observed: Observed = lambda _method, _code, _host, _took_s: None,
) -> Client:
    """Return a client configured from a kubeconfig, a URL or the pod's service account.

    `master` overrides the URL of a kubeconfig; alone it means no credentials.
    Nothing is asked of the server yet. Raises `errors.ConfigError`.
    """
    origin = credentials.Origin(kubeconfig, master, token_file, ca_file)
    return Client(origin, await credentials.load(origin), user_agent, observed)
