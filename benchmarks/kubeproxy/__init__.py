"""The rules that kube-proxy 1.36 would have in the kernel for a cluster, without a kube-proxy.

`model` reads the cluster's objects, `iptables` and `nftables` write what each of its
modes hands to `iptables-restore` and `nft`, and `load` puts that into a namespace.
"""
