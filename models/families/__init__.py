"""Model families: what differs between them when responses are packed behind a shared prompt.

Adding a family is one file here with a `Family` and its entry in `FAMILIES`.
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
    """The family of a model's `config.model_type`. Raises InputError with the families there are."""
    if model_type not in FAMILIES:
        raise InputError(f"model type {model_type!r} is not supported; families: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
