"""Prompts and images of the questions that a trainer works on, read when they are needed."""

from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar as disable_progress_bars
from transformers import AutoProcessor

from masters.common.errors import MastersError
from masters.data.question_shards import Ref
from masters.models.packing.prefix_tree import Question
from masters.models.prompts import label_tokens, model_inputs
from masters.models.training.groups import Group
from masters.store import artifacts


class QuestionPrompts:
    """Makes the processor's prompt (text and image tensors) of a question: one user turn, the image, the question.

    Rows are read at random from a memory-mapped copy of the questions table. Prompts are kept up to `CACHE_BYTES`.
    """

    CACHE_BYTES = 512 << 20

    def __init__(self, folder: Path, data: artifacts.Artifact, work: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        # a copy is named by its content, and whole: the other ranks and an interrupted run's successor use it too
        local = data.storage.download(f"{data.folder}/questions", work / f"questions-{data.record['digest'][:16]}")
        parts: list[Any] = [str(local / name.rsplit("/", 1)[1]) for name in data.files("questions")]
        disable_progress_bars()
        self.table = Dataset.from_parquet(parts, cache_dir=str(work / "arrow"), keep_in_memory=False)
        self.first = [0, *accumulate(parquet.read_metadata(part).num_rows for part in parts)]
        self.cache: dict[Ref, dict[str, torch.Tensor]] = {}
        self.room = self.CACHE_BYTES

    def row(self, ref: Ref) -> dict:
        return self.table[self.first[ref.file] + ref.row]

    def prompt(self, ref: Ref) -> dict[str, torch.Tensor]:
        """The processor's output, [1, P] token tensors and the family's image tensors."""
        if ref in self.cache:
            return self.cache[ref]
        row = self.row(ref)
        prompt = model_inputs(self.processor, row["question"], row["image"])
        size = sum(tensor.nbytes for tensor in prompt.values())
        if size <= self.room:
            self.cache[ref], self.room = prompt, self.room - size
        return prompt

    def label(self, answer: str) -> list[int]:
        return label_tokens(self.processor.tokenizer, answer)

    def question(self, group: Group) -> Question:
        prompt = self.prompt(group.ref)
        if group.prompt is not None and prompt["input_ids"][0].tolist() != group.prompt.tolist():
            raise MastersError(
                f"question {group.ref.question_id}: the engine's prompt ({len(group.prompt)} tokens) is not the "
                f"processor's ({prompt['input_ids'].shape[1]} tokens): vLLM and transformers disagree on its image"
            )
        return Question(group.ref.question_id, prompt, group.responses)
