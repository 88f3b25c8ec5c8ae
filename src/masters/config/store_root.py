"""Validation of `store.root`. Imports nothing heavy."""

PROTOCOLS = ("file", "local", "s3", "s3a")
S3 = ("s3", "s3a")


def validate_store_root(root: str) -> str:
    """Return `root` if it names a store that all processes can share and that supports conditional writes.

    An S3 address loses slashes at its end. Raises ValueError for white space, a variable of the shell, any
    other protocol, and an S3 address that servers and clients read in different ways.
    """
    if not root.strip():
        raise ValueError("expected a folder or s3://bucket/prefix, found white space")
    if root.startswith("$") or "${" in root:
        raise ValueError("a configuration expands no variables: write the folder itself, or ~ for your home")
    protocol, separator, path = root.partition("://")
    is_chained = "::" in root or root.startswith("data:")  # as fsspec reads it
    if is_chained or (separator and protocol not in PROTOCOLS):
        raise ValueError(f"expected a folder or s3://bucket/prefix, found the protocol {protocol!r:.20}")
    return f"{protocol}://{_normalize_s3_path(path)}" if separator and protocol in S3 else root


def _normalize_s3_path(path: str) -> str:
    """Return bucket and prefix without slashes at the end. An object's name is not a path: `..` leads nowhere."""
    bucket, *parts = path.rstrip("/").split("/")
    if not bucket or bucket in (".", ".."):
        raise ValueError("the URL names no bucket; expected s3://bucket/prefix")
    for part in parts:
        if part in ("", ".", ".."):
            raise ValueError(f"expected s3://bucket/prefix, found the part {part!r} in it: write the prefix without it")
        if part != part.strip() or not part.isprintable():
            raise ValueError(
                f"expected s3://bucket/prefix, found the part {part!r:.100}: remove spaces around it, and characters "
                "that cannot be printed"
            )
    return "/".join([bucket, *parts])
