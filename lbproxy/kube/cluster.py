"""The cluster as whoever migrates it sees it: nodes, two DaemonSets, their pods, and agents' answers.

It speaks through the official synchronous client (`pip install kubernetes`), which has all ways of
authentication that an administrator's kubeconfig may name. Of what comes back only those fields are
read that are needed.
"""

import contextlib
import logging
import os
import pathlib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from lbproxy import errors, secrecy
from lbproxy.core import migration
from lbproxy.kube import cluster_objects, credentials

_PAGE: typing.Final = 500
_LISTINGS: typing.Final = 5  # of a list whose pages are forgotten meanwhile
_TIMEOUT_S: typing.Final = (10.0, 60.0)  # to connect, and for the answer
EVENTS_OF_NODES: typing.Final = "default"  # the namespace of Events about objects that have none


class ApiError(errors.AgentError):
    """The API server did not do it; `status` is the HTTP status, 0 where there was no answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(credentials.one_line(message))
        self.status = status

    @property
    def passes(self) -> bool:
        """Whether it may go by itself: no answer, too many requests, a server's failure."""
        return self.status in (0, 409, 429) or self.status >= 500


class _Regarding(msgspec.Struct):
    name: str = ""


class _Event(msgspec.Struct, rename="camel"):
    metadata: cluster_objects.Meta
    regarding: _Regarding = msgspec.field(default_factory=_Regarding)
    event_time: str | None = None


class _ListMeta(msgspec.Struct):
    token: str = msgspec.field(default="", name="continue")


Item = typing.TypeVar("Item")


class _List(msgspec.Struct, typing.Generic[Item]):
    items: list[Item]
    metadata: _ListMeta = msgspec.field(default_factory=_ListMeta)


class Right(typing.NamedTuple):
    """What somebody may do; without a name: with all of them, without a namespace: everywhere."""

    group: str
    resource: str
    verb: str
    namespace: str = ""
    name: str = ""

    def __str__(self) -> str:
        """For people, like kubectl's words."""
        what = f"{self.resource}.{self.group}" if self.group else self.resource
        named = f" {self.name}" if self.name else ""
        return f"{self.verb} {what}{named}{f' in {self.namespace}' if self.namespace else ''}"


class _Verdict(msgspec.Struct):
    allowed: bool = False


class _Review(msgspec.Struct):
    status: _Verdict = msgspec.field(default_factory=_Verdict)


class Answer(typing.NamedTuple):
    """What a node's agent said last, and when (RFC 3339, by the node's clock)."""

    report: migration.Report
    at: str


class Cluster:
    """Requests to one API server; made by `connect`."""

    def __init__(self, library: typing.Any, api: typing.Any) -> None:
        self._library = library
        self.host = secrecy.without(str(api.configuration.host))
        self._core = library.client.CoreV1Api(api)
        self._apps = library.client.AppsV1Api(api)
        self._events = library.client.EventsV1Api(api)
        self._reviews = library.client.AuthorizationV1Api(api)

    def may(self, right: Right) -> bool:
        """Whether whoever asks has this right. Raises ApiError, as all these do."""
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": right._asdict()},
        }
        ask = self._reviews.create_self_subject_access_review
        return self._read(self._ask(f"ask for the right to {right}", ask, review), _Review).status.allowed

    def nodes(self) -> list[cluster_objects.Node]:
        """Every Node, by name."""
        found = self._all(cluster_objects.Node, "list nodes", self._core.list_node)
        return sorted(found, key=lambda node: node.metadata.name)

    def node(self, name: str) -> cluster_objects.Node:
        """One of them."""
        return self._read(self._ask(f"get node {name}", self._core.read_node, name), cluster_objects.Node)

    def daemon_set(self, namespace: str, name: str) -> cluster_objects.DaemonSet | None:
        """A DaemonSet; None where there is none."""
        what = f"get daemonset {namespace}/{name}"
        try:
            answer = self._ask(what, self._apps.read_namespaced_daemon_set, name, namespace)
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return self._read(answer, cluster_objects.DaemonSet)

    def pods(self, namespace: str, node: str = "") -> list[cluster_objects.Pod]:
        """The pods of a namespace, of one node or all; the oldest first."""
        chosen = {"field_selector": f"spec.nodeName={node}"} if node else {}

        def ask(**page: typing.Any) -> typing.Any:
            return self._core.list_namespaced_pod(namespace, **chosen, **page)

        found = self._all(cluster_objects.Pod, f"list pods in {namespace}", ask)
        return sorted(found, key=lambda pod: pod.metadata.creation_timestamp or "")

    def answers(self) -> dict[str, list[Answer]]:
        """What agents have said, by node, the newest last; the API server keeps it for an hour."""

        def ask(**page: typing.Any) -> typing.Any:
            chosen = f"reason={migration.REASON}"
            return self._events.list_namespaced_event(EVENTS_OF_NODES, field_selector=chosen, **page)

        found: dict[str, list[Answer]] = {}
        events = self._all(_Event, f"list events in {EVENTS_OF_NODES}", ask)
        for event in sorted(events, key=lambda one: one.event_time or ""):
            text = (event.metadata.annotations or {}).get(migration.REPORT, "")
            try:
                report = msgspec.json.decode(text, type=migration.Report)
            except msgspec.MsgspecError:
                continue
            found.setdefault(event.regarding.name, []).append(Answer(report, event.event_time or ""))
        return found

    def label(self, node: str, value: str) -> None:
        """Say who is to run on a node; "" takes the label away."""
        self._change_node(node, {"labels": {migration.LABEL: value or None}})

    def tell(self, node: str, order: str) -> None:
        """Tell a node's agent what to do; "" takes it back."""
        self._change_node(node, {"annotations": {migration.ANNOTATION: order or None}})

    def patch_daemon_set(
        self, namespace: str, of: cluster_objects.DaemonSet, patch: Mapping[str, typing.Any]
    ) -> None:
        """Change a DaemonSet, unless somebody else has meanwhile (409)."""
        # So that nothing is undone that we have not seen.
        body = {"metadata": {"resourceVersion": of.metadata.resource_version}, **patch}
        name = of.metadata.name
        self._ask(
            f"patch daemonset {namespace}/{name}",
            self._apps.patch_namespaced_daemon_set,
            name,
            namespace,
            body,
        )

    def _change_node(self, node: str, metadata: Mapping[str, typing.Any]) -> None:
        self._ask(f"patch node {node}", self._core.patch_node, node, {"metadata": metadata})

    def _all(self, kind: type[Item], what: str, ask: Callable[..., typing.Any]) -> list[Item]:
        for _ in range(_LISTINGS - 1):
            try:
                return list(self._pages(kind, what, ask))
            except ApiError as error:
                # What the pages were of is forgotten: from the beginning, then.
                if error.status != 410:
                    raise
        return list(self._pages(kind, what, ask))

    def _pages(self, kind: type[Item], what: str, ask: Callable[..., typing.Any]) -> Iterator[Item]:
        page: dict[str, typing.Any] = {"limit": _PAGE}
        while True:
            listed = self._read(self._ask(what, ask, **page), _List[kind])  # type: ignore[valid-type]
            yield from listed.items
            if not listed.metadata.token:
                return
            page["_continue"] = listed.metadata.token

    def _ask(
        self, what: str, ask: Callable[..., typing.Any], *given: typing.Any, **page: typing.Any
    ) -> bytes:
        complaints: list[str] = []
        try:
            with _heard(complaints):
                answer = ask(*given, **page, _preload_content=False, _request_timeout=_TIMEOUT_S)
            return bytes(answer.data)
        except self._library.client.ApiException as error:
            said = "; ".join((self._reason(error), *complaints))
            rights = "; docs/migration.md has the rights that are needed" if error.status == 403 else ""
            raise ApiError(f"{self.host}: cannot {what}: {said}{rights}", error.status or 0) from error
        except Exception as error:
            # Of urllib3, of ssl, of an exec plugin: whatever it is, the server has not answered.
            cause = getattr(error, "reason", None) or error
            raise ApiError(f"{self.host}: cannot {what}: {cause}") from error

    def _reason(self, error: typing.Any) -> str:
        try:
            said = msgspec.json.decode(error.body or b"", type=dict[str, typing.Any]).get("message", "")
        except (msgspec.MsgspecError, TypeError):
            said = ""
        return f"{error.status} {error.reason}: {said}".rstrip(": ")

    def _read(self, answer: bytes, kind: type[Item]) -> Item:
        try:
            return msgspec.json.decode(answer, type=kind)
        except msgspec.MsgspecError as error:
            raise ApiError(f"{self.host}: an answer that is not understood: {error}") from error


