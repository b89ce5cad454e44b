"""What the agent is told: flags, configuration files, and the one value that they come to."""
