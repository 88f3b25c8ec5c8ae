"""Text of answers, ids and categories that a source stores as numbers or truth values."""

import math
from decimal import Decimal


def number_to_text(value: object) -> object:
    """Return the text of a number or truth value, None for NaN (an empty cell); any other value unchanged.

    `true` and `false` as in JSON. A number without a fraction has no decimal point: 2.0 is "2", as tables store whole
    numbers as floats where a column has empty cells. Decimals keep all their digits; floats have the fewest digits that
    give the same number. Infinite numbers are returned unchanged.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Decimal):
        return _decimal_to_text(value)
    if not isinstance(value, float) or math.isinf(value):
        return value
    if math.isnan(value):
        return None
    return str(int(value)) if value.is_integer() and abs(value) < 1e16 else repr(value)


def _decimal_to_text(value: Decimal) -> object:
    if not value.is_finite():
        return None if value.is_nan() else value
    text = format(value or Decimal(), "f")  # zero has no sign
    return text.rstrip("0").rstrip(".") if "." in text else text
