"""What lbproxy costs, measured on this machine. `python -m benchmarks.run --help` is the way in."""
