"""deploy/ says what is true: manifests that Kubernetes takes, flags, rights and metrics that there are."""

import asyncio
import json
import pathlib
import re
import typing
from collections.abc import Iterator, Mapping

import kubernetes_validate
import prometheus_client
import promql_parser
import pytest
import yaml

import lbproxy
from benchmarks import results
from deploy import kustomizing
from deploy.chart.schema import NEWEST, OLDEST
from lbproxy import abi
from lbproxy import cli as command
from lbproxy.config import config, loading
from lbproxy.config import flags as config_flags
from lbproxy.core import events, fill, migration, migration_plan, model
from lbproxy.kube import reflector, reports
from lbproxy.metrics import table as metrics_table

ROOT: typing.Final = pathlib.Path(__file__).parents[2]
KUSTOMIZE: typing.Final = ROOT / "deploy/kustomize"
MONITORING: typing.Final = ROOT / "deploy/monitoring"
OVERLAYS: typing.Final = sorted(path.name for path in (KUSTOMIZE / "overlays").iterdir())
# What a scrape adds: the PodMonitor says so.
TARGET_LABELS: typing.Final = {"job", "node", "instance", "pod", "container", "endpoint"}

overlays = pytest.mark.parametrize("overlay", OVERLAYS)


def build(overlay: str) -> list[kustomizing.Object]:
    return kustomizing.build(KUSTOMIZE / "overlays" / overlay)


def one(objects: list[kustomizing.Object], kind: str) -> kustomizing.Object:
    (found,) = (each for each in objects if each["kind"] == kind)
    return found


# --- manifests ---


@pytest.mark.parametrize("folder", [*(f"overlays/{name}" for name in OVERLAYS), "cleanup"])
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubernetes_knows_every_field(folder: str, version: str) -> None:
    for found in kustomizing.build(KUSTOMIZE / folder):
        kubernetes_validate.validate(found, version, strict=True)


def test_a_field_that_is_not_known_would_be_found() -> None:
    broken = one(build("default"), "DaemonSet")
    broken["spec"]["template"]["spec"]["hostNetwrok"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="hostNetwrok"):
        kubernetes_validate.validate(broken, NEWEST, strict=True)


