"""A judge in an engine of this project, on the unmasked weights of its model."""

from pathlib import Path

from masters.config import Runtime
from masters.models.generation.engine import Engine, Reply
from masters.rewards.judge import JudgeReply
from masters.rewards.judge_prompts import Conversation

REFUSED = JudgeReply(
    "the prompt and the longest answer exceed runtime.max_model_len, or the prompt quotes a control token of the judge",
    "refused",
)


class EngineJudge:
    """A `JudgeClient` that continues conversations with vLLM, each list as one batch. Its process ends with it."""

    def __init__(self, folder: Path, dtype: str, runtime: Runtime, trust_remote_code: bool = False) -> None:
        self._engine = Engine(folder, dtype, runtime, trust_remote_code)

    def ask(self, conversations: list[Conversation], max_tokens: int) -> list[JudgeReply]:
        replies = self._engine.continue_conversations(conversations, max_tokens)
        return [_to_answer(reply) for reply in replies]


def _to_answer(reply: Reply | None) -> JudgeReply:
    if reply is None:
        return REFUSED
    return JudgeReply(reply.text, "cut_off" if reply.finish_reason == "length" else "ok")
