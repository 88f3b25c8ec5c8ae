"""Checks before a run: what must be refused, and what can be estimated."""
