"""From kube-proxy to lbproxy and back, with no connection broken: the command, and the agent's part in it."""
