"""Types and the base class of configuration sections, and words that have a meaning in them."""

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

MAX_INT = 2**31 - 1  # of whole numbers: what engines, tables and the flow's JSON take
TEACHER = "teacher"  # rewards.judge: the round's own teacher, unmasked
NAME_PATTERN = "[A-Za-z0-9][A-Za-z0-9_-]{0,63}"

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=MAX_INT)]
Count = Annotated[int, Field(ge=1, le=MAX_INT)]
Text = Annotated[str, Field(min_length=1)]
PoolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{0,64}$")]
Dtype = Literal["bfloat16", "float16", "float32"]


def _takes_whole(annotation: object) -> bool:
    return annotation is int or any(_takes_whole(part) for part in get_args(annotation))


class Section(BaseModel):
    """Unknown keys are errors; values are not coerced from other types. Descriptions are the run form's help texts."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _integral(cls, value: object, info: ValidationInfo) -> object:
        """To a form, whose numbers are JSON's, 1.0 is a whole number: so it is in a file."""
        if isinstance(value, float) and value.is_integer():
            return int(value) if _takes_whole(cls.model_fields[info.field_name or ""].annotation) else value
        return value
