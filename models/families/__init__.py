"""Model families: the differences that matter when responses are packed behind a shared prompt.

To add a family, add a file with a class that implements `Family`, and an entry in `FAMILIES`.
"""

from masters.common.errors import InputError
from masters.models.families import internvl, qwen_vl
from masters.models.families.base import Family

FAMILIES: dict[str, Family] = {
    "qwen3_vl": qwen_vl.QwenVL(),
    "qwen2_5_vl": qwen_vl.QwenVL(),
    "internvl": internvl.InternVL(),
}


def family_of(model_type: str) -> Family:
    """Return the family of a model's `config.model_type`. Raises InputError if it is not supported."""
    if model_type not in FAMILIES:
        raise InputError(unsupported_family(model_type))
    return FAMILIES[model_type]


def unsupported_family(model_type: str) -> str:
    """Return the error message for a model type that is none of `FAMILIES`."""
    return f"model type {model_type!r} is not supported; expected one of {', '.join(sorted(FAMILIES))}"
