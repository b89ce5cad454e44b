"""The pure core: events to state to plan to ordered writes. No I/O, no clock, no kernel."""
