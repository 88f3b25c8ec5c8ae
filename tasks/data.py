"""data: turn a source into the tables `questions` and `rejected`.

Two passes over the source: the first selects rows (`masters.data.question_selection`), the second writes them
(`masters.data.question_table`).
"""

from prefect import task

from masters.common.errors import InputError
from masters.config.schema import BUILT_IN_SOURCES
from masters.data.question_selection import SOURCE_CHANGED, QuestionKey, check_leaks, describe_leaks
from masters.data.question_table import source_origin, write_tables
from masters.store.artifacts import Artifact, External, Identity
from masters.tasks.build_or_reuse import TASK_OPTIONS, StageResult, build_or_reuse
from masters.tasks.progress import warn
from masters.tasks.run_context import Context, Run

VERSION = 6  # 5: image_digest; 6: accepted_answers
# version of the rules by which rows are read; the rows of built-in sources need none of them. 2: numbers as text,
# image placeholders, URIs, names of splits; 3: names of classes in lists, decimals, HTML and Markdown in questions
ROW_RULES = 3


def make_identity(context: Context) -> Identity:
    """Return the identity: content of the source, limits and refused tokens.

    `data.max_rejected_share` and `data.max_leaked_share` take no part, as they change no row. Neither does
    `data.fetch_images`: the source's digest covers the images that were fetched.
    """
    settings = context.config.data
    config = dict(
        train_limit=settings.train_limit,
        eval_limit=settings.eval_limit,
        special_tokens=list(context.resources.special_tokens),
    )
    if settings.source not in BUILT_IN_SOURCES:
        config |= dict(row_rules=ROW_RULES)
    if settings.validation_share:
        config |= dict(validation_share=settings.validation_share)
    inputs = {"source": context.resources.source.digest()}
    if context.known_data:
        inputs["known"] = context.known_data.fingerprint
    return Identity("data", VERSION, config, inputs, slug=context.config.name)


@task(name="data", **TASK_OPTIONS)
def data(run: Run) -> Artifact:
    """Build the tables `questions` and `rejected`. Raises InputError if the source is unusable."""
    settings, source = run.config.data, run.resources.source
    identity, known = make_identity(run), training_questions(run.known_data)

    def build() -> StageResult:
        special_tokens = run.resources.special_tokens
        files, facts = write_tables(run.config, source, run.storage, identity.folder, special_tokens, known)
        if source.digest() != identity.inputs["source"]:  # it changed before the first pass: no pass could notice
            raise InputError(SOURCE_CHANGED)
        return StageResult(files, facts)

    upstream: dict[str, Artifact | External] = {"source": source_origin(settings, identity.inputs["source"])}
    if run.known_data:
        upstream["known"] = run.known_data
    artifact = build_or_reuse(run, identity, upstream, build)
    facts, limit = artifact.facts, settings.max_rejected_share
    if facts["rejected"] > limit * facts["read"]:  # a reused table was built under another limit
        raise InputError(
            f"source {settings.source}: {facts['rejected']} of {facts['read']} rows rejected, more than "
            f"data.max_rejected_share ({limit:.1%}); all of them: {artifact.uri}/rejected"
        )
    # tables of earlier versions have neither fact
    run.stages[-1] |= {name: facts[name] for name in ("leaked", "remarks") if facts.get(name)}
    if leaked := facts.get("leaked"):
        check_leaks(leaked, facts["eval"], run.config)
        warn(f"data: {describe_leaks(leaked, facts['eval'])}")
    return artifact


def training_questions(data: Artifact | None) -> set[QuestionKey]:
    """Collect the training questions of a data artifact, and of the earlier ones whose questions it left out."""
    keys: set[QuestionKey] = set()
    while data:
        rows = data.rows("questions", ["question_id", "question_digest", "split"])
        keys |= {(row["question_id"], row["question_digest"]) for row in rows if row["split"] == "train"}
        data = data.upstream("known")
    return keys
