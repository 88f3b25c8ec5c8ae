"""data: a source becomes the tables `questions` and `rejected`.

Two passes over the source: the first selects rows (`masters.data.selection`), the second writes them
(`masters.data.question_table`).
"""

from prefect import task

from masters.common.errors import InputError
from masters.data.question_table import origin, write_tables
from masters.data.selection import CHANGED, Question
from masters.store.artifacts import Artifact, External, Identity
from masters.tasks.build import STAGE, build_or_reuse
from masters.tasks.run_context import Context, Run

VERSION = 6  # 5: image_digest; 6: accepted_answers


def identity(context: Context) -> Identity:
    """Content of the source, limits and the texts refused. How many rejections are tolerated shapes no row."""
    data = context.config.data
    limits = dict(train_limit=data.train_limit, eval_limit=data.eval_limit)
    semantic = limits | dict(special_tokens=list(context.ready.special_tokens))
    if data.validation_share:
        semantic |= dict(validation_share=data.validation_share)
    inputs = {"source": context.ready.source.digest()}
    if context.known:
        inputs["known"] = context.known.fingerprint
    return Identity("data", VERSION, semantic, inputs, slug=context.config.name)


@task(name="data", **STAGE)
def data(run: Run) -> Artifact:
    """Tables `questions` and `rejected`. Raises InputError if the source is at fault."""
    config, source, special_tokens = run.config, run.ready.source, run.ready.special_tokens
    made_of, known = identity(run), training_questions(run.known)

    def build() -> tuple[dict[str, str], dict, dict]:
        made = write_tables(config, source, run.storage, made_of.folder, special_tokens, known)
        if source.digest() != made_of.inputs["source"]:  # written to before the first pass: both found the new rows
            raise InputError(CHANGED)
        return *made, {}

    upstream: dict[str, Artifact | External] = {"source": origin(config.data, made_of.inputs["source"])}
    artifact = build_or_reuse(run, made_of, upstream | ({"known": run.known} if run.known else {}), build)
    facts, limit = artifact.facts, config.data.max_rejected_share
    # the tolerated share is no part of identity: a reused table is held to today's
    if facts["rejected"] > limit * facts["read"]:
        raise InputError(
            f"source {config.data.source}: {facts['rejected']} of {facts['read']} rows rejected, more than "
            f"data.max_rejected_share ({limit:.1%}); all of them: {artifact.uri}/rejected"
        )
    return artifact


def training_questions(data: Artifact | None) -> set[Question]:
    """Ids and digests of the training questions of a data artifact and of all that it left out as known."""
    found: set[Question] = set()
    while data:
        rows = data.rows("questions", ["question_id", "question_digest", "split"])
        found |= {(row["question_id"], row["question_digest"]) for row in rows if row["split"] == "train"}
        data = data.upstream("known")
    return found
