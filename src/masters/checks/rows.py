"""Validation of a source's rows before work starts, as the data stage does it."""

from collections.abc import Iterator

from masters.checks.preflight import Resources
from masters.config import Config
from masters.data.question_selection import Selection, check_selection, describe_leaks, select_questions

MAX_LISTED = 8  # categories, and kinds of rejection, in the output


def select_valid_rows(config: Config, resources: Resources) -> Selection:
    """Read and validate every row of the source, and select questions as the data stage does. Nothing is written.

    Raises InputError where the data stage would: too many rejections, nothing to train on or to evaluate, leaks.
    """
    selection = select_questions(config, resources.source, lambda *_: None, resources.special_tokens)
    check_selection(selection, config)
    return selection


def describe_rows(selection: Selection) -> Iterator[str]:
    """Yield lines about the rows: counts by split, rejections by kind, changes, categories."""
    splits, rows = selection.splits, len(selection.marks)
    share = f" ({selection.rejected / rows:.1%})" if selection.rejected else ""
    validation = f", {splits['validation']:,} for validation" if splits["validation"] else ""
    yield (
        f"rows       {rows:,} read, {selection.rejected:,} rejected{share}; selected {splits['train']:,} for training"
        f"{validation}, {splits['test']:,} for evaluation"
    )
    for kind, count in selection.rejections.most_common(MAX_LISTED):
        example = selection.examples[kind]
        yield f"rejected   {count:,} x {example.reason}, e.g. {example.id}"
    for change, count in selection.changes.most_common():
        yield f"changed    {count:,} x {change}"
    if categories := {name: count for name, count in selection.categories.most_common() if name is not None}:
        shown = ", ".join(f"{name[:50]} {count:,}" for name, count in list(categories.items())[:MAX_LISTED])
        others = f" and {len(categories) - MAX_LISTED:,} more" if len(categories) > MAX_LISTED else ""
        yield f"categories {shown}{others}"


def list_row_warnings(selection: Selection) -> list[str]:
    """Return warnings about rows that are accepted but distort results."""
    leaked, evaluation = len(selection.leaked), selection.splits["test"]
    return [describe_leaks(leaked, evaluation)] if leaked else []
