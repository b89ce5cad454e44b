"""Whether a node can run lbproxy: facts in, findings out."""
