"""What the agent counts and measures, and how it is shown to Prometheus."""
