"""Reads the cluster: API server or manifests to core events."""
