"""The Helm chart says what the kustomize folders say, and refuses values that make no sense."""

import copy
import dataclasses
import pathlib
import re
import typing
from collections.abc import Mapping

import kubernetes_validate
import pytest
import yaml

import lbproxy
from deploy import kustomizing
from deploy.chart import __main__ as generator
from deploy.chart import schema, source
from lbproxy.config import config, config_file, loading
from lbproxy.config import flags as config_flags
from tests import helming
from tests.unit.test_config_file import KUBEADM

CHART: typing.Final = helming.Chart(source.CHART)
CI: typing.Final = {
    path.name.removesuffix("-values.yaml"): yaml.safe_load(path.read_text())
    for path in sorted((source.CHART / "ci").iterdir())
}
# All that helm adds to labels of the kustomize folders.
HELM_LABELS: typing.Final = {
    "app.kubernetes.io/instance": "lbproxy",
    "app.kubernetes.io/version": lbproxy.__version__,
    "app.kubernetes.io/managed-by": "Helm",
    "helm.sh/chart": f"lbproxy-{lbproxy.__version__}",
}
OPERATOR_KINDS: typing.Final = {"PodMonitor", "PrometheusRule"}  # no schema of Kubernetes has them

every_values = pytest.mark.parametrize("values", CI.values(), ids=CI)


def with_values(path: str, value: object, name: str = "default") -> helming.Values:
    """The values of a file in ci/, and one more by its path."""
    *parents, last = path.split(".")
    found: helming.Values = copy.deepcopy(CI[name])
    place = found
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    return found


def rendered(path: str, value: object, kind: str = "DaemonSet") -> helming.Values:
    """The object of a kind, where one value is another than its default."""
    return source.one(CHART.objects(with_values(path, value)), kind)


def pod(path: str, value: object) -> helming.Values:
    return kustomizing.pod(rendered(path, value))


def container(path: str, value: object) -> helming.Values:
    found: helming.Values
    (found,) = pod(path, value)["containers"]
    return found


# --- made of the same source ---


def test_the_chart_is_what_is_made_of_its_sources() -> None:
    made = generator.files()
    there = {str(path.relative_to(source.CHART)): path for path in source.CHART.rglob("*") if path.is_file()}
    others = {name for name in there if not name.startswith("ci/")}
    assert others == made.keys() | generator.BY_HAND
    stale = [name for name, text in made.items() if there[name].read_text() != text]
    assert stale == [], "run make chart"


def test_a_stale_file_is_made_anew_and_what_is_no_longer_made_goes(tmp_path: pathlib.Path) -> None:
    made = {"values.yaml": "a: 1\n", "templates/b.yaml": "b"}
    assert set(generator.write(tmp_path, made)) == made.keys()
    (tmp_path / "values.yaml").write_text("image: {}\n")
    (tmp_path / "templates/gone.yaml").write_text("")
    (tmp_path / "templates/NOTES.txt").write_text("mine")
    assert sorted(generator.write(tmp_path, made)) == ["templates/gone.yaml", "values.yaml"]
    assert generator.write(tmp_path, made) == []
    assert (tmp_path / "templates/NOTES.txt").read_text() == "mine"


def as_helm_has_it(objects: list[kustomizing.Object]) -> dict[tuple[str, str], kustomizing.Object]:
    """Kustomize's objects as they are expected of helm: with its labels, and its name of the ConfigMap."""
    found = copy.deepcopy(objects)
    for each in found:
        each["metadata"].setdefault("labels", {}).update(HELM_LABELS)
        if each["metadata"]["name"] == "lbproxy" and each["kind"] == "ConfigMap":
            # Kustomize prunes nothing.
            each["metadata"]["annotations"] = {"helm.sh/resource-policy": "keep"}
    return keyed(found)


def keyed(objects: list[kustomizing.Object]) -> dict[tuple[str, str], kustomizing.Object]:
    found = {(each["kind"], each["metadata"]["name"]): each for each in objects}
    assert len(found) == len(objects)
    return found


