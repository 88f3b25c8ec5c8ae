"""score: a verdict on every response. A verdict that could not be had is a status, never a 0."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from masters import schemas
from masters.artifacts import Artifact, Identity
from masters.identity import digest, fingerprint
from masters.rewards import rule_accuracy
from masters.tasks.stage import Context, Round, Run, build_or_reuse

VERSION = 1
JUDGE = "rules-1"  # the judge's name and version in the table; part of identity


def identity(context: Context, current: Round, responses: Artifact) -> Identity:
    keys = [Shard(name).key for name in responses.files("responses")]
    inputs = {f"shard-{key}": key for key in keys}
    return Identity(f"score{current.suffix}", VERSION, dict(judge=JUDGE), inputs, slug=context.config.name)


@task(name="score", task_run_name="score{current.suffix}", cache_policy=NO_CACHE)
def score(run: Run, current: Round, data: Artifact, responses: Artifact) -> Artifact:
    """Table `verdicts`, shard for shard beside `responses`."""
    answers = {
        row["question_id"]: (row["question"], row["answer"])
        for row in data.rows("questions", ["question_id", "question", "answer"])
    }
    shards = [Shard(name) for name in responses.files("responses")]
    made_of = identity(run, current, responses)

    def build() -> tuple[dict[str, str], dict, dict]:
        files, statuses, built = {}, {}, 0
        for shard in shards:
            if run.rebuilds(made_of):
                run.storage.remove(shard.file)
            if not run.storage.exists(shard.file):
                rows = verdicts(schemas.decode(run.storage.read(shard.responses)).to_pylist(), answers)
                run.storage.create(shard.file, schemas.encode(rows, schemas.VERDICTS))
                built += 1
            data_bytes = run.storage.read(shard.file)
            for status in schemas.decode(data_bytes, ["status"])["status"].to_pylist():
                statuses[status] = statuses.get(status, 0) + 1
            name = f"verdicts/{shard.key}.parquet"
            run.storage.copy(shard.file, f"{made_of.folder}/{name}")
            files[name] = digest(data_bytes)
        rows = sum(statuses.values())
        return files, dict(rows=rows, statuses=statuses), dict(shards=len(shards), shards_built=built)

    return build_or_reuse(run, made_of, build)


def verdicts(responses: list[dict], answers: dict[str, tuple[str, str]]) -> list[dict]:
    """Rows of the verdicts table for rows of the responses table."""
    rows = []
    for row in responses:
        question, reference = answers[row["question_id"]]
        verdict = rule_accuracy(question, reference, row["text"])
        key = {name: row[name] for name in ("question_id", "source", "mask_ratio", "sample")}
        rows.append(
            dict(**key, score=verdict.score, status=verdict.status, judge=JUDGE, explanation=verdict.explanation)
        )
    return rows


class Shard:
    """A shard of responses and the place of its verdicts. Its responses' name covers questions and references."""

    def __init__(self, responses: str) -> None:
        self.responses = responses
        source = responses.rsplit("/", 1)[1].removesuffix(".parquet")
        self.key = fingerprint(dict(version=VERSION, judge=JUDGE, responses=source))
        self.file = f"shards/verdicts/{self.key}.parquet"
