"""Judges as different servers have them: which parameters each takes, and how it words a verdict that is right."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.fake_judge import judge_by_exact_match

TAG = re.compile(r"<answer>\W*(\d)", re.IGNORECASE)


@dataclass(frozen=True)
class Mode:
    """Requests that a server refuses, and functions that write its replies from the right one, score and token limit.

    A reply is the content, or a message; a message's `cut` says that it was cut off.
    """

    refuses: Callable[[dict], str | None] = lambda call: None
    refusal_code: int = 400
    first: Callable[[str, str, int], object] = lambda right, score, limit: right
    second: Callable[[str, str, int], object] = lambda right, score, limit: right

    def respond(self, call: dict) -> tuple[int, dict]:
        if message := self.refuses(call):
            return self.refusal_code, dict(error=dict(message=message, type="invalid_request_error"))
        user = call["messages"][-1]["content"]
        is_second = "<overall_summary>" in user
        right = TAG.findall(user)[-1] if is_second else judge_by_exact_match(user)
        score = right if is_second else TAG.findall(right)[-1]
        limit = call.get("max_completion_tokens", call.get("max_tokens"))
        reply = (self.second if is_second else self.first)(right, score, limit)
        message = dict(reply) if isinstance(reply, dict) else dict(content=reply)
        finish_reason = "length" if message.pop("cut", False) else "stop"
        choice = dict(index=0, message=dict(role="assistant") | message, finish_reason=finish_reason)
        usage = dict(prompt_tokens=90, completion_tokens=10, total_tokens=100)
        return 200, dict(
            id="1", object="chat.completion", created=0, model=call["model"], choices=[choice], usage=usage
        )


def refuse(*parameters: str, system: bool = False, other_temperature: bool = False) -> Callable[[dict], str | None]:
    """Refuse these parameters, a system turn, or a temperature other than 1."""

    def check(call: dict) -> str | None:
        for name in parameters:
            if name in call:
                return f"Unsupported parameter: '{name}' is not supported with this model."
        if other_temperature and call.get("temperature", 1) != 1:
            return "Unsupported value: 'temperature' does not support 0 with this model."
        if system and any(turn["role"] == "system" for turn in call["messages"]):
            return "System role not supported"
        return None

    return check


def think(opening: str, closing: str, words: int) -> Mode:
    """Think before each reply, within the token limit."""

    def reply(right: str, score: str, limit: int) -> object:
        parts = f"{opening}{'hm ' * words}a draft: <answer>0</answer> {closing}\n{right}".split(" ")
        return dict(content=" ".join(parts[:limit]), cut=len(parts) > limit)

    return Mode(first=reply, second=reply)


def reword(first: str = "{right}", second: str = "{score}") -> Mode:
    """Word a right reply in another way; `{right}` is the plain reply, `{score}` the score."""

    def write(form: str) -> Callable[[str, str, int], object]:
        return lambda right, score, limit: form.replace("{right}", right).replace("{score}", score)

    return Mode(first=write(first), second=write(second))


def think_beside(field: str, words: int) -> Mode:
    """Put thoughts into a field of their own; they count to the token limit."""

    def reply(right: str, score: str, limit: int) -> object:
        if words >= limit:
            return {"content": None, field: "hm " * limit, "cut": True}
        return {"content": right, field: "hm " * words}

    return Mode(first=reply, second=reply)


def reply_in_parts(right: str, score: str, limit: int) -> object:
    """Reply with a list of parts: a thought and the text."""
    return dict(content=[dict(type="thinking", thinking=[dict(type="text", text="0?")]), dict(type="text", text=right)])


# styles of requests
PARAMETERS: dict[str, Mode] = {
    "every parameter": Mode(),
    "only max_completion_tokens": Mode(refuse("max_tokens")),
    "only max_tokens": Mode(refuse("max_completion_tokens")),
    "no temperature": Mode(refuse("temperature")),
    "only max_completion_tokens and temperature 1": Mode(refuse("max_tokens", other_temperature=True)),
    "no system turn": Mode(refuse(system=True)),
    "only max_completion_tokens, no system turn": Mode(refuse("max_tokens", system=True)),
    "only max_completion_tokens, said by 422": Mode(refuse("max_tokens"), refusal_code=422),
    "nothing but max_completion_tokens": Mode(refuse("max_tokens", "temperature", system=True)),
}
# read within the default token limits
DECORATED: dict[str, Mode] = {
    "bold": reword("It compares. **<answer>{score}</answer>**", "**{score}**"),
    "bold inside the tag": reword("<answer>**{score}**</answer>", "__{score}__"),
    "a full stop": reword("{right}.", "{score}."),
    "capitals": reword("It compares.\n<Answer>{score}</ANSWER>"),
    "brackets": reword("[<answer>{score}</answer>]", "[{score}]"),
    "parentheses and quotes": reword("(\"<answer> '{score}' </answer>\")", '"{score}"'),
    "code": reword("```\n{right}\n```", "`{score}`"),
    "a sentence": reword(second="The score is {score}."),
    "a bold sentence": reword(second="**Score:** {score}"),
    "the tag again": reword(second="<answer>{score}</answer>"),
    "JSON": reword(second='{"score": {score}}'),
    "a reason": reword(second="The score is {score} because it does not differ."),
    "parts": Mode(first=reply_in_parts, second=reply_in_parts),
    "special tokens": reword("{right}<|im_end|>", "{score}<|im_end|>"),
    "a channel of thoughts": think("<|channel|>analysis<|message|>", "<|end|><|channel|>final<|message|>", 1),
    "a short thought": think("<think>", "</think>", 1),
    "a thought without an opening tag": think("", "</think>", 1),
    "a thought beside the content": think_beside("reasoning_content", 4),
    "reasoning beside the content": think_beside("reasoning", 4),
}
# cut off at the default token limits
THINKING: dict[str, Mode] = {
    "long thoughts": think("<think>", "</think>", 600),
    "long thoughts in another tag": think("[THINK]", "[/THINK]", 600),
    "long thoughts without an opening tag": think("", "</think>", 600),
    "long thoughts beside the content": think_beside("reasoning_content", 600),
}
# no verdict, with whatever room
UNREADABLE: dict[str, Mode] = {
    "no tag": reword("It is right."),
    "both scores": reword("{right} <answer>0</answer>"),
    "doubt": reword(second="The score is not {score}."),
    "a question": reword(second="{score}?"),
    "an alternative": reword(second="{score} or not"),
    "thoughts without end": reword("<think> {right}"),
    "refuses all": Mode(lambda call: "this account may not use this model"),
}
