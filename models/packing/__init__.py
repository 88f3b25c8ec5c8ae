"""Packing of questions and their responses into rows with shared prefixes."""
