"""What the chart is made of: the kustomize folders, built, and their files."""

import pathlib
import typing

import yaml

from deploy import kustomizing
from lbproxy.config import config_file

DEPLOY: typing.Final = pathlib.Path(__file__).parents[1]
KUSTOMIZE: typing.Final = DEPLOY / "kustomize"
MONITORING: typing.Final = DEPLOY / "monitoring"
CHART: typing.Final = DEPLOY / "helm/lbproxy"
NAME: typing.Final = "lbproxy"

Settings = dict[str, typing.Any]


def base() -> list[kustomizing.Object]:
    """The objects that every overlay has, with the image of this version."""
    return kustomizing.build(KUSTOMIZE / "base")


def overlay(name: str) -> list[kustomizing.Object]:
    """All objects of an overlay."""
    return kustomizing.build(KUSTOMIZE / "overlays" / name)


def cleanup() -> list[kustomizing.Object]:
    """What takes lbproxy out of the kernels."""
    return kustomizing.build(KUSTOMIZE / "cleanup")


def monitoring() -> list[kustomizing.Object]:
    """What watches the agents."""
    return kustomizing.build(MONITORING)


def one(objects: list[kustomizing.Object], kind: str) -> kustomizing.Object:
    """The only object of its kind."""
    (found,) = (each for each in objects if each["kind"] == kind)
    return found


def settings(overlay_name: str) -> tuple[Settings, Settings]:
    """Both documents of an overlay's config.conf: kube-proxy's, and lbproxy's own."""
    text = one(overlay(overlay_name), "ConfigMap")["data"]["config.conf"]
    kube_proxy, own = yaml.safe_load_all(text)
    for document, kind in ((kube_proxy, config_file.KUBE_PROXY), (own, config_file.LBPROXY)):
        assert (document.pop("apiVersion"), document.pop("kind")) == kind
    return kube_proxy, own


def kubeconfig() -> Settings:
    """The kubeconfig of the overlay `default`."""
    found: Settings = yaml.safe_load(one(overlay("default"), "ConfigMap")["data"]["kubeconfig.conf"])
    return found


def pod(objects: list[kustomizing.Object]) -> kustomizing.Object:
    """The pod of their DaemonSet."""
    return kustomizing.pod(one(objects, "DaemonSet"))


def flag(name: str) -> str:
    """The value that the agent's container gives a flag."""
    arguments: list[str] = pod(base())["containers"][0]["args"]
    (found,) = (text.partition("=")[2] for text in arguments if text.startswith(f"{name}="))
    return found
