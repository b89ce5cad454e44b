"""The templates of the chart: the objects of the kustomize folders, with values in places."""

import copy
import typing

import yaml

from deploy import kustomizing
from deploy.chart import source
from deploy.chart.tree import Block, Lines, Literal, Spread, Text, When, write
from lbproxy.config import config, config_file

_FULL_NAME: typing.Final = Text('include "lbproxy.fullname" .')
_NAMESPACE: typing.Final = Text('include "lbproxy.namespace" .')
_ACCOUNT: typing.Final = Text('include "lbproxy.serviceAccountName" .')
_IMAGE: typing.Final = Text('include "lbproxy.image" .')
_AFFINITY: typing.Final = 'include "lbproxy.affinity" .'
_AGENT: typing.Final = "not .Values.cleanup.enabled"

_COMMON_ANNOTATIONS: typing.Final = ".Values.commonAnnotations"

# Where alerts lead, as the kustomize folder has it.
RUNBOOK: typing.Final = "docs/runbook.md"


def templates() -> dict[str, str]:
    """The text of each file below templates/ that is made."""
    objects = {found["kind"].lower(): found for found in source.base()}
    found = {f"{kind}.yaml": _template(each) for kind, each in objects.items()}
    found["configmap.yaml"] = _when(_AGENT, _config_map())
    found["cleanup.yaml"] = _when(".Values.cleanup.enabled", _cleanup())
    found["resourcequota.yaml"] = _when(
        f"and ({_AGENT}) .Values.hostile.enabled .Values.hostile.resourceQuota"
        # There it would bound the pods of others.
        ' (ne (include "lbproxy.namespace" .) "kube-system")',
        _quota(),
    )
    found |= _monitoring()
    found["_config.tpl"] = _config_template()
    return found


def files() -> dict[str, str]:
    """The text of each file that templates take as it is: what looks like a template is none there."""
    rules = source.one(source.monitoring(), "PrometheusRule")["spec"]
    return {
        "rules.yaml": yaml.dump(rules, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True),
        "dashboard.json": (source.MONITORING / "dashboard.json").read_text(),
    }


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as it reads."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _when(condition: str, tree: kustomizing.Object, check: str = "") -> str:
    """A template that is empty unless a condition holds; `check` names a helper that may refuse it."""
    checked = f'{{{{- include "{check}" . }}}}\n' if check else ""
    return f"{{{{- if {condition} }}}}\n{checked}{write(tree)}{{{{- end }}}}\n"


def _template(found: kustomizing.Object) -> str:
    """An object of the base."""
    tree = _named(found)
    match found["kind"]:
        case "DaemonSet":
            return _when(_AGENT, _agent(tree), check="lbproxy.checkSettings")
        case "ServiceAccount":
            tree["metadata"]["name"] = _ACCOUNT
            tree["metadata"]["annotations"] = _annotations(".Values.serviceAccount.annotations")
            return _when(f"and ({_AGENT}) .Values.serviceAccount.create", tree)
        case "ClusterRole":
            tree["rules"] = [_rule(rule) for rule in found["rules"]]
        case "ClusterRoleBinding":
            tree["roleRef"]["name"] = _FULL_NAME
            (subject,) = tree["subjects"]
            subject |= {"name": _ACCOUNT, "namespace": _NAMESPACE}
        case unknown:
            raise AssertionError(f"{unknown}: say when it is wanted")
    return _when(f"and ({_AGENT}) .Values.rbac.create", tree)


def _named(found: kustomizing.Object) -> kustomizing.Object:
    """A copy whose name, namespace, labels and annotations are of the release."""
    tree = copy.deepcopy(found)
    metadata = tree["metadata"]
    suffix = metadata["name"].removeprefix(source.NAME)
    named: kustomizing.Object = {"name": metadata["name"]}
    if metadata["name"].startswith(source.NAME):
        named["name"] = Text(f'printf "%s{suffix}" (include "lbproxy.fullname" .)') if suffix else _FULL_NAME
    if "namespace" in metadata:
        named["namespace"] = _NAMESPACE
    named["labels"] = {**metadata.get("labels", {}), Lines('include "lbproxy.labels" .'): None}
    named["annotations"] = _annotations()
    tree["metadata"] = named
    return tree


def _annotations(*more: str) -> When:
    """The annotations of all objects, and those of this one."""
    values = (_COMMON_ANNOTATIONS, *more)
    condition = f"or {' '.join(values)}" if more else values[0]
    return When(condition, {Spread(value): None for value in values})


