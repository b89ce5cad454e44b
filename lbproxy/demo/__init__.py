"""`lbproxy demo`: a small cluster on this machine, balanced live by the real agent."""
