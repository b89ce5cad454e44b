"""lbproxy: an eBPF service proxy that takes kube-proxy's place on a node."""

__version__ = "0.1.0"
