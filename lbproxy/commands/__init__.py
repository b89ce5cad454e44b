"""The commands that are one module each, and how they print; the larger ones are packages of their own."""
