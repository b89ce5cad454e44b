"""The values of the chart: names, defaults, what they take and what they mean, each once.

`value_files` makes values.yaml, values.schema.json and the table of the README of them. Defaults that the
kustomize folders have are read from there.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping

from deploy import kustomizing
from deploy.chart import objects, schema, source
from lbproxy.config import config_file
from lbproxy.config.options import Option

_OWN_LABELS: typing.Final = (
    "app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/version",
    "app.kubernetes.io/managed-by", "helm.sh/chart",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """One value: its path, default, JSON Schema and meaning; `more` are lines of comment below it."""

    path: str
    default: typing.Any
    schema: schema.Schema
    help: str
    more: tuple[str, ...] = ()


def all_values(kubernetes: schema.Kubernetes) -> list[Value]:
    """Every value, in the order of values.yaml."""
    base = source.one(source.base(), "DaemonSet")["spec"]
    pod = source.pod(source.base())
    (container,) = pod["containers"]
    return [
        *_image(container),
        *_configuration(),
        *_overlays(kubernetes),
        *_monitoring(),
        *_rights(),
        *_pod(base, pod, container, kubernetes),
        *_names(),
    ]


def _image(container: kustomizing.Object) -> Iterator[Value]:
    yield Value(
        "image.repository",
        "",
        schema.TEXT,
        "needed: where the image is that deploy/Dockerfile makes",
    )
    yield Value(
        "image.tag",
        "",
        {"type": "string", "pattern": "^([A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?$"},
        "empty: the version that the chart is of",
    )
    yield Value(
        "image.digest",
        "",
        {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
        "sha256:…; if set, it counts and the tag does not",
    )
    yield Value(
        "image.pullPolicy",
        container["imagePullPolicy"],
        schema.one_of("Always", "IfNotPresent", "Never"),
        "when nodes pull it",
    )
    item = schema.group({"name": {"type": "string", "minLength": 1}}) | {"required": ["name"]}
    yield Value(
        "imagePullSecrets",
        [],
        {"type": "array", "items": item},
        "Secrets for the registry, as a list of {name: …}",
    )


def _configuration() -> Iterator[Value]:
    (cluster,) = source.kubeconfig()["clusters"]
    yield Value(
        "apiServer.server", "", {"type": "string", "pattern": "^(https?://[^ /]+/?.*)?$"},
        "needed: the API server's address that answers without a service proxy, as in "
        "/etc/kubernetes/kubelet.conf of a node; not that of the Service `kubernetes`",
    )  # fmt: skip
    yield Value(
        "apiServer.certificateAuthority",
        cluster["cluster"]["certificate-authority"],
        {"type": "string", "pattern": "^/"},
        "the file in the pod that its certificate is checked against",
    )
    kube_proxy, own = source.settings("default")
    kube_proxy = {name: value for name, value in kube_proxy.items() if name != "clientConnection"}
    kube_schema, own_schema = schema.kube_proxy_settings(), schema.own_settings()
    yield Value(
        "config.kubeProxy",
        {**kube_proxy, "clusterCIDR": ""},
        {"$ref": "#/definitions/KubeProxyConfiguration"},
        "fields of KubeProxyConfiguration, e.g. from kube-proxy's own config.conf. Set clusterCIDR: the "
        "pods' CIDR, or one of each family, with a comma. For Prometheus: metricsBindAddress "
        "0.0.0.0:10249, which is served without TLS or authentication. docs/configuration.md has all "
        "fields",
        _settings(config_file.kube_schema(), kube_schema, kube_proxy),
    )  # fmt: skip
    yield Value(
        "config.lbproxy", own, {"$ref": "#/definitions/LbproxyConfiguration"},
        "fields of LbproxyConfiguration",
        _settings(config_file.own_schema(), own_schema, own),
    )  # fmt: skip


def _settings(
    fields: Mapping[str, Option], known: schema.Schema, given: Mapping[str, object]
) -> tuple[str, ...]:
    """A line for each setting that does something, and that is left to the chart's user."""
    named: dict[str, list[str]] = {}
    for field, option in fields.items():
        place: typing.Any = {"properties": known["properties"]}
        for part in field.split("."):
            place = place["properties"][part]
        if not option.no_effect and not schema.is_decided(place) and field not in given:
            default = f" ({option.default})" if option.default else ""
            named.setdefault(f"{default}: {option.help_of_field}", []).append(field)
    return tuple(f"{', '.join(names)}{text}" for text, names in named.items())


