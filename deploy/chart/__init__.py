"""The Helm chart, made of the kustomize folders and the agent's settings: `make chart`."""
