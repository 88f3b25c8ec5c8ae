"""What `store.root` may be. Imports nothing heavy."""

PROTOCOLS = ("file", "local", "s3", "s3a")


def validate_store_root(root: str) -> str:
    """The root of a store that every process of a run sees and that writes conditionally. Raises ValueError."""
    protocol, found, _ = root.partition("://")
    chained = "::" in root or root.startswith("data:")  # as fsspec reads it
    if chained or (found and protocol not in PROTOCOLS):
        raise ValueError(f"expected a folder or s3://bucket/prefix, found the protocol {protocol!r:.20}")
    return root
