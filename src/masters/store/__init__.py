"""Artifacts: the files that stages build, their records, and the store that holds them."""
