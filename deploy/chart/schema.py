"""JSON Schema of values: what the agent's settings take, and what Kubernetes' own fields do."""

import json
import typing
from collections.abc import Mapping

import kubernetes_validate.utils

from deploy.chart import source
from lbproxy.config import config_file
from lbproxy.config.options import Option

Schema = dict[str, typing.Any]

# Draft 7 is what all versions of helm read.
DIALECT: typing.Final = "http://json-schema.org/draft-07/schema#"
OLDEST, NEWEST = "1.30", "1.37"  # of Kubernetes; tests hold every object against both

TEXT: typing.Final = {"type": "string"}
FLAG: typing.Final = {"type": "boolean"}
NAME: typing.Final = {"type": "string", "pattern": "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$", "maxLength": 253}
DURATION: typing.Final = {"type": "string", "pattern": "^([0-9]+(ms|s|m|h))+$"}


def whole(low: int, high: int = 2**31 - 1) -> Schema:
    """A whole number."""
    return {"type": "integer", "minimum": low, "maximum": high}


def one_of(*names: str) -> Schema:
    """One of a few strings."""
    return {"enum": [*names]}


def texts(*reserved: str) -> Schema:
    """Labels or annotations: values are strings. Some names are the chart's own."""
    schema: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
    return schema | {"properties": dict.fromkeys(reserved, False)} if reserved else schema


def group(properties: Mapping[str, Schema]) -> Schema:
    """A mapping with these keys and no others."""
    return {"type": "object", "additionalProperties": False, "properties": dict(properties)}


# --- the agent's settings ---


def settings(fields: Mapping[str, Option], exceptions: Mapping[str, Schema]) -> Schema:
    """All fields of one kind of document; in some places the chart itself decides."""
    root = group({})
    assert exceptions.keys() <= fields.keys(), sorted(exceptions.keys() - fields.keys())
    for field, option in fields.items():
        *parents, last = field.split(".")
        place = root
        for parent in parents:
            place = place["properties"].setdefault(parent, group({}))
        known = {**option.type.schema, **exceptions.get(field, {})}
        place["properties"][last] = {**_described(option), **_or_unset(known)}
    return root


def is_decided(schema: Schema) -> bool:
    """Whether the chart leaves a setting no choice."""
    return "const" in schema or not {*schema.get("enum", [0])} - {"", None}


def _or_unset(schema: Schema) -> Schema:
    """Take null and "" as well: in a file both mean the default, and kubeadm writes them for completeness."""
    found = dict(schema)
    if "enum" in found:
        found["enum"] = list(dict.fromkeys([*found["enum"], "", None]))
    kinds = [found["type"]] if isinstance(found.get("type"), str) else found.get("type", [])
    if kinds:
        found["type"] = [*kinds, "null"]
    if "pattern" in found:
        found["pattern"] = f"^$|{found['pattern']}"
    return found


def _described(option: Option) -> Schema:
    return {
        "description": f"without effect: {option.no_effect}" if option.no_effect else option.help_of_field
    }


def kube_proxy_settings() -> Schema:
    """The fields of KubeProxyConfiguration, as far as a chart leaves them to its user."""
    path = source.settings("default")[0]["clientConnection"]["kubeconfig"]
    # The ports of the pod are read from these. Without a port, the template would not know which.
    listen = {"pattern": r"^([0-9]+(\.[0-9]+){3}|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}$"}
    ipv4 = r"[0-9]+(\.[0-9]+){3}/([12]?[0-9]|3[0-2])"
    ipv6 = "[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*/([1-9]?[0-9]|1[01][0-9]|12[0-8])"
    exceptions: dict[str, Schema] = {
        "clientConnection.kubeconfig": {"const": path},
        "hostnameOverride": {"enum": [""]},  # each node has a name of its own
        "healthzBindAddress": listen,
        "metricsBindAddress": listen,
        "clusterCIDR": {"pattern": f"^({ipv4}( *, *{ipv6})?|{ipv6}( *, *{ipv4})?)?$"},
    }
    return _named(settings(config_file.kube_schema(), exceptions), config_file.KUBE_PROXY)


def own_settings() -> Schema:
    """The fields of LbproxyConfiguration, likewise."""
    exceptions: dict[str, Schema] = {
        "manifests": {"enum": [""]},
        "cgroup": {"const": source.flag("--cgroup")},
        "bpffs": {"const": source.flag("--bpffs")},
        "healthz": {"const": True},  # the kubelet asks there
    }
    return _named(settings(config_file.own_schema(), exceptions), config_file.LBPROXY)


def _named(schema: Schema, kind: tuple[str, str]) -> Schema:
    """A whole document may be pasted: what says its kind may stand in it."""
    schema["properties"] |= {"apiVersion": {"const": kind[0]}, "kind": {"const": kind[1]}}
    return schema


# --- Kubernetes' own fields ---


class Kubernetes:
    """Definitions of Kubernetes' fields, each once, with whatever they refer to."""

    def __init__(self) -> None:
        path = f"kubernetes-json-schema/v{NEWEST}.0-local-strict/_definitions.json"
        self._known = kubernetes_validate.utils.schema_contents(path, NEWEST)["$defs"]
        self.definitions: dict[str, Schema] = {}

    def __call__(self, name: str) -> Schema:
        """Refer to a type by its name, e.g. `core.v1.Toleration`."""
        return self._refer(f"io.k8s.api.{name}")

    def _refer(self, name: str) -> Schema:
        short = name.rpartition(".")[2]
        if short not in self.definitions:
            self.definitions[short] = {}  # for those that refer to themselves
            self.definitions[short] = self._told(self._known[name])
        return {"$ref": f"#/definitions/{short}"}

    def _told(self, schema: typing.Any) -> typing.Any:
        """A definition without descriptions and what is for API servers alone."""
        if isinstance(schema, list):
            return [self._told(item) for item in schema]
        if not isinstance(schema, dict):
            return schema
        if "$ref" in schema:
            return self._refer(schema["$ref"].rpartition("/")[2])
        told: Schema = {}
        for key, value in schema.items():
            if key == "properties":
                told[key] = {name: self._told(each) for name, each in value.items()}
            elif key not in ("description", "format") and not key.startswith("x-"):
                told[key] = self._told(value)
        if "properties" in told:
            told["additionalProperties"] = False
        return told


def write(schema: Schema) -> str:
    """The text of values.schema.json."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
