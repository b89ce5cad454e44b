"""Make docs/configuration.md of the options: `python -m lbproxy.config.docs > docs/configuration.md`."""

import sys

from lbproxy.config import kinds
from lbproxy.config.kube_proxy_options import OPTIONS
from lbproxy.config.options import Group, Option

INTRODUCTION = """\
# Configuration

<!-- Made by `python -m lbproxy.config.docs` from the option table; a test compares. -->

`lbproxy run` takes flags, and with `--config FILE` a file of one or two YAML documents: kube-proxy's
`KubeProxyConfiguration` as its ConfigMap holds it, unchanged, and a `LbproxyConfiguration` for what
kube-proxy has no field for.

```yaml
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection:
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
clusterCIDR: 10.244.0.0/16
---
apiVersion: lbproxy.io/v1alpha1
kind: LbproxyConfiguration
algorithm: maglev
maps:
  frontends: 500000
```

## Rules

- **Flag or file.** lbproxy's own flags win over the file. Flags that `KubeProxyConfiguration` has a field
  for are not used while the file has such a document, as in kube-proxy, and a line says so; the exceptions
  are kube-proxy's: `--hostname-override` (`--node-name`), `--master` and the logging flags. `--map-rows`
  adds to the file's `maps`.
- **Problems.** Every problem is listed, one a line, with its flag or `file:line: field`; exit status 2.
  Unknown fields and fields given twice are only warned of.
- **Without effect.** What is set and does nothing here is listed once at start. Null, zero, false and empty
  values in a file are not: kubeadm writes them for completeness.
- **Empty means default** in a file, as for kube-proxy: `healthzBindAddress: ""` is the default address. To
  serve none, give the flag as `--healthz-bind-address ""` or set `healthz: false`; likewise for metrics.
- **Modes.** lbproxy is a mode of its own. `mode` says which one it replaces: its block (`iptables`,
  `ipvs`, `nftables`) counts, and its rules for NodePorts: on 127.0.0.0/8 only in iptables mode, and in
  nftables mode on the node's primary addresses if `nodePortAddresses` is not set.
- **Sync period.** kube-proxy waits a second between two rounds of changes, since a round is expensive. It is
  not here: changes apply at once, unless a `minSyncPeriod` other than zero is given.
- **Feature gates** are accepted whatever their names; `AllowServiceExternalIPs` is the one with an effect.
- Flags may be repeated: lists grow, otherwise the last one counts. `--flag value`, `--flag=value` and, for
  true and false, `--flag` alone. Durations are Go's: `30s`, `1m30s`, `1.5h`, `0`.

## Room for flows

Maps grow by themselves, but for those that forget by themselves. What the packet path
translates has two rows in `flows`, four where it is masqueraded: the 262,144 that there are by default are
enough for 65,536 connections from outside at once, idle ones included (`conntrack.tcpEstablishedTimeout`),
and half of it for those whose clients have not answered yet. Connections that processes of the node and
pods begin need none: they are translated at the socket.

- **How many.** Four times the most connections that come to this node from outside at once, and as much
  again for what has ended and is not removed yet. `lbproxy_map_rows{map="flows"}` has what is used,
  `lbproxy_flows` of which kind; the alert `LbproxyMapNearlyFull` comes at four fifths. Room costs 16 bytes
  a row, rounded up to a power of two, and a row in use 128.
- **It grows** at three quarters, to twice the rows, up to `mapGrowthLimit` times those that it was given:
  4,194,304 by default, which are 64 MB empty and 576 MB full, of the pod's memory. No flow is lost, whenever
  it begins ([how](architecture.md#restart-and-upgrade)). A flood of SYNs has half of it at most, and makes it
  grow only where the flows of those who answer have a quarter.
- **How to change it.** `maps: {flows: N}` or `--map-rows flows=N`, and a restart: that makes the larger
  table beside the one in use and moves the flows, as it grows. It needs no compiler. The table is not made
  smaller while it is in use: `lbproxy cleanup` gives the room up, and interrupts service.
- **When it is full** flows that nobody has answered yet go to `flows_new`, which forgets the oldest; those
  that are established stay ([runbook](runbook.md#lbproxyflowsforgotten)).
"""


def render() -> str:
    """Render the whole page."""
    return INTRODUCTION + "".join(_section(group) for group in Group)


def _section(group: Group) -> str:
    rows = [_row(option) for option in OPTIONS if option.group is group]
    heading = f"\n## {group.value}\n\n| flag | file field | default | meaning |\n|---|---|---|---|\n"
    return heading + "\n".join(rows) + "\n"


def _row(option: Option) -> str:
    metavar = "" if option.type is kinds.BOOL else f" {option.value_word}"
    flags = ", ".join(f"`{flag}{metavar}`" for flag in option.flags)
    fields = [f"`{field}`" for field in option.kube_fields]
    if option.own_field:
        fields.append(f"`{option.own_field}` (lbproxy)")
    default = f"`{option.default}`" if option.default else ""
    notes = [
        option.help,
        f"as a flag {option.flag_help}" if option.flag_help else "",
        f"in a file {option.file_help}" if option.file_help else "",
        "repeatable" if option.type.joins and option.flags else "",
    ]
    if option.no_effect:
        notes.append(f"**no effect yet:** {option.no_effect}" if option.help else option.no_effect)
    meaning = "; ".join(filter(None, notes))
    cells = (flags, ", ".join(fields), default, meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.stdout.write(render())
