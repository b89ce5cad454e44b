"""Write the settings in effect as a configuration file that reads back to the same ones."""

import dataclasses
import typing

import yaml

from lbproxy.config import config_file, loading
from lbproxy.config.kube_proxy_options import OPTIONS
from lbproxy.config.options import Option


def render(loaded: loading.Loaded) -> str:
    """Render both documents; what has no effect is left out unless it was set.

    What has no field is not in them: the URL of the API server, and the host's
    name and cgroup mount where those were taken for want of a setting.
    """
    documents = (_document(config_file.KUBE_PROXY), _document(config_file.LBPROXY))
    for option in OPTIONS:
        setting = loaded.settings[option.name]
        if option.no_effect and setting.place == loading.DEFAULT:
            continue
        value = _value(option, loaded)
        for field in option.kube_fields:
            if config_file.is_active(field, loaded.config.proxy_mode):
                _put(documents[0], field, value)
        if option.own_field:
            _put(documents[1], option.own_field, value)
    return "---\n".join(yaml.safe_dump(document, sort_keys=False) for document in documents)


def _document(kind: tuple[str, str]) -> dict[str, typing.Any]:
    return {"apiVersion": kind[0], "kind": kind[1]}


def _value(option: Option, loaded: loading.Loaded) -> object:
    """The value to write: as it was set, or what it came to together with others."""
    settled = loaded.config
    match option.name:
        case "--healthz-bind-address":
            return str(settled.healthz_bind_address or "")
        case "--metrics-bind-address":
            return str(settled.metrics_bind_address or "")
        case "healthz":
            return settled.healthz_bind_address is not None
        case "metrics":
            return settled.metrics_bind_address is not None
        case "--nodeport-addresses":
            return (
                ["primary"] if settled.nodeport_primary else [str(net) for net in settled.nodeport_addresses]
            )
        case "--map-rows":
            return dataclasses.asdict(settled.map_rows)
    return option.type.encode(loaded.settings[option.name].value)


def _put(document: dict[str, typing.Any], field: str, value: object) -> None:
    *parents, last = field.split(".")
    for parent in parents:
        document = document.setdefault(parent, {})
    document[last] = value
