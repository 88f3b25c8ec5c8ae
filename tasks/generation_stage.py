"""What generate and evaluate share: their shards answered by engines, with a bar, and what is said of questions that
could not be asked.
"""

from collections.abc import Sequence

from masters.common.errors import MastersError
from masters.execution.engines import Stay
from masters.execution.processes import Child
from masters.models.generation import shards
from masters.models.generation.shards import ShardRequest
from masters.store import tables
from masters.store.artifacts import Artifact, Identity
from masters.store.storage import Storage
from masters.tasks.progress import warn
from masters.tasks.run_context import Run

REMEDY = "raise runtime.max_model_len (a model's max_position_embeddings bounds it too) or shrink images and questions"


def answer(
    run: Run,
    made_of: Identity,
    data: Artifact,
    asked: list[ShardRequest],
    ahead: Sequence[ShardRequest] = (),
    beside: Child | None = None,
    stay: Stay | None = None,
) -> dict:
    """Have the orders answered; the shards lie in the store then. Returns how it ran.

    `ahead`: orders of a later stage, answered while the engines of their models are up; `beside`: a process that runs
    with them; `stay`: see `engines.run`.
    """
    built = len(shards.missing_shards(run.storage, asked))
    with run.progress(made_of, "questions") as progress:
        how = shards.run_generation(
            data, [*asked, *ahead], run.config.runtime, run.work(made_of),
            progress.update, beside, stay,
        )  # fmt: skip
    return how | dict(shards=len(asked), shards_built=built, shards_reused=len(asked) - built)


def set_aside(storage: Storage, asked: list[ShardRequest]) -> dict[str, int]:
    """Facts on what could not be asked, none if all could: `rejected` rows and `prompts_too_long`.

    Raises MastersError where no prompt fits; the shards are removed, so that another length can be tried.
    """
    rows = prompts = 0
    for order in asked:
        reasons = tables.read(storage, order.file, ["finish_reason"])["finish_reason"].to_pylist()
        rows += (refused := reasons.count(tables.PROMPT_TOO_LONG))
        prompts += refused // order.samples
    if asked and prompts == sum(len(order.shard.refs) for order in asked):
        forget(storage, asked)
        raise MastersError(f"every prompt, of {prompts:,}, is longer than what the engine admits: {REMEDY}")
    return dict(rejected=rows, prompts_too_long=prompts) if rows else {}


def tell_set_aside(run: Run, made_of: Identity, artifact: Artifact, consequence: str) -> Artifact:
    """Counts in the stage's entry and a warning, whether the artifact was built or reused. Returns it."""
    if prompts := artifact.facts.get("prompts_too_long"):
        run.stages[-1]["prompts_too_long"] = prompts
        warn(
            f"{made_of.stage}: prompts longer than what the engine admits: {prompts:,}; {consequence}; "
            f"{REMEDY}, then ask again with --rebuild {made_of.kind}"
        )
    return artifact


def forget(storage: Storage, asked: list[ShardRequest]) -> None:
    """Remove the shards of these orders: rebuilding answers every one again."""
    for order in asked:
        storage.remove(order.file)
        if order.batch:
            storage.remove(order.whole)
