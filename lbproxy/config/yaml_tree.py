"""The YAML of a configuration file, walked along the fields that `config_file` knows."""

from collections.abc import Iterator, Mapping

import yaml

from lbproxy.config import options
from lbproxy.config.config_file import (
    KUBE_PROXY,
    LBPROXY,
    FileSettings,
    Setting,
    kube_schema,
    own_schema,
)


def read(content: bytes, name: str) -> FileSettings:
    """Decode a file's one or two documents; `name` stands for the file in messages."""
    settings = FileSettings()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        settings.problems.append(f"{name}:{line}: not UTF-8")
        return settings
    try:
        # Documents are decoded one by one, so that what precedes a syntax error is checked too.
        loader = yaml.SafeLoader(text)
        while loader.check_node():
            node = loader.get_node()
            if node is not None and not _is_null(node):
                _Document(loader, name, settings).read(node)
    except yaml.YAMLError as error:
        settings.problems.append(_describe(error, text, name))
    except RecursionError:
        settings.problems.append(f"{name}: nested too deeply")
    return settings


def _describe(error: yaml.YAMLError, text: str, name: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        what = error.problem or error.context or "malformed"
        return f"{name}:{mark.line + 1 if mark else 1}: not YAML: {what}"
    position = getattr(error, "position", 0)
    return f"{name}:{text.count(chr(10), 0, position) + 1}: not YAML: a character that is not allowed"


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def _is_zero(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_zero, value.values()))
    if isinstance(value, list):
        return all(map(_is_zero, value))
    return not value or value in ("0", "0s")


class _Document:
    """One YAML document, walked along the fields that are known."""

    def __init__(self, loader: yaml.SafeLoader, name: str, settings: FileSettings) -> None:
        self._loader = loader
        self._name = name
        self._settings = settings

    def read(self, root: yaml.Node) -> None:
        if not isinstance(root, yaml.MappingNode):
            self._problem(root, "", "a document is to be a mapping of fields")
            return
        kind = self._kind(root)
        if kind == KUBE_PROXY:
            if self._settings.has_kube_proxy:
                self._problem(root, "", f"a second {kind[1]}")
            self._settings.has_kube_proxy = True
            self._walk(root, "", kube_schema(), self._settings.kube)
        elif kind == LBPROXY:
            if self._settings.has_own:
                self._problem(root, "", f"a second {kind[1]}")
            self._settings.has_own = True
            self._walk(root, "", own_schema(), self._settings.own)
        else:
            hint = "; give what its config.conf holds" if kind[1] == "ConfigMap" else ""
            wanted = " or ".join(f"{version} {kind}" for version, kind in (KUBE_PROXY, LBPROXY))
            what = " ".join(filter(None, kind)) or "a document without apiVersion and kind"
            self._problem(root, "", f"{what} is not {wanted}{hint}")

    def _kind(self, root: yaml.MappingNode) -> tuple[str, str]:
        texts = {
            key.value: value.value
            for key, value in root.value
            if isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode)
        }
        return texts.get("apiVersion", ""), texts.get("kind", "")

    def _walk(
        self,
        node: yaml.MappingNode,
        prefix: str,
        schema: Mapping[str, options.Option],
        into: dict[str, Setting],
    ) -> None:
        for path, value in self._fields(node, prefix):
            if option := schema.get(path):
                self._decode(value, path, option, into)
            elif any(field.startswith(f"{path}.") for field in schema):
                if isinstance(value, yaml.MappingNode):
                    self._walk(value, f"{path}.", schema, into)
                elif not _is_null(value):
                    self._problem(value, path, "is not a mapping")
            elif path not in ("apiVersion", "kind"):
                self._settings.warnings.append(f"{self._place(value, path)}: unknown field, left out")

    def _fields(self, node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, yaml.Node]]:
        """Yield the fields of a mapping; of a repeated one the last counts, as in kube-proxy."""
        self._loader.flatten_mapping(node)
        last: dict[str, yaml.Node] = {}
        for key, value in node.value:
            # A dot in a name must not make it the path of another field.
            path = prefix + str(self._loader.construct_object(key, deep=True)).replace(".", "\\.")
            if path in last:
                self._settings.warnings.append(f"{self._place(key, path)}: given twice, the last one counts")
            last[path] = value
        yield from last.items()

    def _decode(self, node: yaml.Node, path: str, option: options.Option, into: dict[str, Setting]) -> None:
        try:
            value = self._loader.construct_object(node, deep=True)
        except ValueError:
            # PyYAML lets through what looks like a date or a number but is none.
            self._problem(node, path, f"{getattr(node, 'value', '')!r} is not a value")
            return
        # Null and "" mean the default in every field of a KubeProxyConfiguration, a zero in some.
        if value is None or value == "" or (option.zero_is_unset and value in (0, "0", "0s")):
            return
        try:
            decoded = option.type.decode(value)
        except ValueError as error:
            self._problem(node, path, str(error))
            return
        into[path] = Setting(decoded, self._place(node, path), _is_zero(value))

    def _place(self, node: yaml.Node, path: str) -> str:
        line = node.start_mark.line + 1 if node.start_mark else 1
        return f"{self._name}:{line}: {path}" if path else f"{self._name}:{line}"

    def _problem(self, node: yaml.Node, path: str, what: str) -> None:
        self._settings.problems.append(f"{self._place(node, path)}: {what}")