def without_suffix(objects: list[kustomizing.Object]) -> list[kustomizing.Object]:
    """With the ConfigMap called `lbproxy`, whose suffix kustomize and helm compute differently."""
    found = copy.deepcopy(objects)
    for each in found:
        metadata = each["metadata"]
        metadata["name"] = re.sub("-[0-9a-f]{10}$", "", metadata["name"])
        for volume in kustomizing.pod(each).get("volumes", []):
            if "configMap" in volume:
                volume["configMap"]["name"] = re.sub("-[0-9a-f]{10}$", "", volume["configMap"]["name"])
    return found


@pytest.mark.parametrize("overlay", ["default", "trial", "hostile", "migrate"])
def test_it_renders_the_objects_of_an_overlay(overlay: str, tmp_path: pathlib.Path) -> None:
    wanted = source.overlay(overlay)
    namespaces = {each["metadata"].get("namespace") for each in wanted} - {None}
    found = CHART.objects(CI[overlay], namespace=namespaces.pop())
    checksum = source.one(found, "DaemonSet")["spec"]["template"]["metadata"].pop("annotations")
    assert checksum.keys() == {"checksum/config"}
    ours = keyed(without_suffix(found))
    # A namespace is there before its release is.
    theirs = as_helm_has_it(without_suffix([each for each in wanted if each["kind"] != "Namespace"]))
    our_files, their_files = (each[("ConfigMap", "lbproxy")].pop("data") for each in (ours, theirs))
    assert ours == theirs
    assert our_files.keys() == their_files.keys()
    assert yaml.safe_load(our_files["kubeconfig.conf"]) == yaml.safe_load(their_files["kubeconfig.conf"])
    assert settled(our_files["config.conf"], tmp_path) == settled(their_files["config.conf"], tmp_path)


def settled(text: str, folder: pathlib.Path) -> config.Config:
    """What the agent makes of a config.conf."""
    path = folder / "config.conf"
    path.write_text(text)
    parser = config_flags.Parser()
    config_flags.add_to(parser)
    texts = config_flags.texts(parser.parse_args([f"--config={path}"]))
    return loading.load(texts, loading.Host("here", "")).config


def test_the_default_configuration_is_the_overlays_to_the_letter() -> None:
    ours = source.one(CHART.objects(CI["default"]), "ConfigMap")["data"]["config.conf"]
    theirs = source.one(source.overlay("default"), "ConfigMap")["data"]["config.conf"]
    assert list(yaml.safe_load_all(ours)) == list(yaml.safe_load_all(theirs))


def test_it_renders_the_objects_that_clean_up() -> None:
    assert keyed(CHART.objects(CI["cleanup"])) == as_helm_has_it(source.cleanup())


def test_it_renders_the_objects_that_watch() -> None:
    ours, agents = (keyed(without_suffix(CHART.objects(CI[name]))) for name in ("monitoring", "default"))
    assert {name: found for name, found in ours.items() if name not in agents} == as_helm_has_it(
        source.monitoring()
    )


# --- what is rendered is good ---


@every_values
@pytest.mark.parametrize("version", [schema.OLDEST, schema.NEWEST])
def test_kubernetes_knows_every_field(values: helming.Values, version: str) -> None:
    for found in CHART.objects(values):
        if found["kind"] not in OPERATOR_KINDS:
            kubernetes_validate.validate(found, version, strict=True)


@every_values
def test_the_agent_takes_what_is_rendered_without_a_word(
    values: helming.Values, tmp_path: pathlib.Path
) -> None:
    maps = [each for each in CHART.objects(values) if "config.conf" in each.get("data", {})]
    for found in maps:
        assert settled(found["data"]["config.conf"], tmp_path).warnings == ()
    assert len(maps) == ("cleanup" not in values)


@every_values
def test_what_is_rendered_finds_each_other(values: helming.Values) -> None:
    objects = CHART.objects(values, "release", "somewhere")
    assert {each["metadata"].get("namespace") for each in objects} - {None} == {
        values.get("namespaceOverride", "somewhere")
    }
    template = source.one(objects, "DaemonSet")["spec"]["template"]
    selector = source.one(objects, "DaemonSet")["spec"]["selector"]["matchLabels"]
    assert selector.items() <= template["metadata"]["labels"].items()
    config_maps = {each["metadata"]["name"] for each in objects if each["kind"] == "ConfigMap"}
    volumes = {each["name"]: each for each in template["spec"]["volumes"]}
    if "config" in volumes:
        assert volumes["config"]["configMap"]["name"] in config_maps
    for each in kustomizing.containers({"spec": {"template": template}}):
        assert {mount["name"] for mount in each.get("volumeMounts", [])} <= volumes.keys()
    for kind in ("ClusterRoleBinding", "ServiceAccount"):
        for each in (one for one in objects if one["kind"] == kind):
            subject = each["subjects"][0] if kind == "ClusterRoleBinding" else each["metadata"]
            assert subject["name"] == template["spec"]["serviceAccountName"]
            assert subject["namespace"] == "somewhere"


