"""Sampling settings of an engine. Imports no torch."""

from dataclasses import asdict, dataclass
from typing import Any

# bounds of vLLM's SamplingParams, in which the configuration accepts values
MIN_TEMPERATURE = 0.01  # vLLM silently raises a smaller temperature, other than 0, to this
MAX_TEMPERATURE = 2.0


@dataclass(frozen=True)
class Sampling:
    """Settings that shape a single response: sampling parameters, length, data type of the engine, and seed.

    They take part in the identity of shards: `to_identity` must keep its keys.
    """

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    max_tokens: int
    dtype: str
    seed: int

    @classmethod
    def greedy(cls, max_tokens: int, dtype: str) -> "Sampling":
        """Return settings that always take the likeliest token."""
        return cls(
            temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0, max_tokens=max_tokens, dtype=dtype, seed=0
        )

    def to_identity(self) -> dict[str, Any]:
        """Return the settings as literals for a fingerprint."""
        return asdict(self)
