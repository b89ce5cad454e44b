"""`lbproxy demo`: a small cluster on this machine, balanced live by the real agent."""

# The command line looks for main here.
from lbproxy.demo.command import main as main
