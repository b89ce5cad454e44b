"""Make docs/metrics.md of the metrics table: `python -m lbproxy.metrics.docs > docs/metrics.md`."""

import sys

from lbproxy.metrics import table

INTRODUCTION = """\
# Health and metrics

<!-- Made by `python -m lbproxy.metrics.docs` from the metrics table; a test compares. -->

## Health: `--healthz-bind-address`, 0.0.0.0:10256

| path | 200 where | otherwise |
|---|---|---|
| `/livez` | no change has waited for two sync periods | 503 |
| `/healthz` | so, all is in the kernel and served, and load balancers may use this node | 503 |

As with kube-proxy, a node is not to be used while its Node object is unknown, being deleted, or tainted with
`ToBeDeletedByClusterAutoscaler`; idle time and an unreachable API server do not count against health; and a
wildcard address is served on IPv4 and IPv6. Unlike kube-proxy's, `/healthz` answers 503 until the first full
state is in the kernel and the programs are at the devices: before that the node can not serve. Without the
packet path it does not wait for devices; a kernel that lacks it is told of in `reasons`. With `--manifests`,
which need not hold a Node, an unknown node may be used.

The body is kube-proxy's JSON, and `reasons` besides: one line for each thing that is not as it should be.
One pass writes both families, so both always have the same `status`.

## Metrics: `--metrics-bind-address`, 127.0.0.1:10249

| path | answer |
|---|---|
| `/metrics` | what follows, in Prometheus's text format |
| `/healthz` | `ok` |
| `/proxyMode` | the mode that lbproxy replaces (`mode` in the configuration): `iptables` by default |
| `/metrics/slis` | `kubernetes_healthcheck` and `kubernetes_healthchecks_total`: health, answers |
| `/configz` | the settings in effect, as a KubeProxyConfiguration |
| `/flagz` | every setting in effect, one a line |
| `/statusz` | version, and since when it runs |

Tools ask `/proxyMode` to know what to expect of the node, above all of its NodePorts. lbproxy serves those
by the rules of the mode it replaces, so it gives that mode's name and not one of its own. The node has no
iptables rules or nftables sets to look at, though: use `lbproxy services` and `lbproxy explain` instead.

Both servers answer GET and HEAD, and nothing that is asked changes anything. They close the connection after
each answer, any after 30 s, and of more than 256 the oldest, first those whose request is not complete. No
token, password or key is on any page.

## Health check node ports

A Service of type LoadBalancer with externalTrafficPolicy Local has a `healthCheckNodePort`, where
balancers ask which nodes have endpoints of it. As with kube-proxy, any path and method is answered with 200
where at least one ready endpoint is on this node and changes reach the kernel in time, else with 503; the
count is in the body and in `X-Load-Balancing-Endpoint-Weight`. No firewall rule is made for the port. Where
it can not be bound, the log and an Event on the Service say so, and it is tried again with each change and
every 30 s.

## kube-proxy's metrics

They have kube-proxy's names, labels, types and buckets, and series appear once there is something to count.
Those about what does not exist here (`kubeproxy_sync_proxy_rules_iptables_*`, `_nftables_*`,
`kubeproxy_iptables_*`) are not exported, and neither are `go_*` and `kubernetes_build_info`: the latter with
another version than the cluster's would set off alerts.
"""

OWN = """
## lbproxy's own

The kernel counts connections when a backend is chosen: at connect for TCP and connected UDP, at the first
datagram to an address from other sockets, and at the first packet of a flow from elsewhere. A backend's count
starts over when it leaves and comes back.

`--metrics-max-series` bounds each metric of backends by itself. A backend may have nine series: connections,
open ones, handshakes, their seconds, four kinds of failures and the round-trip time.
"""

EVENTS = """
What `lbproxy_datapath_events_total` counts:

| event | meaning |
|---|---|
"""

OTHERS = """
## Of the process

`process_cpu_seconds_total`, `process_max_fds`, `process_open_fds`, `process_resident_memory_bytes`,
`process_start_time_seconds`, `process_virtual_memory_bytes` and `python_info`, as everywhere.
"""


def render() -> str:
    """Render the whole page."""
    kube_proxy = [metric for metric in table.TABLE if not metric.name.startswith("lbproxy_")]
    own = [metric for metric in table.TABLE if metric not in kube_proxy]
    return INTRODUCTION + _rows(kube_proxy) + OWN + _rows(own) + _events() + OTHERS


def _events() -> str:
    return EVENTS + "".join(f"| `{event}` | {meaning} |\n" for event, meaning in table.EVENTS.items())


def _rows(metrics: list[table.Definition]) -> str:
    heading = "\n| name | type | labels | meaning |\n|---|---|---|---|\n"
    return heading + "".join(map(_row, metrics))


def _row(metric: table.Definition) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.type} | {labels} | {metric.help} |\n"


if __name__ == "__main__":
    sys.stdout.write(render())
