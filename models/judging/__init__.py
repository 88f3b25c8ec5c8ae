"""A language model judges responses."""
