"""Read a judge's reply from a chat completion, whose fields a server may leave out or fill in its own way."""

from typing import Any

from masters.rewards.judge import JudgeReply

CUT_OFF = ("length", "max_tokens", "max_output_tokens")  # finish reasons, in lower case, of a reply at its token limit
MAX_REASON = 300  # characters


def read_completion(completion: Any) -> JudgeReply:
    """Return the reply of a chat completion. Raises an error of any type if it is none.

    Servers that pass requests on may report an error in the body of a successful response. A model's refusal, in a
    field of its own or by a content filter, is a reply without a score.
    """
    if error := getattr(completion, "error", None):
        raise ValueError(f"the server reports an error: {error}"[:MAX_REASON])
    choice = completion.choices[0]
    text, reason = _text(choice.message.content), str(choice.finish_reason).lower()
    if not text and isinstance(refusal := getattr(choice.message, "refusal", None), str) and refusal:
        text = f"the judge refuses: {_encodable(refusal)}"
    elif not text and reason == "content_filter":
        text = "a content filter of the server kept the reply back"
    tokens = getattr(completion.usage, "total_tokens", 0)
    return JudgeReply(text, "cut_off" if reason in CUT_OFF else "ok", tokens if isinstance(tokens, int) else 0)


def _text(content: object) -> str:
    """Return a reply's text, encodable as UTF-8. Raises TypeError if it is not a text.

    A list holds the text in parts, of which those with thoughts have another type.
    """
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        return "".join(_text(part.get("text")) for part in content if part.get("type") in ("text", "output_text"))
    if content is not None and not isinstance(content, str):
        raise TypeError(f"its content is no text but {type(content).__name__}")
    return _encodable(content or "")


def _encodable(text: str) -> str:
    return text.encode(errors="replace").decode()
