"""A judge in an engine of its own, on the model's untouched weights."""

from pathlib import Path

from masters.config import Runtime
from masters.models.generation.engine import Engine, Reply
from masters.rewards.judge import Answer
from masters.rewards.judge_prompts import Conversation

UNASKED = Answer(
    "the prompt and the longest answer exceed runtime.max_model_len, or it quotes a control token of the judge's",
    "refused",
)


class EngineJudge:
    """Answers conversations with vLLM, each list as one batch. Its process ends with it."""

    def __init__(self, folder: Path, dtype: str, runtime: Runtime, own_code: bool = False) -> None:
        self._engine = Engine(folder, dtype, runtime, own_code)

    def ask(self, conversations: list[Conversation], max_tokens: int) -> list[Answer]:
        return [_answer(reply) for reply in self._engine.converse(conversations, max_tokens)]


def _answer(reply: Reply | None) -> Answer:
    if reply is None:
        return UNASKED
    return Answer(reply.text, "cut_off" if reply.finish_reason == "length" else "ok")
