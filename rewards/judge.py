"""R_acc by an LLM: two calls a triple, whoever answers them. Imports no torch."""

from dataclasses import dataclass
from typing import Literal, Protocol

from masters.rewards.judge_prompts import (
    EXPLANATION_TOKENS,
    SCORE_TOKENS,
    Conversation,
    bare_score,
    grading,
    reading,
    verdict_in,
)
from masters.rewards.verdict import Triple, Verdict


@dataclass(frozen=True)
class Answer:
    """What came back on one conversation; where nothing did, `text` says why."""

    text: str
    status: Literal["ok", "cut_off", "refused", "judge_failed"] = "ok"


class JudgeClient(Protocol):
    """An engine or a server that continues conversations, greedily."""

    def ask(self, conversations: list[Conversation], max_tokens: int) -> list[Answer]:
        """An answer each, in order. Never raises on a conversation's account."""
        ...


def judge(voice: JudgeClient, triples: list[Triple]) -> list[Verdict]:
    """A verdict each, in order. Those whose first answer holds no score are not asked about again."""
    explanations = voice.ask([grading(triple) for triple in triples], EXPLANATION_TOKENS)
    scores = [verdict_in(answer.text) if answer.status == "ok" else None for answer in explanations]
    readable = [answer for answer, score in zip(explanations, scores, strict=True) if score is not None]
    readings = iter(voice.ask([reading(answer.text) for answer in readable], SCORE_TOKENS))
    return [
        _unread(answer) if score is None else _agreed(answer, score, next(readings))
        for answer, score in zip(explanations, scores, strict=True)
    ]


def _unread(explanation: Answer) -> Verdict:
    if explanation.status in ("refused", "judge_failed"):
        return Verdict(None, explanation.status, explanation.text)
    return Verdict(None, "parse_failed", explanation.text)


def _agreed(explanation: Answer, score: int, second: Answer) -> Verdict:
    if second.status in ("refused", "judge_failed"):
        return Verdict(None, second.status, second.text)
    if bare_score(second.text) != score:
        return Verdict(None, "parse_failed", explanation.text, second.text)
    return Verdict(float(score), "ok", explanation.text, second.text)
