"""An API server stand-in over real HTTP, with the faults that a real one can have.

It serves what lbproxy reads (for `lbproxy migrate cluster` also Pods and DaemonSets, which no controller
looks after): lists in chunks, watches with bookmarks, selectors,
410 for compacted history, bearer tokens, TLS and client certificates. Asked whether somebody may do a
thing, it says yes, but for what is in `denied`, which it does all the same. A kube-proxy can
follow it too: watches that begin with the list are understood, protobuf is not. Objects
change through `store` or, from another process, through PUT, PATCH and DELETE.
"""

import argparse
import asyncio
import base64
import binascii
import collections
import collections.abc
import contextlib
import dataclasses
import pathlib
import re
import signal
import ssl
import typing
from collections.abc import Iterable

import msgspec
from aiohttp import web

from lbproxy.lab import apistore

_PATH = re.compile(
    r"(?P<root>/api/v1|/apis/[^/]+/[^/]+)(/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[a-z]+)(/(?P<name>[^/]+))?"
)
_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
_SNAPSHOTS = 16
_PROTOBUF = "application/vnd.kubernetes.protobuf"
_PATCHES = ("application/merge-patch+json", "application/strategic-merge-patch+json")
_REASONS = {
    401: "Unauthorized",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    415: "UnsupportedMediaType",
}
_LIST_ENDS = {"k8s.io/initial-events-end": "true"}


@dataclasses.dataclass
class Faults:
    """What is to go wrong; counts run down as they are used up."""

    fail: int = 0  # requests to answer with `fail_status`
    fail_method: str = ""  # of those that are answered so; empty: whichever
    fail_status: int = 500
    fail_message: str = "injected failure"
    delay_s: float = 0.0  # before every reply
    gone_watches: int = 0  # watches to answer with 410
    gone_as_status: bool = False  # as the reply's status, not as an ERROR event within it
    gone_continues: int = 0  # continue tokens to answer with 410
    stall: bool = False  # watches stay open and say nothing


class Request(typing.NamedTuple):
    """A request as it came in, for tests to look at."""

    method: str
    path: str
    query: dict[str, str]
    authorization: str
    certificate: str  # the common name of the client's certificate


class Page(typing.NamedTuple):
    """The rest of a list that is read in chunks, as it was at `version`."""

    version: int
    items: list[bytes]


class Target(typing.NamedTuple):
    """What a request's path names; `name` is empty for the whole collection."""

    resource: apistore.Resource
    namespace: str
    name: str

    @property
    def key(self) -> apistore.Key:
        """The object's place in the store."""
        return (self.namespace if self.resource.namespaced else "", self.name)


class Watcher:
    """One open watch: lines wait here until its handler has written them."""

    def __init__(self, plural: str, chosen: apistore.Selector) -> None:
        self.plural = plural
        self.chosen = chosen
        self.lines: list[bytes] = []
        self.wake = asyncio.Event()
        self.ended = False
        self.broken = False

    def tell(self, change: apistore.Change) -> None:
        """Queue the line for a change, if this watcher selects the object."""
        self.send(apistore.event_line(change, self.chosen))

    def send(self, line: bytes) -> None:
        """Queue bytes, whatever they are."""
        if line:
            self.lines.append(line)
            self.wake.set()

    def end(self, *, broken: bool = False) -> None:
        """End the stream after what is queued: cleanly, or by dropping the connection."""
        self.ended = True
        self.broken = broken
        self.wake.set()


