"""What `kustomize build` makes of the folders in deploy/, as far as those use it.

Not kustomize, which no package index has: resources, namespace, labels, images, JSON patches and
generated ConfigMaps, in its order. A field that is not known here fails, so that nothing is left out
in silence.
"""

import copy
import pathlib
import typing

import yaml

Object = dict[str, typing.Any]

HASH: typing.Final = "-0a1b2c3d4e"  # stands for what kustomize computes from a ConfigMap's content
_FIELDS: typing.Final = {
    "apiVersion", "kind", "resources", "namespace", "labels", "images", "patches", "configMapGenerator",
}  # fmt: skip
_WITHOUT_NAMESPACE: typing.Final = {"ClusterRole", "ClusterRoleBinding", "Namespace"}


def build(folder: pathlib.Path) -> list[Object]:
    """Every object that the folder's kustomization comes to."""
    wanted = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert wanted.keys() <= _FIELDS, f"{folder}: {sorted(wanted.keys() - _FIELDS)}"
    objects: list[Object] = []
    for name in wanted.get("resources", []):
        path = folder / name
        objects += build(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    generated = [_config_map(folder, one) for one in wanted.get("configMapGenerator", [])]
    objects += [made for made, _ in generated]
    for patch in wanted.get("patches", []):
        for found in _targets(objects, patch["target"]):
            for step in yaml.safe_load(patch["patch"]):
                _apply(found, step)
    for found in objects:
        if "namespace" in wanted and found["kind"] not in _WITHOUT_NAMESPACE:
            found["metadata"]["namespace"] = wanted["namespace"]
        for labels in wanted.get("labels", []):
            assert labels.keys() == {"pairs"}
            found["metadata"].setdefault("labels", {}).update(labels["pairs"])
    for image in wanted.get("images", []):
        _name_image(objects, image)
    for made, hashed in generated:
        if hashed:
            _rename(objects, made)
    return objects


def _config_map(folder: pathlib.Path, wanted: Object) -> tuple[Object, bool]:
    options = wanted.get("options", {})
    assert wanted.keys() <= {"name", "namespace", "files", "options"}
    assert options.keys() <= {"disableNameSuffixHash", "labels"}
    metadata: Object = {"name": wanted["name"]}
    if "namespace" in wanted:
        metadata["namespace"] = wanted["namespace"]
    if "labels" in options:
        metadata["labels"] = dict(options["labels"])
    data = {name: (folder / name).read_text() for name in wanted["files"]}
    made = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
    return made, not options.get("disableNameSuffixHash", False)


def _targets(objects: list[Object], target: Object) -> list[Object]:
    assert target.keys() == {"kind", "name"}
    found = [
        one for one in objects if one["kind"] == target["kind"] and one["metadata"]["name"] == target["name"]
    ]
    assert found, f"a patch of nothing: {target}"
    return found


def _apply(document: Object, step: Object) -> None:
    """One step of a JSON patch (RFC 6902), of the two kinds that are used."""
    assert step["path"].startswith("/")
    *way, last = (part.replace("~1", "/").replace("~0", "~") for part in step["path"][1:].split("/"))
    place: typing.Any = document
    for part in way:
        place = place[int(part) if isinstance(place, list) else part]
    assert isinstance(place, dict), step
    match step["op"]:
        case "add":
            place[last] = copy.deepcopy(step["value"])
        case "replace":
            assert last in place, step
            place[last] = copy.deepcopy(step["value"])
        case unknown:
            raise AssertionError(f"no step {unknown!r} here")


def _name_image(objects: list[Object], image: Object) -> None:
    assert image.keys() <= {"name", "newName", "newTag"}
    for container in (one for found in objects for one in containers(found)):
        if container["image"] == image["name"]:
            container["image"] = f"{image['newName']}:{image['newTag']}"


def _rename(objects: list[Object], made: Object) -> None:
    """Give a generated ConfigMap its suffix, also where pods of its namespace name it."""
    before = made["metadata"]["name"]
    made["metadata"]["name"] = before + HASH
    for found in objects:
        if found["metadata"].get("namespace") != made["metadata"].get("namespace"):
            continue
        for volume in pod(found).get("volumes", []):
            if volume.get("configMap", {}).get("name") == before:
                volume["configMap"]["name"] = before + HASH


def pod(found: Object) -> Object:
    """The pod that an object describes; an empty one where it describes none."""
    spec: Object = found.get("spec", {}).get("template", {}).get("spec", {})
    return spec


def containers(found: Object) -> list[Object]:
    """The containers of an object's pod, those that run first included."""
    spec = pod(found)
    return [*spec.get("initContainers", []), *spec.get("containers", [])]
