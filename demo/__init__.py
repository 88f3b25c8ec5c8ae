"""The demo's models: how they are drawn for, built and trained. Their weights lie in `demo/models/`."""
