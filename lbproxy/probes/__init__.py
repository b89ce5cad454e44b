"""Probes of backends, made from this node: `core.probing` says of which and when, this asks them."""
