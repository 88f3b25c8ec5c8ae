"""The judge model of a stage, how `score` and `evaluate` run it, and the name of the accuracy metric."""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from masters.checks.model_folder import JudgeServer, LocalModel
from masters.common.errors import WorkerError
from masters.config import Config
from masters.config.judge_url import is_url
from masters.data.question_shards import split_by_digest
from masters.models.judging import batches
from masters.models.judging.batches import Judge
from masters.models.judging.job import EngineEndpoint, ServerEndpoint
from masters.rewards.verdict import FINAL_STATUSES, Triple, Verdict
from masters.rewards.verifiers import get_verifier
from masters.store import tables
from masters.store.artifacts import Identity
from masters.store.storage import Storage
from masters.tasks.build_or_reuse import write_file
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
    if isinstance(model, JudgeServer):
        endpoint = ServerEndpoint(url=model.url, model=model.model)
        return Judge(model.model or model.url, dict(url=model.url, model=model.model), endpoint)
    dtype = context.config.generate.dtype
    endpoint = EngineEndpoint(folder=model.folder, dtype=dtype, trust_remote_code=model.has_custom_code)
    return Judge(model.name, dict(digest=model.digest, dtype=dtype), endpoint)


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