class ApiServer:
    """The stand-in; an async context manager that listens while it is entered."""

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        tokens: Iterable[str] | None = None,
        bookmark_interval_s: float = 60.0,
    ) -> None:
        self.store = apistore.Store()
        self.faults = Faults()
        self.requests: collections.deque[Request] = collections.deque(maxlen=1000)
        self.tokens = None if tokens is None else set(tokens)
        self.denied: set[tuple[str, str, str]] = set()  # API group, resource, verb
        self.watchers: set[Watcher] = set()
        self.url = ""
        self._host, self._port, self._tls = host, port, tls
        self._bookmark_interval_s = bookmark_interval_s
        self._pages: collections.OrderedDict[str, Page] = collections.OrderedDict()
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)

    async def __aenter__(self) -> typing.Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; `url` says where."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port, ssl_context=self._tls)
        await site.start()
        port = self._runner.addresses[0][1]
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"{'https' if self._tls else 'http'}://{host}:{port}"

    async def stop(self) -> None:
        """End every watch and stop listening."""
        self.cut()
        await self._runner.cleanup()

    def watching(self, plural: str) -> list[Watcher]:
        """Return the open watches of a resource."""
        return [watcher for watcher in self.watchers if watcher.plural == plural]

    def cut(self, plural: str = "") -> None:
        """End the open watches of a resource, or all, as a server does when their time is up."""
        for watcher in tuple(self.watchers):
            if plural in ("", watcher.plural):
                watcher.end()

    def deafen(self, plural: str) -> None:
        """Keep changes from the open watches of a resource, as if the network had swallowed them."""
        self.store.watchers[plural].clear()

    def send(self, plural: str, line: bytes) -> None:
        """Send bytes of any kind to the open watches of a resource."""
        for watcher in self.watching(plural):
            watcher.send(line)

    def drop_after(self, plural: str, line: bytes) -> None:
        """Send bytes to the open watches of a resource and drop their connections."""
        for watcher in self.watching(plural):
            watcher.send(line)
            watcher.end(broken=True)

    def bookmark(self, plural: str = "") -> None:
        """Send a bookmark with the current version to the open watches of a resource, or to all."""
        for watcher in self.watchers:
            if plural in ("", watcher.plural):
                watcher.send(_bookmark(apistore.RESOURCES[watcher.plural], self.store.version))

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(
            Request(
                request.method,
                request.path,
                dict(request.query),
                request.headers.get("Authorization", ""),
                _common_name(request),
            )
        )
        if self.faults.delay_s:
            await asyncio.sleep(self.faults.delay_s)
        if self.faults.fail and self.faults.fail_method in ("", request.method):
            self.faults.fail -= 1
            return _failure(self.faults.fail_status, self.faults.fail_message)
        if not self._knows(request):
            return _failure(401, "Unauthorized")
        if (request.method, request.path) == ("POST", _REVIEWS):
            return self._review(msgspec.json.decode(await request.read()))
        target = _target(request.path)
        if target is None:
            return _failure(404, f"the server could not find {request.path}")
        try:
            return await self._serve(request, target)
        except KeyError:
            return _failure(404, f'{target.resource.plural} "{target.name}" not found')
        except apistore.Gone:
            return _failure(410, "too old resource version")
        except apistore.Conflict:
            return _failure(409, "the object has been modified meanwhile")
        except (ValueError, TypeError) as error:
            return _failure(400, str(error))

    def _knows(self, request: web.Request) -> bool:
        if self.tokens is None or _common_name(request):
            return True
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        return scheme == "Bearer" and token in self.tokens

    def _review(self, review: apistore.Object) -> web.Response:
        asked = review["spec"]["resourceAttributes"]
        right = (asked.get("group", ""), asked.get("resource", ""), asked.get("verb", ""))
        status = {"allowed": right not in self.denied}
        return _json(msgspec.json.encode({**review, "status": status}), 201)

    async def _serve(self, request: web.Request, target: Target) -> web.StreamResponse:
        plural = target.resource.plural
        if request.content_type == _PROTOBUF:
            # What real ones answer where they know a kind's JSON only. Clients can ask for any
            # encoding, though, and take what they get: kube-proxy reads JSON, but writes its events so.
            return _failure(415, f"the body of the request was in {_PROTOBUF}, accepted is application/json")
        match request.method, bool(target.name):
            case "GET", False if request.query.get("watch") in ("1", "true"):
                return await self._watch(request, target)
            case "GET", False:
                return self._list(request, target)
            case "GET", True:
                return _json(self.store.objects[plural][target.key].raw)
            case "POST", False:
                return _json(msgspec.json.encode(self._put(await request.read(), target)), 201)
            case "PUT", True:
                return _json(msgspec.json.encode(self._put(await request.read(), target)))
            case "PATCH", True if request.content_type not in _PATCHES:
                return _failure(415, f"a patch in {request.content_type}, accepted is {', '.join(_PATCHES)}")
            case "PATCH", True:
                # Lists are replaced by both, as those are that the API calls atomic. Those that a strategic
                # merge patch would merge (containers, …) are nobody's business here.
                merge = msgspec.json.decode(await request.read())
                return _json(msgspec.json.encode(self.store.patch(plural, target.key, merge)))
            case "DELETE", True:
                deleted = self.store.objects[plural][target.key].raw
                self.store.delete(plural, target.key)
                return _json(deleted)
            case _:
                return _failure(405, "method not allowed")

    def _put(self, body: bytes, target: Target) -> apistore.Object:
        obj: apistore.Object = msgspec.json.decode(body)
        obj.setdefault("kind", target.resource.kind)
        metadata = obj.setdefault("metadata", {})
        if target.name:
            metadata["name"] = target.name
        if target.namespace:
            metadata["namespace"] = target.namespace
        return self.store.put(obj)

    def _list(self, request: web.Request, target: Target) -> web.Response:
        token = request.query.get("continue", "")
        limit = int(request.query.get("limit", "0"))
        if token:
            if self.faults.gone_continues:
                self.faults.gone_continues -= 1
                raise apistore.Gone
            page, start = self._resume(token)
        else:
            page, start = self._snapshot(request, target), 0
        stop = start + limit if limit else len(page.items)
        metadata: dict[str, typing.Any] = {"resourceVersion": str(page.version)}
        if stop < len(page.items):
            metadata |= {"continue": self._token(page, stop), "remainingItemCount": len(page.items) - stop}
        head = {"kind": f"{target.resource.kind}List", "apiVersion": target.resource.api_version}
        encoded = msgspec.json.encode({**head, "metadata": metadata})
        return _json(encoded[:-1] + b',"items":[' + b",".join(page.items[start:stop]) + b"]}")

    def _snapshot(self, request: web.Request, target: Target) -> Page:
        chosen = _selector(request, target)
        objects = self.store.objects[target.resource.plural]
        items = [
            apistore.list_item(target.resource, stored)
            for _, stored in sorted(objects.items())
            if chosen.admits(stored)
        ]
        return Page(self.store.version, items)

    def _token(self, page: Page, start: int) -> str:
        name = f"{page.version}.{id(page)}"
        self._pages[name] = page
        while len(self._pages) > _SNAPSHOTS:
            self._pages.popitem(last=False)
        return base64.urlsafe_b64encode(f"{name}:{start}".encode()).decode()

    def _resume(self, token: str) -> tuple[Page, int]:
        try:
            name, _, start = base64.urlsafe_b64decode(token).decode().rpartition(":")
        except binascii.Error as error:
            raise ValueError("continue token is not valid") from error
        if name not in self._pages:
            raise apistore.Gone
        return self._pages[name], int(start)

    async def _watch(self, request: web.Request, target: Target) -> web.StreamResponse:
        plural = target.resource.plural
        watcher = Watcher(plural, _selector(request, target))
        version = int(request.query.get("resourceVersion") or "0")
        with_list = request.query.get("sendInitialEvents") == "true"
        if with_list and request.query.get("resourceVersionMatch") != "NotOlderThan":
            raise ValueError("sendInitialEvents needs resourceVersionMatch=NotOlderThan")
        gone = self.faults.gone_watches > 0
        self.faults.gone_watches -= gone
        try:
            if gone:
                raise apistore.Gone
            since = version and not with_list
            changes = self.store.since(plural, version) if since else self._initial(plural)
        except apistore.Gone:
            if self.faults.gone_as_status:
                raise
            watcher.send(b'{"type":"ERROR","object":' + _status(410, "too old resource version") + b"}\n")
            watcher.end()
            changes = []
        for change in changes:
            watcher.tell(change)
        if with_list and not watcher.ended:
            watcher.send(_bookmark(target.resource, self.store.version, _LIST_ENDS))
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        # Before anything is awaited, or a change could fall between history and watching.
        self.watchers.add(watcher)
        self.store.watchers[plural].add(watcher.tell)
        try:
            await response.prepare(request)
            timeout_s = float(request.query.get("timeoutSeconds") or "1800")
            bookmarks = request.query.get("allowWatchBookmarks") == "true"
            await self._write(response, watcher, timeout_s, bookmarks=bookmarks)
            if watcher.broken and request.transport:
                request.transport.abort()
        except ConnectionError:
            pass
        finally:
            self.store.watchers[plural].discard(watcher.tell)
            self.watchers.discard(watcher)
        return response

    def _initial(self, plural: str) -> list[apistore.Change]:
        objects = sorted(self.store.objects[plural].items())
        return [apistore.Change(self.store.version, key, None, stored) for key, stored in objects]

    async def _write(
        self, response: web.StreamResponse, watcher: Watcher, timeout_s: float, *, bookmarks: bool
    ) -> None:
        resource = apistore.RESOURCES[watcher.plural]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            # Sending into the void of a stalled watch would only show when it is over.
            if watcher.lines and not self.faults.stall:
                lines, watcher.lines = watcher.lines, []
                await response.write(b"".join(lines))
            if watcher.ended:
                return
            left_s = deadline - loop.time()
            if left_s <= 0:
                if bookmarks and not self.faults.stall:
                    await response.write(_bookmark(resource, self.store.version))
                return
            watcher.wake.clear()
            try:
                async with asyncio.timeout(min(left_s, self._bookmark_interval_s)):
                    await watcher.wake.wait()
            except TimeoutError:
                if bookmarks:
                    watcher.send(_bookmark(resource, self.store.version))


