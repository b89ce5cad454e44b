"""Asks the API server what an agent would ask it, once, and whether it is reached by way of a Service."""

import asyncio
import contextlib
import dataclasses
import json
import socket
import typing
import urllib.parse
from collections.abc import Collection, Mapping

from lbproxy import errors
from lbproxy.core import addresses, decode, model
from lbproxy.core.preflight import facts
from lbproxy.kube import client, reflector

TIMEOUT_S: typing.Final = 20.0
_FORBIDDEN: typing.Final = 403
_MANY: typing.Final = "500"  # Nodes that are looked through for the one that may be meant
_OF_SERVERS: typing.Final = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
_SERVICE: typing.Final = "/api/v1/namespaces/default/services"


class Found(typing.NamedTuple):
    """What was learned, and the Node."""

    cluster: facts.Cluster
    node: model.Node | None = None


async def look(kubeconfig: str, master: str, name: str, local: Collection[bytes]) -> Found:
    """Ask for the Node `name`; `local` are this machine's addresses, 16 bytes each.

    Whatever goes wrong is part of what was found.
    """
    found = facts.Cluster(url="", in_pod=not kubeconfig and not master, by_service=None, node=None)
    try:
        asked = await client.connect(kubeconfig, master)
    except errors.LbproxyError as error:
        return Found(dataclasses.replace(found, problem=str(error)))
    found = dataclasses.replace(found, url=asked.host)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await _look(asked, found, name, local)
    except TimeoutError:
        return Found(dataclasses.replace(found, problem=f"{asked.host}: no answer within {TIMEOUT_S:g} s"))
    except errors.LbproxyError as error:
        return Found(dataclasses.replace(found, problem=str(error)))
    finally:
        with contextlib.suppress(Exception):
            await asked.close()


async def _look(asked: client.Client, found: facts.Cluster, name: str, local: Collection[bytes]) -> Found:
    nodes: list[typing.Any] = []
    forbidden = []
    for what, watched in (
        ("services", reflector.services()),
        ("endpointslices", reflector.endpoint_slices()),
        ("nodes", reflector.node(name)),
    ):
        listed = await _list(asked, watched.path, {**watched.selectors, "limit": "1"})
        if listed is None:
            forbidden.append(what)
        elif what == "nodes":
            nodes = listed
    node = _node(nodes[0]) if nodes else None
    by_service, servers = await _by_service(asked)
    told = dataclasses.replace(
        found,
        by_service=by_service,
        servers=servers,
        forbidden=tuple(forbidden),
        node=_facts(node) if node else None,
        similar="" if node else await _similar(asked, local),
    )
    return Found(told, node)


async def _list(asked: client.Client, path: str, query: Mapping[str, str]) -> list[typing.Any] | None:
    """The objects of a list; None where it may not be read. Raises ClientError for any other failure."""
    try:
        body = await asked.get(path, query)
    except client.ClientError as error:
        if error.status == _FORBIDDEN:
            return None
        raise
    try:
        items = json.loads(body).get("items")
    except (ValueError, AttributeError) as error:
        raise client.ClientError(f"{asked.host}: {path}: the answer is no list") from error
    return items if isinstance(items, list) else []


def _node(raw: typing.Any) -> model.Node | None:
    # Items of a list name neither their kind nor its version.
    text = json.dumps({"apiVersion": "v1", "kind": "Node", **raw}).encode()
    with contextlib.suppress(decode.DecodeError):
        value = decode.node(text).value
        return value if isinstance(value, model.Node) else None
    return None


def _facts(node: model.Node) -> facts.NodeObject:
    families = frozenset(addresses.family_of(one).value for one in node.addresses)
    return facts.NodeObject(families, node.pod_cidrs)


async def _by_service(asked: client.Client) -> tuple[bool | None, tuple[str, ...]]:
    """Whether the server was asked by way of the Service default/kubernetes, and where it really is."""
    host = urllib.parse.urlsplit(asked.host).hostname or ""
    services = await _list(asked, _SERVICE, {"fieldSelector": "metadata.name=kubernetes"})
    if services is None:
        return None, ()
    specs = [one.get("spec", {}) for one in services]
    cluster_ips = {ip for spec in specs for ip in (spec.get("clusterIP"), *spec.get("clusterIPs", ()))}
    labels = {"labelSelector": "kubernetes.io/service-name=kubernetes"}
    slices = await _list(asked, _OF_SERVERS, labels) or []
    servers = [
        _place(address, port["port"])
        for one in slices
        for port in one.get("ports") or ()
        for endpoint in one.get("endpoints") or ()
        for address in endpoint.get("addresses") or ()
    ]
    asked_at = {parsed for text in await _resolved(host) if (parsed := addresses.parse(text))}
    served_at = {parsed for text in cluster_ips if text and (parsed := addresses.parse(text))}
    return bool(asked_at & served_at), tuple(servers)


def _place(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


async def _resolved(host: str) -> list[str]:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        answers = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return [str(sockaddr[0]) for *_, sockaddr in answers]
    return []


async def _similar(asked: client.Client, local: Collection[bytes]) -> str:
    """The name of the Node that has an address of this machine, where they may be listed."""
    with contextlib.suppress(client.ClientError):
        for raw in await _list(asked, "/api/v1/nodes", {"limit": _MANY}) or ():
            node = _node(raw)
            if node is not None and set(node.addresses) & set(local):
                return node.name
    return ""
