"""Names of splits that sources use, and the split of the pipeline that each one means."""

import re
from collections.abc import Sequence
from pathlib import PurePath

SPLITS = ("train", "test")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev", "development"),
}
FIRST_WORD = re.compile(r"[a-z]+(?![a-z0-9])", re.IGNORECASE)
_MEANINGS = {name: split for split, names in SPLIT_NAMES.items() for name in names}


def find_split(name: object) -> str | None:
    """Return "train" or "test" for a split's name in any case; None if the name is not known."""
    return _MEANINGS.get(name.strip().lower()) if isinstance(name, str) else None


def find_file_splits(files: Sequence[PurePath]) -> list[str | None]:
    """Return each file's split if the names of all files say one and together they say both; otherwise only None.

    A name says a split by its first word, as the hub names files (`train-00000-of-00001.parquet`), or by a folder
    (`train/0.parquet`, `split=train/0.parquet`). `files`: paths from the data set's folder.
    """
    splits = [_find_file_split(file) for file in files]
    return splits if set(splits) == set(SPLITS) else [None] * len(splits)


def _find_file_split(file: PurePath) -> str | None:
    word = FIRST_WORD.match(file.name)
    folders = [part.removeprefix("split=") for part in reversed(file.parent.parts)]
    return next(filter(None, map(find_split, [word[0] if word else None, *folders])), None)


def describe_split_names() -> str:
    """Return the table of names for a message: "train (training) or test (testing, eval, ...)"."""
    return " or ".join(f"{split} ({', '.join(names[1:])})" for split, names in SPLIT_NAMES.items())
