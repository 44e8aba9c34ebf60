"""Runs that are killed, cut, damaged and starved of room, and what is left of them; for scripts/reliability.py too."""
