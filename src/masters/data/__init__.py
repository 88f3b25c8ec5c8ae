"""From a source to tables and shards of questions."""
