"""Needs nothing of the other packages."""
