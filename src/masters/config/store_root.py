"""Validation of `store.root`. Imports nothing heavy."""

PROTOCOLS = ("file", "local", "s3", "s3a")


def validate_store_root(root: str) -> str:
    """Return `root` if it names a store that all processes can share and that supports conditional writes.

    Raises ValueError for any other protocol.
    """
    protocol, separator, _ = root.partition("://")
    is_chained = "::" in root or root.startswith("data:")  # as fsspec reads it
    if is_chained or (separator and protocol not in PROTOCOLS):
        raise ValueError(f"expected a folder or s3://bucket/prefix, found the protocol {protocol!r:.20}")
    return root
