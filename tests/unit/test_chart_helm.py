"""The real helm, where there is one, makes of the chart what `tests/helming.py` makes of it."""

import pathlib
import shutil
import subprocess
import typing

import pytest
import yaml

from deploy.chart import source
from tests import helming
from tests.unit import test_chart
from tests.unit.test_chart import CHART, CI
from tests.unit.test_config_file import KUBEADM

HELM: typing.Final = shutil.which("helm") or ""

if not HELM:
    pytest.skip(
        "no helm on the PATH: none can be had from where this project may install", allow_module_level=True
    )

PASTED: typing.Final = yaml.safe_load(KUBEADM) | {
    "clientConnection": {"kubeconfig": "/etc/lbproxy/kubeconfig.conf"}
}
VALUES: typing.Final = CI | {
    "kubeadm": test_chart.with_values("config.kubeProxy", PASTED),
    "nulls": test_chart.with_values("config.lbproxy", None) | {"tolerations": None, "resources": None},
    "none": {"nodeSelector": {"kubernetes.io/os": None}, **CI["default"]},
}


def helm(
    *arguments: str | pathlib.Path, values: helming.Values, folder: pathlib.Path
) -> subprocess.CompletedProcess[str]:
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump(values))
    return subprocess.run(
        [HELM, *map(str, arguments), "-f", str(path)], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_the_same_objects(values: helming.Values, tmp_path: pathlib.Path) -> None:
    done = helm("template", "proxy", source.CHART, "-n", "net", values=values, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs, ours = helming.load(done.stdout), CHART.objects(values, "proxy", "net")
    assert comparable(theirs) == comparable(ours)


def comparable(objects: list[helming.Values]) -> dict[tuple[str, str], helming.Values]:
    """With YAML in ConfigMaps as what it says, and without the hashes that its layout leads to."""
    found = test_chart.without_suffix(objects)
    for each in found:
        if each["kind"] == "ConfigMap":
            each["data"] = {name: list(yaml.safe_load_all(text)) for name, text in each["data"].items()}
        if each["kind"] == "DaemonSet":
            each["spec"]["template"]["metadata"].get("annotations", {}).pop("checksum/config", None)
    return test_chart.keyed(found)


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, value, _ in test_chart.REFUSED])
def test_the_same_values_are_refused(path: str, value: object, tmp_path: pathlib.Path) -> None:
    values = test_chart.with_values(path, value)
    done = helm("template", "proxy", source.CHART, values=values, folder=tmp_path)
    assert done.returncode != 0
    assert f"/{path.partition('.')[0]}" in done.stderr or path in done.stderr


def test_helm_finds_no_fault(tmp_path: pathlib.Path) -> None:
    done = helm("lint", source.CHART, "--strict", values=CI["default"], folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
