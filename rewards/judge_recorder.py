"""Keep a judge's replies, and explain from them why there is no verdict."""

from masters.rewards.judge import JudgeClient, JudgeReply
from masters.rewards.judge_prompts import Conversation, TokenLimits


class RecordingClient:
    """A judge client that passes calls to another one and keeps its replies."""

    def __init__(self, client: JudgeClient, limits: TokenLimits) -> None:
        self._client, self._limits = client, limits
        self.replies: list[JudgeReply] = []

    def ask(self, conversations: list[Conversation], max_tokens: int) -> list[JudgeReply]:
        replies = self._client.ask(conversations, max_tokens)
        self.replies += replies
        return replies

    def explain_no_verdict(self) -> str:
        """Return why these replies give no verdict, and what to do if that is known."""
        for reply in self.replies:
            if reply.status in ("refused", "judge_failed"):
                return reply.text
        if any(reply.status == "cut_off" for reply in self.replies):
            return (
                f"replies were cut off at {self._limits.explanation} and {self._limits.score} tokens before their "
                "score: raise rewards.judge_tokens (a judge that thinks needs thousands)"
            )
        first_and_last = self.replies[:1] + self.replies[1:][-1:]
        found = " and ".join(repr(" ".join(reply.text.split())[-120:]) for reply in first_and_last)
        return (
            "expected a reply that ends with <answer>0</answer> or <answer>1</answer>, and in the second call the same "
            f"score, found {found}: choose a judge that follows instructions"
        )
