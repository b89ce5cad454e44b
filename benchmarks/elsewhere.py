"""What a real kube-proxy measured on another machine: for runs in which its rules were generated. Pure."""

from benchmarks import tables

HEADING = "A real kube-proxy, measured elsewhere"
SAID = """\
kube-proxy 1.36 with a real API server, measured before this run, on another machine of 2 CPUs
(Linux 6.18, iptables 1.8.9 with the nf_tables backend, 4 endpoints per service): its own computing is
in these times, and about 5 ms of each change are the API server's. Only the order of magnitude
can be held against the figures above. Short connections are ÷ bare, through a ClusterIP; with the legacy
backend, 10,000 services give 0.40, and start in 3 s."""
_HEAD = (
    "services",
    "short connections: iptables",
    "nftables",
    "change, p50 / p99 ms: iptables",
    "nftables",
    "start, s: iptables",
    "nftables",
    "RSS, MB: iptables",
    "nftables",
)
_ROWS = (
    ("1", "0.81", "0.83", "24 / 104", "16 / 22", "0.7", "1.0", "59", "57"),
    ("1,000", "0.68", "0.86", "58 / 156", "136 / 176", "1.4", "0.75", "76", "74"),
    ("5,000", "0.59", "0.85", "326 / 805", "1,171 / 1,267", "63", "4.3", "138", "136"),
    ("10,000", "0.50", "0.86", "915 / 1,997", "4,540 / 4,778", "353", "16", "168", "218"),
)


def table() -> tables.Table:
    """Return those figures."""
    return tables.Table(_HEAD, [tables.plain(*row) for row in _ROWS])
