"""Questions: sources, validation, selection, tables and shards."""