def _common_name(request: web.Request) -> str:
    certificate = request.transport.get_extra_info("peercert") if request.transport else None
    names = dict(pair for part in (certificate or {}).get("subject", ()) for pair in part)
    return str(names.get("commonName", ""))


def _target(path: str) -> Target | None:
    match = _PATH.fullmatch(path)
    resource = apistore.RESOURCES.get(match["plural"]) if match else None
    if match is None or resource is None or match["root"] != resource.root:
        return None
    return Target(resource, match["namespace"] or "", match["name"] or "")


def _selector(request: web.Request, target: Target) -> apistore.Selector:
    fields = request.query.get("fieldSelector", "")
    if target.namespace:
        fields = f"{fields},metadata.namespace={target.namespace}"
    return apistore.selector(request.query.get("labelSelector", ""), fields)


def _bookmark(
    resource: apistore.Resource, version: int, annotations: collections.abc.Mapping[str, str] | None = None
) -> bytes:
    metadata: dict[str, typing.Any] = {"resourceVersion": str(version), "creationTimestamp": None}
    if annotations:
        metadata["annotations"] = annotations
    obj = {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata}
    return msgspec.json.encode({"type": "BOOKMARK", "object": obj}) + b"\n"


def _status(code: int, message: str) -> bytes:
    reason = _REASONS.get(code, "InternalError")
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return msgspec.json.encode({**status, "message": message, "reason": reason, "code": code})


def _failure(code: int, message: str) -> web.Response:
    return _json(_status(code, message), code)


def _json(body: bytes, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")


async def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lbproxy.lab.apiserver", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--load", type=pathlib.Path, metavar="FILE", help="a JSON List of objects")
    parser.add_argument("--token", action="append", help="accept only these bearer tokens")
    parser.add_argument("--bookmark-interval", type=float, default=60.0, metavar="SECONDS")
    flags = parser.parse_args()
    server = ApiServer(
        host=flags.host, port=flags.port, tokens=flags.token, bookmark_interval_s=flags.bookmark_interval
    )
    if flags.load:
        for obj in msgspec.json.decode(flags.load.read_bytes())["items"]:
            server.store.put(obj)
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with server:
        print(server.url, flush=True)
        await stopped.wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main())
