"""Verdicts of a language model on responses."""
