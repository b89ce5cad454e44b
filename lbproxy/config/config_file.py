"""Read the settings that a configuration file holds, each with the line it is on.

Fields are the ones of the option table. Unknown ones are warnings, as kube-proxy
treats them (CLI-3); values that make no sense are problems.
"""

import dataclasses
import typing

from lbproxy.config import config, kube_proxy_options, options

KUBE_PROXY = ("kubeproxy.config.k8s.io/v1alpha1", "KubeProxyConfiguration")
LBPROXY = ("lbproxy.io/v1alpha1", "LbproxyConfiguration")


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """A value and the place that set it, as messages name it."""

    value: typing.Any
    place: str
    is_zero: bool = False  # false, 0 or empty, as a complete file has it without meaning anything


@dataclasses.dataclass(slots=True)
class FileSettings:
    """What a file sets, by field path, for each of its two kinds."""

    has_kube_proxy: bool = False
    has_own: bool = False
    kube: dict[str, Setting] = dataclasses.field(default_factory=dict)
    own: dict[str, Setting] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)


def kube_schema() -> dict[str, options.Option]:
    """The fields of KubeProxyConfiguration."""
    return {field: option for option in kube_proxy_options.OPTIONS for field in option.kube_fields}


def own_schema() -> dict[str, options.Option]:
    """The fields of LbproxyConfiguration."""
    return {option.own_field: option for option in kube_proxy_options.OPTIONS if option.own_field}


def is_active(field: str, mode: config.ProxyMode) -> bool:
    """Whether a field counts in this mode: of fields in the modes' blocks only one does (CFG-2)."""
    block, _, rest = field.partition(".")
    if block not in options.BLOCKS:
        return True
    if mode == config.ProxyMode.IPVS and f"ipvs.{rest}" not in kube_schema():
        return block == config.ProxyMode.IPTABLES
    return block == mode.value


def read(content: bytes, name: str) -> FileSettings:
    """Decode a file's one or two documents; `name` stands for the file in messages."""
    from lbproxy.config import yaml_tree  # noqa: PLC0415 - YAML is loaded only where it is read

    return yaml_tree.read(content, name)
