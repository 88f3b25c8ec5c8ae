"""Accuracy reward by an LLM judge: two calls per triple, over any client. Imports no torch."""

from dataclasses import dataclass
from typing import Literal, Protocol

from masters.rewards.judge_prompts import (
    EXPLANATION_TOKENS,
    SCORE_TOKENS,
    Conversation,
    grading_conversation,
    parse_score,
    parse_verdict,
    score_conversation,
)
from masters.rewards.verdict import Triple, Verdict


@dataclass(frozen=True)
class JudgeReply:
    """The judge's reply to one conversation; without a reply, `text` is the reason."""

    text: str
    status: Literal["ok", "cut_off", "refused", "judge_failed"] = "ok"


class JudgeClient(Protocol):
    """An engine or a server that continues conversations greedily."""

    def ask(self, conversations: list[Conversation], max_tokens: int) -> list[JudgeReply]:
        """Returns one reply per conversation, in order. A conversation never makes it raise."""
        ...


def judge_triples(client: JudgeClient, triples: list[Triple]) -> list[Verdict]:
    """Returns one verdict per triple, in order. The second call is made only where the first reply holds a score."""
    explanations = client.ask([grading_conversation(triple) for triple in triples], EXPLANATION_TOKENS)
    scores = [parse_verdict(reply.text) if reply.status == "ok" else None for reply in explanations]
    scored = [reply for reply, score in zip(explanations, scores, strict=True) if score is not None]
    readings = iter(client.ask([score_conversation(reply.text) for reply in scored], SCORE_TOKENS))
    return [
        _verdict_without_score(reply) if score is None else _verdict_if_agreed(reply, score, next(readings))
        for reply, score in zip(explanations, scores, strict=True)
    ]


def _verdict_without_score(explanation: JudgeReply) -> Verdict:
    if explanation.status in ("refused", "judge_failed"):
        return Verdict(None, explanation.status, explanation.text)
    return Verdict(None, "parse_failed", explanation.text)


def _verdict_if_agreed(explanation: JudgeReply, score: int, reading: JudgeReply) -> Verdict:
    """The verdict of two replies, which counts only if both give the same score."""
    if reading.status in ("refused", "judge_failed"):
        return Verdict(None, reading.status, reading.text)
    if parse_score(reading.text) != score:
        return Verdict(None, "parse_failed", explanation.text, reading.text)
    return Verdict(float(score), "ok", explanation.text, reading.text)