def _rule(rule: kustomizing.Object) -> kustomizing.Object | When:
    """A rule of the role; the one for Events is there where the agent writes some."""
    return When('eq (include "lbproxy.events" .) "true"', rule) if rule["resources"] == ["events"] else rule


def _agent(tree: kustomizing.Object) -> kustomizing.Object:
    spec = tree["spec"]
    spec["updateStrategy"] = _value("updateStrategy")
    spec["minReadySeconds"] = _number("minReadySeconds")
    template = spec["template"]
    template["metadata"]["labels"][Spread(".Values.podLabels")] = None
    template["metadata"]["annotations"] = {
        "checksum/config": Text('include "lbproxy.checksum" .'),
        Spread(".Values.podAnnotations"): None,
    }
    pod = template["spec"] = _pod(template["spec"], "lbproxy.podSecurityContext")
    pod["serviceAccountName"] = _ACCOUNT
    pod["priorityClassName"] = _text_value("priorityClassName")
    pod["terminationGracePeriodSeconds"] = _number("terminationGracePeriodSeconds")
    (container,) = pod["containers"]
    _container(container)
    container["securityContext"] = Block('include "lbproxy.securityContext" .')
    container["startupProbe"]["failureThreshold"] = _number("startupProbe.failureThreshold")
    for port in container["ports"]:
        number = Text(f'include "lbproxy.{port["name"]}Port" .')
        port |= {"containerPort": number, "hostPort": number}
    (volume,) = (one for one in pod["volumes"] if "configMap" in one)
    volume["configMap"]["name"] = Text('include "lbproxy.configName" .')
    container["volumeMounts"].append(Spread(".Values.extraVolumeMounts"))
    pod["volumes"].append(Spread(".Values.extraVolumes"))
    pod["initContainers"] = When("and .Values.hostile.enabled .Values.hostile.load.enabled", [_load()])
    return tree


def _load() -> kustomizing.Object:
    """The container that loads the programs, so that the agent needs fewer rights."""
    container: kustomizing.Object
    (container,) = source.pod(source.overlay("hostile"))["initContainers"]
    _container(container)
    container["securityContext"] = Block('include "lbproxy.loadSecurityContext" .')
    return container


def _container(container: kustomizing.Object) -> None:
    container["image"] = _IMAGE
    container["imagePullPolicy"] = _text_value("image.pullPolicy")
    container["resources"] = _value("resources")


def _pod(spec: kustomizing.Object, security: str) -> kustomizing.Object:
    """A pod with what is the same for the agent's and the cleaner's."""
    return {
        **spec,
        "nodeSelector": Block('include "lbproxy.nodeSelector" .'),
        "tolerations": _value("tolerations"),
        "affinity": When(_AFFINITY, Block(_AFFINITY)),
        "imagePullSecrets": When(".Values.imagePullSecrets", _value("imagePullSecrets")),
        "securityContext": Block(f'include "{security}" .'),
    }


def _value(path: str) -> Block:
    return Block(f"toYaml .Values.{path}")


def _text_value(path: str) -> Text:
    return Text(f".Values.{path} | quote")


def _number(path: str) -> Text:
    return Text(f".Values.{path} | int")


def _config_map() -> kustomizing.Object:
    found = source.one(source.overlay("default"), "ConfigMap")
    tree = _named({**found, "metadata": {**found["metadata"], "labels": {}}})
    tree["metadata"]["name"] = Text('include "lbproxy.configName" .')
    # Pods of the revision before need theirs until they are replaced, and a kubelet that starts asks for it.
    tree["metadata"]["annotations"] = {"helm.sh/resource-policy": "keep", Spread(_COMMON_ANNOTATIONS): None}
    tree["data"] = {name: Literal(f'include "lbproxy.{name}" .') for name in found["data"]}
    return tree


def _cleanup() -> kustomizing.Object:
    tree = _named(source.one(source.cleanup(), "DaemonSet"))
    template = tree["spec"]["template"]
    template["spec"] = _pod(template["spec"], "lbproxy.podSecurityContext")
    for container in (*template["spec"]["initContainers"], *template["spec"]["containers"]):
        container["image"] = _IMAGE
        container["imagePullPolicy"] = _text_value("image.pullPolicy")
    return tree


def _quota() -> kustomizing.Object:
    return _named(source.one(source.overlay("hostile"), "ResourceQuota"))