def _overlays(kubernetes: schema.Kubernetes) -> Iterator[Value]:
    base, trial = source.pod(source.base()), source.pod(source.overlay("trial"))
    more = {name: value for name, value in trial["nodeSelector"].items() if name not in base["nodeSelector"]}
    yield Value(
        "trial.enabled",
        False,
        schema.FLAG,
        "beside kube-proxy, on some nodes, at other ports, sockets only (docs/install.md)",
    )
    yield Value("trial.nodeSelector", more, schema.texts(), "labels of those nodes, beside nodeSelector")
    kube_proxy, own = (
        {name: value for name, value in there.items() if here.get(name) != value}
        for there, here in zip(source.settings("trial"), source.settings("default"), strict=True)
    )
    yield Value(
        "trial.config.kubeProxy",
        kube_proxy,
        {"$ref": "#/definitions/KubeProxyConfiguration"},
        "stands above config.kubeProxy in a trial: kube-proxy has ports 10256 and 10249",
    )
    yield Value(
        "trial.config.lbproxy",
        own,
        {"$ref": "#/definitions/LbproxyConfiguration"},
        "stands above config.lbproxy in a trial. packetPath false: only connections that pods and the "
        "node begin",
    )
    yield Value(
        "migrate.enabled",
        False,
        schema.FLAG,
        "for `lbproxy migrate cluster` (docs/migration.md): only on nodes that it has labelled, with "
        "takeOver: when-told",
    )
    hostile = source.pod(source.overlay("hostile"))
    (agent,), (load,) = hostile["containers"], hostile["initContainers"]
    capabilities = kubernetes("core.v1.Capabilities")
    yield Value(
        "hostile.enabled",
        False,
        schema.FLAG,
        "an agent without CAP_SYS_ADMIN; docs/install.md says what that costs",
    )
    yield Value("hostile.capabilities", agent["securityContext"]["capabilities"], capabilities, "the agent's")
    yield Value(
        "hostile.appArmorProfile",
        hostile["securityContext"]["appArmorProfile"],
        kubernetes("core.v1.AppArmorProfile"),
        "of the pod, from Kubernetes 1.30; null: none is named",
    )
    yield Value(
        "hostile.load.enabled",
        True,
        schema.FLAG,
        "compile and load in a container that ends. Not needed where the image has compiled programs",
    )
    yield Value(
        "hostile.load.capabilities", load["securityContext"]["capabilities"], capabilities, "that container's"
    )
    yield Value(
        "hostile.resourceQuota",
        True,
        schema.FLAG,
        "outside kube-system some clusters admit system-node-critical only with a quota",
    )
    yield Value(
        "cleanup.enabled",
        False,
        schema.FLAG,
        "instead of the agents, pods that take lbproxy out of the nodes' kernels: the step before `helm "
        "uninstall`",
    )


def _monitoring() -> Iterator[Value]:
    found = source.monitoring()
    (endpoint,) = source.one(found, "PodMonitor")["spec"]["podMetricsEndpoints"]
    yield Value(
        "monitoring.podMonitor.enabled",
        False,
        schema.FLAG,
        "a PodMonitor for the Prometheus operator; needs a metricsBindAddress that it can reach",
    )
    yield Value(
        "monitoring.podMonitor.labels",
        {},
        schema.texts(*_OWN_LABELS),
        "labels by which a Prometheus finds it",
    )
    for name in ("interval", "scrapeTimeout"):
        yield Value(
            f"monitoring.podMonitor.{name}", endpoint[name], schema.DURATION, f"{name} of the scrapes"
        )
    yield Value(
        "monitoring.prometheusRule.enabled",
        False,
        schema.FLAG,
        "alerts, as a PrometheusRule (docs/runbook.md)",
    )
    yield Value(
        "monitoring.prometheusRule.labels",
        {},
        schema.texts(*_OWN_LABELS),
        "labels by which a Prometheus finds it",
    )
    yield Value(
        "monitoring.prometheusRule.runbook",
        objects.RUNBOOK,
        schema.TEXT,
        "where people read docs/runbook.md: the links in alerts",
    )
    dashboard = source.one(found, "ConfigMap")["metadata"]["labels"]
    yield Value(
        "monitoring.dashboard.enabled", False, schema.FLAG, "a ConfigMap with the dashboard for Grafana"
    )
    yield Value(
        "monitoring.dashboard.labels",
        dashboard,
        schema.texts(*_OWN_LABELS),
        "labels by which Grafana finds it",
    )


