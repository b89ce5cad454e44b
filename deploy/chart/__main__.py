"""Write the Helm chart: `python -m deploy.chart`, or `make chart`."""

import pathlib
import sys
import typing
from collections.abc import Mapping

import yaml

import lbproxy
from deploy.chart import objects, schema, source, value_files, values

# These are written by hand; all others are made.
BY_HAND: typing.Final = frozenset({"templates/_helpers.tpl", "templates/NOTES.txt"})

README: typing.Final = """\
# lbproxy

<!-- Made by `make chart`. -->

An eBPF service proxy that takes kube-proxy's place on Kubernetes nodes. The chart is made from
`deploy/kustomize`, `deploy/monitoring` and the agent's option table, so that all of them say the same.

```sh
helm install lbproxy deploy/helm/lbproxy --namespace kube-system \\
  --set image.repository=REGISTRY/lbproxy \\
  --set apiServer.server=https://192.0.2.1:6443 \\
  --set config.kubeProxy.clusterCIDR=10.244.0.0/16
```

`docs/install.md` has the steps: a trial beside kube-proxy first (`--set trial.enabled=true`), what has to go
before what, and the way back: `helm uninstall` alone leaves the programs in the kernels. For the way from
kube-proxy node by node, with `lbproxy migrate cluster` (`docs/migration.md`): `--set migrate.enabled=true`.

## Values

What is wrong is refused by `values.schema.json` before anything is sent: misspelt names, too.

"""


def files() -> dict[str, str]:
    """The text of every file that is made, by its path in the chart."""
    kubernetes = schema.Kubernetes()
    known = values.all_values(kubernetes)
    return {
        "Chart.yaml": chart_yaml(),
        "README.md": README + value_files.table(known),
        "values.yaml": value_files.values_yaml(known),
        "values.schema.json": value_files.values_schema(known, kubernetes),
        **{f"templates/{name}": text for name, text in objects.templates().items()},
        **{f"files/{name}": text for name, text in objects.files().items()},
    }


def chart_yaml() -> str:
    """The chart's own data. Its version is that of the program: they are made of the same commit."""
    chart = {
        "apiVersion": "v2",
        "name": source.NAME,
        "description": "An eBPF service proxy that takes kube-proxy's place on Kubernetes nodes",
        "type": "application",
        "version": lbproxy.__version__,
        "appVersion": lbproxy.__version__,
        "kubeVersion": f">={schema.OLDEST}.0-0",
        "keywords": ["kube-proxy", "ebpf", "service-proxy", "load-balancer", "networking"],
        "annotations": {"artifacthub.io/license": "Apache-2.0", "artifacthub.io/category": "networking"},
    }
    text: str = yaml.safe_dump(chart, sort_keys=False, width=110)
    return f"# Made by `make chart`.\n{text}"


def write(folder: pathlib.Path, made: Mapping[str, str]) -> list[str]:
    """Make a folder hold the files that are made, beside those by hand, and no others; says what changed."""
    changed = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if name not in made and name not in BY_HAND and not name.startswith("ci/"):
            path.unlink()
            changed.append(name)
    for name, text in made.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            changed.append(name)
    return changed


if __name__ == "__main__":
    for each in write(source.CHART, files()):
        sys.stdout.write(f"{source.CHART.name}/{each}\n")
