"""Writes the kernel: compile, load, pin, attach, and map rows."""
