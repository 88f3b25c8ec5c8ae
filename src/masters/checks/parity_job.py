"""The job of a parity check's process and the differences that it reports. Imports no torch."""

from pathlib import Path

from pydantic import Base64Bytes, BaseModel, ConfigDict

from masters.config import Runtime
from masters.config.fields import Dtype

MAX_TOKENS = 8  # of the engine's greedy responses that are compared


class ParityQuestion(BaseModel):
    model_config = ConfigDict(frozen=True)

    question: str
    answer: str
    image: Base64Bytes


class ParityJob(BaseModel):
    """A model to check. `thresholds`: mask thresholds by mask ratio, then by tensor name."""

    model_config = ConfigDict(frozen=True)

    name: str
    folder: Path
    thresholds: dict[float, dict[str, float]]
    questions: tuple[ParityQuestion, ...]
    dtype: Dtype
    runtime: Runtime


class Difference(BaseModel):
    """A measured difference, and the limit up to which it is a rounding error."""

    model_config = ConfigDict(frozen=True)

    name: str
    found: float
    limit: float

    @property
    def is_rounding(self) -> bool:
        return self.found <= self.limit
