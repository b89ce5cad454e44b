"""What the agent serves over HTTP: its health, its metrics, and the health check node ports."""
