"""A process that answers shards like an engine's, with a stand-in for the model: it says a word at once.

Plan, prompts' tokens, tables, commits and progress are the real ones. For `python -m benchmarks large` alone.
"""

from pathlib import Path
from typing import cast

from transformers import AutoProcessor

from masters.config import Generate, Runtime
from masters.execution import processes
from masters.models.generation import worker
from masters.models.generation.engine import Engine, Reply, Request
from masters.models.prompts import model_inputs

WORDS = ("red", "blue", "green", "yes", "no", "circle", "triangle", "rectangle")


class StandIn:
    """Answers as `Engine` does, a word that the seed chooses."""

    def __init__(self, folder: Path, dtype: str, runtime: Runtime, sleeps: bool = False) -> None:
        self._processor = AutoProcessor.from_pretrained(folder)
        self._prompts: dict[str, list[int]] = {}  # by question: all images of the demo have one size

    def remask(self, thresholds: dict[str, float]) -> None:
        pass

    def generate(self, requests: list[Request], sampling: Generate) -> list[list[Reply]]:
        return [[self._reply(request, n) for n in range(request.samples)] for request in requests]

    def _reply(self, request: Request, sample: int) -> Reply:
        text, tokenizer = WORDS[(request.seed + sample) % len(WORDS)], self._processor.tokenizer
        tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        return Reply(self._prompt(request), tokens, text, "stop")

    def _prompt(self, request: Request) -> list[int]:
        if request.question not in self._prompts:
            inputs = model_inputs(self._processor, request.question, request.image)
            self._prompts[request.question] = inputs["input_ids"][0].tolist()
        return self._prompts[request.question]


if __name__ == "__main__":
    worker.Engine = cast(type[Engine], StandIn)
    processes.child_main(worker.main)
