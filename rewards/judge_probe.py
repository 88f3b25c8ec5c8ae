"""One question to a judge before work starts: whether it gives a verdict, in what time, and why it gives none."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from masters.rewards.judge import judge_triples
from masters.rewards.judge_prompts import TokenLimits
from masters.rewards.judge_recorder import RecordingClient
from masters.rewards.judge_request import RequestStyle
from masters.rewards.verdict import Triple, Verdict

if TYPE_CHECKING:
    from masters.rewards.judge_server import ServerJudge

QUESTION = Triple("What color is the sky on a clear day?", "blue", "Blue.")  # a right answer


@dataclass(frozen=True)
class ProbeResult:
    """A judge's verdict on QUESTION. `seconds` and `tokens` are those of both calls, 0 tokens if it counts none.

    `style`: the parameters that the server takes; None if it took none. `reason`: why there is no verdict.
    `status_code`: of HTTP, if the server refused a request.
    """

    verdict: Verdict
    seconds: float
    tokens: int
    style: RequestStyle | None
    reason: str
    may_pass: bool
    status_code: int | None = None


def probe_judge(server: "ServerJudge", limits: TokenLimits) -> ProbeResult:
    """Ask a judge's server for a verdict on QUESTION."""
    client, started = RecordingClient(server, limits), time.monotonic()
    (verdict,) = judge_triples(client, [QUESTION], limits)
    return ProbeResult(
        verdict,
        seconds=time.monotonic() - started,
        tokens=sum(reply.tokens for reply in client.replies),
        style=server.style,
        reason="" if verdict.status == "ok" else client.explain_no_verdict(),
        may_pass=any(reply.may_pass for reply in client.replies),
        status_code=next((reply.status_code for reply in client.replies if reply.status_code), None),
    )
