"""Types that configuration sections share, their base class, and values that have a meaning of their own."""

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

MAX_INT = 2**31 - 1  # the largest whole number that engines, tables and the flow's JSON all take
TEACHER = "teacher"  # rewards.judge: the round's own teacher, unmasked
NAME_PATTERN = "[A-Za-z0-9][A-Za-z0-9_-]{0,63}"


def expand_home(name: str) -> str:
    """Return a path with the home folder in place of "~". Other names, and those of unknown users, stay unchanged."""
    try:
        return str(Path(name).expanduser()) if name.startswith("~") else name
    except RuntimeError:
        return name


Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=MAX_INT)]
Count = Annotated[int, Field(ge=1, le=MAX_INT)]
Text = Annotated[str, Field(min_length=1)]
ModelName = Annotated[Text, AfterValidator(expand_home)]
PoolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{0,64}$")]
Dtype = Literal["bfloat16", "float16", "float32"]
Truncated = Literal["mask", "drop", "keep"]  # generate.truncated


class Section(BaseModel):
    """Base class of all sections. Unknown keys are errors, values are not coerced from other types.

    The field descriptions are the help texts of the run form in Prefect.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _convert_whole_float(cls, value: object, info: ValidationInfo) -> object:
        """Accept 1.0 for an integer, as the run form does: a JSON number has no integer type."""
        if isinstance(value, float) and value.is_integer():
            return int(value) if _accepts_int(cls.model_fields[info.field_name or ""].annotation) else value
        return value


def _accepts_int(annotation: object) -> bool:
    return annotation is int or any(_accepts_int(part) for part in get_args(annotation))