def _monitoring() -> dict[str, str]:
    objects = source.monitoring()
    monitor, rules, dashboard = (
        _named(source.one(objects, kind)) for kind in ("PodMonitor", "PrometheusRule", "ConfigMap")
    )
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    endpoint["interval"] = _text_value("monitoring.podMonitor.interval")
    endpoint["scrapeTimeout"] = _text_value("monitoring.podMonitor.scrapeTimeout")
    rules["spec"] = Block(
        f'.Files.Get "files/rules.yaml" | replace "{RUNBOOK}" .Values.monitoring.prometheusRule.runbook'
    )
    dashboard["data"] = {"dashboard.json": Literal('.Files.Get "files/dashboard.json"')}
    for tree, name in ((monitor, "podMonitor"), (rules, "prometheusRule"), (dashboard, "dashboard")):
        # Labels of its own are the defaults of the value.
        labels: dict[object, object] = {
            key: each for key, each in tree["metadata"]["labels"].items() if isinstance(key, Lines)
        }
        tree["metadata"]["labels"] = {**labels, Spread(f".Values.monitoring.{name}.labels"): None}
    return {
        "podmonitor.yaml": _when(
            f"and ({_AGENT}) .Values.monitoring.podMonitor.enabled", monitor, check="lbproxy.checkMonitored"
        ),
        "prometheusrule.yaml": _when(f"and ({_AGENT}) .Values.monitoring.prometheusRule.enabled", rules),
        "dashboard.yaml": _when(f"and ({_AGENT}) .Values.monitoring.dashboard.enabled", dashboard),
    }


def _config_template() -> str:
    """What helpers need to know of the agent: its files, its ports."""
    kubeconfig = source.kubeconfig()
    (cluster,) = kubeconfig["clusters"]
    cluster["cluster"] = {
        "server": Text('include "lbproxy.apiServer" . | quote'),
        "certificate-authority": _text_value("apiServer.certificateAuthority"),
    }
    path = source.settings("default")[0]["clientConnection"]["kubeconfig"]
    (namespace,) = (one for one in source.overlay("hostile") if one["kind"] == "Namespace")
    migrate = source.overlay("migrate")
    told = [
        {name: value for name, value in there.items() if here.get(name) != value}
        for there, here in zip(source.settings("migrate"), source.settings("default"), strict=True)
    ]
    assert not told[0], "say where they go"
    levels = " ".join(f"{name}={level}" for name, level in namespace["metadata"]["labels"].items())
    return f"""\
{{{{- /* Made by `make chart`. */ -}}}}
{{{{- define "lbproxy.config.conf" -}}}}
{{{{- $settings := include "lbproxy.settings" . | fromYaml -}}}}
apiVersion: {config_file.KUBE_PROXY[0]}
kind: {config_file.KUBE_PROXY[1]}
clientConnection:
  kubeconfig: {path}
{{{{- with omit $settings.kubeProxy "apiVersion" "kind" "clientConnection" }}}}
{{{{ toYaml . }}}}
{{{{- end }}}}
---
apiVersion: {config_file.LBPROXY[0]}
kind: {config_file.LBPROXY[1]}
{{{{- with omit $settings.lbproxy "apiVersion" "kind" }}}}
{{{{ toYaml . }}}}
{{{{- end }}}}
{{{{- end }}}}

{{{{- define "lbproxy.kubeconfig.conf" -}}}}
{write(kubeconfig)}{{{{- end }}}}

{{{{- define "lbproxy.healthzAddress" -}}}}
{{{{- $settings := include "lbproxy.settings" . | fromYaml -}}}}
{{{{- $settings.kubeProxy.healthzBindAddress | default "{config.HEALTHZ}" -}}}}
{{{{- end }}}}

{{{{- define "lbproxy.metricsAddress" -}}}}
{{{{- $settings := include "lbproxy.settings" . | fromYaml -}}}}
{{{{- $settings.kubeProxy.metricsBindAddress | default "{config.METRICS}" -}}}}
{{{{- end }}}}

{{{{- define "lbproxy.migrateSettings" -}}}}
{write(told[1])}{{{{- end }}}}

{{{{- define "lbproxy.migrateAffinity" -}}}}
{write(source.pod(migrate)["affinity"])}{{{{- end }}}}

{{{{- define "lbproxy.podSecurityLevels" -}}}}
{levels}
{{{{- end }}}}
"""
