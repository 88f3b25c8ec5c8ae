"""Artifacts: what is built, and where it lies."""