def test_the_notes_say_what_is_next() -> None:
    notes = {name: CHART.render(values, "proxy", "net")["NOTES.txt"] for name, values in CI.items()}
    assert "kubectl -n net rollout status daemonset lbproxy\n" in notes["default"]
    assert "helm -n net upgrade proxy CHART -f values.yaml --set cleanup.enabled=true" in notes["default"]
    assert "lbproxy.io/trial: " in notes["trial"]
    assert "kube-proxy has to be gone" in notes["default"]
    assert "kube-proxy has to be gone" not in notes["trial"] + notes["migrate"]
    assert "\n  lbproxy migrate cluster\n" in notes["migrate"]
    by_hand = with_values("affinity", _AFFINITY) | {"config": {"lbproxy": {"takeOver": "when-told"}}}
    assert "kube-proxy has to be gone" not in CHART.render(by_hand)["NOTES.txt"]
    without_label = with_values("config.lbproxy.takeOver", "when-told")
    assert "kube-proxy has to be gone" in CHART.render(without_label)["NOTES.txt"]
    assert "kubectl label namespace net pod-security.kubernetes.io/enforce=privileged" in notes["hostile"]
    assert "kubectl label" not in CHART.render(CI["hostile"])["NOTES.txt"]  # kube-system has what it needs
    assert "rollout status daemonset lbproxy-cleanup\n  helm -n net uninstall proxy" in notes["cleanup"]
    assert (
        "clusterCIDR is not set" in CHART.render(with_values("config.kubeProxy.clusterCIDR", ""))["NOTES.txt"]
    )
    assert "clusterCIDR is not set" not in notes["default"]


def test_kube_proxys_own_configuration_may_be_pasted(tmp_path: pathlib.Path) -> None:
    pasted = yaml.safe_load(KUBEADM)
    pasted["clientConnection"]["kubeconfig"] = "/etc/lbproxy/kubeconfig.conf"
    found = rendered("config.kubeProxy", pasted, "ConfigMap")["data"]["config.conf"]
    ours, theirs = settled(found, tmp_path), settled(yaml.safe_dump(pasted), tmp_path)
    assert dataclasses.replace(ours, ignored=()) == dataclasses.replace(theirs, ignored=())


# --- what values do ---

_MASTERS: typing.Final = [{"operator": "Exists", "effect": "NoSchedule"}]
_AFFINITY: typing.Final[helming.Values] = {
    "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": []}
}
_NODES: typing.Final[helming.Values] = {
    "nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [{"key": "a", "operator": "Exists"}]}]
        }
    }
}
_POD: typing.Final[Mapping[str, tuple[object, str, object]]] = {
    "imagePullSecrets": ([{"name": "a"}], "imagePullSecrets", [{"name": "a"}]),
    "priorityClassName": ("mine", "priorityClassName", "mine"),
    "tolerations": (_MASTERS, "tolerations", _MASTERS),
    "affinity": (_AFFINITY, "affinity", _AFFINITY),
    "terminationGracePeriodSeconds": (1000000, "terminationGracePeriodSeconds", 1000000),
    "nodeSelector": ({"a": "1"}, "nodeSelector", {"kubernetes.io/os": "linux", "a": "1"}),
    "serviceAccount.name": ("other", "serviceAccountName", "other"),
}
_CONTAINER: typing.Final[Mapping[str, tuple[object, str, object]]] = {
    "image.repository": ("r.example/x", "image", f"r.example/x:{lbproxy.__version__}"),
    "image.tag": ("1.0", "image", "lbproxy:1.0"),
    "image.digest": (f"sha256:{'a' * 64}", "image", f"lbproxy@sha256:{'a' * 64}"),
    "image.pullPolicy": ("Never", "imagePullPolicy", "Never"),
    "resources": (
        {"limits": {"memory": "1Gi"}},
        "resources",
        {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "1Gi"}},
    ),
}


