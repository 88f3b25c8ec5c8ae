"""Which language model judges, what score and evaluate share of asking it, and what an accuracy is called."""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from masters.checks.model_folder import LocalModel, Server
from masters.common.errors import WorkerError
from masters.common.hashing import digest
from masters.config import Config
from masters.config.judge_url import is_url
from masters.data.question_shards import split
from masters.models.judging import batches
from masters.models.judging.batches import Judge
from masters.rewards.verdict import FINAL, Triple, Verdict
from masters.rewards.verifiers import verifier_of
from masters.store import tables
from masters.store.artifacts import Identity
from masters.store.storage import Storage
from masters.tasks.run_context import Context, Round, Run

Verdicts = dict[Triple, Verdict]


def judge_of(context: Context, current: Round) -> Judge | None:
    """The LLM that judges the responses of this round, None for the rules."""
    if context.config.rewards.accuracy != "llm":
        return None
    return _as_judge(context, context.ready.judge or current.teacher)


def evaluation_judge(context: Context) -> Judge | None:
    """The LLM that judges what models answer in an evaluation, None for the rules."""
    if context.config.evaluate.accuracy != "llm":
        return None
    assert context.ready.judge is not None  # the configuration names one, preflight has found it
    return _as_judge(context, context.ready.judge)


def _as_judge(context: Context, model: LocalModel | Server) -> Judge:
    if isinstance(model, Server):
        reach = dict(url=model.url, model=model.model)
        return Judge(model.model or model.url, reach, reach)
    dtype = context.config.generate.dtype
    reach = dict(folder=str(model.folder), dtype=dtype, own_code=model.own_code)
    return Judge(model.name, dict(digest=model.digest, dtype=dtype), reach)


def metric_of(config: Config) -> str:
    """What the accuracy of an evaluation is called."""
    if config.evaluate.accuracy == "rules":
        return verifier_of(config.answers).metric
    judge = config.rewards.judge
    named = config.rewards.judge_model or (judge if is_url(judge) or not Path(judge).is_dir() else Path(judge).name)
    return f"accuracy by judge {named}"


def judged(run: Run, made_of: Identity, judge: Judge, triples: Collection[Triple]) -> tuple[Verdicts, dict]:
    """A verdict on each triple, and how it ran."""
    with run.progress(made_of, "texts judged") as progress:
        return batches.run_judging(
            run.storage, judge, list(triples), run.config.runtime, run.work(made_of), progress.update
        )


def check_any(judge: str, verdicts: Verdicts) -> None:
    """Raise WorkerError where there are texts and the judge gave no verdict on any."""
    if not verdicts or any(verdict.status == "ok" for verdict in verdicts.values()):
        return
    counts = Counter(verdict.status for verdict in verdicts.values())
    said = " ".join(next(iter(verdicts.values())).explanation.split())[:200]
    raise WorkerError(
        f"judge {judge} gave no verdict on any of {len(verdicts)} texts ({counted(counts)}); first it said: {said!r}"
    )


def counted(statuses: Mapping[str, int]) -> str:
    return ", ".join(f"{status} {count:,}" for status, count in sorted(statuses.items()))


def judgement_files(storage: Storage, made_of: Identity, verdicts: Verdicts) -> dict[str, str]:
    """Write what the judge said in both calls, by triple; those that it could not be asked about are left out.

    Returns the digests of the files of the table `judgements`.
    """
    files = {}
    told = sorted((t for t, v in verdicts.items() if v.status in FINAL), key=lambda triple: triple.digest)
    for prefix, part in split(told, batches.BATCH):
        name = f"judgements/{prefix or 'all'}.parquet"
        data = tables.encode([batches.row(triple, verdicts[triple]) for triple in part], tables.JUDGEMENTS)
        storage.write(f"{made_of.folder}/{name}", data)
        files[name] = digest(data)
    return files


def forget(storage: Storage, judge: Judge | None) -> None:
    """Remove what an LLM said: rebuilding asks it everything again."""
    for name in storage.names(judge.folder) if judge else ():
        storage.remove(name)