def connect(kubeconfig: str, context: str) -> Cluster:
    """Read a kubeconfig ("": kubectl's) and return the cluster of a context. Raises ConfigError."""
    try:
        import kubernetes  # noqa: PLC0415 - large, and not installed with the agent
    except ImportError:
        raise errors.ConfigError(
            "the official Kubernetes client is not installed here: pip install '.[migrate]' in a checkout of "
            "lbproxy"
        ) from None
    default = kubernetes.config.KUBE_CONFIG_DEFAULT_LOCATION
    files = [pathlib.Path(path).expanduser() for path in (kubeconfig or default).split(os.pathsep) if path]
    # Of several, those that are not there are passed over, as kubectl does it.
    found = files if kubeconfig else [file for file in files if file.exists()]
    if not found:
        raise errors.ConfigError(
            f"no kubeconfig: {default} is not there; --kubeconfig or $KUBECONFIG names one"
        )
    for file in found:
        credentials.check(str(file), "")
    where, complaints = os.pathsep.join(map(str, found)), list[str]()
    try:
        with _heard(complaints):
            api = kubernetes.config.new_client_from_config(
                kubeconfig or None, context or None, persist_config=False
            )
    except Exception as error:
        raise errors.ConfigError(credentials.one_line(f"{where}: {error or type(error).__name__}")) from error
    if complaints:
        # It would go on as nobody.
        raise errors.ConfigError(credentials.one_line(f"{where}: credentials: {'; '.join(complaints)}"))
    # Whoever waits asks again, and says so.
    api.rest_client.pool_manager.connection_pool_kw["retries"] = False
    return Cluster(kubernetes, api)


def owned_by(
    name: str, found: cluster_objects.DaemonSet | None, pods: Iterable[cluster_objects.Pod]
) -> dict[str, cluster_objects.Pod]:
    """The pods of the DaemonSet `name` among others, by the node that they are on; of two the newer one.

    `found` is that DaemonSet, if there is one: of one that was deleted, or made anew, pods may have stayed,
    with an owner of this name or with none.
    """
    chosen = ((found.spec.selector.match_labels if found else None) or {}).items()

    def is_its(pod: cluster_objects.Pod) -> bool:
        owners = pod.metadata.owner_references or ()
        if owners:
            return any((one.kind, one.name) == ("DaemonSet", name) for one in owners)
        return bool(chosen) and chosen <= (pod.metadata.labels or {}).items()

    return {pod.spec.node_name: pod for pod in pods if is_its(pod)}


@contextlib.contextmanager
def _heard(complaints: list[str]) -> Iterator[None]:
    """Note what the library only logs: that an exec plugin is not there, or fails."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name == "root":
                complaints.append(record.getMessage())

    root, handler = logging.getLogger(), Handler(logging.ERROR)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
