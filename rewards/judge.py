"""Accuracy reward by an LLM judge: two calls per triple, over any client. Imports no torch."""

from dataclasses import dataclass, replace
from typing import Literal, Protocol

from masters.rewards.judge_prompts import (
    DEFAULT_LIMITS,
    Conversation,
    TokenLimits,
    grading_conversation,
    score_conversation,
)
from masters.rewards.judge_replies import parse_bare_score, parse_score, parse_verdict, skip_thoughts
from masters.rewards.verdict import Triple, Verdict


@dataclass(frozen=True)
class JudgeReply:
    """The judge's reply to one conversation; without a reply, `text` is the reason.

    `tokens`: of prompt and reply, as far as they are known. `may_pass`: a failure that may be over later (a time-out,
    HTTP 429 or 5xx). `status_code`: of HTTP, if the server refused the request.
    """

    text: str
    status: Literal["ok", "cut_off", "refused", "judge_failed"] = "ok"
    tokens: int = 0
    may_pass: bool = False
    status_code: int | None = None


class JudgeClient(Protocol):
    """An engine or a server that continues conversations greedily."""

    def ask(self, conversations: list[Conversation], max_tokens: int) -> list[JudgeReply]:
        """Return one reply per conversation, in order. A conversation never makes it raise."""
        ...


def judge_triples(client: JudgeClient, triples: list[Triple], limits: TokenLimits = DEFAULT_LIMITS) -> list[Verdict]:
    """Return one verdict per triple, in order. The second call is made only where the first reply holds a score."""
    replies = client.ask([grading_conversation(triple) for triple in triples], limits.explanation)
    explanations = [_without_thoughts(reply, triple) for reply, triple in zip(replies, triples, strict=True)]
    scores = [parse_verdict(reply.text) if reply.status == "ok" else None for reply in explanations]
    scored = [reply for reply, score in zip(explanations, scores, strict=True) if score is not None]
    readings = iter(client.ask([score_conversation(reply.text) for reply in scored], limits.score))
    return [
        _verdict_without_score(explanation if explanation.text else reply)
        if score is None
        else _verdict_if_agreed(explanation, score, next(readings))
        for reply, explanation, score in zip(replies, explanations, scores, strict=True)
    ]


def _without_thoughts(reply: JudgeReply, triple: Triple) -> JudgeReply:
    if reply.status not in ("ok", "cut_off"):
        return reply
    quotable = "\n".join([triple.question, *triple.accepted, triple.text])
    return replace(reply, text=skip_thoughts(reply.text, quotable))


def _verdict_without_score(explanation: JudgeReply) -> Verdict:
    if explanation.status in ("refused", "judge_failed"):
        return Verdict(None, explanation.status, explanation.text)
    return Verdict(None, "parse_failed", explanation.text)


def _verdict_if_agreed(explanation: JudgeReply, score: int, reading: JudgeReply) -> Verdict:
    """Return the verdict of two replies, which counts only if both give the same score."""
    if reading.status in ("refused", "judge_failed"):
        return Verdict(None, reading.status, reading.text)
    text = skip_thoughts(reading.text, explanation.text)
    # what follows a sentence that was cut off may deny it
    repeated = parse_bare_score(text) if reading.status == "cut_off" else parse_score(text)
    if repeated != score:
        return Verdict(None, "parse_failed", explanation.text, reading.text)
    return Verdict(float(score), "ok", explanation.text, text)