@pytest.mark.parametrize("path", _POD)
def test_a_value_is_in_the_pod(path: str) -> None:
    value, field, wanted = _POD[path]
    assert pod(path, value)[field] == wanted


@pytest.mark.parametrize("path", _CONTAINER)
def test_a_value_is_in_the_container(path: str) -> None:
    value, field, wanted = _CONTAINER[path]
    assert container(path, value)[field] == wanted


def test_null_takes_a_default_away() -> None:
    assert pod("tolerations", None)["tolerations"] is None
    assert pod("nodeSelector", {"kubernetes.io/os": None})["nodeSelector"] == {}
    found = rendered("config.lbproxy", None, "ConfigMap")
    assert found["data"]["config.conf"].endswith("kind: LbproxyConfiguration\n")


def test_labels_and_annotations_are_where_they_belong() -> None:
    values = CI["everything"] | {"rbac": {"create": True}, "serviceAccount": {"annotations": {"a": "b"}}}
    objects = CHART.objects(values)
    for each in objects:
        assert each["metadata"]["labels"]["example.org/team"] == "net"
        assert each["metadata"]["annotations"]["example.org/contact"] == "yes"
    assert source.one(objects, "ServiceAccount")["metadata"]["annotations"]["a"] == "b"
    metadata = source.one(objects, "DaemonSet")["spec"]["template"]["metadata"]
    assert metadata["labels"] == {"app.kubernetes.io/name": "lbproxy", "example.org/tier": "node"}
    assert metadata["annotations"]["example.org/port"] == "10249"


def test_a_change_of_the_configuration_rolls_the_pods_and_no_other_change_does() -> None:
    def version(path: str, value: object) -> tuple[str, str]:
        template = rendered(path, value)["spec"]["template"]
        names = [each["configMap"]["name"] for each in template["spec"]["volumes"] if "configMap" in each]
        return template["metadata"]["annotations"]["checksum/config"], names[0]

    before = version("image.tag", "1")
    assert version("image.tag", "2") == before
    changed = [
        version("config.lbproxy.algorithm", "maglev"),
        version("config.kubeProxy.clusterCIDR", "10.1.0.0/16"),
        version("apiServer.server", "https://192.0.2.1"),
        version("trial.enabled", True),
    ]
    assert len({before, *changed}) == 5
    assert all(name == f"lbproxy-{checksum[:10]}" for checksum, name in changed)


@pytest.mark.parametrize(
    ("field", "address", "port"),
    [
        ("healthz", "[::]:20256", 20256),
        ("metrics", "0.0.0.0:9", 9),
        ("healthz", "", 10256),
        ("metrics", None, 10249),
    ],
)
def test_ports_follow_the_configuration(field: str, address: str | None, port: int) -> None:
    found = container(f"config.kubeProxy.{field}BindAddress", address)
    ports = {each["name"]: (each["containerPort"], each["hostPort"]) for each in found["ports"]}
    assert ports[field] == (port, port)


def test_rights_are_made_only_where_wanted() -> None:
    def kinds(path: str) -> set[str]:
        return {each["kind"] for each in CHART.objects(with_values(path, False))}

    everything = {each["kind"] for each in CHART.objects(CI["default"])}
    assert everything - kinds("rbac.create") == {"ClusterRole", "ClusterRoleBinding"}
    assert everything - kinds("serviceAccount.create") == {"ServiceAccount"}


def test_without_events_the_role_has_no_right_to_write_any() -> None:
    assert "create" in str(rendered("config.lbproxy.events", True, "ClusterRole")["rules"])
    assert "create" not in str(rendered("config.lbproxy.events", False, "ClusterRole")["rules"])


def test_hostile_settings_one_by_one() -> None:
    def hostile(path: str, value: object, namespace: str = "net") -> list[helming.Values]:
        return CHART.objects(with_values(f"hostile.{path}", value, "hostile"), namespace=namespace)

    assert "initContainers" not in kustomizing.pod(source.one(hostile("load.enabled", False), "DaemonSet"))
    assert "ResourceQuota" not in {each["kind"] for each in hostile("resourceQuota", False)}
    # There it would bound the pods of others.
    assert "ResourceQuota" not in {each["kind"] for each in hostile("enabled", True, "kube-system")}
    spec = kustomizing.pod(source.one(hostile("appArmorProfile", None), "DaemonSet"))
    assert "appArmorProfile" not in spec["securityContext"]


