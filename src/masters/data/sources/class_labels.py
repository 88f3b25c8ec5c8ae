"""Columns that hold the numbers of named classes (`ClassLabel` of the `datasets` library): their names are the text."""

import json
from collections.abc import Mapping

import pyarrow as pa

from masters.data.sources.base import COLUMNS

LabelNames = Mapping[str, list[str]]  # by column, in the order of the numbers


def read_label_names(schema: pa.Schema) -> LabelNames:
    """Return the class names that `datasets` wrote into the metadata of an Arrow schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = {column: features[column] for column in COLUMNS if column in features}
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in found.items()
            if feature["_type"] == "ClassLabel"
        }
    except (LookupError, TypeError, ValueError, AttributeError):  # not written by `datasets`, or not by this version
        return {}


def name_labels(row: dict, labels: LabelNames) -> dict:
    """Replace the numbers of classes by their names."""
    for column, names in labels.items():
        number = row.get(column)
        if isinstance(number, int) and 0 <= number < len(names):
            row[column] = names[number]
    return row
