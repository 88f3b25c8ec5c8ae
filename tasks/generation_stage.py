"""Shared by `generate` and `evaluate`: answer shards with a progress bar, and report prompts that are too long."""

from collections.abc import Sequence

from masters.common.errors import MastersError
from masters.execution.engines import KeptEngine
from masters.models.generation import shards
from masters.models.generation.shards import ShardRequest
from masters.store import tables
from masters.store.artifacts import Artifact, Identity
from masters.store.storage import Storage
from masters.tasks.progress import warn
from masters.tasks.run_context import Run

REMEDY = "raise runtime.max_model_len (a model's max_position_embeddings bounds it too) or shrink images and questions"


def generate_shards(
    run: Run,
    identity: Identity,
    data: Artifact,
    requests: list[ShardRequest],
    later_requests: Sequence[ShardRequest] = (),
    kept_engine: KeptEngine | None = None,
) -> dict:
    """Have engines answer the missing shards of a stage, and return how they ran.

    `later_requests`: shards of later stages, answered while the engines of their models are up. `kept_engine`:
    see `engines.run`.
    """
    missing = len(shards.find_missing(run.storage, requests))
    with run.track_progress(identity, "questions") as progress:
        execution = shards.run_generation(
            data,
            [*requests, *later_requests],
            run.config.runtime,
            run.work_folder(identity),
            progress.update,
            kept_engine,
        )
    return execution | dict(shards=len(requests), shards_built=missing, shards_reused=len(requests) - missing)


def too_long_facts(storage: Storage, requests: list[ShardRequest]) -> dict[str, int]:
    """Count the prompts that were too long to be asked, as the facts `rejected` (rows) and `prompts_too_long`.

    Returns no facts if every prompt fitted. Raises MastersError if none did, after deleting the shards, so that a
    larger maximum length can be tried.
    """
    rows = prompts = 0
    for request in requests:
        reasons = tables.read(storage, request.file, ["finish_reason"])["finish_reason"].to_pylist()
        too_long = reasons.count(tables.PROMPT_TOO_LONG)
        rows += too_long
        prompts += too_long // request.samples
    if requests and prompts == sum(len(request.shard.refs) for request in requests):
        delete_shards(storage, requests)
        raise MastersError(f"all {prompts:,} prompts are longer than the engine admits: {REMEDY}")
    return dict(rejected=rows, prompts_too_long=prompts) if rows else {}


def warn_too_long(run: Run, identity: Identity, artifact: Artifact, consequence: str) -> None:
    """Report prompts that were too long, in the stage's entry and in a warning, for a reused artifact too."""
    if prompts := artifact.facts.get("prompts_too_long"):
        run.stages[-1]["prompts_too_long"] = prompts
        warn(
            f"{identity.stage}: prompts longer than the engine admits: {prompts:,}; {consequence}; "
            f"{REMEDY}, then generate them with --rebuild {identity.kind}"
        )


def delete_shards(storage: Storage, requests: list[ShardRequest]) -> None:
    """Delete the stored shards of these requests, so that a rebuild generates every one again."""
    for request in requests:
        storage.remove(request.file)
        if request.batch:
            storage.remove(request.whole_file)
