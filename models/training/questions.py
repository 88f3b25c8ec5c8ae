"""Prompts and images of training questions, read from the questions table when they are needed."""

from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar as disable_progress_bars
from transformers import AutoProcessor

from masters.common.errors import MastersError
from masters.data.question_shards import QuestionRef
from masters.models.packing.prefix_tree import Question
from masters.models.prompts import model_inputs, tokenize_label
from masters.models.training.groups import Group
from masters.store import artifacts


class QuestionPrompts:
    """Makes the processor's prompt of a question (token and image tensors): one user turn with image and question.

    Rows are read in any order from a memory-mapped copy of the questions table. Up to `CACHE_BYTES` of prompts are
    cached.
    """

    CACHE_BYTES = 512 << 20

    def __init__(self, folder: Path, data: artifacts.Artifact, work: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        # the folder is named by its content, so that other ranks and a resumed run use the same copy
        local = data.storage.download(f"{data.folder}/questions", work / f"questions-{data.record['digest'][:16]}")
        parts: list[Any] = [str(local / name.rsplit("/", 1)[1]) for name in data.files("questions")]
        disable_progress_bars()
        self.table = Dataset.from_parquet(parts, cache_dir=str(work / "arrow"), keep_in_memory=False)
        self.first_rows = [0, *accumulate(parquet.read_metadata(part).num_rows for part in parts)]
        self.cache: dict[QuestionRef, dict[str, torch.Tensor]] = {}
        self.cache_room = self.CACHE_BYTES

    def row(self, ref: QuestionRef) -> dict:
        """Return the question's row of the table."""
        return self.table[self.first_rows[ref.file] + ref.row]

    def prompt(self, ref: QuestionRef) -> dict[str, torch.Tensor]:
        """Return the processor's output: token tensors [1, P] and the family's image tensors."""
        if ref in self.cache:
            return self.cache[ref]
        row = self.row(ref)
        prompt = model_inputs(self.processor, row["question"], row["image"])
        size = sum(tensor.nbytes for tensor in prompt.values())
        if size <= self.cache_room:
            self.cache[ref] = prompt
            self.cache_room -= size
        return prompt

    def label(self, answer: str) -> list[int]:
        """Return the answer's tokens, end token included."""
        return tokenize_label(self.processor.tokenizer, answer)

    def question(self, group: Group) -> Question:
        """Return the group, ready to pack. Raises MastersError if the engine saw other prompt tokens."""
        prompt = self.prompt(group.ref)
        if group.prompt is not None and prompt["input_ids"][0].tolist() != group.prompt.tolist():
            raise MastersError(
                f"question {group.ref.question_id}: the engine's prompt ({len(group.prompt)} tokens) is not the "
                f"processor's ({prompt['input_ids'].shape[1]} tokens): vLLM and transformers disagree on its image"
            )
        return Question(group.ref.question_id, prompt, group.responses)
