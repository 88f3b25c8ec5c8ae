"""Names of splits that sources use, and the split of the pipeline that each one means."""

SPLITS = ("train", "test")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev", "development"),
}
_MEANINGS = {name: split for split, names in SPLIT_NAMES.items() for name in names}


def find_split(name: object) -> str | None:
    """Return "train" or "test" for a split's name in any case; None if the name is not known."""
    return _MEANINGS.get(name.strip().lower()) if isinstance(name, str) else None


def describe_split_names() -> str:
    """Return the table of names for a message: "train (training) or test (testing, eval, ...)"."""
    return " or ".join(f"{split} ({', '.join(names[1:])})" for split, names in SPLIT_NAMES.items())
