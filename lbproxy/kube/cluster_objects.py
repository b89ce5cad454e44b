"""What of Nodes, DaemonSets and Pods is read by whoever migrates a cluster: a few of their fields."""

import typing

import msgspec

from lbproxy.core import migration, migration_plan

_ON_ITS_WAY: typing.Final = ("ContainerCreating", "PodInitializing")  # reasons that mean nothing yet
_MESSAGE: typing.Final = 200  # characters of what the kubelet and the scheduler say


class Meta(msgspec.Struct, rename="camel"):
    """An object's metadata."""

    name: str
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    owner_references: list["Owner"] | None = None


class Owner(msgspec.Struct):
    """Whom an object is of."""

    kind: str = ""
    name: str = ""


class _Condition(msgspec.Struct):
    type: str = ""
    status: str = ""
    message: str | None = None


class _Status(msgspec.Struct):
    conditions: list[_Condition] | None = None

    def is_ready(self) -> bool | None:
        """What its condition Ready says; None where there is none."""
        return next((one.status == "True" for one in self.conditions or () if one.type == "Ready"), None)


class _Waiting(msgspec.Struct):
    reason: str = ""
    message: str = ""


class _Terminated(msgspec.Struct, rename="camel"):
    exit_code: int = 0


class _ContainerState(msgspec.Struct):
    waiting: _Waiting | None = None
    terminated: _Terminated | None = None


class _ContainerStatus(msgspec.Struct, rename="camel"):
    state: _ContainerState = msgspec.field(default_factory=_ContainerState)
    last_state: _ContainerState = msgspec.field(default_factory=_ContainerState)

    def obstacle(self) -> str:
        """What keeps it from running; empty where nothing is known of."""
        waiting, last = self.state.waiting, self.last_state.terminated
        if waiting is None or waiting.reason in _ON_ITS_WAY:
            return ""
        if last is not None:
            return f"{waiting.reason}, last exit status {last.exit_code}"
        return f"{waiting.reason}: {waiting.message[:_MESSAGE]}" if waiting.message else waiting.reason


class _PodStatus(_Status, rename="camel"):
    init_container_statuses: list[_ContainerStatus] | None = None
    container_statuses: list[_ContainerStatus] | None = None


class Node(msgspec.Struct):
    """A Node."""

    metadata: Meta
    status: _Status = msgspec.field(default_factory=_Status)

    @property
    def lost(self) -> bool:
        """Whether its kubelet is known not to do what it is told."""
        return self.status.is_ready() is False

    @property
    def labels(self) -> dict[str, str]:
        """Its labels."""
        return self.metadata.labels or {}

    @property
    def order(self) -> str:
        """What its agent is told to do."""
        return (self.metadata.annotations or {}).get(migration.ANNOTATION, "")


class _Template(msgspec.Struct):
    spec: dict[str, typing.Any] = {}


class _Selector(msgspec.Struct, rename="camel"):
    match_labels: dict[str, str] | None = None


class _DaemonSetSpec(msgspec.Struct, rename="camel"):
    selector: _Selector = msgspec.field(default_factory=_Selector)
    template: _Template = msgspec.field(default_factory=_Template)
    update_strategy: dict[str, typing.Any] | None = None


class _DaemonSetStatus(msgspec.Struct, rename="camel"):
    observed_generation: int = 0
    desired_number_scheduled: int = 0
    updated_number_scheduled: int = 0
    number_unavailable: int = 0


class DaemonSet(msgspec.Struct):
    """A DaemonSet: what it asks of nodes, and how far its last change has come."""

    metadata: Meta
    spec: _DaemonSetSpec
    status: _DaemonSetStatus = msgspec.field(default_factory=_DaemonSetStatus)

    @property
    def pod_spec(self) -> dict[str, typing.Any]:
        """Its pods' spec."""
        return self.spec.template.spec

    @property
    def progress(self) -> tuple[int, int, int]:
        """What of the last change is to be seen; another value: it gets on."""
        status = self.status
        return status.observed_generation, status.updated_number_scheduled, status.number_unavailable

    @property
    def rolled_out(self) -> bool:
        """Whether its last change is everywhere; with OnDelete: is known to its controller."""
        status = self.status
        if status.observed_generation < self.metadata.generation:
            return False
        if (self.spec.update_strategy or {}).get("type") == "OnDelete":
            return True
        return (
            status.updated_number_scheduled >= status.desired_number_scheduled
            and not status.number_unavailable
        )


class PodSpec(msgspec.Struct, rename="camel"):
    """Where it runs, and where it may."""

    node_name: str = ""
    affinity: dict[str, typing.Any] | None = None


class Pod(msgspec.Struct):
    """A Pod."""

    metadata: Meta
    spec: PodSpec = msgspec.field(default_factory=PodSpec)
    status: _PodStatus = msgspec.field(default_factory=_PodStatus)

    @property
    def obstacle(self) -> str:
        """Why it is not ready, as far as its status says: no node has room, no image, a program that ends."""
        conditions = self.status.conditions or ()
        refused = [one for one in conditions if (one.type, one.status) == ("PodScheduled", "False")]
        if refused:
            return f"not scheduled: {(refused[0].message or '')[:_MESSAGE]}"
        containers = [*(self.status.init_container_statuses or ()), *(self.status.container_statuses or ())]
        return next((said for one in containers if (said := one.obstacle())), "")

    def is_for(self, node: str) -> bool:
        """Whether it is a DaemonSet's for a node which it is not on yet: its nodeAffinity names it."""
        if self.spec.node_name:
            return False
        terms = migration_plan.terms({"affinity": self.spec.affinity}) or ()
        fields = [one for term in terms for one in term.get("matchFields") or ()]
        return any(one.get("key") == "metadata.name" and one.get("values") == [node] for one in fields)

    @property
    def ready(self) -> bool:
        """Whether it is ready, and not about to go."""
        return self.status.is_ready() is True and self.metadata.deletion_timestamp is None