def test_the_links_of_alerts_lead_where_people_read() -> None:
    values = with_values("monitoring.prometheusRule.runbook", "https://wiki.example/x", "monitoring")
    (group,) = source.one(CHART.objects(values), "PrometheusRule")["spec"]["groups"]
    links = [rule["annotations"]["runbook_url"] for rule in group["rules"]]
    assert links
    assert all(link.startswith("https://wiki.example/x#lbproxy") for link in links)


# --- what is refused ---


def test_without_an_api_server_or_an_image_it_says_what_is_missing() -> None:
    with pytest.raises(
        helming.ChartError, match=r"apiServer\.server is needed.*/etc/kubernetes/kubelet\.conf"
    ):
        CHART.render(with_values("apiServer.server", ""))
    for name in ("default", "cleanup"):
        with pytest.raises(helming.ChartError, match=r"image\.repository is needed"):
            CHART.render(with_values("image.repository", "", name))


@pytest.mark.parametrize(
    ("server", "refused"),
    [
        ("https://kubernetes.default.svc", True),
        ("https://kubernetes.default.svc.cluster.local:443/", True),
        ("https://kubernetes.default:6443", True),
        ("https://kubernetes", True),
        ("https://kubernetes.example.org:6443", False),
        ("https://kubernetes-api:6443", False),
        ("https://[fd00::1]:6443", False),
    ],
)
def test_the_service_that_lbproxy_has_to_make_work_is_no_api_server_for_it(
    server: str, refused: bool
) -> None:
    values = with_values("apiServer.server", server)
    if refused:
        with pytest.raises(helming.ChartError, match="answers only once lbproxy runs"):
            CHART.render(values)
    else:
        CHART.render(values)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (
            "127.0.0.1:10256",
            r"^config\.kubeProxy\.healthzBindAddress: the kubelet asks at the node's address",
        ),
        ("[::1]:10256", "Set it to 0.0.0.0"),
        ("0.0.0.0:10249", r"^config\.kubeProxy: .* the same port, 10249"),
    ],
)
def test_what_the_kubelet_can_not_ask_is_refused(address: str, said: str) -> None:
    with pytest.raises(helming.ChartError, match=said):
        CHART.render(with_values("config.kubeProxy.healthzBindAddress", address))
    trial = with_values("trial.config.kubeProxy.healthzBindAddress", "127.0.0.1:10356", "trial")
    with pytest.raises(helming.ChartError, match=r"^trial\.config\.kubeProxy\.healthzBindAddress"):
        CHART.render(trial)


def test_a_migration_has_its_own_nodes() -> None:
    with pytest.raises(helming.ChartError, match="not in a trial"):
        CHART.render(with_values("trial.enabled", True, "migrate"))
    with pytest.raises(helming.ChartError, match="Choose among them by nodeSelector"):
        CHART.render(with_values("affinity", _NODES, "migrate"))
    found = CHART.objects(with_values("affinity", _AFFINITY, "migrate"))
    assert kustomizing.pod(source.one(found, "DaemonSet"))["affinity"].keys() == {
        "nodeAffinity", "podAntiAffinity",
    }  # fmt: skip
    # Whoever cleans up goes to every node.
    cleaning = CHART.objects(with_values("cleanup.enabled", True, "migrate"))
    assert keyed(cleaning) == keyed(CHART.objects(CI["cleanup"]))


@pytest.mark.parametrize("address", ["127.0.0.1:10249", "[::1]:10249", None])
def test_agents_that_prometheus_can_not_reach_are_not_to_be_scraped(address: str | None) -> None:
    values = with_values("config.kubeProxy.metricsBindAddress", address, "monitoring")
    with pytest.raises(helming.ChartError, match=r"Set config\.kubeProxy\.metricsBindAddress"):
        CHART.render(values)


