"""A generation worker without a model: it answers with a word at once. For `python -m benchmarks large` alone.

Plan, prompt tokens, tables, commits and progress are those of a real worker.
"""

from pathlib import Path
from typing import cast

from transformers import AutoProcessor

from masters.config import Runtime, Sampling
from masters.execution import child_process
from masters.models.generation import worker
from masters.models.generation.engine import Engine, Reply, Request
from masters.models.prompts import model_inputs

WORDS = ("red", "blue", "green", "yes", "no", "circle", "triangle", "rectangle")


class StandInEngine:
    """Replies as `Engine` does, with a word that the seed chooses."""

    def __init__(self, folder: Path, dtype: str, runtime: Runtime, enable_sleep: bool = False) -> None:
        self._processor = AutoProcessor.from_pretrained(folder)
        self._prompt_token_ids: dict[str, list[int]] = {}  # by question: all images of the demo have one size

    def remask(self, thresholds: dict[str, float]) -> None:
        pass

    def generate(self, requests: list[Request], sampling: Sampling) -> list[list[Reply]]:
        return [[self._reply(request, sample) for sample in range(request.samples)] for request in requests]

    def _reply(self, request: Request, sample: int) -> Reply:
        text, tokenizer = WORDS[(request.seed + sample) % len(WORDS)], self._processor.tokenizer
        tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        return Reply(self._tokenize_prompt(request), tokens, text, "stop")

    def _tokenize_prompt(self, request: Request) -> list[int]:
        if request.question not in self._prompt_token_ids:
            inputs = model_inputs(self._processor, request.question, request.image)
            self._prompt_token_ids[request.question] = inputs["input_ids"][0].tolist()
        return self._prompt_token_ids[request.question]


if __name__ == "__main__":
    worker.Engine = cast(type[Engine], StandInEngine)
    child_process.child_main(worker.main)