def _rights() -> Iterator[Value]:
    yield Value("serviceAccount.create", True, schema.FLAG, "make the ServiceAccount")
    yield Value("serviceAccount.name", "", schema.NAME, "empty: the name of the other objects")
    yield Value("serviceAccount.annotations", {}, schema.texts(), "its annotations")
    yield Value(
        "rbac.create",
        True,
        schema.FLAG,
        "make the ClusterRole and its binding. Without Events in config.lbproxy (events: false) the role "
        "has no right to write any",
    )


def _pod(
    spec: kustomizing.Object,
    pod: kustomizing.Object,
    container: kustomizing.Object,
    kubernetes: schema.Kubernetes,
) -> Iterator[Value]:
    yield Value(
        "resources",
        container["resources"],
        kubernetes("core.v1.ResourceRequirements"),
        "as measured at 10,000 services. No limits on purpose: where its memory is full the kernel keeps "
        "no new flows, and a throttled agent is late with changes",
    )
    yield Value(
        "priorityClassName", pod["priorityClassName"], schema.NAME, 'the kubelet evicts it last; "": no class'
    )
    yield Value("nodeSelector", pod["nodeSelector"], schema.texts(), "labels of the nodes that get a pod")
    yield Value(
        "tolerations",
        pod["tolerations"],
        {"type": "array", "items": kubernetes("core.v1.Toleration")},
        "every node needs a service proxy",
    )
    yield Value(
        "affinity",
        {},
        kubernetes("core.v1.Affinity"),
        "the same in more words, e.g. all nodes but those with a label",
    )
    yield Value(
        "updateStrategy",
        spec["updateStrategy"],
        kubernetes("apps.v1.DaemonSetUpdateStrategy"),
        "the kernel serves while an agent is replaced; a version that does not become ready stops the "
        "rollout",
    )
    yield Value(
        "minReadySeconds",
        spec["minReadySeconds"],
        schema.whole(0),
        "how long a pod has to be ready before the next is replaced",
    )
    yield Value(
        "terminationGracePeriodSeconds",
        pod["terminationGracePeriodSeconds"],
        schema.whole(0),
        "it ends at once, and takes nothing down",
    )
    probe = container["startupProbe"]
    yield Value(
        "startupProbe.failureThreshold",
        probe["failureThreshold"],
        schema.whole(1),
        f"how many times {probe['periodSeconds']} seconds a first start, which compiles, may take",
    )
    yield Value(
        "podSecurityContext",
        pod["securityContext"],
        kubernetes("core.v1.PodSecurityContext"),
        "SELinux: an ordinary container may not load programs; ignored where it is off. AppArmor: "
        "appArmorProfile here, or hostile.enabled",
    )
    yield Value(
        "securityContext",
        container["securityContext"],
        kubernetes("core.v1.SecurityContext"),
        "docs/install.md says what each capability is for",
    )
    taken = [volume["name"] for volume in pod["volumes"]]
    named = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"type": "string", "not": {"enum": taken}}},
    }
    yield Value(
        "extraVolumes",
        [],
        {"type": "array", "items": named},
        "more volumes of the agents' pods, e.g. a ConfigMap with authorities for probeCAFile",
    )
    yield Value(
        "extraVolumeMounts",
        [],
        {"type": "array", "items": kubernetes("core.v1.VolumeMount")},
        "where the agent's container has them",
    )


def _names() -> Iterator[Value]:
    yield Value("commonLabels", {}, schema.texts(*_OWN_LABELS), "labels of all objects")
    yield Value("commonAnnotations", {}, schema.texts(), "annotations of all objects")
    yield Value("podLabels", {}, schema.texts(_OWN_LABELS[0]), "labels of the agents' pods")
    yield Value("podAnnotations", {}, schema.texts("checksum/config"), "annotations of the agents' pods")
    yield Value(
        "fullnameOverride",
        "",
        schema.NAME,
        f"name of the objects, if not {source.NAME}. There can be one a node, so the release's name is not "
        "in it",
    )
    yield Value("namespaceOverride", "", schema.NAME, "namespace of the objects, if not the release's")