REFUSED: typing.Final[list[tuple[str, object, str]]] = [
    ("imge", {}, "'imge' was unexpected"),
    ("image.tag", 1.2, "at '/image/tag': 1.2 is not of type 'string'"),
    ("image.digest", "sha256:12", "at '/image/digest'"),
    ("image.pullPolicy", "always", r"'always' is not one of \['Always', 'IfNotPresent', 'Never'\]"),
    ("imagePullSecrets", ["a"], "'a' is not of type 'object'"),
    ("apiServer.server", "192.0.2.1:6443", "at '/apiServer/server'"),
    ("config.kubeProxy.clusterCidr", "10.0.0.0/8", "'clusterCidr' was unexpected"),
    ("config.kubeProxy.clusterCIDR", "10.0.0.0", "at '/config/kubeProxy/clusterCIDR'"),
    ("config.kubeProxy.clusterCIDR", "10.0.0.0/33", "at '/config/kubeProxy/clusterCIDR'"),
    ("config.kubeProxy.clusterCIDR", "fd00::/129", "at '/config/kubeProxy/clusterCIDR'"),
    ("config.kubeProxy.clusterCIDR", "10.0.0.0/8,10.1.0.0/16", "at '/config/kubeProxy/clusterCIDR'"),
    ("config.kubeProxy.clusterCIDR", "fd00::/56, fd01::/56", "at '/config/kubeProxy/clusterCIDR'"),
    ("config.kubeProxy.metricsBindAddress", "0.0.0.0", "at '/config/kubeProxy/metricsBindAddress'"),
    ("config.kubeProxy.clientConnection", {"kubeconfig": "/x"}, "'/etc/lbproxy/kubeconfig.conf' was"),
    ("config.kubeProxy.mode", "userspace", "at '/config/kubeProxy/mode'"),
    ("config.kubeProxy.oomScoreAdj", -1001, "less than the minimum of -1000"),
    ("config.kubeProxy.iptables", {"syncPeriod": "30"}, "at '/config/kubeProxy/iptables/syncPeriod'"),
    ("config.lbproxy.algorithm", "maglef", "'random', 'maglev', 'least-connections'"),
    ("config.lbproxy.maps", {"frontend": 1}, "'frontend' was unexpected"),
    ("config.lbproxy.maps", {"sockets": 1000}, "1000 is not one of"),
    ("config.lbproxy.cgroup", "/sys/fs/cgroup", "'/host/cgroup' was expected"),
    ("config.lbproxy.bpffs", "/sys/fs/bpf/x", "'/host/bpf/lbproxy' was expected"),
    ("config.lbproxy.healthz", False, "True was expected"),
    ("config.lbproxy.xdp", True, "True is not one of .*'native', 'generic', 'off'"),
    ("trial.enabled", "yes", "'yes' is not of type 'boolean'"),
    ("trial.config.lbproxy.packetpath", False, "'packetpath' was unexpected"),
    ("hostile.capabilities", {"ad": []}, "'ad' was unexpected"),
    ("monitoring.podMonitor.interval", "30", "at '/monitoring/podMonitor/interval'"),
    ("resources", {"request": {}}, "'request' was unexpected"),
    ("tolerations", [{"operater": "Exists"}], "at '/tolerations/0'.*'operater' was unexpected"),
    ("updateStrategy", {"rollingUpdate": {"maxunavailable": 1}}, "'maxunavailable' was unexpected"),
    ("affinity", {"nodeAffinty": {}}, "'nodeAffinty' was unexpected"),
    ("nodeSelector", {"a": True}, "True is not of type 'string'"),
    ("podSecurityContext", {"appArmor": {}}, "'appArmor' was unexpected"),
    ("extraVolumes", [{"configMap": {"name": "x"}}], "'name' is a required property"),
    ("extraVolumes", [{"name": "bpffs"}], "at '/extraVolumes/0/name'"),
    ("extraVolumeMounts", [{"name": "x", "path": "/x"}], "'path' was unexpected"),
    ("minReadySeconds", -1, "less than the minimum of 0"),
    ("commonLabels", {"app.kubernetes.io/name": "x"}, "False schema does not allow 'x'"),
    ("podLabels", {"app.kubernetes.io/name": "x"}, "False schema does not allow 'x'"),
    ("fullnameOverride", "Upper", "at '/fullnameOverride'"),
]


