"""Columns that hold the numbers of named classes (`ClassLabel` of the `datasets` library): their names are the text."""

import json
from collections.abc import Mapping

import pyarrow as pa

from masters.data.sources.base import COLUMNS

LabelNames = Mapping[str, list[str]]  # by column, in the order of the numbers
MISSING = -1  # the number that `datasets` gives to a row without a label


def read_label_names(schema: pa.Schema) -> LabelNames:
    """Return the class names that `datasets` wrote into the metadata of an Arrow schema, also of lists of classes."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = {column: _find_names(features[column]) for column in COLUMNS if column in features}
    except (LookupError, TypeError, ValueError, RecursionError):  # not written by `datasets`, or not by this version
        return {}
    return {column: names for column, names in found.items() if names}


def _find_names(feature: object) -> list[str]:
    """Return the class names of a column's feature, or of the items of its lists; empty if it has none."""
    if isinstance(feature, list) and len(feature) == 1:  # a list as older versions write it
        return _find_names(feature[0])
    if not isinstance(feature, dict):
        return []
    names = feature.get("names")
    if feature.get("_type") == "ClassLabel" and isinstance(names, list):
        return [str(name) for name in names]
    return _find_names(feature.get("feature"))


def name_labels(row: dict, labels: LabelNames) -> dict:
    """Replace the numbers of classes by their names."""
    return row | {column: _name_label(row[column], names) for column, names in labels.items() if column in row}


def _name_label(value: object, names: list[str]) -> object:
    if isinstance(value, list):
        return [_name_label(item, names) for item in value]
    if not isinstance(value, int) or not MISSING <= value < len(names):
        return value
    return None if value == MISSING else names[value]
