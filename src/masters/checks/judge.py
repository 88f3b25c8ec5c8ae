"""A test question to the judge's server, asked by `masters check` and by a run before it generates responses."""

from masters.checks.model_folder import JudgeServer
from masters.common.errors import InputError, Unreachable
from masters.config import Config
from masters.config.judge_url import API_KEY_VARIABLE
from masters.rewards.judge_probe import ProbeResult, probe_judge
from masters.rewards.judge_prompts import TokenLimits

KEY_REFUSED = (401, 403)  # HTTP status codes
CHECK_RETRIES = 2  # of `masters check`: about 2 s if nothing answers


def ask_test_question(server: JudgeServer, config: Config, retries: int | None = None) -> ProbeResult:
    """Ask a judge's server for a verdict on a right answer. `retries`: None for as many as a run makes."""
    from masters.rewards.judge_server import MAX_RETRIES, ServerJudge  # takes a second to import

    timeout, retries = config.runtime.judge_timeout, MAX_RETRIES if retries is None else retries
    with ServerJudge(server.url, server.model, timeout=timeout, retries=retries) as client:
        return probe_judge(client, TokenLimits.for_each_reply(config.rewards.judge_tokens))


def require_verdict(server: JudgeServer, result: ProbeResult) -> None:
    """Raise Unreachable if the judge's server does not answer, InputError if its answer is not a verdict."""
    if result.verdict.status == "ok":
        return
    if result.verdict.status == "judge_failed":
        is_key_wrong = result.status_code in KEY_REFUSED
        hint = f"set its key in {API_KEY_VARIABLE}" if is_key_wrong else "start its server, or correct rewards.judge"
        raise Unreachable(f"rewards.judge: {server.url} does not answer ({result.reason}): {hint}")
    raise InputError(f"rewards.judge: {server.url} gave no verdict on a test question: {result.reason}")


def describe_probe(server: JudgeServer, result: ProbeResult) -> str:
    """Return a line on a judge that gave a verdict."""
    return (
        f"{server.url}: verdict {result.verdict.score:g} on a right answer in {result.seconds:.2f} s "
        f"(2 calls with {result.style})"
    )


def list_probe_warnings(server: JudgeServer, result: ProbeResult) -> list[str]:
    """Return a warning if the judge takes a right answer for a wrong one."""
    if result.verdict.score == 1.0:
        return []
    words = " ".join(result.verdict.explanation.split())[:200]
    return [f"judge {server.url} scores a right answer to a test question {result.verdict.score:g}: {words!r}"]
