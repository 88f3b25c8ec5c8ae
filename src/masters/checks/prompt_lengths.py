"""Counts, before work starts, the prompts that leave no room for a response in an engine's context."""

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import AutoProcessor

from masters.checks.preflight import Resources, shortest_context_length
from masters.common.errors import InputError
from masters.config import Config
from masters.data.question_selection import assign_validation
from masters.data.row_validation import RejectedRow, validate_rows
from masters.data.sources import RawRow, Source
from masters.data.split_names import find_split
from masters.models.generation.engine import REMEDY
from masters.models.prompts import PromptLengthCounter, chat_prompt, open_image

MEASURED_PROMPTS = 512  # of a split; more only while none of them fits


@dataclass(frozen=True)
class PromptLengths:
    """Measured prompts of a split: how many were measured, how many are too long, and the tokens of the longest."""

    measured: int = 0
    too_long: int = 0
    longest: int = 0

    @property
    def is_enough(self) -> bool:
        """Return whether no more prompts need to be measured."""
        return self.measured >= MEASURED_PROMPTS and self.too_long < self.measured

    def add(self, tokens: int, limit: int) -> "PromptLengths":
        return PromptLengths(self.measured + 1, self.too_long + (tokens > limit), max(self.longest, tokens))


def check_prompt_lengths(config: Config, resources: Resources) -> list[str]:
    """Return a warning for each split in which some prompts are too long for an engine.

    Raises InputError if all prompts of a split are: generation or evaluation would end with an error.
    """
    limit = shortest_context_length(config, resources) - config.generate.max_tokens
    splits = [config.evaluate.split, *(["train"] if config.train.targets == "responses" else [])]
    warnings = []
    for split, lengths in measure_splits(config, resources, splits, limit).items():
        if not lengths.too_long:
            continue
        found = (
            f"{lengths.too_long:,} of {lengths.measured:,} prompts of split {split!r} are too long: with "
            f"generate.max_tokens = {config.generate.max_tokens} for the response, an engine takes prompts of "
            f"{limit:,} tokens, the longest has {lengths.longest:,}"
        )
        if lengths.too_long == lengths.measured:
            raise InputError(f"source {config.data.source}: {found}; {REMEDY}")
        warnings.append(f"{found}; they get no response; {REMEDY}")
    return warnings


def measure_splits(config: Config, resources: Resources, splits: list[str], limit: int) -> dict[str, PromptLengths]:
    """Measure the first valid questions of each split, by split. A prompt of more than `limit` tokens is too long."""
    processor = AutoProcessor.from_pretrained(resources.student.folder, trust_remote_code=False)
    count_tokens, lengths = PromptLengthCounter(processor), dict.fromkeys(splits, PromptLengths())
    for row in validate_rows(UnmeasuredRows(resources.source, lengths), resources.special_tokens):
        if isinstance(row, RejectedRow):
            continue
        split = assign_validation(row, config.data.validation_share)["split"]
        if split in lengths and not lengths[split].is_enough:
            tokens = count_tokens(chat_prompt(processor, row["question"]), open_image(row["image"]).size)
            lengths[split] = lengths[split].add(tokens, limit)
    return lengths


class UnmeasuredRows:
    """The rows of a source that may belong to a split of which more prompts are to be measured."""

    def __init__(self, source: Source, lengths: dict[str, PromptLengths]) -> None:
        self._source, self._lengths = source, lengths

    def digest(self) -> str:
        return self._source.digest()

    def rows(self) -> Iterator[RawRow]:
        for row in self._source.rows():
            missing = {split for split, lengths in self._lengths.items() if not lengths.is_enough}
            if not missing:
                return
            split = find_split(row.split)  # None: the image decides
            is_measured = missing <= {"train", "validation"} if split == "test" else missing == {"test"}
            if split is None or not is_measured:
                yield row