@overlays
def test_objects_find_each_other(overlay: str) -> None:
    objects = build(overlay)
    daemon_set, account = one(objects, "DaemonSet"), one(objects, "ServiceAccount")
    template = daemon_set["spec"]["template"]
    binding = one(objects, "ClusterRoleBinding")
    namespaces = {each["metadata"].get("namespace") for each in objects} - {None}
    assert len(namespaces) == 1
    assert template["spec"]["serviceAccountName"] == account["metadata"]["name"]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": account["metadata"]["name"], "namespace": namespaces.pop()}
    ]
    assert binding["roleRef"]["name"] == one(objects, "ClusterRole")["metadata"]["name"]
    assert daemon_set["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    assert volumes["config"]["configMap"]["name"] == one(objects, "ConfigMap")["metadata"]["name"]
    for container in kustomizing.containers(daemon_set):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()


def test_the_image_is_of_this_version() -> None:
    for container in kustomizing.containers(one(build("hostile"), "DaemonSet")):
        assert container["image"] == f"lbproxy:{lbproxy.__version__}"


# --- the agent's configuration ---


@pytest.fixture(params=OVERLAYS)
def deployed(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> "Deployed":
    return Deployed(build(request.param), tmp_path)


class Deployed:
    """An overlay's pod, with its configuration as files."""

    def __init__(self, objects: list[kustomizing.Object], folder: pathlib.Path) -> None:
        self.pod = one(objects, "DaemonSet")["spec"]["template"]["spec"]
        self.data = one(objects, "ConfigMap")["data"]
        for name, text in self.data.items():
            (folder / name).write_text(text)
        self.folder = folder

    def settings(self, container: Mapping[str, typing.Any]) -> config.Config:
        """What the command line comes to, with the files in place of those in the container."""
        first, *arguments = [text.replace("/etc/lbproxy/", f"{self.folder}/") for text in container["args"]]
        assert first == "run"
        known = config_flags.Parser(prog="lbproxy")
        config_flags.add_to(known)
        parsed, extra = known.parse_known_args(arguments)
        assert extra == []
        return loading.load(config_flags.texts(parsed), loading.Host("here", "")).config

    def mounts(self, container: Mapping[str, typing.Any]) -> dict[str, str]:
        """Which folder of the node, or what else, is where in a container."""
        sources = {
            volume["name"]: volume.get("hostPath", {}).get("path", volume["name"])
            for volume in self.pod["volumes"]
        }
        return {mount["mountPath"]: sources[mount["name"]] for mount in container["volumeMounts"]}


def test_the_agent_takes_its_flags_and_files_without_a_word(deployed: Deployed) -> None:
    for container in (*deployed.pod.get("initContainers", ()), *deployed.pod["containers"]):
        settings = deployed.settings(container)
        assert settings.warnings == ()
        assert settings.ignored == ()
        assert "--node-name=$(NODE_NAME)" in container["args"]
        assert {one["name"]: one["valueFrom"]["fieldRef"]["fieldPath"] for one in container["env"]} == {
            "NODE_NAME": "spec.nodeName"
        }
        # It has to be the node's own tree, and the node's own bpffs.
        mounts = deployed.mounts(container)
        assert mounts[str(settings.cgroup)] == "/sys/fs/cgroup"
        assert mounts[str(settings.bpffs.parent)] == "/sys/fs/bpf"
        assert settings.bpffs.name == config.BPFFS.name
        assert mounts["/etc/lbproxy"] == "config"
        assert "/var/cache" in mounts
        assert container["securityContext"]["readOnlyRootFilesystem"]


def test_ports_and_paths_are_those_that_are_served(deployed: Deployed) -> None:
    (container,) = deployed.pod["containers"]
    settings = deployed.settings(container)
    assert settings.healthz_bind_address is not None
    assert settings.metrics_bind_address is not None
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {
        "healthz": settings.healthz_bind_address.port,
        "metrics": settings.metrics_bind_address.port,
    }
    assert all(port["hostPort"] == port["containerPort"] for port in container["ports"])
    # The kubelet asks the node's address.
    assert settings.healthz_bind_address.host == "0.0.0.0"
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: (probe["path"], probe["port"]) for name, probe in probes.items()} == {
        "startup": ("/livez", "healthz"),
        "liveness": ("/livez", "healthz"),
        "readiness": ("/healthz", "healthz"),
    }


def test_the_api_server_is_not_reached_through_a_service(deployed: Deployed) -> None:
    settings = deployed.settings(deployed.pod["containers"][0])
    assert settings.kubeconfig == pathlib.Path("/etc/lbproxy/kubeconfig.conf")
    kubeconfig = yaml.safe_load(deployed.data["kubeconfig.conf"])
    (cluster,), (user,) = kubeconfig["clusters"], kubeconfig["users"]
    assert cluster["cluster"]["server"].startswith("https://")
    assert "kubernetes.default" not in cluster["cluster"]["server"]
    assert user["user"] == {"tokenFile": "/var/run/secrets/kubernetes.io/serviceaccount/token"}


def test_beside_kube_proxy_no_port_of_its_is_taken(tmp_path: pathlib.Path) -> None:
    trial = Deployed(build("trial"), tmp_path)
    (container,) = trial.pod["containers"]
    ports = {port["containerPort"] for port in container["ports"]}
    assert ports.isdisjoint({config.HEALTHZ_PORT, config.METRICS_PORT})
    assert trial.pod["nodeSelector"]["lbproxy.io/trial"] == "true"
    assert not trial.settings(container).packet_path


def test_the_overlay_for_migrating_heeds_the_label_and_obeys(tmp_path: pathlib.Path) -> None:
    deployed = Deployed(build("migrate"), tmp_path)
    assert deployed.settings(deployed.pod["containers"][0]).take_over is config.TakeOver.WHEN_TOLD
    runs = {
        value: migration_plan.admits(
            deployed.pod, {"kubernetes.io/os": "linux", **({migration.LABEL: value} if value else {})}
        )
        for value in ("", "kube-proxy", migration_plan.BOTH, migration_plan.LBPROXY)
    }
    assert runs == {"": False, "kube-proxy": False, "both": True, "lbproxy": True}


def test_the_commands_in_the_image_find_what_its_agent_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    (path,) = re.findall(r"LBPROXY_BPFFS=(\S+)", dockerfile)
    (container,) = one(build("default"), "DaemonSet")["spec"]["template"]["spec"]["containers"]
    assert f"--bpffs={path}" in container["args"]
    monkeypatch.setenv("LBPROXY_BPFFS", path)
    parser, _ = command._parsers()
    assert parser.parse_args(["status"]).bpffs == pathlib.Path(path)


def test_cleanup_finds_what_the_agents_pin() -> None:
    pod = one(kustomizing.build(KUSTOMIZE / "cleanup"), "DaemonSet")["spec"]["template"]["spec"]
    agents = one(build("default"), "DaemonSet")["spec"]["template"]["spec"]
    (container,) = pod["initContainers"]
    name, *flags = container["args"]
    assert (name, set(flags) <= set(agents["containers"][0]["args"])) == ("cleanup", True)
    assert command._parsers()[0].parse_args(container["args"]).bpffs.parent == pathlib.Path("/host/bpf")
    assert container["volumeMounts"] == [{"name": "bpffs", "mountPath": "/host/bpf"}]
    assert pod["volumes"] == [volume for volume in agents["volumes"] if volume["name"] == "bpffs"]
    rights = {"cleanup": {"drop": ["ALL"], "add": ["NET_ADMIN"]}, "done": {"drop": ["ALL"]}}
    for each in kustomizing.containers({"spec": {"template": {"spec": pod}}}):
        assert each["securityContext"]["capabilities"] == rights[each["name"]]
        assert each["image"] == f"lbproxy:{lbproxy.__version__}"


# --- the image ---


def test_the_image_has_pinned_packages_and_hashes() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    locked = dict(line.split("==") for line in lock.splitlines() if "==" in line)
    names = {_normal(name): version for name, version in locked.items()}
    text = (ROOT / "deploy/requirements.txt").read_text()
    pinned = re.findall(r"^([\w.-]+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)
    assert len(pinned) == len(re.findall(r"^[\w.-]+==", text, re.MULTILINE)) > 10
    # The development environment takes a few packages from Debian, and the lock leaves those out.
    common = {name: version for name, version in pinned if _normal(name) in names}
    assert len(pinned) - len(common) <= 1
    assert all(names[_normal(name)] == version for name, version in common.items()), "run make lock"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_build_is_given_whatever_it_copies() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    given = {line[1:] for line in ignore if line.startswith("!")}
    lines = (ROOT / "deploy/Dockerfile").read_text().splitlines()
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from" not in line]
    assert {source for sources in copies for source in sources} == given
    assert all((ROOT / path).exists() for path in given)


# --- rights ---


class Posted:
    """Takes the place of a client that creates objects."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    async def post(self, path: str, body: Mapping[str, object]) -> None:
        self.paths.append(path)


async def test_the_role_is_what_the_agent_asks_for() -> None:
    asked: set[tuple[str, str, str]] = set()
    for watched in (reflector.services(), reflector.endpoint_slices(), reflector.node("here")):
        asked |= {(*_resource(watched.path), verb) for verb in ("list", "watch")}
    posted = Posted()
    told = reports.Reports(posted, "here")
    told.started()
    told.rejected(events.Rejected(events.Kind.SERVICE, events.ObjectName("default", "web"), "odd"))
    told.health_check_failed(model.ServiceName("default", "web"), 30000, "taken")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await told.run()
    assert len(posted.paths) == 3
    asked |= {(*_resource(path), "create") for path in posted.paths}
    allowed = {
        (group, resource, verb)
        for rule in one(build("default"), "ClusterRole")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert allowed == asked


def _resource(path: str) -> tuple[str, str]:
    """The API group and the resource of a URL's path."""
    match = re.fullmatch(r"/(?:api|apis/([^/]+))/v1/(?:namespaces/[^/]+/)?(\w+)", path)
    assert match is not None, path
    return match[1] or "", match[2]


@overlays
def test_no_container_is_privileged_and_each_says_which_rights_it_has(overlay: str) -> None:
    pod = one(build(overlay), "DaemonSet")["spec"]["template"]["spec"]
    assert not pod.get("hostPID")
    assert not pod.get("hostIPC")
    for container in (*pod.get("initContainers", ()), *pod["containers"]):
        context = container["securityContext"]
        assert context["privileged"] is False
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"]["drop"] == ["ALL"]
    rights = {each["name"]: set(each["securityContext"]["capabilities"]["add"]) for each in pod["containers"]}
    least = {"BPF", "PERFMON", "NET_ADMIN"}
    assert rights == {"lbproxy": least if overlay == "hostile" else least | {"SYS_ADMIN"}}
    # Only privileged containers may have mounts of theirs seen by the node.
    mounts = [mount for each in pod["containers"] for mount in each["volumeMounts"]]
    assert {mount.get("mountPropagation") for mount in mounts} <= {None, "HostToContainer"}


# --- what is watched ---


def rules() -> list[kustomizing.Object]:
    (group,) = one(kustomizing.build(MONITORING), "PrometheusRule")["spec"]["groups"]
    found: list[kustomizing.Object] = group["rules"]
    return found


def dashboard() -> kustomizing.Object:
    made = one(kustomizing.build(MONITORING), "ConfigMap")
    found: kustomizing.Object = json.loads(made["data"]["dashboard.json"])
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """Every PromQL expression, with where it is from."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"].replace("$__rate_interval", "5m").replace("$node", ".*")


def known_series() -> dict[str, set[str]]:
    """The labels of every series that /metrics serves, by name, as Prometheus stores it."""
    found: dict[str, set[str]] = {"up": set()}
    for definition in metrics_table.TABLE:
        labels = set(definition.labels)
        if definition.type is metrics_table.Type.HISTOGRAM:
            found |= {f"{definition.name}_{part}": labels for part in ("count", "sum")}
            found[f"{definition.name}_bucket"] = labels | {"le"}
        else:
            found[definition.name] = labels
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.ProcessCollector(registry=registry)
    found |= {sample.name: set() for family in registry.collect() for sample in family.samples}
    return found


def problems(expression: str) -> list[str]:
    """What an expression names that there is not."""
    known = known_series()
    found: list[str] = []
    names: set[str] = set()
    grouped: set[str] = set()

    def visit(node: typing.Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            assert node.name is not None, "a selector without a name"
            names.add(node.name)
            if node.name not in known:
                found.append(f"no metric {node.name}")
                return
            for matcher in node.matchers.matchers:
                if matcher.name not in known[node.name] | TARGET_LABELS:
                    found.append(f"no label {matcher.name} of {node.name}")
                found.extend(_strange_values(matcher))
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            grouped.update(node.modifier.labels)

    _walk(promql_parser.parse(expression), visit)
    labels = set().union(*(known.get(name, set()) for name in names)) | TARGET_LABELS
    return [*found, *(f"no label {label}" for label in grouped - labels)]


def _walk(node: typing.Any, visit: typing.Callable[[typing.Any], None]) -> None:
    visit(node)
    for name in ("lhs", "rhs", "expr", "param", "args", "vector_selector", "vs"):
        below = getattr(node, name, None)
        for each in below if isinstance(below, list) else [below]:
            if each is not None and not isinstance(each, str):
                _walk(each, visit)


def _strange_values(matcher: typing.Any) -> Iterator[str]:
    values = {"event": set(metrics_table.EVENTS), "map": set(abi.MAPS), "job": {"lbproxy"}}
    known = values.get(matcher.name)
    if known is not None and not set(matcher.value.split("|")) <= known:
        yield f"no {matcher.name} {matcher.value}"


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_expression_names_what_is_served(where: str, expression: str) -> None:
    assert problems(expression) == []


def test_a_name_that_is_not_served_would_be_found() -> None:
    assert problems("sum by (nodes) (rate(lbproxy_flow[5m]))") == ["no metric lbproxy_flow", "no label nodes"]
    assert problems('lbproxy_flows{colour="red"} > 1') == ["no label colour of lbproxy_flows"]
    event = 'histogram_quantile(0.9, increase(lbproxy_datapath_events_total{event="none"}[5m]))'
    assert problems(event) == ["no event none"]
    with pytest.raises(ValueError, match="unclosed"):
        promql_parser.parse("sum(lbproxy_flows")


def test_every_map_that_must_not_fill_is_watched() -> None:
    (expression,) = (rule["expr"] for rule in rules() if rule["alert"] == "LbproxyMapNearlyFull")
    watched = "|".join(re.findall(r'map=~"([^"]+)"', expression)).split("|")
    assert sorted(watched) == sorted(fill.MUST_NOT_FILL)
    assert f"> {fill.WARN_AT}" in expression


def test_every_alert_has_its_section_in_the_runbook() -> None:
    page = (ROOT / "docs/runbook.md").read_text()
    headings = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## Lbproxy")]
    assert headings == [rule["alert"] for rule in rules()]
    for rule in rules():
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"].keys() == {"severity"}
    for section in page.split("\n## Lbproxy")[1:]:
        name, _, text = section.partition("\n")
        for part in ("**It means**", "**Look**", "**Do**"):
            assert part in text, f"Lbproxy{name} lacks {part}"


def test_what_alerts_say_names_labels_that_their_series_have() -> None:
    known = known_series()
    for rule in rules():
        names = {name for name in known if re.search(rf"\b{name}\b", rule["expr"])}
        labels = set().union(*(known[name] for name in names)) | TARGET_LABELS
        said = " ".join(rule["annotations"].values())
        assert set(re.findall(r"\$labels\.(\w+)", said)) <= labels, rule["alert"]


@pytest.mark.parametrize("overlay", ["default", "hostile"])
def test_memory_that_is_asked_for_is_what_was_measured(overlay: str) -> None:
    """For 10,000 services; not so much that nodes would be kept from other pods for nothing."""
    found = results.read(results.DIRECTORY / "full.json")
    measured = next(each for each in found.memory if (each.contestant, each.services) == ("lbproxy", 10_000))
    needed = measured.rss_peak + measured.programs + sum(measured.maps.values())
    (container,) = one(build(overlay), "DaemonSet")["spec"]["template"]["spec"]["containers"]
    number, unit = re.fullmatch(r"(\d+)(Mi)", container["resources"]["requests"]["memory"]).groups()  # type: ignore[union-attr]
    assert unit == "Mi"
    assert needed <= int(number) << 20 <= 1.5 * needed


def test_the_agents_are_scraped_as_alerts_know_them() -> None:
    monitor = one(kustomizing.build(MONITORING), "PodMonitor")["spec"]
    daemon_set = one(build("default"), "DaemonSet")["spec"]["template"]
    labels = daemon_set["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert labels[monitor["jobLabel"]] == "lbproxy"
    (endpoint,) = monitor["podMetricsEndpoints"]
    ports = {port["name"] for port in daemon_set["spec"]["containers"][0]["ports"]}
    assert endpoint["port"] in ports
    assert endpoint["honorLabels"] is True
    assert [one["targetLabel"] for one in endpoint["relabelings"]] == ["node"]


def test_the_dashboard_is_whole() -> None:
    found = dashboard()
    panels = found["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        columns, lines = (range(at[start], at[start] + at[size]) for start, size in ("xw", "yh"))
        covered = {(x, y) for x in columns for y in lines}
        assert places.isdisjoint(covered), f"{panel['title']} lies on another panel"
        places |= covered
        for target in panel.get("targets", ()):
            assert 'job="lbproxy", node=~"$node"' in target["expr"]