@pytest.mark.parametrize(("path", "value", "said"), REFUSED)
def test_a_wrong_value_is_refused_by_name(path: str, value: object, said: str) -> None:
    with pytest.raises(helming.ChartError, match=said):
        CHART.values(with_values(path, value))


def test_defaults_but_for_the_api_server_are_in_order() -> None:
    CHART.values({})


# --- the agent's settings ---

_FIELDS: typing.Final = {
    **{("kubeProxy", field): option for field, option in config_file.kube_schema().items()},
    **{("lbproxy", field): option for field, option in config_file.own_schema().items()},
}
# Where the chart decides, or has to know more than the agent does.
_EXCEPTIONS: typing.Final = {
    ("kubeProxy", "clientConnection.kubeconfig"), ("kubeProxy", "hostnameOverride"),
    ("kubeProxy", "clusterCIDR"), ("kubeProxy", "healthzBindAddress"), ("kubeProxy", "metricsBindAddress"),
    ("lbproxy", "manifests"), ("lbproxy", "cgroup"), ("lbproxy", "bpffs"), ("lbproxy", "healthz"),
}  # fmt: skip


@pytest.mark.parametrize(("document", "field"), _FIELDS, ids=".".join)
def test_every_setting_of_the_agent_is_a_value(document: str, field: str) -> None:
    option = _FIELDS[document, field]
    value = option.type.encode(option.type.parse(option.default))
    if (document, field) not in _EXCEPTIONS and value is not None:
        CHART.values(with_values(f"config.{document}.{field}", value))
    with pytest.raises(helming.ChartError, match="was unexpected"):
        CHART.values(with_values(f"config.{document}.{field}x", value))


def test_what_is_said_of_a_field_holds_in_a_file() -> None:
    """Empty disables a server as a flag only."""
    option = config_file.kube_schema()["healthzBindAddress"]
    assert '"" disables' in config_flags.describe(option)
    told = CHART.schema["definitions"]["KubeProxyConfiguration"]["properties"]["healthzBindAddress"]
    for text in (told["description"], (source.CHART / "values.yaml").read_text()):
        assert "disables;" not in text
        assert '"" is the default' in text


# --- as `helm lint` looks at it ---


def test_the_chart_says_what_it_is() -> None:
    about = CHART.about
    assert about["apiVersion"] == "v2"
    assert about["type"] == "application"
    assert about["name"] == source.CHART.name
    assert about["version"] == about["appVersion"] == lbproxy.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(-[\w.]+)?(\+[\w.]+)?", about["version"])
    assert about["kubeVersion"] == f">={schema.OLDEST}.0-0"
    assert about["description"]


def test_templates_use_every_value_and_no_other() -> None:
    used: set[str] = set()
    for path in (source.CHART / "templates").iterdir():
        text = path.read_text()
        assert "\t" not in text
        used |= set(re.findall(r"\.Values((?:\.\w+)+)", text))
    known = {f".{'.'.join(path)}" for path in _paths(CHART.defaults)}
    assert {path for path in used if path not in known} == set()
    leaves = {path for path in known if not any(other.startswith(f"{path}.") for other in known)}
    unused = {path for path in leaves if not any(path == one or path.startswith(f"{one}.") for one in used)}
    assert unused == set()


def _paths(values: Mapping[str, typing.Any], above: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for key, value in values.items():
        found.add((*above, key))
        if isinstance(value, dict):
            found |= _paths(value, (*above, key))
    return found


def test_every_value_is_in_the_readme_and_in_the_schema() -> None:
    page = (source.CHART / "README.md").read_text()
    named = re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)
    for path in named:
        place: typing.Any = CHART.schema
        for part in path.split("."):
            place = place["properties"][part]
    leaves = {".".join(path) for path in _paths(CHART.defaults)}
    assert {
        path
        for path in leaves
        if not any(path == one or one.startswith(f"{path}.") or path.startswith(f"{one}.") for one in named)
    } == set()


def test_everything_is_another_than_its_default() -> None:
    values, defaults = CHART.values(CI["everything"]), CHART.values({})
    page = (source.CHART / "README.md").read_text()
    for path in re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE):
        ours, theirs = values, defaults
        for part in path.split("."):
            ours, theirs = ours[part], theirs[part]
        assert (ours != theirs) == (path not in ("cleanup.enabled", "migrate.enabled")), path
