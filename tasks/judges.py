"""The judge model of a stage, how `score` and `evaluate` run it, and the name of the accuracy metric."""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from masters.checks.judge import ask_test_question, list_probe_warnings, require_verdict
from masters.checks.model_folder import JudgeServer, LocalModel
from masters.common.errors import WorkerError
from masters.config import Config
from masters.config.judge_url import is_url
from masters.config.stages import Stage
from masters.data.question_shards import split_by_digest
from masters.models.judging import batches
from masters.models.judging.batches import Judge
from masters.models.judging.job import EngineEndpoint, ServerEndpoint
from masters.rewards.judge_prompts import TokenLimits
from masters.rewards.verdict import FINAL_STATUSES, Triple, Verdict
from masters.rewards.verifiers import get_verifier
from masters.store import tables
from masters.store.artifacts import Identity
from masters.store.storage import Storage
from masters.tasks.build_or_reuse import write_file
from masters.tasks.progress import warn
from masters.tasks.run_context import Context, Round, Run

Verdicts = dict[Triple, Verdict]


def scoring_judge(context: Context, current: Round) -> Judge | None:
    """Return the LLM that judges the responses of this round, None if rules score them."""
    if context.config.rewards.accuracy != "llm":
        return None
    return _make_judge(context, context.resources.judge or current.teacher)


def evaluation_judge(context: Context) -> Judge | None:
    """Return the LLM that judges the answers in an evaluation, None if rules decide."""
    if context.config.evaluate.accuracy != "llm":
        return None
    assert context.resources.judge is not None  # the configuration names one and preflight has opened it
    return _make_judge(context, context.resources.judge)


def _make_judge(context: Context, model: LocalModel | JudgeServer) -> Judge:
    limits = TokenLimits.for_each_reply(context.config.rewards.judge_tokens)
    if isinstance(model, JudgeServer):
        endpoint = ServerEndpoint(url=model.url, model=model.model, style=context.judge_style)
        return Judge(model.model or model.url, dict(url=model.url, model=model.model), endpoint, limits)
    dtype = context.config.generate.dtype
    endpoint = EngineEndpoint(folder=model.folder, dtype=dtype, trust_remote_code=model.has_custom_code)
    return Judge(model.name, dict(digest=model.digest, dtype=dtype), endpoint, limits)


def is_judged_by_server(run: Run, stages: Collection[Stage]) -> bool:
    """Return whether this process, in one of these stages, sends texts to a judge's server."""
    config = run.config
    scores = Stage.SCORE in stages and config.needs_verdicts and config.rewards.accuracy == "llm"
    evaluates = Stage.EVALUATE in stages and config.evaluate.accuracy == "llm"
    judging = [stage for stage, judges in ((Stage.SCORE, scores), (Stage.EVALUATE, evaluates)) if judges]
    is_server = isinstance(run.resources.judge, JudgeServer)
    return is_server and any(not run.pool_for(stage) for stage in judging)


def ask_judge_first(run: Run) -> None:
    """Ask the judge's server a test question before work whose texts it will judge, once in a run.

    Keeps the parameters that the server takes. Raises InputError if it gives no verdict; a server that only seems busy
    is warned of, as it may answer when it is needed.
    """
    server = run.resources.judge
    if not isinstance(server, JudgeServer) or run.judge_style is not None:
        return
    result = ask_test_question(server, run.config)
    if result.verdict.status == "judge_failed" and result.may_pass:
        warn(f"judge {server.url} did not answer a test question ({result.reason}): it is asked again when needed")
        return
    require_verdict(server, result)
    for warning in list_probe_warnings(server, result):
        warn(warning)
    run.judge_style = result.style


def accuracy_metric(config: Config) -> str:
    """Return the name of an evaluation's accuracy, which says who decides what is correct."""
    if config.evaluate.accuracy == "rules":
        return get_verifier(config.answers).metric
    judge = config.rewards.judge
    name = config.rewards.judge_model or (judge if is_url(judge) or not Path(judge).is_dir() else Path(judge).name)
    return f"accuracy by judge {name}"


def run_judge(run: Run, identity: Identity, judge: Judge, triples: Collection[Triple]) -> tuple[Verdicts, dict]:
    """Return the judge's verdict on each triple, and how the judging ran."""
    with run.track_progress(identity, "texts judged") as progress:
        return batches.run_judging(
            run.storage, judge, list(triples), run.config.runtime, run.work_folder(identity), progress.update
        )


def check_any_verdict(judge: str, verdicts: Verdicts) -> None:
    """Raise WorkerError if there are texts and the judge gave no verdict on any of them."""
    if not verdicts or any(verdict.status == "ok" for verdict in verdicts.values()):
        return
    counts = Counter(verdict.status for verdict in verdicts.values())
    reply = " ".join(next(iter(verdicts.values())).explanation.split())[:200]
    raise WorkerError(
        f"judge {judge} gave no verdict on any of {len(verdicts)} texts ({format_counts(counts)}); "
        f"its first reply: {reply!r}"
    )


def format_counts(statuses: Mapping[str, int]) -> str:
    return ", ".join(f"{status} {count:,}" for status, count in sorted(statuses.items()))


def write_judgements(storage: Storage, identity: Identity, verdicts: Verdicts) -> dict[str, str]:
    """Write the table `judgements`: the replies of the judge to both calls, with one row for each triple.

    Triples without a final verdict are left out. Returns SHA-256 by file name.
    """
    final = (triple for triple, verdict in verdicts.items() if verdict.status in FINAL_STATUSES)
    files = {}
    for prefix, part in split_by_digest(sorted(final, key=lambda triple: triple.digest), batches.BATCH):
        rows = [batches.judgement_row(triple, verdicts[triple]) for triple in part]
        content = tables.encode(rows, tables.JUDGEMENTS)
        files |= write_file(storage, identity, f"judgements/{prefix or 'all'}.parquet", content)
    return files


def delete_judgements(storage: Storage, judge: Judge | None) -> None:
    """Delete the judge's stored verdicts, so that a rebuild judges every text again."""
    for name in storage.names(judge.folder) if judge else ():
        storage.remove(name)
